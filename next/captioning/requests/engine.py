"""Asks all models about all images: many calls at a time, little in memory, every answer kept."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

from next.captioning.requests.endpoint import Endpoint
from next.captioning.requests.ledger import LedgerPart, Row, RowWriter, Status, row_key
from next.captioning.requests.models import ModelConfig
from next.captioning.requests.spending import Budget, Grant, Spending
from next.captioning.schema.prompt import Prompt
from next.captioning.source import Picture

READ_AHEAD = 32
"""Images that are read and hashed at a time, beside the calls."""
LOST_CALLS = 20
"""Calls that fail one after the other, all retries spent, before a run is given up."""
_WAIT_S = 0.02


class Asked(NamedTuple):
    """One image has been asked about, or needed not to be."""

    split: str
    sample: str
    modality: str
    image: str
    """sha256 of its file."""
    rows: tuple[Row, ...]
    """What was asked now; models that had answered already have none."""


@dataclass
class Totals:
    """Where a run stands."""

    images: int = 0
    """Images that are done."""
    known: int = 0
    """Answers that the ledger had."""
    calls: int = 0
    """Questions asked in this run."""
    requests: int = 0
    """Times that something was sent, retries included."""
    statuses: dict[Status, int] = field(default_factory=dict)
    """Questions of this run by what became of them."""
    spent: Spending = field(default_factory=Spending)
    """By this run."""
    left: int = 0
    """Questions that were not asked, as the budget was spent."""
    seconds: float = 0.0

    def add(self, asked: Asked, models: int) -> None:
        """One image more."""
        self.images += 1
        self.known += models - len(asked.rows)
        for row in asked.rows:
            self.calls += 1
            self.requests += row.requests
            self.statuses[row.status] = self.statuses.get(row.status, 0) + 1
            self.spent += spent_on(row)


def spent_on(row: Row) -> Spending:
    """What a question has cost, with what was lost on the way."""
    tokens = row.tokens_in + row.tokens_out + row.lost_tokens
    return Spending(tokens, row.money + row.lost_money)


class AsyncBudget(Protocol):
    """A budget that may be in another process."""

    async def reserve(self, tokens: int, money: float) -> Grant: ...

    async def settle(self, reserved: Spending, cost: Spending) -> None: ...


class LocalBudget:
    """A budget in this process."""

    def __init__(self, budget: Budget) -> None:
        self.budget = budget

    async def reserve(self, tokens: int, money: float) -> Grant:
        return self.budget.reserve(tokens, money)

    async def settle(self, reserved: Spending, cost: Spending) -> None:
        self.budget.settle(reserved, cost)


class Questions:
    """What is asked of whom, and which of it is answered already.

    Args:
        prompts: what is asked, by modality.
        models: who is asked.
        finished: keys of the ledger's rows that are not asked again.
    """

    def __init__(
        self,
        prompts: Mapping[str, Prompt],
        models: Sequence[ModelConfig],
        finished: Iterable[bytes] = (),
    ) -> None:
        self.prompts = dict(prompts)
        self.models = tuple(models)
        self.finished = set(finished)
        self._settings = {model.name: model.settings() for model in models}

    def key(self, image: str, modality: str, model: ModelConfig) -> bytes:
        """What the ledger knows a question by."""
        return row_key(image, self.prompts[modality].hash, model.name, self._settings[model.name])

    def open(self, image: str, modality: str) -> dict[str, bytes]:
        """The models that have not answered yet, and the keys of their answers."""
        keys = {model.name: self.key(image, modality, model) for model in self.models}
        return {name: key for name, key in keys.items() if key not in self.finished}


async def ask_all(
    pictures: Iterable[Picture],
    questions: Questions,
    endpoints: Sequence[Endpoint],
    part: RowWriter,
    budget: AsyncBudget | None,
    report: Callable[[Asked], None],
) -> int:
    """Ask every model about every picture that it has not answered yet.

    Pictures are read as calls come free, so memory does not grow with their number. An answer is
    in the ledger before it is reported.

    Args:
        pictures: read in a thread of their own.
        questions: prompts, models and what is finished.
        endpoints: one for each model, probed.
        part: takes the answers.
        budget: None: no limit.
        report: called for each image when all its models have answered, in this thread.

    Returns:
        Questions that were not asked, as the budget was spent.

    Raises:
        ConnectionError: an endpoint went away.
        PermissionError: a key is no longer taken.
    """
    run = _Run(questions, part, budget, report)
    queues = {
        endpoint.model.name: asyncio.Queue[_Task | None](2 * endpoint.model.concurrency)
        for endpoint in endpoints
    }
    async with asyncio.TaskGroup() as group:
        for endpoint in endpoints:
            queue = queues[endpoint.model.name]
            asker = _Asker(run, endpoint, queue)
            for _ in range(endpoint.model.concurrency):
                group.create_task(asker.work())
        group.create_task(run.feed(pictures, queues))
    return run.left


@dataclass(slots=True)
class _Image:
    """An image under way."""

    picture: Picture
    hash: str
    open: int
    """Models that have not answered."""
    rows: list[Row] = field(default_factory=list)


class _Task(NamedTuple):
    image: _Image
    key: bytes


class _Run:
    def __init__(
        self,
        questions: Questions,
        part: RowWriter,
        budget: AsyncBudget | None,
        report: Callable[[Asked], None],
    ) -> None:
        self.questions = questions
        self.part = part
        self.budget = budget
        self.left = 0
        self._report = report
        self._followers: dict[bytes, list[_Image]] = {}

    async def feed(
        self, pictures: Iterable[Picture], queues: dict[str, asyncio.Queue[_Task | None]]
    ) -> None:
        """Put questions into the queues until there are no more pictures."""
        ahead = hashed(pictures)
        while chunk := await asyncio.to_thread(lambda: list(itertools.islice(ahead, READ_AHEAD))):
            for picture, image_hash in chunk:
                keys = self.questions.open(image_hash, picture.modality)
                image = _Image(picture, image_hash, len(keys))
                if not keys:
                    self._done(image)
                for model, key in keys.items():
                    if key in self._followers:  # the same file again, while it is being asked about
                        self._followers[key].append(image)
                        continue
                    self._followers[key] = []
                    await queues[model].put(_Task(image, key))
        for queue in queues.values():
            await queue.put(None)

    def answered(self, task: _Task, row: Row | None) -> None:
        """Keep a row, and go on with all images that it is about; None: it was not asked."""
        if row is not None:
            self.part.append(row)
            if row.status != "failed":
                self.questions.finished.add(task.key)
        followers = self._followers.pop(task.key)
        self._count(task.image, row)
        for image in followers:
            self._count(image, None)

    def _count(self, image: _Image, row: Row | None) -> None:
        image.open -= 1
        if row is not None:
            image.rows.append(row)
        if not image.open:
            self._done(image)

    def _done(self, image: _Image) -> None:
        picture = image.picture
        self._report(
            Asked(picture.split, picture.sample, picture.modality, image.hash, tuple(image.rows))
        )


class _Asker:
    """The workers of one model."""

    def __init__(self, run: _Run, endpoint: Endpoint, queue: asyncio.Queue[_Task | None]) -> None:
        self._run = run
        self._endpoint = endpoint
        self._queue = queue
        self._lost = 0
        self._meter = _Meter(endpoint.model, run.budget) if run.budget is not None else None

    async def work(self) -> None:
        """Take questions until there are none."""
        while (task := await self._queue.get()) is not None:
            self._run.answered(task, await self._ask(task))
        await self._queue.put(None)  # for the next worker

    async def _ask(self, task: _Task) -> Row | None:
        model = self._endpoint.model
        picture = task.image.picture
        prompt = self._run.questions.prompts[picture.modality]
        outcome = await self._endpoint.ask(picture.image, prompt, self._meter)
        if not outcome.requests:  # the budget did not even allow the first
            self._run.left += 1
            return None
        row = Row(
            image=task.image.hash,
            prompt=prompt.hash,
            model=model.name,
            settings=model.settings(),
            status=outcome.status,
            answer=outcome.answer,
            reason=outcome.reason,
            tokens_in=outcome.tokens_in,
            tokens_out=outcome.tokens_out,
            money=model.cost(outcome.tokens_in, outcome.tokens_out).money,
            requests=outcome.requests,
            lost_tokens=outcome.lost.tokens,
            lost_money=outcome.lost.money,
        )
        self._lost = self._lost + 1 if outcome.status == "failed" else 0
        if self._lost >= LOST_CALLS:
            self._run.answered(task, row)
            raise ConnectionError(
                f"{model.base_url}: the last {LOST_CALLS} calls of {model.name} failed with all "
                f"retries ({outcome.reason}); what was answered is in the ledger, so mend the "
                f"endpoint and run again"
            )
        return row


class _Meter:
    """What requests to one model may cost, reserved from the budget.

    A prompt may take what the costliest took so far, an answer as many tokens as the model may
    give. Until the first request has told what a prompt takes, no other is sent.
    """

    def __init__(self, model: ModelConfig, budget: AsyncBudget) -> None:
        self._model = model
        self._budget = budget
        self._most_in = model.expected_tokens_in
        self._most_out = model.max_tokens or model.expected_tokens_out
        self._known = False
        self._scout = asyncio.Semaphore(1)

    async def hold(self) -> Spending | None:
        """Set aside what the next request may cost; None: the budget is spent."""
        if not self._known:
            await self._scout.acquire()
            if self._known:
                self._scout.release()
        while True:
            may_cost = self._model.cost(self._most_in, self._most_out)
            grant = await self._budget.reserve(may_cost.tokens, may_cost.money)
            if grant == "granted":
                return may_cost
            if grant == "spent":
                self._release()
                return None
            await asyncio.sleep(_WAIT_S)

    async def settle(self, held: Spending, cost: Spending) -> None:
        """Replace what was set aside by what the request did cost."""
        await self._budget.settle(held, cost)
        self._release()

    def learn(self, tokens_in: int, tokens_out: int) -> None:
        """The costliest request so far is what the next one may cost."""
        if not self._known:
            self._most_in, self._known = tokens_in, True
        self._most_in = max(self._most_in, tokens_in)
        self._most_out = max(self._most_out, tokens_out)

    def _release(self) -> None:
        """Let the others go once the first has come back."""
        if self._scout.locked():
            self._scout.release()


def hashed(pictures: Iterable[Picture]) -> Iterator[tuple[Picture, str]]:
    """Each picture with the sha256 of its file."""
    for picture in pictures:
        yield picture, hashlib.sha256(picture.image).hexdigest()


def run_here(
    pictures: Iterable[Picture],
    questions: Questions,
    ledger: str | Path,
    budget: Budget | None,
    report: Callable[[Asked], None],
) -> int:
    """:func:`ask_all` in a loop of its own, with endpoints of its own, probed.

    Nothing is sent, not even a probe, before there is a question to ask.

    Args:
        pictures: images.
        questions: prompts, models and what is finished.
        ledger: folder of the ledger, which the caller holds.
        budget: None: no limit.
        report: called for each image that is done.

    Returns:
        Questions that were not asked, as the budget was spent.
    """
    remaining = iter(pictures)
    first = first_open(remaining, questions, report)
    if first is None:
        return 0

    async def run() -> int:
        async with contextlib.AsyncExitStack() as stack:
            part = stack.enter_context(contextlib.closing(LedgerPart(ledger)))
            endpoints = []
            for model in questions.models:
                endpoints.append(await stack.enter_async_context(Endpoint(model)))
            await asyncio.gather(*(endpoint.probe() for endpoint in endpoints))
            spends = LocalBudget(budget) if budget is not None else None
            pictures = itertools.chain([first], remaining)
            return await ask_all(pictures, questions, endpoints, part, spends, report)

    try:
        return asyncio.run(run())
    except BaseExceptionGroup as group:
        raise first_cause(group) from None


def first_open(
    pictures: Iterator[Picture], questions: Questions, report: Callable[[Asked], None]
) -> Picture | None:
    """The first picture with an open question; those before it are reported as done."""
    for picture, image_hash in hashed(pictures):
        if questions.open(image_hash, picture.modality):
            return picture
        report(Asked(picture.split, picture.sample, picture.modality, image_hash, ()))
    return None


def first_cause(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The error that ended a group of tasks, without what it is wrapped in."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
