"""Embedding, and retrieval scores by the card's protocol.

Read ``protocol.py`` first. In: a network and samples. Out: scores, by query.
"""
