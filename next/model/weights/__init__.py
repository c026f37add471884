"""Pretrained weights: found, fetched, checked and read without running anything.

Read ``files.py`` first. In: a name or a file. Out: tensors by name.
"""
