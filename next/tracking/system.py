"""System metrics: CPU, memory and GPUs of this machine, under MLflow's own names.

MLflow's monitor logs straight to the server, and what it logs while the server is away is gone;
here the values go through the run's journal like all others. A sample takes about 1 ms of a thread
of its own.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import psutil

_log = logging.getLogger(__name__)

_MEGABYTE = 1e6


class SystemMonitor:
    """Calls ``log`` with ``(metrics, step)`` until :meth:`stop`.

    A value's step is the age of the run in whole seconds, so that runs line up, and a run that
    goes on after a pause goes on to the right.

    Args:
        log: takes the values.
        every: seconds between samples.
        began: when the run began, in seconds since 1970.
    """

    def __init__(
        self, log: Callable[[dict[str, float], int], None], every: float, began: float
    ) -> None:
        self._log = log
        self._every = every
        self._began = began
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._work, name="system-metrics", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Take no more samples; returns when the last one is logged."""
        self._stopping.set()
        self._thread.join()

    def _work(self) -> None:
        process, gpus = psutil.Process(), _Gpus()
        psutil.cpu_percent()  # the first call has nothing to compare with
        process.cpu_percent()
        with gpus:
            while not self._stopping.wait(self._every):
                values = machine_metrics(process) | gpus.metrics()
                named = {f"system/{name}": round(value, 1) for name, value in values.items()}
                self._log(named, int(time.time() - self._began))


def machine_metrics(process: psutil.Process) -> dict[str, float]:
    """CPU and memory of the machine and of one process."""
    memory = psutil.virtual_memory()
    return {
        "cpu_utilization_percentage": psutil.cpu_percent(),
        "system_memory_usage_megabytes": memory.used / _MEGABYTE,
        "system_memory_usage_percentage": memory.percent,
        "process_cpu_percentage": process.cpu_percent(),
        "process_memory_megabytes": process.memory_info().rss / _MEGABYTE,
    }


class _Gpus:
    """NVIDIA's GPUs through its management library; nothing where there is no driver."""

    def __init__(self) -> None:
        self._library: Any = None
        self._devices: list[Any] = []

    def __enter__(self) -> _Gpus:
        try:
            import pynvml
        except ImportError:
            return self
        try:
            pynvml.nvmlInit()
            count = pynvml.nvmlDeviceGetCount()
            self._devices = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(count)]
            self._library = pynvml
        except pynvml.NVMLError as error:
            _log.debug("no GPU metrics: %s", error)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._library is not None:
            with suppress(self._library.NVMLError):
                self._library.nvmlShutdown()

    def metrics(self) -> dict[str, float]:
        """Use and memory of each GPU; a value that the driver does not tell is left out."""
        values: dict[str, float] = {}
        for index, device in enumerate(self._devices):
            with suppress(self._library.NVMLError):
                memory = self._library.nvmlDeviceGetMemoryInfo(device)
                values[f"gpu_{index}_memory_usage_megabytes"] = memory.used / _MEGABYTE
                values[f"gpu_{index}_memory_usage_percentage"] = 100 * memory.used / memory.total
            with suppress(self._library.NVMLError):
                used = self._library.nvmlDeviceGetUtilizationRates(device).gpu
                values[f"gpu_{index}_utilization_percentage"] = float(used)
        return values
