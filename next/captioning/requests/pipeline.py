"""Asks from many processes, on as many machines as the cluster has: Ray Data feeds the workers.

Every answer is in the ledger before it is handed on, so what is lost with a worker, its machine or
the driver is only what was under way. The ledger lies on the driver's machine: a worker there
writes a part of its own, one elsewhere sends its answers to an actor beside the driver. A worker
that is given a block again (because another one died with it) first hears what has been answered
since.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import logging
import threading
import uuid
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import ray
import ray.data
from ray.exceptions import RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from next.captioning.requests.endpoint import Endpoint
from next.captioning.requests.engine import Asked, Questions, ask_all, first_cause, first_open
from next.captioning.requests.ledger import Ledger, LedgerPart, LedgerTail, Row
from next.captioning.requests.models import ModelConfig
from next.captioning.requests.spending import LEASE_S, Budget, BudgetConfig, Grant, Spending
from next.captioning.source import FolderSource, Picture, ShardSource, Source
from next.data.shards.layout import Sample
from next.local_ray import on_cluster, ray_for_data

_T = TypeVar("_T")
_Columns = Mapping[str, Any]

_ERRORS: dict[str, type[Exception]] = {
    "connection": ConnectionError,
    "permission": PermissionError,
    "os": OSError,
    "value": ValueError,
}
"""What a user can mend; the first that fits."""
CPUS = 0.25
"""Of a worker, which mostly waits; so the tasks that read find room even on a small machine."""
IMAGES_A_CALL = 16
"""Images in one batch of a worker, for each call that it has under way at a time."""


def run_on_ray(
    source: Source,
    questions: Questions,
    ledger: Ledger,
    budget: BudgetConfig,
    report: Callable[[Asked], None],
    *,
    workers: int,
) -> int:
    """Ask about all images of a source from several processes.

    Args:
        source: images; every machine must be able to read them at the same place.
        questions: prompts, models and what is finished.
        ledger: on this machine, held by the caller.
        budget: of all workers together.
        report: called in this process for each image that is done.
        workers: processes; a model's concurrency and limits are shared out evenly.

    Returns:
        Questions that were not asked, as the budget was spent.

    Raises:
        ConnectionError: an endpoint cannot be reached, or went away.
        PermissionError: a key is not accepted.
        ValueError: a model or key is missing.
    """
    own = not ray.is_initialized() and not on_cluster()
    with ray_for_data(workers):
        return _asked(source, questions, ledger, budget, report, workers, own)


def _asked(
    source: Source,
    questions: Questions,
    ledger: Ledger,
    budget: BudgetConfig,
    report: Callable[[Asked], None],
    workers: int,
    own: bool,
) -> int:
    """The same on Ray, which runs; ``own``: for this process alone."""
    shared = None
    if budget.tokens is not None or budget.money is not None:
        shared = ray.remote(num_cpus=0)(Budget).remote(budget, lease_s=LEASE_S)
    folder = str(ledger.folder.resolve())
    known = tuple(ledger.parts())
    here = ray.get_runtime_context().get_node_id()
    job = _Job(
        models=questions.models,
        prompts=questions.prompts,
        finished=frozenset(questions.finished),
        known_parts=known,
        ledger=folder,
        key=ledger.key,
        here=here,
        writer=None if own else _start_ledger_writer(folder, ledger.key, known, here),
        share=1 / workers,
        budget=shared,
    )
    most = max(model.concurrency for model in questions.models) / workers
    images = max(1, round(IMAGES_A_CALL * most))
    images_a_row = len(source.benchmark.modalities)
    blocks = max(2 * workers, source.count() // images)
    dataset, reader = _dataset(source, blocks)
    asked = dataset.map_batches(
        _Worker,
        fn_constructor_kwargs={"job": job, "read": reader},
        batch_size=max(1, images // images_a_row),
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_cpus=CPUS,
        scheduling_strategy="SPREAD",  # each machine has a line of its own, and a limit by address
    )
    left = 0
    for batch in asked.iter_batches(batch_size=None, prefetch_batches=0):
        for text in batch["asked"]:
            said = json.loads(text)
            if "error" in said:
                raise _ERRORS[said["error"]](said["message"])
            left += said["left"]
            answered = tuple(Row(**row) for row in said["rows"])
            split, sample, modality, image_hash = said["image"]
            report(Asked(split, sample, modality, image_hash, answered))
    return left


class _Job(NamedTuple):
    """What every worker needs to know."""

    models: Sequence[ModelConfig]
    prompts: Mapping[str, Any]
    finished: frozenset[bytes]
    known_parts: tuple[Path, ...]
    ledger: str
    """Folder on the driver's machine."""
    key: str | None
    """By which the driver holds the ledger."""
    here: str
    """The driver's node."""
    writer: Any
    """Handle of the actor that writes for workers of other machines; None: there are none."""
    share: float
    budget: Any
    """Handle of the budget's actor; None: no budget."""


