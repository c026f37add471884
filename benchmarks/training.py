"""What several workers cost and give: start-up, Ray's share, scaling, checkpoints, a killed one.

    python benchmarks/training.py                      # all parts
    python benchmarks/training.py --parts start kill   # some of them; --help names all

Runs of the procedural benchmark, one torch thread a worker. "Plain torch" is the same training loop
on processes of torch.multiprocessing with gloo: no Ray, no journal. Settings that are compared take
turns within one call.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import platform
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
import torch.distributed as dist
from scipy import stats

from next.benchmark.card import load_card
from next.cli import base_config
from next.config import RunConfig, from_toml, override, to_toml
from next.data.shards.reader import open_manifest
from next.demo import DEMO_CARD, demo_shards
from next.model.network import NEXT
from next.tracking.run import read_metrics
from next.training.checkpointing.checkpoint import Progress, take_snapshot, write_snapshot
from next.training.checkpointing.interruption import Request, Requests
from next.training.inputs import resolve, training_data
from next.training.loop import Worker, train
from next.training.results.report import FolderReporter, TrainReporter
from next.training.step.optimizer import build_optimizer
from next.training.step.process import configure_torch

ROOT = Path(__file__).resolve().parents[1]
STEP_SECONDS = 0.2
"""Step for which shares are stated where another one was measured."""

TURNS, TURN_SECONDS = 12, 5.0
"""Turns of each of two that are compared while both run."""

Row = dict[str, Any]
Found = dict[str, list[float]]
"""What was measured, by setting, a value for each repeat."""


def main(argv: list[str]) -> int:
    """Measure, print a table for each part, write JSON."""
    parts: dict[str, Callable[[Bench], list[Row]]] = {
        "start": start, "ray": ray, "ray_full": ray_full, "step": step, "checkpoint": checkpoint,
        "snapshot": snapshot, "kill": kill,
    }  # fmt: skip
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--repeats", type=int, default=3, help="of each setting")
    parser.add_argument("--samples", type=int, default=64, help="of a global batch, four a person")
    parser.add_argument("--epochs", type=int, default=12, help="of each run that is timed")
    # What parts `ray` and `ray_full` start.
    parser.add_argument("--within", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--world", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/training.json"))
    options = parser.parse_args(argv)
    if options.within:
        on_workers(from_toml(options.within.read_text(encoding="utf-8")), options.world)
        return 0
    options.out.parent.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load": os.getloadavg(),
        "samples": options.samples,
    }
    with tempfile.TemporaryDirectory(prefix="nx", dir="/tmp") as folder:
        os.environ["RAY_TMPDIR"] = folder
        bench = Bench(Path(folder), options.samples, options.epochs, options.repeats)
        for part in options.parts:
            print(f"\n{part}", flush=True)
            found[part] = parts[part](bench)
            print_table(found[part])
            options.out.write_text(json.dumps(found, indent=2), encoding="utf-8")
    return 0


class Bench:
    """Settings of all runs, and where they are kept."""

    def __init__(self, folder: Path, samples: int, epochs: int, repeats: int) -> None:
        self.folder = folder
        self.epochs = epochs
        self.repeats = repeats
        self._runs = 0
        config = override(
            base_config(load_card(DEMO_CARD), None),
            {
                "threads": 1,
                "batch.identities": samples // 4,
                "batch.instances": 4,
                "optim.epochs": epochs,
                "optim.warmup_epochs": 1.0,
                "selection.every": epochs,
                "data.uri": str(demo_shards(ROOT / "demo")),
                "data.cache": str(ROOT / "demo" / "cache"),
                "run.storage_path": str(folder / "runs"),
                "tracking.enabled": False,
            },
        )
        self.config = resolve(config, open_manifest(str(config.data.uri)))
        training_data(self.config, open_manifest(str(config.data.uri)))  # so that caches are warm

    def new(self, **settings: Any) -> RunConfig:
        """Settings of a run of its own; ``__`` stands for a dot."""
        self._runs += 1
        dotted = {name.replace("__", "."): value for name, value in settings.items()}
        return override(self.config, {"run.name": f"run-{self._runs}"} | dotted)


class Timed(NamedTuple):
    """A run that is over."""

    first: float
    """Seconds from its command to its first step."""
    steps: list[float]
    """Seconds of each step but the first; empty: it was not looked at step by step."""


def start(bench: Bench) -> list[Row]:
    """Seconds from the command to the first optimizer step."""
    brief = {"checkpoint__every_steps": 1, "optim__epochs": 1, "selection__every": 1}
    found: Found = {}
    for _ in range(bench.repeats):
        for name, workers in (("1 worker", 1), ("2 workers, a Ray of their own", 2)):
            timed = run_job(bench.new(scaling__num_workers=workers, **brief))
            found.setdefault(name, []).append(timed.first)
        with standing_ray():
            timed = run_job(bench.new(scaling__num_workers=2, **brief))
        found.setdefault("2 workers, a Ray that runs", []).append(timed.first)
        timed = run_plainly(bench.new(optim__epochs=1, selection__every=1), 2)
        found.setdefault("2 processes, plain torch", []).append(timed.first)
    return [spread(name, "s to first step", values) for name, values in found.items()]


def ray(bench: Bench) -> list[Row]:
    """What Ray adds to a step of 0.2 s with a core beside the worker's.

    A run of one worker is no run of Ray's in this project; here it is, to see Ray alone.
    """
    return over_plain_torch(bench, 1)


def ray_full(bench: Bench) -> list[Row]:
    """What Ray adds to a step of 0.2 s where two workers have the two cores that there are."""
    return over_plain_torch(bench, 2)


def over_plain_torch(bench: Bench, world: int) -> list[Row]:
    """Ray's workers over as many processes of torch; other processes for each repeat."""
    plain, over, means = [], [], []
    for _ in range(bench.repeats):
        config = {"batch__identities": 6 * world, "optim__epochs": 10_000}
        turns = by_turns(
            plain_side(bench.new(**config), world=world),
            ray_side(bench.new(**config), world),
        )
        plain += [one for one, _ in turns]
        over += [other / one for one, other in turns]
        means.append(statistics.fmean(math.log(other / one) for one, other in turns))
        print(f"pair {len(means)}: {math.exp(means[-1]):.3f}", flush=True)
    return [
        spread(f"plain torch, {world} at work, by turns", "s a step", plain),
        spread("Ray over plain torch, by turns", "ratio", over),
        mean_of_logs("Ray over plain torch: mean of the pairs, 95 %", means),
    ]


