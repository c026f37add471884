"""The checkpoints of a run: how the best epoch is chosen, and where the run continues.

A store is a folder of checkpoints, named by their optimizer step::

    step-00000040             within an epoch
    step-00000048-evaluated   at its end, with the scores of its weights
    last, best                links to two of them (on disks)

It keeps the two newest, so that there is one to fall back to, and the best ones. In an object store
a checkpoint is uploaded with ``state.json`` last, and read by way of a temporary folder. What else
a run leaves may lie beside them (:mod:`next.tracking.delivery.publication`).
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from next.config import RunConfig
from next.storage import drafting, is_draft, open_folder
from next.training.checkpointing.checkpoint import (
    Snapshot,
    parse_state,
    read_progress,
    write_snapshot,
)
from next.training.checkpointing.interruption import Interrupted

_log = logging.getLogger(__name__)

_NEWEST = 2
_OLD_DRAFT = ".draft-"
"""Beginning of the names of drafts that versions before left when they were killed."""
_FIRST_PAUSE = 0.5
_LONGEST_PAUSE = 15.0


def store_address(config: RunConfig, name: str) -> str | None:
    """What a run or a trial (``SWEEP/trials/NAME``) leaves lies there; None: in its folder alone.

    Example:
        >>> config = RunConfig.model_validate({"checkpoint": {"storage_path": "/kept"}})
        >>> store_address(config, "first")
        '/kept/first'
    """
    if config.checkpoint.storage_path is None:
        return None
    return open_folder(config.checkpoint.storage_path).below(name).address


class StoreError(OSError):
    """A store could not be written for as long as it was tried."""


class CheckpointStore:
    """The checkpoints of one run; one process writes, any number read."""

    def __init__(self, folder: str | Path, *, num_to_keep: int = 1) -> None:
        """Nothing is read or written yet.

        Args:
            folder: of the checkpoints.
            num_to_keep: best checkpoints that are kept beside the newest.
        """
        self.folder = open_folder(folder)
        self.num_to_keep = num_to_keep
        self._fetched: Path | None = None
        if not self.folder.is_local:
            self._fetched = Path(tempfile.mkdtemp(prefix="next-checkpoints-"))
            weakref.finalize(self, shutil.rmtree, self._fetched, ignore_errors=True)

    @property
    def uri(self) -> str:
        """What opens this store on any machine that sees it."""
        return self.folder.address

    def save(self, snapshot: Snapshot) -> None:
        """Write a checkpoint, point ``last`` and ``best``, remove what need not be kept.

        Raises:
            OSError: the disk is full or cannot be reached; the earlier checkpoints are untouched.
        """
        progress = snapshot.progress
        name = f"step-{progress.step:08d}" + ("-evaluated" if progress.evaluated else "")
        if self.folder.is_local:
            write_snapshot(Path(self.folder.uri) / name, snapshot)
        else:
            with tempfile.TemporaryDirectory(prefix="next-checkpoint-") as parent:
                draft = write_snapshot(Path(parent) / name, snapshot)
                self._remove(name)
                self.folder.upload_tree(draft, name, last=("state.json",))
        scores = self._scores()
        ranked = _ranked(scores)
        if self.folder.is_local:
            self._point("last", max(scores))
            if ranked:
                self._point("best", ranked[0])
        keep = {*sorted(scores)[-_NEWEST:], *ranked[: self.num_to_keep]}
        for other in self.folder.names():
            left_behind = is_draft(other) or other.startswith(_OLD_DRAFT)
            if left_behind or (other.startswith("step-") and other not in keep):
                self._remove(other)

    def set_aside(self, suffix: str) -> None:
        """Let a new run of this name begin without them; they go on under another name."""
        self.folder.move(suffix)

    def is_empty(self) -> bool:
        """Whether no checkpoint was written to its end."""
        return not self._scores()

    def latest(self) -> Path | None:
        """The newest whole checkpoint; None for a run that has written none.

        Raises:
            ValueError: there are checkpoints, and all are torn.
            OSError: the storage cannot be reached.
        """
        return self._first_whole(sorted(self._scores(), reverse=True))

    def best(self) -> Path:
        """The whole checkpoint of the best epoch, the earlier of equals.

        The best one has the highest ``rank`` in its ``state.json``: ``selection.metric``, larger is
        better (negated for ``selection.mode = "min"``).

        Raises:
            FileNotFoundError: no checkpoint has a score yet.
            ValueError: all that have one are torn.
            OSError: the storage cannot be reached.
        """
        found = self._first_whole(_ranked(self._scores()))
        if found is None:
            raise FileNotFoundError(
                f"{self.folder.uri} has no evaluated checkpoint yet; let the run reach its first "
                f"evaluation (selection.every)"
            )
        return found

    def adopt(self, checkpoint: Path) -> Path:
        """Copy the best checkpoint of a store elsewhere into this local one, as its best."""
        kept = Path(self.folder.uri) / checkpoint.name
        shutil.copytree(checkpoint, kept, dirs_exist_ok=True)
        self._point("best", kept.name)
        return kept

    def bring_best(self, other: CheckpointStore) -> Path:
        """The best checkpoint of a store elsewhere, in this local one; copied if it is not there.

        Raises:
            FileNotFoundError: no checkpoint there has a score yet.
            ValueError: all that have one are torn.
            OSError: the storage cannot be reached.
        """
        for name in _ranked(other._scores())[:1]:
            here = Path(self.folder.uri) / name
            try:
                read_progress(here)
            except (FileNotFoundError, ValueError):
                continue
            return here
        return self.adopt(other.best())

    def fetch(self, name: str) -> Path:
        """A checkpoint by the name of its folder, on this machine; not checked."""
        if self._fetched is None:
            return Path(self.folder.uri) / name
        local = self._fetched / name
        shutil.rmtree(local, ignore_errors=True)  # one of that name may have been replaced since
        return self.folder.download_tree(name, local)

    def _first_whole(self, names: list[str]) -> Path | None:
        problems = []
        for name in names:
            local = self.fetch(name)
            try:
                read_progress(local)
            except (ValueError, FileNotFoundError) as error:
                _log.warning("%s; falling back to the checkpoint before", error)
                problems.append(str(error))
            else:
                return local
        if problems:
            raise ValueError(
                f"no checkpoint in {self.folder.uri} is whole; set run.fresh to start over, or "
                f"bring back a copy:\n  " + "\n  ".join(problems)
            )
        return None

    def _scores(self) -> dict[str, float | None]:
        """Score, larger is better, of each checkpoint that was written to its end, by name."""
        scores: dict[str, float | None] = {}
        for name in self.folder.names():
            record = f"{name}/state.json"
            if not name.startswith("step-") or self.folder.size(record) is None:
                continue
            try:
                progress = parse_state(record, self.folder.read(record))["progress"]
            except ValueError:
                progress = {}  # torn; whoever wants to read it is told
            evaluated = name.endswith("-evaluated")
            score = progress.get("rank")
            if score is None:  # an older version's
                score = progress.get("metrics", {}).get("val/mAP")
            scores[name] = score if evaluated else None
        return scores

    def _remove(self, name: str) -> None:
        self.folder.delete(f"{name}/state.json")  # first, so that what is left never counts
        self.folder.delete_tree(name)

    def _point(self, link: str, name: str) -> None:
        folder = Path(self.folder.uri)
        with drafting(folder / link) as draft:
            draft.symlink_to(name)


def _ranked(scores: dict[str, float | None]) -> list[str]:
    """Names of the evaluated checkpoints, best first, the earlier of equals first."""
    evaluated = [(-score, name) for name, score in scores.items() if score is not None]
    return [name for _, name in sorted(evaluated)]


class BackgroundWriter:
    """Writes snapshots in a thread, one at a time, and tries again where storage fails.

    A run never gets further ahead of its last checkpoint than two of them: the next one waits for
    the one before. While a write fails (disk full, storage away), training goes on until then.
    """

    def __init__(
        self,
        store: CheckpointStore,
        *,
        patience_s: float = 600.0,
        before: Callable[[], None] = lambda: None,
    ) -> None:
        """Starts no thread yet.

        Args:
            store: where to.
            patience_s: seconds for which a write is tried again.
            before: brings to the storage what must be there before a checkpoint is; a part of the
                write, so it may fail with ``OSError``.
        """
        self.store = store
        self.before = before
        self.patience_s = patience_s
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._write: Future[None] | None = None
        self._giving_up = threading.Event()

    def submit(self, take: Callable[[], Snapshot]) -> None:
        """Wait for the write before this one, take a snapshot, and write it in the thread.

        Raises:
            OSError: the write before could not be done for ``patience_s``.
        """
        self.wait()
        self._write = self._thread.submit(self._persist, take())

    def wait(self) -> None:
        """Return when all that was submitted is stored.

        Raises:
            OSError: it could not be stored for ``patience_s``.
        """
        if self._write is not None:
            write, self._write = self._write, None
            write.result()

    def close(self, error: BaseException | None = None) -> None:
        """Return when all is stored; after an error let the write under way end, and no more.

        Args:
            error: what ended the run, if it was not its end or a request to stop.

        Raises:
            OSError: without an error: it could not be stored for ``patience_s``.
        """
        if error is None or isinstance(error, Interrupted):
            self.wait()
        else:
            self._giving_up.set()
            if self._write is not None:
                self._write.exception()
        self._thread.shutdown()

    def _persist(self, snapshot: Snapshot) -> None:
        step = snapshot.progress.step
        bad = _not_finite(snapshot)
        if bad is not None:
            _log.warning("step %d: %s is not finite; this checkpoint is not kept", step, bad)
            return
        waited = persist(
            lambda: self._store(snapshot),
            f"the checkpoint of step {step}",
            self.patience_s,
            self._giving_up,
            kept="the last good one is kept. Mend the storage and start the same command again",
        )
        if snapshot.progress.step_in_epoch and not waited:
            within = snapshot.progress.step_in_epoch
            _log.info("checkpoint of step %d, %d in the epoch, is written", step, within)

    def _store(self, snapshot: Snapshot) -> None:
        self.before()
        self.store.save(snapshot)


def persist(
    write: Callable[[], None],
    what: str,
    patience_s: float,
    giving_up: threading.Event | None = None,
    *,
    verb: str = "written",
    kept: str = "mend the storage and go on",
) -> bool:
    """Write, and try again while storage fails; whether it had to be tried again.

    Args:
        write: writes whole or not at all.
        what: is written, for the log and the error.
        patience_s: seconds for which it is tried again.
        giving_up: when set, it is tried no more.
        verb: what is done to it.
        kept: end of the error: what is kept, and what to do.

    Raises:
        StoreError: it could not be written.
    """
    giving_up = giving_up or threading.Event()
    deadline, pause = time.monotonic() + patience_s, _FIRST_PAUSE
    while True:
        try:
            write()
        except OSError as error:
            if time.monotonic() + pause > deadline or giving_up.is_set():
                raise StoreError(
                    f"{what} could not be {verb} for {patience_s:.0f} s (checkpoint.patience_s): "
                    f"{error}; {kept}"
                ) from error
            if pause == _FIRST_PAUSE:
                _log.warning(
                    "%s cannot be %s (%s); it is tried again for %.0f s, and training goes on",
                    *(what, verb, error, patience_s),
                )
            giving_up.wait(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
        else:
            if pause != _FIRST_PAUSE:
                _log.warning("%s is %s now", what, verb)
            return pause != _FIRST_PAUSE


def _not_finite(snapshot: Snapshot) -> str | None:
    """A weight that is NaN or infinite, by name; None: all are fine."""
    for name, weight in snapshot.weights.items():
        if weight.is_floating_point() and not torch.isfinite(weight).all():
            return name
    return None
