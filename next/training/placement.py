"""An assessment where there is room for it: here, or on a node of the cluster that is given.

What the head of a cluster does itself is small: it reads labels and journals, and writes files.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from next.config import RunConfig, from_toml, to_toml
from next.data.shards import Manifest, open_manifest
from next.storage import write_whole
from next.training.assessment import Assessment, assess
from next.training.cluster import in_a_workers_place, on_cluster
from next.training.process import assessing_device, configure_torch, device
from next.training.store import CheckpointStore

History = Sequence[tuple[int, Mapping[str, float]]]


class _Carried(NamedTuple):
    """An assessment whose pictures travel with it."""

    assessment: Assessment
    pictures: list[bytes]


def assess_in_place(
    config: RunConfig,
    checkpoint: Path,
    store: str,
    manifest: Manifest,
    folder: Path,
    *,
    split: Literal["test", "val"] = "test",
    history: History = (),
) -> Assessment:
    """:func:`next.training.assessment.assess` in the place of one worker, modalities missing too.

    Args:
        config: of the run; what a worker takes, and the device.
        checkpoint: its folder on this machine.
        store: where another machine reads the checkpoint of that name.
        manifest: shards.
        folder: the pictures go to ``figures`` below it, on this machine.
        split: as there.
        history: as there.

    Raises:
        ValueError: as there.
    """
    if not on_cluster():
        where = assessing_device(config)
        return assess(
            checkpoint, manifest, folder, device=where, split=split, history=history, missing=True
        )
    found = in_a_workers_place(
        config.scaling,
        _assess,
        *(to_toml(config), store, checkpoint.name, manifest.folder.address, split, history),
    )
    own = folder / "figures"
    pictures = [own / path.name for path in found.assessment.pictures]
    for path, content in zip(pictures, found.pictures, strict=True):
        write_whole(path, content)
    return found.assessment._replace(pictures=pictures)


def _assess(
    settings: str,
    store: str,
    name: str,
    uri: str,
    split: Literal["test", "val"],
    history: History,
) -> _Carried:
    config = from_toml(settings)
    configure_torch(config)
    kept = CheckpointStore(store)
    with tempfile.TemporaryDirectory(prefix="next-assessment-") as folder:
        assessment = assess(
            kept.fetch(name),
            open_manifest(uri),
            Path(folder),
            device=device(config),
            split=split,
            history=history,
            missing=True,
        )
        return _Carried(assessment, [path.read_bytes() for path in assessment.pictures])
