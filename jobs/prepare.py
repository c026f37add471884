"""Turn a benchmark's raw folders into Parquet shards with a manifest, or check such shards."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from next.cli import USER_ERROR, ProgressLine, parse, run_job
from next.data.benchmark import load_card
from next.data.ingest import ScanOptions, check, prepare, scan
from next.data.manifest import SplitEntry
from next.data.shards import Manifest, open_manifest


@dataclass(frozen=True)
class PrepareJob:
    """Turn a benchmark's raw folders into Parquet shards with a manifest, or check such shards."""

    card: Path | None = None
    """Card of the benchmark, such as datasets/rgbnt201.toml."""
    source: str | None = None
    """Folder that the card's paths start from."""
    out: str | None = None
    """Folder to write; it appears whole, at the end. If it holds the same content, it is kept."""
    options: Annotated[ScanOptions, tyro.conf.arg(name="")] = ScanOptions()  # noqa: RUF009 (frozen)
    """What to do where source and card do not agree."""
    check: str | None = None
    """Instead: a folder of shards, of which every byte and every image is verified."""
    dry_run: bool = False
    """List, join and count, but decode and write nothing."""
    json: bool = False
    """Print the answer as one JSON object."""


def main(argv: Sequence[str]) -> int:
    """Parse, call, exit code."""
    job = parse(PrepareJob, argv)
    if job.check is not None:
        return _check(job)
    if job.card is None or job.source is None or (job.out is None and not job.dry_run):
        raise ValueError("--card, --source and --out are needed (or --check with a folder)")
    benchmark = load_card(job.card)
    if job.dry_run or job.out is None:
        found = scan(benchmark, job.source, job.options)
        summary = {"name": benchmark.name, "findings": found.findings.model_dump(mode="json")}
        _print(
            job, summary, found.counts(benchmark), ["nothing was decoded or written (--dry-run)"]
        )
        return 0
    with ProgressLine("prepare") as progress:
        manifest = prepare(benchmark, job.source, job.out, job.options, progress=progress)
    _print(job, _summary(manifest), manifest.splits, _closing_lines(manifest))
    return 0


def _check(job: PrepareJob) -> int:
    if job.card or job.source or job.out:
        raise ValueError("--check takes no --card, --source or --out")
    manifest = open_manifest(str(job.check))
    problems = list(check(manifest))
    summary = _summary(manifest) | {"problems": problems}
    verdict = "every byte and every image is as it should be" if not problems else "NOT as written"
    _print(job, summary, manifest.splits, [*_closing_lines(manifest), f"checked   {verdict}"])
    for problem in problems:
        sys.stderr.write(f"error: {problem}\n")
    return USER_ERROR if problems else 0


def _print(
    job: PrepareJob,
    summary: Mapping[str, Any],
    splits: Mapping[str, SplitEntry],
    closing: Sequence[str],
) -> None:
    if job.json:
        entries = {
            name: entry.model_dump(mode="json", exclude={"shards"})
            for name, entry in splits.items()
        }
        print(json.dumps({**summary, "splits": entries}, ensure_ascii=False))
        return
    print("\n".join([*table(splits), *closing]))


def _summary(manifest: Manifest) -> dict[str, Any]:
    return {
        "name": manifest.benchmark.name,
        "uri": manifest.uri,
        "digest": manifest.digest,
        "findings": manifest.file.findings.model_dump(mode="json"),
    }


def _closing_lines(manifest: Manifest) -> list[str]:
    findings = manifest.file.findings
    lines = [f"benchmark {manifest.benchmark.name}", f"shards    {manifest.uri}"]
    if findings.skipped:
        lines.append(f"left out  {len(findings.skipped)} files, which manifest.json lists")
    if findings.leaked_identities:
        ids = ", ".join(map(str, findings.leaked_identities))
        done = "dropped from train" if findings.leaked_dropped else "kept"
        lines.append(f"LEAK      identities in train and test, {done}: {ids}")
    return [*lines, f"digest    {manifest.digest}"]


def table(splits: Mapping[str, SplitEntry]) -> list[str]:
    """Counts of the splits, one line each; what is missing is images that samples lack."""
    modalities = list(next(iter(splits.values())).images)
    head = ["split", "identities", "of 1 sample", "samples", *modalities]
    rows = [[*head, "missing", "captions", "sentences"]]
    for name, entry in splits.items():
        if entry.same_as is not None:
            rows.append([name, f"= {entry.same_as}", *[""] * (len(rows[0]) - 2)])
            continue
        images = list(entry.images.values())
        missing = entry.rows * len(images) - sum(images)
        captions, sentences = sum(entry.captions.values()), sum(entry.sentences.values())
        counts = [entry.identities, entry.singletons, entry.rows, *images]
        rows.append([name, *map(str, [*counts, missing, captions, sentences])])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


if __name__ == "__main__":
    run_job(main)
