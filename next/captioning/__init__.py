"""Captions by attribute confidence: ask, merge, write, and measure what was written.

Read ``run.py`` first. In: shards and a schema. Out: a caption file, and a ledger of all answers.
"""
