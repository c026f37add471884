"""Asks from many processes, on as many machines as the cluster has: Ray Data feeds the workers.

Every worker writes its answers to a part of the ledger of its own before it hands them on, so what
is lost with a worker, its machine or the driver is only what was under way. The folder of the
ledger must be one that all machines see. A worker that is given a block again (because another one
died with it) first reads what has been answered since.
"""

from __future__ import annotations

import asyncio
import builtins
import contextlib
import json
import logging
import os
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import ray
import ray.data
import ray.exceptions

from next.captioning.endpoint import Endpoint, ModelConfig
from next.captioning.engine import Asked, AsyncPurse, Questions, ask_all, first_cause
from next.captioning.ledger import LedgerPart, LedgerTail, Row
from next.captioning.source import FolderSource, Picture, ShardSource, Source
from next.captioning.spending import BudgetConfig, Grant, Purse, Spending
from next.data.layout import Sample

_T = TypeVar("_T")
_Columns = Mapping[str, Any]

CPUS = 0.25
"""Of a worker, which mostly waits; so the tasks that read find room even on a small machine."""
IMAGES_A_CALL = 16
"""Images in one batch of a worker, for each call that it has under way at a time."""


def run_on_ray(
    source: Source,
    questions: Questions,
    ledger: str | Path,
    budget: BudgetConfig,
    report: Callable[[Asked], None],
    *,
    workers: int,
) -> int:
    """Ask about all images of a source from several processes.

    Args:
        source: images; every machine must be able to read them at the same place.
        questions: prompts, models and what is finished.
        ledger: folder, which the caller holds and every machine can write to.
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
    started = _start_ray(workers)
    purse = None
    if budget.tokens is not None or budget.money is not None:
        purse = ray.remote(num_cpus=0)(Purse).remote(budget)
    job = _Job(
        models=questions.models,
        prompts=questions.prompts,
        finished=frozenset(questions.finished),
        known_parts=tuple(sorted(Path(ledger).glob("*.jsonl"))),
        ledger=str(Path(ledger).resolve()),
        share=1 / workers,
        purse=purse,
    )
    most = max(model.concurrency for model in questions.models) / workers
    images = max(1, round(IMAGES_A_CALL * most))
    dataset, reader, images_a_row = _dataset(source, images)
    asked = dataset.map_batches(
        _Worker,
        fn_constructor_kwargs={"job": job, "read": reader},
        batch_size=max(1, images // images_a_row),
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_cpus=CPUS,
    )
    left = 0
    try:
        for batch in asked.iter_batches(batch_size=None, prefetch_batches=0):
            for text in batch["asked"]:
                split, sample, modality, image, rows, unasked = json.loads(text)
                left += unasked
                answered = tuple(Row(**row) for row in rows)
                report(Asked(split, sample, modality, image, answered))
    except ray.exceptions.RayError as error:
        raise _cause(error) from None
    finally:
        if started:
            ray.shutdown()
    return left


class _Job(NamedTuple):
    """What every worker needs to know."""

    models: Sequence[ModelConfig]
    prompts: Mapping[str, Any]
    finished: frozenset[bytes]
    known_parts: tuple[Path, ...]
    ledger: str
    share: float
    purse: Any
    """Handle of the purse's actor; None: no budget."""


class _FarPurse:
    """The purse that all workers share."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    async def reserve(self, tokens: int, money: float) -> Grant:
        grant: Grant = await self._actor.reserve.remote(tokens, money)
        return grant

    async def settle(self, reserved: Spending, cost: Spending) -> None:
        await self._actor.settle.remote(reserved, cost)


class _Worker:
    """Asks about batches of images; its loop, connections and ledger part outlive a batch."""

    def __init__(self, job: _Job, read: Callable[[_Columns], Iterator[Picture]]) -> None:
        logging.getLogger("httpx2").setLevel(logging.WARNING)
        self._job = job
        self._read = read
        self._questions = Questions(job.prompts, job.models, job.finished)
        self._tail = LedgerTail(job.ledger, job.known_parts)
        self._purse: AsyncPurse | None = _FarPurse(job.purse) if job.purse is not None else None
        self._endpoints: list[Endpoint] = []
        self._part: LedgerPart | None = None
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()

    def __call__(self, batch: _Columns) -> dict[str, list[str]]:
        """Ask about a batch; one JSON text for each image."""
        self._questions.finished.update(self._tail.keys())
        asked: list[Asked] = []
        left = self._wait_for(self._ask(self._read(batch), asked.append))
        lines = []
        for number, one in enumerate(asked):
            rows = [row._asdict() | {"answer": ""} for row in one.rows]  # the ledger has it
            unasked = left if number == 0 else 0
            lines.append(json.dumps([*one[:4], rows, unasked]))
        return {"asked": lines}

    async def _ask(self, pictures: Iterator[Picture], report: Callable[[Asked], None]) -> int:
        if self._part is None:
            for model in self._job.models:
                concurrency = max(1, round(model.concurrency * self._job.share))
                fair = model.model_copy(update={"concurrency": concurrency})
                endpoint = Endpoint(fair, self._job.share)
                await endpoint.probe()
                self._endpoints.append(endpoint)
            self._part = LedgerPart(self._job.ledger)
        return await ask_all(
            pictures, self._questions, self._endpoints, self._part, self._purse, report
        )

    def _wait_for(self, work: Coroutine[Any, Any, _T]) -> _T:
        try:
            return asyncio.run_coroutine_threadsafe(work, self._loop).result()
        except BaseExceptionGroup as group:
            raise first_cause(group) from None


class _FromFiles:
    """Reads the images of samples whose files a batch names."""

    def __init__(self, source: FolderSource) -> None:
        self._source = FolderSource(source.benchmark, source.folder, {}, source.findings)

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


def _dataset(source: Source, images: int) -> tuple[Any, Callable[[_Columns], Any], int]:
    """The samples as a dataset, what takes images out of its batches, and images in a row."""
    modalities = len(source.benchmark.modalities)
    if isinstance(source, ShardSource):
        manifest = source.manifest
        paths = [
            f"{manifest.uri}/{shard.file}"
            for entry in manifest.splits.values()
            for shard in entry.shards
        ]
        columns = ["sample_id", *(f"image_{name}" for name in source.benchmark.modalities)]
        dataset = ray.data.read_parquet(paths, columns=columns, include_paths=True)
        return dataset, _FromShards(source), modalities
    samples = [
        {"split": split, "sample": json.dumps(sample._asdict())}
        for split, some in source.samples.items()
        for sample in some
    ]
    blocks = max(1, len(samples) * modalities // images)
    return ray.data.from_items(samples, override_num_blocks=blocks), _FromFiles(source), modalities


def _start_ray(workers: int) -> bool:
    """Join the cluster that there is, or start Ray on this machine; True: it was started here."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    if ray.is_initialized():
        return False
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=False)
        return True
    ray.init(
        address="local",
        num_cpus=(os.cpu_count() or 1) + workers,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    with contextlib.suppress(OSError):  # Ray writes its secret readable by everybody
        (Path.home() / ".ray" / "auth_token").chmod(0o600)
    return True


def _cause(error: BaseException) -> BaseException:
    """What went wrong in the worker, as the error that it was there."""
    while (inner := getattr(error, "cause", None) or error.__cause__) is not None:
        error = inner
        if not isinstance(error, ray.exceptions.RayError):
            break
    for kind in type(error).__mro__:  # Ray's errors are subclasses that print a whole traceback
        if kind.__module__ == "builtins" and hasattr(builtins, kind.__name__):
            return kind(str(error.args[0]) if error.args else str(error))
    return error
