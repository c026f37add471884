"""From beliefs to files: sentences, other words for them, caption files, beliefs, new shards."""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from next.benchmark.card import Benchmark
from next.captioning.requests.engine import Asked, Questions, Totals, hashed, run_here, spent_on
from next.captioning.requests.ledger import Ledger
from next.captioning.run import Captioner, ImageAnswers
from next.captioning.schema.labels import AttributeLabels, Image, Score, judge, score
from next.captioning.schema.merge import Belief, Calibration, calibrate, facts
from next.captioning.schema.rewriting import RewriteCheck, rewriting_prompt
from next.captioning.schema.template import CaptionWriter
from next.captioning.source import Picture, Source, Texts
from next.storage import replacing, write_whole

_log = logging.getLogger(__name__)

TEXT = "text"
"""The modality of questions about texts."""


@dataclass
class CaptionResult:
    """What a run made."""

    totals: Totals
    captions: int = 0
    """Images with a caption."""
    without: Counter[str] = field(default_factory=Counter)
    """Images without, by the reason."""
    unanswered_images: int = 0
    """Images that were asked about and of which no model gave an answer that can be read."""
    reasons: Counter[str] = field(default_factory=Counter)
    """What was said of them, numbers aside: endpoints tell each image's own."""
    sources: Counter[str] = field(default_factory=Counter)
    """Attributes that were written, by where the belief comes from."""
    left_out: int = 0
    """Attributes that an image can show and its caption does not tell."""
    rewritten: int = 0
    """Distinct sentences that were taken in the words of the rewriting model."""
    kept: int = 0
    """Distinct sentences whose rewriting failed the check, so that they stand as they were."""
    unanswered: int = 0
    """Distinct sentences that stand as they were, as the rewriting model gave no other words."""
    score: Score | None = None
    """Against the labels, where there are any."""
    files: list[Path] = field(default_factory=list)
    """What was written."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What decided the captions beside images and answers; holds no key."""

    def failure(self) -> str | None:
        """Why a run counts as failed, with the counts of reasons; None: it does not.

        It does where more than ``most_failed`` of the images that were asked about have no answer.
        """
        most = self.settings["most_failed"]
        asked = self.totals.images - self.without["not asked"]
        if not asked or self.unanswered_images <= most * asked:
            return None
        told = "; ".join(f"{number} {reason}" for reason, number in self.reasons.most_common(5))
        return (
            f"{self.unanswered_images} of {asked} images have no answer, which is more than "
            f"{most:.0%} (--most-failed): {told}"
        )

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        totals = vars(self.totals) | {"spent": self.totals.spent._asdict()}
        fields = vars(self) | {"totals": totals, "files": [str(path) for path in self.files]}
        if self.score is not None:
            rates = {"unknown": self.score.unknown, "accuracy": self.score.accuracy}
            fields["score"] = self.score._asdict() | rates
        return fields