class _RemoteBudget:
    """The budget that all workers share; each has a name and sends heartbeats."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor
        self._name = uuid.uuid4().hex

    async def reserve(self, tokens: int, money: float) -> Grant:
        grant: Grant = await self._actor.reserve.remote(tokens, money, self._name)
        return grant

    async def settle(self, reserved: Spending, cost: Spending) -> None:
        await self._actor.settle.remote(reserved, cost, self._name)

    async def send_heartbeats(self) -> None:
        """Send them as long as this process lives; without them its reservations expire."""
        while True:
            await self._actor.heartbeat.remote(self._name)
            await asyncio.sleep(LEASE_S / 5)


class _LedgerWriter:
    """Writes the answers of one process to the ledger, and reads those of all."""

    def __init__(self, folder: str, key: str | None, known: Sequence[Path]) -> None:
        self._folder = folder
        self._key = key
        self._tail = LedgerTail(folder, known)
        self._part: LedgerPart | None = None
        self._answered: list[bytes] = []

    def append(self, row: Row) -> None:
        """Write an answer."""
        if self._part is None:
            self._part = LedgerPart(self._folder, self._key)
        self._part.append(row)

    def answered(self, known: int) -> list[bytes]:
        """Keys that this run has answered, less the first ``known``."""
        self._answered.extend(self._tail.keys())
        return self._answered[known:]


class _RemoteLedgerWriter:
    """The ledger writer beside the driver, for a worker of another machine."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor
        self._sent: list[ray.ObjectRef] = []

    def append(self, row: Row) -> None:
        self._sent.append(self._actor.append.remote(row))

    def answered(self, known: int) -> list[bytes]:
        keys: list[bytes] = ray.get(self._actor.answered.remote(known))
        return keys

    def settle(self) -> None:
        """Return when all that was sent is written.

        Raises:
            OSError: it cannot be.
        """
        sent, self._sent = self._sent, []
        try:
            ray.get(sent)
        except RayTaskError as error:
            raise error.cause from None


def _start_ledger_writer(folder: str, key: str | None, known: Sequence[Path], node: str) -> Any:
    place = NodeAffinitySchedulingStrategy(node, soft=False)
    writer = ray.remote(num_cpus=0)(_LedgerWriter).options(scheduling_strategy=place)
    return writer.remote(folder, key, known)


