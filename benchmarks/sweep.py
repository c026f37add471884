"""Sweeps: what a trial costs, how the search's own time grows, what ASHA saves, what is found.

    python benchmarks/sweep.py overhead [sweep] [documented] [processes]   # seconds, memory a trial
    python benchmarks/sweep.py store       # what a store on this disk adds to a trial
    python benchmarks/sweep.py simulated [TRIALS]   # 1,000 trials of recorded curves
    python benchmarks/sweep.py grown [TRIALS]       # the search alone, up to 10,000 trials
    python benchmarks/sweep.py filled [TRIALS]      # the last draws of so many, 10,000 by default
    python benchmarks/sweep.py asha        # the same curves, ASHA against no pruning
    python benchmarks/sweep.py experts     # 40 trials of the experts' space on the demo benchmark

All but the last write their figures to ``runs/benchmark-sweep/``.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any

from sweep_overhead import OUT, ROOT, WAYS, bare, demo_settings, overhead, trial, way
from sweep_simulated import asha_against_none, search_filled, search_grown, simulated
from sweep_store import store_overhead

from next.tuning.search.space import load_space
from next.tuning.sweep import SweepConfig, run_sweep


def experts() -> None:
    """Whether 40 trials of the experts' space find a setting that beats the default."""
    config = demo_settings(**{"run.name": "experts", "optim.epochs": 4})
    sweep = SweepConfig(trials=40, concurrency=2, grace_epochs=2, noise_share=0.15, race_share=0.2)
    began = time.monotonic()
    result = run_sweep(config, load_space(ROOT / "tune_spaces" / "experts.py"), sweep)
    print("\n".join(result.lines()))
    print(f"{time.monotonic() - began:.0f} s")


def write(name: str, content: Any) -> None:
    """The figures as JSON."""
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / f"{name}.json").write_text(json.dumps(content, indent=2), encoding="utf-8")


def main(argv: list[str]) -> int:
    """Run one of the measurements."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", stream=sys.stderr)
    logging.getLogger("next").setLevel(logging.INFO)
    part, rest = (argv[0], argv[1:]) if argv else ("", [])
    within = {"way": way, "bare": bare, "trial": trial}  # what the first measurement starts
    if part in within:
        within[part](*rest)
    elif part == "overhead" and set(rest) <= set(WAYS):
        write("overhead", overhead(rest))
    elif part == "store" and not rest:
        write("store", store_overhead())
    elif part == "simulated" and len(rest) <= 1:
        write("simulated", simulated(*map(int, rest)))
    elif part == "grown" and len(rest) <= 1:
        write("grown", search_grown(*map(int, rest)))
    elif part == "filled" and len(rest) <= 1:
        write("filled", search_filled(*map(int, rest)))
    elif part == "asha" and not rest:
        write("asha", asha_against_none())
    elif part == "experts" and not rest:
        experts()
    else:
        sys.stderr.write(__doc__ or "")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
