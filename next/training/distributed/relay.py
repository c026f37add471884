"""The key-value channel between a run's driver, Ray's controller and the workers.

The controller loads it before any worker starts, so nothing of it imports the network.
"""

from __future__ import annotations

import json
import logging
import math
import textwrap
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import ray.train
from ray.experimental.internal_kv import (
    _internal_kv_del,
    _internal_kv_exists,
    _internal_kv_get,
    _internal_kv_list,
    _internal_kv_put,
)

from next.stopping import lost_ray
from next.tracking.run import Run, open_run
from next.training.checkpointing.interruption import Request, Requests

_log = logging.getLogger(__name__)

POLL_SECONDS = 0.5
"""Between two looks at the channel."""

_LAST_CALL_SECONDS = 20.0
"""Before a node goes, for its last checkpoint: a step, the copy, writing, clocks that differ."""


class Channel:
    """Between driver, controller and workers: requests to stop one way, log records the other.

    Kept in the head's key-value store, which all of them reach. No result of the run depends on it:
    while the head is away nothing passes, and nobody waits.

    Args:
        name: of the run's keys in that store.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def request_stop(self) -> None:
        """Ask all workers to stop."""
        with suppress(Exception):  # asked again at the next look
            _internal_kv_put(f"{self.name}-stop", b"1")

    def stop_requested(self) -> bool:
        """Whether the workers were asked to stop."""
        return bool(_internal_kv_exists(f"{self.name}-stop"))

    def refuse(self, kind: str, message: str) -> None:
        """Tell whoever starts after this worker that it would come to the same error."""
        with suppress(Exception):  # then it comes to it
            _internal_kv_put(f"{self.name}-refused", json.dumps([kind, message]).encode())

    def refused(self) -> tuple[str, str] | None:
        """Kind and message of the error that a worker before came to."""
        with suppress(Exception):  # the head may be away
            kind, message = json.loads(_internal_kv_get(f"{self.name}-refused") or b"null")
            return kind, message
        return None

    def send_log(self, level: int, message: str) -> None:
        """Send a log record to the driver."""
        record = json.dumps([level, message])
        _internal_kv_put(f"{self.name}-log-{time.time_ns():020d}", record.encode())

    def log_received(self) -> None:
        """Log here the records that were sent since."""
        with suppress(Exception):
            for key in sorted(_internal_kv_list(f"{self.name}-log-")):
                level, message = json.loads(_internal_kv_get(key))
                _internal_kv_del(key)
                _log.log(level, "%s", message)

    @contextmanager
    def logging_received(self) -> Iterator[None]:
        """Log here the records that are sent while the block runs.

        In a thread: a call to a head that is gone takes a minute, and lets no signal through.
        """
        ended = threading.Event()

        def listen() -> None:
            while not ended.wait(POLL_SECONDS):
                self.log_received()

        thread = threading.Thread(target=listen, name="channel-logs", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join(None if lost_ray() is None else 0)

    def close(self) -> None:
        """Log the rest, and delete the channel's keys."""
        self.log_received()
        with suppress(Exception):
            _internal_kv_del(self.name, del_by_prefix=True)


class DrainWatch:
    """Asks for a checkpoint when a node is to be drained, and for another just before it goes.

    Clouds tell minutes ahead. Without the second, what is trained in them would be trained again.

    Args:
        requests: of this worker.
    """

    def __init__(self, requests: Requests) -> None:
        self._requests = requests
        self._seen: ray.train.PreemptionInfo | None = None
        self._again = math.inf

    def check(self, info: ray.train.PreemptionInfo | None, now: float) -> None:
        """Request a checkpoint if there is reason to.

        Args:
            info: of the nodes that are to be drained; None: there are none.
            now: seconds since 1970, as the deadline is told.
        """
        if info is not None and info != self._seen:
            self._seen = info
            last_call = (info.deadline_ms or math.inf) / 1000 - _LAST_CALL_SECONDS
            self._again = last_call if last_call > now else math.inf
            _log.warning("a node of this run is to be drained: writing a checkpoint")
        elif now >= self._again:
            self._again = math.inf
            _log.warning("the node goes in %.0f s: writing a checkpoint", _LAST_CALL_SECONDS)
        else:
            return
        self._requests.make(Request.CHECKPOINT)


@contextmanager
def attached(channel: Channel, requests: Requests | None, *, forwards_logs: bool) -> Iterator[None]:
    """Pass on the driver's request to stop, and request a checkpoint before a node is drained.

    Args:
        channel: to the driver.
        requests: of this worker; None: it has nothing to keep, and only forwards logs.
        forwards_logs: whether this worker's log goes to the driver, and it requests checkpoints.
    """
    from ray.train.v2._internal.execution.context import get_train_context

    # The public `get_preemption_info` is a barrier, which no step could pay for.
    preemption = get_train_context().preemption_context
    ended, buffer, ours = threading.Event(), _Buffer(), logging.getLogger("next")
    watch = None if requests is None else DrainWatch(requests)

    def send() -> None:
        while buffer.records:
            channel.send_log(*buffer.records[0])
            buffer.records.popleft()

    def listen() -> None:
        while not ended.wait(POLL_SECONDS):
            with suppress(Exception):  # the head may be away; the next look may find it
                if requests is not None and channel.stop_requested():
                    requests.make(Request.STOP)
                send()
            if forwards_logs and watch is not None:  # one worker for all: else each has one written
                watch.check(preemption.preemption_info, time.time())

    thread = threading.Thread(target=listen, name="listening", daemon=True)
    if forwards_logs:
        ours.setLevel(logging.INFO)
        ours.addHandler(buffer)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(POLL_SECONDS)
        ours.removeHandler(buffer)
        if not thread.is_alive():  # else it is sending, and both would send the same record
            with suppress(Exception):
                send()


class JournalWriter(ray.train.UserCallback):
    """Writes what rank 0 reports into the run's journal; lives in Ray's controller, on this node.

    A journal that is opened again knows what it holds, so what workers that were started again
    repeat is not logged twice.
    """

    def __init__(self, tracked: dict[str, Any], channel: Channel) -> None:
        self._tracked = tracked
        self._channel = channel
        self._run: Run | None = None

    def after_report(
        self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any
    ) -> None:
        report = metrics[0]
        if report["first"]:
            self._close("FINISHED")
        if self._run is None:
            self._run = open_run(**self._tracked)
        for step, values in report["rows"]:
            self._run.log_metrics(values, step=step)
        with suppress(OSError):  # before the next checkpoint, which knows nothing of these rows
            self._run.publish()
        if report["last"]:
            self._close("FINISHED")

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        self._close("FAILED")
        for rank, error in sorted(worker_exceptions.items()):
            with suppress(Exception):
                said = (str(error).strip() or repr(error)).splitlines()[-1]
                self._channel.send_log(
                    logging.WARNING, f"worker {rank} ended: {textwrap.shorten(said, 160)}"
                )

    def _close(self, status: Any) -> None:
        if self._run is not None:
            self._run.close(status)
            self._run = None


class _Buffer(logging.Handler):
    """Keeps what this process logs until it is sent; a step waits for no network."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.records: deque[tuple[int, str]] = deque(maxlen=1000)

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append((record.levelno, record.getMessage()))
