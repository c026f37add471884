"""Sweeps whose training is replaced by a recorded curve: what the driver takes, what ASHA saves.

Parts ``simulated``, ``grown``, ``filled`` and ``asha`` of ``benchmarks/sweep.py``.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
from optuna.distributions import FloatDistribution
from optuna.trial import FrozenTrial, create_trial
from ray import tune
from sweep_overhead import ROOT

from next.config import RunConfig, override
from next.tuning.execution import tuner
from next.tuning.execution.slots import Slots
from next.tuning.search.searcher import Live, Search
from next.tuning.search.space import Space, load_space
from next.tuning.search.study import FILE, Studies, create_studies, open_studies
from next.tuning.settings import SweepConfig
from next.tuning.sweep import _race, _Sweep

EPOCHS, AT_A_TIME = 12, 2
BASE = override(RunConfig(), {"optim.epochs": EPOCHS})
SIZES = (100, 300, 1000)

CURVE = (22.0, 36.0, 47.0, 55.0, 61.0, 66.0, 70.0, 73.0, 75.5, 77.0, 78.0, 78.4)
"""Val mAP of the default on the demo benchmark by epoch, as one run recorded it."""


class Taken(NamedTuple):
    """What a whole sweep took."""

    trials: int
    wall_s: float
    """From the first draw to the end of the last run."""
    driver_cpu_s: float
    """Of the driver's process, which is all that grows with the sweep."""
    cpu_ms_a_trial: float
    latest_cpu_ms_a_trial: float
    """Over the last fifty."""
    grown_mib: float
    """Memory of the driver's process beyond that of its first trial."""


def simulated(most: int = SIZES[-1]) -> list[dict[str, Any]]:
    """Driver time and memory of whole sweeps through Ray Tune, up to 1,000 trials.

    Each in a process of its own. Marks within one long sweep would compare its cheap beginning,
    repetitions of the default, with the search and the race.
    """
    rows = []
    for trials in [size for size in SIZES if size <= most]:
        script = f"import sweep_simulated as s; print(s.json.dumps(s.through_tune({trials})))"
        done = subprocess.run(
            [sys.executable, "-c", script],
            cwd=Path(__file__).parent,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            encoding="utf-8",
        )
        rows.append(Taken(*json.loads(done.stdout.splitlines()[-1]))._asdict())
        print(rows[-1], flush=True)
    return rows


def experts_space() -> Space:
    """What the simulated sweeps draw from."""
    return load_space(ROOT / "tune_spaces" / "experts.py")


def true_score(settings: dict[str, Any], epoch: int) -> float:
    """The recorded curve, moved by the settings."""
    level = -2.0 * abs(np.log(settings.get("model.routing.temperature", 1.0) / 0.6))
    experts = settings.get("model.semantic.experts", 4) * settings.get("model.structure.experts", 4)
    return float(CURVE[epoch - 1] + level + 0.8 * np.log2(experts))


def recorded(settings: dict[str, Any], epoch: int) -> float:
    """What a run reports: the true score and noise that settings and epoch seed."""
    key = (settings.get("model.routing.temperature", 1.0), settings.get("seed", 0), epoch)
    noise = np.random.default_rng(abs(hash(key)) % 2**32).normal(0, 0.8)
    return true_score(settings, epoch) + float(noise)


def replay(task: dict[str, Any], **_: Any) -> None:
    """A trial without training."""
    for epoch in range(1, EPOCHS + 1):
        tune.report({"epoch": epoch, "val/mAP": recorded(task["settings"], epoch)})


class Watch:
    """Takes the time and the memory of this process as trials end."""

    def __init__(self) -> None:
        self._ended: list[tuple[float, float, float]] = []
        self._began = (0.0, 0.0)

    def enter(self, phase: str | None) -> None:
        """As :class:`next.tuning.progress.Progress`."""

    def watch(self, search: Search) -> None:
        """As :class:`next.tuning.progress.Progress`."""
        search.on_end = self.ended
        self._began = (time.perf_counter(), time.process_time())

    def ended(self, run: Live) -> None:
        """A run ended."""
        memory = psutil.Process().memory_info().rss / (1 << 20)
        self._ended.append((time.perf_counter(), time.process_time(), memory))

    def taken(self) -> Taken:
        """Up to the last end."""
        trials, (wall, cpu, memory) = len(self._ended), self._ended[-1]
        latest = self._ended[-min(50, trials)][1]
        spent = cpu - self._began[1]
        return Taken(
            trials,
            round(wall - self._began[0], 1),
            round(spent, 1),
            round(1000 * spent / trials, 1),
            round(1000 * (cpu - latest) / min(50, trials), 1),
            round(memory - self._ended[0][2], 1),
        )


