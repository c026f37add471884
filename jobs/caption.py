"""Caption images by attribute confidence (run), or measure captions (quality).

Examples::

    python jobs/caption.py run --card datasets/demo.toml --source DIR --models MODELS --out OUT
    python jobs/caption.py quality ../captions/RGBNT201
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from next.benchmark.card import Benchmark, load_card
from next.captioning.output import CaptionResult, caption_path, write_captions
from next.captioning.quality.report import QualityReport, guess_schema, measure, read_caption_files
from next.captioning.requests.engine import Totals
from next.captioning.requests.ledger import Ledger
from next.captioning.requests.models import ModelConfig, load_models
from next.captioning.run import CaptionConfig, Captioner, Plan
from next.captioning.schema.attributes import SCHEMAS, load_schema
from next.captioning.schema.labels import load_labels
from next.captioning.schema.merge import Calibration
from next.captioning.source import FolderSource, ShardSource, Source
from next.cli import FAILURE, REQUIRED, ProgressLine, call_verb, parse, run_job
from next.config import near_matches
from next.data.shards.reader import open_manifest
from next.data.source.images import OnBad
from next.data.source.ingest import ScanOptions
from next.lease import Lease
from next.pictures.caption_quality import draw_report
from next.storage import open_folder

WIDTH = 160
"""Columns of a table that goes to a file or a pipe."""


@dataclass(frozen=True)
class RunJob:
    """Caption images by attribute confidence: ask models, merge what they say, write sentences.

    Every answer is kept in a ledger, so a second run asks nothing and a killed one goes on.
    """

    models: Path
    """TOML file of [[models]]: name, base_url, api_key_env, concurrency, prices, ..."""
    out: Path | None = None
    """Folder of the caption files, beliefs.jsonl, report.json and the ledger."""
    card: Path | None = None
    """Card of the benchmark, such as datasets/rgbnt201.toml; with --source."""
    source: str | None = None
    """Raw folders that the card's paths start from, local or s3://."""
    data: str | None = None
    """Instead of --card and --source: shards that jobs/prepare.py wrote, local or s3://."""
    schema: str | None = None
    """person, vehicle or a TOML file; None: by the card's object."""
    only: tuple[str, ...] = ()
    """Names of the models to ask about images; all of them where it is left out."""
    rewrite: str | None = None
    """Name of a model of the file that rewrites sentences; checked, one by one."""
    ledger: Path | None = None
    """Folder of the ledger, on the machine that this job runs on; None: ledger/ in --out."""
    shards: str | None = None
    """Folder of new shards with the new captions, local or s3://."""
    labels: Path | None = None
    """JSON {split: {sample: {attribute: value}}}: what is written is scored against it, and without
    --calibration confidences are calibrated with it."""
    calibration: Path | None = None
    """calibration.json that a run with --labels wrote."""
    on_bad: OnBad = "fail"
    """A file of --source that does not fit the card, or has to be decoded and cannot be: fail, or
    skip it. An image that only the endpoint cannot open is recorded as refused in any case."""
    drop_leaked: bool = False
    """Drop identities from train that stand in the gallery or the queries of --source, too."""
    allow_count_mismatch: bool = False
    """Go on, with a warning, where --source has other counts than the card asserts."""
    config: Annotated[CaptionConfig, tyro.conf.arg(name="")] = CaptionConfig()  # noqa: RUF009
    """How captions are made of answers."""
    dry_run: bool = False
    """Count what would be asked, and what it is expected to cost; ask nothing."""
    json: bool = False
    """Print the answer as one JSON object."""


@dataclass(frozen=True)
class QualityJob:
    """Measure caption files: lengths, unknown rate, dirt, contradictions, coverage."""

    files: tyro.conf.Positional[tuple[Path, ...]]
    """Caption files SPLIT_MODALITY.json, or folders of them, such as text/ of a run's --out."""
    schema: str | None = None
    """Schema whose attributes are looked for: person, vehicle or a TOML file; None: the one of
    the package that fits the captions best."""
    figures: Path | None = None
    """Folder for pictures (PNG); None: none are drawn."""
    json: bool = False
    """Print the report as one JSON object."""


def main(argv: Sequence[str]) -> int:
    """Call the verb, exit code."""
    return call_verb(argv, {"run": run, "quality": quality}, f"{__doc__}\nEach takes --help.")


