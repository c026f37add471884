"""Attributes: what is asked, how answers are read, merged and worded.

Read ``attributes.py`` first. In: answers. Out: captions with confidences.
"""
