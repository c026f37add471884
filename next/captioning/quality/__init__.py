"""What captions are worth.

Read ``report.py`` first. In: captions, and labels if known. Out: a report.
"""
