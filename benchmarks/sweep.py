"""Sweeps: how the search's own time grows, what ASHA saves, what the demo's sweep finds.

    python benchmarks/sweep.py simulated   # 1,000 recorded curves; ASHA against no pruning
    python benchmarks/sweep.py experts     # 40 trials of the experts' space on the demo benchmark

``simulated`` writes its figures to ``runs/benchmark-sweep/simulated.json``.
"""

from __future__ import annotations

import itertools
import json
import logging
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from next.cli import DEMO_CARD, base_config, demo_shards
from next.config import RunConfig, override
from next.data.benchmark import load_card
from next.data.shards import open_manifest
from next.training.inputs import resolve
from next.tuning.resources import Places
from next.tuning.search import Search
from next.tuning.space import load_space
from next.tuning.study import FILE, create_studies
from next.tuning.sweep import SweepConfig, run_sweep

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "runs" / "benchmark-sweep"
CONCURRENCY = 2


def demo_settings(**settings: Any) -> RunConfig:
    """The procedural benchmark with its recipe, one thread a trial, no tracking."""
    config = override(
        base_config(load_card(DEMO_CARD).recipe, None),
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


def simulated() -> None:
    """The search's own time and memory over 1,000 trials, and what ASHA saves."""
    rows = [simulate(count, "asha") for count in (250, 500, 1000)]
    print_table(rows, ("trials", "pruner", "seconds", "ms_a_trial", "grown_mib", "epochs", "best"))
    savings = [simulate(120, pruner, seed) for seed in range(5) for pruner in ("asha", "none")]
    asha, none = (
        [row for row in savings if row["pruner"] == pruner] for pruner in ("asha", "none")
    )
    spent = [a["epochs"] / n["epochs"] for a, n in zip(asha, none, strict=True)]
    apart = [a["best"] - n["best"] for a, n in zip(asha, none, strict=True)]
    print(
        f"ASHA trains {100 * float(np.mean(spent)):.0f} % of the epochs; its best is "
        f"{np.mean(apart):+.2f} ± {np.std(apart, ddof=1):.2f} against no pruning (5 seeds)"
    )
    write("simulated", {"growth": rows, "asha_against_none": savings})


def simulate(count: int, pruner: str, seed: int = 0) -> dict[str, Any]:
    """A sweep whose trials replay a recorded curve, two at a time, over a real study file."""
    epochs = 12
    base = override(RunConfig(), {"optim.epochs": epochs})
    sweep = SweepConfig(
        trials=count, noise_share=0, race_share=0, grace_epochs=2, reduction=3, seed=seed,
        pruner=pruner,
    )  # fmt: skip
    space = load_space(ROOT / "tune_spaces" / "experts.py")
    trained, best = 0, 0.0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as folder:
        studies = create_studies(Path(folder) / FILE, "simulated", space.objectives, sweep)
        places = Places(base, sweep, {"CPU": CONCURRENCY})
        search = Search(studies, space, sweep, base, places, lambda: None)
        began = time.perf_counter()
        names = itertools.count()
        live: dict[str, tuple[dict[str, Any], int]] = {}
        while True:
            while len(live) < CONCURRENCY:
                name = str(next(names))
                task = search.suggest(name)
                if not isinstance(task, dict):
                    break
                live[name] = (task["settings"], 0)
            if not live:
                break
            for name, (settings, epoch) in list(live.items()):
                score = recorded(settings, epoch + 1)
                trained, best = trained + 1, max(best, score)
                stop = search.report(name, {"epoch": epoch + 1, "val/mAP": score})
                live[name] = (settings, epoch + 1)
                if stop or epoch + 1 == epochs:
                    search.on_trial_complete(name)
                    del live[name]
        seconds = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "trials": count,
        "pruner": pruner,
        "seconds": round(seconds, 1),
        "ms_a_trial": round(1000 * seconds / count, 1),
        "grown_mib": round((after - before) / 1024, 1),
        "epochs": trained,
        "best": round(best, 2),
    }


CURVE = (22.0, 36.0, 47.0, 55.0, 61.0, 66.0, 70.0, 73.0, 75.5, 77.0, 78.0, 78.4)
"""Val mAP of the default on the demo benchmark by epoch, as one run recorded it."""


def recorded(settings: dict[str, Any], epoch: int) -> float:
    """The recorded curve, moved by the settings and by noise that they seed."""
    temperature = settings["model.routing.temperature"]
    level = -2.0 * abs(np.log(temperature / 0.6)) + 0.8 * np.log2(
        settings["model.semantic.experts"] * settings["model.structure.experts"]
    )
    noise = np.random.default_rng(abs(hash((temperature, epoch))) % 2**32).normal(0, 0.8)
    return float(CURVE[epoch - 1] + level + noise)


def experts() -> None:
    """Whether 40 trials of the experts' space find a setting that beats the default."""
    config = demo_settings(**{"run.name": "experts", "optim.epochs": 4})
    sweep = SweepConfig(trials=40, concurrency=2, grace_epochs=2, noise_share=0.15, race_share=0.2)
    began = time.monotonic()
    result = run_sweep(config, load_space(ROOT / "tune_spaces" / "experts.py"), sweep)
    print("\n".join(result.lines()))
    print(f"{time.monotonic() - began:.0f} s")


def print_table(rows: list[dict[str, Any]], names: tuple[str, ...]) -> None:
    """Columns of equal width."""
    print("  ".join(f"{name:>16}" for name in names))
    for row in rows:
        print("  ".join(f"{row[name]!s:>16}" for name in names))


def write(name: str, content: Any) -> None:
    """The figures as JSON."""
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / f"{name}.json").write_text(json.dumps(content, indent=2))


def main(argv: list[str]) -> int:
    """Run one of the measurements."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", stream=sys.stderr)
    logging.getLogger("next").setLevel(logging.INFO)
    parts: dict[str, Callable[[], None]] = {
        "simulated": simulated,
        "experts": experts,
    }
    if len(argv) != 1 or argv[0] not in parts:
        sys.stderr.write(__doc__ or "")
        return 2
    parts[argv[0]]()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
