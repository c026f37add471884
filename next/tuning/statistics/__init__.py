"""What a sweep's scores are worth.

Read ``seeds.py`` first: the noise floor and the race. In: trials. Out: verdicts.
"""
