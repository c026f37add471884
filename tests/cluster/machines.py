"""Machines on this one that share nothing but what a network carries.

Each is a set of namespaces: its own mounts, network, processes, host name and shared memory. What
it can write lies on its own disk (a tmpfs), which is lost with it; the checkout and its ``.venv``
are read-only. The machines are joined by a bridge that has no way out, in a namespace of its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.deploy.conftest import BIN, ROOT, Finished, end_tree

NETWORK = "10.77.0"
HOME, RUNS = "/srv/home", "/srv/runs"
_MASKED = ("/tmp", "/var/tmp", "/run", "/dev/shm", str(Path.home()))
"""Folders of this machine of which each of the others has an own, empty one."""
_DISK_MIB = 2048
_READY = "ready"
_CLONE_NEWNET = 0x40000000

_INIT = f"""
import os, time
os.write(1, b"{_READY}\\n")
while True:  # as init does: nobody else waits for processes whose parent has ended
    try:
        os.wait()
    except ChildProcessError:
        time.sleep(0.2)
"""


@dataclass
class Machine:
    """One machine; it runs from its making until :meth:`kill`."""

    name: str
    address: str
    environment: dict[str, str]
    """Of a login on it."""
    folder: Path
    """Of the logs, on the machine that runs the tests."""
    init: subprocess.Popen
    pid: int
    """Of its first process, as the tests see it."""
    switch: int
    """A process in the bridge's namespace."""
    started: list[subprocess.Popen] = field(default_factory=list)

    def path(self, inside: str | Path) -> Path:
        """A file of the machine's disk, as the tests can open it."""
        return Path(f"/proc/{self.pid}/root{inside}")

    def start(self, script: str, **environment: str) -> subprocess.Popen:
        """Run shell lines from the root of the checkout; the output goes to a log."""
        return self._popen(["sh", "-c", script], environment)

    def run(self, script: str, timeout: float = 60, **environment: str) -> Finished:
        """Finished shell lines, both streams in ``stdout``."""
        process = self.start(script, **environment)
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            end_tree(process.pid)
            raise AssertionError(
                f"{script}\ntook over {timeout} s:\n{self.said(process)}"
            ) from None
        return Finished(script, code, self.said(process, None))

    def python(self, code: str, *words: str, timeout: float = 60) -> str:
        """The last line that a program printed."""
        quoted = " ".join(f"'{word}'" for word in (code, *words))
        done = self.run(f"{sys.executable} -c {quoted}", timeout, PYTHONPATH=str(ROOT))
        assert done.returncode == 0, done.stdout[-3000:]
        return done.stdout.strip().rpartition("\n")[2]

    def said(self, process: subprocess.Popen, characters: int | None = 4000) -> str:
        """The end of what a started script has printed."""
        text = self._log(self.started.index(process)).read_text(errors="replace")
        return text if characters is None else text[-characters:]

    def serve(
        self, words: Sequence[str], user: str | None = None, **environment: str
    ) -> subprocess.Popen:
        """Start a program, as another user if need be."""
        as_user = (
            ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"] if user else []
        )
        return self._popen([*as_user, *words], environment)

    def cable(self, state: str) -> None:
        """Pull the machine's cable out of the switch (``down``), or put it back (``up``)."""
        _ip(self.switch, "link", "set", self.name, state)

    def kill(self) -> None:
        """Cut the power: all its processes end at once, and its disk is lost."""
        self.init.kill()
        self.init.wait(10)
        for process in self.started:
            process.wait(10)
        with contextlib.suppress(PermissionError):  # the kernel may have been as fast
            _ip(self.switch, "link", "delete", self.name)

    @property
    def runs(self) -> bool:
        return self.init.poll() is None

    @contextlib.contextmanager
    def network(self) -> Iterator[None]:
        """What this thread connects to in the block, it connects to from this machine."""
        libc = ctypes.CDLL(None, use_errno=True)

        def enter(file: int) -> None:
            if libc.setns(file, _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), f"{self.name}'s network cannot be entered")

        with (
            open("/proc/thread-self/ns/net", "rb") as here,
            open(f"/proc/{self.pid}/ns/net", "rb") as there,
        ):
            enter(there.fileno())
            try:
                yield
            finally:
                enter(here.fileno())

    def _popen(self, words: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen:
        enter = [
            *("nsenter", f"--target={self.pid}", "--mount", "--uts", "--ipc", "--net", "--pid"),
            f"--wd={ROOT}",
        ]
        with self._log(len(self.started)).open("wb") as output:
            process = subprocess.Popen(
                [*enter, "--", *words],
                env=self.environment | environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.started.append(process)
        return process

    def _log(self, number: int) -> Path:
        return self.folder / f"{self.name}-{self.pid}-{number}.log"


class Machines:
    """All machines of a test and the switch between them."""

    def __init__(self, folder: Path) -> None:
        """Make the switch.

        Raises:
            PermissionError: this machine allows no namespaces; the message is its own.
        """
        self.folder = folder
        self.all: list[Machine] = []
        self._switch, self._switch_pid = _namespaces(["--net", "--pid"], "", "the switch")
        try:
            _ip(self._switch_pid, "link", "add", "switch", "type", "bridge")
            _ip(self._switch_pid, "link", "set", "switch", "up")
        except PermissionError:
            self.close()
            raise

    def add(
        self, number: int, environment: Mapping[str, str], *, shown: Sequence[Path] = ()
    ) -> Machine:
        """Switch a machine on.

        Args:
            number: last part of its address, 1 to 99; one that was killed may be used again.
            environment: of a login on it, beside the least.
            shown: folders of the tests' machine that it sees, read-only.

        Raises:
            PermissionError: this machine allows no namespaces.
        """
        name, address = f"m{number}", f"{NETWORK}.{number}"
        kinds = ["--mount", "--net", "--uts", "--ipc", "--pid"]
        init, pid = _namespaces([*kinds, "--mount-proc"], _disk(name, shown), name)
        try:
            _ip(
                *(self._switch_pid, "link", "add", name, "type", "veth"),
                *("peer", "name", "eth0", "netns", str(pid)),
            )
            _ip(self._switch_pid, "link", "set", name, "master", "switch", "up")
            _ip(pid, "link", "set", "lo", "up")
            _ip(pid, "address", "add", f"{address}/24", "dev", "eth0")
            _ip(pid, "link", "set", "eth0", "up")
        except PermissionError:
            init.kill()
            init.wait()
            raise
        login = {
            "HOME": HOME,
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "LANG": "C.UTF-8",
            "SELF": address,
            **environment,
        }
        machine = Machine(name, address, login, self.folder, init, pid, self._switch_pid)
        self.all.append(machine)
        return machine

    def close(self) -> None:
        """Switch everything off."""
        for machine in self.all:
            if machine.runs:
                machine.kill()
        self._switch.kill()
        self._switch.wait(10)


def _namespaces(kinds: Sequence[str], script: str, name: str) -> tuple[subprocess.Popen, int]:
    """A first process in namespaces of its own, which end with it, and it with the tests."""
    process = subprocess.Popen(
        [
            *("setpriv", "--pdeathsig=KILL", "unshare", *kinds, "--fork", "--kill-child"),
            *("sh", "-c", f'{script}\nexec "$0" -I -S -c "$1"', sys.executable, _INIT),
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    with process.stdout as output:
        said = output.readline()
        if said.strip() != _READY:
            process.kill()
            process.wait(10)
            raise PermissionError(f"{name}: {(said + output.read()).strip()}")
    [first] = psutil.Process(process.pid).children()
    return process, int(first.pid)


def _disk(name: str, shown: Sequence[Path]) -> str:
    """Shell lines that give a machine its own disk in place of all that could be written."""
    needed = {ROOT, Path(sys.prefix), Path(sys.base_prefix), *shown}
    hidden = [path for path in sorted(needed) if any(path.is_relative_to(m) for m in _MASKED)]
    keep, masks = [], []
    for number, path in enumerate(hidden):
        keep += [f"mkdir -p /srv/kept/{number}", f"mount --bind {path} /srv/kept/{number}"]
    for folder in _MASKED:
        kind = "1777" if folder != _MASKED[-1] else "700"
        masks.append(f"mount -t tmpfs -o size={_DISK_MIB}m,mode={kind} {name} {folder}")
    for number, path in enumerate(hidden):
        masks += [
            f"mkdir -p {path}",
            f"mount --bind /srv/kept/{number} {path}",
            f"mount -o remount,bind,ro {path}",
            f"umount /srv/kept/{number}",
        ]
    hosts = "".join(f"{NETWORK}.{number} m{number}\\n" for number in range(1, 100))
    return f"""
set -e
mount --make-rprivate /
mount -t tmpfs -o size={_DISK_MIB}m,mode=755 {name} /srv
mkdir -p {HOME}/.ray {RUNS}
{"; ".join(keep)}
{"; ".join(masks)}
printf '127.0.0.1 localhost\\n{hosts}' > /srv/hosts
mount --bind /srv/hosts /etc/hosts
mount -o remount,bind,ro /
hostname {name}
"""


def _ip(pid: int, *words: str) -> None:
    done = subprocess.run(
        ["nsenter", f"--target={pid}", "--net", "ip", *words],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    if done.returncode:
        raise PermissionError(f"ip {' '.join(words)}: {done.stderr.strip()}")
