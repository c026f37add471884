"""The folder of a sweep: its record beside the study, its name, and who drives it.

::

    config.toml   the settings that all trials share
    sweep.toml    how the space is searched, and what the space was
    space.py      a copy of the space
    study.db      the record of the trials (:mod:`next.tuning.search.study`)
    trials/NAME/  journal, checkpoints, features and free axes of each run
    sweep.json, report.html, figures/, checkpoints/best/
"""

from __future__ import annotations

import hashlib
import shlex
import time
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import tomli_w

from next.config import RunConfig, from_toml, near_matches, override, read_written
from next.lease import is_held
from next.storage import Folder, open_folder, with_sum, without_sum, write_whole
from next.training.checkpointing.store import store_address
from next.training.folder import claim_folder, own_folder
from next.tuning.results import Setting, Trial, group, read_trials, starting_point
from next.tuning.search.space import Space
from next.tuning.search.study import FILE, Studies, open_studies
from next.tuning.settings import RECORD, SweepConfig

_BRING_BACK = (
    "bring it back from a copy or from the sweep's store. Where it was changed on purpose, remove "
    "the lines sha256 and settings of sweep.toml"
)

TEXTS = ("config.toml", RECORD, "space.py")
"""Files of a sweep's record beside its study."""


class Standing(NamedTuple):
    """A sweep as it stands."""

    folder: Path
    base: RunConfig
    sweep: SweepConfig
    objectives: Mapping[str, str]
    varied: list[str]
    studies: Studies
    trials: list[Trial]
    """All runs; those of the sampler first, in the order in which they began."""
    settings: list[Setting]
    """The settings that they are of, best first."""


def read_standing(folder: Path) -> Standing:
    """A sweep as its record has it; it may be running.

    Raises:
        FileNotFoundError: there is no sweep in ``folder``.
        ValueError: the study file is locked or damaged.
    """
    record = read_record(folder)
    sweep = SweepConfig(**record["sweep"])
    base = from_toml(read_written(folder / "config.toml"))
    studies = open_studies(folder / FILE, folder.name, sweep)
    trials = read_trials(studies, folder, record["objectives"], base.seed)
    return Standing(
        folder=folder,
        base=base,
        sweep=sweep,
        objectives=record["objectives"],
        varied=list(record["description"]),
        studies=studies,
        trials=trials,
        settings=group(
            trials, record["objectives"], starting_point(base, list(record["description"]))
        ),
    )


def is_driven(folder: Path) -> bool:
    """Whether a driver is at work on a sweep, as far as its folder on this machine says."""
    return is_held(folder)


def find_sweep(storage: Path, name: str, *, stored: bool = False) -> Path:
    """The folder of the sweep ``name`` (or the folder itself, if it is one).

    Args:
        storage: folder of all runs.
        name: of the sweep.
        stored: its record is looked for in a store, so the folder need not be there.

    Raises:
        FileNotFoundError: there is none; the near matches are named.
    """
    for folder in (Path(name), storage / name):
        if (folder / RECORD).is_file():
            return folder.absolute()
    if stored:
        return (storage / Path(name).name).absolute()
    known = list_sweeps(storage)
    near = near_matches(name, known) or known[:3]
    raise FileNotFoundError(
        f"there is no sweep {name!r} in {storage}"
        + (f"; did you mean {' or '.join(near)}?" if near else "")
    )


def list_sweeps(storage: Path) -> list[str]:
    """Names of all sweeps below a storage path, the newest first."""
    records = sorted(storage.glob("*/sweep.toml"), key=lambda path: -path.stat().st_mtime)
    return [record.parent.name for record in records]


def read_record(folder: Path) -> dict[str, Any]:
    """``sweep.toml``: ``space``, ``path``, ``objectives``, ``description`` and ``sweep``.

    Raises:
        FileNotFoundError: there is no sweep in ``folder``.
        ValueError: it, or ``config.toml`` beside it, is not what was written.
    """
    path, settings = folder / RECORD, folder / "config.toml"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no sweep (there is no sweep.toml)")
    record = parse_record(str(path), path.read_bytes())
    expected = record.pop("settings", None)  # older versions wrote none
    if expected is not None and _sha256(settings) != expected:
        raise ValueError(
            f"{settings} is damaged (it is not what the sweep was started with); {_BRING_BACK}"
        )
    return record


