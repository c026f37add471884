"""A run on a Ray cluster.

Read ``workers.py`` first. In: a configuration. Out: the same run, on several workers.
"""
