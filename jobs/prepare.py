"""Turn a benchmark's raw folders into Parquet shards with a manifest, or look at such shards."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from next.benchmark.card import Benchmark, load_card
from next.cli import (
    USER_ERROR,
    ProgressLine,
    base_config,
    parse,
    run_job,
)
from next.data.holdout import split_train
from next.data.labels import Labels
from next.data.loading.plan import epoch_plan, plan_hash, worker_slice
from next.data.shards.audit import Audit, audit
from next.data.shards.manifest import SplitEntry
from next.data.shards.reader import Manifest, open_manifest
from next.data.shards.writer import Run
from next.data.source.ingest import ScanOptions, prepare, scan
from next.data.wording import count
from next.demo import demo_card, draw_demo
from next.evaluation.queries import HELD_OUT, TEST, measurable, queries_of_splits

LOOKS = ("check", "peek", "verify_order")
"""Flags that look at shards instead of writing them."""


@dataclass(frozen=True)
class PrepareJob:
    """Turn a benchmark's raw folders into Parquet shards with a manifest, or look at such shards.

    A call that was killed or failed is finished by calling it again; shards that it had finished
    are taken over. Folders are local or s3://bucket/prefix (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID and
    their like are heeded).
    """

    card: Path | None = None
    """Card of the benchmark, such as datasets/rgbnt201.toml."""
    source: str | None = None
    """Folder that the card's paths start from."""
    out: str | None = None
    """Folder to write. If it holds the same content, it is kept."""
    draw: Literal["demo", "large", "large-real-captions"] | None = None
    """Instead of --card and --source: the procedural benchmark, drawn into OUT-raw unless it is
    there. large: 400 test identities, for differences of half a point of mAP; large-real-captions:
    the same with captions that say as little as RGBNT201's."""
    draw_seed: int = 0
    """Seed of --draw: other people, cameras and shots."""
    options: Annotated[ScanOptions, tyro.conf.arg(name="")] = ScanOptions()  # noqa: RUF009 (frozen)
    """What to do where source and card do not agree."""
    workers: int = 0
    """Ray tasks that write shards at the same time, on the cluster of RAY_ADDRESS or on this
    machine; 0: this process writes them. The result is the same to the last byte. It pays where
    there are more cores than those of this machine, or many shards."""
    check: str | None = None
    """Instead: a folder of shards (without a value: --out), of which every byte and every image is
    verified."""
    peek: str | None = None
    """Instead: a folder of shards (without a value: --out), of which a contact sheet is drawn."""
    picture: Path | None = None
    """PNG of --peek; None: peek-NAME.png in this folder."""
    verify_order: str | None = None
    """Instead: a folder of shards (without a value: --out), of which the global batches are shown
    to be the same for every number of workers."""
    world: str = "1,2,4,8"
    """Numbers of workers of --verify-order."""
    epochs: Annotated[int, tyro.conf.arg(metavar="N")] = 3
    """Epochs of --verify-order, 1 or more."""
    recipe: Path | None = None
    """Settings of --check (selection.*) and --verify-order (seed, batch.*, selection.*) beside
    those of the card."""
    dry_run: bool = False
    """List, join and count, but decode and write nothing."""
    json: bool = False
    """Print the answer as one JSON object."""


def main(argv: Sequence[str]) -> int:
    """Parse, call, exit code."""
    job = parse(PrepareJob, _with_folder(argv))
    looks = [name for name in LOOKS if getattr(job, name) is not None]
    if looks:
        return _look(job, looks)
    if job.draw is not None:
        return _draw(job, job.draw)
    if job.card is None or job.source is None or (job.out is None and not job.dry_run):
        raise ValueError(
            "--card, --source and --out are needed (or --draw and --out, or --check, --peek or "
            "--verify-order with a folder of shards)"
        )
    benchmark = load_card(job.card)
    if job.dry_run or job.out is None:
        found = scan(benchmark, job.source, job.options)
        told, lines = _queries(found.labels(), benchmark.rule)
        summary = {
            "name": benchmark.name,
            "findings": found.findings.model_dump(mode="json"),
            "queries": told,
        }
        closing = [*lines, "nothing was decoded or written (--dry-run)"]
        _print(job, summary, found.counts(benchmark), closing)
        return 0
    return _prepare(job, benchmark, job.source, job.out)


def _prepare(job: PrepareJob, benchmark: Benchmark, source: str, out: str) -> int:
    with _runner(job.workers) as run, ProgressLine("prepare") as progress:
        manifest = prepare(benchmark, source, out, job.options, progress=progress, run=run)
    stored = {split: manifest.labels(split) for split in benchmark.stored()}
    told, lines = _queries(stored, benchmark.rule)
    summary = _summary(manifest) | {"queries": told}
    _print(job, summary, manifest.splits, [*_closing_lines(manifest), *lines])
    return 0


