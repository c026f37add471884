import json
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from next.benchmark.card import Benchmark
from next.data.shards import layout
from next.data.shards.layout import GROUP_ROWS, Loaded, Sample
from next.data.shards.manifest import VERSION, Findings, Skipped
from next.data.shards.reader import (
    encode_captions,
    number_sentences,
    open_manifest,
    read_matrix,
    write_matrix,
)
from next.data.shards.writer import write_shards

BARE = Benchmark(
    name="bare",
    object="person",
    image_size=(32, 16),
    modalities=("RGB", "NI", "TI"),
    rule="none",
    storage={"kind": "folders"},
    grammar={"pattern": "(?P<pid>.)"},
    splits={"train": {"path": "a"}, "gallery": {"path": "b"}, "query": {"same_as": "gallery"}},
)
ROOT = Path(__file__).resolve().parents[3]


def sample(number: int, pid: int | None = None) -> Sample:
    pid = number // 3 if pid is None else pid
    return Sample(
        sample_id=f"{pid:06d}_{number:04d}",
        pid=pid,
        camera=number % 4,
        scene=-1,
        files=("r", None if number % 5 == 0 else "n", "t"),
        sentences=([f"Sample {number}.", "A coat."], None, []),
        size=3,
    )


def load(one: Sample) -> Loaded:
    return Loaded(
        tuple(None if file is None else f"{file} {one.sample_id}".encode() for file in one.files)
    )


TRAIN = [sample(number) for number in range(20)]
GALLERY = [sample(number, pid=900) for number in range(4)]
SPLITS = {"train": TRAIN, "gallery": GALLERY}


@pytest.fixture
def write(tmp_path, make_card):
    """Writes shards, by default those of ``SPLITS`` to ``tmp_path/out``."""

    def write(name="out", card=None, splits=SPLITS, read=load, **options):
        return write_shards(tmp_path / name, card or make_card(), splits, read, **options)

    return write


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_what_was_written_is_read_back(write):
    manifest = write(splits={"train": TRAIN[::-1], "gallery": GALLERY})
    labels = manifest.labels("train")
    assert labels.sample_id.tolist() == [one.sample_id for one in TRAIN]
    assert labels.pid.tolist() == [one.pid for one in TRAIN]
    assert labels.camera.tolist() == [one.camera for one in TRAIN]
    assert labels.scene.tolist() == [-1] * 20
    assert all(one.dtype == np.int64 for one in (labels.pid, labels.camera, labels.scene))
    rows, images = zip(*manifest.iter_images("train"), strict=True)
    assert rows == tuple(range(20))
    assert list(images) == [list(load(one).images) for one in TRAIN]
    rgb, ni, ti = manifest.sentences("train")
    assert rgb == [one.sentences[0] for one in TRAIN]
    assert ni == ti == [[]] * 20


def test_a_split_that_is_another_one_is_stored_once_and_reads_the_same(write):
    manifest = write()
    assert manifest.resolve("query") == manifest.resolve("gallery") == "gallery"
    assert manifest.splits["query"].same_as == "gallery"
    assert manifest.labels("query").sample_id.tolist() == [one.sample_id for one in GALLERY]
    assert not Path(manifest.uri, "query").exists()


def test_an_unknown_split_is_refused_with_the_near_match(write):
    with pytest.raises(ValueError, match=r"no split 'galery'; did you mean gallery\?"):
        write().labels("galery")


def test_the_counts_are_those_of_the_rows(write):
    entry = write().splits["train"]
    assert (entry.rows, entry.identities, entry.singletons) == (20, 7, 0)
    assert entry.images == {"RGB": 20, "NI": 16, "TI": 20}
    assert entry.captions == {"RGB": 20, "NI": 0, "TI": 20}
    assert entry.sentences == {"RGB": 40, "NI": 0, "TI": 0}


def test_any_parquet_reader_sees_one_row_a_sample_sorted_by_pid(write):
    manifest = write()
    table = pq.read_table(Path(manifest.uri) / "train" / "00000.parquet")
    assert table.column_names == [
        "sample_id", "pid", "camera", "scene",
        "image_RGB", "image_NI", "image_TI",
        "sentences_RGB", "sentences_NI", "sentences_TI",
    ]  # fmt: skip
    assert table["pid"].to_pylist() == sorted(one.pid for one in TRAIN)
    assert table["image_NI"].null_count == 4


