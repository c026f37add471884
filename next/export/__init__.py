"""Trained models for programs that know nothing of this package.

Read ``bundle.py`` first. In: a checkpoint. Out: an ONNX or torch program, and how equal it is.
"""