def parse_record(where: str, text: bytes) -> dict[str, Any]:
    """The content of a ``sweep.toml``, which is what was written.

    Args:
        where: names it in errors.
        text: what it holds.

    Raises:
        ValueError: it is damaged.
    """
    try:
        return without_sum(tomllib.loads(text.decode()))
    except ValueError as error:
        raise ValueError(f"{where} is damaged ({error}); {_BRING_BACK}") from None


def resume_command(folder: Path, storage: str | None = None) -> str:
    """What goes on with a sweep, from wherever it is given.

    Args:
        folder: of the sweep.
        storage: its ``checkpoint.storage_path``, by which another head goes on, too.

    Example:
        >>> resume_command(Path("/runs/search"), "s3://kept/runs")
        'jobs/sweep.py resume search --storage_path /runs --checkpoint.storage_path s3://kept/runs'
    """
    words = ["jobs/sweep.py", "resume", folder.name, "--storage_path", str(folder.parent)]
    if storage is not None:
        words += ["--checkpoint.storage_path", storage]
    return shlex.join(words)


def named(base: RunConfig, space: Space) -> RunConfig:
    """The settings with ``run.name``: as given, or after the space and the time."""
    if base.run.name is not None:
        return base
    return override(base, {"run.name": time.strftime(f"sweep-{space.name}-%Y%m%d-%H%M%S")})


def new_folder(base: RunConfig, digest: str | None = None) -> Path:
    """The folder of a new sweep, which this process holds; ``run.fresh`` sets an old one aside.

    Raises:
        ValueError: a sweep or a run of this name exists.
    """
    store = require_new(base)
    if store is not None and base.run.fresh:
        store.move(time.strftime("%Y%m%d-%H%M%S"))
    return claim_folder(base, own_folder(base), digest=digest)


def require_new(base: RunConfig) -> Folder | None:
    """See that a sweep of this name can be begun; nothing is written.

    Returns:
        The store that holds something of this name, which ``run.fresh`` sets aside; None: it holds
        nothing, or there is none.

    Raises:
        ValueError: a sweep or a run of this name exists, and ``run.fresh`` is not set.
    """
    folder = own_folder(base)
    if (folder / "config.toml").exists() and not base.run.fresh:
        what = "sweep" if (folder / RECORD).exists() else "run"
        raise ValueError(
            f"a {what} named {base.run.name!r} exists in {folder.parent}; "
            + ("go on with it by `jobs/sweep.py resume`, " if what == "sweep" else "")
            + "choose another run.name, or set run.fresh"
        )
    address = store_address(base, str(base.run.name))
    if address is None:
        return None
    store = open_folder(address)
    if set(store.names()) <= {*TEXTS, FILE}:  # a head was lost while it first stored its record
        return None
    if not base.run.fresh:
        raise ValueError(
            f"{store.uri} holds a sweep or a run of this name already; go on with a sweep by "
            f"`{resume_command(folder, base.checkpoint.storage_path)}`, choose another "
            f"run.name, or set run.fresh"
        )
    return store


def write_record(
    folder: Path, space: Space, sweep: SweepConfig, description: Mapping[str, str]
) -> None:
    """Write ``sweep.toml`` and the copy of the space."""
    copy = folder / "space.py"
    if space.path.absolute() != copy:
        write_whole(copy, space.path.read_bytes())
    record = {
        "space": space.name,
        "path": str(space.path.absolute()),
        "objectives": dict(space.objectives),
        "description": dict(description),
        "sweep": sweep.model_dump(mode="json", exclude_none=True),
    }
    if (settings := folder / "config.toml").is_file():
        record["settings"] = _sha256(settings)
    write_whole(folder / RECORD, tomli_w.dumps(with_sum(record)))


def _sha256(path: Path) -> str:
    """Of a file; empty: there is none."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
