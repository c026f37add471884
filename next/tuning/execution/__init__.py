"""Where and how trials run.

Read ``tuner.py`` first. In: a trial's settings. Out: its evaluations, as they come.
"""
