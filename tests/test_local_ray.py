"""What a Ray of our own lets others reach and read: addresses, modes, command lines, logs."""

import hashlib
import json
import os
import secrets
import stat
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from next.local_ray import on_cluster
from tests.exposure import LOOPBACK, lines_of_all_processes, listeners

ROOT = Path(__file__).resolve().parents[1]
DRIVER = """
import hashlib, json, os, sys
from pathlib import Path
import ray
from ray import tune
from next.training.distributed.cluster import start_ray
from next.tuning.execution.tuner import copying_no_credentials

def look(settings):
    key = os.environ["AWS_SECRET_ACCESS_KEY"].encode()
    tune.report({"key": hashlib.sha256(key).hexdigest()})

if __name__ == "__main__":
    start_ray(1)
    with copying_no_credentials():
        tuner = tune.Tuner(
            look,
            run_config=tune.RunConfig(name="look", storage_path=sys.argv[1], verbose=0),
        )
        [found] = tuner.fit()
    if found.error:
        raise found.error
    session = ray._private.worker._global_node.get_session_dir_path()
    ray.shutdown()
    told = {"key": found.metrics["key"], "session": session}
    Path(sys.argv[1], "found.json").write_text(json.dumps(told))
"""


@pytest.mark.ray
@pytest.mark.slow
def test_a_ray_of_our_own_is_reached_and_read_by_nobody_else(short_folder):
    key = f"planted-{secrets.token_hex(8)}"
    env = {name: value for name, value in os.environ.items() if name != "RAY_AUTH_TOKEN"}
    env |= {"AWS_ACCESS_KEY_ID": key, "AWS_SECRET_ACCESS_KEY": key, "AWS_SESSION_TOKEN": key}
    env |= {"HOME": str(short_folder), "RAY_TMPDIR": str(short_folder), "PYTHONPATH": str(ROOT)}
    driver = short_folder / "driver.py"
    driver.write_text(DRIVER)
    token = short_folder / ".ray" / "auth_token"
    modes, lines = set(), set()
    with (short_folder / "log").open("w") as log, listeners(short_folder) as places:
        process = subprocess.Popen(
            [sys.executable, str(driver), str(short_folder)],
            env=env, stdout=log, stderr=log, umask=0o022,
        )  # fmt: skip
        while process.poll() is None:
            lines |= lines_of_all_processes()
            if token.exists():
                modes.add(stat.S_IMODE(token.stat().st_mode))
            time.sleep(0.05)
    assert process.returncode == 0, (short_folder / "log").read_text()[-3000:]
    found = json.loads((short_folder / "found.json").read_text())

    assert found["key"] == hashlib.sha256(key.encode()).hexdigest(), (
        "who needs the keys on this machine has them"
    )
    assert len(places) > 4, "those of the driver and of what it started"
    assert [who for (ip, _), who in places.items() if ip not in LOOPBACK] == []
    assert modes == {0o600}
    assert not [line for line in lines if key in line or token.read_text() in line]
    logs = [path for path in Path(found["session"]).rglob("*") if path.is_file()]
    assert len(logs) > 10
    for path in [*logs, *short_folder.rglob("*.json"), short_folder / "log"]:
        text = path.read_bytes().decode(errors="replace")
        assert key not in text, path
        assert token.read_text() not in text, path


def test_a_token_that_ray_wrote_for_everybody_is_closed_and_one_that_is_there_stays(
    tmp_path, monkeypatch
):
    from next.local_ray import make_token

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    path = tmp_path / ".ray" / "auth_token"
    make_token()
    first = path.read_text()
    assert len(first) == 64
    path.chmod(0o644)
    make_token()
    assert path.read_text() == first
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert {name.name for name in path.parent.iterdir()} <= {"auth_token", "auth_token.lock"}


@pytest.mark.parametrize(
    ("variable", "value"),
    [("RAY_AUTH_MODE", "disabled"), ("RAY_AUTH_TOKEN", "t"), ("RAY_AUTH_TOKEN_PATH", "/else")],
)
def test_no_token_is_made_where_another_one_is_given_or_none_is_wanted(
    tmp_path, monkeypatch, variable, value
):
    from next.local_ray import make_token

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv(variable, value)
    make_token()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("address", "given"), [(None, False), ("", False), ("local", False), ("auto", True)]
)
def test_an_address_of_local_is_no_cluster(monkeypatch, address, given):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if address is not None:
        monkeypatch.setenv("RAY_ADDRESS", address)
    assert on_cluster() is given


STARTS = """
from next.local_ray import start_local_ray

try:
    start_local_ray(1)
except TimeoutError as error:
    print(error)
"""


@pytest.mark.ray
@pytest.mark.slow
def test_a_ray_that_does_not_come_up_says_so_and_what_to_do():
    command = [sys.executable, "-c", STARTS]
    driver = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        raylets: list[psutil.Process] = []
        while not raylets:
            assert driver.poll() is None
            family = psutil.Process(driver.pid).children()
            raylets = [process for process in family if process.name() == "raylet"]
        raylets[0].kill()
        said, _ = driver.communicate(timeout=200)
    finally:
        driver.kill()
        driver.wait()
    assert "Ray did not come up on this machine within its own limit of 30 s: one of its" in said
    assert said.endswith("Give the command again, when less else runs here\n")
