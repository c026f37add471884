"""Raw folders of images, validated.

Read ``ingest.py`` first. In: a folder and a card. Out: samples with checked images.
"""
