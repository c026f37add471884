"""Checks that catch the usual mistakes of a set-up before they cost hours of a GPU.

Read ``examination.py`` first. In: a configuration and this machine. Out: findings and
their remedies.
"""
