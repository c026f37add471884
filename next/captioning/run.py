"""From images to beliefs: plan, ask, read, merge; what was asked once is never asked again."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from pydantic import Field

from next.captioning.requests.engine import Asked, Questions, Totals, hashed, run_here
from next.captioning.requests.ledger import Ledger, Status
from next.captioning.requests.models import ModelConfig
from next.captioning.requests.spending import Budget, BudgetConfig, Spending
from next.captioning.schema.attributes import Reading, Schema
from next.captioning.schema.labels import Image
from next.captioning.schema.merge import Belief, Calibration, MergeConfig, merge
from next.captioning.schema.parsing import parse_answer
from next.captioning.schema.prompt import Prompt, prompt_for
from next.captioning.schema.template import CaptionWriter
from next.captioning.source import Source
from next.config import Section

Again = Literal["refused", "garbled"]


class CaptionConfig(Section):
    """How captions are made of answers."""

    merge: MergeConfig = MergeConfig()
    """How readings become beliefs, and which are written."""
    budget: BudgetConfig = BudgetConfig()
    """The most that this run may spend."""
    ask: bool = True
    """Off: ask nothing, and make captions of what the ledger holds; needs no endpoint and no key.
    So thresholds can be moved later."""
    again: tuple[Again, ...] = ()
    """Ask again what an earlier run has recorded as refused or garbled."""
    most_failed: float = Field(default=0.5, ge=0, le=1)
    """Share of the images that may be left without any answer (refused, garbled, failed); with more
    the job ends with code 1, after it has written what there is."""
    workers: int = Field(default=1, ge=1)
    """Processes that ask: 1, this one; more, actors of Ray Data, wherever the cluster has room.
    Concurrency and limits of a model are shared out among them."""


class Plan(NamedTuple):
    """What a run would do."""

    images: int
    known: dict[str, int]
    """Answers that the ledger has, by model."""
    open: dict[str, int]
    """Questions that would be asked, by model."""
    cost: dict[str, Spending]
    """What these are expected to cost, by model."""

    @property
    def total(self) -> Spending:
        """Of all models."""
        return sum(self.cost.values(), Spending())


@dataclass(frozen=True)
class Captioner:
    """Makes captions of a source.

    Args:
        source: images.
        schema: what is asked, and how it is written.
        models: who is asked.
        config: how.
        rewriter: model that rewrites sentences; None: they stay as the templates give them.

    Raises:
        ValueError: the schema does not know a modality, or a template of it is wrong.
    """

    source: Source
    schema: Schema
    models: Sequence[ModelConfig]
    config: CaptionConfig = CaptionConfig()  # noqa: RUF009 (frozen)
    rewriter: ModelConfig | None = None

    def __post_init__(self) -> None:
        self._prompts()
        CaptionWriter(self.schema)

    def plan(self, ledger: Ledger) -> Plan:
        """What :meth:`ask` would do; reads and hashes every image, and calls nothing."""
        questions = self._questions(ledger)
        images = 0
        open_: Counter[str] = Counter()
        for picture, image_hash in hashed(self.source.pictures()):
            images += 1
            open_.update(questions.open(image_hash, picture.modality).keys())
        means = _mean_tokens(ledger, self.models)
        return Plan(
            images,
            known={model.name: images - open_[model.name] for model in self.models},
            open={model.name: open_[model.name] for model in self.models},
            cost={
                model.name: model.cost(
                    round(open_[model.name] * means[model.name][0]),
                    round(open_[model.name] * means[model.name][1]),
                )
                for model in self.models
            },
        )

    def ask(
        self, ledger: Ledger, progress: Callable[[Totals], None] | None = None
    ) -> tuple[Totals, dict[Image, str]]:
        """Ask what the ledger has no answer to; with ``config.ask`` off, look what it has.

        Returns:
            Where the run stands, and the sha256 of each image by split, sample and modality.

        Raises:
            ValueError: an image cannot be cut, a key is missing, or a model is not there.
            ConnectionError: an endpoint cannot be reached, or went away.
            PermissionError: a key is not accepted, or a quota is used up.
        """
        questions = self._questions(ledger)
        totals, images = Totals(), {}
        began = time.monotonic()

        def report(asked: Asked) -> None:
            images[asked.split, asked.sample, asked.modality] = asked.image
            totals.add(asked, len(self.models))
            totals.seconds = time.monotonic() - began
            if progress is not None:
                progress(totals)

        if not self.config.ask:
            for picture, image_hash in hashed(self.source.pictures()):
                totals.left += len(questions.open(image_hash, picture.modality))
                report(Asked(picture.split, picture.sample, picture.modality, image_hash, ()))
        elif self.config.workers > 1:
            # Ray takes seconds to import, and is not needed to ask from one process.
            from next.captioning.requests.pipeline import run_on_ray

            totals.left = run_on_ray(
                self.source,
                questions,
                ledger,
                self.config.budget,
                report,
                workers=self.config.workers,
            )
        else:
            totals.left = run_here(
                self.source.pictures(), questions, ledger.folder, self.budget(), report
            )
        totals.known -= totals.left
        totals.seconds = time.monotonic() - began
        ledger.refresh()
        return totals, dict(sorted(images.items()))

    def answers(
        self, ledger: Ledger, images: Mapping[Image, str]
    ) -> Iterator[tuple[Image, ImageAnswers]]:
        """What the models said of each image, read from the ledger one by one."""
        questions = self._questions(ledger)
        for image, image_hash in images.items():
            attributes = questions.prompts[image[2]].attributes
            by_model: dict[str, dict[str, Reading]] = {}
            silent: list[tuple[str, str]] = []
            for model in self.models:
                row = ledger.get(questions.key(image_hash, image[2], model))
                if row is not None and row.status == "answered":
                    by_model[model.name] = parse_answer(row.answer, attributes).readings
                elif row is not None:
                    silent.append((row.status, row.reason or "no reason was given"))
            # A model that was asked says more than one that was not.
            reason, why = ("", "") if by_model else [*silent, ("not asked", "")][0]
            yield image, ImageAnswers(image_hash, by_model, reason, why)

    def believe(
        self, answers: Iterable[tuple[Image, ImageAnswers]], calibration: Calibration | None = None
    ) -> Iterator[tuple[Image, ImageAnswers, dict[str, Belief]]]:
        """The merged beliefs about each image; the images of a sample stand together."""
        for _, group in itertools.groupby(answers, lambda pair: pair[0][:2]):
            sample = list(group)
            by_modality = {image[2]: one.by_model for image, one in sample}
            beliefs = merge(self.schema, by_modality, self.config.merge, calibration)
            for image, one in sample:
                yield image, one, beliefs.get(image[2], {})

    def _prompts(self) -> dict[str, Prompt]:
        spectra = {name: self.schema.spectrum(name) for name in self.source.benchmark.modalities}
        prompts = {spectrum: prompt_for(self.schema, spectrum) for spectrum in spectra.values()}
        return {modality: prompts[spectrum] for modality, spectrum in spectra.items()}

    def _questions(self, ledger: Ledger) -> Questions:
        return Questions(self._prompts(), self.models, ledger.finished(self.final))

    def settings(self) -> dict[str, Any]:
        """What decides captions beside images and answers, for a record; holds no key."""
        return {
            "benchmark": self.source.benchmark.name,
            "schema": self.schema.name,
            "prompts": {modality: prompt.hash for modality, prompt in self._prompts().items()},
            "models": [model.model_dump(mode="json") for model in self.models],
            "rewriter": None if self.rewriter is None else self.rewriter.name,
            **self.config.model_dump(mode="json"),
        }

    def final(self, status: Status) -> bool:
        """Whether a row of this status is not asked again."""
        return status != "failed" and status not in self.config.again

    def budget(self, spent: Spending | None = None) -> Budget | None:
        """The budget, of which some may be spent already; None: there is no limit."""
        limits = self.config.budget
        if limits.tokens is None and limits.money is None:
            return None
        return Budget(limits, spent)


class ImageAnswers(NamedTuple):
    """What is known of one image."""

    image: str
    """sha256 of its file."""
    by_model: dict[str, dict[str, Reading]]
    """Of the models that answered."""
    reason: str
    """Why there is none: the status of the first model that was asked."""
    why: str = ""
    """What that model or its endpoint said."""


def _mean_tokens(ledger: Ledger, models: Iterable[ModelConfig]) -> dict[str, tuple[float, float]]:
    """Tokens of a call, by model: as experienced, else as the models' file says."""
    seen: dict[str, list[int]] = {}
    for row in ledger.rows():
        if row.status == "answered" and row.tokens_in:
            sums = seen.setdefault(row.model, [0, 0, 0])
            for place, value in enumerate((row.tokens_in, row.tokens_out, 1)):
                sums[place] += value
    means = {}
    for model in models:
        if model.name in seen:
            tokens_in, tokens_out, count = seen[model.name]
            means[model.name] = (tokens_in / count, tokens_out / count)
        else:
            means[model.name] = (model.expected_tokens_in, model.expected_tokens_out)
    return means
