"""The pretrained weights of a run in its store: put there by the driver, brought to each machine.

``STORE/.weights/SHA256/NAME`` is one file of weights, whole or not there; no run's name begins with
a dot. So machines that share nothing but the store need no file of weights beforehand, also those
that join later.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

from next.config import BackboneConfig, RunConfig, override
from next.data.loading.cache import cache_root, exclusive
from next.model.weights.files import check_hash, has_hash
from next.storage import Folder, commit, open_folder
from next.training.checkpointing.store import persist

_log = logging.getLogger(__name__)

Found = TypeVar("Found")

_PLACE = ".weights"
_BLOCK = 8 * 2**20


class _Wanted(NamedTuple):
    """A file of weights that a run begins with."""

    setting: str
    """That names the file."""
    file: Path
    sha256: str

    @property
    def kept(self) -> str:
        """Where a store has it."""
        return f"{_PLACE}/{self.sha256}/{self.file.name}"


def keep_weights(config: RunConfig) -> None:
    """Put the weights that a run begins with into its store, unless they are there already.

    Raises:
        StoreError: the store could not be written for ``checkpoint.patience_s``.
        ValueError: a file on this machine is not the one that its hash names.
        FileNotFoundError: it is neither there nor in the store.
    """
    store = _store(config)
    if store is None:
        return
    for wanted in _wanted(config.model.backbone):
        _patiently(config, wanted, "written", partial(_put, store, wanted))


def bring_weights(config: RunConfig) -> RunConfig:
    """The settings with the files of weights as this machine has them; from the store if need be.

    A file that is neither here nor in the store is left to whoever reads it, and says so.

    Args:
        config: resolved settings; of another machine, they may name files that are not here.

    Raises:
        StoreError: the store could not be read for ``checkpoint.patience_s``.
        OSError: this machine's disk cannot take them.
        ValueError: what the store has is damaged.
    """
    store = _store(config)
    if store is None:
        return config
    found = {}
    for wanted in _wanted(config.model.backbone):
        if has_hash(wanted.file, wanted.sha256):
            continue
        path = _brought(config, store, wanted)
        if path is not None:
            found[wanted.setting] = str(path)
    return override(config, found)


def kept_weights(config: RunConfig, file: str, sha256: str) -> Path | None:
    """A file of weights that the run's store has, on this machine; None: it has none of this hash.

    Raises:
        StoreError, OSError, ValueError: as :func:`bring_weights`.
    """
    store = _store(config)
    return None if store is None else _brought(config, store, _Wanted("", Path(file), sha256))


def _store(config: RunConfig) -> Folder | None:
    place = config.checkpoint.storage_path
    return None if place is None else open_folder(place)


def _wanted(config: BackboneConfig) -> Iterator[_Wanted]:
    for side in ("", "text_"):
        file, sha256 = getattr(config, f"{side}file"), getattr(config, f"{side}sha256")
        if file is not None and sha256 is not None:
            yield _Wanted(f"model.backbone.{side}file", Path(file), sha256)


def _put(store: Folder, wanted: _Wanted) -> None:
    if store.size(wanted.kept) is not None:
        return
    check_hash(wanted.file, wanted.sha256)
    _log.info("putting the weights %s into %s", wanted.file, store.uri)
    store.upload(wanted.file, wanted.kept)


def _brought(config: RunConfig, store: Folder, wanted: _Wanted) -> Path | None:
    """The file in this machine's cache, checked; None: the store has none of this hash."""
    target = cache_root(config.data.cache) / "weights" / wanted.sha256 / wanted.file.name
    if has_hash(target, wanted.sha256):
        return target
    if _patiently(config, wanted, "read", lambda: store.size(wanted.kept)) is None:
        return None
    target.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(target) as draft:
        if has_hash(target, wanted.sha256):  # another process of this machine has brought it
            return target
        _log.info("bringing the weights %s from %s", wanted.file.name, store.uri)
        _patiently(config, wanted, "read", lambda: _fetch(store, wanted, draft))
        if not has_hash(draft, wanted.sha256):
            raise ValueError(
                f"{store.uri}/{wanted.kept} must have the SHA-256 that its path names, but is "
                f"damaged; remove it, and give the command again, which puts it there again"
            )
        commit(draft, target)
    return target


def _fetch(store: Folder, wanted: _Wanted, draft: Path) -> None:
    with store.opened(wanted.kept) as file, draft.open("wb") as local:
        shutil.copyfileobj(file, local, _BLOCK)


def _patiently(config: RunConfig, wanted: _Wanted, verb: str, act: Callable[[], Found]) -> Found:
    """What ``act`` comes to; tried again while the store is away.

    An error of this machine's own disk, which has a number, is raised at once: another machine may
    do better.
    """
    found: list[Found] = []
    own: list[OSError] = []

    def attempt() -> None:
        try:
            found.append(act())
        except OSError as error:
            if error.errno is None:
                raise
            own.append(error)

    patience = config.checkpoint.patience_s
    persist(attempt, f"the weights {wanted.file.name}", patience, verb=verb)
    if own:
        raise own[0]
    return found[0]
