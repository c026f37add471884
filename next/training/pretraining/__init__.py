"""Contrastive training of both towers on images and captions.

Read ``run.py`` first. In: shards with captions. Out: a file of weights.
"""
