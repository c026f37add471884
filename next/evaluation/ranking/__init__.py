"""Rankings and their metrics.

Read ``metrics.py`` first. In: features and labels. Out: mAP, CMC and mINP, by query.
"""
