"""A sweep's report: page, charts, and MLflow's comparison.

Read ``report.py`` first. In: trials and verdicts. Out: ``report.html``, ``sweep.json``, pictures.
"""
