"""The frozen text tower, which fills the text bank and never enters the training step."""

from __future__ import annotations

import hashlib

import numpy as np
import open_clip
import torch
from torch.nn import functional as F

from next.config import BackboneConfig
from next.model.backbone import load_clip

BATCH = 256
"""Sentences of one forward."""


class TextTower:
    """Sentence embeddings of the backbone's text tower.

    Frozen and deterministic; a text's neighbours change its embedding by rounding only.

    Args:
        config: the same backbone as the network's.

    Raises:
        ValueError: as :func:`next.model.backbone.load_clip`.
    """

    def __init__(self, config: BackboneConfig) -> None:
        self._tower = load_clip(config).text.eval().requires_grad_(False)
        self._tokenizer = open_clip.get_tokenizer(config.name)
        self.context: int = self._tower.context_length
        """Tokens that the tower reads, with start and end."""
        self.width: int = self._tower.output_dim
        """Length of an embedding, D."""
        self.key: str = self._hash(config.name)
        """Hash of the architecture and the weights."""

    @torch.inference_mode()
    def encode(self, texts: list[str]) -> np.ndarray:
        """Unit embeddings, float32 ``[n, D]``; a text beyond the context is cut at its end."""
        rows = np.empty((len(texts), self.width), dtype=np.float32)
        for start in range(0, len(texts), BATCH):
            chunk = texts[start : start + BATCH]
            embedded = self._tower(self._tokenizer(chunk, context_length=self.context))
            rows[start : start + len(chunk)] = F.normalize(embedded.float(), dim=-1).numpy()
        return rows

    def overflow(self, texts: list[str]) -> float:
        """Share of texts that are longer than the context, so that ``encode`` cuts them."""
        if not texts:
            return 0.0
        lengths = [len(self._tokenizer.encode(text)) + 2 for text in texts]
        return float(np.mean(np.array(lengths) > self.context))

    def _hash(self, name: str) -> str:
        digest = hashlib.sha256(f"{name} {self.context} {self.width}".encode())
        for key, value in sorted(self._tower.state_dict().items()):
            digest.update(f"{key} {tuple(value.shape)} {value.dtype}".encode())
            digest.update(value.contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()