def test_a_row_group_holds_whole_identities(write):
    splits = SPLITS | {"train": [sample(number) for number in range(2 * GROUP_ROWS)]}
    manifest = write(splits=splits)
    file = pq.ParquetFile(Path(manifest.uri) / "train" / "00000.parquet")
    groups = [
        set(file.read_row_group(group, columns=["pid"])["pid"].to_pylist())
        for group in range(file.num_row_groups)
    ]
    assert len(groups) > 1
    assert sum(map(len, groups)) == len(set().union(*groups))


def test_several_shards_are_one_split(write, monkeypatch):
    one = write("one")
    monkeypatch.setattr(layout, "GROUP_ROWS", 3)
    monkeypatch.setattr(layout, "SHARD_BYTES", 20)
    many = write("many")
    assert len(one.splits["train"].shards) == 1
    assert len(many.splits["train"].shards) > 2
    assert many.labels("train").pid.tolist() == one.labels("train").pid.tolist()
    assert list(many.iter_images("train")) == list(one.iter_images("train"))
    assert many.sentences("train") == one.sentences("train")
    assert many.digest == one.digest


def test_the_same_source_gives_the_same_bytes_wherever_it_is_written(write, tmp_path):
    write("here", threads=1)
    write("deep/there", splits={"gallery": GALLERY, "train": TRAIN[::-1]}, threads=4)
    assert contents(tmp_path / "here") == contents(tmp_path / "deep" / "there")


@pytest.mark.parametrize(
    "change",
    [
        {"sample_id": "x"},
        {"pid": 77},
        {"camera": 9},
        {"scene": 0},
        {"files": ("r", "other", "t")},
        {"files": ("r", "t", "n")},
        {"files": ("r", None, "t")},
        {"sentences": (["Sample 6."], None, [])},
        {"sentences": (["Sample 6. A coat."], None, [])},
        {"sentences": (["Sample 6.", "A coat."], None, None)},
        {"sentences": (None, ["Sample 6.", "A coat."], [])},
    ],
)
def test_the_digest_changes_with_any_content(write, change):
    changed = [*TRAIN[:6], TRAIN[6]._replace(**change), *TRAIN[7:]]
    assert write("a").digest != write("b", splits=SPLITS | {"train": changed}).digest


def digest_of(splits=SPLITS, read=load, **options) -> str:
    with tempfile.TemporaryDirectory() as folder:
        return write_shards(folder, BARE, splits, read, **options).digest


DIGEST = digest_of()


@settings(max_examples=25, deadline=None)
@given(st.sets(st.integers(0, 19), min_size=1), st.data())
def test_the_digest_changes_with_any_byte_of_any_image(rows, data):
    """In any set of samples, one byte of one modality each."""
    changed = {}
    for row in sorted(rows):
        images = list(load(TRAIN[row]).images)
        modality = data.draw(st.sampled_from([m for m, image in enumerate(images) if image]))
        image = bytearray(images[modality])
        place = data.draw(st.integers(0, len(image) - 1))
        image[place] ^= data.draw(st.integers(1, 255))
        images[modality] = bytes(image)
        changed[TRAIN[row].sample_id] = Loaded(tuple(images))
    assert digest_of(read=lambda one: changed.get(one.sample_id) or load(one)) != DIGEST


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 19), st.integers(0, 1), st.data())
def test_the_digest_changes_with_any_character_of_any_caption(row, sentence, data):
    texts = list(TRAIN[row].sentences)
    sentences = list(texts[0])
    place = data.draw(st.integers(0, len(sentences[sentence]) - 1))
    old = sentences[sentence][place]
    new = chr(data.draw(st.integers(1, 0xD7FF).filter(lambda code: code != ord(old))))
    sentences[sentence] = sentences[sentence][:place] + new + sentences[sentence][place + 1 :]
    other = TRAIN[row]._replace(sentences=(sentences, *texts[1:]))
    splits = SPLITS | {"train": [*TRAIN[:row], other, *TRAIN[row + 1 :]]}
    assert digest_of(splits) != DIGEST


