"""What a sweep's store adds to a trial on one machine.

Part ``store`` of ``benchmarks/sweep.py``. Trials of one training, by turns with a store on this
disk and without one, in one process and without Ray, so that nothing else differs; and what the
driver adds: storing the record at a draw and at an ending, and bringing the results home.
"""

from __future__ import annotations

import shutil
import statistics
import time
from pathlib import Path
from typing import Any

from sweep_overhead import EPOCHS, OUT, SPACE, demo_settings

from next.config import RunConfig, override, to_toml
from next.lease import Lease
from next.storage import open_folder
from next.tuning.execution.training import train_trial
from next.tuning.folder import write_record
from next.tuning.home import Home
from next.tuning.record import StoredRecord
from next.tuning.search.space import load_space
from next.tuning.search.study import FILE, ask, create_studies, draw
from next.tuning.settings import SweepConfig

PAIRS = 12


def store_overhead() -> dict[str, Any]:
    """Median seconds that the store adds to a trial, in the trial and in the driver."""
    shutil.rmtree(OUT / "store", ignore_errors=True)
    plain = demo_settings(
        **{"optim.epochs": EPOCHS, "optim.warmup_epochs": 0.5, "selection.every": 1}
    )
    stored = override(plain, {"checkpoint.storage_path": str(OUT / "store" / "kept")})
    for name in ("plain", "stored"):
        (OUT / "store" / name).mkdir(parents=True)
        (OUT / "store" / name / "sweep.toml").touch()
    _seconds(plain, "plain", "warm-up")
    differences, alone, busy = [], [], []
    for pair in range(PAIRS):
        turns = [(plain, "plain"), (stored, "stored")]
        took = {
            name: _seconds(config, name, f"trial-{pair:04d}")
            for config, name in (turns if pair % 2 else reversed(turns))
        }
        alone.append(took["plain"][0])
        differences.append(took["stored"][0] - took["plain"][0])
        busy.append(took["stored"][1] - took["plain"][1])
    answer = {
        "pairs": PAIRS,
        "without_s": round(statistics.median(alone), 3),
        "store_adds_s": round(statistics.median(differences), 3),
        "store_adds_core_s": round(statistics.median(busy), 3),
        "quartiles_s": [round(value, 3) for value in statistics.quantiles(differences)],
        **_driver(stored),
    }
    print(answer, flush=True)
    return answer


def _seconds(config: RunConfig, sweep: str, name: str) -> tuple[float, float]:
    """What a trial took, and how much of it this process computed."""
    began, busy = time.perf_counter(), time.process_time()
    train_trial(
        name,
        {"optim.lr": 1e-3},
        base=to_toml(config),
        folder=str(OUT / "store" / sweep),
        tracked={"uri": None, "experiment": "demo", "parent": None},
        free_axes=False,
        report=lambda found: None,
    )
    return time.perf_counter() - began, time.process_time() - busy


def _driver(stored: RunConfig) -> dict[str, float]:
    """Median seconds of the driver's share, with a study of so many trials."""
    folder, space_file = OUT / "store" / "stored", OUT / "store" / "space.py"
    space_file.write_text(SPACE, encoding="utf-8")
    space, sweep = load_space(space_file), SweepConfig()
    (folder / "config.toml").write_text(to_toml(stored), encoding="utf-8")
    write_record(folder, space, sweep, {})
    studies = create_studies(folder / FILE, "stored", space.objectives, sweep)
    saves, mirrors = [], []
    store = open_folder(str(stored.checkpoint.storage_path)).below("stored")
    with Lease(store, "stored") as lease, StoredRecord(folder, lease) as record:
        for pair in range(PAIRS):
            trial = ask(studies.search)
            draw(space.suggest, trial)
            saves.append(_took(record.save))
            studies.search.tell(trial, 1.0)
            saves[-1] += _took(record.save)
            home = Home(Path(folder) / "trials" / f"trial-{pair:04d}", stored)
            mirrors.append(_took(home.mirror))
    return {
        "record_s": round(statistics.median(saves), 3),
        "mirror_s": round(statistics.median(mirrors), 3),
    }


def _took(action: Any) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began
