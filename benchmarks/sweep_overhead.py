"""What a trial costs beside its training: this project's sweep, Tune's documented way, a bare loop.

Part ``overhead`` of ``benchmarks/sweep.py``. Twelve trials of one training, two at a time, by each
way in a process of its own; the ways differ in nothing but how a trial comes to its training:

* ``bare``: two processes that do nothing but train, again and again; what training costs here.
* ``sweep``: :func:`next.tuning.sweep.run_sweep`; a trial trains in a process forked for it.
* ``documented``: Ray Tune whose trials each run a ``TorchTrainer`` of one worker, as Ray documents.
* ``processes``: an Optuna study in a loop that starts a Python process for each trial.

Every way but ``bare`` runs again with one trial at a time: what the peak memory falls by is what
one more trial takes.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import optuna
from footprint import process_memory

from next.benchmark.card import load_card
from next.cli import base_config
from next.config import RunConfig, from_toml, override, to_toml
from next.data.shards.reader import open_manifest
from next.demo import DEMO_CARD, demo_shards
from next.training.distributed.cluster import start_ray
from next.training.inputs import resolve, training_data
from next.training.loop import train
from next.training.results.report import FolderReporter
from next.training.step.process import configure_torch
from next.tuning.search.space import load_space
from next.tuning.search.study import FILE, open_studies
from next.tuning.settings import SweepConfig
from next.tuning.sweep import run_sweep

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "runs" / "benchmark-sweep"
TRIALS, FEWER, AT_A_TIME, EPOCHS = 12, 4, 2, 1
WAYS = ("sweep", "documented", "processes")
_EVERY_SECONDS = 1.0

SPACE = '''"""A learning rate, which changes nothing of what a trial costs."""


def suggest(trial):
    return {"optim.lr": trial.suggest_float("optim.lr", 1e-4, 1e-2, log=True)}
'''

Times = list[tuple[float, float]]
"""When each trial began and ended, in seconds since 1970, in the order in which they began."""


@dataclass(frozen=True)
class Cost:
    """What one way of running trials took."""

    way: str
    trials: int
    at_a_time: int
    wall_s: float
    """From the start of its process to its end."""
    start_s: float
    """Until its first trial began."""
    trial_s: float
    """Mean time that a trial holds its place, from the first one's beginning to the last end."""
    warm_s: float
    """Median over the trials that follow the first one of their place."""
    peak_mib: int
    """Sum of PSS of all its processes."""
    beside_driver_mib: int
    """The same without the process that drives."""
    processes: int
    """At most, at one time."""


def overhead(names: list[str]) -> dict[str, Any]:
    """Measure the ways and say what each of them adds to the training."""
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "space.py").write_text(SPACE, encoding="utf-8")
    settings = demo_settings(
        **{"optim.epochs": EPOCHS, "optim.warmup_epochs": 0.5, "selection.every": 1}
    )
    (OUT / "base.toml").write_text(to_toml(settings), encoding="utf-8")
    bare = bare_seconds()
    print(f"bare training, two at a time: {bare:.2f} s a trial", flush=True)
    rows = []
    for way in names or WAYS:
        many = measure(way, TRIALS, AT_A_TIME)
        print(many, flush=True)
        alone = measure(way, FEWER, 1)
        rows.append(
            {
                **asdict(many),
                "overhead_s": round(many.trial_s - bare, 2),
                "warm_overhead_s": round(many.warm_s - bare, 2),
                "one_more_mib": many.beside_driver_mib - alone.beside_driver_mib,
                "alone": asdict(alone),
            }
        )
        beside = {key: rows[-1][key] for key in ("overhead_s", "warm_overhead_s", "one_more_mib")}
        print(f"{way} beside the training: {beside}", flush=True)
    return {"bare_s": bare, "ways": rows}


