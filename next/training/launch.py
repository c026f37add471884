"""From a configuration to a finished run: in this process, or on the workers of Ray Train."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from next.benchmark.card import Benchmark
from next.config import RunConfig
from next.data.shards.reader import Manifest, open_manifest
from next.evaluation.queries import measurable, measuring
from next.local_ray import on_cluster
from next.storage import require_own_disk, write_whole
from next.tracking.provenance import provenance_tags
from next.tracking.run import check_server, open_run, read_metrics, start_server, view_command
from next.training.checkpointing.checkpoint import read_config, read_progress, require_data
from next.training.checkpointing.interruption import Requests, stop_on_signals
from next.training.checkpointing.store import CheckpointStore, store_address
from next.training.distributed.cluster import check_cluster, connected, start_ray
from next.training.distributed.placement import assess_in_place
from next.training.folder import (
    Claim,
    as_begun,
    changes,
    check_claim,
    going_on,
    holding,
    own_folder,
    run_folder,
)
from next.training.inputs import resolve, training_data
from next.training.loop import Outcome, Worker, train
from next.training.results.assessment import Assessment, PortableAssessment, with_curves
from next.training.results.mlflow_record import (
    data_tags,
    own_settings,
    record_assessment,
    record_inputs,
    seed_tags,
)
from next.training.results.registration import register_best, write_card
from next.training.results.report import FolderReporter
from next.training.step.process import configure_torch, device
from next.training.weights import keep_weights

__all__ = [
    "RunResult",
    "configure_torch",
    "device",
    "launch",
    "read_history",
    "run_tags",
    "start_ray",
    "tracking_address",
    "write_result",
]

_log = logging.getLogger(__name__)


class RunResult(NamedTuple):
    """A finished run."""

    folder: Path
    outcome: Outcome
    checkpoint: Path
    """The best checkpoint by the selection metric."""
    assessment: Assessment
    """Test scores of that checkpoint, and the pictures."""
    url: str | None
    """The run's page in MLflow, while its server runs."""
    serve: str | None
    """Shell command that serves that address again; None where a server of its own does."""
    benchmark: Benchmark
    """The card, with what others have published."""


def launch(config: RunConfig) -> RunResult:
    """Train a run to its end, assess its best checkpoint on the test split, log everything.

    A run of the same name continues from its last checkpoint.

    Raises:
        ValueError: settings, data or an earlier run of this name do not fit, or another process is
            at work on it; raised before any worker starts.
        Stopped: by SIGTERM or Ctrl-C; says what is kept and how to go on.
        LostRayError: Ray's processes on this machine were ended; as ``Stopped``.
    """
    if config.data.uri is None:
        raise ValueError("data.uri is not set; give the folder that jobs/prepare.py wrote")
    manifest = open_manifest(config.data.uri)
    config = resolve(settings_begun_with(config), manifest)
    if on_cluster():
        check_cluster(config)
    elif config.scaling.num_workers == 1:
        device(config)
    folder = own_folder(config)
    home = store_address(config, folder.name)
    with holding(folder, home), going_on(config, folder):
        return _launch(manifest, check_claim(config, folder, digest=manifest.digest), home)


def _launch(manifest: Manifest, claim: Claim, home: str | None) -> RunResult:
    config, folder = claim.config, claim.folder
    configure_torch(config)
    store = _store(config, folder)
    for line in measuring(measurable(config, manifest).told):
        _log.info("%s", line)
    outcome, assessed = None, None
    if not config.run.fresh:
        outcome = _finished(store, config, manifest.digest)
    with connected() if on_cluster() else nullcontext(), tracking_address(config) as uri:
        claim.take()  # what could refuse the command has been asked
        if config.run.fresh:
            store.set_aside(time.strftime("%Y%m%d-%H%M%S"))
        tracked: dict[str, Any] = {
            "uri": uri,
            "experiment": config.tracking.experiment or manifest.benchmark.name,
            "name": folder.name,
            "folder": str(folder),
            "params": own_settings(config, manifest.benchmark),
            "tags": run_tags(config, manifest),
            "system_seconds": config.tracking.system_seconds,
            "store": home,
        }
        if outcome is None and config.scaling.num_workers == 1 and not on_cluster():
            outcome = _train_here(config, manifest, store.uri, tracked)
        elif outcome is None:
            outcome, assessed = _train_on_ray(config, manifest, folder, store.uri, tracked)
        checkpoint = store.best()
        if home is not None:  # who registers a run looks in its own folder
            checkpoint = CheckpointStore(folder / "checkpoints").adopt(checkpoint)
        with open_run(**tracked) as run:
            history = read_history(folder)
            if assessed is None:
                assessment = assess_in_place(
                    config, checkpoint, store.uri, manifest, folder, history=history
                )
            else:
                assessment = with_curves(assessed.put(folder), folder, history, checkpoint)
            record_assessment(run, assessment, step=outcome.step)
            run.set_tags({"next.checkpoint_uri": str(checkpoint)})
            selected: dict[str, float] = {config.selection.metric: outcome.best}
            write_result(folder, outcome, assessment, manifest.benchmark, selected)
            write_card(folder, config, manifest, assessment, selected)
            url = run.url
        register_best(folder, config, uri)
    serve = None if config.tracking.uri else view_command(folder.parent / "mlflow")
    return RunResult(folder, outcome, checkpoint, assessment, url, serve, manifest.benchmark)


