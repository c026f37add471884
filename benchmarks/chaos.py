"""Kills the processes of runs and sweeps at drawn moments, goes on, and compares what comes of it.

    python benchmarks/chaos.py --kills 100 --seed 1                   # hours on two cores
    python benchmarks/chaos.py --kills 8 --seed 2 --parts sweep --out chaos.json
    python benchmarks/chaos.py --kills 0 --out chaos.json             # the table of all pieces

On tiny procedural data it starts runs of one process (``run``), runs of two workers on a Ray of
their own (``workers``) and sweeps (``sweep``), with a local tracking server each. One of their
processes gets SIGKILL, SIGTERM, SIGINT, or SIGSTOP for a while; where the driver ends of it, the
drill gives the command that goes on: the same one for a run, ``jobs/sweep.py resume`` for a sweep.
What came to its end is compared with a run or sweep that nobody disturbed: losses, scores and
weights bit for bit, the journal, the study, and MLflow's database, where every metric must be there
once for each step. Which process, which signal and which moment follow from the seed; a moment is
a number of training steps from now, or seconds of a start.

Exit code 1 where anything was lost, doubled or different, hung, or left a process behind. What is
told of but is no difference: ends ``without a word`` of how to go on. Ray itself ends a process so
that puts something into its object store at the moment in which the raylet dies.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from next.benchmark.card import load_card
from next.benchmark.procedural.benchmark import DemoSize, write_demo
from next.config import RunConfig, override, to_toml
from next.data.source.ingest import prepare
from next.demo import DEMO_CARD
from next.stopping import INTERRUPTED
from next.storage import write_whole
from next.tracking.journal import read_metrics
from next.tuning.folder import read_standing

ROOT = Path(__file__).resolve().parents[1]
KINDS = {
    "run": ("driver", "tracking server"),
    "workers": ("driver", "worker", "controller", "raylet", "GCS", "tracking server"),
    "sweep": (
        *("driver", "trial's actor", "trainer", "fork server", "raylet", "GCS", "tracking server"),
    ),
}
"""Kinds of processes by part."""
SIGNALS = ("SIGKILL", "SIGTERM", "SIGINT", "SIGSTOP")
FATAL = ("driver", "raylet", "GCS")
"""Kinds whose end ends the driver."""
SETTINGS = {
    "model.backbone.name": "next-tiny",
    "model.backbone.pretrained": None,
    "model.semantic.experts": 2,
    "model.structure.experts": 2,
    "data.image_size": (32, 16),
    "batch.identities": 4,
    "batch.instances": 4,
    "augment.pad": 2,
    "optim.lr": 1e-3,
    "optim.tower_lr": 1e-3,
    "optim.epochs": 24,
    "optim.warmup_epochs": 0.5,
    "selection.holdout": 0.34,
    "selection.every": 6,
    "checkpoint.every_steps": 3,
    "run.max_failures": 1000,
    "threads": 1,
    "tracking.every_steps": 2,
}
"""Of a run that trains in seconds."""
OF_PART: dict[str, dict[str, Any]] = {
    "run": {},
    "workers": {"scaling.num_workers": 2, "scaling.cpus_per_worker": 0.5},
    "sweep": {"optim.epochs": 8, "selection.every": 2},
}
TRIALS = 3
SPACE = """
def suggest(trial):
    rate = 1e-3 * 0.9**trial.number
    return {"optim.lr": rate, "optim.tower_lr": rate, "seed": trial.number}
"""
"""A trial's settings follow from its number: a driver that is killed within a draw draws anew."""
HURRY = ("system/", "train/samples_per_second", "train/seconds_per_step", "peak", "gpu_")
"""Metrics that say how long something took, or how much it needed."""
SETTLED_SECONDS = {True: 30.0, False: 5.0}
"""After so many seconds with steps a kind that is fatal, or is not, is said to go on by itself."""
LEFT_SECONDS = 150.0
"""After so long a process of a driver that has ended is left behind; agents of Ray's whose raylet
was killed look for the head for a minute."""
FRUITLESS = 3
"""Starts in a row that end without a kill until a subject is given up."""


@dataclass
class Kill:
    """What is to happen."""

    part: str
    kind: str
    sent: str
    steps: int | None
    """Training steps from now; None: while it starts."""
    seconds: float
    """From then, or from the start."""


