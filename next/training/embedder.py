"""A trained network as a model of its own: images of a sample in, embedding out.

::

    embedder = Embedder.load("runs/first/checkpoints/best")  # or "models:/reid@champion"
    features = embedder.embed({"image_RGB": ["rgb.jpg"], "image_TI": ["thermal.jpg"]})
    found = embedder.rank(features, embedder.embed(pandas.read_parquet("shards/demo/gallery")))

MLflow loads it through :func:`_load_pyfunc` (its name for what a loader module must have). The
folder that it reads holds safetensors, TOML and JSON; nothing in it is code, and nothing that is
read executes any::

    checkpoint/        weights, configuration, progress
    text.safetensors   the frozen text tower; left out where no captions are read, or it is random
    card.json          what the model is worth, and on which data
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from next.config import RunConfig, near_matches, override
from next.data.captions import CaptionSampler, CaptionTable, TextBank, bank_texts, split_sentences
from next.data.labels import Labels
from next.data.loading.decoding import decode
from next.data.loading.loader import SampleSet, evaluation_batches
from next.data.source.pixels import Undefined, encoded, is_missing, plain
from next.evaluation.embed import embed
from next.evaluation.protocol import layout_of
from next.evaluation.ranking.distances import Layout, distance_matrix
from next.model.network import NEXT
from next.model.towers.text import TextTower
from next.retrieval.search import Ranked, rank
from next.storage import open_folder
from next.tracking.registry.versions import fetch_model, registry_server
from next.training.checkpointing.checkpoint import (
    export_checkpoint,
    load_network,
    parse_state,
    read_config,
    text_of,
)
from next.training.inputs import reads_text

LOADER = __name__
"""What MLflow imports to load the model."""

_MOST_TEXTS = 50_000
"""Embeddings of texts that are kept; then they are encoded again."""
_KINDS = ("image", "caption", "sentences")
"""Of columns that name a modality."""


class Embedder:
    """A trained network that takes what the shards hold: images and captions.

    An embedding does not depend on what else is embedded with it, but for rounding: two batches
    give one sample embeddings that differ by 1e-5 at most. Several threads may use one.

    Args:
        folder: of a checkpoint, or that :func:`export_model` wrote.
        device: where to compute.

    Raises:
        FileNotFoundError: there is no model in the folder.
        ValueError: it is torn.
    """

    def __init__(self, folder: str | Path, device: torch.device | str = "cpu") -> None:
        folder = Path(folder)
        exported = (folder / "checkpoint").is_dir()
        checkpoint = folder / "checkpoint" if exported else folder
        network, config = load_network(checkpoint)
        self.device = torch.device(device)
        self.modalities: tuple[str, ...] = tuple(config.data.modalities or ())
        self._network = network.to(self.device)
        text = folder / "text.safetensors" if exported else text_of(checkpoint)
        if text is not None and not text.exists():
            text = None  # a random tower, which its seed gives again
        if not reads_text(config):
            config = override(config, {"captions.sampling": "none"})
        self._config = config
        self._tower = _built(config, text) if reads_text(config) else None
        self._texts: dict[str, np.ndarray] = {}
        self._lock = threading.Lock()
        self.digest = _digest(checkpoint, config, self._tower)
        """Names the model: equal for equal weights and settings, wherever they lie."""

    @classmethod
    def load(
        cls,
        address: str | Path,
        *,
        device: torch.device | str | None = None,
        tracking_uri: str | None = None,
        storage_path: str | Path = "runs",
    ) -> Embedder:
        """The model at an address.

        Args:
            address: folder of a checkpoint such as ``runs/NAME/checkpoints/best``, also in an
                object store, or a registered model, ``models:/NAME/VERSION`` or
                ``models:/NAME@ALIAS``.
            device: where to compute; None: on a GPU if there is one.
            tracking_uri: MLflow server that has the registered model; None: the local one of
                ``storage_path``.
            storage_path: folder of all runs.

        Raises:
            FileNotFoundError: there is no checkpoint, or no server's store.
            ValueError: no such model, a torn one, or one that is not to be loaded.
            ConnectionError: the server or the object store cannot be reached.
        """
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        with model_folder(address, tracking_uri=tracking_uri, storage_path=storage_path) as folder:
            return cls(folder, device)

    @property
    def width(self) -> int:
        """F, the length of an embedding."""
        return self._network.embedding_size

    @property
    def layout(self) -> Layout | None:
        """How embeddings are to be compared (:func:`next.evaluation.protocol.layout_of`)."""
        return layout_of(self._network, self._config)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width that images are resized to."""
        return self._config.data.image_size or (0, 0)

    @property
    def reads_captions(self) -> bool:
        """Whether captions change an embedding."""
        return self._tower is not None

    @property
    def network(self) -> NEXT:
        """The network, in evaluation mode, on the device."""
        return self._network

    @property
    def config(self) -> RunConfig:
        """Of the run that trained it; what is not read (captions without a tower) is off."""
        return self._config

    def embed(self, samples: Mapping[str, Any]) -> np.ndarray:
        """Embed samples, ``selection.batch`` of them at a time.

        Args:
            samples: a data frame or a mapping of columns of one length, as the shards name them:
                ``image_<modality>`` (a path, encoded bytes, a Pillow image or a uint8 array
                ``[H, W]`` or ``[H, W, 3]``; None where it is missing), optionally
                ``sentences_<modality>`` (a list of sentences or None) or ``caption_<modality>``
                (the same as one text), and ``camera`` (a number; None or -1: not known). A column
                may be left out; other columns are not read.

        Returns:
            float32 ``[n, F]``, of length one each.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: a sample without any image, an image that cannot be used, a column of a
                modality that the model lacks, or columns of several lengths; names row and column.
        """
        columns, count = self._columns(samples)
        images = [columns.get(f"image_{name}") or [None] * count for name in self.modalities]
        present = np.array([[not is_missing(value) for value in of] for of in images]).T
        present = present.reshape(count, len(images))
        if not count or not present.any(axis=1).all():
            bare = np.flatnonzero(~present.any(axis=1)).tolist()
            raise ValueError(
                f"every sample must have an image in one of the columns "
                f"{', '.join('image_' + name for name in self.modalities)}, but "
                + (f"rows {bare[:10]} have none" if bare else "there is no row")
            )
        features = np.empty((count, self.width), dtype=np.float32)
        size = self._config.selection.batch
        for start in range(0, count, size):
            rows = range(start, min(start + size, count))
            there = present[rows.start : rows.stop]
            features[rows.start : rows.stop] = self._embedded(
                columns, self.decoded(images, rows), there, rows
            )
        return features

    def predict(
        self, model_input: Mapping[str, Any], params: dict[str, Any] | None = None
    ) -> np.ndarray:
        """:meth:`embed`, as MLflow calls it; ``params`` are not used."""
        return self.embed(model_input)

    def distances(self, query: np.ndarray, gallery: np.ndarray) -> np.ndarray:
        """Squared distances ``[Q, G]`` of embeddings, by which a gallery is to be ranked.

        Samples that have other modalities than one another are compared over those that both have,
        unless the run was made with evaluation.common_slices off; a product of the embeddings
        themselves is no comparison of such samples (:mod:`next.evaluation.ranking.distances`).

        Args:
            query: ``[Q, F]`` that :meth:`embed` gave.
            gallery: ``[G, F]`` likewise.
        """
        return distance_matrix(query, gallery, self.layout)

    def rank(self, query: np.ndarray, gallery: np.ndarray, top: int = 10) -> Ranked:
        """The ``top`` nearest gallery rows of each query, compared as by :meth:`distances`.

        Arguments as there.

        Raises:
            ValueError: another width than the model's, a value that is not finite, no gallery.
        """
        for name, side in (("query", query), ("gallery", gallery)):
            if side.ndim != 2 or side.shape[1] != self.width:
                raise ValueError(
                    f"{name} must be [rows, {self.width}] as this model gives it, but got "
                    f"{list(side.shape)}; embed both with one model"
                )
        return rank(query, gallery, top=top, layout=self.layout, device=self.device)

    def decoded(self, images: Sequence[Sequence[Any]], rows: range) -> np.ndarray:
        """Images as the network sees them but for their normalisation, uint8 [n, M, H, W, 3].

        Args:
            images: [M][row] as :meth:`embed` takes them.
            rows: wanted.

        Raises:
            ValueError: as :meth:`embed`.
        """
        size = self.image_size
        pixels = np.zeros((len(rows), len(images), *size, 3), dtype=np.uint8)
        for modality, of_modality in enumerate(images):
            for place, row in enumerate(rows):
                value = of_modality[row]
                if is_missing(value):
                    continue
                where = f"row {row}, column image_{self.modalities[modality]}"
                try:
                    shown = plain(encoded(value))
                    pixels[place, modality] = decode(shown, size, self._config.data.test_resize)
                except FileNotFoundError:
                    raise FileNotFoundError(f"{where}: there is no file {value}") from None
                except Undefined as error:
                    raise ValueError(
                        f"{where}: the image {error}; "
                        f"scale it to 8 bits as the card of its training data does (depth)"
                    ) from None
                except (ValueError, OSError) as error:
                    raise ValueError(f"{where}: {error}") from None
        return pixels

    def text(self, samples: Mapping[str, Any], present: np.ndarray) -> np.ndarray | None:
        """What the experts read of captions, float32 [n, M, E, D]; None: nothing.

        Args:
            samples: as :meth:`embed` takes them.
            present: bool [n, M] which images there are.
        """
        columns, count = self._columns(samples)
        captions = self._captions(columns, present, range(count))
        if captions is None:
            return None
        found = captions.evaluate(np.arange(count))
        found[~present] = 0
        return found

    def _columns(self, given: Mapping[str, Any]) -> tuple[dict[str, list[Any]], int]:
        """The columns that are read, and how many rows they have."""
        read = {f"{kind}_{name}" for kind in _KINDS for name in self.modalities} | {"camera"}
        columns: dict[str, list[Any]] = {}
        for name in map(str, given.keys()):
            kind, _, modality = name.partition("_")
            if kind in _KINDS and modality and name not in read:
                near = near_matches(modality, list(self.modalities))
                raise ValueError(
                    f"the column {name} names a modality that the model lacks; it has "
                    f"{', '.join(self.modalities)}"
                    + (f"; did you mean {kind}_{near[0]}?" if near else "; leave it out")
                )
            if name not in read:
                continue
            if isinstance(given[name], str | bytes | Path):
                raise ValueError(
                    f"the column {name} must be a list with one value a sample, but got one "
                    f"{type(given[name]).__name__}; write [{given[name]!r:.60}]"
                )
            columns[name] = list(given[name])
        lengths = {name: len(column) for name, column in columns.items()}
        if len(set(lengths.values())) > 1:
            shown = ", ".join(f"{name} {length}" for name, length in lengths.items())
            raise ValueError(f"columns must be of one length, but got {shown}")
        for name in self.modalities:
            if f"caption_{name}" in columns and f"sentences_{name}" in columns:
                raise ValueError(
                    f"give one of the columns caption_{name} and sentences_{name}, but got both"
                )
        return columns, next(iter(lengths.values()), 0)

    def embed_decoded(
        self, images: np.ndarray, present: np.ndarray, samples: Mapping[str, Any]
    ) -> np.ndarray:
        """:meth:`embed` for images that are decoded already, all in one batch.

        Args:
            images: uint8 ``[n, M, H, W, 3]``, as :meth:`decoded` gives them.
            present: bool ``[n, M]`` which of them there are.
            samples: captions and cameras, as :meth:`embed` takes them.
        """
        columns, _ = self._columns(samples)
        return self._embedded(columns, images, present, range(len(images)))

    def _embedded(
        self,
        columns: Mapping[str, list[Any]],
        images: np.ndarray,
        present: np.ndarray,
        rows: range,
    ) -> np.ndarray:
        """Embeddings of rows of the columns, whose images are decoded."""
        samples = SampleSet(
            labels=_labels(columns, rows),
            images=images,
            present=present,
            captions=self._captions(columns, present, rows),
            modalities=self.modalities,
            text_width=self._network.width,
        )
        batches = evaluation_batches(samples, config=self._config, device=self.device)
        return embed(self._network, batches, self.device, count=len(rows)).features

    def _captions(
        self, columns: Mapping[str, list[Any]], present: np.ndarray, rows: range
    ) -> CaptionSampler | None:
        settings, experts = self._config.captions, self._config.model.semantic.experts
        if self._tower is None:
            return None
        sentences = [_sentences(columns, name, rows) for name in self.modalities]
        table = CaptionTable.build(sentences, present)
        # At evaluation nothing is drawn, so the texts of ``evaluation`` are all that is asked for.
        texts = bank_texts(table, settings, experts)
        if not texts:
            return None
        return CaptionSampler(table, self._bank(self._tower, texts), settings, experts)

    def _bank(self, tower: TextTower, texts: list[str]) -> TextBank:
        """The embeddings of these texts; what was encoded for earlier samples is kept."""
        with self._lock:
            new = [text for text in texts if text not in self._texts]
            if new:
                if len(self._texts) + len(new) > _MOST_TEXTS:
                    self._texts, new = {}, texts
                self._texts |= dict(zip(new, tower.encode(new), strict=True))
            return TextBank(texts, np.stack([self._texts[text] for text in texts]))