def _queries(labels: Mapping[str, Labels], rule: str) -> tuple[dict[str, Any], list[str]]:
    """What each split can measure under the card's rule, for machines and for people."""
    try:
        found = queries_of_splits(labels, rule)
    except ValueError as error:
        return {}, [f"WARNING   nothing can be measured: {error}"]
    lines = []
    for name, queries in found.items():
        lines.append(f"queries   {name}: {queries}")
        if not queries.queries:
            lines.append(
                f"WARNING   nothing can be measured on the {name}: no query has a match in the "
                f"gallery under the card's rule = {rule}; runs on these data are refused"
            )
    return {name: queries.as_json() for name, queries in found.items()}, lines


def _draw(job: PrepareJob, variant: str) -> int:
    if job.card is not None or job.source is not None:
        raise ValueError("--draw makes its own source: leave out --card and --source")
    if job.out is None or "://" in job.out:
        raise ValueError(f"--draw needs a local folder as --out, but got {job.out}")
    out = Path(job.out)
    raw = out.with_name(f"{out.name}-raw")
    if job.dry_run:
        answer = {
            "name": demo_card(variant).name,
            "raw": str(raw.absolute()),
            "seed": job.draw_seed,
        }
        answer |= {"drawn_before": raw.is_dir(), "out": str(out.absolute())}
        print(
            json.dumps(answer) if job.json else "\n".join(f"{k:14}{v}" for k, v in answer.items())
        )
        return 0
    draw_demo(raw, job.draw_seed, variant)
    return _prepare(job, demo_card(variant), str(raw), job.out)


def _with_folder(argv: Sequence[str]) -> list[str]:
    """A flag that looks at shards and has no value looks at those in ``--out``."""
    words = list(argv)
    for place, word in enumerate(words):
        if word.removeprefix("--").replace("-", "_") not in LOOKS:
            continue
        if place + 1 < len(words) and not words[place + 1].startswith("--"):
            continue
        if "--out" not in words[:-1]:
            raise ValueError(f"{word} needs a folder of shards, its own or that of --out")
        out = words.index("--out")
        words.insert(place + 1, words[out + 1])
        out = words.index("--out")
        del words[out : out + 2]
        break
    return words


@contextmanager
def _runner(workers: int) -> Iterator[Run | None]:
    """What writes the shards; Ray is started for it and ended."""
    if workers < 0:
        raise ValueError(f"--workers must be 0 or more, but got {workers}")
    if workers == 0:
        yield None
        return
    from next.data.shards.distribution import run_on_ray
    from next.training.distributed.cluster import connected

    with connected(workers):
        yield partial(run_on_ray, workers=workers)


def _look(job: PrepareJob, looks: Sequence[str]) -> int:
    if len(looks) > 1 or job.card or job.source or job.out:
        raise ValueError(
            "--check, --peek and --verify-order look at one folder of shards: give one of them, "
            "without --card, --source or --out"
        )
    manifest = open_manifest(getattr(job, looks[0]))
    look: Callable[[PrepareJob, Manifest], int] = {
        "check": _check,
        "peek": _peek,
        "verify_order": _verify_order,
    }[looks[0]]
    return look(job, manifest)


def _check(job: PrepareJob, manifest: Manifest) -> int:
    with ProgressLine("check") as progress:
        found = audit(manifest, progress)
    config = base_config(manifest.benchmark, job.recipe)
    told, missing = ({}, {}) if found.damaged else measurable(config, manifest)
    problems = [*found.problems, *([missing[TEST]] if TEST in missing else [])]
    summary = _summary(manifest) | {
        "problems": problems,
        "queries": {name: queries.as_json() for name, queries in told.items()},
        "unmeasurable": missing,
        "leaked_identities": found.leaked,
        "images_decoded": found.images,
        "images_unprepared": found.unprepared,
    }
    verdict = "NOT sound" if problems else "every byte and every image is as it should be"
    closing = [*_closing_lines(manifest), *_audit_lines(manifest, found)]
    # A run may do without held-out identities (selection.split = test); none does without a test.
    closing += [f"WARNING   {missing[HELD_OUT]}"] if HELD_OUT in missing else []
    for name, queries in told.items():
        closing.append(f"queries   {name}: {queries}")
        closing += [f"WARNING   {name}: {warning}"] if (warning := queries.warning()) else []
    _print(job, summary, manifest.splits, [*closing, f"checked   {verdict}"])
    for problem in problems:
        sys.stderr.write(f"error: {problem}\n")
    return USER_ERROR if problems else 0