class Side(NamedTuple):
    """One of what is compared by turns."""

    processes: list[BaseProcess | subprocess.Popen]
    configs: list[RunConfig]
    """Runs that they train; the slowest counts."""


def plain_side(*configs: RunConfig, world: int = 1) -> Side:
    """A group of processes of plain torch for each run."""
    return Side([one for config in configs for one in start_group(config, world)], [*configs])


def ray_side(config: RunConfig, world: int) -> Side:
    """A run on workers of Ray Train, whose processes are all below the job's."""
    job, _ = begin_job(config, f"benchmarks/training.py --world {world} --within")
    return Side([job], [config])


def by_turns(*sides: Side) -> list[list[float]]:
    """Seconds a step of each side, for turns next to each other.

    All run all the time; all processes of one, Ray's own among them, are stopped while another has
    its turn. So all see the same machine, whose speed changes within minutes by more than what is
    looked for. Ray's clocks go on while it is stopped, so its regular work is counted as often as
    there are sides: what is found is rather too high.
    """
    turns = []
    try:
        for side in sides:
            for config in side.configs:
                wait_until(side.processes[0], lambda at=config: len(step_times(at)) > 20)
            signal_all(side.processes, signal.SIGSTOP)
        for turn in range(TURNS + 1):
            paces = [0.0] * len(sides)
            for number in range(len(sides))[:: 1 if turn % 2 else -1]:
                signal_all(sides[number].processes, signal.SIGCONT)
                began = time.time()
                time.sleep(TURN_SECONDS)
                ended = time.time()
                signal_all(sides[number].processes, signal.SIGSTOP)
                paces[number] = max(
                    pace_between(began, ended, config) for config in sides[number].configs
                )
            turns.append(paces)
    finally:
        for processes, _ in sides:
            signal_all(processes, signal.SIGKILL)
            for process in processes:
                process.join() if isinstance(process, BaseProcess) else process.wait()
    return turns[1:]  # the first is Ray's start


