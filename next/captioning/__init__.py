"""Captions by attribute confidence: ask, merge, write, and measure what was written."""
