"""Where the checkpoints of a run are kept: which one to continue from, which is best.

A store is a folder of checkpoints, named by their optimizer step::

    step-00000040             within an epoch
    step-00000048-evaluated   at its end, with the scores of its weights
    last, best                links to two of them

It keeps the two newest, so that there is one to fall back to, and the best ones.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch

from next.training.checkpoint import DRAFT, Snapshot, read_progress, write_snapshot
from next.training.interruption import Interrupted

_log = logging.getLogger(__name__)

_NEWEST = 2
_FIRST_PAUSE = 0.5
_LONGEST_PAUSE = 15.0


class CheckpointStore:
    """The checkpoints of one run; one process writes, any number read."""

    def __init__(self, folder: Path, *, num_to_keep: int = 1) -> None:
        """Nothing is read or written yet.

        Args:
            folder: of the checkpoints.
            num_to_keep: best checkpoints that are kept beside the newest.
        """
        self.folder = folder
        self.num_to_keep = num_to_keep

    def save(self, snapshot: Snapshot) -> None:
        """Write a checkpoint, point ``last`` and ``best``, remove what need not be kept.

        Raises:
            OSError: the disk is full or cannot be reached; the earlier checkpoints are untouched.
        """
        progress = snapshot.progress
        name = f"step-{progress.step:08d}" + ("-evaluated" if progress.evaluated else "")
        write_snapshot(self.folder / name, snapshot)
        scores = self._scores()
        ranked = sorted(
            (name for name, score in scores.items() if score is not None),
            key=lambda name: (-float(scores[name] or 0), name),
        )
        self._point("last", max(scores))
        if ranked:
            self._point("best", ranked[0])
        keep = {*sorted(scores)[-_NEWEST:], *ranked[: self.num_to_keep]}
        for path in self.folder.iterdir():
            stale = path.name.startswith(DRAFT) or (
                path.name.startswith("step-") and path.name not in keep
            )
            if stale:
                shutil.rmtree(path, ignore_errors=True)

    @contextmanager
    def latest(self) -> Iterator[Path | None]:
        """The newest whole checkpoint; None for a run that has written none.

        Raises:
            ValueError: there are checkpoints, and all are torn.
        """
        yield self._first_whole(sorted(self._scores(), reverse=True))

    @contextmanager
    def opened(self, name: str) -> Iterator[Path]:
        """A checkpoint by the name of its folder."""
        yield self.folder / name

    def best(self) -> Path:
        """The whole checkpoint with the highest score.

        Raises:
            FileNotFoundError: no checkpoint has a score yet.
            ValueError: all that have one are torn.
        """
        scores = {name: score for name, score in self._scores().items() if score is not None}
        found = self._first_whole(sorted(scores, key=lambda name: (-scores[name], name)))
        if found is None:
            raise FileNotFoundError(
                f"{self.folder} has no evaluated checkpoint yet; let the run reach its first "
                f"evaluation (selection.every)"
            )
        return found

    def _first_whole(self, names: list[str]) -> Path | None:
        problems = []
        for name in names:
            try:
                read_progress(self.folder / name)
            except (ValueError, OSError) as error:
                _log.warning("%s; falling back to the checkpoint before", error)
                problems.append(str(error))
            else:
                return self.folder / name
        if problems:
            raise ValueError(
                f"no checkpoint in {self.folder} is whole; set run.fresh to start anew, or bring "
                f"back a copy:\n  " + "\n  ".join(problems)
            )
        return None

    def _scores(self) -> dict[str, float | None]:
        """Score of each checkpoint that was written to its end, by name."""
        scores = {}
        for record in self.folder.glob("step-*/state.json"):
            try:
                progress = json.loads(record.read_text())["progress"]
            except (ValueError, KeyError, OSError):
                progress = {}  # torn; whoever wants to read it is told
            evaluated = record.parent.name.endswith("-evaluated")
            score = progress.get("metrics", {}).get("val/mAP") if evaluated else None
            scores[record.parent.name] = score
        return scores

    def _point(self, link: str, name: str) -> None:
        draft = self.folder / f".{link}"
        draft.unlink(missing_ok=True)
        draft.symlink_to(name)
        os.replace(draft, self.folder / link)


class BackgroundWriter:
    """Writes snapshots in a thread, one at a time, and tries again where storage fails.

    A run never gets further ahead of its last checkpoint than two of them: the next one waits for
    the one before. While a write fails (disk full, storage away), training goes on until then.
    """

    def __init__(self, store: CheckpointStore, *, patience_s: float = 600.0) -> None:
        """Starts no thread yet.

        Args:
            store: where to.
            patience_s: seconds for which a write is tried again.
        """
        self.store = store
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
        deadline, pause = time.monotonic() + self.patience_s, _FIRST_PAUSE
        while True:
            try:
                self.store.save(snapshot)
            except OSError as error:
                if time.monotonic() + pause > deadline or self._giving_up.is_set():
                    raise OSError(
                        f"the checkpoint of step {step} could not be written for "
                        f"{self.patience_s:.0f} s (checkpoint.patience_s): {error}; the last good "
                        f"one is kept. Mend the storage and start the same command again"
                    ) from error
                if pause == _FIRST_PAUSE:
                    _log.warning(
                        "the checkpoint of step %d cannot be written (%s); training goes on, and "
                        "it is tried again for %.0f s",
                        *(step, error, self.patience_s),
                    )
                self._giving_up.wait(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
            else:
                if pause != _FIRST_PAUSE:
                    _log.warning("the checkpoint of step %d is written now", step)
                return


def _not_finite(snapshot: Snapshot) -> str | None:
    """A weight that is NaN or infinite, by name; None: all are fine."""
    for name, weight in snapshot.weights.items():
        if weight.is_floating_point() and not torch.isfinite(weight).all():
            return name
    return None
