"""The thread of a run: brings its journal to the disk, to the run's store and to the server."""

from __future__ import annotations

import logging
import threading
import time

from next.tracking.delivery.client import NotDelivered
from next.tracking.delivery.delivery import Address, Delivery
from next.tracking.delivery.presence import hangs, is_silent, note_answer
from next.tracking.delivery.publication import Publication, TakenOverError
from next.tracking.journal import FILE_NAME, Journal
from next.tracking.server import replay_command

_log = logging.getLogger(__name__)

_PAUSE = 2.0
"""Seconds between deliveries; a request costs the server about 30 ms of a core."""
_PUBLISH_SECONDS = 15.0
"""Seconds between segments of the journal in the store, beside those at checkpoints."""
_RETRY = 0.5
"""Seconds between attempts while the server may only be starting; twice that each time later."""
_LONGEST_RETRY = 15.0
"""Seconds between attempts in the end."""
_STARTING = 20.0
"""Seconds after which a server that does not answer is worth a warning."""
_LOOK = 2.0
"""Seconds for which a server is waited for before it is asked whether it answers at all."""
_NEXT_LOOK = 0.2
"""The same for one that hung when it was last asked."""


class Sender:
    """Works until :meth:`finish`; owns the journal's closing.

    Where the run has a store, the server gets what the store has.
    """

    def __init__(
        self,
        journal: Journal,
        delivery: Delivery | None,
        publication: Publication | None = None,
    ) -> None:
        self._journal = journal
        self._delivery = delivery
        self._publication = publication
        self._publish_at = time.monotonic() + _PUBLISH_SECONDS
        self._unpublished: OSError | None = None
        self._finishing = threading.Event()
        self._given_up = threading.Event()
        self._located = threading.Event()
        self._away_since: float | None = None
        self._warned = False
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
        self._thread.start()

    def address(self, timeout: float) -> Address:
        """The MLflow run; waits for it up to ``timeout`` seconds from when the server went away."""
        if self._delivery is None:
            return Address()
        deadline = time.monotonic() + max(timeout - self._away(), 0)
        while not self._located.wait(self._look(deadline)):
            if time.monotonic() >= deadline or self._hangs():
                break
        return self._delivery.address

    def publish(self) -> None:
        """Bring the journal to the run's store now; nothing where it has none.

        Raises:
            OSError: the store cannot be reached or is full.
            TakenOverError: another process goes on with this run.
        """
        if self._publication is not None:
            self._publication.publish()
            self._publish_at = time.monotonic() + _PUBLISH_SECONDS
            if self._unpublished is not None:
                _log.warning("the journal is in %s again", self._publication.store.uri)
                self._unpublished = None

    def finish(self, timeout: float) -> None:
        """Deliver the rest within ``timeout`` seconds, or say how to do it later.

        A server that hangs is not waited for beyond :data:`_LOOK` and
        :data:`next.tracking.delivery.presence.SILENT_SECONDS`. The journal is closed in any case.
        """
        if self._away() > timeout:
            timeout = min(timeout, 3.0)
        deadline = time.monotonic() + timeout
        self._finishing.set()
        self._thread.join(self._look(deadline))
        while self._thread.is_alive() and time.monotonic() < deadline and not self._hangs():
            self._thread.join(self._look(deadline))
        self._given_up.set()
        if self._delivery is not None:
            self._delivery.give_up()  # the thread may still wait for an answer
        self._journal.close()
        if self._unpublished is not None:
            _log.warning(
                "the end of the journal in %s is not in the run's store (%s); opening the run "
                "again on this machine brings it there",
                *(self._journal.path, self._unpublished),
            )
        left = self._delivery.undelivered() if self._delivery else 0
        if self._delivery and left:
            folder, uri = self._delivery.folder, self._delivery.uri
            _log.warning(
                "%d records of the run in %s are not on the tracking server%s; its %s has them. "
                "Opening the run again delivers them, and so does: %s",
                *(left, folder, ", which does not answer" if is_silent(uri) else "", FILE_NAME),
                replay_command(folder, uri),
            )

    def _look(self, deadline: float) -> float:
        """Seconds to wait before the server is asked whether it answers at all."""
        hung = self._delivery is not None and is_silent(self._delivery.uri)
        return max(min(deadline - time.monotonic(), _NEXT_LOOK if hung else _LOOK), 0)

    def _hangs(self) -> bool:
        return self._delivery is not None and hangs(self._delivery.uri)

    def _work(self) -> None:
        pause, fresh = 0.0, True
        try:
            while not self._given_up.is_set():
                last = self._finishing.wait(pause)
                self._journal.sync()
                published = self._published(now=last)
                if self._deliver(retry_aside=fresh or last) and published:
                    if last:
                        self._publish_address()
                        return
                    pause, fresh = _PAUSE, False
                else:
                    if last:
                        self._given_up.wait(_RETRY)
                    starting = self._away() < _STARTING
                    pause = _RETRY if starting else min(2 * pause, _LONGEST_RETRY)
        finally:
            self._journal.close()

    def _published(self, *, now: bool) -> bool:
        """Whether the store (if there is one) has what is due; for good if another has the run."""
        if self._publication is None:
            return True
        if self._publication.published and not now and time.monotonic() < self._publish_at:
            return True
        try:
            self.publish()
        except OSError as error:
            self._publish_at = time.monotonic() + _PUBLISH_SECONDS
            if self._unpublished is None:
                _log.warning("the journal waits for its store, training goes on: %s", error)
            self._unpublished = error
            return False
        except TakenOverError as error:
            self._publish_at = time.monotonic() + _PUBLISH_SECONDS
            _log.debug("%s", error)  # who publishes with a checkpoint raises it
        return True

    def _publish_address(self) -> None:
        if self._publication is not None and self._delivery is not None:
            try:
                self._publication.publish_address()
            except OSError as error:
                _log.debug("run.json is not in the store: %s", error)

    def _deliver(self, *, retry_aside: bool) -> bool:
        """Whether the server (if there is one) took everything that it would take."""
        if self._delivery is None:
            return True
        if self._publication is not None and not self._publication.published:
            return True  # whoever goes on elsewhere would make the run once more
        try:
            self._delivery.locate()
            self._located.set()
            note_answer(self._delivery.uri)
            until = None if self._publication is None else self._publication.published
            self._delivery.deliver(retry_aside=retry_aside, until=until)
        except NotDelivered as error:
            if not self._given_up.is_set():
                self._note_absence(error)
            return False
        except Exception:
            _log.exception("tracking failed unexpectedly and will try again; training goes on")
            return False
        note_answer(self._delivery.uri)
        if self._warned:
            _log.warning("tracking: the server is back after %.0f s", self._away())
        self._away_since, self._warned = None, False
        return True

    def _note_absence(self, error: NotDelivered) -> None:
        if self._away_since is None:
            self._away_since = time.monotonic()
            _log.info("tracking waits for its server, training goes on: %s", error)
        elif not self._warned and self._away() > _STARTING:
            self._warned = True
            _log.warning("tracking waits for its server, training goes on: %s", error)

    def _away(self) -> float:
        since = self._away_since
        return 0.0 if since is None else time.monotonic() - since
