"""The gallery of a small trained model."""

import pytest

from next.retrieval.embed import Written, embedding_here, facts_of, write_gallery
from next.retrieval.sources import open_shards


@pytest.fixture(scope="session")
def written(trained_embedder, demo_shards, tmp_path_factory) -> Written:
    source = open_shards(demo_shards, "gallery")
    facts = facts_of(trained_embedder, source, "float32")
    embed = embedding_here(trained_embedder, facts, source)
    return write_gallery(tmp_path_factory.mktemp("gallery") / "g", facts, source, embed)
