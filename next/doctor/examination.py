"""All checks at once, within a time, and the table of what they found."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

from next.doctor import cluster, machine, services
from next.doctor.finding import Finding, Inquiry

CHECKS: dict[str, Callable[[Inquiry], Finding]] = {
    "versions": machine.versions,
    "ray[default]": machine.ray_default,
    "interpreter": machine.interpreter,
    "ray heads": machine.ray_heads,
    "token": services.token,
    "cluster": services.cluster,
    "head": cluster.head,
    "nodes": cluster.nodes,
    "capacity": cluster.capacity,
    "shared memory": machine.shared_memory,
    "gpu driver": cluster.gpu_driver,
    "storage": cluster.storage,
    "weights": cluster.weights,
    "databases": machine.databases,
    "tracking": services.tracking,
    "clock": services.clock,
    "data": services.data,
    "queries": services.queries,
    "cache": machine.cache,
}
"""Every check by its name, in the order of the table."""

SECONDS = 9.0
"""How long all checks together may take; one that hangs is an error and holds nobody up. On a busy
machine it is a warning, as it may only be slow."""

BUSY = 1.5
"""Load for each core above which a check that does not end may only be slow."""
_MARKS = {"ok": "ok", "warning": "WARN", "error": "ERROR", "skipped": "-"}


def examine(inquiry: Inquiry, seconds: float = SECONDS) -> list[Finding]:
    """What every check found, in the order of :data:`CHECKS`.

    A check that raises, or does not end in time, is an error of its own.
    """
    pool = ThreadPoolExecutor(len(CHECKS))
    running = {name: pool.submit(check, inquiry) for name, check in CHECKS.items()}
    wait(running.values(), timeout=seconds)
    pool.shutdown(wait=False, cancel_futures=True)
    return [_finding(name, future, seconds) for name, future in running.items()]


def table(findings: Sequence[Finding]) -> list[str]:
    """One line for each check, and below it the line that mends it."""
    lines = []
    for finding in findings:
        lines.append(f"{_MARKS[finding.verdict]:<6}{finding.check:<15}{finding.found}")
        if finding.mend:
            lines.append(f"{'':<21}mend: {finding.mend}")
    return lines


def _finding(name: str, future: Future[Finding], seconds: float) -> Finding:
    if not future.done():
        found = f"no answer within {seconds:.0f} s"
        load, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
        if load > BUSY * cores:
            return Finding(
                name,
                "warning",
                f"{found}, on a busy machine (load {load:.0f} on {cores} cores): not known",
                "python jobs/doctor.py ...  # once more when the machine is quiet",
            )
        return Finding(name, "error", f"{found}; what it asks hangs")
    if (error := future.exception()) is not None:
        return Finding(name, "error", f"{type(error).__name__}: {error}")
    return future.result()
