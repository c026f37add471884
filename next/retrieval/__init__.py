"""Galleries of embeddings on a disk, and the search in them.

Read ``gallery.py`` first. In: a checkpoint and samples. Out: a gallery, and its nearest rows.
"""
