"""The training loop and what launches it.

Read ``loop.py`` first. In: a configuration and shards. Out: checkpoints, scores and a journal.
"""
