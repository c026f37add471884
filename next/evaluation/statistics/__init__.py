"""How far scores can be trusted.

Read ``noise.py`` first. In: scores over seeds and queries. Out: differences with intervals.
"""