@dataclass
class Happened:
    """What came of a kill."""

    part: str
    kind: str
    sent: str
    subject: str
    went_on: str = ""
    """``by itself``, ``by the command``, or ``hung``."""
    seconds: float | None = None
    """From the kill to the driver's end."""
    silent: bool = False
    """The driver ended and did not say how to go on."""
    told: str = ""
    """The driver's last line."""
    differences: list[str] = field(default_factory=list)
    """Of the run or sweep that it happened to."""


class Subject(ABC):
    """A run or a sweep, by the command line."""

    def __init__(self, part: str, name: str, place: Path, shards: Path) -> None:
        self.name = name
        self.storage = place / part
        self.folder = self.storage / name
        self.log = place / f"{part}-{name}.log"
        own = {
            "data.uri": str(shards),
            "data.cache": str(place / "cache"),
            "run.storage_path": str(self.storage),
            "run.name": name,
        }
        self.config = override(RunConfig(), SETTINGS | OF_PART[part] | own)
        self.recipe = place / f"{part}-{name}.toml"
        write_whole(self.recipe, to_toml(self.config))

    @abstractmethod
    def command(self) -> list[str]:
        """What begins it, or goes on with it."""

    @abstractmethod
    def folders(self) -> dict[str, Path]:
        """Of itself (by no name), and of the runs that it is made of."""

    @abstractmethod
    def result(self) -> dict[str, Any]:
        """What it came to, and must be the same."""

    @abstractmethod
    def tracked(self, database: sqlite3.Connection) -> list[tuple[Path, list[tuple[str, str]]]]:
        """Each run's folder, with id and status of all runs in MLflow that are of it."""

    def start(self) -> subprocess.Popen[bytes]:
        """As a user does."""
        environment = {name: os.environ[name] for name in os.environ if name != "RAY_ADDRESS"}
        with self.log.open("ab") as out:
            out.write(f"$ {' '.join(self.command())}\n".encode())
            out.flush()
            return subprocess.Popen(
                [sys.executable, *self.command()],
                cwd=ROOT,
                env=environment,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    def steps(self) -> int:
        """Training steps in the journals."""
        found = 0
        for folder in self.folders().values():
            with suppress(OSError):
                found += (folder / "journal.jsonl").read_bytes().count(b'"train/loss":')
        return found

    def written(self) -> int:
        """Bytes of the journals."""
        journals = [folder / "journal.jsonl" for folder in self.folders().values()]
        return sum(path.stat().st_size for path in journals if path.is_file())

    def last_line(self) -> str:
        """The last one that the driver wrote."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return next((line for line in reversed(lines) if line.strip()), "")

    def status(self) -> str | None:
        """What MLflow says of it; None: it does not know it."""
        file = self.storage / "mlflow" / "mlflow.db"
        if not file.is_file():
            return None
        with closing(sqlite3.connect(file)) as database, suppress(sqlite3.OperationalError):
            entry = database.execute("SELECT status FROM runs WHERE name = ?", [self.name])
            row = entry.fetchone()
            return None if row is None else str(row[0])
        return None

    def differences(self, reference: Subject) -> list[str]:
        """What it has not as the reference has it."""
        found = apart("result", self.result(), reference.result())
        ours, theirs = self.folders(), reference.folders()
        found += apart("runs", sorted(ours), sorted(theirs))
        for name in sorted(set(ours) & set(theirs)):
            found += apart_runs(ours[name], theirs[name])
        with closing(sqlite3.connect(self.storage / "mlflow" / "mlflow.db")) as database:
            for folder, entries in self.tracked(database):
                found += apart_from_mlflow(database, folder, entries)
        left = [*self.folder.glob("tune-*"), *self.storage.glob(f".{self.name}.*")]
        return found + [f"{path.name} is left behind" for path in left]


class Run(Subject):
    """A run of ``jobs/train.py``."""

    def command(self) -> list[str]:
        return [
            *("jobs/train.py", "--data", str(self.config.data.uri)),
            *("--recipe", str(self.recipe), "--json"),
        ]

    def folders(self) -> dict[str, Path]:
        return {"": self.folder}

    def result(self) -> dict[str, Any]:
        found = json.loads((self.folder / "result.json").read_text(encoding="utf-8"))
        return {name: found[name] for name in ("selection", "test", "steps", "losses")}

    def tracked(self, database: sqlite3.Connection) -> list[tuple[Path, list[tuple[str, str]]]]:
        entries = database.execute("SELECT run_uuid, status FROM runs WHERE name = ?", [self.name])
        return [(self.folder, entries.fetchall())]


class Sweep(Subject):
    """A sweep of ``jobs/sweep.py``."""

    def command(self) -> list[str]:
        if (self.folder / "sweep.toml").is_file():
            return ["jobs/sweep.py", "resume", self.name, "--storage_path", str(self.storage)]
        space = self.storage.parent / "space.py"
        write_whole(space, SPACE)
        return [
            *("jobs/sweep.py", "--space", str(space), "--data", str(self.config.data.uri)),
            *("--recipe", str(self.recipe), "--trials", str(TRIALS), "--sweep.concurrency", "1"),
            *("--sweep.sampler", "random", "--sweep.pruner", "none", "--sweep.retries", "1000"),
            *("--sweep.noise_share", "0", "--sweep.race_share", "0", "--sweep.no_free_axes"),
            *("--sweep.pictures", "0"),
        ]

    def folders(self) -> dict[str, Path]:
        trials = sorted((self.folder / "trials").glob("*"))
        return {"": self.folder} | {folder.name: folder for folder in trials}

    def result(self) -> dict[str, Any]:
        found = json.loads((self.folder / "sweep.json").read_text(encoding="utf-8"))
        trials = {
            trial.name: [trial.state, trial.settings, trial.score, trial.values, trial.curve]
            for trial in read_standing(self.folder).trials
        }
        return {name: found[name] for name in ("winner", "score", "test")} | {"trials": trials}

    def tracked(self, database: sqlite3.Connection) -> list[tuple[Path, list[tuple[str, str]]]]:
        query = "SELECT run_uuid, status FROM runs WHERE name = ?"
        parents = database.execute(query, [self.name]).fetchall()
        found = []
        of_parent = (
            f"{query} AND run_uuid IN (SELECT run_uuid FROM tags WHERE key = ? AND value = ?)"
        )
        for name, folder in self.folders().items():
            entries = [
                entry
                for parent, _ in parents
                for entry in database.execute(of_parent, [name, "mlflow.parentRunId", parent])
            ]
            found.append((folder, entries if name else parents))
        return found


def apart(what: str, ours: Any, theirs: Any) -> list[str]:
    """Where two values that are made of lists and dictionaries differ, a line each."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return [
            line
            for name in sorted({*ours, *theirs}, key=str)
            for line in apart(f"{what}, {name}", ours.get(name), theirs.get(name))
        ]
    return [] if ours == theirs else [f"{what}: {ours!r:.200}, undisturbed {theirs!r:.200}"]


