"""Checkpoints: written whole, kept, found, and asked for from outside.

Read ``checkpoint.py`` first. In: the state of a run. Out: a folder that continues it.
"""
