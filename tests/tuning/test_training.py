"""One trial in this process, without Ray."""

import numpy as np

from next.config import to_toml
from next.data.shards import open_manifest
from next.training.checkpoint import read_config
from next.training.inputs import resolve
from next.training.process import device
from next.tuning.axes import measure_axes
from next.tuning.home import Home
from next.tuning.settings import AXES, FEATURES
from next.tuning.training import train_trial


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
    assert np.nanmean(kept["average_precision"]) * 100 > max(r["val/mAP"] for r in told) - 1e-3
    best = Home(own, tiny_config).best()
    config = read_config(best)
    measure_axes(best, config, manifest, own, device=device(config), exhaustive=False)
    again = dict(np.load(own / FEATURES))
    assert kept.keys() == again.keys()
    for name, values in kept.items():
        np.testing.assert_array_equal(values, again[name])
    assert (own / AXES).read_bytes() == usage
