import io
import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from next.data.loading import cache as cache_module
from next.data.loading.cache import cache_root, clean_up, contents, open_cache
from next.data.loading.decoding import decode
from next.data.shards.layout import Loaded, Sample
from next.data.shards.reader import Manifest
from next.data.shards.writer import write_shards

SIZE = (32, 16)
ROWS = 12


def picture(key: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    return np.random.default_rng(key).integers(0, 256, (*size, 3), dtype=np.uint8)


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def prepared(folder: Path, card, damage: int | None = None) -> Manifest:
    """Shards of 12 train samples; the NI image of every fourth is absent; other sizes in TI."""

    def sample(row: int, split: str) -> Sample:
        return Sample(f"{split}{row:02d}", row // 3, 1, -1, (None,) * 3, ([], [], []), 1)

    def load(sample: Sample) -> Loaded:
        row = int(sample.sample_id[-2:])
        images = [png(picture(row)), png(picture(100 + row)), png(picture(200 + row, (40, 20)))]
        if row == damage:
            images[0] = images[0][:-200]
        return Loaded((images[0], images[1] if row % 4 else None, images[2]))

    splits = {
        "train": [sample(row, "train") for row in range(ROWS)],
        "gallery": [sample(row, "gallery") for row in range(3)],
    }
    return write_shards(folder, card, splits, load)


@pytest.fixture
def manifest(tmp_path, make_card) -> Manifest:
    return prepared(tmp_path / "shards", make_card())


def test_the_cache_holds_the_decoded_pixels(manifest, tmp_path):
    cache = open_cache(manifest, "train", SIZE, tmp_path)
    assert cache.images.shape == (ROWS, 3, *SIZE, 3)
    assert cache.images.dtype == np.uint8
    for row in range(ROWS):
        np.testing.assert_array_equal(cache.images[row, 0], picture(row))
        expected = picture(100 + row) if row % 4 else 0
        np.testing.assert_array_equal(cache.images[row, 1], np.broadcast_to(expected, (*SIZE, 3)))
    assert cache.present[:, 0].all()
    assert cache.present[:, 1].tolist() == [row % 4 != 0 for row in range(ROWS)]


def zeroed(path: Path) -> None:
    """What a power cut leaves of pages that were not written yet."""
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(size // 2)
        file.write(bytes(min(300_000, size // 4)))


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 5)


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("images.npy", zeroed),
        ("images.npy", flipped),
        ("images.npy", cut),
        ("present.npy", flipped),
        ("present.npy", cut),
        ("about.json", cut),
    ],
)
def test_a_cache_that_is_not_what_was_written_is_built_anew(
    manifest, tmp_path, caplog, monkeypatch, file, damage
):
    monkeypatch.setattr(cache_module, "_CHUNK", 4096)
    images = open_cache(manifest, "train", SIZE, tmp_path).images.copy()
    (folder,) = tmp_path.glob("decoded-*16*[0-9a-f]")
    damage(folder / file)
    again = open_cache(manifest, "train", SIZE, tmp_path)
    np.testing.assert_array_equal(again.images, images)
    assert again.present[:, 1].tolist() == [row % 4 != 0 for row in range(ROWS)]
    assert "was damaged" in caplog.text
    assert "is built again" in caplog.text
    caplog.clear()
    open_cache(manifest, "train", SIZE, tmp_path)
    assert caplog.text == "", "mended"


def test_a_cache_of_before_has_no_checksums_and_is_used(manifest, tmp_path, caplog):
    images = open_cache(manifest, "train", SIZE, tmp_path).images.copy()
    (about,) = tmp_path.glob("decoded-*/about.json")
    told = json.loads(about.read_text())
    del told["sums"]
    about.write_text(json.dumps(told))
    np.testing.assert_array_equal(open_cache(manifest, "train", SIZE, tmp_path).images, images)
    assert caplog.text == ""


def test_images_of_another_size_are_resized_as_the_public_codes_do(manifest, tmp_path):
    cache = open_cache(manifest, "train", SIZE, tmp_path)
    image = Image.fromarray(picture(205, (40, 20)))
    expected = np.asarray(image.resize((16, 32), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(cache.images[5, 2], expected)


def test_images_resized_bilinearly_are_a_cache_of_their_own(manifest, tmp_path):
    cubic = open_cache(manifest, "train", SIZE, tmp_path)
    linear = open_cache(manifest, "train", SIZE, tmp_path, resize="bilinear")
    assert linear.path.name == f"{cubic.path.name}-bilinear"
    image = Image.fromarray(picture(205, (40, 20)))
    expected = np.asarray(image.resize((16, 32), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(linear.images[5, 2], expected)
    assert not np.array_equal(expected, cubic.images[5, 2])
    np.testing.assert_array_equal(linear.images[:, 0], cubic.images[:, 0])


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK"])
def test_every_mode_becomes_rgb(mode):
    file = io.BytesIO()
    image = Image.fromarray(picture(0)).convert(mode)
    image.save(file, "TIFF")
    np.testing.assert_array_equal(decode(file.getvalue(), SIZE), np.asarray(image.convert("RGB")))


def test_the_cache_is_a_read_only_map_that_a_second_call_shares(manifest, tmp_path):
    calls: list[tuple[int, int]] = []
    first = open_cache(manifest, "train", SIZE, tmp_path, lambda *done: calls.append(done))
    assert calls == [(row + 1, ROWS) for row in range(ROWS)]
    second = open_cache(manifest, "train", SIZE, tmp_path, lambda *done: calls.append(done))
    assert len(calls) == ROWS, "nothing is decoded again"
    assert isinstance(second.images, np.memmap)
    assert second.path == first.path
    with pytest.raises(ValueError, match="read-only"):
        second.images[0] = 0


def test_another_size_or_split_or_digest_is_another_cache(manifest, tmp_path, make_card):
    other = prepared(tmp_path / "other", make_card(name="other"))
    caches = [
        open_cache(manifest, "train", SIZE, tmp_path),
        open_cache(manifest, "train", (16, 16), tmp_path),
        open_cache(manifest, "gallery", SIZE, tmp_path),
        open_cache(other, "train", SIZE, tmp_path),
    ]
    assert len({cache.path for cache in caches}) == 4
    assert open_cache(manifest, "query", SIZE, tmp_path).path == caches[2].path, "the same rows"


def test_an_unknown_split_is_refused(manifest, tmp_path):
    with pytest.raises(ValueError, match="did you mean gallery"):
        open_cache(manifest, "galery", SIZE, tmp_path)


def test_an_image_that_cannot_be_decoded_is_named_and_leaves_nothing(tmp_path, make_card):
    manifest = prepared(tmp_path / "shards", make_card(), damage=7)
    with pytest.raises(ValueError, match=r"RGB image of sample 'train07' in train cannot be decod"):
        open_cache(manifest, "train", SIZE, tmp_path)
    assert not [path for path in tmp_path.glob("decoded-*") if path.suffix != ".lock"]


def test_who_comes_second_waits_and_decodes_nothing(manifest, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    counts: list[int] = []

    def count(done: int, rows: int) -> None:
        counts.append(done)
        time.sleep(0.02)

    def build() -> None:
        open_cache(manifest, "train", SIZE, tmp_path, count)

    threads = [threading.Thread(target=build) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counts == list(range(1, ROWS + 1))
    assert "waiting for another process" in caplog.text


def test_a_killed_build_leaves_no_cache_and_the_next_one_cleans_up(manifest, tmp_path):
    script = f"""
        import sys, time
        from next.data.loading.cache import open_cache
        from next.data.shards.reader import open_manifest

        def stop(done, rows):
            print("built", done, flush=True)
            time.sleep(60)

        open_cache(open_manifest({manifest.uri!r}), "train", {SIZE}, {str(tmp_path)!r}, stop)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline().startswith("built")
        process.send_signal(signal.SIGKILL)
        process.wait()
    (left,) = tmp_path.glob("decoded-*.partial")
    cache = open_cache(manifest, "train", SIZE, tmp_path)
    np.testing.assert_array_equal(cache.images[11, 0], picture(11))
    assert not left.exists()


def test_a_damaged_cache_is_built_anew(manifest, tmp_path, caplog):
    path = open_cache(manifest, "train", SIZE, tmp_path).path
    os.truncate(path / "images.npy", 1000)
    cache = open_cache(manifest, "train", SIZE, tmp_path)
    np.testing.assert_array_equal(cache.images[11, 0], picture(11))
    assert "built again" in caplog.text


def test_a_full_disk_is_refused_with_the_bytes_needed_and_free(manifest, tmp_path):
    # 12 rows of 3 images of 2**20 x 2**20 pixels: more than any disk has free.
    needed = f"{ROWS * 3 * 2**40 * 3:,}"
    with pytest.raises(OSError, match=rf"needs {needed} bytes, but [\d,]+ are free.*data\.cache"):
        open_cache(manifest, "train", (2**20, 2**20), tmp_path)
    assert not [path for path in tmp_path.glob("decoded-*") if path.suffix != ".lock"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own with room for little more than one cache."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", folder],
        check=False,
        capture_output=True,
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a file system")
    yield folder
    subprocess.run(["umount", folder], check=True)


NEEDED = ROWS * 3 * SIZE[0] * SIZE[1] * 3


def test_a_disk_that_fills_up_meanwhile_is_an_error_with_the_bytes_needed(manifest, small_disk):
    def fill(done: int, rows: int) -> None:
        with (small_disk / "other").open("ab", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(4096))

    with pytest.raises(OSError, match=rf"needs {NEEDED:,} bytes, but 0 are free.*data\.cache"):
        open_cache(manifest, "train", SIZE, small_disk, fill)
    assert not contents(small_disk)
    (small_disk / "other").unlink()
    assert open_cache(manifest, "train", SIZE, small_disk).present.any(), "there is room again"
    assert not list(small_disk.glob("*.partial"))


def test_a_limit_on_the_size_of_files_is_the_same_error(manifest, tmp_path):
    script = f"""
        import resource
        from next.data.loading.cache import open_cache
        from next.data.shards.reader import open_manifest
        manifest = open_manifest({manifest.uri!r})
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        open_cache(manifest, "train", {SIZE}, {str(tmp_path)!r})
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False
    )
    assert f"the decoded cache needs {NEEDED:,} bytes" in done.stderr
    assert not contents(tmp_path)


def test_some_rows_have_a_cache_of_their_own(tmp_path, make_card, monkeypatch):
    monkeypatch.setattr("next.data.shards.layout.SHARD_BYTES", 1)
    monkeypatch.setattr("next.data.shards.layout.GROUP_BYTES", 2)
    manifest = prepared(tmp_path / "shards", make_card())
    assert np.bincount(manifest.shard_of_row("train")).tolist() == [2, 1] * 4
    whole = open_cache(manifest, "train", SIZE, tmp_path)
    np.testing.assert_array_equal(manifest.present("train"), whole.present)
    for rows in ([0, 1], [2, 4, 11]):
        cache = open_cache(manifest, "train", SIZE, tmp_path, rows=np.asarray(rows))
        np.testing.assert_array_equal(cache.images, whole.images[rows])
        np.testing.assert_array_equal(cache.present, whole.present[rows])
    assert [entry.about for entry in contents(tmp_path)] == [
        "tiny train, 3 samples, 32x16, RGB+NI+TI",
        "tiny train, 2 samples, 32x16, RGB+NI+TI",
        "tiny train, 12 samples, 32x16, RGB+NI+TI",
    ]


def aged(path: Path, days: float) -> None:
    os.utime(path, (time.time() - 86400 * days,) * 2)


def test_contents_tell_what_is_there_how_large_and_who_uses_it(manifest, tmp_path):
    cache = open_cache(manifest, "train", SIZE, tmp_path)
    old = open_cache(manifest, "gallery", SIZE, tmp_path).path
    aged(old, 3)
    (tmp_path / "decoded-left.partial").mkdir()
    aged(tmp_path / "decoded-left.partial", 5)
    mine, other, left = contents(tmp_path)
    assert (mine.path, mine.kind, mine.in_use) == (cache.path, "decoded", True)
    assert (other.path, other.kind, other.in_use) == (old, "decoded", False), "nobody reads it"
    assert (left.kind, left.bytes, left.in_use) == ("unfinished", 0, False)
    assert NEEDED < mine.bytes < NEEDED + 1000
    assert time.time() - mine.used < 60


def test_a_clean_up_removes_what_was_not_used_for_longest(manifest, tmp_path):
    paths = [
        open_cache(manifest, split, size, tmp_path).path
        for split, size in (("train", SIZE), ("gallery", SIZE), ("train", (16, 16)))
    ]
    for path, days in zip(paths, (1, 3, 2), strict=True):
        aged(path, days)
    assert clean_up(tmp_path, 1.0) == []
    assert [entry.path for entry in clean_up(tmp_path, NEEDED * 1.6e-9)] == [paths[1]]
    open_cache(manifest, "train", SIZE, tmp_path)
    assert [entry.path for entry in clean_up(tmp_path, NEEDED * 1.3e-9)] == [paths[2]]
    assert [entry.path for entry in clean_up(tmp_path, 0)] == [paths[0]]
    assert contents(tmp_path) == []


def test_a_clean_up_leaves_what_a_view_of_a_view_still_reads(manifest, tmp_path):
    some = open_cache(manifest, "train", SIZE, tmp_path).images[3:, 0][2:]
    assert clean_up(tmp_path, 0) == []
    del some
    assert len(clean_up(tmp_path, 0)) == 1


def test_a_clean_up_leaves_what_another_process_reads_until_it_is_killed(manifest, tmp_path):
    script = f"""
        import time
        from next.data.loading.cache import open_cache
        from next.data.shards.reader import open_manifest
        cache = open_cache(open_manifest({manifest.uri!r}), "train", {SIZE}, {str(tmp_path)!r})
        print("reading", flush=True)
        time.sleep(60)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline().startswith("reading")
        (entry,) = contents(tmp_path)
        assert entry.in_use
        assert clean_up(tmp_path, 0) == []
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert [entry.path for entry in clean_up(tmp_path, 0)] == [entry.path]


def test_what_is_being_built_is_neither_removed_nor_forgotten(manifest, tmp_path):
    seen: list[str] = []

    def look(done: int, rows: int) -> None:
        (entry,) = contents(tmp_path)
        assert entry.in_use
        assert entry.bytes > NEEDED, "it counts in full from the start"
        seen.append(entry.kind)
        assert clean_up(tmp_path, 0) == []

    open_cache(manifest, "train", SIZE, tmp_path, look)
    assert set(seen) == {"unfinished"}


def test_a_limit_makes_room_by_removing_what_is_not_in_use(manifest, tmp_path):
    limit = NEEDED * 2.2e-9
    old = [open_cache(manifest, "train", (16, width), tmp_path).path for width in (16, 24)]
    aged(old[0], 1)
    kept = open_cache(manifest, "gallery", SIZE, tmp_path)
    aged(kept.path, 2)
    train = open_cache(manifest, "train", SIZE, tmp_path, limit=limit)
    assert {entry.path for entry in contents(tmp_path)} == {kept.path, old[1], train.path}
    with pytest.raises(OSError, match=r"(?s)data\.cache_limit = .* GB leaves [\d,]+ beside .* use"):
        open_cache(manifest, "train", (32, 32), tmp_path, limit=limit)
    assert old[1].exists(), "nothing is removed in vain"


def test_the_root_is_made_and_defaults_to_the_home_folder(tmp_path, monkeypatch):
    assert cache_root(tmp_path / "a" / "b").is_dir()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root(None) == tmp_path / ".cache" / "next-reid"
    assert cache_root("~/mine") == tmp_path / "mine"


def test_a_root_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"data\.cache must be a folder.*another folder"):
        cache_root(tmp_path / "file")