def through_tune(trials: int) -> Taken:
    """A sweep as :func:`next.tuning.sweep.run_sweep` drives it, race and all."""
    space, sweep, watch = experts_space(), SweepConfig(trials=trials, grace_epochs=2), Watch()
    tuner.run_trial = replay
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        studies = create_studies(folder / FILE, "simulated", space.objectives, sweep)
        it = _Sweep(folder, BASE, space, [], sweep, studies, None, print)
        tuner.run_trials(
            BASE,
            sweep,
            folder,
            {},
            watch,
            lambda slots: Search(studies, space, sweep, BASE, slots, lambda: _race(it)),
        )
    return watch.taken()


def search_grown(most: int = 10_000) -> list[dict[str, Any]]:
    """What a search of many trials takes, without Ray: draws, evaluations, the study file.

    One sweep, of which each mark is told when it is reached.
    """
    rows: list[dict[str, Any]] = []
    marks = [mark for mark in (100, 300, 1000, 3000, 10_000) if mark < most] + [most]
    began, ended = time.process_time(), [time.process_time()]

    def told(trials: int, folder: Path) -> None:
        ended.append(time.process_time())
        if trials not in marks:
            return
        latest = (ended[-1] - ended[max(0, trials - 50)]) / min(50, trials)
        rows.append(
            {
                "trials": trials,
                "cpu_s": round(ended[-1] - began, 1),
                "latest_cpu_ms_a_trial": round(1000 * latest, 1),
                "memory_mib": round(psutil.Process().memory_info().rss / (1 << 20)),
                "study_mb": round((folder / FILE).stat().st_size / 1e6, 1),
            }
        )
        print(rows[-1], flush=True)

    for _ in search_alone(most, "asha", 0, told):
        pass
    return rows


def asha_against_none(trials: int = 120, seeds: int = 5) -> list[dict[str, Any]]:
    """Epochs that ASHA and no pruning train for the same number of trials, and for the same best.

    The best is the true score of the setting that has reported the highest one, so that luck does
    not count. The same best is the lower one of what the two have come to.
    """
    rows = []
    for seed in range(seeds):
        asha, none = (list(search_alone(trials, pruner, seed)) for pruner in ("asha", "none"))
        target = min(asha[-1][1], none[-1][1])
        reached = [next(e for e, best in steps if best >= target) for steps in (asha, none)]
        rows.append(
            {
                "seed": seed,
                "epochs": {"asha": asha[-1][0], "none": none[-1][0]},
                "best": {"asha": round(asha[-1][1], 2), "none": round(none[-1][1], 2)},
                "epochs_to_the_same_best": {"asha": reached[0], "none": reached[1]},
            }
        )
        print(rows[-1], flush=True)
    spent = [row["epochs"]["asha"] / row["epochs"]["none"] for row in rows]
    apart = [row["best"]["asha"] - row["best"]["none"] for row in rows]
    print(
        f"of {trials} trials ASHA trains {100 * np.mean(spent):.0f} % of the epochs; its best is "
        f"{np.mean(apart):+.2f} ± {np.std(apart, ddof=1):.2f} against no pruning ({seeds} seeds)"
    )
    return rows


