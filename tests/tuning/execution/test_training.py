"""One trial in this process, without Ray."""

import numpy as np
import pytest

from next.config import override, to_toml
from next.data.shards.reader import open_manifest
from next.training.checkpointing.checkpoint import read_config, read_progress
from next.training.checkpointing.store import CheckpointStore
from next.training.inputs import resolve
from next.training.step.process import device
from next.tuning.execution.training import train_trial
from next.tuning.home import Home
from next.tuning.search.space import Space, judged_by
from next.tuning.search.trial_record import best_of
from next.tuning.settings import AXES, FEATURES
from next.tuning.statistics.axes import measure_axes


def test_what_a_trial_keeps_of_its_best_epoch_is_what_its_checkpoint_gives(tiny_config, tmp_path):
    manifest = open_manifest(str(tiny_config.data.uri))
    (tmp_path / "sweep.toml").write_text("")
    told = []
    ended = train_trial(
        "trial-0000",
        {"optim.lr": 3e-3},
        base=to_toml(resolve(tiny_config, manifest)),
        folder=str(tmp_path),
        tracked={"uri": None, "experiment": "x", "parent": None},
        free_axes=False,
        report=told.append,
    )
    assert not ended
    assert [report["epoch"] for report in told] == [1, 2, 3]
    own = tmp_path / "trials" / "trial-0000"
    kept = dict(np.load(own / FEATURES))
    usage = (own / AXES).read_bytes()
    best = max(report["val/mAP"] for report in told)
    assert np.nanmean(kept["average_precision"]) == pytest.approx(best, abs=1e-3)
    best = Home(own, tiny_config).best()
    config = read_config(best)
    measure_axes(best, config, manifest, own, device=device(config), exhaustive=False)
    again = dict(np.load(own / FEATURES))
    assert kept.keys() == again.keys()
    for name, values in kept.items():
        np.testing.assert_array_equal(values, again[name])
    assert (own / AXES).read_bytes() == usage


@pytest.mark.parametrize(
    ("metric", "mode"),
    [
        ("val/mAP", "min"),  # never the epoch of the largest
        ("val/mAP", "max"),
        ("train/loss", "min"),
        ("train/loss", "max"),
        ("train/seconds_per_step", "min"),
    ],
)
def test_checkpoint_and_features_are_of_the_epoch_that_the_first_objective_ranks_best(
    tiny_config, tmp_path, metric, mode
):
    manifest = open_manifest(str(tiny_config.data.uri))
    (tmp_path / "sweep.toml").write_text("")
    space = Space("quick", lambda trial: {}, tmp_path / "quick.py", {metric: mode})
    config = judged_by(override(tiny_config, {"optim.epochs": 4}), space)
    told = []
    train_trial(
        "trial-0000",
        {"optim.lr": 3e-3},
        base=to_toml(resolve(config, manifest)),
        folder=str(tmp_path),
        tracked={"uri": None, "experiment": "x", "parent": None},
        free_axes=False,
        report=told.append,
    )
    curve = [(report["epoch"], (report[metric],)) for report in told]
    (expected,) = best_of(curve, mode)
    chosen = next(report for report in told if report[metric] == expected)
    assert len({report["val/mAP"] for report in told}) > 1, "the epochs differ"
    own = tmp_path / "trials" / "trial-0000"
    progress = read_progress(Home(own, config).best())
    assert progress.metrics["epoch"] == chosen["epoch"]
    assert read_progress(CheckpointStore(own / "checkpoints").latest()).best == expected
    precision = np.load(own / FEATURES)["average_precision"]
    assert np.nanmean(precision) == pytest.approx(chosen["val/mAP"], abs=1e-3)
