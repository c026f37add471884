"""One optimizer step: the optimizer, its device, its cost and its log.

Read ``optimizer.py`` first. In: losses. Out: changed weights.
"""