def apart_runs(ours: Path, theirs: Path) -> list[str]:
    """Where two runs' journals and weights differ."""
    found, journals = [], []
    for folder in (ours, theirs):
        values, doubled = journal(folder)
        journals.append({key: value for key, value in values.items() if timeless(key)})
        found += [f"{folder.name}: {name} of step {step} is twice" for step, name in doubled]
    found += apart(f"journal of {ours.name}", *journals)
    for checkpoint in ("best", "last"):
        files = [
            folder / "checkpoints" / checkpoint / "model.safetensors" for folder in (ours, theirs)
        ]
        kept = [file.read_bytes() if file.is_file() else None for file in files]
        if kept[0] != kept[1]:
            found.append(f"{ours.name}: the weights of its checkpoint {checkpoint} differ")
    return found


def journal(folder: Path) -> tuple[dict[tuple[int, str], float], list[tuple[int, str]]]:
    """What a run's journal holds by step and name, and what it holds more than once."""
    values: dict[tuple[int, str], float] = {}
    doubled = []
    for row in read_metrics(folder):
        for name, value in row["values"].items():
            if (row["step"], name) in values:
                doubled.append((row["step"], name))
            values[row["step"], name] = value
    return values, doubled


def timeless(key: tuple[int, str]) -> bool:
    """Whether a metric, by step and name, is the same in every run."""
    return not key[1].startswith(HURRY)


def apart_from_mlflow(
    database: sqlite3.Connection, folder: Path, entries: list[tuple[str, str]]
) -> list[str]:
    """Where MLflow has not what a run's journal has, each once."""
    if [status for _, status in entries] != ["FINISHED"]:
        return [f"MLflow has {folder.name} as {entries}, and must have it once, as FINISHED"]
    query = "SELECT step, key, value FROM metrics WHERE run_uuid = ? AND is_nan = 0"
    rows = database.execute(query, [entries[0][0]]).fetchall()
    held = {(step, name): value for step, name, value in rows}
    logged = {key: value for key, value in journal(folder)[0].items() if value == value}
    twice = [f"MLflow has metrics of {folder.name} twice"] if len(held) < len(rows) else []
    return twice + apart(f"MLflow's metrics of {folder.name}", held, logged)


