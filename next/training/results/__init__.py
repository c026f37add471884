"""What a finished run leaves: scores, pictures, MLflow's records, a registered model.

Read ``assessment.py`` first. In: a checkpoint. Out: files and records.
"""