def pace_between(began: float, ended: float, config: RunConfig) -> float:
    """Seconds a step of a run within that time."""
    within = [at for at in step_times(config) if began < at < ended]
    return (within[-1] - within[0]) / (len(within) - 1)


def on_workers(config: RunConfig, world: int) -> None:
    """A run by Ray Train whose workers note their steps."""
    from next.tracking.run import open_run
    from next.training.distributed import workers

    folder = folder_of(config)
    work = workers._work

    def noted(settings: dict[str, Any]) -> dict[str, Any]:
        note_steps(folder)
        return work(settings)

    workers._work = noted
    run = {"uri": None, "experiment": "benchmark", "name": folder.name, "folder": folder}
    with open_run(**run):
        pass
    config = override(config, {"scaling.num_workers": world})
    manifest = open_manifest(str(config.data.uri))
    workers.train_on_workers(config, manifest, folder, str(folder / "checkpoints"), run)


def step(bench: Bench) -> list[Row]:
    """Seconds of a step of one global batch, and what a second core gives; by turns."""
    one = "1 process, 1 thread"
    found: Found = {}
    speed: Found = {}
    endless = {"optim__epochs": 10_000, "selection__every": 10_000}
    half = endless | {"batch__identities": bench.config.batch.identities // 2}
    for _ in range(bench.repeats):
        sides = {
            one: plain_side(bench.new(**endless)),
            "1 process, 2 threads": plain_side(bench.new(**endless, threads=2)),
            "half the batch in each of 2 processes": plain_side(
                bench.new(**half), bench.new(**half)
            ),
            "2 processes, plain torch": plain_side(bench.new(**endless), world=2),
            "2 workers, Ray": ray_side(bench.new(**endless), 2),
        }
        by_side = dict(zip(sides, zip(*by_turns(*sides.values()), strict=True), strict=True))
        for name, paces in by_side.items():
            found.setdefault(name, []).extend(paces)
            logs = [math.log(a / b) for a, b in zip(by_side[one], paces, strict=True)]
            speed.setdefault(name, []).append(statistics.fmean(logs))
    return [
        *(spread(name, "s a step", values) for name, values in found.items()),
        *(
            mean_of_logs(f"{name}: speed, 95 %", logs)
            for name, logs in speed.items()
            if name != one
        ),
    ]


def checkpoint(bench: Bench) -> list[Row]:
    """What a checkpoint each 100 steps costs the steps of a run, by turns with none."""
    found: dict[int | None, list[Timed]] = {None: [], 100: []}
    half = bench.config.batch.identities // 2
    for _ in range(bench.repeats):
        for every, timed in found.items():
            config = bench.new(checkpoint__every_steps=every, batch__identities=half)
            timed.append(run_plainly(config, 1))
    none, some = (
        [statistics.fmean(timed.steps) for timed in found[every]] for every in (None, 100)
    )
    stalls = [
        1000 * (timed.steps[at - 1] - statistics.median(timed.steps))
        for timed in found[100]
        for at in range(100, len(timed.steps) + 1, 100)
    ]
    return [
        spread("no checkpoint", "s a step", none),
        spread("one each 100 steps", "s a step", some),
        ratios("with over without", some, none),
        spread("the step that hands one over, beyond the median", "ms", stalls),
    ]


def snapshot(bench: Bench) -> list[Row]:
    """Seconds that a full-size checkpoint takes from the step, and its writing beside the steps."""
    size = {"model.image_size": (256, 128), "model.identities": 171, "model.modalities": 3}
    config = override(RunConfig(), {"model.backbone.pretrained": None} | size)
    network = NEXT(config.model)
    optimizer = build_optimizer(network, config.optim)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # which makes the optimizer's state
    copying, writing, folder = [], [], bench.folder / "full"
    taken = None
    for _ in range(bench.repeats + 1):
        began = time.perf_counter()
        taken = take_snapshot(network, optimizer, Progress(step=1), config, over=taken)
        copying.append(time.perf_counter() - began)
        began = time.perf_counter()
        write_snapshot(folder, taken)
        writing.append(time.perf_counter() - began)
    stored = sum(path.stat().st_size for path in folder.iterdir())
    first, *copying = copying  # the first takes memory, the others find it
    share = [seconds / (100 * STEP_SECONDS) for seconds in copying]
    return [
        spread("ViT-B/16 and Adam: size", "MB", [stored / 1e6]),
        spread("ViT-B/16 and Adam: the first copied, the step waits", "s", [first]),
        spread("ViT-B/16 and Adam: copied, the step waits", "s", copying),
        spread(f"share of 100 steps of {STEP_SECONDS} s", "", share),
        spread("ViT-B/16 and Adam: written, in a thread", "s", writing),
    ]


def kill(bench: Bench) -> list[Row]:
    """Seconds from SIGKILL of one of two workers to the loop's next life, and to a new step."""
    config = bench.new(
        scaling__num_workers=2,
        checkpoint__every_steps=1,
        run__max_failures=-1,
        optim__epochs=1000,
        selection__every=1000,
    )
    folder = folder_of(config)
    process, output = begin_job(config)
    again, new = [], []
    try:
        for life in range(1, bench.repeats + 1):
            wait_until(process, lambda life=life: steps_of(folder) >= 5 * life)
            victim = next_worker(process.pid)
            os.kill(victim, signal.SIGKILL)
            began, done = time.monotonic(), steps_of(folder)
            wait_until(process, lambda life=life: lives(output) > life)
            again.append(time.monotonic() - began)
            wait_until(process, lambda done=done: steps_of(folder) > done + 1)
            new.append(time.monotonic() - began)
    finally:
        process.terminate()
        process.wait(60)
    return [
        spread("SIGKILL of a worker to training again", "s", again),
        spread("SIGKILL of a worker to the next new step", "s", new),
    ]


def begin_job(config: RunConfig, script: str = "") -> tuple[subprocess.Popen, Path]:
    """``jobs/train.py``, or a script, with these settings, and the file of what it says."""
    recipe = Path(config.run.storage_path).parent / f"{config.run.name}.toml"
    recipe.write_text(to_toml(config), encoding="utf-8")
    output = recipe.with_suffix(".log")
    command = [sys.executable, *script.split(), str(recipe)]
    if not script:
        job = ["jobs/train.py", "--data", str(config.data.uri), "--json", "--recipe", str(recipe)]
        command = [sys.executable, *job]
    with output.open("wb") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
    return process, output


def run_job(config: RunConfig) -> Timed:
    """Run the job to its end; times are those of the journal's records."""
    began = time.time()
    process, output = begin_job(config)
    if process.wait() != 0:
        raise RuntimeError(output.read_text(encoding="utf-8")[-3000:])
    rows = read_metrics(folder_of(config))
    [first, *_] = [row["time"] for row in rows if "train/loss" in row["values"]]
    return Timed(first - began, [])


def run_plainly(config: RunConfig, world: int) -> Timed:
    """The loop on processes of torch alone; what rank 0 found."""
    began, queue = time.time(), multiprocessing.get_context("spawn").Queue()
    members = start_group(config, world, began, queue)
    timed: Timed = queue.get(timeout=600)
    for one in members:
        one.join()
    return timed


def start_group(
    config: RunConfig, world: int, began: float = 0.0, queue: Any = None
) -> list[BaseProcess]:
    """Processes of plain torch that train together; rank 0 puts what it found into the queue."""
    spawn = multiprocessing.get_context("spawn")
    group = [
        spawn.Process(target=member, args=(rank, world, to_toml(config), began, queue))
        for rank in range(world)
    ]
    for one in group:
        one.start()
    return group


def member(rank: int, world: int, settings: str, began: float, queue: Any) -> None:
    """One process of a group."""
    config = from_toml(settings)
    configure_torch(config)
    folder = folder_of(config) / "checkpoints"
    if rank == 0:
        note_steps(folder.parent)
    kept = {"checkpoint": config.checkpoint, "requests": Requests()}
    reporter: FolderReporter | TrainReporter = FolderReporter(folder, **kept)
    if world > 1:
        meeting = folder.parent.with_suffix(".meeting")
        meeting.parent.mkdir(parents=True, exist_ok=True)
        dist.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=world)
        reporter = TrainReporter(folder, rank, world, send=lambda report: None, **kept)
    with reporter:
        data = training_data(config, open_manifest(str(config.data.uri)))
        train(config, data, reporter, Worker(rank, world))
    if rank == 0:
        at = step_times(config)
        steps = [after - before for before, after in pairwise(at)]
        queue.put(Timed(at[0] - began, steps))
    if world > 1:
        dist.destroy_process_group()