def run(argv: Sequence[str]) -> int:
    """Ask, merge and write."""
    job = parse(RunJob, argv, default=RunJob(models=REQUIRED))
    if job.out is None and not (job.dry_run and job.ledger is not None):
        raise ValueError("--out is needed: the folder of captions and ledger")
    logging.getLogger("httpx2").setLevel(logging.WARNING)
    source = _source(job)
    models = load_models(job.models)
    captioner = Captioner(
        source=source,
        schema=load_schema(job.schema or source.benchmark.object),
        models=[_named(models, name) for name in job.only] or models,
        config=job.config,
        rewriter=None if job.rewrite is None else _named(models, job.rewrite),
    )
    if job.config.ask and not job.dry_run:
        for model in (*captioner.models, *([captioner.rewriter] if captioner.rewriter else ())):
            model.key()  # before an image is read, let alone asked about
    labels = None if job.labels is None else load_labels(job.labels, captioner.schema)
    calibration = None if job.calibration is None else Calibration.load(job.calibration)
    out = job.out or Path()
    writing = Lease(open_folder(out), "a folder of captions", within=True)
    with (
        nullcontext() if job.dry_run else writing,
        Ledger(job.ledger or out / "ledger", look=job.dry_run) as ledger,
    ):
        if job.dry_run:
            show_plan(captioner.plan(ledger), as_json=job.json)
            return 0
        questions = source.count() * len(captioner.models)
        with progress_line(questions) as progress:
            totals, images = captioner.ask(ledger, progress)
        with ProgressLine("shards") if job.shards else nullcontext() as written:
            result = write_captions(
                captioner,
                ledger,
                images,
                out,
                totals,
                labels=labels,
                calibration=calibration,
                shards=job.shards,
                progress=written,
            )
    if job.json:
        print(json.dumps(result.as_dict()))
    else:
        show_result(result)
        if job.shards is None and source.benchmark.captions is None:
            print(
                "hint      the card names no caption files: before jobs/prepare.py can read these, "
                "give it\n          [captions] with a line for each split, such as "
                f"{_caption_lines(source.benchmark)}; or use --shards"
            )
    failure = result.failure()
    if failure is not None:
        sys.stderr.write(f"error: {failure}\n")
        return FAILURE
    return 0


def _source(job: RunJob) -> Source:
    if job.data is not None:
        if job.card is not None or job.source is not None:
            raise ValueError("--data takes no --card or --source: shards hold their card")
        return ShardSource(open_manifest(job.data))
    if job.card is None or job.source is None:
        raise ValueError("--card and --source are needed, or --data with a folder of shards")
    options = ScanOptions(
        on_bad=job.on_bad,
        drop_leaked=job.drop_leaked,
        allow_count_mismatch=job.allow_count_mismatch,
    )
    return FolderSource.open(load_card(job.card), job.source, options)


def _caption_lines(benchmark: Benchmark) -> str:
    splits = benchmark.stored()
    return ", ".join(f'{one} = "{caption_path(benchmark, one, "{modality}")}"' for one in splits)


def _named(models: Sequence[ModelConfig], name: str) -> ModelConfig:
    names = [model.name for model in models]
    if name not in names:
        close = near_matches(name, names) or names
        raise ValueError(
            f"there is no model {name!r} in the file of models; did you mean {' or '.join(close)}?"
        )
    return models[names.index(name)]


