"""What a sweep draws next.

Read ``space.py`` first, then ``searcher.py``. In: a space. Out: trials with settings.
"""
