"""Inputs, provenance, scores and pictures of a run, as records beside its curves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from next.benchmark.card import Benchmark
from next.config import RunConfig, differences, override, to_toml
from next.data.holdout import split_train
from next.data.loading.plan import plan_hash, training_plan
from next.data.shards.reader import Manifest
from next.tracking.provenance import provenance_diff
from next.tracking.run import Run
from next.training.folder import MAY_CHANGE

if TYPE_CHECKING:  # a trial's process does without what draws and compares: a second, 56 MiB
    from next.training.results.assessment import Assessment


def record_inputs(run: Run, config: RunConfig, manifest: Manifest) -> None:
    """The whole configuration, the data by digest and schema, and what the commit lacks."""
    run.log_text(to_toml(config), "config.toml")
    record_data(run, manifest)
    diff = provenance_diff()
    if diff:
        keep = run.log_text if config.tracking.git_diff else run.keep_text
        keep(diff, "git/diff.txt")


def record_data(run: Run, manifest: Manifest) -> None:
    """The data as the run's input: name, digest, where they lie, schema, rows."""
    run.log_data(
        manifest.benchmark.name,
        manifest.digest,
        str(manifest.uri),
        "train",
        schema=data_schema(manifest),
        rows=manifest.splits[manifest.resolve("train")].rows,
    )


def record_assessment(run: Run, assessment: Assessment, *, step: int) -> None:
    """Scores, pictures (as files and for the image grid) and the table of queries."""
    if assessment.metrics:
        run.log_metrics(assessment.metrics, step=step)
    for picture in assessment.pictures:
        run.log_artifact(picture, "figures")
        run.log_image(picture, f"figures/{picture.stem}", step=0)
    run.log_table(assessment.queries, "queries.json")


_FROM_THE_DATA = (
    "model.modalities", "model.image_size", "model.identities", "model.cameras",
    "model.trained_cameras",
    "model.backbone.sha256", "model.backbone.text_sha256",
    "model.backbone.activation", "model.backbone.text_activation",
)  # fmt: skip
"""What ``resolve`` fills in, the same for all runs on these data and weights."""


def own_settings(config: RunConfig, benchmark: Benchmark) -> dict[str, Any]:
    """The settings in which a run differs from its card's recipe, and its seed.

    They are the run's columns in MLflow, under their own names; the whole is ``config.toml``.

    Args:
        config: resolved settings.
        benchmark: card of the data.
    """
    recipe = override(RunConfig(), benchmark.recipe)
    given = {
        "data.modalities": recipe.data.modalities or benchmark.modalities,
        "data.image_size": recipe.data.image_size or benchmark.image_size,
    }
    found = differences(config, override(recipe, given))
    return {"seed": config.seed} | {
        name: value
        for name, (value, _) in found.items()
        if not name.startswith((*MAY_CHANGE, *_FROM_THE_DATA))
    }


def data_schema(manifest: Manifest) -> dict[str, str]:
    """The columns of the shards, with the types that MLflow has for them."""
    modalities = manifest.benchmark.modalities
    return (
        {"sample_id": "string", "pid": "long", "camera": "long", "scene": "long"}
        | {f"image_{name}": "binary" for name in modalities}
        | {f"sentences_{name}": "string[]" for name in modalities}
    )


def data_tags(config: RunConfig, manifest: Manifest) -> dict[str, str]:
    """What the run learns from, and in which order: digest of the data, hash of the first plan."""
    labels = manifest.labels("train")
    pids, rows = labels.pid, split_train(config, labels, manifest.benchmark.rule).train
    shards = manifest.shard_of_row("train")[rows]
    first = training_plan(config, pids[rows], shards, epoch=0, world=config.scaling.max_workers)
    return {"next.data_digest": manifest.digest, "next.plan_hash": plan_hash(first)}


def seed_tags(config: RunConfig) -> dict[str, str]:
    """Every seed of a run."""
    return {
        "next.seed": str(config.seed),
        "next.seed.selection": str(config.selection.seed),
        "next.fold": str(config.selection.fold),
        "next.seed.backbone": str(config.model.backbone.seed),
    }
