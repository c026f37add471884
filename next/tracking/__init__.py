"""Runs in MLflow: journal, sender, provenance."""
