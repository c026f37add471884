"""The frozen text tower, which fills the text bank and never enters the training step."""

from __future__ import annotations

import hashlib
from functools import cached_property
from pathlib import Path

import numpy as np
import open_clip
import safetensors.torch
import torch
from open_clip.transformer import TextTransformer
from torch.nn import functional as F

from next.config import BackboneConfig
from next.model.towers.clip import clip_activation, clip_settings, load_clip, text_side
from next.model.weights.files import sha256, weights_path
from next.storage import drafting

BATCH = 256
"""Sentences of one forward."""


class TextTower:
    """Sentence embeddings of the backbone's text tower.

    Frozen and deterministic; a text's neighbours change its embedding by rounding only. It is
    built when it is first asked to encode, so that workers that find a text bank never hold it.

    Args:
        config: the same backbone as the network's.
        weights: a file that :meth:`save` wrote, in place of what ``config.pretrained`` names.

    Raises:
        ValueError: as :func:`next.model.towers.clip.load_clip`; of the weights, when they are read.
    """

    def __init__(self, config: BackboneConfig, weights: Path | None = None) -> None:
        self._config = text_side(config)
        self._weights = weights
        settings = clip_settings(self._config.name)
        self.context: int = settings["text_cfg"].get("context_length", 77)
        """Tokens that the tower reads, with start and end."""
        self.width: int = settings["embed_dim"]
        """Length of an embedding, D."""

    @property
    def is_built(self) -> bool:
        """Whether its weights are in this process's memory."""
        return "_tower" in vars(self)

    def build(self) -> None:
        """Read the weights now, and not when something is encoded for the first time."""
        self._tower  # noqa: B018 - kept by the property

    @cached_property
    def _tower(self) -> TextTransformer:
        if self._weights is None:
            return load_clip(self._config).text.eval().requires_grad_(False)
        tower = load_clip(self._config, blank=True).text.eval().requires_grad_(False)
        tower.load_state_dict(safetensors.torch.load_file(self._weights))
        return tower

    @cached_property
    def _tokenizer(self) -> open_clip.SimpleTokenizer:
        return open_clip.get_tokenizer(self._config.name)

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

    def save(self, path: Path) -> None:
        """Write the weights as safetensors."""
        weights = {key: value.contiguous() for key, value in self._tower.state_dict().items()}
        with drafting(path) as draft:
            safetensors.torch.save_file(weights, draft)

    @cached_property
    def key(self) -> str:
        """Hash of the architecture and the weights: of their file, or of random ones themselves."""
        config = self._config
        named = f"{config.name} {self.context} {self.width}"
        if config.pretrained is not None:
            # A file that was resolved need not be here; where it lies decides nothing.
            found = config.sha256 or sha256(weights_path(config))
            return hashlib.sha256(f"{named} {clip_activation(config)} {found}".encode()).hexdigest()
        digest = hashlib.sha256(named.encode())
        for key, value in sorted(self._tower.state_dict().items()):
            digest.update(f"{key} {tuple(value.shape)} {value.dtype}".encode())
            digest.update(value.contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()
