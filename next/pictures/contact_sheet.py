"""A contact sheet of prepared data: what a person looks at before training on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from next.data.loading.decoding import decode
from next.data.shards.reader import Manifest
from next.data.wording import count
from next.pictures.canvas import house_style, save, wrap
from next.pictures.sheets import (
    GAP,
    LINE,
    MARGIN,
    NAMES,
    TITLE,
    cell_size,
    check_sample,
    put_names,
    put_stack,
    put_text,
    sheet,
)

_WIDTH = 0.95
"""Inches of a tall image."""


@dataclass(frozen=True)
class Contact:
    """One sample on a contact sheet."""

    images: np.ndarray
    """[M, H, W, 3] uint8."""
    present: np.ndarray
    """[M] bool."""
    heading: str
    """Above the images, such as ``id 3``."""
    footing: str
    """Below them, such as ``camera 1``."""
    captions: Sequence[str]
    """[M] captions; empty: none."""


@dataclass(frozen=True)
class Band:
    """Samples of one split."""

    title: str
    samples: Sequence[Contact]


@house_style()
def contact_sheet(path: str | Path, bands: Sequence[Band], *, modalities: Sequence[str]) -> Path:
    """Samples of each split as stacks of their modalities, and the captions of the first of each.

    Args:
        path: PNG to write.
        bands: one for each split, with one sample at least; all images of one size.
        modalities: M names, from top to bottom of a stack.

    Raises:
        ValueError: there is nothing to draw, or images do not fit each other.
    """
    if not bands or not all(band.samples for band in bands):
        raise ValueError("there is nothing to draw: give one sample of each split at least")
    shape = bands[0].samples[0].images.shape
    for contact in (contact for band in bands for contact in band.samples):
        check_sample(contact.images, contact.present, len(modalities), shape)
    width, height = cell_size(shape, _WIDTH)
    columns = max(len(band.samples) for band in bands)
    first = MARGIN + NAMES
    total = first + columns * (width + GAP) - GAP + MARGIN
    texts = [_captions(band.samples[0], modalities, int((total - first) * 14.2)) for band in bands]
    lines = [contact.footing.count("\n") + 1 for band in bands for contact in band.samples]
    stack, foot = height * len(modalities), LINE * (max(lines) + 0.4)
    heights = [TITLE + stack + foot + LINE * (text.count("\n") + 3) for text in texts]
    figure, axes = sheet(total, sum(heights) + MARGIN)
    top = 0.1
    for band, text, tall in zip(bands, texts, heights, strict=True):
        title = wrap(band.title, int(total * 8), 1)
        put_text(axes, first, top + 0.16, title, size=14, bold=True, align="left")
        row = top + TITLE + LINE
        put_names(axes, modalities, first, row, height)
        for place, contact in enumerate(band.samples):
            left = first + place * (width + GAP)
            put_text(axes, left + width / 2, row - LINE / 1.5, contact.heading, size=11)
            put_stack(axes, contact.images, contact.present, left, row, width, height)
            put_text(axes, left + width / 2, row + stack + foot / 2, contact.footing, size=11)
        middle = row + stack + foot + LINE * (text.count("\n") + 1) / 2
        put_text(axes, first, middle, text, size=9.5, align="left")
        top += tall
    return save(figure, path)


def draw_contact_sheet(path: str | Path, manifest: Manifest, *, columns: int = 8) -> Path:
    """A contact sheet of prepared data, with samples spread evenly over the rows of each split.

    Args:
        path: PNG to write.
        manifest: the data.
        columns: most samples of a split.

    Raises:
        ValueError: the name does not end in ``.png``, or an image does not decode.
    """
    card = manifest.benchmark
    bands = [_band(manifest, split, columns) for split in card.stored()]
    return contact_sheet(path, bands, modalities=card.modalities)


def _band(manifest: Manifest, split: str, columns: int) -> Band:
    card, labels, entry = manifest.benchmark, manifest.labels(split), manifest.splits[split]
    rows = np.unique(np.linspace(0, entry.rows - 1, columns).round().astype(int)).tolist()
    contacts = []
    for row, taken in zip(rows, manifest.take(split, rows), strict=True):
        images = np.zeros((len(card.modalities), *card.image_size, 3), np.uint8)
        for number, encoded in enumerate(taken.images):
            if encoded is not None:
                images[number] = decode(encoded, card.image_size)
        places = (("camera", labels.camera[row]), ("scene", labels.scene[row]))
        contacts.append(
            Contact(
                images,
                np.array([encoded is not None for encoded in taken.images]),
                f"id {labels.pid[row]}",
                "\n".join(f"{name} {number}" for name, number in places if number >= 0),
                [" ".join(sentences) for sentences in taken.sentences],
            )
        )
    title = (
        f"{card.name} {split}: {count(entry.identities, 'identity', 'identities')}, "
        f"{count(entry.rows, 'sample')} (captions: {labels.sample_id[rows[0]]})"
    )
    return Band(title, contacts)


def _captions(contact: Contact, modalities: Sequence[str], columns: int) -> str:
    lines = [
        wrap(f"{name}: {caption}", columns, 2)
        for name, caption in zip(modalities, contact.captions, strict=True)
        if caption
    ]
    return "\n".join(lines) or "no captions"
