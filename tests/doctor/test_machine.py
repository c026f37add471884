"""Each mistake of a machine made on purpose, and the check that finds it."""

import json
import os
import re
import subprocess
import sys
import sysconfig
import time
from importlib import metadata
from pathlib import Path

import pytest

from next.config import RunConfig, override
from next.doctor import machine
from next.doctor.finding import Finding, Inquiry

ROOT = Path(__file__).resolve().parents[2]
CALL = """
import json, sys
from pathlib import Path
from next.config import RunConfig
from next.doctor import machine
from next.doctor.finding import Inquiry
found = getattr(machine, sys.argv[1])(Inquiry(RunConfig(), Path("requirements.txt")))
print(json.dumps(found))
"""


def inquire(settings: dict | None = None, lock: Path = ROOT / "requirements.txt") -> Inquiry:
    return Inquiry(override(RunConfig(), settings or {}), lock)


def elsewhere(check: str, *before: str, **environment: str) -> Finding:
    """A check in a process of its own, behind a command such as ``unshare``."""
    done = subprocess.run(
        [*before, sys.executable, "-S", "-c", CALL, check],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": paths(sysconfig.get_path("purelib"))} | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if done.returncode and "unshare" in done.stderr:
        pytest.skip(f"namespaces are not allowed here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    return Finding(*json.loads(done.stdout))


def paths(packages: str | Path) -> str:
    return os.pathsep.join([str(ROOT), str(packages)])


def test_plain_ray_without_its_default_extra_is_found(tmp_path):
    assert elsewhere("ray_default").verdict == "ok"
    for item in Path(sysconfig.get_path("purelib")).iterdir():
        if not item.name.startswith("aiohttp_cors"):
            (tmp_path / item.name).symlink_to(item)
    found = elsewhere("ray_default", PYTHONPATH=paths(tmp_path))
    assert found.verdict == "error"
    assert "without its extra 'default': aiohttp_cors missing" in found.found
    assert f"pip install 'ray[default,train,tune,data]=={metadata.version('ray')}'" in found.mend


def test_another_python_on_the_path_is_found(monkeypatch, tmp_path):
    own = f"{Path(sys.prefix) / 'bin'}{os.pathsep}{os.environ['PATH']}"
    monkeypatch.setenv("PATH", own)
    assert machine.interpreter(inquire()).verdict == "ok"
    other = tmp_path / "python"
    other.write_text("#!/bin/sh\n")
    other.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{own}")
    found = machine.interpreter(inquire())
    assert found.verdict == "warning"
    assert str(other) in found.found
    assert found.mend == f"export PATH={Path(sys.prefix) / 'bin'}:$PATH"


def test_versions_that_are_not_those_of_the_lock_are_found(tmp_path):
    lock = tmp_path / "lock.txt"
    text = (ROOT / "requirements.txt").read_text()
    tyro, ray = metadata.version("tyro"), metadata.version("ray")
    lock.write_text(text.replace(f"tyro=={tyro}", "tyro==0.1.0"))
    found = machine.versions(inquire(lock=lock))
    assert (found.verdict, found.found) == ("warning", f"tyro {tyro} (lock: 0.1.0)")
    assert found.mend.endswith(f"-m pip install -r {os.path.relpath(lock)}")
    lock.write_text(f"ray==1.0.0\nnot-installed-at-all==3.1\ntyro=={tyro}\n")
    found = machine.versions(inquire(lock=lock))
    assert found.verdict == "error", "another Ray is no mere warning"
    assert found.found == f"ray {ray} (lock: 1.0.0), not-installed-at-all missing (lock: 3.1)"


def test_this_environment_is_that_of_the_lock():
    assert machine.versions(inquire()).verdict == "ok"


def test_a_small_shared_memory_is_found():
    assert machine.shared_memory(inquire()).verdict == "ok"
    small = 'mount -t tmpfs -o size=64m tmpfs /dev/shm && exec "$@"'
    found = elsewhere("shared_memory", "unshare", "--mount", "sh", "-c", small, "sh")
    assert found.verdict == "error"
    assert "of 0.06 GiB free in /dev/shm, at least 1 GiB are needed" in found.found
    assert "--shm-size" in found.mend


def test_a_machine_without_a_head_has_none():
    found = elsewhere("ray_heads", "unshare", "--pid", "--fork", "--mount-proc")
    assert (found.verdict, found.found) == ("ok", "0 of this user running on this machine")


HEADS = """
import os, shutil, subprocess, sys, tempfile
folder = tempfile.mkdtemp()
os.chmod(folder, 0o755)
name = shutil.copy("/bin/bash", folder + "/gcs_server")
heads = [
    subprocess.Popen(
        [name, "-c", "echo; read", f"--node-ip-address=10.0.0.{n}", "--gcs_server_port=6379"],
        user=int(user), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )
    for n, user in enumerate(sys.argv[2].split(","))
]
for head in heads:
    head.stdout.readline()
shutil.rmtree(folder)
"""


@pytest.mark.parametrize(
    ("address", "users", "verdict", "words"),
    [
        ("auto", "0,0", "error", "2 of this user running .*10.0.0.0:6379 .pid .* started last"),
        ("10.0.0.1:6379", "0,0", "ok", "2 of this user running .*: 10.0.0.0:6379 "),
        ("", "0,0", "ok", "2 of this user running"),
        ("auto", "0,65534", "ok", "1 of this user running on this machine, 1 of others$"),
        ("auto", "65534,65534", "ok", "0 of this user running on this machine, 2 of others$"),
    ],
)
def test_only_own_heads_that_may_be_mixed_up_are_an_error(address, users, verdict, words):
    """And nobody is told to kill what is another user's."""
    if os.getuid():
        pytest.skip("only root starts processes of others")
    behind = ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-S", "-c"]
    done = subprocess.run(
        [*behind, HEADS + CALL, "ray_heads", users],
        cwd=ROOT,
        env=os.environ
        | {"PYTHONPATH": paths(sysconfig.get_path("purelib")), "RAY_ADDRESS": address},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    if done.returncode and "unshare" in done.stderr:
        pytest.skip(f"namespaces are not allowed here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    found = Finding(*json.loads(done.stdout))
    assert found.verdict == verdict
    assert re.search(words, found.found), found.found
    assert "kill" not in found.mend
    assert "ray stop" not in found.mend


def test_a_clock_behind_the_files_is_found(demo_shards, tmp_path):
    lock = tmp_path / "requirements.txt"
    lock.write_text("")
    assert machine.clock_behind_files(inquire({"data.uri": str(demo_shards)}, lock)) is None
    os.utime(lock, (time.time() + 7200, time.time() + 7200))
    found = machine.clock_behind_files(inquire(lock=lock))
    assert found.verdict == "error"
    assert "files of this project were written 7" in found.found
    assert "in the future of this machine's clock" in found.found
    assert "set-ntp" in found.mend


def test_what_dead_builders_left_in_the_cache_is_found(tmp_path):
    settings = {"data.cache": str(tmp_path)}
    assert machine.cache(inquire(settings)).verdict == "ok"
    left = tmp_path / "decoded-0123-train-32x16-abcd.partial"
    left.mkdir()
    (left / "images.npy").write_bytes(bytes(1000))
    found = machine.cache(inquire(settings))
    assert found.verdict == "warning"
    assert "1 are what builders that died left behind" in found.found
    subprocess.run(found.mend, shell=True, check=True)
    assert machine.cache(inquire(settings)).verdict == "ok", "the line mends it"
