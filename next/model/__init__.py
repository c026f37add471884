"""The NEXT network: pure torch, no Ray, no MLflow, no files (but weights).

Read ``network.py`` first. In: images, captions, cameras. Out: embeddings and logits.
"""
