"""The NEXT network: pure torch, no Ray, no MLflow, no files (but weights)."""
