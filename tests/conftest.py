"""One tiny procedural benchmark, prepared once, for every test that needs real shards."""

from pathlib import Path

import pytest

from next.config import RunConfig, override

TINY = {
    "model.backbone.name": "next-tiny",
    "model.backbone.pretrained": None,
    "model.semantic.experts": 2,
    "model.structure.experts": 2,
    "data.image_size": (32, 16),
    "batch.identities": 4,
    "batch.instances": 4,
    "augment.pad": 2,
    "optim.lr": 1e-3,
    "optim.tower_lr": 1e-3,
    "optim.epochs": 3,
    "optim.warmup_epochs": 0.5,
    "selection.holdout": 0.34,
    "threads": 1,
    "tracking.enabled": False,
}
"""Settings that train in a second."""


def pytest_collection_modifyitems(items) -> None:
    """Keep tests that start Ray in one process: two clusters on a machine disturb each other."""
    for item in items:
        if item.get_closest_marker("ray"):
            item.add_marker(pytest.mark.xdist_group("ray"))


@pytest.fixture(scope="session")
def demo_raw(tmp_path_factory) -> Path:
    from next.data.demo import DemoSize, write_demo

    folder = tmp_path_factory.mktemp("demo") / "raw"
    write_demo(folder, DemoSize(12, 8, 6, 6), seed=1)
    return folder


@pytest.fixture(scope="session")
def demo_shards(demo_raw) -> Path:
    from next.data.benchmark import load_card
    from next.data.ingest import prepare

    card = load_card(Path(__file__).resolve().parents[1] / "datasets" / "demo.toml")
    out = demo_raw.parent / "shards"
    prepare(card, demo_raw, out)
    return out


@pytest.fixture(scope="session")
def cache_folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def tiny_config(demo_shards, cache_folder, tmp_path) -> RunConfig:
    return override(
        RunConfig(),
        TINY
        | {
            "data.uri": str(demo_shards),
            "data.cache": str(cache_folder),
            "run.storage_path": str(tmp_path / "runs"),
            "run.name": "tiny",
        },
    )