@settings(max_examples=25, deadline=None)
@given(st.permutations(TRAIN), st.integers(1, 9), st.integers(1, 99), st.data())
def test_the_digest_changes_with_nothing_else(train, group_rows, shard_bytes, data):
    """Neither with the order of samples, the layout of shards, what files were, nor threads."""
    touched = data.draw(st.integers(0, 19))
    train[touched] = train[touched]._replace(changed=data.draw(st.integers(0, 2**60)))
    train[touched] = train[touched]._replace(size=data.draw(st.integers(0, 2**20)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "GROUP_ROWS", group_rows)
        patch.setattr(layout, "SHARD_BYTES", shard_bytes)
        threads = data.draw(st.integers(1, 3))
        assert digest_of(SPLITS | {"train": train}, threads=threads) == DIGEST


@pytest.mark.parametrize(
    "change",
    [
        {"name": "other"},
        {"rule": "none"},
        {"object": "vehicle"},
        {"modalities": ["NI", "RGB", "TI"]},
    ],
)
def test_the_digest_changes_with_what_decides_a_result(write, make_card, change):
    assert write("a").digest != write("b", card=make_card(**change)).digest


def test_the_digest_changes_with_an_exchange_of_splits(write):
    exchanged = {"train": GALLERY, "gallery": TRAIN}
    assert write("a").digest != write("b", splits=exchanged).digest


@pytest.mark.parametrize(
    "change",
    [
        {"recipe": {"batch.identities": 4}},
        {"anchors": {"other": {"mAP": 1, "rank1": 2}}},
        {"counts": {"train": {"samples": 20}}},
    ],
)
def test_the_digest_is_not_touched_by_what_changes_no_row(write, make_card, change):
    assert write("a").digest == write("b", card=make_card(**change)).digest


def test_writing_the_same_again_keeps_the_shards_and_takes_the_new_card(write, make_card, tmp_path):
    write()
    shard = tmp_path / "out" / "train" / "00000.parquet"
    before = shard.stat().st_mtime_ns
    manifest = write(card=make_card(recipe={"batch": {"identities": 4}}))
    assert manifest.benchmark.recipe == {"batch.identities": 4}
    assert shard.stat().st_mtime_ns == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_shards_of_another_digest_are_not_overwritten(write, tmp_path):
    write()
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match=r"out holds shards of tiny with digest .* remove it"):
        write(splits=SPLITS | {"train": TRAIN[1:]})
    assert contents(tmp_path) == before