def search_filled(most: int = 10_000, real: int = 300, latest: int = 50) -> dict[str, Any]:
    """What the last draws of a search of many trials take, without Ray.

    The first ``real`` trials are searched. Copies of them, each float moved a little within its
    range, fill the study up to the last ``latest``, which are searched again by a driver that has
    just opened the study, as one that resumes does.
    """
    sweep = _alone(most, "asha", 0)
    space, random = experts_space(), np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / FILE
        studies = create_studies(path, "simulated", space.objectives, sweep)
        ended = itertools.count(1)
        for _ in _driven(studies, space, sweep, lambda: next(ended) == real):
            pass
        search = studies.search
        known = [one for one in search.get_trials() if one.state.is_finished()][:real]
        for number in range(len(search.get_trials(deepcopy=False)), most - latest):
            search.add_trial(_moved(known[number % real], random))
        began, memory = time.process_time(), psutil.Process().memory_info().rss
        studies = open_studies(path, "simulated", sweep)
        opened, ended = time.process_time(), itertools.count(1)
        for _ in _driven(studies, space, sweep, lambda: next(ended) == latest):
            pass
        answer = {
            "trials": most,
            "opening_cpu_s": round(opened - began, 1),
            "latest_cpu_ms_a_trial": round(1000 * (time.process_time() - opened) / latest, 1),
            "opening_mib": round((psutil.Process().memory_info().rss - memory) / (1 << 20)),
            "study_mb": round(path.stat().st_size / 1e6, 1),
        }
    print(answer, flush=True)
    return answer


def _moved(trial: FrozenTrial, random: np.random.Generator) -> FrozenTrial:
    """A copy with other floats and a score a little apart."""
    params = dict(trial.params)
    for name, drawn in trial.distributions.items():
        if isinstance(drawn, FloatDistribution):
            value = float(params[name] * random.uniform(0.9, 1.1))
            params[name] = min(max(value, drawn.low), drawn.high)
    score = None if trial.value is None else float(trial.value + random.normal(0, 0.1))
    return create_trial(
        state=trial.state,
        value=score,
        params=params,
        distributions=trial.distributions,
        intermediate_values=trial.intermediate_values,
        user_attrs={name: one for name, one in trial.user_attrs.items() if name != "sha256"},
        system_attrs=trial.system_attrs,
    )


def search_alone(
    trials: int, pruner: str, seed: int, on_end: Callable[[int, Path], None] | None = None
) -> Iterator[tuple[int, float]]:
    """Epochs trained so far and the true score of the best setting, after each evaluation.

    Args:
        trials: that are drawn.
        pruner: as ``sweep.pruner``.
        seed: as ``sweep.seed``.
        on_end: is told how many trials have ended, and the study's folder, whenever one does.
    """
    ended, sweep, space = itertools.count(1), _alone(trials, pruner, seed), experts_space()
    with tempfile.TemporaryDirectory() as folder:
        studies = create_studies(Path(folder) / FILE, "simulated", space.objectives, sweep)

        def told() -> bool:
            if on_end is not None:
                on_end(next(ended), Path(folder))
            return False

        yield from _driven(studies, space, sweep, told)


def _alone(trials: int, pruner: str, seed: int) -> SweepConfig:
    return SweepConfig(
        trials=trials, noise_share=0, race_share=0, grace_epochs=2, seed=seed, pruner=pruner
    )


def _driven(
    studies: Studies, space: Space, sweep: SweepConfig, on_end: Callable[[], bool]
) -> Iterator[tuple[int, float]]:
    """As :func:`search_alone`, over a record; ``on_end`` says whether to stop there."""
    names, trained, best = itertools.count(), 0, (0.0, 0.0)
    slots = Slots(BASE, sweep, {"node": {"CPU": float(AT_A_TIME)}})
    search = Search(studies, space, sweep, BASE, slots, lambda: None)
    live: dict[str, tuple[dict[str, Any], int]] = {}
    while True:
        while len(live) < AT_A_TIME:
            name = str(next(names))
            task = search.suggest(name)
            if not isinstance(task, dict):
                break
            live[name] = (task["settings"], 0)
        if not live:
            return
        for name, (settings, before) in list(live.items()):
            epoch, trained = before + 1, trained + 1
            score = recorded(settings, epoch)
            best = max(best, (score, true_score(settings, EPOCHS)))
            yield trained, best[1]
            stop = search.report(name, {"epoch": epoch, "val/mAP": score})
            live[name] = (settings, epoch)
            if stop or epoch == EPOCHS:
                search.on_trial_complete(name)
                del live[name]
                if on_end():
                    return
