"""Free axes of one checkpoint, without a sweep."""

import json

import pytest
import torch

from next.config import override
from next.data.shards.reader import open_manifest
from next.evaluation.protocol import evaluate
from next.training.checkpointing.checkpoint import load_network
from next.training.inputs import resolve, training_data
from next.training.loop import train
from next.training.results.report import FolderReporter
from next.tuning.settings import AXES
from next.tuning.statistics import axes


def test_features_are_a_free_axis_that_is_fitted_on_train_samples(
    tiny_config, tmp_path, monkeypatch
):
    """The trained choice comes first and scores as the trial does."""
    monkeypatch.setattr(axes, "RERANKINGS", ())
    monkeypatch.setattr(axes, "TEMPERATURES", (1.0,))
    monkeypatch.setattr("next.evaluation.missing.MOST_SAMPLES", 1)
    manifest = open_manifest(tiny_config.data.uri)
    config = resolve(override(tiny_config, {"optim.epochs": 1, "selection.every": 1}), manifest)
    data = training_data(config, manifest)
    with FolderReporter(tmp_path / "run") as reporter:
        train(config, data, reporter)
    checkpoint, cpu = tmp_path / "run" / "last", torch.device("cpu")
    fitted = []
    fit = axes.fit_whitening
    monkeypatch.setattr(
        axes, "fit_whitening", lambda rows, *how: fitted.append(len(rows)) or fit(rows, *how)
    )
    axes.measure_axes(checkpoint, config, manifest, tmp_path, device=cpu)
    found = json.loads((tmp_path / AXES).read_text())
    assert fitted == [len(data.train)] * 2, "held-out samples have no part in it"
    assert set(found["by_axis"]["features"]) == {"plain", "centred", "whitened"}
    alone = evaluate(
        load_network(checkpoint)[0], data.query, data.gallery,
        rule=data.rule, config=config, device=cpu,
    )  # fmt: skip
    assert found["default"]["features"] == "plain"
    assert found["default"]["val/mAP"] == pytest.approx(alone.metrics.mAP, abs=1e-3)
