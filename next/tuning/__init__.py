"""Sweeps with Ray Tune and Optuna.

Read ``sweep.py`` first. In: a space and a base configuration. Out: trials, verdicts, a report.
"""
