"""The samples that a run reads: labels, decoded images and captions, chosen without a copy."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from next.config import near_matches
from next.data.captions import CaptionSampler
from next.data.labels import Labels


class PartedImages:
    """Decoded images of a split in several caches, opened when their rows are asked for.

    What :meth:`prefetch` was told of last stays open once it was opened; of the others one at a
    time, so that a split read in order needs no more than a part of it at once.

    Args:
        rows: R, rows of the split.
        parts: rows of the split that each part holds, ascending; no row in two parts.
        open_part: gives the decoded images of a part, uint8 ``[len(part), A, H, W, 3]``.
        shape: ``(A, H, W, 3)``.
    """

    def __init__(
        self,
        rows: int,
        parts: Sequence[np.ndarray],
        open_part: Callable[[np.ndarray], np.ndarray],
        shape: tuple[int, ...],
    ) -> None:
        self.shape = (rows, *shape)
        self._parts = parts
        self._open_part = open_part
        self._part_of = np.full(rows, -1)
        self._place_of = np.zeros(rows, dtype=np.int64)
        for number, part in enumerate(parts):
            self._part_of[part] = number
            self._place_of[part] = np.arange(len(part))
        self._open: dict[int, np.ndarray] = {}
        self._kept: set[int] = set()
        self._ahead = _Ahead()

    def prefetch(self, rows: np.ndarray) -> None:
        """Close the parts that hold none of ``rows``, and open the others in the background.

        They are opened (built if they are missing) in the order in which ``rows`` first needs them.
        Who asks for a row waits for its part alone, and gets the error of opening it.
        """
        parts, first = np.unique(self._part_of[rows], return_index=True)
        self._ahead.stop()
        self._kept = set(parts.tolist())
        self._open = {part: image for part, image in self._open.items() if part in self._kept}
        missing = [part for part in parts[np.argsort(first)].tolist() if part not in self._open]
        self._ahead = _Ahead()
        weakref.finalize(self, self._ahead.stopped.set)
        self._ahead.begin([(part, self._parts[part]) for part in missing], self._open_part)

    def __getitem__(self, row: int) -> np.ndarray:
        return self._images(int(self._part_of[row]))[self._place_of[row]]

    def _images(self, part: int) -> np.ndarray:
        images = self._open.get(part)
        if images is None:
            assert part >= 0, "a row that no part holds"
            if part not in self._kept:
                self._open = {other: self._open[other] for other in self._open.keys() & self._kept}
            coming = self._ahead.parts.get(part)
            opened = self._open_part(self._parts[part]) if coming is None else coming.result()
            images = self._open[part] = np.asarray(opened)
        return images


class _Ahead:
    """Parts that a thread opens, one after another."""

    def __init__(self) -> None:
        self.parts: dict[int, Future[np.ndarray]] = {}
        self.stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def begin(
        self, parts: Sequence[tuple[int, np.ndarray]], open_part: Callable[[np.ndarray], np.ndarray]
    ) -> None:
        """Open them in this order; a process that ends does not wait for it."""
        self.parts = {part: Future() for part, _ in parts}
        work = [(self.parts[part], rows) for part, rows in parts]
        self._thread = threading.Thread(
            target=_open_all, args=(work, open_part, self.stopped), name="parts", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """Open no other part; waits for the one that is being opened."""
        self.stopped.set()
        if self._thread is not None:
            self._thread.join()


def _open_all(
    work: Sequence[tuple[Future[np.ndarray], np.ndarray]],
    open_part: Callable[[np.ndarray], np.ndarray],
    stopped: threading.Event,
) -> None:
    for coming, rows in work:
        if stopped.is_set():
            coming.cancel()
            continue
        try:
            coming.set_result(open_part(rows))
        except BaseException as error:
            coming.set_exception(error)


@dataclass(frozen=True)
class SampleSet:
    """Samples of one split, or some of its rows and modalities; nothing is copied to choose them.

    Random draws are keyed by the row of the split: each set augments a sample in the same way.
    """

    labels: Labels
    """[n] labels of the samples."""
    images: np.ndarray | PartedImages
    """uint8 ``[R, A, H, W, 3]``, all rows and modalities of the split (the decoded cache)."""
    present: np.ndarray
    """bool ``[n, M]``: whether the sample has this modality's image."""
    captions: CaptionSampler | None
    """Text of all rows and modalities of the split; None: there is no text."""
    modalities: tuple[str, ...]
    """[M] names."""
    text_width: int = 0
    """D of the zeros that stand for the text where ``captions`` is None."""
    rows: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    """int64 ``[n]`` rows of ``images``; left out: all of them."""
    columns: tuple[int, ...] = ()
    """[M] places of the modalities on the axis A of ``images``; left out: all of them."""
    shards: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    """int64 ``[n]`` number of the shard that holds the sample; left out: all in one."""

    def __post_init__(self) -> None:
        if not self.columns:
            object.__setattr__(self, "columns", tuple(range(len(self.modalities))))
        if not len(self.rows) and len(self.labels.pid):
            object.__setattr__(self, "rows", np.arange(len(self.labels.pid)))
        if not len(self.shards):
            object.__setattr__(self, "shards", np.zeros(len(self.rows), dtype=np.int64))
        shape = (len(self.rows), len(self.columns))
        if self.present.shape != shape or len(self.modalities) != shape[1]:
            raise ValueError(
                f"a sample set of {shape[0]} rows and {shape[1]} modalities needs present "
                f"{list(shape)}, but got {list(self.present.shape)} and the names {self.modalities}"
            )

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, rows: np.ndarray) -> SampleSet:
        """The samples of ``rows`` (numbers within this set), in that order."""
        return replace(
            self,
            labels=self.labels.take(rows),
            present=self.present[rows],
            rows=self.rows[rows],
            shards=self.shards[rows],
        )

    def with_modalities(self, names: Sequence[str]) -> SampleSet:
        """The same samples with these modalities only, in this order.

        Raises:
            ValueError: the set has no modality of this name, or it is named twice, or none is.
        """
        unknown = [name for name in names if name not in self.modalities]
        if unknown:
            near = near_matches(unknown[0], list(self.modalities)) or list(self.modalities)
            raise ValueError(
                f"data.modalities names {unknown[0]!r}, which these data lack; "
                f"did you mean {' or '.join(near)}?"
            )
        if not names or len(set(names)) < len(names):
            raise ValueError(
                f"data.modalities must name one modality or more, each once, but got {list(names)}"
            )
        places = [self.modalities.index(name) for name in names]
        return replace(
            self,
            modalities=tuple(names),
            present=self.present[:, places],
            columns=tuple(self.columns[place] for place in places),
        )

    def stored(self, rows: np.ndarray) -> list[list[np.ndarray]]:
        """Decoded images of ``rows`` where they lie, ``[B][M]`` of uint8 ``[H, W, 3]``."""
        images = self.images if isinstance(self.images, PartedImages) else np.asarray(self.images)
        found = (images[row] for row in self.rows[rows].tolist())
        return [[image[column] for column in self.columns] for image in found]

    def pixels(self, rows: np.ndarray) -> Tensor:
        """Decoded images of ``rows`` ``[B]``, uint8 ``[B, M, H, W, 3]``."""
        _, all_modalities, *shape = self.images.shape
        image = self.rows[rows][:, None] * all_modalities + np.asarray(self.columns)
        found = torch.empty((*image.shape, *shape), dtype=torch.uint8)
        if isinstance(self.images, PartedImages):
            for place, images in zip(found.numpy(), self.stored(rows), strict=True):
                np.stack(images, out=place)
            return found
        flat = np.asarray(self.images).reshape(-1, *shape)
        # The rows are checked above; to let `take` check them too would cost it a second copy.
        flat.take(image, axis=0, out=found.numpy(), mode="clip")
        return found

    def prefetch(self, rows: np.ndarray) -> None:
        """Get the caches of ``rows`` ready, in their order, and let others go.

        Only with ``data.placement = sharded``; see :meth:`PartedImages.prefetch`.
        """
        if isinstance(self.images, PartedImages):
            self.images.prefetch(self.rows[rows])
