"""What a replica works with, and how it comes to newer galleries and newer versions of the model.

A gallery that appears beside the others is added. A new version of the model (a checkpoint that
was replaced, an alias that moved) is taken together with its galleries, and not before these cover
all the data that are searched now. Whatever goes wrong on the way is told, and the service goes on
with what it has.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from next.data.labels import Labels
from next.retrieval.gallery import Gallery, written_galleries
from next.retrieval.search import Ranked, search
from next.serving.collection import Collection, HeldGallery, galleries_of
from next.serving.settings import ServeSettings
from next.serving.uploads import Look
from next.storage import open_folder
from next.tracking.registry.versions import version_of
from next.training.embedder import Embedder

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Holding:
    """A model and the galleries by it, which one answer is made from."""

    model: Embedder
    collection: Collection

    @property
    def look(self) -> Look:
        """How the model wants its images."""
        depth = self.collection.first.facts.origin.card.depth
        size, resize = self.model.image_size, self.model.config.data.test_resize
        return Look(self.model.modalities, size, resize, depth)

    def search(self, features: np.ndarray, top: int, pid: np.ndarray, camera: np.ndarray) -> Ranked:
        """The nearest rows of queries ``[Q, F]``, by the card's rule."""
        unknown = np.full(len(features), -1)
        names = np.array([str(place) for place in range(len(features))])
        facts = self.collection.first.facts
        return search(
            features,
            self.collection.blocks(),
            top=top,
            layout=facts.layout,
            labels=Labels(names, pid, camera, unknown),
            rule=facts.rule,
            device=self.model.device,
        )


class Follower:
    """What is in use, looked after by a thread of its own.

    Args:
        settings: of the service.

    Raises:
        FileNotFoundError: there is no model, or no gallery.
        ValueError: they do not fit each other, or one is damaged.
        ConnectionError: a server cannot be reached.
    """

    def __init__(self, settings: ServeSettings) -> None:
        self._settings = settings
        self._seen = self._model_mark()
        model = self._load()
        self._written = written_galleries(settings.gallery)
        self.holding = Holding(model, _held(galleries_of(settings.gallery, model.digest), model))
        self.trouble: str | None = None
        """Why something newer is not in use."""
        self._newer: Embedder | None = None
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Look now and then, until :meth:`stop`."""
        self._thread = threading.Thread(target=self._follow, name="following", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Look no more."""
        self._over.set()
        if self._thread is not None:
            self._thread.join()

    def look(self) -> None:
        """Take what is new, if it can be used.

        Raises:
            OSError: model or galleries cannot be read now.
            ValueError: something newer is there and cannot be used.
        """
        mark = self._model_mark()
        if mark != self._seen:
            newer = self._load()
            self._seen = mark
            self._newer = None if newer.digest == self.holding.model.digest else newer
        written = written_galleries(self._settings.gallery)
        missing = self._take_newer(written)
        if written != self._written:
            model = self.holding.model
            found = galleries_of(self._settings.gallery, model.digest)
            kept = self.holding.collection.parts
            self.holding = Holding(model, _held(found, model, kept))
            self._written = written
            _log.info("%d gallery rows are in use now", len(self.holding.collection))
        if missing and self._newer is not None:
            raise ValueError(
                f"model {self._newer.digest[:16]} is new, but {missing} of "
                f"{len(self.holding.collection.parts)} galleries are not embedded by it yet; run "
                f"jobs/embed.py --again {self._settings.gallery} --model {self._settings.model}"
            )

    def _follow(self) -> None:
        while not self._over.wait(self._settings.refresh_seconds):
            try:
                self.look()
                self.trouble = None
            except Exception as error:  # of a file that is being replaced, a server that is away
                said = str(error).partition("\n")[0]
                if said != self.trouble:
                    _log.warning("goes on with what it has: %s", said)
                self.trouble = said

    def _take_newer(self, written: dict[str, bytes]) -> int:
        """Change to the newer model, if all data are embedded by it; how many are not yet."""
        newer = self._newer
        if newer is None:
            return 0
        try:
            found = galleries_of(self._settings.gallery, newer.digest)
        except ValueError:  # none is
            found = {}
        missing = self.holding.collection.data - {one.facts.data for one in found.values()}
        if not missing:
            self.holding = Holding(newer, _held(found, newer))
            self._newer, self._written = None, written
            _log.info("model %s is in use now", newer.digest[:16])
        return len(missing)

    def _load(self) -> Embedder:
        return Embedder.load(
            self._settings.model,
            device=self._settings.device,
            tracking_uri=self._settings.tracking_uri,
        )

    def _model_mark(self) -> Any:
        """Changes when the model at the address does."""
        address = self._settings.model
        if address.startswith("models:"):
            return version_of(str(self._settings.tracking_uri), address)
        folder = open_folder(address)
        names = ("state.json", "checkpoint/state.json")
        return [folder.read(name) for name in names if folder.size(name) is not None]


def _held(
    found: Mapping[str, Gallery], model: Embedder, kept: Mapping[str, HeldGallery] | None = None
) -> Collection:
    """Galleries in memory; those that are there already are not read again."""
    parts: dict[str, HeldGallery] = {}
    for name, gallery in found.items():
        there = None if kept is None else kept.get(name)
        if there is None or there.gallery != gallery:
            there = HeldGallery(gallery, model)
        parts[name] = there
    return Collection(parts)


def rows_of(ranked: Ranked, place: int, top: int) -> Sequence[int]:
    """Gallery rows that a query found, nearest first."""
    rows = ranked.rows[place, :top]
    return [int(row) for row in rows if row >= 0]
