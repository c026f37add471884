"""Where a trial's results are: in its folder on a machine, and in its store if the sweep has one.

A trial works in a folder of the machine that it runs on and publishes to its store, from which the
driver brings what comparing needs into its own folder. Without a store that folder is the home, and
nothing is copied.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from next.config import RunConfig, from_toml
from next.storage import Folder, open_folder, write_whole
from next.temporary import TRIALS, own_temporary
from next.tracking.delivery.publication import Publication, is_published
from next.training.checkpointing.store import CheckpointStore, persist, store_address
from next.training.folder import changes
from next.tuning.settings import AXES, FEATURES, RECORD

if TYPE_CHECKING:
    from next.tuning.results import Trial

_log = logging.getLogger(__name__)

_MIRRORED_AT_A_TIME = 8

ERROR = "error.txt"
"""File of what the training raised."""
_RESULTS = (FEATURES, AXES, ERROR)
_SETTINGS = "artifacts/config.toml"


def working_folder(folder: Path, config: RunConfig) -> Path:
    """Where a trial works on this machine.

    That is its folder where the sweep's is on this machine, or where there is no store. Elsewhere
    it is a temporary one: the driver's path may mean nothing there, or may not be written, and all
    that counts goes to the store.

    Args:
        folder: of the trial, as the driver has it.
        config: names the store.

    Raises:
        PermissionError: others may have written in the temporary one.
    """
    if config.checkpoint.storage_path is None or (folder.parents[1] / RECORD).is_file():
        return folder
    key = hashlib.sha256(str(folder).encode()).hexdigest()[:12]
    return own_temporary(TRIALS).joinpath(key, *folder.parts[-3:])


class Home:
    """The home of one trial.

    Args:
        folder: of the trial, ``SWEEP/trials/NAME``, on this machine.
        config: names the storage of all sweeps.
    """

    def __init__(self, folder: Path, config: RunConfig) -> None:
        self.folder = folder
        # An inherited trial's folder lies in another sweep, and so does its store.
        name = "/".join(folder.parts[-3:])
        self.store = store_address(config, name)
        self._patience_s = config.checkpoint.patience_s
        self.checkpoints = self.store or str(folder / "checkpoints")
        """Where the training keeps its checkpoints."""

    @contextmanager
    def best_at_hand(self) -> Iterator[Path | None]:
        """The best checkpoint while the block runs; None where none was written.

        Raises:
            OSError: the store cannot be reached.
        """
        kept = CheckpointStore(self.checkpoints)  # which has what it fetches removed at its end
        try:
            best = kept.best()
        except FileNotFoundError:
            yield None
        else:
            yield best

    def best(self) -> Path | None:
        """The best checkpoint, kept in the folder on this machine; None where none was written.

        Raises:
            OSError: the store cannot be reached.
        """
        kept, here = CheckpointStore(self.checkpoints), CheckpointStore(self.folder / "checkpoints")
        try:
            return kept.best() if kept.folder.is_local else here.bring_best(kept)
        except FileNotFoundError:
            pass
        try:
            return here.best()  # of a sweep that had no store yet
        except FileNotFoundError:
            return None

    def carry_over(self) -> None:
        """Bring the folder's checkpoints to a store that has none: the sweep had no store yet.

        Raises:
            OSError: the store cannot be reached or is full.
        """
        here = open_folder(self.folder / "checkpoints")
        names = [name for name in here.names() if name.startswith("step-")]
        if self.store is None or not names:
            return
        store = CheckpointStore(self.store)
        if not store.is_empty():
            return
        for name in names:
            store.folder.upload_tree(f"{here.base}/{name}", name, last=("state.json",))

    def publish(self, *names: str) -> None:
        """Bring files of the folder to the store; it is tried again while the store is away.

        Raises:
            StoreError: the store could not be written for ``checkpoint.patience_s``.
        """
        if self.store is None:
            return
        for name in names:
            self._publish(open_folder(self.store), name)

    def _publish(self, store: Folder, name: str) -> None:
        persist(
            lambda: store.upload(self.folder / name, name),
            f"{name} of {self.folder.name}",
            self._patience_s,
        )

    def leave(self, folder: Path) -> None:
        """Remove a temporary working folder whose trial has ended, once the store has all of it.

        Args:
            folder: of the trial, as the driver has it; it stays.
        """
        if self.folder != folder and is_published(self.folder):
            shutil.rmtree(self.folder, ignore_errors=True)

    def mirror(self) -> None:
        """Bring what comparing needs from the store: journal, features, axes, settings, error.

        Raises:
            OSError: the store cannot be reached, or the disk is full.
        """
        if self.store is None:
            return
        kept = open_folder(self.store)
        names = kept.names()
        if not names:
            return
        Publication(self.folder, self.store).fetch(writes=False)
        for name in names:
            here = self.folder / name
            if name in _RESULTS and not (here.exists() and here.stat().st_size == kept.size(name)):
                write_whole(here, kept.read(name))

    def clear_of_others(self, config: RunConfig) -> bool:
        """Set aside what a trial of this name and other settings left; whether there was any.

        A driver that is lost with its last draw leaves a trial that the next one draws again.

        Raises:
            OSError: the store cannot be reached.
        """
        places = [open_folder(self.folder)]
        if self.store is not None:
            places.append(open_folder(self.store))
        found = False
        for place in places:
            if place.size(_SETTINGS) is None:
                continue
            try:
                changed = changes(from_toml(place.read(_SETTINGS).decode()), config)
            except ValueError as error:  # whatever the trial left cannot be told from another's
                changed = f"{_SETTINGS} is damaged: {error}"
            if changed:
                suffix = time.strftime("%Y%m%d-%H%M%S")
                _log.warning("%s is of another trial: set aside.\n  %s", place.uri, changed)
                place.move(suffix)
                found = True
        return found


def mirror(trials: Sequence[Trial], config: RunConfig) -> None:
    """:meth:`Home.mirror` for several trials at a time.

    Raises:
        OSError: a store cannot be reached, or the disk is full.
    """
    if config.checkpoint.storage_path is None:
        return
    homes = [Home(Path(trial.folder), config) for trial in trials]
    with ThreadPoolExecutor(_MIRRORED_AT_A_TIME) as pool:
        list(pool.map(Home.mirror, homes))
