"""From a configuration to a finished run: in this process, or on the workers of Ray Train."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from next.config import RunConfig, differences, from_toml, to_toml
from next.data.plan import plan_hash, split_train, training_plan
from next.data.shards import Manifest, open_manifest
from next.tracking.provenance import provenance_tags
from next.tracking.run import check_server, open_run, read_metrics, start_server, view_command
from next.training.assessment import Assessment, assess
from next.training.inputs import resolve, training_data
from next.training.interruption import Bell, listening
from next.training.loop import Outcome, Worker, train
from next.training.record import record_assessment, record_inputs, seed_tags
from next.training.registration import register_best, write_card
from next.training.report import FolderReporter, Metrics, TrainReporter
from next.training.store import CheckpointStore

_log = logging.getLogger(__name__)

_MAY_CHANGE = (
    "run.", "tracking.", "scaling.", "checkpoint.", "threads", "data.cache", "data.uri",
    "model.backbone.file", "model.backbone.text_file",
)  # fmt: skip
"""Settings that a resumed run may change: they decide where and how, not what is computed."""


_RAY_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",  # else a report costs up to two seconds
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_FUNCTION_THREAD_TIMEOUT_S": "30",  # a pruned trial may finish sending its metrics
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "MALLOC_ARENA_MAX": "1",  # each trial trains in a new thread; glibc keeps a heap for each
}


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


def launch(config: RunConfig, *, on_report: Callable[[Metrics], None] | None = None) -> RunResult:
    """Train a run to its end, assess its best checkpoint on the test split, log everything.

    A run of the same name continues from its last checkpoint.

    Raises:
        ValueError: settings, data or an earlier run of this name do not fit; raised before any
            worker starts.
    """
    if config.data.uri is None:
        raise ValueError("data.uri is not set; give the folder that jobs/prepare.py wrote")
    manifest = open_manifest(config.data.uri)
    config = resolve(config, manifest)
    folder = claim_folder(config)
    configure_torch(config)
    with tracking_address(config) as uri:
        tracked: dict[str, Any] = {
            "uri": uri,
            "experiment": config.tracking.experiment or manifest.benchmark.name,
            "name": folder.name,
            "folder": str(folder),
            "params": headline(config),
            "tags": run_tags(config, manifest),
            "system_seconds": config.tracking.system_seconds,
        }
        if config.scaling.num_workers == 1:
            outcome, checkpoint = _train_here(config, manifest, folder, tracked, on_report)
        else:
            outcome, checkpoint = _train_on_ray(config, manifest, folder, tracked, on_report)
        with open_run(**tracked) as run:
            assessment = assess(
                checkpoint, manifest, folder, device=device(config), history=read_history(folder)
            )
            record_assessment(run, assessment, step=outcome.step)
            run.set_tags({"next.checkpoint_uri": str(checkpoint)})
            write_result(folder, outcome, assessment)
            write_card(folder, config, manifest, assessment, outcome.best)
            url = run.url
        register_best(folder, config, uri)
    serve = None if config.tracking.uri else view_command(folder.parent / "mlflow")
    return RunResult(folder, outcome, checkpoint, assessment, url, serve)


def claim_folder(config: RunConfig, *, prefix: str = "run") -> Path:
    """The run's folder, new or continued; ``run.fresh`` sets an old one aside.

    Raises:
        ValueError: a run of this name was trained with other settings; all of them are listed.
    """
    name = config.run.name or time.strftime(f"{prefix}-%Y%m%d-%H%M%S")
    folder = (Path(config.run.storage_path) / name).absolute()
    record = folder / "config.toml"
    if record.exists() and config.run.fresh:
        aside = folder.with_name(f"{name}.{time.strftime('%Y%m%d-%H%M%S')}")
        folder.rename(aside)
        _log.info("set the earlier run aside: %s", aside)
    elif record.exists():
        changed = {
            setting: values
            for setting, values in differences(from_toml(record.read_text()), config).items()
            if not setting.startswith(_MAY_CHANGE)
        }
        if changed:
            listed = "\n  ".join(
                f"{key}: {old!r} -> {new!r}" for key, (old, new) in changed.items()
            )
            raise ValueError(
                f"run {name!r} in {folder.parent} was started with other settings; resume it with "
                f"the same ones, choose another run.name, or set run.fresh. Changed:\n  {listed}"
            )
        _log.info("continuing run %s", folder)
    folder.mkdir(parents=True, exist_ok=True)
    record.write_text(to_toml(config))
    return folder


@contextmanager
def tracking_address(config: RunConfig) -> Iterator[str | None]:
    """MLflow's address while the block runs: the one set, or a local server; None: no tracking.

    Raises:
        ValueError: ``tracking.uri`` is no http(s) address.
        ConnectionError: nobody answers there.
        PermissionError: the server wants other credentials.
    """
    if not config.tracking.enabled:
        yield None
    elif config.tracking.uri is not None:
        check_server(config.tracking.uri)
        yield config.tracking.uri
    else:
        folder = Path(config.run.storage_path).absolute() / "mlflow"
        with start_server(folder, wait=False) as server:
            yield server.uri


def read_history(folder: Path) -> list[tuple[int, dict[str, float]]]:
    """Step and metrics of all that a run logged."""
    return [(row["step"], row["values"]) for row in read_metrics(folder)]


def run_tags(config: RunConfig, manifest: Manifest) -> dict[str, str]:
    """What is needed to reproduce a run beside its configuration."""
    pids = manifest.labels("train").pid
    rows, _ = split_train(config, pids)
    shards = manifest.shard_of_row("train")[rows]
    first = training_plan(config, pids[rows], shards, epoch=0, world=config.scaling.num_workers)
    return provenance_tags() | {
        "next.data_digest": manifest.digest,
        "next.plan_hash": plan_hash(first),
        **seed_tags(config),
    }


def headline(config: RunConfig) -> dict[str, Any]:
    """The few settings that make a single run's row readable; the rest is in config.toml."""
    return {
        "seed": config.seed,
        "optim.lr": config.optim.lr,
        "optim.epochs": config.optim.epochs,
        "batch.size": config.batch.size,
        "model.backbone.name": config.model.backbone.name,
        "model.semantic.experts": config.model.semantic.experts,
        "model.structure.experts": config.model.structure.experts,
        "model.routing.temperature": config.model.routing.temperature,
        "captions.sampling": config.captions.sampling,
    }


