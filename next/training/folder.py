"""The folder of a run, which one command makes and the same command continues. Imports no torch."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from pathlib import Path

from next.config import (
    RunConfig,
    differences,
    flatten,
    from_toml,
    override,
    predated,
    to_toml,
)
from next.storage import write_whole

_log = logging.getLogger(__name__)

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

    A setting that its record predates gets the value that the older version behaved like, unless
    ``config`` sets it to something else than the default (which :func:`claim_folder` refuses).

    Args:
        config: settings of the command that continues the run.
        record: ``config.toml`` of the run or of one of its checkpoints; may not exist.
    """
    if not record.is_file():
        return config
    default, now = dict(flatten(RunConfig())), dict(flatten(config))
    older = {
        name: value
        for name, value in predated(record.read_text(encoding="utf-8")).items()
        if now[name] == default[name]
    }
    if older:
        listed = ", ".join(f"{name} = {value}" for name, value in older.items())
        _log.info("%s is of an older version; going on as that did: %s", record, listed)
    return override(config, older)


def claim_folder(config: RunConfig, *, prefix: str = "run") -> Path:
    """The run's folder, new or continued; ``run.fresh`` sets an old one aside.

    Raises:
        ValueError: a run of this name was trained with other settings; all of them are listed.
    """
    name = config.run.name or time.strftime(f"{prefix}-%Y%m%d-%H%M%S")
    folder = (Path(config.run.storage_path) / name).absolute()
    record = folder / "config.toml"
    left_out: Iterable[str] = ()
    if record.exists() and config.run.fresh:
        aside = folder.with_name(f"{name}.{time.strftime('%Y%m%d-%H%M%S')}")
        folder.rename(aside)
        _log.info("set the earlier run aside: %s", aside)
    elif record.exists():
        written = record.read_text(encoding="utf-8")
        # Left out again, so that the same command continues the run once more.
        left_out = predated(written)
        changed = changes(from_toml(written), config)
        if changed:
            raise ValueError(
                f"run {name!r} in {folder.parent} was started with other settings; resume it with "
                f"the same ones, choose another run.name, or set run.fresh. Changed:\n  {changed}"
            )
        _log.info("continuing run %s", folder)
    write_whole(record, to_toml(config, without=left_out))
    return folder


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