def note_steps(folder: Path) -> None:
    """From now on this process writes down when it began each step, in the run's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    notes = (folder / f"steps-{os.getpid()}").open("ab", buffering=0)
    take = Requests.take

    def noted(self: Requests) -> Request:  # taken once a step
        notes.write(struct.pack("d", time.time()))
        return take(self)

    Requests.take = noted


def step_times(config: RunConfig) -> list[float]:
    """When a process of the run began its steps, in seconds since 1970; none if it did not yet."""
    for notes in sorted(folder_of(config).glob("steps-*")):
        return list(array("d", notes.read_bytes()))
    return []


def folder_of(config: RunConfig) -> Path:
    """Where a run keeps everything."""
    return Path(config.run.storage_path) / str(config.run.name)


@contextmanager
def standing_ray() -> Iterator[None]:
    """A Ray of this machine, which jobs find by the environment."""
    import ray

    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=True,
        log_to_driver=False,
        logging_level="ERROR",
    )
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    try:
        yield
    finally:
        del os.environ["RAY_ADDRESS"]
        ray.shutdown()


def steps_of(folder: Path) -> int:
    """Steps in a run's journal."""
    if not (folder / "journal.jsonl").exists():
        return 0
    return sum("train/loss" in row["values"] for row in read_metrics(folder))


