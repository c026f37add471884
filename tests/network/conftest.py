"""Two hosts on one machine: network namespaces with a cable between them that can be pulled."""

from __future__ import annotations

import os
import subprocess
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.deploy.conftest import ROOT, Finished, end_tree, run

HEAD, WORKER = "10.77.0.1", "10.77.0.2"


@dataclass
class Hosts:
    """The two namespaces; what is started in them has its own network, processes and host name."""

    names: dict[str, str]
    """Address of each host and the name of its namespace."""
    folder: Path
    """Short; logs and Ray's files lie below it."""
    started: list[subprocess.Popen] = field(default_factory=list)

    def start(self, host: str, script: str, environment: Mapping[str, str]) -> subprocess.Popen:
        """Run a shell script on a host until the end of the test; its output goes to a log."""
        log = self.folder / f"{len(self.started)}.log"
        isolated = ["unshare", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
        named = f"hostname host-{host.rpartition('.')[2]}\ncd {ROOT}\n{script}"
        with log.open("wb") as output:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.names[host], *isolated, "sh", "-c", named],
                cwd=self.folder,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.started.append(process)
        return process

    def run(
        self, host: str, command: Sequence[str], environment: Mapping[str, str], timeout: float = 60
    ) -> Finished:
        """A finished command on a host, both streams in ``stdout``."""
        return run(["ip", "netns", "exec", self.names[host], *command], environment, timeout)

    def cable(self, state: str) -> None:
        """Pull the cable at the worker's end (``down``), or put it back (``up``)."""
        ip("-n", self.names[WORKER], "link", "set", "eth0", state)

    def tail(self, process: subprocess.Popen, characters: int = 4000) -> str:
        """The end of what a started script has printed."""
        log = self.folder / f"{self.started.index(process)}.log"
        return log.read_text(errors="replace")[-characters:]


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=20)


@pytest.fixture(scope="module")
def hosts(short_folder) -> Iterator[Hosts]:
    tag = uuid.uuid4().hex[:6]
    names = {HEAD: f"nx-head-{tag}", WORKER: f"nx-work-{tag}"}
    both = Hosts(names, short_folder)
    try:
        try:
            for name in names.values():
                ip("netns", "add", name)
            ends = [f"nxh{tag}", f"nxw{tag}"]
            ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
            for end, (address, name) in zip(ends, names.items(), strict=True):
                ip("link", "set", end, "netns", name)
                ip("-n", name, "link", "set", end, "name", "eth0")
                ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
                ip("-n", name, "link", "set", "lo", "up")
                ip("-n", name, "link", "set", "eth0", "up")
        except (OSError, subprocess.SubprocessError) as error:
            reason = getattr(error, "stderr", "") or str(error)
            pytest.skip(f"network namespaces are not allowed here: {reason.strip()}")
        if both.run(HEAD, ["unshare", "--uts", "--pid", "--fork", "true"], os.environ).returncode:
            pytest.skip("process namespaces are not allowed here")
        time.sleep(0.2)
        yield both
    finally:
        for process in reversed(both.started):
            end_tree(process.pid)
            process.wait(10)
        for name in names.values():
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)
