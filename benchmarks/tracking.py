"""What tracking costs: a training step, delivery, and the search behind MLflow's table.

    python benchmarks/tracking.py                                     # everything
    python benchmarks/tracking.py --parts fill --folder DIR           # slow, may run beside others
    python benchmarks/tracking.py --parts search --folder DIR         # the rest, to be timed alone

A step is 20 ms of work on one core, then ten metrics are logged: server up, stopped, or none, in
turns, with the system metrics of a run. The search is the request that MLflow's table of runs
sends, for trials that carry what a sweep varies against trials that carry the whole configuration
as parameters.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from next.config import RunConfig, flatten
from next.tracking.delivery.client import connect, experiment_by_name
from next.tracking.delivery.delivery import Delivery
from next.tracking.run import open_run, read_metrics, start_server

PARTS = ("step", "delivery", "fill", "search")
NOBODY = "http://127.0.0.1:9"
LEAN = 6
SEARCHED = 100
"""Rows of one page of MLflow's table."""
SEARCHES = 15


def main() -> None:
    """Measure, print a line for each figure, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=3, help="of steps and of delivery")
    parser.add_argument("--steps", type=int, default=1000, help="in a round, for each server")
    parser.add_argument("--values", type=int, default=20_000, help="delivered in a round")
    parser.add_argument("--trials", type=int, nargs="*", default=[100, 1000])
    parser.add_argument("--folder", type=Path, help="keeps the store, so that it is filled once")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/tracking.json"))
    options = parser.parse_args()
    found: dict[str, Any] = {"machine": platform.processor() or platform.machine()}
    with ExitStack() as stack:
        runs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = stack.enter_context(start_server((options.folder or runs) / "mlflow"))
        if "step" in options.parts:
            found["step"] = measure_steps(server.uri, runs, options.rounds, options.steps)
        if "delivery" in options.parts:
            found["delivery"] = measure_delivery(server.uri, runs, options.rounds, options.values)
        if "fill" in options.parts:
            for trials, settings in sweeps(options.trials):
                fill(server.uri, trials, settings)
        if "search" in options.parts:
            found["search"] = [
                measure_search(server.uri, trials, settings)
                for trials, settings in sweeps(options.trials)
            ]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=2), encoding="utf-8")


def measure_steps(uri: str, folder: Path, rounds: int, steps: int) -> list[dict[str, Any]]:
    """Milliseconds of ``log_metrics`` with ten values within a step of 20 ms."""
    addresses = {"up": uri, "stopped": NOBODY, "none": None}
    spent: dict[str, list[list[float]]] = {state: [] for state in addresses}
    for number in range(rounds):
        for state, address in addresses.items():
            place = folder / f"{state}-{number}"
            spent[state].append(one_round(address, place, steps))
            assert len([line for line in read_metrics(place) if is_step(line)]) == steps
    rows = []
    for state, measured in spent.items():
        p50, p99 = (
            [float(np.percentile(one, share)) for one in measured] for share in (50.0, 99.0)
        )
        worst = max(max(one) for one in measured)
        rows.append({"server": state, "p50_ms": p50, "p99_ms": p99, "worst_ms": worst})
        print(
            f"step, server {state:8} p50 {spread(p50, 3)} ms  p99 {spread(p99, 3)} ms  "
            f"worst of {rounds * steps} {worst:.2f} ms"
        )
    return rows


def one_round(address: str | None, folder: Path, steps: int) -> list[float]:
    """Milliseconds that each step's logging took."""
    run = open_run(
        uri=address,
        experiment="step",
        name=folder.name,
        folder=folder,
        system_seconds=RunConfig().tracking.system_seconds,
    )
    if address not in (None, NOBODY):
        assert run.run_id  # MLflow is imported, once in a process
    spent = []
    for step in range(steps):
        values = {f"train/m{number}": step + number / 10 for number in range(10)}
        work(0.02)
        began = time.perf_counter()
        run.log_metrics(values, step=step)
        spent.append(1000 * (time.perf_counter() - began))
    run.close(timeout=1 if address == NOBODY else 60)
    return spent