class Drill:
    """Kills, one after the other, in runs or sweeps that each go on to their end.

    Args:
        part: of :data:`KINDS`.
        kills: what is to happen.
        place: folder for all that is written.
        shards: data.
        options: of the command line.
    """

    def __init__(
        self, part: str, kills: list[Kill], place: Path, shards: Path, options: argparse.Namespace
    ) -> None:
        self.part, self.left, self.place, self.shards = part, kills, place, shards
        self.stop_s, self.patience_s, self.most = options.stop, options.patience, options.each
        self.happened: list[Happened] = []
        self._life: list[Happened] = []
        self._seen: set[psutil.Process] = set()
        self._written = 0

    def new(self, name: str) -> Subject:
        """A run or sweep that is not started yet."""
        kind = Sweep if self.part == "sweep" else Run
        return kind(self.part, name, self.place, self.shards)

    def run(self) -> Iterator[list[Happened]]:
        """The reference, then subjects until all kills have happened; the kills of each subject.

        Raises:
            RuntimeError: the reference does not come to its end.
        """
        reference = self.new("undisturbed")
        code = reference.start().wait()
        if code:
            raise RuntimeError(
                f"{reference.name} ended with code {code}; its output is in {reference.log}"
            )
        self.total = reference.steps()
        number = 0
        while self.left:
            number += 1
            subject = self.new(f"{self.part}-{number}")
            before = len(self.happened)
            finished = self._to_its_end(subject)
            own = self.happened[before:]
            found = subject.differences(reference) if finished else ["it was never finished"]
            found += self._left_behind()
            for each in own:
                each.differences += found
            if not own and found:
                raise RuntimeError(f"{subject.name}, which nothing happened to, differs: {found}")
            print(
                f"{subject.name}: {len(own)} kills, {len(self.left)} left, "
                + ("; ".join(found[:9]) if found else "nothing lost, doubled or different"),
                flush=True,
            )
            yield own

    def _to_its_end(self, subject: Subject) -> bool:
        """Start it, kill, start it again, until it has ended by itself."""
        first, fruitless = len(self.happened), 0
        while fruitless < FRUITLESS:
            self._written = subject.written()
            driver, self._life = subject.start(), []
            try:
                while driver.poll() is None:
                    if self.left and len(self.happened) - first < self.most:
                        self._strike(subject, driver)
                    elif self._waits(driver):
                        for last in self.happened[first:][-1:]:
                            last.went_on = "hung"
            finally:
                end(driver)
            if driver.returncode == 0:
                return True
            if not self._life:
                fruitless += 1
                print(f"  {subject.name} did not start: {subject.last_line()}", flush=True)
                continue
            fruitless = 0
            if self._life[-1].went_on != "hung":
                self._note_end(self._life[-1], subject, driver)
        return False

    def _waits(self, driver: subprocess.Popen[bytes]) -> bool:
        """Wait for the driver's end; True: it did not come, and is brought about."""
        with suppress(subprocess.TimeoutExpired):
            driver.wait(4 * self.patience_s)
            return False
        end(driver)
        return True

    def _strike(self, subject: Subject, driver: subprocess.Popen[bytes]) -> None:
        """Wait for the next kill's moment, and for what comes of it."""
        kill = self.left[0]
        victim = self._at_the_moment(kill, subject, driver)
        if victim is None:
            return
        family = family_of(driver)
        try:
            victim.send_signal(signal.Signals[kill.sent])
        except psutil.NoSuchProcess:
            return
        self.left.pop(0)
        happened = Happened(self.part, kill.kind, kill.sent, subject.name)
        self.happened.append(happened)
        self._life.append(happened)
        self._seen |= set(family)
        began, steps = time.monotonic(), subject.steps()
        if kill.sent == "SIGSTOP":
            time.sleep(self.stop_s)
            with suppress(psutil.NoSuchProcess):
                victim.send_signal(signal.SIGCONT)
        self._settle(happened, subject, driver, began, steps)
        print(
            f"  {subject.name}: {kill.sent} to the {kill.kind} after step {steps}: "
            f"{happened.went_on}{' without a word' if happened.silent else ''}",
            flush=True,
        )

    def _at_the_moment(
        self, kill: Kill, subject: Subject, driver: subprocess.Popen[bytes]
    ) -> psutil.Process | None:
        """The process to kill, when it is time; None: the driver ended before."""
        if kill.steps is not None:
            goal = min(subject.steps() + kill.steps, self.total)
            while subject.steps() < goal:
                if driver.poll() is not None:
                    return None
                time.sleep(0.02)
        time.sleep(kill.seconds)
        while driver.poll() is None:
            found = processes(driver).get(kill.kind, [])
            if found:
                return found[len(self.happened) % len(found)]
            time.sleep(0.05)
        return None

    def _settle(
        self,
        happened: Happened,
        subject: Subject,
        driver: subprocess.Popen[bytes],
        began: float,
        steps: int,
    ) -> None:
        """See whether the driver ends of it, or goes on."""
        fatal = happened.kind in FATAL and happened.sent != "SIGSTOP"
        stopped = self.stop_s if happened.sent == "SIGSTOP" else 0
        while driver.poll() is None:
            waited = time.monotonic() - began - stopped
            if waited > SETTLED_SECONDS[fatal] and subject.steps() > steps + 2:
                happened.went_on = "by itself"
                return
            training = subject.steps() < self.total
            if waited > self.patience_s * (1 if training else 4):
                happened.went_on = "hung"
                end(driver)
                return
            time.sleep(0.1)
        happened.seconds = time.monotonic() - began
        if driver.returncode == 0:
            happened.went_on = "by itself"
        else:
            self._note_end(happened, subject, driver)

    def _note_end(
        self, happened: Happened, subject: Subject, driver: subprocess.Popen[bytes]
    ) -> None:
        """The driver has ended of it, or of it and what came before."""
        happened.went_on, happened.told = "by the command", subject.last_line()
        unheard = happened.kind == "driver" and driver.returncode < 0  # nobody can tell of SIGKILL
        how = (f"resume {subject.name}", "the same command", "Give the command again")
        happened.silent = not unheard and not any(each in happened.told for each in how)
        served = all(each.kind != "tracking server" for each in self._life)
        begun = subject.written() > self._written  # else MLflow still says how it ended before
        if driver.returncode == INTERRUPTED and served and begun:
            status = subject.status()
            if status not in (None, "KILLED"):
                happened.differences = [f"stopped, and MLflow says {status} of {subject.name}"]

    def _left_behind(self) -> list[str]:
        """Processes of drivers that have ended; they are ended."""
        deadline = time.monotonic() + LEFT_SECONDS
        left = list(self._seen)
        while left and time.monotonic() < deadline:
            left = [process for process in left if lives(process)]
            time.sleep(0.2)
        self._seen.clear()
        found = []
        for process in left:
            with suppress(psutil.NoSuchProcess):
                found.append(f"process {title(process)[:80]} is left behind")
                process.kill()
        return found


