"""Galleries: what is in them, that they go on after a kill, and what they refuse."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pandas
import pytest

from next.benchmark.card import load_card
from next.data.shards.reader import open_manifest
from next.retrieval import sources
from next.retrieval.embed import embed_piece, embedding_here, facts_of, write_gallery
from next.retrieval.gallery import encode_part, finished_parts, open_gallery, require_model
from next.retrieval.sources import open_card_folder, open_shards
from next.storage import open_folder

CARD = Path(__file__).resolve().parents[2] / "datasets" / "demo.toml"


def test_any_tool_reads_what_is_known_of_each_sample(written, trained_embedder, demo_shards):
    frame = pandas.read_parquet(written.gallery.folder.uri, columns=None)
    labels = open_manifest(demo_shards).labels("gallery")
    assert frame.sample_id.tolist() == labels.sample_id.tolist()
    assert frame.pid.tolist() == labels.pid.tolist()
    assert frame.camera.tolist() == labels.camera.tolist()
    assert frame.modalities.map(list).tolist() == [["RGB", "NI", "TI"]] * len(labels.pid)
    assert frame.time.isna().all()
    whole = trained_embedder.embed(pandas.read_parquet(demo_shards / "gallery"))
    np.testing.assert_allclose(np.stack(frame.embedding), whole, atol=1e-5)
    assert written.embedded == len(labels.pid)
    assert written.rate > 0


def test_a_folder_by_its_card_gives_the_gallery_of_its_shards(
    written, trained_embedder, demo_raw, tmp_path, monkeypatch
):
    monkeypatch.setattr(sources, "PIECE", 10)
    source = open_card_folder(load_card(CARD), demo_raw, "query", "fail")
    facts = facts_of(trained_embedder, source, "float16")
    made = write_gallery(tmp_path, facts, source, embedding_here(trained_embedder, facts, source))
    assert len(made.gallery.parts) > 2
    ours, theirs = made.gallery, written.gallery
    assert ours.labels().sample_id.tolist() == theirs.labels().sample_id.tolist()
    rows = range(len(theirs))
    np.testing.assert_allclose(ours.embeddings(rows), theirs.embeddings(rows), atol=1e-3)
    assert next(ours.blocks()).features.dtype == np.float16


def test_a_call_that_was_killed_goes_on_and_does_nothing_twice(
    trained_embedder, demo_raw, tmp_path, monkeypatch
):
    monkeypatch.setattr(sources, "PIECE", 8)
    source = open_card_folder(load_card(CARD), demo_raw, "gallery")
    facts = facts_of(trained_embedder, source, "float32")
    pieces = len(source.pieces)
    assert pieces >= 4

    def dies(left):
        for piece in left:
            if piece == 2:
                raise KeyboardInterrupt
            yield embed_piece(trained_embedder, facts, source, piece)

    with pytest.raises(KeyboardInterrupt):
        write_gallery(tmp_path, facts, source, dies)
    with pytest.raises(FileNotFoundError, match="there is no finished gallery; write one with"):
        open_gallery(tmp_path)
    asked, told = [], []

    def goes_on(left):
        asked.extend(left)
        return embedding_here(trained_embedder, facts, source)(left)

    made = write_gallery(
        tmp_path, facts, source, goes_on, progress=lambda done, total: told.append((done, total))
    )
    assert asked == list(range(2, pieces))
    assert told[-1] == (len(made.gallery), len(made.gallery))
    again = write_gallery(tmp_path, facts, source, goes_on)
    assert (again.embedded, len(again.gallery)) == (0, len(source.samples))
    assert asked == list(range(2, pieces)), "a finished gallery is left alone"


def test_parts_of_another_model_are_not_taken_for_ones_own(written, trained_embedder, demo_shards):
    source = open_shards(demo_shards, "gallery")
    facts = facts_of(trained_embedder, source, "float32").model_copy(update={"model": "f" * 64})
    with pytest.raises(ValueError, match=r"a part of another gallery: model .* instead of fff"):
        finished_parts(written.gallery.folder, facts)
    with pytest.raises(ValueError, match=r"embedded by model .* but the queries are by model fff"):
        require_model(written.gallery, "f" * 64)


def test_a_gallery_that_is_damaged_or_empty_is_named(written, trained_embedder, tmp_path):
    facts = written.gallery.facts
    folder = open_folder(tmp_path)
    rows = {"sample_id": ["a"], "pid": [1], "camera": [1], "scene": [-1], "time": [None]}
    columns = rows | {"modalities": [["RGB"]]}
    broken = np.full((1, facts.width), np.nan, dtype=np.float32)
    with pytest.raises(ValueError, match="new embeddings must be finite, but row 0 is not"):
        encode_part(facts, columns, broken)
    with pytest.raises(ValueError, match=r"must be \[n, \d+\], but got \(1, 3\)"):
        encode_part(facts, columns, broken[:, :3])
    said = {"facts": facts.model_dump(mode="json"), "parts": {"part-00000.parquet": 1}}
    unit = np.eye(1, facts.width, dtype=np.float32)
    other = facts.model_copy(update={"data": "0"})
    folder.write("_gallery.json", json.dumps(said).encode())
    for part, error in [
        (b"no parquet", "part-00000.parquet is no Parquet file"),
        (encode_part(other, columns, unit), "is not the part that"),
    ]:
        folder.write("part-00000.parquet", part)
        with pytest.raises(ValueError, match=error):
            list(open_gallery(tmp_path).blocks())
    whole = bytearray(encode_part(facts, columns, unit))
    whole[whole.index(unit[0].tobytes()[:64])] ^= 1
    folder.write("part-00000.parquet", bytes(whole))
    with pytest.raises(ValueError, match=r"part-00000.parquet is damaged .* and embed it again"):
        list(open_gallery(tmp_path).blocks())
    for text, error in [
        ({**said, "parts": {}}, "is an empty gallery"),
        ({"facts": {"version": 99}}, "has version 99, but this version of next-reid reads 1"),
        ({"facts": {"version": 1}}, "is no gallery's"),
    ]:
        folder.write("_gallery.json", json.dumps(text).encode())
        with pytest.raises(ValueError, match=error):
            open_gallery(tmp_path)


def test_a_source_without_samples_or_modalities_is_refused(trained_embedder, demo_raw, tmp_path):
    source = open_card_folder(load_card(CARD), demo_raw, "gallery")
    with pytest.raises(ValueError, match="split must be one of train, gallery, query of demo"):
        open_card_folder(load_card(CARD), demo_raw, "test")
    empty = dataclasses.replace(source, samples=())
    facts = facts_of(trained_embedder, empty, "float32")
    with pytest.raises(ValueError, match="has no sample to embed"):
        write_gallery(tmp_path, facts, empty, embedding_here(trained_embedder, facts, empty))
    other = source.benchmark.model_copy(update={"modalities": ("SAR",)})
    with pytest.raises(ValueError, match=r"the model takes RGB, NI, TI, but .* has SAR"):
        facts_of(trained_embedder, dataclasses.replace(source, benchmark=other), "float32")