def demo_settings(**settings: Any) -> RunConfig:
    """The procedural benchmark with its recipe, one thread a trial, no tracking."""
    config = override(
        base_config(load_card(DEMO_CARD), None),
        {
            "threads": 1,
            "data.uri": str(demo_shards(ROOT / "demo")),
            "data.cache": str(ROOT / "demo" / "cache"),
            "run.storage_path": str(OUT),
            "run.fresh": True,
            "tracking.enabled": False,
        }
        | settings,
    )
    return resolve(config, open_manifest(str(config.data.uri)))


def base_settings() -> RunConfig:
    """What every trial shares, as :func:`overhead` wrote it."""
    return from_toml((OUT / "base.toml").read_text(encoding="utf-8"))


def measure(way: str, trials: int, at_a_time: int) -> Cost:
    """Run one way in a process of its own, and watch what it takes."""
    answer = OUT / f"{way}-{at_a_time}.json"
    began = time.time()
    command = [sys.executable, str(ROOT / "benchmarks" / "sweep.py"), "way", way]
    child = subprocess.Popen(
        [*command, str(trials), str(at_a_time), str(answer)],
        stdout=subprocess.DEVNULL,
        stderr=(OUT / f"{way}-{at_a_time}.log").open("w", encoding="utf-8"),
    )
    peak = beside = most = 0
    while child.poll() is None:
        time.sleep(_EVERY_SECONDS)
        now = process_memory()
        own = sum(size for name, size in now.items() if name.endswith(f"({child.pid})"))
        peak, beside = max(peak, sum(now.values())), max(beside, sum(now.values()) - own)
        most = max(most, len(now))
    ended = time.time()
    if child.returncode:
        raise RuntimeError(
            f"{way} failed: {(OUT / f'{way}-{at_a_time}.log').read_text(encoding='utf-8')[-2000:]}"
        )
    times: Times = json.loads(answer.read_text(encoding="utf-8"))
    span = max(end for _, end in times) - min(start for start, _ in times)
    warm = [end - start for start, end in sorted(times)[at_a_time:]]
    return Cost(
        way=way,
        trials=trials,
        at_a_time=at_a_time,
        wall_s=round(ended - began, 1),
        start_s=round(min(start for start, _ in times) - began, 1),
        trial_s=round(span * at_a_time / trials, 2),
        warm_s=round(statistics.median(warm), 2),
        peak_mib=peak >> 20,
        beside_driver_mib=beside >> 20,
        processes=most,
    )