def device(config: RunConfig) -> torch.device:
    """Where this process computes.

    Raises:
        ValueError: a GPU is asked for and there is none.
    """
    if not config.scaling.use_gpu:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError("scaling.use_gpu is set, but torch sees no GPU here; leave it off")
    return torch.device("cuda")


def configure_torch(config: RunConfig) -> None:
    """Threads of this process, and kernels that give the same bits again."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    torch.backends.cudnn.benchmark = False


def write_result(folder: Path, outcome: Outcome, assessment: Assessment) -> None:
    """``result.json``: the scores, for scripts."""
    draft = folder / ".result.json"
    draft.write_text(
        json.dumps(
            {
                "selection": {"val/mAP": outcome.best},
                "test": assessment.metrics,
                "steps": outcome.step,
                "losses": outcome.losses,
            },
            indent=2,
        )
    )
    os.replace(draft, folder / "result.json")


def _train_here(
    config: RunConfig,
    manifest: Manifest,
    folder: Path,
    tracked: dict[str, Any],
    on_report: Callable[[Metrics], None] | None,
) -> tuple[Outcome, Path]:
    bell = Bell()
    with (
        open_run(**tracked) as run,
        listening(bell),
        FolderReporter(
            folder / "checkpoints", on_report, checkpoint=config.checkpoint, bell=bell
        ) as reporter,
    ):
        record_inputs(run, config, manifest)
        outcome = train(
            config,
            training_data(config, manifest),
            reporter,
            Worker(device=device(config)),
            lambda metrics, step: run.log_metrics(metrics, step=step),
        )
    return outcome, reporter.best()


def _train_on_ray(
    config: RunConfig,
    manifest: Manifest,
    folder: Path,
    tracked: dict[str, Any],
    on_report: Callable[[Metrics], None] | None,
) -> tuple[Outcome, Path]:
    import ray
    import ray.train
    from ray.train.torch import TorchTrainer

    training_data(config, manifest)  # the node's cache and text bank, before workers ask for them
    started = not ray.is_initialized()
    if started:
        start_ray(config.scaling.num_workers * config.scaling.cpus_per_worker, dashboard=True)
    try:
        result = TorchTrainer(
            _ray_worker,
            train_loop_config={
                "config": to_toml(config),
                "checkpoints": str(folder / "checkpoints"),
                "tracked": tracked,
            },
            scaling_config=ray.train.ScalingConfig(
                num_workers=config.scaling.num_workers,
                use_gpu=config.scaling.use_gpu,
                resources_per_worker={"CPU": config.scaling.cpus_per_worker}
                | ({"GPU": 1} if config.scaling.use_gpu else {}),
            ),
            run_config=ray.train.RunConfig(
                name="ray",
                storage_path=str(folder),
            ),
        ).fit()
    finally:
        if started:
            ray.shutdown()
    outcome = Outcome(**result.return_value)
    if on_report is not None:
        on_report(outcome.metrics)
    return outcome, CheckpointStore(folder / "checkpoints").best()


def copy_checkpoint(checkpoint: Any, destination: Path) -> None:
    """Bring a Ray checkpoint, wherever it lies, to a local folder."""
    shutil.rmtree(destination, ignore_errors=True)
    destination.parent.mkdir(parents=True, exist_ok=True)
    with checkpoint.as_directory() as source:
        shutil.copytree(source, destination)


def start_ray(cpus: float, *, dashboard: bool) -> None:
    """The cluster that ``RAY_ADDRESS`` names, or a Ray on this machine alone.

    Args:
        cpus: logical CPUs that will be asked for at once; a machine with fewer declares as many.
        dashboard: Ray Train needs it to give back the reservation of a stopped worker group.
    """
    import ray

    for name, value in _RAY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=False)
        return
    ray.init(
        address="local",
        num_cpus=max(os.cpu_count() or 1, math.ceil(cpus)),
        include_dashboard=dashboard,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    token = Path.home() / ".ray" / "auth_token"
    if token.exists():  # Ray writes its secret readable by everybody
        token.chmod(0o600)


def _ray_worker(settings: dict[str, Any]) -> dict[str, Any]:
    import ray.train
    import ray.train.torch

    config = from_toml(settings["config"])
    configure_torch(config)
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    manifest = open_manifest(str(config.data.uri))
    with ExitStack() as stack:
        run = stack.enter_context(open_run(**settings["tracked"])) if rank == 0 else None
        if run is not None:
            record_inputs(run, config, manifest)

        def log_metrics(metrics: dict[str, float], step: int) -> None:
            if run is not None:
                run.log_metrics(metrics, step=step)

        reporter = stack.enter_context(
            TrainReporter(
                Path(settings["checkpoints"]),
                rank,
                world,
                checkpoint=config.checkpoint,
                bell=Bell(),
            )
        )
        outcome = train(
            config,
            training_data(config, manifest),
            reporter,
            Worker(rank, world, ray.train.torch.get_device()),
            log_metrics,
        )
    return outcome._asdict()
