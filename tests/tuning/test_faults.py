"""What goes wrong within a sweep: trials that raise, lack memory, diverge, collapse, are killed."""

import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from next.config import override, to_toml
from next.tuning.execution.training import kind_of
from next.tuning.folder import read_standing

ROOT = Path(__file__).resolve().parents[2]

SPACE = '''
COLD = {"model.routing.temperature": 0.01}
WHAT = [
    {},
    {"model.aggregation.heads": 5},
    {"model.semantic.expansion": 1e9},
    {"optim.lr": 1e20, "optim.tower_lr": 1e20},
    {"optim.lr": 10.0, "optim.warmup_epochs": 0.0, "optim.collapse_steps": 3} | COLD,
    {},
]


def suggest(trial):
    """Settings by the trial's number: fine, no divisor of the width, huge, wild, steep, fine."""
    return {"seed": 0} | WHAT[trial.number % 6]
'''


def kill_when_it_trains(folder: Path, name: str, done: threading.Event) -> None:
    """Kill the process that holds a trial's folder, once it has a checkpoint."""
    trial = folder / "trials" / name
    while not done.wait(0.1):
        if not list(trial.glob("checkpoints/step-*/state.json")):
            continue
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if "next.tuning.execution.forkserver" not in process.cmdline():
                    continue  # to list the files of every process takes longer than the trial
                if str(trial / ".trial.lock") in [file.path for file in process.open_files()]:
                    process.send_signal(signal.SIGKILL)
                    return


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_a_sweep_survives_its_trials_and_says_how_each_of_them_ended(tiny_config, tmp_path):
    config = override(tiny_config, {"run.name": "faults", "optim.epochs": 12})
    (tmp_path / "settings.toml").write_text(to_toml(config))
    (tmp_path / "faulty.py").write_text(SPACE)
    folder = Path(config.run.storage_path) / "faults"
    done = threading.Event()
    killer = threading.Thread(target=kill_when_it_trains, args=(folder, "trial-0005", done))
    killer.start()
    flags = ["--space", str(tmp_path / "faulty.py"), "--data", str(config.data.uri)]
    flags += ["--recipe", str(tmp_path / "settings.toml"), "--trials", "6"]
    flags += ["--sweep.noise_share", "0", "--sweep.race_share", "0", "--sweep.pruner", "none"]
    flags += ["--sweep.no-free-axes", "--sweep.pictures", "0", "--json"]
    finished = subprocess.run(
        [sys.executable, "jobs/sweep.py", *flags],
        cwd=ROOT,
        env=os.environ | {"HOME": str(tmp_path), "RAY_TMPDIR": "/tmp"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    done.set()
    killer.join()
    assert finished.returncode == 0, finished.stderr[-3000:]
    trials = {trial.name: trial for trial in read_standing(folder).trials}
    states = [trials[f"trial-000{number}"].state for number in range(6)]
    assert states == ["finished", *["failed"] * 4, "finished"]
    assert trials["trial-0001"].error.startswith("raised ValueError: ")
    assert "must divide the token width" in trials["trial-0001"].error
    assert trials["trial-0002"].error.startswith("out of memory: ")
    assert trials["trial-0003"].error.startswith(("diverged: ", "raised ValueError: "))
    assert trials["trial-0004"].error.startswith("collapsed: one semantic expert got")
    assert (folder / "trials" / "trial-0001" / "error.txt").read_text().startswith("Traceback")
    assert "trial-0005 goes on from its last checkpoint (killed: " in finished.stderr
    assert "killed: its process ended" not in finished.stderr, "it is said how"
    resumed = read_standing(folder).studies.search.trials[5]
    assert resumed.user_attrs["deaths"] == 1, "it was killed, and went on from its checkpoint"
    assert [epoch for epoch, _ in trials["trial-0005"].curve] == list(range(1, 13))
    assert trials["trial-0005"].score == pytest.approx(trials["trial-0000"].score), "same bits"
    answer = json.loads(finished.stdout)
    assert answer["winner"] in ("trial-0000", "trial-0005")
    assert answer["advice"] is None, "without seeds of the default there is none to keep"
    page = (folder / "report.html").read_text()
    assert "Failed trials" in page
    assert "must divide the token width" in page


def test_an_ending_has_a_kind():
    class RouterCollapseError(RuntimeError):
        pass

    assert kind_of(MemoryError("no room")) == "out of memory"
    no_room = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 B")
    assert kind_of(no_room) == "out of memory"
    assert kind_of(RouterCollapseError("one expert")) == "collapsed"
    assert kind_of(KeyError("x")) == "raised KeyError"
