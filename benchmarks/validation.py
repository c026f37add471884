"""Whether verdicts over seeds keep their promise, on one held-out set and with folds: a simulation.

    python benchmarks/validation.py

Each round is two settings that were run with the same n seeds. An identity has a level of its own
and a gain by the second setting, a run has noise that moves all its queries, and each query has its
own. Identities are shared as RGBNT201's are: without folds all runs are measured on the 25 that are
held out by default, with k folds each seed takes the next of k shares of all 51 that can be a
query. The cost is the same, n runs of each setting; that a fold leaves more identities to learn
from is not simulated. The verdict is that of a sweep's report
(:func:`next.tuning.statistics.seeds.compare`), its interval should cover the true gain, that of the
population which the identities are drawn from, in 95 % of the rounds, and tell a gain of nothing
from none in 5 % at most.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from next.cli import parse, run_job
from next.evaluation.queries import PAIRED_SPREAD, SPREAD
from next.tuning.results import Setting, Trial
from next.tuning.search.searcher import DEFAULT
from next.tuning.settings import FEATURES
from next.tuning.statistics.seeds import Verdict, compare, noise_floor

EVALUABLE, HELD_OUT = 51, 25
"""Train identities of RGBNT201 that can be queries, and those of them that are held out by
default."""
QUERIES = 12
"""Of each identity."""
GAIN_SPREAD = PAIRED_SPREAD
RUN_SPREAD, SEED_SPREAD, QUERY_SPREAD = 1.0, 1.5, 12.0
"""mAP: of a run beside others on its seed, of a seed (all settings alike), of a query."""
OBJECTIVES = {"val/mAP": "max"}


@dataclass(frozen=True)
class ValidationBenchmark:
    """False positives, coverage and width of a sweep's intervals, with and without folds."""

    rounds: int = 500
    """Simulated comparisons of each kind."""
    gain: float = 3.0
    """True difference that is looked for, mAP."""
    out: Path = Path("runs/validation.json")
    """Where the figures go."""


def main(argv: Sequence[str]) -> int:
    """Simulate and print."""
    job = parse(ValidationBenchmark, argv)
    began, rows = time.process_time(), []
    print("folds  seeds  false positives  coverage  half width  finds", job.gain, "mAP")
    for folds, seeds in ((1, 3), (3, 3), (1, 5), (5, 5), (1, 10), (5, 10)):
        none = simulate(job.rounds, folds, seeds, 0.0)
        some = simulate(job.rounds, folds, seeds, job.gain)
        both = [*zip(none, [0.0] * len(none), strict=True), *((one, job.gain) for one in some)]
        widths = [one.difference.high - one.difference.low for one, _ in both]
        row = {
            "folds": folds,
            "seeds": seeds,
            "false_positives": float(np.mean([one.separated for one in none])),
            "coverage": float(
                np.mean([one.difference.low <= true <= one.difference.high for one, true in both])
            ),
            "half_width": float(np.mean(widths)) / 2,
            "found": float(
                np.mean([one.separated and one.difference.difference > 0 for one in some])
            ),
        }
        rows.append(row)
        print(
            f"{folds:5d}  {seeds:5d}  {100 * row['false_positives']:13.1f} %  "
            f"{100 * row['coverage']:6.1f} %  {row['half_width']:10.2f}  "
            f"{100 * row['found']:5.1f} %",
            flush=True,
        )
    job.out.parent.mkdir(parents=True, exist_ok=True)
    answer = {"rounds": job.rounds, "gain": job.gain, "rows": rows}
    job.out.write_text(json.dumps(answer, indent=1) + "\n", encoding="utf-8")
    print(f"{time.process_time() - began:.0f} CPU s; written to {job.out}")
    return 0


def simulate(rounds: int, folds: int, seeds: int, gain: float) -> list[Verdict]:
    """Verdicts of so many rounds."""
    generator = np.random.default_rng((folds, seeds, round(10 * gain)))
    verdicts = []
    with tempfile.TemporaryDirectory() as name:
        for _ in range(rounds):
            ours, default = drawn(generator, Path(name), folds, seeds, gain)
            verdicts.append(compare(ours, default, noise_floor([ours, default]), OBJECTIVES))
    return verdicts


def drawn(
    generator: np.random.Generator, folder: Path, folds: int, seeds: int, gain: float
) -> tuple[Setting, Setting]:
    """Two settings with their runs; the first is ``gain`` better in the population."""
    dealt = np.arange(HELD_OUT if folds == 1 else EVALUABLE)
    shares = [dealt[fold::folds] for fold in range(folds)]
    level = generator.normal(50, SPREAD, len(dealt))
    gains = generator.normal(gain, GAIN_SPREAD, len(dealt))
    shift = generator.normal(0, SEED_SPREAD, seeds)
    settings = []
    for name, better in (("ours", gains), (DEFAULT, np.zeros_like(gains))):
        runs = []
        for seed in range(seeds):
            fold = seed % folds
            share = shares[fold]
            of_identity = level[share] + better[share] + shift[seed]
            of_identity = of_identity + generator.normal(0, RUN_SPREAD)
            scores = np.repeat(of_identity, QUERIES)
            scores = scores + generator.normal(0, QUERY_SPREAD, len(scores))
            own = folder / f"{name}-{seed}"
            own.mkdir(exist_ok=True)
            pids = np.repeat(share, QUERIES)
            none = np.zeros((len(pids), 1), dtype=np.float32)  # verdicts read scores alone
            np.savez(
                own / FEATURES,
                **{"average_precision": scores, "query_pid": pids},
                **{"query": none, "gallery": none[:1], "own": np.zeros(len(pids), dtype=bool)},
            )
            runs.append(_run(own, float(scores.mean()), seed, fold))
        settings.append(Setting(name, {}, runs))
    return settings[0], settings[1]


def _run(folder: Path, score: float, seed: int, fold: int) -> Trial:
    ended: dict[str, Any] = {"state": "finished", "epochs": 1, "seconds": 0.0, "error": None}
    return Trial(
        name=folder.name,
        folder=str(folder),
        settings={},
        score=score,
        values=(score,),
        curve=[(1, score)],
        seed=seed,
        of=DEFAULT,
        rank=score,
        fold=fold,
        **ended,
    )


if __name__ == "__main__":
    run_job(main)