def test_a_folder_of_something_else_is_not_touched(write, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("dear")
    with pytest.raises(FileExistsError, match=r"out is there already and holds no manifest\.json"):
        write()
    assert contents(tmp_path) == {"out/thesis.tex": b"dear"}


def test_an_empty_folder_is_as_good_as_none(write, tmp_path):
    (tmp_path / "out").mkdir()
    assert write().splits["train"].rows == 20


def test_an_error_in_the_middle_leaves_nothing(write, tmp_path):
    def fail(one: Sample) -> Loaded:
        raise ValueError(f"{one.sample_id} is bad")

    with pytest.raises(ValueError, match="is bad"):
        write(read=fail)
    assert list(tmp_path.iterdir()) == []


def test_what_is_skipped_is_listed_and_changes_nothing_else(write):
    def skip(one: Sample) -> Loaded:
        bad = one.sample_id == TRAIN[3].sample_id
        return Loaded(None, (Skipped(file="t/x.jpg", reason="is bad"),)) if bad else load(one)

    earlier = Findings(skipped=(Skipped(file="a.jpg", reason="does not match"),))
    skipped = write("skipped", read=skip, findings=earlier)
    absent = write("absent", splits=SPLITS | {"train": [*TRAIN[:3], *TRAIN[4:]]})
    assert [item.file for item in skipped.file.findings.skipped] == ["a.jpg", "t/x.jpg"]
    assert skipped.digest == absent.digest


def test_a_split_of_which_nothing_is_left_is_refused(write):
    with pytest.raises(ValueError, match="split gallery has no sample that can be used"):
        write(splits={"train": TRAIN, "gallery": []})


def test_equal_names_within_a_split_are_refused(write):
    with pytest.raises(ValueError, match=r"split train: 2 samples are called '000000_0000'"):
        write(splits=SPLITS | {"train": [*TRAIN, TRAIN[0]]})


WRITER = """
    import sys, time
    sys.path[:0] = [{tests!r}]
    from test_reader import SPLITS, load
    from tests.data.conftest import card
    from next.data.shards.writer import write_shards

    def slow(one):
        print("reading", flush=True)
        time.sleep(60 if one.pid else 0)
        return load(one)

    write_shards({out!r}, card(), SPLITS, slow, threads=1)
"""


@pytest.fixture
def writing(tmp_path):
    """Another process that is in the middle of writing ``tmp_path/out``."""
    script = textwrap.dedent(WRITER).format(
        tests=str(Path(__file__).parent), out=str(tmp_path / "out")
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    process.stdout.readline()
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_killed_process_leaves_nothing_that_looks_finished_and_the_next_one_finishes(
    writing, write, tmp_path
):
    writing.send_signal(signal.SIGKILL)
    writing.wait()
    with pytest.raises(FileNotFoundError, match=r"no manifest, so this is no finished set"):
        open_manifest(tmp_path / "out")
    manifest = write()
    write("undisturbed")
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")
    assert manifest.uri == str(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "undisturbed"]


def test_two_processes_cannot_write_one_folder(writing, write):
    with pytest.raises(ValueError, match=rf"out is being written by \S+ \(process {writing.pid}\)"):
        write()


def rewrite_manifest(folder: Path, edit) -> None:
    path = folder / "manifest.json"
    tree = json.loads(path.read_text())
    edit(tree)
    path.write_text(json.dumps(tree))


def test_a_folder_without_manifest_says_how_to_write_one(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"manifest\.json: .* jobs/prepare\.py --out"):
        open_manifest(tmp_path)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda tree: tree.update(version=VERSION + 1), r"version 2, but .* reads up to 1; update"),
        (lambda tree: tree.update(format="croissant"), r"no manifest of shards"),
        (
            lambda tree: tree.update(digets="x"),
            r"digets: there is no such key; did you mean digest",
        ),
        (lambda tree: tree.pop("findings"), r"findings is required"),
        (lambda tree: tree.update(digest="0" * 64), r"digest does not follow from the shards"),
        (lambda tree: tree["card"].update(rule="none"), r"digest does not follow from the shards"),
        (
            lambda tree: tree["splits"]["train"]["shards"][0].update(content="x"),
            r"splits.train.shards.0.content",
        ),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(write, tmp_path, edit, message):
    write()
    rewrite_manifest(tmp_path / "out", edit)
    with pytest.raises(ValueError, match=rf"(?s)manifest\.json.*{message}"):
        open_manifest(tmp_path / "out")


@pytest.mark.parametrize("text", ["", "{", "[]", '"x"'])
def test_a_manifest_that_is_none_is_refused(write, tmp_path, text):
    write()
    (tmp_path / "out" / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=r"manifest\.json is (not JSON|no manifest of shards)"):
        open_manifest(tmp_path / "out")


def replace_shard(folder: Path, table: pa.Table) -> None:
    """Write another first shard of train, and tell the manifest its size."""
    shard = folder / "train" / "00000.parquet"
    pq.write_table(table, shard)

    def resize(tree):
        tree["splits"]["train"]["shards"][0]["bytes"] = shard.stat().st_size

    rewrite_manifest(folder, resize)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda table: table.drop_columns("image_NI"), r"column image_NI is missing"),
        (
            lambda table: table.set_column(1, "pid", table["pid"].cast(pa.string())),
            r"column pid must be int64, but is string",
        ),
        (lambda table: table.slice(1), r"has 19 rows, but the manifest says 20"),
    ],
)
def test_a_shard_that_does_not_fit_is_refused_by_file_and_column(write, tmp_path, edit, message):
    write()
    shard = tmp_path / "out" / "train" / "00000.parquet"
    replace_shard(tmp_path / "out", edit(pq.read_table(shard)))
    with pytest.raises(ValueError, match=rf"train/00000\.parquet: {message}"):
        open_manifest(tmp_path / "out")


def test_a_shard_cut_short_is_refused(write, tmp_path):
    write()
    shard = tmp_path / "out" / "train" / "00000.parquet"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"00000\.parquet: has \d+ bytes, but the manifest says"):
        open_manifest(tmp_path / "out")


def test_a_shard_that_is_no_parquet_file_is_refused(write, tmp_path):
    manifest = write()
    shard = tmp_path / "out" / "train" / "00000.parquet"
    shard.write_bytes(b"x" * shard.stat().st_size)
    with pytest.raises(ValueError, match=r"00000\.parquet is no Parquet file"):
        manifest.sentences("train")
    (tmp_path / "out" / "labels.parquet").unlink()
    with pytest.raises(ValueError, match=r"00000\.parquet is no Parquet file"):
        open_manifest(tmp_path / "out")


def test_images_of_a_shard_with_one_changed_byte_are_not_read(write, tmp_path):
    write()
    shard = tmp_path / "out" / "train" / "00000.parquet"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(
        ValueError, match=r"00000\.parquet: its sha256 is not the manifest's, .*pre"
    ):
        list(open_manifest(tmp_path / "out").iter_images("train", np.array([3])))


def test_a_missing_shard_is_named(write, tmp_path):
    write()
    (tmp_path / "out" / "train" / "00000.parquet").unlink()
    with pytest.raises(FileNotFoundError, match=r"train/00000\.parquet: the manifest lists it"):
        open_manifest(tmp_path / "out")


