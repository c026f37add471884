"""Caption images by attribute confidence (run), or measure captions (quality).

Examples::

    python jobs/caption.py run --card datasets/demo.toml --source DIR --models MODELS --out OUT
    python jobs/caption.py quality ../captions/RGBNT201
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from next.captioning.attributes import SCHEMAS, load_schema
from next.captioning.figures import draw_report
from next.captioning.quality import QualityReport, guess_schema, measure, read_caption_files
from next.cli import USER_ERROR, parse, run_job
from next.config import near_matches

WIDTH = 160
"""Columns of a table that goes to a file or a pipe."""


@dataclass(frozen=True)
class QualityJob:
    """Measure caption files: lengths, unknown rate, dirt, contradictions, coverage."""

    files: tyro.conf.Positional[tuple[Path, ...]]
    """Caption files SPLIT_MODALITY.json, or folders of them."""
    schema: str | None = None
    """Schema whose attributes are looked for: person, vehicle or a TOML file; None: the one of
    the package that fits the captions best."""
    figures: Path | None = None
    """Folder for pictures (PNG); None: none are drawn."""
    json: bool = False
    """Print the report as one JSON object."""


def main(argv: Sequence[str]) -> int:
    """Find the subcommand and call it."""
    commands: dict[str, Callable[[Sequence[str]], int]] = {"quality": quality}
    name = argv[0] if argv else "--help"
    if name in commands:
        return commands[name](argv[1:])
    print(__doc__)
    print(f"Commands: {', '.join(commands)}; each takes --help.")
    if name in ("--help", "-h"):
        return 0
    close = near_matches(name, list(commands)) or list(commands)
    print(f"\nerror: there is no command {name!r}; did you mean {' or '.join(close)}?")
    return USER_ERROR


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
    report = measure(files, schema)
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
    run_job(main)
