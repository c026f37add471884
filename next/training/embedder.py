"""A trained network as a model of its own: images of a sample in, embedding out.

MLflow loads it through :func:`_load_pyfunc` (its name for what a loader module must have). The
folder that it reads holds safetensors, TOML and JSON; nothing in it is code, and nothing that is
read executes any::

    checkpoint/        weights, configuration, progress
    text.safetensors   the frozen text tower; left out for a model that reads no captions
    card.json          what the model is worth, and on which data
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from next.config import override
from next.data.captions import CaptionSampler, CaptionTable, TextBank, bank_texts, split_sentences
from next.data.decoding import decode
from next.data.labels import Labels
from next.data.loader import SampleSet, evaluation_batches
from next.data.pixels import Undefined, plain
from next.evaluation.distances import distance_matrix
from next.evaluation.embed import embed
from next.evaluation.protocol import layout_of
from next.model.text import TextTower
from next.training.checkpoint import export_checkpoint, load_network, read_config

LOADER = __name__
"""What MLflow imports to load the model."""


class Embedder:
    """A trained network that takes what the shards hold: encoded images and captions.

    Args:
        folder: that :func:`export_model` wrote.
        device: where to compute.

    Raises:
        FileNotFoundError: there is no model in the folder.
        ValueError: it is torn.
    """

    def __init__(self, folder: str | Path, device: torch.device | str = "cpu") -> None:
        folder = Path(folder)
        network, config = load_network(folder / "checkpoint")
        self.device = torch.device(device)
        self.modalities: tuple[str, ...] = tuple(config.data.modalities or ())
        self._network = network.to(self.device)
        if not config.model.semantic.enabled:  # nothing else reads text
            config = override(config, {"captions.sampling": "none"})
        self._config = config
        text = folder / "text.safetensors"
        self._tower = TextTower(config.model.backbone, text) if text.exists() else None

    @property
    def width(self) -> int:
        """F, the length of an embedding."""
        return self._network.embedding_size

    def predict(
        self, model_input: Mapping[str, Sequence[Any]], params: dict[str, Any] | None = None
    ) -> np.ndarray:
        """Embed samples.

        Args:
            model_input: a data frame or a mapping of columns: ``image_<modality>`` (an encoded
                image as bytes, None where it is missing), optionally ``caption_<modality>`` (text
                or None) and ``camera`` (a number, -1: unknown). A column may be left out.
            params: not used; MLflow hands it over.

        Returns:
            float32 ``[n, F]``, of length one each.

        Raises:
            ValueError: a sample without any image, or bytes that are no image.
        """
        images = [_column(model_input, f"image_{name}") for name in self.modalities]
        count = max((len(column) for column in images if column is not None), default=0)
        present = np.array(
            [[_given(value) for value in column or [None] * count] for column in images]
        ).T.reshape(count, len(images))
        if not count or not present.any(axis=1).all():
            bare = np.flatnonzero(~present.any(axis=1)).tolist()
            raise ValueError(
                f"every sample must have an image in one of the columns "
                f"{', '.join('image_' + name for name in self.modalities)}, but "
                + (f"rows {bare[:10]} have none" if bare else "there is no row")
            )
        samples = SampleSet(
            labels=self._labels(model_input, count),
            images=self._decoded(images, present),
            present=present,
            captions=self._captions(model_input, present),
            modalities=self.modalities,
            text_width=self._network.width,
        )
        batches = evaluation_batches(samples, config=self._config, device=self.device)
        return embed(self._network, batches, self.device).features

    def distances(self, query: np.ndarray, gallery: np.ndarray) -> np.ndarray:
        """Squared distances ``[Q, G]`` of embeddings, by which a gallery is to be ranked.

        Samples that have other modalities than one another are compared over those that both have,
        unless the run was made with evaluation.common_slices off; a product of the embeddings
        themselves is no comparison of such samples (:mod:`next.evaluation.distances`).

        Args:
            query: ``[Q, F]`` that :meth:`predict` gave.
            gallery: ``[G, F]`` likewise.
        """
        return distance_matrix(query, gallery, layout_of(self._network, self._config))

    def _decoded(self, images: list[list[Any] | None], present: np.ndarray) -> np.ndarray:
        size = self._config.data.image_size or (0, 0)
        pixels = np.zeros((*present.shape, *size, 3), dtype=np.uint8)
        for row, modality in zip(*np.nonzero(present), strict=True):
            encoded = (images[modality] or [])[row]
            try:
                shown = plain(bytes(encoded))
                pixels[row, modality] = decode(shown, size, self._config.data.test_resize)
            except Undefined as error:
                raise ValueError(
                    f"row {row}, column image_{self.modalities[modality]}: the image {error}; "
                    f"scale it to 8 bits as the card of its training data does (depth)"
                ) from None
            except ValueError as error:
                raise ValueError(
                    f"row {row}, column image_{self.modalities[modality]}: {error}"
                ) from None
        return pixels

    def _captions(self, given: Mapping[str, Any], present: np.ndarray) -> CaptionSampler | None:
        settings, experts = self._config.captions, self._config.model.semantic.experts
        if self._tower is None or settings.sampling == "none":
            return None
        columns = [_column(given, f"caption_{name}") for name in self.modalities]
        sentences = [
            [split_sentences(text) if isinstance(text, str) else [] for text in column or ()]
            or [[]] * len(present)
            for column in columns
        ]
        table = CaptionTable.build(sentences, present)
        # At evaluation nothing is drawn, so the texts of ``evaluation`` are all that is asked for.
        texts = bank_texts(table, settings, experts)
        if not texts:
            return None
        bank = TextBank(texts, self._tower.encode(texts))
        return CaptionSampler(table, bank, settings, experts)

    def _labels(self, given: Mapping[str, Any], count: int) -> Labels:
        camera = _column(given, "camera")
        return Labels(
            sample_id=np.array([str(row) for row in range(count)]),
            pid=np.zeros(count, dtype=np.int64),
            camera=np.array(camera if camera is not None else [-1] * count, dtype=np.int64),
            scene=np.full(count, -1),
        )


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


def _column(given: Mapping[str, Any], name: str) -> list[Any] | None:
    return list(given[name]) if name in given else None


def _given(value: Any) -> bool:
    return isinstance(value, bytes | bytearray | memoryview) and len(value) > 0
