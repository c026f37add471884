"""The towers: Vision Transformers for images, and the text tower.

Read ``backbone.py`` first. In: images or texts. Out: tokens in the shared space.
"""
