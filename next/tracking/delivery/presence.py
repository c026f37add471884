"""Which tracking servers hang: one that does takes connections and never answers.

A request to it ends only by its time-out, and at the end of a run there are many. So it is asked
for a page that costs nothing, and what is known of it is kept for the next who would wait. A server
that has not answered this process yet may be starting, and is waited for as any other.
"""

from __future__ import annotations

import urllib.error
import urllib.request

from next.addresses import reach_directly

SILENT_SECONDS = 5.0
"""How long a server may need for that page before it counts as hanging."""
_AGAIN_SECONDS = 1.0
"""The same for one that hung when it was last asked."""
_known: set[str] = set()
"""Servers that have answered this process."""
_silent: set[str] = set()


def is_silent(uri: str) -> bool:
    """Whether a server did not answer when it was last asked."""
    return uri in _silent


def note_answer(uri: str) -> None:
    """Remember that a server answered."""
    _known.add(uri)
    _silent.discard(uri)


def note_start(uri: str) -> None:
    """Remember that a server starts, so that it will not answer for a while."""
    _known.discard(uri)
    _silent.discard(uri)


def hangs(uri: str) -> bool:
    """Whether a server that has answered does so no more; it is asked."""
    return uri in _known and not answers(uri)


def answers(uri: str) -> bool:
    """Whether a server says anything at all, be it an error; one that is not there does, too."""
    seconds = _AGAIN_SECONDS if is_silent(uri) else SILENT_SECONDS
    reach_directly(uri)
    try:
        urllib.request.urlopen(f"{uri}/health", timeout=seconds).close()
        note_answer(uri)
    except urllib.error.HTTPError:
        note_answer(uri)
    except (OSError, ValueError) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(reason, TimeoutError):
            _silent.add(uri)
            return False
        _silent.discard(uri)
    return True


def require_answer(uri: str) -> None:
    """Raise where a server does not answer, before many requests find that out one by one.

    Raises:
        ConnectionError: it does not.
    """
    if not answers(uri):
        raise ConnectionError(
            f"the tracking server at {uri} takes connections but does not answer; start it again"
        )