@contextmanager
def tracking_address(config: RunConfig) -> Iterator[str | None]:
    """MLflow's address while the block runs: the one set, or a local server; None: no tracking.

    Raises:
        ValueError: ``tracking.uri`` is no http(s) address, or the local server's database would be
            on a network file system.
        ConnectionError: nobody answers there.
        PermissionError: the server wants other credentials.
    """
    check_tracking(config)
    if not config.tracking.enabled:
        yield None
    elif config.tracking.uri is not None:
        yield config.tracking.uri
    else:
        folder = Path(config.run.storage_path).absolute() / "mlflow"
        with start_server(folder, wait=False) as server:
            yield server.uri


def check_tracking(config: RunConfig) -> None:
    """Raise where :func:`tracking_address` would, and write nothing."""
    if not config.tracking.enabled:
        return
    if config.tracking.uri is not None:
        check_server(config.tracking.uri)
        return
    folder = Path(config.run.storage_path).absolute() / "mlflow"
    require_own_disk(folder, "run.storage_path", "MLflow's database")


def read_history(folder: Path) -> list[tuple[int, dict[str, float]]]:
    """Step and metrics of all that a run logged."""
    return [(row["step"], row["values"]) for row in read_metrics(folder)]


def run_tags(config: RunConfig, manifest: Manifest) -> dict[str, str]:
    """What is needed to reproduce a run beside its configuration."""
    return provenance_tags() | data_tags(config, manifest) | seed_tags(config)


def write_result(
    folder: Path,
    outcome: Outcome,
    assessment: Assessment,
    benchmark: Benchmark,
    selected: dict[str, float],
) -> None:
    """``result.json``: the scores, for scripts; with the losses of all sessions of the run.

    Args:
        folder: of the run.
        outcome: of its training.
        assessment: of its best checkpoint.
        benchmark: of its data.
        selected: ``selection.metric`` and its value at the best epoch.
    """
    found = {
        "selection": selected,
        "test": assessment.metrics,
        "steps": outcome.step,
        "losses": _losses(folder, outcome),
        "published": benchmark.anchors_json(),
    }
    write_whole(folder / "result.json", json.dumps(found, indent=2))


def _losses(folder: Path, outcome: Outcome) -> list[float]:
    """The loss of each step: what this session had, before it what the journal has of others.

    A step that two sessions took (the first one died after it) counts once, as the second had it.
    """
    begun = outcome.step - len(outcome.losses)
    before = {
        step: values["train/loss"]
        for step, values in read_history(folder)
        if "train/loss" in values and step <= begun
    }
    return [loss for _, loss in sorted(before.items())] + outcome.losses


def _store(config: RunConfig, folder: Path) -> CheckpointStore:
    return CheckpointStore(store_address(config, folder.name) or folder / "checkpoints")


def settings_begun_with(config: RunConfig) -> RunConfig:
    """What an older version began goes on as it did; before the settings are resolved.

    A rehearsal of such a run asks for them too, so that it plans what the run does.
    """
    folder = run_folder(config)
    if folder is None:
        return config
    record = folder / "config.toml"
    if not record.is_file():  # checkpoints may outlive the run's folder
        store = _store(config, folder)  # what it fetched goes with it
        checkpoint = store.latest()
        record = checkpoint / "config.toml" if checkpoint is not None else record
    return as_begun(config, record)


def _finished(store: CheckpointStore, config: RunConfig, digest: str) -> Outcome | None:
    """What a run of this folder came to; None if it has still to train.

    Raises:
        ValueError: its checkpoint is of other data or another model, or all of them are torn.
    """
    checkpoint = store.latest()
    if checkpoint is None:
        return None
    progress, trained = read_progress(checkpoint), read_config(checkpoint)
    require_data(progress, digest)
    changed = changes(trained, config)
    if changed:
        raise ValueError(
            f"the checkpoints in {store.uri} are of another model or other settings; use those, "
            f"another run.name, or run.fresh. Changed:\n  {changed}"
        )
    if progress.epoch < config.optim.epochs:
        return None
    if progress.best is None:
        raise ValueError(
            f"{checkpoint} is of the run's last epoch and holds no score; set run.fresh to train "
            f"it again"
        )
    _log.info(
        "run %s is finished (epoch %d, step %d): it is assessed again, and not trained; choose "
        "another run.name, or set run.fresh to train it again",
        *(config.run.name, progress.epoch, progress.step),
    )
    return Outcome([], progress.metrics, progress.best, progress.step)


def _train_here(
    config: RunConfig,
    manifest: Manifest,
    checkpoints: str,
    tracked: dict[str, Any],
) -> Outcome:
    requests = Requests()
    with (
        open_run(**tracked) as run,
        stop_on_signals(requests),
        FolderReporter(
            checkpoints, checkpoint=config.checkpoint, requests=requests, publish=run.publish
        ) as reporter,
    ):
        record_inputs(run, config, manifest)
        return train(
            config,
            training_data(config, manifest),
            reporter,
            Worker(device=device(config)),
            lambda metrics, step: run.log_metrics(metrics, step=step),
        )


def _train_on_ray(
    config: RunConfig,
    manifest: Manifest,
    folder: Path,
    checkpoints: str,
    tracked: dict[str, Any],
) -> tuple[Outcome, PortableAssessment | None]:
    from next.training.distributed.workers import train_on_workers

    with open_run(**tracked) as run:
        record_inputs(run, config, manifest)
    try:
        if on_cluster():
            keep_weights(config)
        return train_on_workers(config, manifest, folder, checkpoints, tracked, assessed=True)
    except BaseException:
        with open_run(**tracked):  # which takes down how it ended
            raise
