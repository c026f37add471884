"""What tracking costs: a training step, delivery, and the search behind MLflow's table.

A step is 20 ms of work on one core, then ten metrics are logged; server up, stopped, or none. The
search is the request that MLflow's table of runs sends, for trials that carry what a sweep varies
against trials that carry the whole configuration as parameters.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from next.config import RunConfig, flatten
from next.tracking.client import connect, experiment_by_name
from next.tracking.delivery import Delivery
from next.tracking.run import open_run, read_metrics, start_server

LEAN = 6
SEARCHED = 100
"""Rows of one page of MLflow's table."""


def main() -> None:
    """Measure, print three tables, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--values", type=int, default=50_000, help="values that are delivered")
    parser.add_argument("--trials", type=int, nargs="*", default=[100, 1000])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/tracking.json"))
    arguments = parser.parse_args()
    found: dict[str, Any] = {"machine": platform.processor() or platform.machine()}
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent)
        with start_server(folder / "mlflow") as server:
            found["step"] = measure_steps(server.uri, folder, arguments.steps)
            found["delivery"] = measure_delivery(server.uri, folder, arguments.values)
            found["search"] = [
                measure_search(server.uri, trials, settings)
                for trials in arguments.trials
                for settings in ("varied", "whole")
            ]
    arguments.out.write_text(json.dumps(found, indent=2))


def measure_steps(uri: str, folder: Path, steps: int) -> list[dict[str, Any]]:
    """Milliseconds of ``log_metrics`` with ten values within a step of 20 ms."""
    rows = []
    addresses = {"up": uri, "stopped": "http://127.0.0.1:9", "none": None}
    for state, address in addresses.items():
        run = open_run(uri=address, experiment="step", name=state, folder=folder / state)
        if state == "up":
            assert run.run_id
        spent = []
        for step in range(steps):
            values = {f"train/m{number}": step + number / 10 for number in range(10)}
            work(0.02)
            began = time.perf_counter()
            run.log_metrics(values, step=step)
            spent.append(1000 * (time.perf_counter() - began))
        run.close(timeout=60 if state == "up" else 1)
        assert len(read_metrics(folder / state)) == steps
        p50, p99 = np.percentile(spent, [50, 99])
        rows.append({"server": state, "p50_ms": p50, "p99_ms": p99, "worst_ms": max(spent)})
        print(
            f"step, server {state:8} p50 {p50:6.3f} ms  p99 {p99:6.3f} ms  worst {max(spent):.2f}"
        )
    return rows


def work(seconds: float) -> None:
    """Keep a core busy, without the interpreter for most of the time."""
    matrix = np.ones((200, 200), dtype=np.float32)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        matrix @ matrix


def measure_delivery(uri: str, folder: Path, values: int) -> dict[str, float]:
    """Values a second that a journal's delivery brings to the server."""
    run = open_run(uri=None, experiment="delivery", name="d", folder=folder / "d")
    for step in range(values // 10):
        run.log_metrics(
            {f"train/m{number}": step / (number + 1) for number in range(10)}, step=step
        )
    run.close()
    delivery = Delivery(folder / "d", uri)
    delivery.locate()
    began = time.perf_counter()
    delivery.deliver()
    seconds = time.perf_counter() - began
    print(f"delivery  {values / seconds:.0f} values/s, {values / 10 / seconds:.0f} records/s")
    return {"values_per_second": values / seconds, "records_per_second": values / 10 / seconds}


def measure_search(uri: str, trials: int, settings: str) -> dict[str, Any]:
    """Milliseconds of the search of the first page of a sweep's trials, ordered by val/mAP."""
    from mlflow.entities import Metric, Param

    client = connect(uri)
    experiment = experiment_by_name(client, f"search-{trials}-{settings}")
    every = [(name, str(value)) for name, value in flatten(RunConfig())]
    carried = every[:LEAN] if settings == "varied" else every
    now = int(time.time() * 1000)
    for number in range(trials):
        run = client.create_run(experiment, run_name=f"trial-{number}")
        client.log_batch(
            run.info.run_id,
            metrics=[Metric(f"val/m{n}", number + n, now, 1) for n in range(9)]
            + [Metric("val/mAP", number, now, 1)],
            params=[Param(name, value) for name, value in carried],
        )
    body = {
        "experiment_ids": [experiment],
        "max_results": SEARCHED,
        "order_by": ["metrics.`val/mAP` DESC"],
    }
    address = f"{uri}/api/2.0/mlflow/runs/search"
    took = [timed(lambda: post(address, body)) for _ in range(9)]
    median, size = statistics.median(took), len(post(address, body))
    print(
        f"search    {trials} trials, {len(carried)} parameters each: {median:.0f} ms "
        f"({min(took):.0f} to {max(took):.0f}), {size / 1000:.0f} kB"
    )
    return {
        "trials": trials,
        "parameters": len(carried),
        "median_ms": median,
        "least_ms": min(took),
        "most_ms": max(took),
        "bytes": size,
    }


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
