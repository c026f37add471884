"""From raw folders to batches: shards, decoded cache, plans, captions.

Read ``loading/loader.py`` first. In: a raw folder and a card. Out: batches of images and captions.
"""