def lives(output: Path) -> int:
    """How often the workers of a run began."""
    return output.read_text(encoding="utf-8").count("training on 2 workers")


def next_worker(pid: int) -> int:
    """A worker of Ray Train below a process."""
    below = psutil.Process(pid).children(recursive=True)
    return max(one.pid for one in below if "RayTrainWorker" in "".join(one.cmdline()[:1]))


def signal_all(processes: Sequence[BaseProcess | subprocess.Popen], number: int) -> None:
    """Send a signal to processes and to all below them."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            first = psutil.Process(process.pid)
            for one in [first, *first.children(recursive=True)]:
                with suppress(psutil.NoSuchProcess):
                    one.send_signal(number)


def wait_until(process: BaseProcess | subprocess.Popen, condition: Callable[[], bool]) -> None:
    """Look every few milliseconds."""
    while not condition():
        code = process.exitcode if isinstance(process, BaseProcess) else process.poll()
        if code is not None:
            raise RuntimeError(f"the process ended with code {code}")
        time.sleep(0.01)


def spread(name: str, unit: str, values: list[float]) -> Row:
    """A line of a table."""
    row = {"what": name, "unit": unit, "median": statistics.median(values)}
    return row | {"least": min(values), "most": max(values), "repeats": len(values)}


def ratios(name: str, over: list[float], under: list[float]) -> Row:
    """Ratios of runs of one turn."""
    return spread(name, "ratio", [a / b for a, b in zip(over, under, strict=True)])


def mean_of_logs(name: str, logs: list[float]) -> Row:
    """Geometric mean of ratios from their logarithms, and its 95 % interval (Student's t)."""
    mean, count = statistics.fmean(logs), len(logs)
    reach = math.nan
    if count > 1:
        reach = stats.t.ppf(0.975, count - 1) * statistics.stdev(logs) / math.sqrt(count)
    row = {"what": name, "unit": "ratio", "median": math.exp(mean)}
    return row | {"least": math.exp(mean - reach), "most": math.exp(mean + reach), "repeats": count}


def print_table(rows: list[Row]) -> None:
    """Columns of equal width."""
    for row in rows:
        values = "".join(f"{row[name]:>10.3f}" for name in ("median", "least", "most"))
        print(f"{row['what']:<52}{row['unit']:<18}{values}{row['repeats']:>4}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
