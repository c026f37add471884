"""Runs in MLflow: journal first, then a sender.

Read ``run.py`` first. In: a run's metrics and files. Out: the same on the tracking server.
"""
