"""Whatever a source, a set of shards or a bucket may be spoilt by, one by one, through the job."""

import io
import json
import os
import re
import socket
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from next import storage
from next.data.loading.cache import cache_root, open_cache
from next.data.shards.reader import open_manifest
from next.storage import open_folder

CARD = Path(__file__).resolve().parents[2] / "datasets" / "demo.toml"
FIRST = "000001_cam1_0_00.jpg"


def image(mode: str, kind: str, size: tuple[int, int] = (16, 32)) -> bytes:
    """An encoded image of a mode of Pillow's."""
    file = io.BytesIO()
    if mode == "I;16":
        Image.fromarray(np.arange(512, dtype=np.uint16).reshape(32, 16) * 99).save(file, kind)
    else:
        Image.linear_gradient("L").resize(size).convert(mode).save(file, kind)
    return file.getvalue()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def be_text(path: Path) -> None:
    path.write_text("I am a text file.")


def be_empty(path: Path) -> None:
    path.write_bytes(b"")


def have_16_bits(path: Path) -> None:
    path.write_bytes(image("I;16", "PNG"))


def be_misnamed(path: Path) -> None:
    path.with_name("Copy of " + path.name).write_bytes(path.read_bytes())


def be_alone(path: Path) -> None:
    path.with_name("000003_cam4_1_77.jpg").write_bytes(path.read_bytes())


REFUSED = [
    (truncate, rf"raw/train/NI/{FIRST} cannot be decoded \(.*truncated", [f"train/NI/{FIRST}"]),
    (be_text, rf"raw/train/NI/{FIRST} is no image that Pillow can open", [f"train/NI/{FIRST}"]),
    (be_empty, rf"raw/train/NI/{FIRST} is empty \(0 bytes\)", [f"train/NI/{FIRST}"]),
    (
        have_16_bits,
        rf"NI/{FIRST} has more than 8 bits .*depth.NI = .LOW, HIGH.",
        [f"train/NI/{FIRST}"],
    ),
    (
        be_misnamed,
        rf"1 file .*: train/NI/Copy of {FIRST} does not match grammar\.pattern; remove or rename",
        [f"train/NI/Copy of {FIRST}"],
    ),
    (
        be_alone,
        r"train/NI/000003_cam4_1_77\.jpg has no RGB and no TI beside it .*missing = \"keep\"",
        ["train/NI/000003_cam4_1_77.jpg"],
    ),
]


@pytest.mark.parametrize(("spoil", "message", "skipped"), REFUSED)
def test_a_bad_file_is_named_and_nothing_is_left_or_it_is_skipped_counted_and_listed(
    raw, tmp_path, prepare, spoil, message, skipped
):
    spoil(raw / "train" / "NI" / FIRST)
    arguments = ("--card", CARD, "--source", raw, "--out", tmp_path / "out")
    done = prepare(*arguments)
    assert done.returncode == 2
    assert re.search(rf"^error: .*{message}.*--on-bad skip", done.stderr, re.MULTILINE)
    assert "Traceback" not in done.stderr
    assert os.listdir(tmp_path) == ["raw"]

    done = prepare(*arguments, "--on-bad", "skip")
    assert done.returncode == 0
    assert f"left out  {len(skipped)} file" in done.stdout
    findings = open_manifest(tmp_path / "out").file.findings
    assert [item.file for item in findings.skipped] == skipped
    assert prepare("--check", tmp_path / "out").returncode == 0


@pytest.mark.parametrize(
    "data",
    [image("CMYK", "JPEG"), image("L", "JPEG"), image("RGB", "JPEG", (40, 50)), image("P", "PNG")],
    ids=["CMYK", "grey", "another size", "palette PNG"],
)
def test_other_images_of_eight_bits_keep_their_bytes_and_are_decoded_to_rgb_of_the_right_size(
    raw, tmp_path, prepare, data
):
    (raw / "train" / "NI" / FIRST).write_bytes(data)
    done = prepare("--card", CARD, "--source", raw, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    manifest = open_manifest(tmp_path / "out")
    assert manifest.take("train", [0])[0].images[1] == data
    cache = open_cache(manifest, "train", (32, 16), cache_root(tmp_path / "cache"))
    assert cache.images[0, 1].shape == (32, 16, 3)
    assert 20 < cache.images[0, 1].mean() < 235
    assert cache.present.all()


def test_two_files_that_claim_one_sample_are_both_named_skip_or_not(raw, tmp_path, prepare):
    card = tmp_path / "card.toml"
    card.write_text(CARD.read_text().replace(r"\.jpg'", r"\.(jpg|png)'"))
    (raw / "train" / "NI" / FIRST).with_suffix(".png").write_bytes(image("RGB", "PNG"))
    for on_bad in ("fail", "skip"):
        done = prepare(
            "--card", card, "--source", raw, "--out", tmp_path / "out", "--on-bad", on_bad
        )
        assert done.returncode == 2
        assert re.search(r"_00\.jpg and train/NI/.*_00\.png both claim the sample", done.stderr)
        assert not (tmp_path / "out").exists()


def test_a_caption_for_no_image_and_an_image_without_one_are_counted_and_named(
    raw, tmp_path, prepare, caplog
):
    path = raw / "text" / "train_NI.json"
    items = json.loads(path.read_text())
    stranger = {"item": "999999_cam1_0_00.jpg", "description": "Nobody."}
    path.write_text(json.dumps([stranger, *items[1:]]))
    done = prepare("--card", CARD, "--source", raw, "--out", tmp_path / "out", "--json")
    assert done.returncode == 0
    assert "text/train_NI.json: 1 caption without an image" in caplog.text
    stem = items[0]["item"].removesuffix(".jpg")
    assert f"train: 1 image of NI without caption: {stem}" in caplog.text
    answer = json.loads(done.stdout)
    assert answer["findings"]["unused_captions"] == {"text/train_NI.json": 1}
    assert answer["splits"]["train"]["captions"] == {"RGB": 6, "NI": 5, "TI": 6}
    table = prepare("--check", tmp_path / "out").stdout.splitlines()
    assert table[1].split()[8:10] == ["17", "1"]  # captions, uncaptioned


def test_counts_that_differ_stop_it_unless_that_is_allowed(raw, tmp_path, prepare, caplog):
    card = tmp_path / "card.toml"
    card.write_text(CARD.read_text() + "[counts]\ntrain = { identities = 171, samples = 6 }\n")
    arguments = ("--card", card, "--source", raw, "--out", tmp_path / "out")
    done = prepare(*arguments)
    assert done.returncode == 2
    assert re.search(
        r"error: counts\.train\.identities: the card of demo says 171, but the source has 3\n.*"
        r"--allow-count-mismatch",
        done.stderr,
    )
    done = prepare(*arguments, "--allow-count-mismatch")
    assert done.returncode == 0
    assert "counts.train.identities: the card of demo says 171" in caplog.text


@pytest.fixture
def shards(demo_shards, tmp_path) -> Path:
    """A copy of sound shards, to be spoilt."""
    return open_folder(demo_shards).download_tree("", tmp_path / "shards")


def cut(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[:-100])


def lose_a_column(shard: Path) -> None:
    pq.write_table(pq.read_table(shard).drop_columns("image_NI"), shard)


def flip_a_byte(shard: Path) -> None:
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)