def _audit_lines(manifest: Manifest, found: Audit) -> list[str]:
    """What was looked at and what of it is not as one would wish, one line each."""
    stored = {split: manifest.splits[split] for split in manifest.benchmark.stored()}
    trained = stored["train"].identities
    rows = [
        ("check", "of", "found"),
        ("shards whose sha256 differs", found.shards, found.damaged),
        ("images that do not decode", found.images, len(found.problems) - found.damaged),
        ("images of an older decoding", found.images, found.unprepared),
        ("train identities in gallery or query", trained, len(found.leaked)),
        *(
            (f"{split} identities with one sample", entry.identities, found.singletons[split])
            for split, entry in stored.items()
        ),
    ]
    lines = ["", *_columns([[str(cell) for cell in row] for row in rows]), ""]
    if found.unprepared:
        lines.append(
            f"WARNING   {count(found.unprepared, 'image')} turned by EXIF, of more than 8 bits or "
            f"transparent: an older version stored them as they were, and they decode as it did; "
            f"prepare the data again"
        )
    if found.leaked:
        lines.append(f"LEAK      in train and test: {', '.join(map(str, found.leaked))}")
    return lines


def _peek(job: PrepareJob, manifest: Manifest) -> int:
    from next.pictures.contact_sheet import draw_contact_sheet  # matplotlib is slow to import

    path = job.picture or Path(f"peek-{manifest.benchmark.name}.png")
    drawn = draw_contact_sheet(path, manifest).absolute()
    print(json.dumps({"picture": str(drawn)}) if job.json else f"picture   {drawn}")
    return 0


def _verify_order(job: PrepareJob, manifest: Manifest) -> int:
    try:
        worlds = [int(number) for number in job.world.split(",")]
    except ValueError:
        raise ValueError(f"--world must be numbers, such as 1,2,4,8, but got {job.world}") from None
    if job.epochs < 1:
        raise ValueError(f"--epochs must be 1 or more, but got {job.epochs}")
    config = base_config(manifest.benchmark, job.recipe)
    labels, size = manifest.labels("train"), config.batch
    pids = labels.pid[split_train(config, labels, manifest.benchmark.rule).train]
    epochs: list[dict[str, Any]] = []
    for epoch in range(job.epochs):
        plan = epoch_plan(pids, seed=config.seed, epoch=epoch, p=size.identities, k=size.instances)
        joined = {}
        for world in worlds:
            slices = [worker_slice(plan, rank, world) for rank in range(world)]
            joined[str(world)] = plan_hash(np.concatenate(slices, axis=1))
        hashes = {"plan_hash": plan_hash(plan), "joined": joined}
        epochs.append({"epoch": epoch, "steps": len(plan), "samples": plan.size} | hashes)
    equal = all(set(one["joined"].values()) == {one["plan_hash"]} for one in epochs)
    if job.json:
        summary = {"name": manifest.benchmark.name, "digest": manifest.digest, "seed": config.seed}
        print(json.dumps(summary | {"epochs": epochs, "equal": equal}))
        return 0 if equal else USER_ERROR
    rows = [["epoch", "steps", "samples", "plan", *(f"joined of {world}" for world in worlds)]]
    for one in epochs:
        numbers = [str(one[name]) for name in ("epoch", "steps", "samples")]
        rows.append([*numbers, one["plan_hash"][:12], *(v[:12] for v in one["joined"].values())])
    verdict = "the workers' slices, joined, are the same global batches" if equal else "DIFFERS"
    print("\n".join(_columns(rows)))
    print(f"digest    {manifest.digest}")
    print(
        f"plan      {epochs[0]['plan_hash']} (epoch 0, seed {config.seed}; next.plan_hash of a run)"
    )
    print(f"order     {verdict} for {', '.join(map(str, worlds))} workers")
    return 0 if equal else USER_ERROR


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
    rows = [[*head, "missing", "captions", "uncaptioned", "sentences"]]
    for name, entry in splits.items():
        if entry.same_as is not None:
            rows.append([name, f"= {entry.same_as}", *[""] * (len(rows[0]) - 2)])
            continue
        images = list(entry.images.values())
        missing = entry.rows * len(images) - sum(images)
        captions, sentences = sum(entry.captions.values()), sum(entry.sentences.values())
        counts = [entry.identities, entry.singletons, entry.rows, *images, missing]
        counts += [captions, sum(images) - captions, sentences]
        rows.append([name, *map(str, counts)])
    return _columns(rows)


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


if __name__ == "__main__":
    run_job(main, kept="the shards that were finished are kept beside --out")