class _Worker:
    """Asks about batches of images; its loop, connections and ledger part outlive a batch."""

    def __init__(self, job: _Job, read: Callable[[_Columns], Iterator[Picture]]) -> None:
        logging.getLogger("httpx2").setLevel(logging.WARNING)
        self._job = job
        self._read = read
        self._questions = Questions(job.prompts, job.models, job.finished)
        self._known = 0
        self._budget = _RemoteBudget(job.budget) if job.budget is not None else None
        self._endpoints: list[Endpoint] = []
        self._writer: _LedgerWriter | _RemoteLedgerWriter | None = None
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        if self._budget is not None:
            asyncio.run_coroutine_threadsafe(self._budget.send_heartbeats(), self._loop)

    def __call__(self, batch: _Columns) -> dict[str, list[str]]:
        """Ask about a batch; one JSON text for each image, or one for an error."""
        asked: list[Asked] = []
        try:
            self._take_up()
            left = self._wait_for(self._ask(self._read(batch), asked.append))
            if isinstance(self._writer, _RemoteLedgerWriter):
                self._writer.settle()
        except tuple(_ERRORS.values()) as error:
            # Raised here, it would reach the driver as one of Ray's errors, without its type.
            kind = next(name for name, one in _ERRORS.items() if isinstance(error, one))
            return {"asked": [json.dumps({"error": kind, "message": str(error)})]}
        lines = []
        for number, one in enumerate(asked):
            rows = [row._asdict() | {"answer": ""} for row in one.rows]  # the ledger has it
            unasked = left if number == 0 else 0
            lines.append(json.dumps({"image": one[:4], "rows": rows, "left": unasked}))
        return {"asked": lines}

    def _take_up(self) -> None:
        """Take up what has been answered since the last batch."""
        if self._writer is None:
            here = ray.get_runtime_context().get_node_id() == self._job.here
            if here or self._job.writer is None:
                self._writer = _LedgerWriter(self._job.ledger, self._job.key, self._job.known_parts)
            else:
                self._writer = _RemoteLedgerWriter(self._job.writer)
        answered = self._writer.answered(self._known)
        self._known += len(answered)
        self._questions.finished.update(answered)

    async def _ask(self, pictures: Iterator[Picture], report: Callable[[Asked], None]) -> int:
        assert self._writer is not None
        if not self._endpoints:
            first = first_open(pictures, self._questions, report)
            if first is None:  # so nothing is sent, not even a probe
                return 0
            pictures = itertools.chain([first], pictures)
            probed = []
            for model in self._job.models:
                concurrency = max(1, round(model.concurrency * self._job.share))
                fair = model.model_copy(update={"concurrency": concurrency})
                endpoint = Endpoint(fair, self._job.share)
                await endpoint.probe()
                probed.append(endpoint)
            self._endpoints = probed
        return await ask_all(
            pictures, self._questions, self._endpoints, self._writer, self._budget, report
        )

    def _wait_for(self, work: Coroutine[Any, Any, _T]) -> _T:
        try:
            return asyncio.run_coroutine_threadsafe(work, self._loop).result()
        except BaseExceptionGroup as group:
            raise first_cause(group) from None


class _FromFiles:
    """Reads the images of samples whose files a batch names."""

    def __init__(self, source: FolderSource) -> None:
        self._source = dataclasses.replace(source, samples={})  # a batch brings its own

    def __call__(self, batch: _Columns) -> Iterator[Picture]:
        for split, sample in zip(batch["split"], batch["sample"], strict=True):
            fields = json.loads(sample)
            yield from self._source.pictures_of(str(split), Sample(**fields))


class _FromShards:
    """Takes the images out of a batch of rows."""

    def __init__(self, source: ShardSource) -> None:
        self._modalities = source.benchmark.modalities

    def __call__(self, batch: _Columns) -> Iterator[Picture]:
        for row, path in enumerate(batch["path"]):
            split = str(path).rsplit("/", 2)[-2]
            for modality in self._modalities:
                image = batch[f"image_{modality}"][row]
                if image is not None:
                    yield Picture(split, str(batch["sample_id"][row]), modality, bytes(image))


def _dataset(source: Source, blocks: int) -> tuple[Any, Callable[[_Columns], Iterator[Picture]]]:
    """The samples as a dataset, and what takes the images out of its batches."""
    if isinstance(source, ShardSource):
        manifest = source.manifest
        paths = [
            f"{manifest.folder.base}/{shard.file}"
            for entry in manifest.splits.values()
            for shard in entry.shards
        ]
        columns = ["sample_id", *(f"image_{name}" for name in source.benchmark.modalities)]
        dataset = ray.data.read_parquet(
            paths,
            filesystem=manifest.folder.filesystem,
            columns=columns,
            include_paths=True,
            override_num_blocks=blocks,
        )
        return dataset, _FromShards(source)
    samples = [
        {"split": split, "sample": json.dumps(sample._asdict())}
        for split, some in source.samples.items()
        for sample in some
    ]
    return ray.data.from_items(samples, override_num_blocks=blocks), _FromFiles(source)
