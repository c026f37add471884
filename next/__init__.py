"""NEXT on Ray: train, search and compare multi-modal object re-identification models."""

__version__ = "0.1.0"