def bare_seconds() -> float:
    """Median seconds of a training in a process that does nothing else, two of them at a time."""
    command = [sys.executable, str(ROOT / "benchmarks" / "sweep.py"), "bare"]
    both = [
        subprocess.Popen(
            [*command, str(place)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
        )
        for place in range(AT_A_TIME)
    ]
    seconds = [line for child in both for line in json.loads(child.communicate()[0])]
    return round(statistics.median(seconds), 2)


def bare(place: str) -> None:
    """Train once to warm up, and again; print what each took."""
    seconds = []
    for run in range(1 + TRIALS // AT_A_TIME):
        began = time.perf_counter()
        train_once({"optim.lr": 1e-3}, OUT / "bare" / f"{place}-{run}-{os.getpid()}")
        seconds.append(time.perf_counter() - began)
    print(json.dumps(seconds[1:]))


def train_once(
    settings: dict[str, Any], folder: Path, on_report: Any = lambda metrics: None
) -> float:
    """The training of every way: an epoch, a checkpoint, judged on held-out identities.

    Returns:
        The best val/mAP.
    """
    config = override(base_settings(), settings)
    configure_torch(config)
    data = training_data(config, open_manifest(str(config.data.uri)))
    with FolderReporter(folder / "checkpoints", on_report) as reporter:
        return train(config, data, reporter).best


def way(name: str, trials: str, at_a_time: str, answer: str) -> None:
    """Run the trials of one way, and write when each of them began and ended."""
    folder = OUT / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    run = {"sweep": by_sweep, "documented": by_documented, "processes": by_processes}[name]
    found = run(folder, int(trials), int(at_a_time))
    times = [
        (trial.datetime_start.timestamp(), trial.datetime_complete.timestamp())
        for trial in found
        if trial.datetime_start and trial.datetime_complete
    ]
    assert len(times) == int(trials), "every trial has begun and ended"
    Path(answer).write_text(json.dumps(sorted(times)), encoding="utf-8")


def by_sweep(folder: Path, trials: int, at_a_time: int) -> list[optuna.trial.FrozenTrial]:
    """This project's way, without what the others do not do either."""
    sweep = SweepConfig(
        trials=trials, concurrency=at_a_time, sampler="random", pruner="none", noise_share=0,
        race_share=0, free_axes=False, pictures=0,
    )  # fmt: skip
    config = override(base_settings(), {"run.name": folder.name})
    run_sweep(config, load_space(OUT / "space.py"), sweep)
    return open_studies(folder / FILE, folder.name, sweep).search.trials


def by_documented(folder: Path, trials: int, at_a_time: int) -> list[optuna.trial.FrozenTrial]:
    """Ray's documentation: a Tune function that runs a trainer and forwards its reports.

    With this project's settings of Ray (a report would cost up to two seconds otherwise), and a
    logical CPU for each trial's function beside that of its worker, without which they deadlock.
    """
    import ray.train
    import ray.train.torch
    from ray import tune
    from ray.tune.integration.ray_train import TuneReportCallback
    from ray.tune.search.optuna import OptunaSearch

    start_ray(2 * at_a_time)

    def run_worker(settings: dict[str, Any]) -> None:
        train_once(
            {"optim.lr": settings["lr"]}, Path(settings["folder"]), lambda m: ray.train.report(m)
        )

    def run_trial(settings: dict[str, Any]) -> None:
        name = tune.get_context().get_trial_id()
        ray.train.torch.TorchTrainer(
            run_worker,
            train_loop_config=settings | {"folder": str(folder / name)},
            scaling_config=ray.train.ScalingConfig(num_workers=1),
            run_config=ray.train.RunConfig(
                name=f"train-{name}", storage_path=str(folder), callbacks=[TuneReportCallback()]
            ),
        ).fit()

    lr = optuna.distributions.FloatDistribution(1e-4, 1e-2, log=True)
    search = OptunaSearch(
        {"lr": lr}, metric="val/mAP", mode="max", sampler=optuna.samplers.RandomSampler(seed=0)
    )
    tune.Tuner(
        run_trial,
        tune_config=tune.TuneConfig(
            search_alg=search, num_samples=trials, max_concurrent_trials=at_a_time
        ),
        run_config=tune.RunConfig(name="tune", storage_path=str(folder), verbose=0),
    ).fit()
    ray.shutdown()
    return search._ot_study.trials  # nothing else says when a trial began


def by_processes(folder: Path, trials: int, at_a_time: int) -> list[optuna.trial.FrozenTrial]:
    """An Optuna study, and for each of its trials a new Python."""
    folder.mkdir(parents=True)
    study = optuna.create_study(
        storage=f"sqlite:///{folder}/study.db",
        direction="maximize",
        sampler=optuna.samplers.RandomSampler(seed=0),
    )

    def run(trial: optuna.Trial) -> float:
        rate = trial.suggest_float("optim.lr", 1e-4, 1e-2, log=True)
        command = [sys.executable, str(ROOT / "benchmarks" / "sweep.py"), "trial"]
        done = subprocess.run(
            [*command, str(rate), str(folder / str(trial.number))],
            capture_output=True,
            text=True,
            check=True,
            encoding="utf-8",
        )
        return float(done.stdout)

    study.optimize(run, n_trials=trials, n_jobs=at_a_time)
    return study.trials


def trial(rate: str, folder: str) -> None:
    """One trial of ``processes``."""
    print(train_once({"optim.lr": float(rate)}, Path(folder)))
