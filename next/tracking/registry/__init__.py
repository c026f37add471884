"""Trained models in MLflow's registry.

Read ``versions.py`` first. In: a model and its card. Out: a version, and its aliases.
"""
