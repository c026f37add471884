"""A sweep's record in the sweep's store, from which any head can go on.

``config.toml``, ``sweep.toml``, ``space.py`` and ``study.db`` lie there as they lie in the driver's
folder; ``record.json`` counts how often they were stored, and is written last. The study goes there
before anything follows from it: with each draw before the trial starts, with each ending, and every
few seconds while trials report.
"""

from __future__ import annotations

import json
import logging
import sqlite3
import tempfile
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing
from pathlib import Path
from typing import Any

from ray.tune.search import Searcher

from next.lease import Lease
from next.storage import open_folder, write_whole
from next.training.checkpointing.store import StoreError
from next.tuning.folder import TEXTS, resume_command
from next.tuning.home import Home
from next.tuning.search.searcher import Search
from next.tuning.search.study import FILE
from next.tuning.settings import COUNT

_log = logging.getLogger(__name__)

_COUNT_HERE = ".record.json"
_SAVE_SECONDS = 10.0
"""Least time between two copies for reports alone."""
_RETRY_SECONDS = 2.0
_MIRROR_SECONDS = 60.0


class StoredRecord:
    """Brings a sweep's record to its store for as long as the ``with`` block runs.

    Args:
        folder: of the sweep on the driver's machine.
        lease: that this process holds, of the sweep's store.
    """

    def __init__(self, folder: Path, lease: Lease) -> None:
        self.folder = folder
        self.store = lease.held
        self._lease = lease
        self._count = max(_count(self._read_count()), _count(_read(folder / _COUNT_HERE)))
        self._texts: dict[str, bytes] = {}
        self._guard = threading.Lock()
        self._asked, self._ended = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, name="record", daemon=True)
        self._mirrors = ThreadPoolExecutor(2, thread_name_prefix="mirror")
        self._mirrored: list[Future[None]] = []

    def __enter__(self) -> StoredRecord:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._asked.set()
        self._thread.join()
        self._mirrors.shutdown()

    def save(self) -> None:
        """Store the record as it is now.

        Raises:
            OSError: the store cannot be reached or is full; what it had is untouched.
            LostLeaseError: another driver goes on with the sweep.
        """
        with self._guard, tempfile.TemporaryDirectory(prefix="next-record-") as parent:
            self._asked.clear()
            self._lease.check()
            for name in TEXTS:
                text = (self.folder / name).read_bytes()
                if self._texts.get(name) != text:
                    self.store.write(name, text)
                    self._texts[name] = text
            self.store.upload(_copy_study(self.folder / FILE, Path(parent)), FILE)
            count = json.dumps({"saved": self._count + 1})
            self.store.write(COUNT, count.encode())
            write_whole(self.folder / _COUNT_HERE, count)
            self._count += 1

    def ask(self) -> None:
        """Have it stored soon."""
        self._asked.set()

    def mirror(self, home: Home) -> None:
        """Bring an ended trial's results here, beside what the driver does."""
        self._mirrored.append(self._mirrors.submit(_mirror, home))

    def await_mirrors(self) -> None:
        """Return once what ended trials left is here, or after a minute."""
        wait(self._mirrored, timeout=_MIRROR_SECONDS)
        self._mirrored = [mirror for mirror in self._mirrored if not mirror.done()]

    def _read_count(self) -> bytes:
        return self.store.read(COUNT) if self.store.size(COUNT) is not None else b""

    def _work(self) -> None:
        while not self._ended.is_set():
            self._asked.wait()
            if self._ended.is_set():
                return
            began = time.monotonic()
            try:
                self.save()
            except Exception as error:  # who draws next meets it, and says so
                self._asked.set()
                _log.debug("the record of the sweep is not stored: %s", error)
            # A large study takes its time: at most a tenth of the driver's goes into copies.
            self._ended.wait(max(_SAVE_SECONDS, 10 * (time.monotonic() - began)))


