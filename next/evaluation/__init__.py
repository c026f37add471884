"""Embedding, retrieval metrics by the card's protocol, and figures."""
