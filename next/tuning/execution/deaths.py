"""How processes of trials die, and what is said of it."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from ray import cloudpickle
from ray.exceptions import (
    ActorUnavailableError,
    NodeDiedError,
    OwnerDiedError,
    RayActorError,
    RayTaskError,
    WorkerCrashedError,
)

_NODE_DIED = "The actor died because its node has died"


class LostProcessError(RuntimeError):
    """A process that a trial needs has died; the trial goes on from its last checkpoint.

    Ray's own errors of this cannot be raised once more: they cannot be pickled.

    Args:
        how: it died.
        machine: whether it died with its machine.
        node: id of a machine that cannot be used; None: the machine is not to blame.
    """

    def __init__(self, how: str, machine: bool, node: str | None = None) -> None:
        super().__init__(how, machine, node)
        self.machine = machine
        self.node = node

    def __str__(self) -> str:
        return str(self.args[0])

    @classmethod
    def of(cls, error: Exception) -> LostProcessError | None:
        """From an error of Ray; None: of something else."""
        if isinstance(error, (RayActorError, NodeDiedError, WorkerCrashedError, OwnerDiedError)):
            return cls(how_it_died(error), is_lost_machine(error))
        return None


def error_of(trial: Any) -> Any:
    """What ended the process of one of Tune's trials: the error or its text; None: not known.

    Tune writes both on the driver's disk, before it tells the scheduler. Its ``get_error`` looks
    where they are copied to now and then. Errors of dead actors come back without their cause.
    """
    error: Any = None
    with suppress(Exception):  # it could not be pickled, or was written in part
        error = cloudpickle.loads(Path(trial.pickled_error_file).read_bytes())
    if isinstance(error, (RayTaskError, ActorUnavailableError)):
        return error
    with suppress(OSError, TypeError):
        return Path(trial.error_file).read_text(encoding="utf-8", errors="replace")
    return error


def unfit_node(error: Any) -> str | None:
    """Id of the machine that a trial cannot be trained on; None: that is not what ended it."""
    cause = _cause(error)
    return cause.node if isinstance(cause, LostProcessError) else None


def is_lost_machine(error: Any) -> bool:
    """Whether a trial's process died because its machine was lost, taken away, or cut off."""
    cause = _cause(error)
    if isinstance(cause, str):
        return _NODE_DIED in cause
    if isinstance(cause, LostProcessError):
        return cause.machine
    if isinstance(cause, (ActorUnavailableError, NodeDiedError)):  # cut off, or gone
        return True
    return isinstance(cause, RayActorError) and (cause.preempted or _NODE_DIED in str(cause))


def how_it_died(error: Any) -> str:
    """One line on why a trial's process ended, from Tune's error."""
    if isinstance(cause := _cause(error), LostProcessError):
        return str(cause.args[0])
    if is_lost_machine(error):
        return f"killed: its machine{_address(str(error))} was lost"
    text = str(error or "")
    memory = any(word in text for word in ("OutOfMemory", "running low on memory", "OOM"))
    last = first_line(text, "OutOfMemory" if memory else "Error") or first_line(text, "because")
    return f"{'out of memory' if memory else 'killed'}: {last or 'its process ended'}"


def _address(text: str) -> str:
    """`` 10.0.0.3``, from what Ray says of a dead actor; nothing where it does not say it."""
    line = first_line(text, "ip: ")
    return f" {line.removeprefix('ip: ')}" if line else ""


def _cause(error: Any) -> Any:
    return error.cause if isinstance(error, RayTaskError) else error


def first_line(text: str, word: str) -> str:
    """The first line of ``text`` that holds ``word``, at most 300 characters of it."""
    return [*[line.strip() for line in text.splitlines() if word in line], ""][0][:300]
