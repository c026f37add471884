"""Requests to models, paid for once.

Read ``engine.py`` first. In: images and models. Out: answers in a ledger.
"""