@contextmanager
def model_folder(
    address: str | Path,
    *,
    tracking_uri: str | None = None,
    storage_path: str | Path = "runs",
) -> Iterator[Path]:
    """A folder on this machine that :class:`Embedder` reads, while the block runs.

    Arguments and errors as :meth:`Embedder.load`.
    """
    name = str(address)
    if name.startswith("models:"):
        with tempfile.TemporaryDirectory(prefix="next-model-") as parent:
            with registry_server(tracking_uri, storage_path) as uri:
                folder = fetch_model(uri, name, Path(parent), loader=LOADER)
            yield folder
    elif "://" in name:
        with tempfile.TemporaryDirectory(prefix="next-model-") as parent:
            yield open_folder(name).download_tree("", Path(parent) / "checkpoint")
    else:
        yield Path(address)


def export_model(checkpoint: Path, folder: Path, tower: TextTower | None) -> Path:
    """Write what :class:`Embedder` reads, but for the card.

    Args:
        checkpoint: folder of the checkpoint.
        folder: new.
        tower: the text tower that the network was trained with; None: it reads no captions.
    """
    export_checkpoint(checkpoint, folder / "checkpoint")
    if tower is not None:
        tower.save(folder / "text.safetensors")
    return folder


def model_files(folder: Path) -> dict[str, bytes]:
    """The files of a model by their paths, as :class:`Embedder` reads them in any folder.

    Args:
        folder: as :func:`model_folder` gives it.
    """
    if (folder / "checkpoint").is_dir():
        paths = [*(folder / "checkpoint").iterdir(), *folder.glob("text.safetensors")]
        return {str(path.relative_to(folder)): path.read_bytes() for path in paths}
    text = text_of(folder)
    with tempfile.TemporaryDirectory(prefix="next-model-") as parent:
        exported = export_checkpoint(folder, Path(parent) / "checkpoint")
        found = {f"checkpoint/{path.name}": path.read_bytes() for path in exported.iterdir()}
    return found if text is None else found | {"text.safetensors": text.read_bytes()}


