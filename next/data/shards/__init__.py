"""Prepared data: Parquet shards, their index and their manifest.

Read ``reader.py`` first. In: validated samples. Out: shards that a digest names.
"""
