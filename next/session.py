"""Ray's processes that this one starts: whose signals they leave alone, their death, their rests.

Ray's own handling of SIGTERM ends a driver by an abort with pages of stack, its errors bring pages
of the raylet's state, and a driver whose head is gone waits for a minute before it ends without a
word. So a process that starts Ray keeps its own handlers, gets one line of each of Ray's errors,
and is interrupted at once when one of Ray's processes has ended. Where it is within a call to a
process that is gone, nothing interrupts it, and it is ended from beside.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import select
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import ray
import ray._private.auto_init_hook
import ray._private.utils
import ray._private.worker

from next.lease import Holder
from next.stopping import kept, lose_ray, lost_ray
from next.storage import write_whole

_log = logging.getLogger(__name__)

_WATCHED = {"raylet": "raylet", "gcs_server": "GCS"}
_LOOK_SECONDS = 0.5
_HEAR_SECONDS, _UNWIND_SECONDS = 10.0, 35.0
"""How long the main thread may take to hear that Ray is lost, and from then on to its end. Ray's
own abort comes after 60 s."""
_FAILURE = 1
_OWNER = "next-owner.json"
"""File in a session's folder that names the process that it belongs to."""
_watch: _Watch | None = None


@contextmanager
def beginning() -> Iterator[None]:
    """Start Ray within the block, by ``ray.init``; :func:`end_ray` ends it."""
    global _watch
    theirs = ray._private.utils.set_sigterm_handler
    if callable(signal.getsignal(signal.SIGTERM)):
        ray._private.utils.set_sigterm_handler = lambda handler: None
    try:
        yield
    finally:
        ray._private.utils.set_sigterm_handler = theirs
        _heed_signals()
    ray._private.worker.print_to_stdstream = _say
    node = ray._private.worker._global_node
    if node is not None and node.is_head():  # else somebody else's, who looks after it
        session = Path(node.get_session_dir_path())
        write_whole(session / _OWNER, json.dumps(asdict(Holder.this_process())))
        clear_sessions(session.parent)
        if threading.current_thread() is threading.main_thread():
            _watch = _Watch(node)


def end_ray() -> None:
    """``ray.shutdown``; from then on this process's own handlers of signals count again.

    Where one of Ray's processes has ended already, the others are ended without asking them.
    """
    global _watch
    if _watch is not None:
        _watch.stop()
    if _watch is not None and lost_ray() is not None:
        _watch.node.kill_all_processes(check_alive=False, allow_graceful=False)
        return
    _watch = None
    ray.shutdown()
    _heed_signals()


def clear_sessions(folder: Path) -> None:
    """Remove the folders of sessions that this program started and whose processes are all gone.

    Args:
        folder: of all sessions, such as ``/tmp/ray``.
    """
    for record in folder.glob(f"session_*/{_OWNER}"):
        try:
            gone = Holder(**json.loads(record.read_text(encoding="utf-8"))).is_gone()
        except (OSError, TypeError, ValueError):
            continue
        if gone and not _is_used(record.parent.name):
            shutil.rmtree(record.parent, ignore_errors=True)
            _log.info("removed what an earlier Ray of this project left: %s", record.parent)


def _is_used(session: str) -> bool:
    for process in psutil.process_iter(["cmdline"]):
        if any(session in word for word in process.info["cmdline"] or ()):
            return True
    return False


def _heed_signals() -> None:
    """Put this process's handler of SIGTERM back: Ray replaces it, and clears it at its end."""
    handler = signal.getsignal(signal.SIGTERM)
    if callable(handler) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def _say(data: dict[str, Any], **_: Any) -> None:
    """In place of ``print_to_stdstream``: the first line of what Ray tells its driver."""
    first = str(data["lines"][0]).strip().partition("\n")[0]
    told = _watch is not None and first.startswith("Raylet is terminated")
    _log.log(logging.DEBUG if told else logging.WARNING, "Ray: %s", first[:300])


class _Watch:
    """Interrupts the main thread when one of Ray's processes has ended.

    Args:
        node: Ray's, of this process.
    """

    def __init__(self, node: Any) -> None:
        self.node = node
        self._heard = threading.Event()
        self._ended, self._end = os.pipe()
        self._before = signal.signal(signal.SIGUSR2, self._raise)
        atexit.register(self._say_end)  # before Ray's own, which ends its processes
        self._thread = threading.Thread(target=self._look, name="ray-watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Look no more, unless Ray is lost: then it sees to the end."""
        self._say_end()
        if lost_ray() is not None:
            return
        self._thread.join()
        with suppress(ValueError):  # in another thread
            signal.signal(signal.SIGUSR2, self._before)
        atexit.unregister(self._say_end)

    def _say_end(self) -> None:
        with suppress(OSError):  # it has been read
            os.close(self._end)

    def _look(self) -> None:
        with ExitStack() as opened:
            opened.callback(os.close, self._ended)
            poll = select.poll()
            poll.register(self._ended)
            for _, process in self.node.live_processes():
                with suppress(AttributeError, OSError):  # no such files here, or it ends now
                    process_end = os.pidfd_open(process.pid)
                    opened.callback(os.close, process_end)
                    poll.register(process_end)
            self._look_whenever(poll)

    def _look_whenever(self, poll: select.poll) -> None:
        """At once: what Ray does next without a raylet may end this process without a word."""
        while True:
            woken = [file for file, _ in poll.poll(1000 * _LOOK_SECONDS)]
            if self._ended in woken or not ray.is_initialized():
                return
            for kind, process in self.node.dead_processes():
                if kind in _WATCHED and ray.is_initialized():  # else somebody ends it now
                    lose_ray(
                        f"Ray's {_WATCHED[kind]} (process {process.pid}) was ended from outside or "
                        f"died ({_how(process.returncode)})"
                    )
                    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR2)
                    self._see_to_the_end()
                    return
            for file in woken:  # another process of Ray, which it does without
                poll.unregister(file)

    def _see_to_the_end(self) -> None:
        """End this process where it does not end by itself."""
        if self._heard.wait(_HEAR_SECONDS):
            time.sleep(_UNWIND_SECONDS)
        said = kept()
        if said is None:  # it has come to its end, or Ray is used by something else than a job
            return
        with suppress(Exception):
            self.node.kill_all_processes(check_alive=False, allow_graceful=False)
        sys.stderr.write(f"error: {lost_ray()}; {said}\n")
        sys.stderr.flush()
        os._exit(_FAILURE)

    def _raise(self, number: int, frame: object) -> None:
        # Whoever asks Ray from now on, as Tune does when it clears up, hears so at once; the head
        # that is gone would be waited for. Nor is another Ray started for it.
        ray._private.auto_init_hook.enable_auto_connect = False
        ray._private.worker.global_worker.set_is_connected(False)
        self._heard.set()
        raise KeyboardInterrupt


def _how(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"
