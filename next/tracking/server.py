"""One local MLflow server for a folder, started by the driver and shared by who needs it.

The server is a process group of its own (:mod:`next.tracking.serve`), so that Ctrl-C reaches the
driver alone, which then still has a server to log its end to. One that is killed is started again,
at its address, by whoever needs it, as long as they do. It lives as long as somebody needs it:
whoever starts or reuses it holds a shared ``flock`` on ``server.lease``, the server looks twice
a second whether that is gone, and ends. The kernel drops the lock with the process, so a driver
that is killed takes its server along; ``atexit`` would miss a kill, and ``PR_SET_PDEATHSIG`` fires
when the *thread* that started the server ends and cannot serve two drivers.

``python -m next.tracking.server FOLDER`` serves a folder until Ctrl-C, to look at old runs.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import logging
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import zlib
from contextlib import suppress
from pathlib import Path

import psutil
from filelock import FileLock

from next.storage import write_whole
from next.tracking.delivery.presence import note_start

_log = logging.getLogger(__name__)

_HOST = "127.0.0.1"
_PORTS = range(20_000, 32_000)
"""Above Ray's own, and below those that the kernel gives to outgoing connections: one of these
could hold our port just when the server starts again."""
_PROGRESS_SECONDS = 5.0
_STOP_SECONDS = 10.0
_PORT_SECONDS = 3.0
_TAIL_LINES = 20
_WATCH_SECONDS = 1.0
_STARTS = 5
"""How often a server that ends is started again."""
_children: list[subprocess.Popen[bytes]] = []
"""Servers that this process started; one may outlive its share, while another process needs it."""


class TrackingServer:
    """A share in the local server of a folder; :func:`start_server` gives it out."""

    def __init__(
        self, folder: Path, port: int, pid: int, lease: int, child: subprocess.Popen[bytes] | None
    ) -> None:
        self.folder = folder
        self.uri = f"http://{_HOST}:{port}"
        """Address for this machine's processes."""
        self.pid = pid
        """The serving process, which leads its own process group."""
        self._port = port
        self._lease: int | None = lease
        self._child = child
        self._closing = threading.Event()
        self._watch = threading.Thread(target=self._keep, name="mlflow-watch", daemon=True)

    def wait(self, timeout: float = 120.0) -> TrackingServer:
        """Return when the server answers; progress is logged.

        Args:
            timeout: seconds.

        Raises:
            RuntimeError: the server ended or did not answer in time; the message ends with the
                last lines of its log.
        """
        started = reported = time.monotonic()
        while not _answers(self.uri):
            waited = time.monotonic() - started
            if not _is_running(self.pid):
                raise RuntimeError(
                    f"the MLflow server of {self.folder} ended while it started{self._log_tail()}"
                )
            if waited > timeout:
                raise RuntimeError(
                    f"the MLflow server of {self.folder} must answer at {self.uri} within "
                    f"{timeout:.0f} s, but it does not; end process {self.pid} and try "
                    f"again{self._log_tail()}"
                )
            if time.monotonic() - reported > _PROGRESS_SECONDS:
                reported = time.monotonic()
                _log.info("MLflow is starting, %.0f s so far (usually 5 to 15)", waited)
            time.sleep(0.1)
        return self

    def close(self) -> None:
        """Give the share back; the last one ends the server and waits for its end."""
        if self._lease is None:
            return
        self._closing.set()
        if self._watch.is_alive():
            self._watch.join()
        if self._child is not None and self._child.poll() is not None:
            _log.warning("the MLflow server of %s had ended%s", self.folder, self._log_tail())
        with _start_lock(self.folder):
            fcntl.flock(self._lease, fcntl.LOCK_UN)  # a forked child would else keep it
            os.close(self._lease)
            self._lease = None
            last = os.open(self.folder / "server.lease", os.O_RDWR)
            try:
                fcntl.flock(last, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                _log.debug("another process still needs the server of %s", self.folder)
            else:
                _end_server(self.folder)
            finally:
                os.close(last)

    def watch(self) -> None:
        """Start it again from now on where it ends."""
        self._watch.start()

    def __enter__(self) -> TrackingServer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _keep(self) -> None:
        """Start the server again where it has ended, until this share is given back.

        One that ended by itself and never served would not do so the next time either.
        """
        starts, served = 0, False
        while not self._closing.wait(_WATCH_SECONDS):
            if _is_running(self.pid):
                served = served or _answers(self.uri)
                continue
            tail = self._log_tail()
            killed = self._child is not None and (self._child.poll() or 0) < 0
            if starts == _STARTS or not (served or killed):
                _log.warning(
                    "the MLflow server of %s has ended, after %d starts, and is not started again; "
                    "what runs log meanwhile waits in their journals%s",
                    *(self.folder, starts + 1, tail),
                )
                return
            starts += 1
            try:
                with _start_lock(self.folder):
                    pid = _running_pid(self.folder)
                    if pid is None:  # nobody else was quicker
                        note_start(self.uri)
                        self._child = _launch(self.folder, self._port)
                        pid = self._child.pid
                    self.pid = pid
            except (OSError, RuntimeError, ValueError) as error:
                _log.warning(
                    "the MLflow server of %s has ended and cannot be started again (%s); what "
                    "runs log meanwhile waits in their journals%s",
                    *(self.folder, error, tail),
                )
                return
            _log.warning(
                "the MLflow server of %s had ended, and was started again; nothing is lost%s",
                *(self.folder, tail),
            )

    def _log_tail(self) -> str:
        path = self.folder / "server.log"
        lines = (
            path.read_text(errors="replace", encoding="utf-8").splitlines() if path.exists() else []
        )
        if not lines:
            return ""
        return f"; the end of {path}:\n" + "\n".join(lines[-_TAIL_LINES:])


def start_server(folder: str | Path, *, wait: bool = True, port: int = 0) -> TrackingServer:
    """Start the MLflow server of a folder, or share the one that already serves it.

    The store is ``<folder>/mlflow.db``, artifacts are under ``<folder>/mlartifacts``, the log is
    ``<folder>/server.log``. A lock makes the start, and with it the creation of the store, happen
    once, however many drivers begin together.

    Args:
        folder: created if it is not there.
        wait: return only when the server answers. Without, it starts beside the caller's other
            work (runs may be opened meanwhile; their records wait), and
            :meth:`TrackingServer.wait` is for later.
        port: 0 takes the port of the last time, so that addresses stay good; the first time one
            that follows from the folder's name; the next free one if it is taken.

    Raises:
        RuntimeError: the server does not come up; the message ends with its log.
        ValueError: the port is taken.
    """
    folder = Path(folder).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    lease = os.open(folder / "server.lease", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lease, fcntl.LOCK_SH)
        with _start_lock(folder):
            server = _running_server(folder, lease)
            if server is None:
                child = _launch(folder, port)
                at = int(_read_state(folder)["port"])
                server = TrackingServer(folder, at, child.pid, lease, child)
            server.watch()
    except BaseException:
        os.close(lease)
        raise
    if wait:
        try:
            server.wait()
        except BaseException:
            server.close()
            raise
    return server


def view_command(folder: str | Path) -> str:
    """The shell command that opens a folder's runs again after the driver has ended."""
    command = [sys.executable, "-m", "next.tracking.server", str(Path(folder).absolute())]
    return shlex.join(command)


def replay_command(folder: str | Path, uri: str) -> str:
    """The shell command that completes a run's journal on the server of ``uri``.

    A local server ends with its driver, so the command starts it again.
    """
    folder = Path(folder).absolute()
    stores = [parent / "mlflow" for parent in folder.parents]
    local = [store for store in stores if uri == f"http://{_HOST}:{_read_state(store).get('port')}"]
    server = ["--local", str(local[0])] if local else ["--uri", uri]
    return shlex.join([sys.executable, "-m", "next.tracking.replay", str(folder), *server])


def _running_server(folder: Path, lease: int) -> TrackingServer | None:
    pid = _running_pid(folder)
    if pid is None:
        return None
    _log.info("MLflow already serves %s", folder)
    return TrackingServer(folder, int(_read_state(folder)["port"]), pid, lease, None)


def _running_pid(folder: Path) -> int | None:
    state = _read_state(folder)
    pid = int(state.get("pid", 0))
    return pid if pid and _is_running(pid, state.get("started")) else None


def _launch(folder: Path, port: int) -> subprocess.Popen[bytes]:
    """Start the process; ``server.json`` says where it listens."""
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    with _bind(port, int(_read_state(folder).get("port", 0)), folder) as listener:
        with (folder / "server.log").open("wb") as output:
            child = subprocess.Popen(
                [
                    *(sys.executable, "-P", "-m", "next.tracking.serve"),
                    *(str(folder), str(listener.fileno())),
                ],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=[listener.fileno()],
                start_new_session=True,
                cwd=folder,
                env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            )
        port = listener.getsockname()[1]
    _children.append(child)
    state = {"pid": child.pid, "port": port, "started": psutil.Process(child.pid).create_time()}
    write_whole(folder / "server.json", json.dumps(state))
    _log.info("MLflow is starting for %s", folder)
    return child


def _bind(port: int, last_time: int, folder: Path) -> socket.socket:
    """A bound socket; a server that starts again needs its port, since workers know the address."""
    wanted, deadline = port or last_time, time.monotonic() + _PORT_SECONDS
    while wanted and time.monotonic() < deadline:
        if (listener := _try_bind(wanted)) is not None:
            return listener
        time.sleep(0.05)  # a killed server's threads hold its port until the last of them is gone
    if port:
        raise ValueError(f"port {port} must be free, but another process has it; give another")
    own = zlib.crc32(str(folder).encode())
    for number in range(len(_PORTS)):
        if (listener := _try_bind(_PORTS[(own + number) % len(_PORTS)])) is not None:
            return listener
    raise RuntimeError(f"no port of {_PORTS} is free on {_HOST}; end some processes")


def _try_bind(port: int) -> socket.socket | None:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((_HOST, port))
        listener.listen(128)  # the port is ours now, and who connects waits for the server
    except OSError:
        listener.close()
        return None
    return listener


def _read_state(folder: Path) -> dict[str, float]:
    try:
        return dict(json.loads((folder / "server.json").read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError):
        return {}


def _start_lock(folder: Path) -> FileLock:
    return FileLock(folder / "server.lock", timeout=60)


def _is_running(pid: int, started: float | None = None) -> bool:
    """Whether the process lives, and (its number may be reused) is the one that we mean."""
    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and (
            started is None or abs(process.create_time() - started) < 1
        )
    except psutil.NoSuchProcess:
        return False


def _is_stopped(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_STOPPED)
    except psutil.NoSuchProcess:
        return False


def _answers(uri: str) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{uri}/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False


def _end_server(folder: Path) -> None:
    """End the server of a folder, which may be a later one than the caller's own."""
    state = _read_state(folder)
    pid, started = int(state.get("pid", 0)), state.get("started")
    # One that was stopped (SIGSTOP) heeds no SIGTERM.
    for number in (signal.SIGTERM, signal.SIGKILL)[_is_stopped(pid) :]:
        deadline = time.monotonic() + _STOP_SECONDS
        with suppress(ProcessLookupError):
            if pid and _is_running(pid, started):
                os.killpg(pid, number)
        while pid and _is_running(pid, started) and time.monotonic() < deadline:
            time.sleep(0.02)
    _children[:] = [child for child in _children if child.poll() is None]  # reaps, too


def _main() -> None:
    parser = argparse.ArgumentParser(description="Serve a folder of runs until Ctrl-C.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int, default=0, help="default: as the last time")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if not (arguments.folder / "mlflow.db").exists():
        parser.error(f"{arguments.folder} holds no mlflow.db; give the folder that a run wrote")
    with start_server(arguments.folder, port=arguments.port) as server, suppress(KeyboardInterrupt):
        _log.info("open %s (Ctrl-C ends it)", server.uri)
        signal.pause()


if __name__ == "__main__":
    _main()
