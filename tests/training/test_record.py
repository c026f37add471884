"""What of a run's settings is worth a column."""

from next.config import RunConfig, override, setting_names
from next.data.shards import open_manifest
from next.training.inputs import resolve
from next.training.record import own_settings


def test_a_run_of_the_recipe_shows_its_seed_alone(demo_shards, cache_folder):
    manifest = open_manifest(demo_shards)
    config = override(
        override(RunConfig(), manifest.benchmark.recipe),
        {"data.uri": str(demo_shards), "data.cache": str(cache_folder), "batch.identities": 4},
    )
    resolved = resolve(config, manifest)
    found = own_settings(resolved, manifest.benchmark)
    assert found == {"seed": 0, "batch.identities": 4}


def test_what_was_set_is_shown_under_its_own_name_and_where_it_ran_is_not(tiny_config, demo_shards):
    manifest = open_manifest(demo_shards)
    changed = {"optim.lr": 0.004, "captions.sampling": "none", "data.modalities": ("RGB", "TI")}
    where = {"run.name": "second", "threads": 2, "tracking.uri": "http://127.0.0.1:1"}
    resolved = resolve(override(tiny_config, changed | where), manifest)
    found = own_settings(resolved, manifest.benchmark)
    assert changed.items() <= found.items()
    assert not found.keys() & where.keys()
    assert set(found) <= set(setting_names()), "no column is called by another name"
    assert "model.identities" not in found
