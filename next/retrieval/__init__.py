"""Galleries of embeddings on a disk, and the search in them."""
