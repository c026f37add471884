"""A service that embeds images and searches galleries over HTTP, on Ray Serve.

Read ``application.py`` first. In: a model, galleries by it, and images of others. Out: JSON, and a
page for people.
"""
