"""Processes that are forked from one which has done their imports: at once, and sharing its memory.

What a trial needs (torch above all) takes some 7 s of a core to import, and 600 MiB. One server on
each node imports it; a process that was forked from it takes only what it writes itself. It is the
idea of the standard library's ``forkserver``, for processes that several actors of Ray ask for: an
actor's own would share nothing with those of the others. Nothing here imports torch.
"""

from __future__ import annotations

import gc
import hashlib
import importlib
import importlib.util
import os
import select
import socket
import subprocess
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

import psutil
from filelock import FileLock

from next.temporary import own_temporary
from next.training.checkpointing.interruption import Request, Requests

Report = Callable[[dict[str, Any]], None]

_IMPORTS_SECONDS = 180.0
"""How long a server may take to be there."""
_FIRST_SECONDS, _IDLE_SECONDS = 120.0, 5.0
"""How long a server stays without a child: before the first one, and after the last one."""
_LOOK_SECONDS = 1.0
_GO_ON, _END = "go on", "end"
_started: list[subprocess.Popen[bytes]] = []
"""Servers of this process that may still run; each is waited for once it has ended."""
_ALLOCATION = "oversize_threshold:0,dirty_decay_ms:-1"
"""jemalloc keeps what a step frees: to return it, and fault it in again, took a tenth of a run."""


class ForkedProcessError(RuntimeError):
    """A forked process ended before it answered."""


class Forked:
    """A process of this node's server, which ends with the process that asked for it.

    It has the environment, the folder and the output of who asked.

    Args:
        key: of the server; it is started if there is none.
        target: ``module:function`` that :meth:`run` calls.

    Raises:
        RuntimeError: the server does not start; with what it wrote.
    """

    def __init__(self, key: str, target: str) -> None:
        for attempt in range(3):  # a server that ends now may still take a call, and not answer
            try:
                self._open(_server(key, target))
                return
            except (EOFError, OSError):
                if attempt == 2:
                    raise

    def _open(self, server: socket.socket) -> None:
        self._asks, heard = socket.socketpair()
        with server, heard:
            socket.send_fds(server, [b"o"], [1, 2, heard.fileno()])
            self._link = Connection(server.detach())
        self._link.send((dict(os.environ), str(Path.cwd())))
        self.pid: int = self._link.recv()

    def run(self, arguments: dict[str, Any], report: Report) -> Any:
        """Call the target there with ``arguments``, and with a ``report`` that calls this one.

        Its ``requests`` are those that :meth:`ask` makes.

        ``SystemExit`` of ``report`` is raised there too; else it would go on.

        Raises:
            ForkedProcessError: the process was killed, or raised.
        """
        try:
            self._link.send(arguments)
            while True:
                kind, content = self._link.recv()
                if kind == "done":
                    return content
                try:
                    report(content)
                except SystemExit:
                    self._link.send(_END)
                else:
                    self._link.send(_GO_ON)
        except (EOFError, OSError):
            self.close()
            raise ForkedProcessError(
                f"process {self.pid}, which trained the trial, ended. The system may have "
                f"killed it because memory ran out; otherwise its output says why"
            ) from None

    def ask(self, request: Request) -> None:
        """Make a request of the call that runs there, from any thread."""
        with suppress(OSError):  # it has ended
            self._asks.send(bytes([request]))

    def close(self) -> None:
        """Let it end."""
        self._link.close()
        self._asks.close()


@contextmanager
def forking(target: str, *, here: bool = True) -> Iterator[str]:
    """A server on this node for as long as the block runs; gives the key by which it is found.

    It imports while the block goes on. With that key, :class:`Forked` starts one on other nodes,
    which ends five seconds after its last child.

    Args:
        target: ``module:function``; the module is imported before anything is forked.
        here: whether this node forks; the head of a cluster often has no room for a trial.
    """
    key = uuid.uuid4().hex
    if not here:
        yield key
        return
    process = _start(key, target)
    try:
        yield key
    finally:
        process.terminate()
        process.wait()
        _clear(_address(key))


def _start(key: str, target: str) -> subprocess.Popen[bytes]:
    address = _address(key)
    paths = [path for path in sys.path if path]
    environment = {"MALLOC_ARENA_MAX": "1"} | os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    allocator = _allocator()
    if allocator is not None:
        environment = {"LD_PRELOAD": str(allocator), "MALLOC_CONF": _ALLOCATION} | environment
    with _output(key).open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(address), target],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,  # an interrupt at the terminal is for the driver
        )
    Path(f"{address}.pid").write_text(str(process.pid), encoding="utf-8")
    _started[:] = [each for each in _started if each.poll() is None] + [process]
    return process


