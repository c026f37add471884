"""The one place that knows whether a run speaks to Ray Train, to Ray Tune or to nobody."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

Metrics = dict[str, float]
WriteCheckpoint = Callable[[Path], Path]


class Reporter(Protocol):
    """Where the loop's results go, and where it finds what to continue from."""

    def report(self, metrics: Metrics, write: WriteCheckpoint, *, is_best: bool) -> None:
        """Hand over the metrics of an evaluation, and the checkpoint that ``write`` makes."""

    def latest(self) -> AbstractContextManager[Path | None]:
        """The checkpoint to continue from, or None for a new run."""


class FolderReporter:
    """One process, nobody to speak to: keeps ``last`` and ``best`` in the run's folder."""

    def __init__(self, folder: Path, on_report: Callable[[Metrics], None] | None = None) -> None:
        self.folder = folder
        self.on_report = on_report

    def report(self, metrics: Metrics, write: WriteCheckpoint, *, is_best: bool) -> None:
        last = write(self.folder / "last")
        if is_best:
            draft = self.folder / ".best"
            shutil.rmtree(draft, ignore_errors=True)
            shutil.copytree(last, draft)
            shutil.rmtree(self.folder / "best", ignore_errors=True)
            draft.rename(self.folder / "best")
        if self.on_report is not None:
            self.on_report(metrics)

    @contextmanager
    def latest(self) -> Iterator[Path | None]:
        yield self.folder / "last" if (self.folder / "last").is_dir() else None

    def best(self) -> Path:
        """The best checkpoint so far."""
        return self.folder / "best"


class TuneReporter:
    """A trial that trains in Tune's own actor."""

    def report(self, metrics: Metrics, write: WriteCheckpoint, *, is_best: bool) -> None:
        from ray import tune

        with tempfile.TemporaryDirectory(prefix="next-checkpoint-") as parent:
            written = write(Path(parent) / "checkpoint")
            tune.report(metrics, checkpoint=tune.Checkpoint.from_directory(written))

    @contextmanager
    def latest(self) -> Iterator[Path | None]:
        from ray import tune

        with _local(tune.get_checkpoint()) as folder:
            yield folder


class TrainReporter:
    """A worker of Ray Train; every rank reports, rank 0 brings the checkpoint."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def report(self, metrics: Metrics, write: WriteCheckpoint, *, is_best: bool) -> None:
        import ray.train

        if self.rank != 0:
            ray.train.report(metrics)
            return
        with tempfile.TemporaryDirectory(prefix="next-checkpoint-") as parent:
            written = write(Path(parent) / "checkpoint")
            ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(written))

    @contextmanager
    def latest(self) -> Iterator[Path | None]:
        import ray.train

        with _local(ray.train.get_checkpoint()) as folder:
            yield folder


@contextmanager
def _local(checkpoint: Any) -> Iterator[Path | None]:
    if checkpoint is None:
        yield None
        return
    with checkpoint.as_directory() as folder:
        yield Path(folder)
