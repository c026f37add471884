"""The pictures of one evaluated model.

Read ``all.py`` first. In: a network and an evaluation. Out: the paths of its pictures.
"""
