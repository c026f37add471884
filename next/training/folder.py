"""The folder of a run, which one command makes and the same command continues. Imports no torch."""

from __future__ import annotations

import itertools
import logging
import os
import re
import signal
import time
import tomllib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from next.config import (
    FORMER_DEFAULTS,
    RunConfig,
    differences,
    flatten,
    from_toml,
    override,
    predated,
    read_written,
    to_toml,
)
from next.lease import Lease
from next.stopping import LostRayError, Stopped, keeping, lost_ray
from next.storage import open_folder, write_whole
from next.training.checkpointing.interruption import Interrupted

_log = logging.getLogger(__name__)

DATA = "data.toml"
"""File in a run's folder that names its data."""
_FIRST_LINES = 100
MAY_CHANGE = (
    "run.", "tracking.", "scaling.", "checkpoint.", "threads", "keep_memory", "data.cache",
    "data.uri", "model.backbone.file", "model.backbone.text_file",
)  # fmt: skip
"""Settings that a resumed run may change: they decide where and how, not what is computed. With
``data.placement = sharded`` the number of workers decides which batches there are."""


def run_folder(config: RunConfig) -> Path | None:
    """The folder of the run that ``config`` would continue; None: it begins a new one."""
    if config.run.name is None or config.run.fresh:
        return None
    return (Path(config.run.storage_path) / config.run.name).absolute()


def as_begun(config: RunConfig, record: Path) -> RunConfig:
    """The settings with which a run goes on that an older version began.

    A setting that its record predates gets the value that the older version behaved like, and one
    whose default that version wrote down gets that, unless ``config`` sets it to something else
    than the default (which :func:`claim_folder` refuses).

    Args:
        config: settings of the command that continues the run.
        record: ``config.toml`` of the run or of one of its checkpoints; may not exist.
    """
    if not record.is_file():
        return config
    default, now = dict(flatten(RunConfig())), dict(flatten(config))
    written = read_written(record)
    older = predated(written)
    if older:
        told = dict(flatten(from_toml(written)))
        older |= {name: value for name, value in FORMER_DEFAULTS.items() if told[name] == value}
    older = {name: value for name, value in older.items() if now[name] == default[name]}
    if older:
        listed = ", ".join(f"{name} = {value}" for name, value in older.items())
        _log.info("%s is of an older version; going on as that did: %s", record, listed)
    return override(config, older)


def own_folder(config: RunConfig, *, prefix: str = "run") -> Path:
    """The folder of the run's name, or of a name by the time; nothing is made."""
    name = config.run.name or time.strftime(f"{prefix}-%Y%m%d-%H%M%S")
    return (Path(config.run.storage_path) / name).absolute()


@contextmanager
def holding(folder: Path, store: str | None = None) -> Iterator[None]:
    """Hold a run for this process, on this machine and in its store.

    Args:
        folder: of the run.
        store: address of the run's store; None: it has none.

    Raises:
        ValueError: another process is at work on it; who, and since when.
        OSError: its place cannot be reached or written.
    """
    places = [open_folder(folder), *([] if store is None else [open_folder(store)])]
    with ExitStack() as stack:
        for place in places:
            stack.enter_context(Lease(place, f"run {folder.name}", on_lost=_stop_this_process))
        yield


@contextmanager
def going_on(config: RunConfig, folder: Path) -> Iterator[None]:
    """Tell of a run that is stopped what is kept, and which command goes on with it."""
    change = [] if config.run.name else [f"with --run.name {folder.name}"]
    change += ["without --run.fresh"] if config.run.fresh else []
    how = " ".join(["the same command", " and ".join(change)]).strip() + " continues there"
    kept = f"the checkpoints of run {folder.name} are kept in {folder}"
    try:
        with keeping(f"{kept}, and {how}"):
            yield
    except Interrupted as stopped:
        raise Interrupted(stopped.step, how) from None
    except (Exception, KeyboardInterrupt) as error:
        if (lost := lost_ray()) is not None:  # whatever came of it
            raise LostRayError(f"{lost}; {kept}, and {how}") from None
        if isinstance(error, KeyboardInterrupt):
            raise Stopped(f"stopped; {kept}, and {how}") from None
        raise


