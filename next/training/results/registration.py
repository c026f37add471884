"""The best checkpoint of a run as a version of a registered model, with its card."""

from __future__ import annotations

import itertools
import json
import logging
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

from next.config import BackboneConfig, RunConfig
from next.data.shards.reader import Manifest
from next.storage import with_sum, without_sum, write_whole
from next.tracking.registry.versions import ModelCard, Version, register, run_id_of
from next.training.checkpointing.checkpoint import read_config, text_of
from next.training.embedder import LOADER, Embedder, export_model, model_columns
from next.training.inputs import reads_text, text_tower
from next.training.results.assessment import Assessment

_log = logging.getLogger(__name__)

CARD = "card.json"
"""Name of the card in a run's folder."""

_LICENCES = {"openai": "MIT (OpenAI's CLIP)", "laion": "MIT (LAION's OpenCLIP)"}
_REQUIREMENTS = (
    *("numpy", "open_clip_torch", "pillow", "pyarrow", "pydantic", "safetensors", "torch"),
    "scipy",
)


def write_card(
    folder: Path,
    config: RunConfig,
    manifest: Manifest,
    assessment: Assessment,
    selected: Mapping[str, float],
    *,
    seed_spread: tuple[float, int] | None = None,
) -> ModelCard:
    """The card of a run's best checkpoint, as ``card.json`` in the run's folder.

    Args:
        folder: of the run.
        config: resolved.
        manifest: the data that it was trained and measured on.
        assessment: of the best checkpoint.
        selected: what it was chosen by (``selection.metric``, in a sweep the first objective), and
            its value.
        seed_spread: standard deviation of that value from seed to seed and its degrees of freedom,
            where several seeds were run.
    """
    modalities = list(config.data.modalities or ())
    card = ModelCard(
        benchmark=manifest.benchmark.name,
        data_digest=manifest.digest,
        scores={**selected, **assessment.metrics},
        interval=assessment.interval,
        modalities=modalities,
        subsets=[
            list(subset)
            for size in range(len(modalities), 0, -1)
            for subset in itertools.combinations(modalities, size)
        ],
        weights_licence=weights_licence(config.model.backbone),
        seed=config.seed,
        run=folder.name,
        subset_scores=assessment.subsets,
        seed_spread=dict.fromkeys(selected, seed_spread) if seed_spread else {},
    )
    write_whole(folder / CARD, json.dumps(with_sum(asdict(card)), indent=2))
    return card


def register_run(folder: Path, uri: str, name: str) -> Version:
    """Make the best checkpoint of a finished run a version of a registered model.

    Args:
        folder: of the run or sweep.
        uri: of the MLflow server that has the run.
        name: of the registered model.

    Raises:
        FileNotFoundError: the run is not finished.
        ValueError: the run is not in MLflow.
        ConnectionError: the server cannot be reached.
    """
    card, checkpoint = read_card(folder), folder / "checkpoints" / "best"
    config = read_config(checkpoint)
    with tempfile.TemporaryDirectory(prefix="next-model-") as parent:
        exported = export_model(
            checkpoint,
            Path(parent) / "data",
            text_tower(config.model.backbone, text_of(checkpoint)) if reads_text(config) else None,
        )
        return register(
            uri,
            name,
            exported,
            run_id=run_id_of(folder),
            loader=LOADER,
            inputs=model_columns(checkpoint),
            width=Embedder(exported).width,
            card=card,
            requirements=[f"{package}=={metadata.version(package)}" for package in _REQUIREMENTS],
        )


def read_card(folder: Path) -> ModelCard:
    """The card that a finished run wrote.

    Raises:
        FileNotFoundError: the run is not finished.
        ValueError: the card is not what was written.
    """
    record = folder / CARD
    if not record.exists():
        raise FileNotFoundError(
            f"{folder} must be the folder of a finished run, but holds no {CARD}; "
            f"let the run end first"
        )
    try:
        return ModelCard(**without_sum(json.loads(record.read_text(encoding="utf-8"))))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{record} is damaged ({error}); give the command of the run or the sweep again, which "
            f"measures its best checkpoint and writes the card again"
        ) from None


def register_best(folder: Path, config: RunConfig, uri: str | None) -> None:
    """As :func:`register_run` where ``tracking.model`` asks for it; never fails the run."""
    if config.tracking.model is None or uri is None:
        return
    try:
        version = register_run(folder, uri, config.tracking.model)
    except (ConnectionError, ValueError) as error:
        _log.warning(
            "the best checkpoint is not registered: %s. Later: jobs/promote.py --model %s --run %s",
            *(error, config.tracking.model, folder),
        )
    else:
        _log.info("registered %s", version.uri)


def weights_licence(backbone: BackboneConfig) -> str:
    """What is known of the licence of the weights that training began with."""
    if backbone.pretrained is None:
        return "the run's own (random start)"
    known = [text for tag, text in _LICENCES.items() if backbone.pretrained.startswith(tag)]
    return known[0] if known else f"not known; see the source of {backbone.pretrained}"
