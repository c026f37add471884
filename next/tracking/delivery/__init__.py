"""From a run's journal to MLflow and to the run's store.

Read ``sender.py`` first. In: journal lines. Out: each of them once on the server.
"""