def be_newer(shard: Path) -> None:
    manifest = shard.parents[1] / "manifest.json"
    tree = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(tree | {"version": 99}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (cut, r"train/00000\.parquet: has \d+ bytes, but the manifest says \d+; prepare"),
        (lose_a_column, r"train/00000\.parquet: column image_NI is missing; prepare"),
        (flip_a_byte, r"train/00000\.parquet: its sha256 is not the manifest's"),
        (be_newer, r"manifest\.json is of format version 99, but .* reads up to 1; update"),
        (Path.unlink, r"train/00000\.parquet: the manifest lists it, but it is not there"),
    ],
)
def test_spoilt_shards_are_found_by_file_and_column(shards, prepare, spoil, message):
    spoil(shards / "train" / "00000.parquet")
    done = prepare("--check", shards)
    assert done.returncode == 2
    assert re.search(rf"^error: .*{message}", done.stderr, re.MULTILINE)
    assert "Traceback" not in done.stderr


def test_a_destination_that_is_read_only_is_refused(raw, prepare):
    done = prepare("--card", CARD, "--source", raw, "--out", "/sys/shards")
    assert done.returncode == 2
    assert re.search(r"error: /sys cannot be written \(.*choose another", done.stderr)


def test_a_bucket_does_as_well_as_a_folder(raw, prepare, s3):
    open_folder(s3).upload_tree(raw, "raw")
    done = prepare("--card", CARD, "--source", f"{s3}/raw", "--out", f"{s3}/out", "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["uri"] == f"{s3}/out"
    checked = prepare("--check", f"{s3}/out", "--json")
    assert (checked.returncode, json.loads(checked.stdout)["images_decoded"]) == (0, 30)


def wrong_secret(environment: dict[str, str], s3: str) -> str:
    environment["AWS_SECRET_ACCESS_KEY"] = "wrong"
    return f"{s3}/out"


def no_bucket(environment: dict[str, str], s3: str) -> str:
    return "s3://no-such-bucket-here/out"


def no_server(environment: dict[str, str], s3: str) -> str:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        environment["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{closed.getsockname()[1]}"
    return f"{s3}/out"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (wrong_secret, r"refuses the credentials \(SIGNATURE_DOES_NOT_MATCH\); check AWS_ACCESS"),
        (no_bucket, r"there is no bucket 'no-such-bucket-here' on http://127\.0\.0\.1"),
        (no_server, r"http://127\.0\.0\.1:\d+ cannot be reached .*check AWS_ENDPOINT_URL"),
    ],
)
def test_what_is_wrong_with_a_bucket_is_said(raw, prepare, s3, monkeypatch, spoil, message):
    monkeypatch.setattr(storage, "ATTEMPTS", 1)
    environment = dict(os.environ)
    uri = spoil(environment, s3)
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL"):
        monkeypatch.setenv(name, environment[name])
    for arguments in (
        ("--card", CARD, "--source", raw, "--out", uri),
        ("--card", CARD, "--source", uri, "--out", "out"),
        ("--check", uri),
    ):
        done = prepare(*arguments)
        assert done.returncode == 2
        assert re.search(rf"^error: s3://.*{message}", done.stderr, re.MULTILINE)
        assert "Traceback" not in done.stderr


def test_a_bucket_that_may_only_be_read_is_refused(raw, prepare, s3, s3_server, monkeypatch):
    for name, value in s3_server.new_user("s3:Get*", "s3:List*").items():
        monkeypatch.setenv(name, value)
    done = prepare("--card", CARD, "--source", raw, "--out", f"{s3}/out")
    assert done.returncode == 2
    assert re.search(r"error: s3://.*is read-only for these credentials; write", done.stderr)
