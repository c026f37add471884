"""From images to captions: ask, merge, write; every step can be repeated without a new call."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field

from next.captioning.attributes import Prompt, Reading, Schema, prompt_for
from next.captioning.endpoint import ModelConfig
from next.captioning.engine import Asked, Questions, Totals, run_here
from next.captioning.labels import AttributeLabels, Image, Score, judge, score
from next.captioning.ledger import Ledger, Status
from next.captioning.merge import Belief, Calibration, MergeConfig, calibrate, facts, merge
from next.captioning.parsing import parse_answer
from next.captioning.rewriting import RewriteCheck, rewriting_prompt
from next.captioning.source import Picture, Source, Texts
from next.captioning.spending import BudgetConfig, Purse, Spending
from next.captioning.template import CaptionWriter
from next.config import Section
from next.data.benchmark import Benchmark

_log = logging.getLogger(__name__)

Again = Literal["refused", "garbled"]
TEXT = "text"
"""The modality of questions about texts."""


class CaptionConfig(Section):
    """How captions are made of answers."""

    merge: MergeConfig = MergeConfig()
    """How readings become beliefs, and which are written."""
    budget: BudgetConfig = BudgetConfig()
    """The most that this run may spend."""
    again: tuple[Again, ...] = ()
    """Ask again what an earlier run has recorded as refused or garbled."""
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


@dataclass
class CaptionResult:
    """What a run made."""

    totals: Totals
    captions: int = 0
    """Images with a caption."""
    without: Counter[str] = field(default_factory=Counter)
    """Images without, by the reason."""
    sources: Counter[str] = field(default_factory=Counter)
    """Attributes that were written, by where the belief comes from."""
    left_out: int = 0
    """Attributes that an image can show and its caption does not tell."""
    rewritten: int = 0
    """Distinct sentences that were taken in the words of the rewriting model."""
    kept: int = 0
    """Distinct sentences whose rewriting failed the check, so that they stand as they were."""
    score: Score | None = None
    """Against the labels, where there are any."""
    files: list[Path] = field(default_factory=list)
    """What was written."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        totals = vars(self.totals) | {"spent": self.totals.spent._asdict()}
        fields = vars(self) | {"totals": totals, "files": [str(path) for path in self.files]}
        if self.score is not None:
            rates = {"unknown": self.score.unknown, "accuracy": self.score.accuracy}
            fields["score"] = self.score._asdict() | rates
        return fields


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
        for picture in self.source.pictures():
            images += 1
            sha256 = hashlib.sha256(picture.image).hexdigest()
            open_.update(questions.open(sha256, picture.modality).keys())
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
        """Ask what the ledger has no answer to.

        Returns:
            Where the run stands, and the sha256 of each image by split, sample and modality.
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

        if self.config.workers > 1:
            # Ray takes seconds to import, and is not needed to ask from one process.
            from next.captioning.pipeline import run_on_ray

            totals.left = run_on_ray(
                self.source,
                questions,
                ledger.folder,
                self.config.budget,
                report,
                workers=self.config.workers,
            )
        else:
            totals.left = run_here(
                self.source.pictures(), questions, ledger.folder, self._purse(), report
            )
        totals.known -= totals.left
        totals.seconds = time.monotonic() - began
        ledger.refresh()
        return totals, dict(sorted(images.items()))

    def readings(self, ledger: Ledger, images: Mapping[Image, str]) -> dict[Image, Heard]:
        """What the models said of each image, read from the ledger."""
        questions = self._questions(ledger)
        found = {}
        for image, image_hash in images.items():
            attributes = questions.prompts[image[2]].attributes
            by_model: dict[str, dict[str, Reading]] = {}
            reasons = []
            for model in self.models:
                row = ledger.get(questions.key(image_hash, image[2], model))
                if row is not None and row.status == "answered":
                    by_model[model.name] = parse_answer(row.answer, attributes).readings
                reasons.append(row.status if row is not None else "not asked")
            found[image] = Heard(image_hash, by_model, "" if by_model else reasons[0])
        return found

    def write(
        self,
        ledger: Ledger,
        images: Mapping[Image, str],
        out: str | Path,
        totals: Totals,
        *,
        labels: AttributeLabels | None = None,
        calibration: Calibration | None = None,
        shards: str | Path | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> CaptionResult:
        """Merge, and write caption files, beliefs and, if wanted, new shards.

        Args:
            ledger: answers.
            images: as :meth:`ask` gives them.
            out: folder; files of an earlier run are replaced.
            totals: as :meth:`ask` gives them.
            labels: fit a calibration to them, and score what is written against them.
            calibration: instead of fitting one.
            shards: folder of new shards with these captions.
            progress: of the shards.
        """
        out = Path(out)
        out.mkdir(parents=True, exist_ok=True)
        result = CaptionResult(totals)
        readings = self.readings(ledger, images)
        if labels is not None and calibration is None:
            by_model = {image: one.by_model for image, one in readings.items()}
            calibration = calibrate(judge(by_model, labels, self.schema))
        if calibration is not None:
            calibration.save(out / "calibration.json")
            result.files.append(out / "calibration.json")
        beliefs = self.merge(readings, calibration)
        said = {
            image: facts(beliefs[image], self.config.merge.threshold) if image in beliefs else {}
            for image in images
        }
        texts = self._texts(ledger, said, result)
        self._count(readings, beliefs, said, texts, result)
        if labels is not None:
            result.score = score(said, labels, self.schema)
        result.files.append(_write_beliefs(out / "beliefs.jsonl", readings, beliefs, texts))
        result.files += write_caption_files(self.source, texts, out)
        if shards is not None:
            manifest = self.source.write_shards(shards, texts, progress)
            result.files.append(Path(manifest.uri))
        (out / "report.json").write_text(json.dumps(result.as_dict(), indent=1, default=str) + "\n")
        return result

    def merge(
        self, readings: Mapping[Image, Heard], calibration: Calibration | None = None
    ) -> dict[Image, dict[str, Belief]]:
        """The beliefs about each image that anything was said of."""
        samples: dict[tuple[str, str], dict[str, dict[str, dict[str, Reading]]]] = {}
        for (split, sample, modality), one in readings.items():
            samples.setdefault((split, sample), {})[modality] = one.by_model
        return {
            (split, sample, modality): beliefs
            for (split, sample), by_modality in samples.items()
            for modality, beliefs in merge(
                self.schema, by_modality, self.config.merge, calibration
            ).items()
        }

    def _texts(
        self, ledger: Ledger, said: Mapping[Image, Mapping[str, str]], result: CaptionResult
    ) -> dict[Image, str]:
        writer = CaptionWriter(self.schema)
        written = {image: writer.sentences(values) for image, values in said.items() if values}
        other = self._rewritten(ledger, written, said, result) if self.rewriter else {}
        return {
            image: " ".join(other.get(sentence, sentence) for sentence in sentences)
            for image, sentences in written.items()
            if sentences
        }

    def _rewritten(
        self,
        ledger: Ledger,
        written: Mapping[Image, Sequence[str]],
        said: Mapping[Image, Mapping[str, str]],
        result: CaptionResult,
    ) -> dict[str, str]:
        """Sentences in other words, by the sentence, where the check takes them."""
        assert self.rewriter is not None
        sentences = sorted({sentence for some in written.values() for sentence in some})
        finished = ledger.finished(self._final)
        questions = Questions({TEXT: rewriting_prompt()}, [self.rewriter], finished)
        hashes: dict[str, str] = {}

        def report(asked: Asked) -> None:
            hashes[asked.sample] = asked.image
            for row in asked.rows:
                result.totals.spent += Spending(row.tokens_in + row.tokens_out, row.money)

        pictures = (Picture("", one, TEXT, one.encode()) for one in sentences)
        purse = self._purse(result.totals.spent)
        run_here(pictures, questions, ledger.folder, purse, report)
        ledger.refresh()
        check = RewriteCheck(self.schema, self._free_texts(said))
        taken = {}
        for sentence in sentences:
            row = ledger.get(questions.key(hashes[sentence], TEXT, self.rewriter))
            if row is None or row.status != "answered":
                continue
            answer = " ".join(row.answer.split()).strip('"')
            problem = check.problem(sentence, answer)
            if problem is None:
                taken[sentence] = answer
            else:
                result.kept += 1
                _log.debug("%r stays as it is: %r %s", sentence, answer, problem)
        result.rewritten = len(taken)
        return taken

    def _free_texts(self, said: Mapping[Image, Mapping[str, str]]) -> dict[str, set[str]]:
        free: dict[str, set[str]] = {}
        for values in said.values():
            for name, value in values.items():
                if value not in self.schema.by_name[name].values:
                    free.setdefault(name, set()).add(value)
        return free

    def _count(
        self,
        readings: Mapping[Image, Heard],
        beliefs: Mapping[Image, Mapping[str, Belief]],
        said: Mapping[Image, Mapping[str, str]],
        texts: Mapping[Image, str],
        result: CaptionResult,
    ) -> None:
        result.captions = len(texts)
        for image, one in readings.items():
            if image not in texts:
                result.without[one.reason or "nothing sure enough"] += 1
            result.sources.update(beliefs[image][name].source for name in said[image])
            shown = {attribute.name for attribute in self.schema.shown(image[2])}
            result.left_out += len(shown - said[image].keys())

    def _prompts(self) -> dict[str, Prompt]:
        spectra = {name: self.schema.spectrum(name) for name in self.source.benchmark.modalities}
        prompts = {spectrum: prompt_for(self.schema, spectrum) for spectrum in spectra.values()}
        return {modality: prompts[spectrum] for modality, spectrum in spectra.items()}

    def _questions(self, ledger: Ledger) -> Questions:
        return Questions(self._prompts(), self.models, ledger.finished(self._final))

    def _final(self, status: Status) -> bool:
        return status != "failed" and status not in self.config.again

    def _purse(self, spent: Spending | None = None) -> Purse | None:
        budget = self.config.budget
        if budget.tokens is None and budget.money is None:
            return None
        return Purse(budget, spent)


class Heard(NamedTuple):
    """What is known of one image."""

    image: str
    """sha256 of its file."""
    by_model: dict[str, dict[str, Reading]]
    """Of the models that answered."""
    reason: str
    """Why there is none."""


def write_caption_files(source: Source, texts: Texts, out: str | Path) -> list[Path]:
    """Caption files in the public format, where the card looks for them below ``out``."""
    entries: dict[Path, dict[str, str]] = {}
    for split, samples in source.samples.items():
        for number, modality in enumerate(source.benchmark.modalities):
            path = Path(out) / caption_path(source.benchmark, split, modality)
            of_file = entries.setdefault(path, {})
            for sample in samples:
                text = texts.get((split, sample.sample_id, modality))
                if text is not None:
                    of_file[source.item(split, sample, number)] = text
    for path, of_file in entries.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        items = [{"item": item, "description": text} for item, text in of_file.items()]
        path.write_text(json.dumps(items, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return list(entries)


def caption_path(benchmark: Benchmark, split: str, modality: str) -> str:
    """Where the card looks for a caption file; a place of the same kind where it does not say."""
    pattern = getattr(benchmark.captions, split) if benchmark.captions else None
    return (pattern or f"text/{split}_{{modality}}.json").format(modality=modality)


def _write_beliefs(
    path: Path,
    readings: Mapping[Image, Heard],
    beliefs: Mapping[Image, Mapping[str, Belief]],
    texts: Mapping[Image, str],
) -> Path:
    """One line for each image: all that is held of it, so that thresholds can be moved later."""
    with open(path, "w", encoding="utf-8") as file:
        for image, one in readings.items():
            split, sample, modality = image
            line = {
                "split": split,
                "sample": sample,
                "modality": modality,
                "image": one.image,
                "caption": texts.get(image),
                "reason": one.reason or None,
                "attributes": {
                    name: {
                        "value": belief.value,
                        "confidence": round(belief.confidence, 4),
                        "source": belief.source,
                        "candidates": {v: round(p, 4) for v, p in belief.candidates.items()},
                    }
                    for name, belief in beliefs.get(image, {}).items()
                },
            }
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    return path


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
