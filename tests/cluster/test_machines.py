"""The machines that the other tests here run on: what they share and what they do not."""

import os
import sys
import time
from pathlib import Path

import pytest

from tests.cluster.machines import RUNS, Machines
from tests.deploy.conftest import ROOT, wait_for

pytestmark = pytest.mark.network


@pytest.fixture(scope="module")
def two(switch: Machines):
    some = [switch.add(number, {}) for number in (51, 52)]
    yield some
    for machine in some:
        machine.kill()


def test_they_share_no_folder_that_either_could_write(two, tmp_path):
    first, second = two
    (tmp_path / "of-the-tests").write_text("here")
    for folder in (RUNS, "/tmp", "/var/tmp", "/dev/shm", "/run", "/srv/home", str(Path.home())):
        assert first.run(f"echo own > {folder}/own.txt").returncode == 0, folder
        assert first.path(f"{folder}/own.txt").read_text() == "own\n"
        assert not second.path(f"{folder}/own.txt").exists(), folder
        assert not Path(folder, "own.txt").exists(), folder
    for folder in (ROOT, sys.prefix, "/", "/usr", "/etc", "/var", "/opt"):
        assert first.run(f"touch {folder}/own.txt").returncode != 0, f"{folder} is written"
    assert first.run(f"cat {tmp_path}/of-the-tests").returncode != 0
    assert first.python("from next.config import RunConfig; print(RunConfig().seed)") == "0"


def test_they_reach_each_other_and_nothing_else(two):
    first, second = two
    second.serve([sys.executable, "-m", "http.server", "8000", "--bind", second.address])
    ask = (
        "import urllib.request as u\n"
        f'print(u.urlopen("http://{second.name}:8000/README.md", timeout=5).status)'
    )
    wait_for("the server", lambda: first.run(f"{sys.executable} -c '{ask}'").returncode == 0, 20)
    routes = first.run("ip route").stdout.strip().splitlines()
    assert routes == [f"10.77.0.0/24 dev eth0 proto kernel scope link src {first.address}"]
    second.cable("down")
    gone = first.run(f"{sys.executable} -c '{ask}'")
    second.cable("up")
    assert "timed out" in gone.stdout or "No route to host" in gone.stdout
    assert wait_for("the cable to carry again", lambda: first.python(ask), 30) == "200"


def test_a_machine_that_is_killed_leaves_no_process_and_no_file(switch):
    machine = switch.add(53, {})
    machine.start(f"echo gone > {RUNS}/file; setsid sleep 1000 & exec sleep 1000")
    sleeping = wait_for("two processes", lambda: of_namespace(machine.pid)[2:], 10)
    assert len(sleeping) >= 1
    before = of_namespace(machine.pid)
    machine.kill()
    assert not machine.runs
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in before):
        assert time.monotonic() < deadline
    again = switch.add(53, {})
    assert again.run(f"ls {RUNS}").stdout == ""
    again.kill()


def of_namespace(pid: int) -> list[int]:
    """The processes in the same process namespace."""
    own = os.readlink(f"/proc/{pid}/ns/pid")
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if os.readlink(entry / "ns" / "pid") == own:
                    found.append(int(entry.name))
            except OSError:
                continue
    return found