def is_step(line: dict[str, Any]) -> bool:
    """Whether a line of the journal is a step's, and not a sample of the system."""
    return all(name.startswith("train/") for name in line["values"])


def work(seconds: float) -> None:
    """Keep a core busy, without the interpreter for most of the time."""
    matrix = np.ones((200, 200), dtype=np.float32)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        matrix @ matrix


def measure_delivery(uri: str, folder: Path, rounds: int, values: int) -> dict[str, list[float]]:
    """Records a second, of ten values each, that a journal's delivery brings to the server."""
    rates = []
    for number in range(rounds):
        run = open_run(uri=None, experiment="delivery", name="d", folder=folder / f"d{number}")
        for step in range(values // 10):
            run.log_metrics({f"train/m{k}": step / (k + 1) for k in range(10)}, step=step)
        run.close()
        delivery = Delivery(run.folder, uri)
        delivery.locate()
        began = time.perf_counter()
        delivery.deliver()
        rates.append(values / 10 / (time.perf_counter() - began))
    print(f"delivery  {spread(rates)} records/s of 10 values")
    return {"records_per_second": rates}


def sweeps(trials: Sequence[int]) -> list[tuple[int, str]]:
    """What is filled and searched: number of trials, and what they carry."""
    return [(number, settings) for number in trials for settings in ("varied", "whole")]


def fill(uri: str, trials: int, settings: str) -> None:
    """Write trials with ten metrics, those that are missing."""
    from mlflow.entities import Metric, Param

    client = connect(uri)
    experiment = experiment_by_name(client, f"search-{trials}-{settings}")
    every = [(name, str(value)) for name, value in flatten(RunConfig())]
    carried = every[:LEAN] if settings == "varied" else every
    body = {"experiment_ids": [experiment], "max_results": trials}
    known = len(json.loads(post(f"{uri}/api/2.0/mlflow/runs/search", body)).get("runs", []))
    now = int(time.time() * 1000)

    def write(number: int) -> None:
        run = client.create_run(experiment, run_name=f"trial-{number}")
        client.log_batch(
            run.info.run_id,
            metrics=[Metric(f"val/m{n}", number + n, now, 1) for n in range(9)]
            + [Metric("val/mAP", number, now, 1)],
            params=[Param(name, value) for name, value in carried],
        )

    began = time.monotonic()
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(write, range(known, trials)))
    print(f"filled    {trials - known} trials, {time.monotonic() - began:.0f} s", flush=True)


def measure_search(uri: str, trials: int, settings: str) -> dict[str, Any]:
    """Milliseconds of the search of the first page of a sweep's trials, ordered by val/mAP."""
    experiment = experiment_by_name(connect(uri), f"search-{trials}-{settings}")
    body = {
        "experiment_ids": [experiment],
        "max_results": SEARCHED,
        "order_by": ["metrics.`val/mAP` DESC"],
    }
    address = f"{uri}/api/2.0/mlflow/runs/search"
    answer = post(address, body)
    runs = json.loads(answer)["runs"]
    assert len(runs) == min(trials, SEARCHED), "fill the store first: --parts fill search"
    parameters = len(runs[0]["data"]["params"])
    took = [timed(lambda: post(address, body)) for _ in range(SEARCHES)]
    print(
        f"search    {trials} trials, {parameters} parameters each: {spread(took)} ms, "
        f"{len(answer) / 1000:.0f} kB"
    )
    return {"trials": trials, "parameters": parameters, "ms": took, "bytes": len(answer)}


def spread(values: Sequence[float], digits: int = 0) -> str:
    """Median, least and most."""
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def timed(call: Callable[[], Any]) -> float:
    """Milliseconds of a call."""
    began = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - began)


def post(address: str, body: dict[str, Any]) -> bytes:
    """The answer to a JSON request."""
    request = urllib.request.Request(
        address, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        content: bytes = answer.read()
        return content


if __name__ == "__main__":
    main()
