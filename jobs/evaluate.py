"""Embed, rank and draw with a checkpoint or a registered model, on the test or held-out split."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from next.cli import parse, run_job
from next.config import override
from next.data.shards.reader import open_manifest
from next.tracking.registry.versions import fetch_model, registry_server

if TYPE_CHECKING:
    from next.config import RunConfig
    from next.data.shards.reader import Manifest
    from next.evaluation.missing import MissingMatrix
    from next.training.results.assessment import Assessment

REFERENCES = {
    "RGBNT201": {
        "r": 63.3, "n": 72.6, "t": 56.2, "rn": 45.6, "rt": 26.3, "nt": 40.3, "mean": 50.7,
    }
}  # fmt: skip
"""Published mAP of DeMo (AAAI 2025) by what is missing, for the benchmarks that have any."""


@dataclass(frozen=True)
class EvaluateJob:
    """Assess a checkpoint or a registered model: scores by the card's rule, and the pictures."""

    data: str
    """Folder of shards that jobs/prepare.py wrote."""
    checkpoint: Path | None = None
    """Folder of a checkpoint, such as runs/NAME/checkpoints/best."""
    model: str | None = None
    """Registered model instead of a checkpoint: models:/NAME/VERSION or models:/NAME@champion."""
    tracking_uri: Annotated[str | None, tyro.conf.arg(name="tracking.uri")] = None
    """MLflow server that has the model; without it, the local one of --storage_path."""
    storage_path: Path = Path("runs")
    """Folder of all runs, whose local server is asked for the model."""
    split: Literal["test", "val"] = "test"
    """test: query and gallery of the card; val: the train identities held out by the run."""
    out: Path | None = None
    """Folder for pictures; beside the checkpoint where it is left out."""
    cache: str | None = None
    """Folder of decoded caches; the run's own where it is left out."""
    workers: int | None = None
    """Deal the samples among so many workers of Ray, on this machine or on the cluster that
    RAY_ADDRESS names, with what the run's scaling settings give to each; None: one on a cluster;
    without one, this process does it all, which needs no Ray."""
    use_gpu: bool | None = None
    """Whether it computes on GPUs, with --workers one each; None: as the run did."""
    threads: int | None = None
    """Torch threads; None: as torch chooses."""
    missing: bool = False
    """Instead: the scores with every set of modalities missing at test, in both query and gallery,
    and of queries with any set against a gallery with any other, drawn as one matrix."""
    features: Literal["plain", "centred", "whitened"] = "plain"
    """plain: as the network gives them; centred: less their mean; whitened: by their principal
    components. Both are fitted on the train split of the data, never on what is searched."""
    whole_features: bool = False
    """Compare samples that have other modalities than one another over the whole feature, as the
    literature does, and not over the slices that both have."""
    dry_run: bool = False
    """Check that checkpoint and data are whole, and compute nothing."""
    json: bool = False
    """Print the answer as one JSON object."""


def main(argv: Sequence[str]) -> int:
    """Parse, call, exit code."""
    job = parse(EvaluateJob, argv)
    if (job.checkpoint is None) == (job.model is None):
        raise ValueError("give one of --checkpoint and --model, what is to be assessed")
    with tempfile.TemporaryDirectory(prefix="next-model-") as parent:
        return _assess(job, job.checkpoint or _fetch(job, Path(parent)))


def _fetch(job: EvaluateJob, parent: Path) -> Path:
    """The checkpoint of a registered model; nothing that comes with it is executed."""
    from next.training.embedder import LOADER

    with registry_server(job.tracking_uri, job.storage_path) as uri:
        return fetch_model(uri, str(job.model), parent, loader=LOADER) / "checkpoint"


def _assess(job: EvaluateJob, checkpoint: Path) -> int:
    manifest = open_manifest(job.data)
    # After the command line and the data, because it takes five seconds.
    from next.training.checkpointing.checkpoint import read_config, read_progress
    from next.training.results.assessment import draw_missing

    progress = read_progress(checkpoint)
    config = read_config(checkpoint)
    settings: dict[str, Any] = {"evaluation.common_slices": not job.whole_features}
    if job.cache:
        settings["data.cache"] = job.cache
    config = override(config, settings | _scaling(job) | {"threads": job.threads})
    if job.dry_run:
        answer = {"epoch": progress.epoch, "step": progress.step, "data_digest": manifest.digest}
        shown = f"checkpoint after epoch {progress.epoch}; data {manifest.digest}"
        print(json.dumps(answer) if job.json else shown)
        return 0
    place = checkpoint.parent if job.checkpoint else job.storage_path
    out = job.out or place / f"assessment-{job.split}"
    how: dict[str, Any] = {"split": job.split, "settings": settings, "features": job.features}
    if job.missing:
        matrix = _missing(job, config, checkpoint, manifest, **how)
        picture = draw_missing(out, matrix, job.split)
        known = REFERENCES.get(manifest.benchmark.name, {}) if job.split == "test" else {}
        print(json.dumps(as_json(matrix)) if job.json else "\n".join(table(matrix, known)))
        if not job.json:
            print(f"picture  {picture}")
        return 0
    found = _scores(job, config, checkpoint, manifest, out, **how)
    benchmark = manifest.benchmark
    if job.json:
        answer = {
            "metrics": found.metrics,
            "published": benchmark.anchors_json(),
            "pictures": [str(picture) for picture in found.pictures],
        }
        print(json.dumps(answer))
        return 0
    print("  ".join(f"{name} {value:.1f}" for name, value in found.metrics.items()))
    for line in benchmark.published() if job.split == "test" else ():
        print(line)
    for picture in found.pictures:
        print(f"picture  {picture}")
    return 0


