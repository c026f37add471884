"""Checks that catch the usual mistakes of a set-up before they cost hours of a GPU."""
