"""A sweep whose machines share nothing but an object store; its head is lost and another goes on.

Each driver is in a mount namespace of its own, where an empty disk of its own lies over the folder
of runs: what the trials leave on the disk of their machine, it cannot see.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from next.config import RunConfig, override, to_toml
from next.storage import open_folder
from next.tracking.journal import read_metrics
from next.tuning.home import Home
from tests.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
EPOCHS = 5
SPACE = """
def suggest(trial):
    return {"optim.lr": trial.suggest_float("optim.lr", 1e-4, 1e-2, log=True)}
"""


@pytest.fixture(scope="module")
def nodes(short_folder, s3_server):
    """A head without CPUs and a node with two, as `docs/running.md` has them."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3_server.environment.items():
            patch.setenv(name, value)
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("RAY_TMPDIR", str(short_folder))
        head = {"num_cpus": 0, "include_dashboard": False, "dashboard_port": free_port()}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            cluster.add_node(num_cpus=2)
            patch.setenv("RAY_ADDRESS", cluster.address)
            yield cluster
        finally:
            cluster.shutdown()


class Head:
    """A driver with a disk of its own, which ends with it."""

    def __init__(self, config: RunConfig, folder: Path) -> None:
        self.runs, self.log = Path(config.run.storage_path), folder / "head.log"
        self.folder = folder
        self.runs.mkdir(parents=True, exist_ok=True)
        (folder / "settings.toml").write_text(to_toml(config))
        (folder / "rates.py").write_text(SPACE)
        self.data = str(config.data.uri)

    def start(self, *flags: str) -> subprocess.Popen:
        own = [
            *("--space", str(self.folder / "rates.py"), "--data", self.data),
            *("--recipe", str(self.folder / "settings.toml"), "--trials", "4"),
            *("--sweep.noise_share", "0", "--sweep.race_share", "0", "--sweep.pruner", "none"),
            *("--sweep.pictures", "1", "--sweep.no_free_axes"),
        ]
        return self._job(*own, *flags)

    def resume(self, *flags: str) -> subprocess.Popen:
        return self._job("resume", "search", "--storage_path", str(self.runs), "--json", *flags)

    def _job(self, *flags: str) -> subprocess.Popen:
        disk = f'mount -t tmpfs tmpfs {self.runs} || exit 77; exec "$@"'
        command = ["unshare", "-m", "sh", "-c", disk, "sh", sys.executable, "jobs/sweep.py", *flags]
        with self.log.open("w") as log, (self.folder / "answer.json").open("w") as answer:
            return subprocess.Popen(
                command, cwd=ROOT, env=os.environ | {"HOME": str(self.folder)},
                stdout=answer, stderr=log,
            )  # fmt: skip

    def said(self) -> str:
        return self.log.read_text()[-4000:]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.timeout(1200)
def test_a_lost_head_loses_no_trial_and_another_goes_on_from_the_store(
    nodes, tiny_config, s3, tmp_path
):
    where = {"checkpoint.storage_path": f"{s3}/kept", "run.name": "search"}
    config = override(tiny_config, where | {"optim.epochs": EPOCHS})
    store = open_folder(f"{s3}/kept/search")
    head = Head(config, tmp_path)
    first = head.start()
    if first.poll() == 77:
        pytest.skip("no right to mount a file system here")
    until = time.monotonic() + 400
    while sum("axes.json" in store.names(f"trials/{name}") for name in store.names("trials")) < 1:
        assert first.poll() is None, head.said()
        assert time.monotonic() < until, head.said()
        time.sleep(0.3)
    first.kill()
    first.wait()
    second = head.resume("--checkpoint.storage_path", f"{s3}/kept")
    assert second.wait(timeout=700) == 0, head.said()
    answer = json.loads((tmp_path / "answer.json").read_text())
    assert "the record of sweep search is taken from s3://" in head.said()
    assert [t["state"] for t in answer["trials"]] == ["finished"] * 4
    for trial in answer["trials"]:
        assert [epoch for epoch, _ in trial["curve"]] == list(range(1, EPOCHS + 1))
    assert answer["test"]["test/mAP"] > 0

    for trial in answer["trials"]:
        home = Home(tmp_path / "look" / "search" / "trials" / trial["name"], config)
        home.mirror()
        logged = [
            (row["step"], name) for row in read_metrics(home.folder) for name in row["values"]
        ]
        assert len(logged) == len(set(logged)), "nothing is doubled"
        steps = sorted(step for step, name in logged if name == "train/loss")
        assert steps == list(range(1, len(steps) + 1)), "nothing is lost"
    assert not store.names("lease")
