import logging
from pathlib import Path

import pytest

from next.benchmark.card import load_card
from next.captioning.schema.attributes import load_schema
from next.captioning.source import FolderSource
from next.data.source.ingest import ScanOptions

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def quiet_line():
    logging.getLogger("httpx2").setLevel(logging.WARNING)


@pytest.fixture(scope="session")
def person():
    return load_schema("person")


@pytest.fixture(scope="session")
def demo_source(demo_raw):
    card = load_card(ROOT / "datasets" / "demo.toml")
    return FolderSource.open(card, demo_raw, ScanOptions())