class StoredSearch(Search):
    """A search whose every draw is in the sweep's store before the trial starts.

    While the store is away no trial is drawn; those that run go on.

    Args:
        record: of the sweep.
        folder: of the sweep on this machine.
        given: as :class:`next.tuning.search.searcher.Search` takes it.
    """

    def __init__(self, record: StoredRecord, folder: Path, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._record = record
        self._folder = folder
        self._away_since: float | None = None
        self._tried = 0.0
        self._interrupted: str | None = None
        self._blamed: dict[str, str] = {}
        """Ids of the nodes that were left out for their way to the store, by name of the trial."""
        self._elsewhere: set[str] = set()
        """Trials that go on on another node than the one whose disk or store failed."""

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """As a search does, once the store has the draw.

        Raises:
            StoreError: it, or the store of a trial, could not be written for
                ``checkpoint.patience_s``.
            LostLeaseError: another driver goes on with the sweep.
        """
        if self._interrupted is not None:
            if self.live:
                return None
            raise self._given_up(self._interrupted)
        if self._away_since is not None and time.monotonic() < self._tried + _RETRY_SECONDS:
            return None
        task = super().suggest(trial_id)
        if task is None or (task == Searcher.FINISHED and self._away_since is None):
            return task
        if self._saved():
            return task
        if isinstance(task, dict):
            self._left.insert(0, self.live.pop(trial_id))
        return None

    def report(self, trial_id: str, result: Mapping[str, Any]) -> bool:
        """As a search does; stored soon. A trial whose store failed stays unfinished."""
        if "interrupted" in result:
            self._take_interruption(trial_id, result)
            return True
        stop = super().report(trial_id, result)
        self._record.ask()
        return stop

    def _take_interruption(self, trial_id: str, told: Mapping[str, Any]) -> None:
        """A trial's disk or store failed: for its node alone, which is left out, or for all.

        A full disk is its node's. A store that fails a trial on two nodes fails for all, or for
        what the trial writes; one that fails it twice on one node is out of that node's reach.
        """
        why, node = str(told["interrupted"]), told.get("node")
        name = self.live[trial_id].name
        for_all = not told.get("disk") and self._blamed.get(name, node) != node
        if node is None or for_all or not self.slots.can_do_without(node) or not self._stores():
            self._interrupted = why
            return
        if not told.get("disk"):
            self._blamed[name] = node
        self.fail(trial_id, why, machine_lost=True, unfit=node)
        self._elsewhere.add(trial_id)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """As a search does; the ending is stored, and what the trial left is brought here."""
        error = error or trial_id in self._elsewhere
        self._elsewhere.discard(trial_id)
        if self._interrupted is not None and (result or {}).get("interrupted"):
            run = self.live.pop(trial_id)
            _log.warning("%s stays unfinished: %s", run.name, self._interrupted)
            return
        name = self.live[trial_id].name
        super().on_trial_complete(trial_id, result, error)
        self._saved()
        self._record.mirror(Home(self._folder / "trials" / name, self.base))

    def _stores(self) -> bool:
        """Whether the store takes the record, from here and now."""
        try:
            self._record.save()
        except OSError:
            return False
        return True

    def _saved(self) -> bool:
        """Store the record; False: the store is away, and not yet for too long."""
        self._tried = time.monotonic()
        try:
            self._record.save()
        except OSError as error:
            patience = self.base.checkpoint.patience_s
            if self._away_since is None:
                self._away_since = self._tried
                _log.warning(
                    "the record of the sweep cannot be stored (%s): no trial begins, and it is "
                    "tried again for %.0f s",
                    *(error, patience),
                )
            if self._tried - self._away_since < patience:
                return False
            raise self._given_up(
                f"the record of the sweep could not be stored for {patience:.0f} s "
                f"(checkpoint.patience_s): {error}"
            ) from error
        if self._away_since is not None:
            _log.warning("the record of the sweep is stored again")
            self._away_since = None
        return True

    def _given_up(self, why: str) -> StoreError:
        return StoreError(
            f"{why}. The record is kept whole in {self._folder} on this machine, and trials that "
            f"had begun go on from their last checkpoint: mend that, and give "
            f"`{resume_command(self._folder)}` here"
        )


def fetch_record(folder: Path, store: str) -> bool:
    """Bring a sweep's record from its store where that is newer; whether it was.

    A study that another head has left behind is set aside.

    Args:
        folder: of the sweep on this machine; it need not be there.
        store: of the sweep.

    Raises:
        OSError: the store cannot be reached.
    """
    kept = open_folder(store)
    if kept.size(COUNT) is None:  # it was never stored as a whole
        return False
    there = kept.read(COUNT)
    study = folder / FILE
    if study.is_file() and _count(_read(folder / _COUNT_HERE)) >= _count(there):
        return False
    suffix = time.strftime("%Y%m%d-%H%M%S")
    for name in (FILE, f"{FILE}-wal", f"{FILE}-shm"):
        if (folder / name).exists():
            (folder / name).replace(folder / f"{name}.{suffix}")
            _log.warning("%s is older than %s, and is set aside", folder / name, kept.uri)
    for name in (FILE, *TEXTS):
        write_whole(folder / name, kept.read(name))
    write_whole(folder / _COUNT_HERE, there)
    return True


def _copy_study(path: Path, parent: Path) -> Path:
    """A copy of a study file in one piece, whoever writes to it meanwhile."""
    copy = parent / FILE
    with closing(sqlite3.connect(path)) as source, closing(sqlite3.connect(copy)) as target:
        source.backup(target)
        target.execute("PRAGMA journal_mode = DELETE")
    return copy


def _mirror(home: Home) -> None:
    try:
        home.mirror()
    except OSError as error:
        _log.info("%s; it is tried again when the sweep ends", error)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""


def _count(text: bytes) -> int:
    try:
        return int(json.loads(text)["saved"])
    except (KeyError, TypeError, ValueError):
        return -1
