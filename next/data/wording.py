"""Counts and names in messages."""

from __future__ import annotations

from collections.abc import Iterable

SHOWN = 5
"""Names that a message lists before it only counts."""


def count(number: int, one: str, many: str | None = None) -> str:
    """``1 file``, ``2 files``; ``many`` where adding an s does not do.

    Example:
        >>> count(2, "identity", "identities")
        '2 identities'
    """
    return f"{number} {one if number == 1 else many or one + 's'}"


def some(names: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    listed = list(names)
    more = len(listed) - SHOWN
    return ", ".join(listed[:SHOWN]) + (f" and {more} more" if more > 0 else "")