def test_shards_can_be_moved(write, tmp_path):
    write()
    (tmp_path / "out").rename(tmp_path / "moved")
    assert open_manifest(f"{tmp_path}/moved/").labels("train").pid.shape == (20,)


def test_the_uri_is_absolute(write, tmp_path, monkeypatch):
    write()
    monkeypatch.chdir(tmp_path)
    assert open_manifest("out").uri == str(tmp_path / "out")


def test_a_matrix_is_read_back_from_its_mapped_file(tmp_path):
    values = np.random.default_rng(0).random((5, 8), dtype=np.float32)
    write_matrix(tmp_path / "m.arrow", list("abcdé"), values)
    matrix = read_matrix(tmp_path / "m.arrow")
    assert matrix.strings == list("abcdé")
    assert np.array_equal(matrix.values, values)
    assert not matrix.values.flags.writeable
    assert not matrix.values.flags.owndata
    assert [path.name for path in tmp_path.iterdir()] == ["m.arrow"]


def test_a_matrix_may_be_empty(tmp_path):
    write_matrix(tmp_path / "m.arrow", [], np.empty((0, 8), np.float32))
    assert read_matrix(tmp_path / "m.arrow").values.shape == (0, 8)


@pytest.mark.parametrize(
    ("strings", "values", "message"),
    [
        (["a"], np.zeros((2, 3), np.float32), r"one row for each of 1 strings.*\(2, 3\)"),
        (["a"], np.zeros((1, 0), np.float32), r"a column at least, but got shape \(1, 0\)"),
        (["a"], np.zeros((1, 3)), r"float32 values, but got float64"),
    ],
)
def test_a_matrix_of_another_form_is_refused(tmp_path, strings, values, message):
    with pytest.raises(ValueError, match=message):
        write_matrix(tmp_path / "m.arrow", strings, values)


@pytest.mark.parametrize("keep", [0, 20, 200])
def test_a_matrix_file_cut_short_is_refused(tmp_path, keep):
    path = tmp_path / "m.arrow"
    write_matrix(path, ["a"], np.zeros((1, 3), np.float32))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"m\.arrow is no matrix file .*remove it"):
        read_matrix(path)


def column_of(captions: list[list[str] | None]) -> pa.ChunkedArray:
    return pa.chunked_array([pa.array(captions, pa.list_(pa.string()))])


def test_sentences_are_numbered_over_shards_modality_by_modality():
    first = [column_of([["b.", "a."], None]), column_of([[], ["c."]])]
    second = [column_of([["a."]]), column_of([["b.", "d.", "b."]])]
    shards = [[encode_captions(column) for column in shard] for shard in (first, second)]
    sentences, ids = number_sentences(shards)
    assert sentences == ["b.", "a.", "c.", "d."]
    assert ids.tolist() == [
        [[0, 1, -1], [-1, -1, -1]],
        [[-1, -1, -1], [2, -1, -1]],
        [[1, -1, -1], [0, 3, 0]],
    ]


def test_captions_of_more_than_2_gib_are_numbered():
    """Without the memory: one piece of text stands in many chunks."""
    piece = pa.array([["x" * 2**24, "y"]], pa.list_(pa.string()))
    column = pa.chunked_array([piece] * 140)
    assert 140 * 2**24 > 2**31
    with pytest.raises(pa.ArrowInvalid, match="offset overflow"):
        column.combine_chunks()  # what must not be done
    sentences, ids = number_sentences([[encode_captions(column)]])
    assert [len(sentence) for sentence in sentences] == [2**24, 1]
    assert ids.tolist() == [[[0, 1]]] * 140


def test_distinct_texts_have_room_for_more_than_2_gib(tmp_path):
    """In memory and in the text bank's file."""
    assert encode_captions(column_of([["a."]])).sentences.type.value_type == pa.large_string()
    write_matrix(tmp_path / "m.arrow", ["a"], np.zeros((1, 3), np.float32))
    with pa.memory_map(str(tmp_path / "m.arrow")) as file, pa.ipc.open_file(file) as reader:
        assert reader.schema.field("text").type == pa.large_string()


def test_a_matrix_of_an_earlier_version_is_read(tmp_path):
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(np.ones(3, np.float32)), 3)
    batch = pa.record_batch([pa.array(["a"], pa.string()), vectors], names=["text", "vector"])
    with (
        pa.OSFile(str(tmp_path / "m.arrow"), "wb") as file,
        pa.ipc.new_file(file, batch.schema) as writer,
    ):
        writer.write_batch(batch)
    assert read_matrix(tmp_path / "m.arrow").strings == ["a"]