def _server(key: str, target: str) -> socket.socket:
    """Connected to this node's server."""
    address = _address(key)
    process: subprocess.Popen[bytes] | None = None
    with FileLock(f"{address}.lock", timeout=2 * _IMPORTS_SECONDS):
        deadline = time.monotonic() + _IMPORTS_SECONDS
        while time.monotonic() < deadline:
            server = socket.socket(socket.AF_UNIX)
            try:
                server.connect(str(address))
                return server
            except OSError:  # not there, or of a server that was killed
                server.close()
            if process is None and not _starting(address):
                process = _start(key, target)
            elif process is not None and process.poll() is not None:
                break
            time.sleep(0.02)
    raise RuntimeError(
        f"the server that trials are forked from did not start; it wrote:\n"
        f"{_output(key).read_text(errors='replace', encoding='utf-8')[-3000:]}"
    )


def _starting(address: Path) -> bool:
    """Whether a server is about to listen here; the driver starts that of its node beforehand."""
    try:
        words = psutil.Process(int(Path(f"{address}.pid").read_text(encoding="utf-8"))).cmdline()
        return not words or str(address) in words  # none yet, while its program is loaded
    except (OSError, ValueError, psutil.Error):
        return False


def _address(key: str) -> Path:
    """Of the server's socket, in a folder that only this user may enter."""
    name = hashlib.sha256(f"{sys.executable} {key}".encode()).hexdigest()[:16]
    return own_temporary("next-forkserver") / name


def _output(key: str) -> Path:
    return Path(f"{_address(key)}.log")


def _allocator() -> Path | None:
    """The jemalloc that Ray brings along.

    Over blocks of a step's many sizes glibc's heap grows: a run of the demo's took 380 to 400 MiB
    beyond its imports, with jemalloc 217, and a tenth less time.
    """
    found = importlib.util.find_spec("ray")
    if found is None or found.origin is None:
        return None
    path = Path(found.origin).parent / "core" / "libjemalloc.so"
    return path if path.is_file() else None


def serve(address: Path, target: str) -> None:
    """Import ``target`` and fork a process for each that connects, until none is left."""
    module, _, name = target.partition(":")
    function = getattr(importlib.import_module(module), name)
    if threading.active_count() > 1:
        raise RuntimeError(f"{module} starts threads when it is imported, which do not survive")
    gc.collect()
    gc.freeze()  # a collection would write into every object, and so unshare its page
    draft = Path(f"{address}.draft")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(draft))
        listener.listen(64)
        draft.rename(address)  # who finds the address may connect
        listener.settimeout(_LOOK_SECONDS)
        children, stays_until = 0, time.monotonic() + _FIRST_SECONDS
        while children or time.monotonic() < stays_until:
            with suppress(TimeoutError):
                connection, _ = listener.accept()
                with connection:
                    if os.fork() == 0:
                        listener.close()
                        _live(connection, function)
                children += 1
            while children and os.waitpid(-1, os.WNOHANG)[0]:
                children -= 1
                stays_until = time.monotonic() + _IDLE_SECONDS
        _clear(address)


def _clear(address: Path) -> None:
    for suffix in (".pid", ".log", ".lock", ""):  # the address last: then another may be started
        Path(f"{address}{suffix}").unlink(missing_ok=True)


def _live(asker: socket.socket, function: Callable[..., Any]) -> NoReturn:
    """The life of a forked process."""
    code = 1
    try:
        *outputs, asks = socket.recv_fds(asker, 1, 3)[1]
        for own, given in zip((1, 2), outputs, strict=True):
            os.dup2(given, own)
            os.close(given)
        with closing(Connection(asker.detach())) as link:
            environment, folder = link.recv()
            os.environ.clear()
            os.environ.update(environment)
            os.chdir(folder)
            threading.Thread(target=_end_with, args=(link.fileno(),), daemon=True).start()
            requests = Requests()
            threading.Thread(target=_hear, args=(asks, requests), daemon=True).start()
            link.send(os.getpid())
            _answer(link, function, requests)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # what the server has at its exit is not this process's to end


def _answer(link: Connection, function: Callable[..., Any], requests: Requests) -> None:
    def report(content: dict[str, Any]) -> None:
        link.send(("report", content))
        if link.recv() == _END:
            raise SystemExit

    while True:
        try:
            arguments = link.recv()
        except EOFError:
            return
        link.send(("done", function(**arguments, report=report, requests=requests)))


def _hear(asks: int, requests: Requests) -> None:
    while asked := os.read(asks, 1):
        requests.make(Request(asked[0]))


def _end_with(descriptor: int) -> None:
    """End this process when the other end of its link is gone."""
    hangs_up = select.poll()
    hangs_up.register(descriptor, 0)  # asks for nothing: a hang-up is always told
    while not hangs_up.poll():
        pass
    os._exit(1)


if __name__ == "__main__":
    serve(Path(sys.argv[1]), sys.argv[2])
