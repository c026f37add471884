"""The procedural benchmark: people, drawn as three spectra see them, from a seed.

Read ``benchmark.py`` first. In: sizes and a seed. Out: a raw folder like a camera network's.
"""