def processes(driver: subprocess.Popen[bytes]) -> dict[str, list[psutil.Process]]:
    """The processes of a run or a sweep by kind; those of the first kind that a test fits."""
    found: dict[str, list[psutil.Process]] = {"driver": [psutil.Process(driver.pid)]}
    for process in family_of(driver):
        with suppress(psutil.NoSuchProcess):
            words = title(process)
            for kind, fits in _TITLES.items():
                if fits(process, words):
                    found.setdefault(kind, []).append(process)
                    break
    return found


def family_of(driver: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """All processes that a driver has started, and they."""
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(driver.pid).children(recursive=True)
    return []


def title(process: psutil.Process) -> str:
    """What a process is called."""
    return " ".join(process.cmdline())


def lives(process: psutil.Process) -> bool:
    """Whether a process is still the one that it was, and no zombie."""
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def end(driver: subprocess.Popen[bytes]) -> None:
    """End a driver, if it has not ended."""
    driver.kill()
    driver.wait()


def _forked(process: psutil.Process, words: str) -> bool:
    parent = process.parent()
    return _FORKS in words and parent is not None and _FORKS in title(parent)


_FORKS = "next.tuning.execution.forkserver"
_TITLES: dict[str, Callable[[psutil.Process, str], bool]] = {
    "raylet": lambda process, words: process.name() == "raylet",
    "GCS": lambda process, words: process.name() == "gcs_server",
    "tracking server": lambda process, words: "next.tracking.serve" in words,
    "trainer": _forked,
    "fork server": lambda process, words: _FORKS in words,
    "worker": lambda process, words: words.startswith("ray::RayTrainWorker"),
    "controller": lambda process, words: words.startswith("ray::TrainController"),
    "trial's actor": lambda process, words: words.startswith("ray::ImplicitFunc"),
}


def drawn(parts: Sequence[str], kills: int, seed: int) -> dict[str, list[Kill]]:
    """What is to happen in each part: each process and signal once, in drawn order, and again."""
    cells = [(part, kind, sent) for part in parts for kind in KINDS[part] for sent in SIGNALS]
    stream = random.Random(seed)
    found: dict[str, list[Kill]] = {part: [] for part in parts}
    for number in range(kills):
        if number % len(cells) == 0:
            stream.shuffle(cells)
        part, kind, sent = cells[number % len(cells)]
        starting = stream.random() < 0.25
        steps = None if starting else stream.randint(1, 15)
        seconds = stream.uniform(0, 12 if starting else 1)
        found[part].append(Kill(part, kind, sent, steps, seconds))
    return found


def table(pieces: list[dict[str, Any]]) -> Iterator[str]:
    """Kills by part, kind of process and signal, in Markdown."""
    happened = [one for piece in pieces for one in piece["kills"]]
    yield f"| process | {' | '.join(SIGNALS)} | by the command | without a word | different |"
    yield "|---" * (len(SIGNALS) + 4) + "|"
    for part, kinds in KINDS.items():
        for kind in kinds:
            own = [one for one in happened if (one["part"], one["kind"]) == (part, kind)]
            if own:
                yield _row(f"{part}: {kind}", own)
    yield _row("all", happened)
    ends = [one["seconds"] for one in happened if one["seconds"] is not None and one["told"]]
    seeds = ", ".join(str(piece["seed"]) for piece in pieces)
    slowest = max(ends, default=0)
    yield f"{len(happened)} kills, seeds {seeds}; slowest end after a kill {slowest:.0f} s"
    for one in happened:
        if one["silent"]:
            what = f"{one['sent']} to the {one['kind']} of {one['subject']}"
            yield f"without a word: {what}: {one['told']}"


def _row(name: str, own: list[dict[str, Any]]) -> str:
    counts = [sum(one["sent"] == sent for one in own) for sent in SIGNALS]
    asked = sum(one["went_on"] == "by the command" for one in own)
    silent = sum(one["silent"] for one in own)
    return f"| {name} | {' | '.join(map(str, [*counts, asked, silent, sum(map(_bad, own))]))} |"


def _bad(one: dict[str, Any]) -> bool:
    return bool(one["differences"]) or one["went_on"] == "hung"


def main() -> int:
    """Kill, compare, print the table, add the piece to the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of what is killed, and when")
    parser.add_argument("--parts", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--each", type=int, default=8, help="kills of a run or sweep, at most")
    parser.add_argument("--stop", type=float, default=30.0, help="seconds of a SIGSTOP")
    parser.add_argument(
        "--patience", type=float, default=300.0, help="seconds without a step until it hangs"
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmarks/chaos"))
    parser.add_argument("--out", type=Path, help="JSON that pieces add up in")
    options = parser.parse_args()
    out = options.out or options.folder / "chaos.json"
    pieces = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else []
    # A shell that started this in the background lets it, and all it starts, ignore SIGINT.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    plan = drawn(options.parts, options.kills, options.seed)
    place = (options.folder / time.strftime("%Y%m%d-%H%M%S")).absolute()
    if options.kills:
        shards = tiny_data(place)
        kept: list[dict[str, Any]] = []
        piece = {
            "seed": options.seed,
            "commit": commit(),
            "machine": platform.processor() or platform.machine(),
            "kills": kept,
        }
        pieces.append(piece)
        for part, kills in plan.items():
            if not kills:
                continue
            for happened in Drill(part, kills, place, shards, options).run():
                kept += [asdict(one) for one in happened]
                write_whole(out, json.dumps(pieces, indent=2))  # a drill takes hours
        if not any(map(_bad, kept)):
            shutil.rmtree(place)
    print("\n".join(table(pieces)))
    return int(any(_bad(one) for piece in pieces for one in piece["kills"]))


def tiny_data(place: Path) -> Path:
    """Shards of a few dozen images."""
    write_demo(place / "raw", DemoSize(12, 8, 6, 6), seed=1)
    prepare(load_card(DEMO_CARD), place / "raw", place / "shards")
    return place / "shards"


def commit() -> str:
    """Of the checkout, for the record."""
    command = ["git", "describe", "--always", "--dirty"]
    asked = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", check=False)
    return asked.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
