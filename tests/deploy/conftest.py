"""A real Ray head for the tests of this folder, with a token, a home and ports of its own."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.ports import free_ports

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class Head:
    """A running head: where it listens, and the environment of who may use it."""

    address: str
    """Of the job server, ``http://...``."""
    environment: dict[str, str]
    """With the token; the interpreter of this environment comes first on ``PATH``."""

    def ray(self, *words: str, timeout: float = 150, **environment: str) -> Finished:
        """Run ``ray`` as a user does, from the project's root."""
        return run([str(BIN / "ray"), *words], self.environment | environment, timeout)

    def submit(self, *words: str, options: Sequence[str] = (), timeout: float = 150) -> Finished:
        """``ray job submit --working-dir . -- WORDS``, waiting for its end."""
        return self.ray(
            *("job", "submit", "--working-dir", ".", *options, "--", *words), timeout=timeout
        )


Finished = subprocess.CompletedProcess


def run(command: Sequence[str], environment: Mapping[str, str], timeout: float) -> Finished:
    """A finished process with its output, both streams in ``stdout``."""
    return subprocess.run(
        command,
        cwd=ROOT,
        env=dict(environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )


def clean_environment(folder: Path, token: str) -> dict[str, str]:
    """This process's environment less what is Ray's, with a home and a token of its own."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("RAY_") and name != "PYTHONPATH"
    }
    return kept | {
        "HOME": str(folder),
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "RAY_TMPDIR": str(folder),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
    }


@contextmanager
def ray_node(arguments: Sequence[str], environment: Mapping[str, str], folder: Path) -> Iterator:
    """``ray start ... --block`` as a child; ended, with all that it started, at the end."""
    with (folder / "ray-start.log").open("ab") as log:
        process = subprocess.Popen(
            arguments,
            env=dict(environment),
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        end_tree(process.pid)
        process.wait(20)


def end_tree(pid: int) -> None:
    """End a process and all its descendants, by their ids."""
    try:
        parent = psutil.Process(pid)
        tree = [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for number in (signal.SIGTERM, signal.SIGKILL):
        for process in tree:
            try:
                process.send_signal(number)
            except psutil.NoSuchProcess:
                continue
        _, tree = psutil.wait_procs(tree, timeout=8)


def wait_for(what: str, condition, seconds: float, said=lambda: ""):
    """The first true value of ``condition()``; else a failure that says what was waited for."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > deadline:
            pytest.fail(f"waited {seconds:.0f} s for {what}\n{said()}")
        time.sleep(0.2)
    return found


@pytest.fixture(scope="module")
def head(short_folder) -> Iterator[Head]:
    port, dashboard, agent, client = free_ports(4)
    environment = clean_environment(short_folder, secrets.token_hex(32))
    address = f"http://127.0.0.1:{dashboard}"
    command = [
        *(str(BIN / "ray"), "start", "--head", "--block", "--num-cpus=2"),
        *(f"--port={port}", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}"),
        *(f"--dashboard-agent-listen-port={agent}", "--min-worker-port=0", "--max-worker-port=0"),
    ]
    with ray_node(command, environment, short_folder) as process:

        def answers() -> bool:
            assert process.poll() is None, (short_folder / "ray-start.log").read_text()[-3000:]
            return status_of(f"{address}/api/version", environment["RAY_AUTH_TOKEN"]) == 200

        wait_for("the head's job server", answers, 90)
        yield Head(address, environment | {"RAY_API_SERVER_ADDRESS": address})


def status_of(url: str, token: str | None = None) -> int:
    """The HTTP status of a GET, 0 if nobody answers."""
    import urllib.error
    import urllib.request

    headers = {"Authorization": f"Bearer {token}"} if token is not None else {}
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(urllib.request.Request(url, headers=headers), timeout=5) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return int(error.code)
    except OSError:
        return 0