def _stop_this_process() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


class Claim(NamedTuple):
    """A run's folder that may be written, and is not yet."""

    folder: Path
    config: RunConfig
    digest: str | None
    """Of the data; None: not known."""
    left_out: tuple[str, ...]
    """Settings that the record lacks, and goes on lacking: so the same command continues the run
    once more."""

    def take(self) -> Path:
        """Make the folder, or go on in it; ``run.fresh`` sets an old one aside."""
        record = self.folder / "config.toml"
        if record.exists() and self.config.run.fresh:
            aside = self.folder.with_name(f"{self.folder.name}.{time.strftime('%Y%m%d-%H%M%S')}")
            self.folder.rename(aside)
            _log.info("set the earlier run aside: %s", aside)
        elif record.exists():
            _log.info("continuing run %s", self.folder)
        write_whole(record, to_toml(self.config, without=self.left_out))
        if self.digest is not None:
            write_whole(self.folder / DATA, f'digest = "{self.digest}"\n')
        return self.folder


def check_claim(
    config: RunConfig, folder: Path | None = None, *, digest: str | None = None
) -> Claim:
    """See whether a run may have its folder; writes nothing, so that a refused command does not.

    Args:
        config: resolved settings.
        folder: of :func:`own_folder`, which this process holds; None: it is asked for here.
        digest: of the data; None: it is not part of what the folder is for.

    Raises:
        ValueError: a run of this name was trained with other settings or other data; all of the
            differences are listed.
    """
    folder = folder or own_folder(config)
    name = folder.name
    record = folder / "config.toml"
    if not record.exists() or config.run.fresh:
        return Claim(folder, config, digest, ())
    written = read_written(record)
    changed = changes(from_toml(written), config)
    if changed:
        raise ValueError(
            f"run {name!r} in {folder.parent} was started with other settings; resume it with "
            f"the same ones, choose another run.name, or set run.fresh. Changed:\n  {changed}"
        )
    before = data_of(folder)
    if digest is not None and before not in (None, digest):
        raise ValueError(
            f"run {name!r} in {folder.parent} was started with data of digest {before}, but "
            f"{config.data.uri} has {digest}; give the same data, choose another run.name, or set "
            f"run.fresh"
        )
    return Claim(folder, config, digest, tuple(predated(written)))


def claim_folder(
    config: RunConfig, folder: Path | None = None, *, digest: str | None = None
) -> Path:
    """The run's folder, new or continued: :func:`check_claim`, and take it."""
    return check_claim(config, folder, digest=digest).take()


def data_of(folder: Path) -> str | None:
    """Digest of the data that a run or a sweep was started with; None: nothing says it.

    Versions before this file say it in the first lines of their journal.
    """
    record, journal = folder / DATA, folder / "journal.jsonl"
    if record.is_file():
        try:
            return str(tomllib.loads(record.read_text(encoding="utf-8"))["digest"])
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"{record} is damaged ({error!r}); write the line that names the data's digest, "
                f'digest = "...", as jobs/prepare.py --check prints it'
            ) from None
    if not journal.is_file():
        return None
    with journal.open(encoding="utf-8", errors="replace") as lines:
        found = re.search(
            r'"next\.data_digest": ?"([0-9a-f]{64})"',
            "".join(itertools.islice(lines, _FIRST_LINES)),
        )
    return found[1] if found else None


def changes(before: RunConfig, now: RunConfig) -> str:
    """Settings that decide what is computed and differ, a line each; empty: none does."""
    found = differences(before, now)
    lines = [
        f"{setting}: {old!r} -> {new!r}"
        for setting, (old, new) in found.items()
        if not setting.startswith(MAY_CHANGE)
    ]
    if now.data.placement == "sharded" and "scaling.num_workers" in found:
        old, new = found["scaling.num_workers"]
        lines.append(
            f"scaling.num_workers: {old!r} -> {new!r} (data.placement = sharded plans its batches "
            f"for so many workers)"
        )
    return "\n  ".join(lines)
