"""Where a run's results go: to its folder, and to Ray Train or Ray Tune if somebody listens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch.distributed as dist

from next.config import CheckpointConfig
from next.training.checkpointing.agreement import Agreement
from next.training.checkpointing.checkpoint import Row, Snapshot
from next.training.checkpointing.interruption import Interrupted, Request, Requests
from next.training.checkpointing.store import BackgroundWriter, CheckpointStore
from next.training.step.step_log import NonFiniteLossError, RouterCollapseError

Item = TypeVar("Item")
Metrics = dict[str, float]
TakeSnapshot = Callable[[], Snapshot]
"""Takes a snapshot in the memory of the one before: called when that one is written."""

_ALIKE_ON_ALL_RANKS = (Interrupted, NonFiniteLossError, RouterCollapseError)


class Reporter(Protocol):
    """Where the loop's results go, where it finds what to continue from, and who may stop it."""

    def latest(self) -> AbstractContextManager[Path | None]:
        """The checkpoint to continue from, or None for a new run."""

    def report(self, metrics: Metrics, take: TakeSnapshot) -> None:
        """Hand over the metrics of an evaluation, and a checkpoint."""

    def hand_over(self, take: TakeSnapshot | None) -> None:
        """Pass on what was logged within an epoch, and a checkpoint if there is to be one.

        Every rank calls it at the same step.
        """

    def rescue(self, take: TakeSnapshot) -> None:
        """Hand over a checkpoint because an error ends the run; waits for no other rank."""

    def steps(self, batches: Iterable[Item]) -> Iterator[Item]:
        """The batches of an epoch: a stop that is asked for meanwhile waits for the step's end."""

    def requested(self) -> Request:
        """The pending request to the run, the same on every rank; called once a step."""


class FolderReporter:
    """One process: keeps the checkpoints in the run's folder.

    They are written in a thread. Leaving the ``with`` block waits for the last one, so that the
    process may end.

    Who is told of an evaluation (Tune) hears first, and the checkpoint is written then, also when
    Tune ends the trial. Tune returns once the driver has recorded the evaluation, so a driver that
    dies in between has the evaluation and an earlier checkpoint: the epoch is trained again and is
    known already. The other way round the evaluation would be missing for ever.
    """

    def __init__(
        self,
        folder: str | Path,
        on_report: Callable[[Metrics], None] | None = None,
        *,
        checkpoint: CheckpointConfig = CheckpointConfig(),  # noqa: B008 (frozen)
        requests: Requests | None = None,
        publish: Callable[[], None] = lambda: None,
    ) -> None:
        """Nothing is read or written yet.

        Args:
            folder: of the checkpoints.
            on_report: is told of each evaluation.
            checkpoint: settings.
            requests: by which another thread stops the run.
            publish: brings the journal to the run's store; done before each checkpoint, so that
                who continues from one has all that was logged until then.
        """
        self._store = CheckpointStore(folder, num_to_keep=checkpoint.num_to_keep)
        self._writer = BackgroundWriter(
            self._store, patience_s=checkpoint.patience_s, before=publish
        )
        self._on_report = on_report
        self._requests = requests or Requests()

    def latest(self) -> AbstractContextManager[Path | None]:
        self._writer.wait()
        return nullcontext(self._store.latest())

    def report(self, metrics: Metrics, take: TakeSnapshot) -> None:
        try:
            if self._on_report is not None:
                self._on_report(metrics)
        finally:
            self._writer.submit(take)

    def hand_over(self, take: TakeSnapshot | None) -> None:
        if take is not None:  # what was logged is in the journal already
            self._writer.submit(take)

    def rescue(self, take: TakeSnapshot) -> None:
        self._writer.submit(take)

    def steps(self, batches: Iterable[Item]) -> Iterator[Item]:
        self._requests.waits = True
        try:
            yield from batches
        finally:
            self._requests.waits = False

    def requested(self) -> Request:
        return self._requests.take()

    def best(self) -> Path:
        """The best checkpoint so far.

        Raises:
            FileNotFoundError: nothing was evaluated yet.
        """
        self._writer.wait()
        return self._store.best()

    def __enter__(self) -> FolderReporter:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._writer.close(error)


class TrainReporter:
    """A worker of Ray Train: rank 0 writes the checkpoints, every rank continues from the same.

    What is logged travels with Ray's reports, since the run's journal is beside the driver. Every
    rank reports as often as the others.
    """

    def __init__(
        self,
        folder: str | Path,
        rank: int,
        world: int,
        *,
        send: Callable[[dict[str, Any]], None],
        checkpoint: CheckpointConfig,
        requests: Requests,
    ) -> None:
        """Every rank makes one, at the same point.

        Args:
            folder: of the run's checkpoints; local or of an object store, and seen by all ranks.
            rank: of this process.
            world: ranks in all.
            send: ``ray.train.report``.
            checkpoint: settings.
            requests: to this process.
        """
        self._send = send
        self._rank = rank
        self._store = CheckpointStore(folder, num_to_keep=checkpoint.num_to_keep)
        self._writer = BackgroundWriter(self._store, patience_s=checkpoint.patience_s)
        self._asked: Callable[[], Request] = Agreement(requests) if world > 1 else requests.take
        self._rows: list[Row] = []
        self._first = True

    def latest(self) -> AbstractContextManager[Path | None]:
        folder = self._store.latest() if self._rank == 0 else None
        chosen = [folder.name if folder is not None else None]
        if dist.is_initialized():
            dist.broadcast_object_list(chosen, src=0)
        if self._rank != 0 and chosen[0] is not None:
            folder = self._store.fetch(chosen[0])
        return nullcontext(folder)

    def log_metrics(self, metrics: Metrics, step: int) -> None:
        """Values of one step, for the next report."""
        self._rows.append((step, metrics))

    def report(self, metrics: Metrics, take: TakeSnapshot) -> None:
        self.hand_over(take)

    def hand_over(self, take: TakeSnapshot | None) -> None:
        if take is not None and self._rank == 0:
            self._writer.submit(take)
        self._tell(last=False)

    def rescue(self, take: TakeSnapshot) -> None:
        if self._rank == 0:
            self._writer.submit(take)

    def steps(self, batches: Iterable[Item]) -> Iterator[Item]:
        yield from batches

    def requested(self) -> Request:
        return self._asked()

    def __enter__(self) -> TrainReporter:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._writer.close(error)
        if error is None or isinstance(error, _ALIKE_ON_ALL_RANKS):
            self._tell(last=True)

    def _tell(self, *, last: bool) -> None:
        self._send({"rows": self._rows, "first": self._first, "last": last})
        self._rows, self._first = [], False