@contextmanager
def progress_line(questions: int) -> Iterator[Callable[[Totals], None]]:
    """Rate, cost and time left: a bar on a terminal, a line every few seconds elsewhere."""
    if not sys.stderr.isatty():
        shown = time.monotonic()

        def line(totals: Totals) -> None:
            nonlocal shown
            if time.monotonic() - shown > 5:
                shown = time.monotonic()
                sys.stderr.write(f"caption  {_state(totals, questions)}\n")
                sys.stderr.flush()

        yield line
        return
    with Progress(
        TextColumn("caption"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    ) as bar:
        task = bar.add_task("caption", total=questions, state="")
        yield lambda totals: bar.update(
            task, completed=totals.known + totals.calls, state=_cost(totals)
        )


def _state(totals: Totals, questions: int) -> str:
    done = totals.known + totals.calls
    rate = totals.calls / totals.seconds if totals.seconds else 0.0
    left = f"about {(questions - done) / rate:.0f} s left" if rate else ""
    return f"{done}/{questions} answers  {_cost(totals)}  {left}"


def _cost(totals: Totals) -> str:
    rate = totals.calls / totals.seconds if totals.seconds else 0.0
    return f"{rate:.1f}/s  {totals.spent.tokens} tokens  cost {totals.spent.money:.2f}"


def show_plan(plan: Plan, *, as_json: bool) -> None:
    """What a run would ask and cost."""
    if as_json:
        costs = {name: one._asdict() for name, one in plan.cost.items()}
        print(json.dumps(plan._asdict() | {"cost": costs, "total": plan.total._asdict()}))
        return
    table = Table(title=f"{plan.images} images; nothing was asked (--dry-run)")
    for name in ("model", "answered", "to ask", "expected tokens", "expected cost"):
        table.add_column(name, justify="left" if name == "model" else "right")
    for name, cost in plan.cost.items():
        numbers = (plan.known[name], plan.open[name], cost.tokens)
        table.add_row(name, *map(str, numbers), f"{cost.money:.2f}")
    table.add_section()
    known, open_ = sum(plan.known.values()), sum(plan.open.values())
    table.add_row("all", f"{known}", f"{open_}", f"{plan.total.tokens}", f"{plan.total.money:.2f}")
    Console(width=None if Console().is_terminal else WIDTH, highlight=False).print(table)


def show_result(result: CaptionResult) -> None:
    """What was asked, what became of it, and what was written."""
    totals = result.totals
    statuses = ", ".join(f"{count} {status}" for status, count in totals.statuses.items())
    spent = f"{totals.spent.tokens} tokens, cost {totals.spent.money:.2f}"
    rate = totals.calls / totals.seconds if totals.seconds else 0.0
    print(f"images    {totals.images}, of which {result.captions} have a caption")
    for reason, count in result.without.items():
        print(f"          {count} without: {reason}")
    for reason, count in result.reasons.most_common(5):
        print(f"          {count} {reason}")
    print(f"asked     {totals.calls} ({statuses or 'nothing'}), {totals.known} known before")
    print(f"          {spent}; {totals.seconds:.1f} s, {rate:.1f}/s")
    if totals.left:
        asks = result.settings["ask"]
        why = "the budget is spent; run again with more" if asks else "--no-ask asks nothing"
        print(f"LEFT      {totals.left} questions, as {why}")
    written = ", ".join(f"{count} {source}" for source, count in sorted(result.sources.items()))
    print(f"written   attributes: {written or 'none'}; {result.left_out} left out")
    if result.settings["rewriter"] is not None:
        kept = f"{result.kept} refused by the check, {result.unanswered} without an answer"
        print(f"rewritten {result.rewritten} sentences, {kept}; its cost is counted above")
    if result.score is not None:
        score = result.score
        fitted = ", on the labels that calibrated it" * (result.settings["calibration"] == "labels")
        rates = f"unknown {score.unknown:.2f} %, accuracy {score.accuracy:.2f} %"
        print(f"labels    {rates}{fitted}")
    for file in result.files:
        print(f"file      {file}")


def quality(argv: Sequence[str]) -> int:
    """Measure caption files and print the report."""
    job = parse(QualityJob, argv)
    if not job.files:
        raise ValueError("caption files or folders are needed: quality FILES...")
    files = read_caption_files(job.files)
    if job.schema is not None:
        schema = load_schema(job.schema)
    else:
        schema = guess_schema(files, [load_schema(path) for path in sorted(SCHEMAS.glob("*.toml"))])
    with ProgressLine("measure") as progress:
        report = measure(files, schema, progress=progress)
    pictures = draw_report(report, job.figures) if job.figures is not None else []
    if job.json:
        print(json.dumps(report.as_dict() | {"pictures": [str(path) for path in pictures]}))
        return 0
    show_report(report)
    for picture in pictures:
        print(f"picture  {picture}")
    return 0


def show_report(report: QualityReport) -> None:
    """The report as tables."""
    console = Console(width=None if Console().is_terminal else WIDTH, highlight=False)
    table = Table(title=f"captions, attributes of a {report.schema}")
    for name in (
        "file", "captions", "words", "mean", "unknown %", "honest %", "> 77 tokens %",
        "placeholders", "copied", "empty", "sentences", "distinct",
    ):  # fmt: skip
        table.add_column(name, justify="left" if name == "file" else "right")
    for section in (report.files, report.modalities, {"all": report.all}):
        for name, group in section.items():
            table.add_row(
                name,
                *(f"{number}" for number in (group.captions, group.words)),
                f"{group.mean_words:.2f}",
                *(f"{share:.2f}" for share in (group.unknown, group.unknown_honest)),
                f"{group.overflow:.2f}",
                *(f"{number}" for number in (group.placeholders, group.copied, group.empty)),
                *(f"{number}" for number in (group.sentences, group.distinct_sentences)),
            )
        table.add_section()
    console.print(table)
    console.print(f"mean words of the {len(report.files)} files: {report.mean_words_of_files:.2f}")
    console.print(_attributes(report))
    if report.samples:
        share = 100 * report.contradicting_samples / report.samples
        console.print(
            f"{report.contradicting_samples} of {report.samples} samples ({share:.1f} %) have "
            f"modalities that contradict each other in some attribute"
        )
    for kind, examples in report.examples.items():
        for example in examples:
            console.print(f"{kind:16}{example}", markup=False)


def _attributes(report: QualityReport) -> Table:
    table = Table(title="attributes: captions that give them, samples that contradict themselves")
    table.add_column("attribute")
    for name in report.modalities:
        table.add_column(f"{name} %", justify="right")
    table.add_column("compared samples", justify="right")
    table.add_column("contradicting %", justify="right")
    for name in report.all.coverage:
        compared = report.compared.get(name, 0)
        shares = [f"{group.coverage[name]:.1f}" for group in report.modalities.values()]
        wrong = f"{100 * report.contradictions.get(name, 0) / compared:.1f}" if compared else ""
        table.add_row(name.replace("_", " "), *shares, f"{compared or ''}", wrong)
    return table


if __name__ == "__main__":
    run_job(main, kept="every answer that came is kept in the ledger")
