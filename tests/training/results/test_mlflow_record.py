"""What a run leaves beside its curves."""

import pytest

from next.config import RunConfig, override
from next.data.shards.reader import open_manifest
from next.tracking.journal import Artifact, read_records
from next.tracking.run import open_run
from next.training.inputs import resolve
from next.training.results import mlflow_record as record


@pytest.mark.parametrize("sent", [False, True])
def test_what_the_checkout_has_beyond_its_commit_is_kept_and_sent_on_request_alone(
    tiny_config, tmp_path, monkeypatch, sent
):
    monkeypatch.setattr(record, "provenance_diff", lambda: "+not yet published\n")
    manifest = open_manifest(tiny_config.data.uri)
    assert tiny_config.tracking.git_diff is False
    config = resolve(override(tiny_config, {"tracking.git_diff": sent}), manifest)
    folder = tmp_path / "run"
    with open_run(uri=None, experiment="demo", name="r", folder=folder) as run:
        record.record_inputs(run, config, manifest)
    assert (folder / "artifacts" / "git" / "diff.txt").read_text() == "+not yet published\n"
    records = (entry.record for entry in read_records(folder))
    named = [one.path for one in records if isinstance(one, Artifact)]
    assert named == ["artifacts/config.toml"] + ["artifacts/git/diff.txt"] * sent


def test_a_runs_columns_are_its_seed_and_what_differs_from_the_cards_recipe(tiny_config):
    """Not where it runs, nor what the data say of themselves."""
    manifest = open_manifest(str(tiny_config.data.uri))
    where = {"data.uri": tiny_config.data.uri, "data.cache": tiny_config.data.cache}
    where |= {"run.name": "mine", "tracking.enabled": False}
    by_recipe = override(RunConfig(), manifest.benchmark.recipe | where)

    def columns(**changes: object) -> dict:
        dotted = {name.replace("__", "."): value for name, value in changes.items()}
        return record.own_settings(
            resolve(override(by_recipe, dotted), manifest), manifest.benchmark
        )

    assert by_recipe.optim.lr != RunConfig().optim.lr, "the card has a recipe"
    assert columns() == {"seed": 0}
    camera = {"model.backbone.camera_coefficient": 1.0}
    assert columns(model__backbone__camera_coefficient=1.0) == {"seed": 0} | camera
    assert columns(seed=3, optim__lr=1e-4, data__modalities=("NI", "TI")) == {
        "seed": 3,
        "optim.lr": 1e-4,
        "data.modalities": ("NI", "TI"),
    }