def model_columns(checkpoint: Path) -> dict[str, str]:
    """The columns that a model takes, each with MLflow's name of its type; all may be left out."""
    names = read_config(checkpoint).data.modalities or ()
    return (
        {f"image_{name}": "binary" for name in names}
        | {f"caption_{name}": "string" for name in names}
        | {"camera": "long"}
    )


def _load_pyfunc(path: str) -> Embedder:
    return Embedder(path, "cuda" if torch.cuda.is_available() else "cpu")


def _built(config: RunConfig, weights: Path | None) -> TextTower:
    """The text tower, read at once: the file may be gone when the first caption comes."""
    tower = TextTower(config.model.backbone, weights)
    tower.build()
    return tower


def _digest(checkpoint: Path, config: RunConfig, tower: TextTower | None) -> str:
    """Of all that decides an embedding: weights, text tower, and settings that no weight shows."""
    state = parse_state(str(checkpoint), (checkpoint / "state.json").read_bytes())
    data, captions = config.data, config.captions
    decides = {
        "weights": state["files"]["model.safetensors"],
        "text": None if tower is None else tower.key,
        "data": [data.modalities, data.image_size, data.mean, data.std, data.test_resize],
        "captions": [captions.evaluation, captions.encode, captions.unreliable]
        if tower is not None
        else None,
        "routing": [config.model.routing.temperature, config.model.semantic.tokens_per_expert],
        "activation": config.model.backbone.activation,
        "camera": config.model.backbone.camera_coefficient,
    }
    return hashlib.sha256(json.dumps(decides).encode()).hexdigest()