def write_captions(
    captioner: Captioner,
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
    """Merge what was answered, and write caption files, beliefs and, if wanted, new shards.

    Args:
        captioner: whose models and settings.
        ledger: answers.
        images: as :meth:`Captioner.ask` gives them.
        out: folder; files of an earlier run are replaced.
        totals: as :meth:`Captioner.ask` gives them.
        labels: fit a calibration to them, and score what is written against them.
        calibration: instead of fitting one.
        shards: folder of new shards with these captions.
        progress: of the shards.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    result = CaptionResult(totals, settings=captioner.settings())
    unread = captioner.source.count() - len(images)
    if unread:
        result.without["unreadable"] = unread
    fitted = labels is not None and calibration is None
    result.settings["calibration"] = "labels" if fitted else "given" if calibration else None
    if labels is not None:
        result.score = Score(0, 0, 0)
        if calibration is None:
            answers = ((image, one.by_model) for image, one in captioner.answers(ledger, images))
            calibration = calibrate(judge(answers, labels, captioner.schema))
    if calibration is not None:
        calibration.save(out / "calibration.json")
        result.files.append(out / "calibration.json")
    book = _Book(captioner, labels, result)
    with replacing(out / "beliefs.jsonl") as file:
        for image, one, beliefs in captioner.believe(
            captioner.answers(ledger, images), calibration
        ):
            caption = book.write(image, one, beliefs)
            line = json.dumps(_line(image, one, beliefs, caption), ensure_ascii=False)
            file.write(f"{line}\n".encode())
    result.files.append(out / "beliefs.jsonl")
    if captioner.rewriter is not None:
        book.put_into_other_words(ledger)
    result.files += write_caption_files(captioner.source, book, out)
    if shards is not None:
        manifest = captioner.source.write_shards(shards, book, progress)
        result.files.append(Path(manifest.uri))
    result.files.append(out / "report.json")
    write_whole(out / "report.json", json.dumps(result.as_dict(), indent=1, default=str) + "\n")
    return result


class _Book(Mapping[Image, str]):
    """The captions: each a few numbers, of sentences that many share."""

    def __init__(
        self, captioner: Captioner, labels: AttributeLabels | None, result: CaptionResult
    ) -> None:
        self._captioner = captioner
        self._labels = labels
        self._result = result
        self._writer = CaptionWriter(captioner.schema)
        self._numbers: dict[str, int] = {}
        self._words: list[str] = []
        self._captions: dict[Image, tuple[int, ...]] = {}
        self._free: dict[str, set[str]] = {}

    def __getitem__(self, image: Image) -> str:
        return " ".join(self._words[number] for number in self._captions[image])

    def __iter__(self) -> Iterator[Image]:
        return iter(self._captions)

    def __len__(self) -> int:
        return len(self._captions)

    def write(
        self, image: Image, answers: ImageAnswers, beliefs: Mapping[str, Belief]
    ) -> str | None:
        """Write an image's caption, and count it; None: there is nothing sure enough."""
        schema, result = self._captioner.schema, self._result
        said = facts(beliefs, self._captioner.config.merge.threshold)
        shown = {attribute.name for attribute in schema.shown(image[2])}
        result.left_out += len(shown - said.keys())
        result.sources.update(beliefs[name].source for name in said)
        if self._labels is not None and result.score is not None:
            result.score += score({image: said}, self._labels, schema)
        for name, value in said.items():
            if value not in schema.by_name[name].values:
                self._free.setdefault(name, set()).add(value)
        sentences = self._writer.sentences(said)
        if answers.why:
            result.unanswered_images += 1
            result.reasons[f"{answers.reason}: {re.sub('[0-9]+', 'N', answers.why)}"] += 1
        if not sentences:
            result.without[answers.reason or "nothing sure enough"] += 1
            return None
        result.captions += 1
        self._captions[image] = tuple(map(self._number, sentences))
        return " ".join(sentences)

    def put_into_other_words(self, ledger: Ledger) -> None:
        """Ask the rewriting model about each distinct sentence; take what passes the check."""
        rewriter = self._captioner.rewriter
        assert rewriter is not None
        finished = ledger.finished(self._captioner.final)
        questions = Questions({TEXT: rewriting_prompt()}, [rewriter], finished)
        hashes: dict[str, str] = {}

        def report(asked: Asked) -> None:
            hashes[asked.sample] = asked.image
            for row in asked.rows:
                self._result.totals.spent += spent_on(row)

        pictures = (Picture("", one, TEXT, one.encode()) for one in self._numbers)
        if self._captioner.config.ask:
            budget = self._captioner.budget(self._result.totals.spent)
            run_here(pictures, questions, ledger.folder, budget, report)
            ledger.refresh()
        else:
            hashes |= {picture.sample: image_hash for picture, image_hash in hashed(pictures)}
        check = RewriteCheck(self._captioner.schema, self._free)
        for sentence, number in self._numbers.items():
            row = ledger.get(questions.key(hashes[sentence], TEXT, rewriter))
            if row is None or row.status != "answered":
                self._result.unanswered += 1
                continue
            answer = " ".join(row.answer.split()).strip('"')
            problem = check.problem(sentence, answer)
            if problem is None:
                self._words[number] = answer
                self._result.rewritten += 1
            else:
                self._result.kept += 1
                _log.debug("%r stays as it is: %r %s", sentence, answer, problem)

    def _number(self, sentence: str) -> int:
        number = self._numbers.setdefault(sentence, len(self._words))
        if number == len(self._words):
            self._words.append(sentence)
        return number


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
        items = [{"item": item, "description": text} for item, text in of_file.items()]
        write_whole(path, json.dumps(items, indent=1, ensure_ascii=False) + "\n")
    return list(entries)


def caption_path(benchmark: Benchmark, split: str, modality: str) -> str:
    """Where the card looks for a caption file; a place of the same kind where it does not say."""
    pattern = getattr(benchmark.captions, split) if benchmark.captions else None
    return (pattern or f"text/{split}_{{modality}}.json").format(modality=modality)


def _line(
    image: Image, answers: ImageAnswers, beliefs: Mapping[str, Belief], caption: str | None
) -> dict[str, Any]:
    """All that is held of an image, so that thresholds can be moved later."""
    split, sample, modality = image
    return {
        "split": split,
        "sample": sample,
        "modality": modality,
        "image": answers.image,
        "caption": caption,
        "reason": answers.reason or None,
        "attributes": {
            name: {
                "value": belief.value,
                "confidence": round(belief.confidence, 4),
                "source": belief.source,
                "candidates": {value: round(p, 4) for value, p in belief.candidates.items()},
            }
            for name, belief in beliefs.items()
        },
    }
