"""Everything that is drawn of data, runs and models, as PNG files.

Read ``canvas.py`` first. In: numbers and images. Out: files with the same bytes each time.
"""