def _labels(columns: Mapping[str, list[Any]], rows: range) -> Labels:
    camera = columns.get("camera")
    known = [-1 if camera is None or is_missing(camera[row]) else int(camera[row]) for row in rows]
    return Labels(
        sample_id=np.array([str(row) for row in rows]),
        pid=np.zeros(len(rows), dtype=np.int64),
        camera=np.array(known, dtype=np.int64),
        scene=np.full(len(rows), -1),
    )


def _sentences(columns: Mapping[str, list[Any]], name: str, rows: range) -> list[list[str]]:
    """[row] sentences of a modality's captions; an empty list where there is none."""
    text, parted = columns.get(f"caption_{name}"), columns.get(f"sentences_{name}")
    found: list[list[str]] = []
    for row in rows:
        value = text[row] if text is not None else parted[row] if parted is not None else None
        if value is None or is_missing(value):
            found.append([])
        elif text is not None and isinstance(value, str):
            found.append(split_sentences(value))
        elif text is None and not isinstance(value, str | bytes):
            found.append(list(map(str, value)))
        else:
            kind, rule = ("caption", "a text") if text is not None else ("sentences", "a list")
            raise ValueError(
                f"row {row}, column {kind}_{name}: must be {rule} or None, but got a "
                f"{type(value).__name__}"
            )
    return found