def _scaling(job: EvaluateJob) -> dict[str, Any]:
    if job.workers is not None and job.workers < 1:
        raise ValueError(f"--workers must be 1 or more, but got {job.workers}")
    found: dict[str, Any] = {"scaling.num_workers": job.workers or 1}
    return found if job.use_gpu is None else found | {"scaling.use_gpu": job.use_gpu}


def _scores(
    job: EvaluateJob, config: RunConfig, checkpoint: Path, manifest: Manifest, out: Path, **how: Any
) -> Assessment:
    if _in_this_process(job, config):
        from next.training.results.assessment import assess
        from next.training.step.process import device

        return assess(checkpoint, manifest, out, device=device(config), **how)
    from next.training.distributed.assessment_workers import assess_on_workers

    return assess_on_workers(config, checkpoint, manifest, out, **how)


def _missing(
    job: EvaluateJob, config: RunConfig, checkpoint: Path, manifest: Manifest, **how: Any
) -> MissingMatrix:
    if _in_this_process(job, config):
        from next.training.results.assessment import assess_missing
        from next.training.step.process import device

        return assess_missing(checkpoint, manifest, device=device(config), **how)
    from next.training.distributed.assessment_workers import missing_on_workers

    return missing_on_workers(config, checkpoint, manifest, **how)


def _in_this_process(job: EvaluateJob, config: RunConfig) -> bool:
    """Whether no worker of Ray is asked for; then torch is made ready here."""
    from next.local_ray import on_cluster
    from next.training.step.process import configure_torch

    here = job.workers is None and not on_cluster()
    if here:
        configure_torch(config)
    return here


def table(matrix: MissingMatrix, references: Mapping[str, float]) -> list[str]:
    """The cases of the usual protocol with their mean, then mAP of every pair of sets."""
    published = f"  {'DeMo mAP':>8}" if references else ""
    lines = [f"{'missing':<12}{'mAP':>6}{'R-1':>7}{'R-5':>7}{'R-10':>7}{'queries':>9}{published}"]

    def line(name: str, scores: Mapping[str, float], queries: str) -> str:
        figures = "".join(f"{scores[key]:>7.1f}" for key in ("rank1", "rank5", "rank10"))
        known = f"  {references[name]:>8.1f}" if name in references else ""
        return f"{name:<12}{scores['mAP']:>6.1f}{figures}{queries:>9}{known}"

    for name, case in {"-": matrix.full, **matrix.protocol}.items():
        lines.append(line(name, case.metrics.as_dict(), str(case.metrics.num_valid_queries)))
    lines.append(line("mean", matrix.mean(), ""))
    left_out = max(case.left_out for row in matrix.cases for case in row)
    if left_out:
        lines.append(f"up to {left_out} samples have none of a case's modalities and take no part")
    names = ["+".join(subset) for subset in matrix.subsets]
    width = max(map(len, names)) + 2
    lines += ["", "mAP of queries with (down) against a gallery with (across)"]
    lines.append(" " * width + "".join(f"{name:>{width}}" for name in names))
    for name, row in zip(names, matrix.mAP.tolist(), strict=True):
        lines.append(f"{name:<{width}}" + "".join(f"{value:>{width}.1f}" for value in row))
    return lines


def as_json(matrix: MissingMatrix) -> dict[str, Any]:
    """Everything that :func:`table` prints, and all scores of the pairs."""
    return {
        "modalities": matrix.modalities,
        "full": matrix.full.metrics.as_dict(),
        "missing": {name: case.metrics.as_dict() for name, case in matrix.protocol.items()},
        "mean": matrix.mean(),
        "any_to_any": [
            {
                "query": case.query,
                "gallery": case.gallery,
                "left_out": case.left_out,
                **case.metrics.as_dict(),
            }
            for row in matrix.cases
            for case in row
        ],
    }


if __name__ == "__main__":
    run_job(main, kept="the pictures that were drawn are kept")
