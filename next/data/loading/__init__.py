"""From shards to batches.

Read ``loader.py`` first; ``plan.py`` decides what stands in a batch. In: shards. Out: batches.
"""
