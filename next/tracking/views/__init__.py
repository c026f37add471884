"""What MLflow's pages show of runs and sweeps.

Read ``comparison.py`` first. In: a sweep's run. Out: its table, charts and image grid.
"""
