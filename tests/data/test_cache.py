import io
import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from next.data.cache import cache_root, decode, open_cache
from next.data.layout import Loaded, Sample
from next.data.shards import Manifest, write_shards

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


def test_images_of_another_size_are_resized_as_the_public_codes_do(manifest, tmp_path):
    cache = open_cache(manifest, "train", SIZE, tmp_path)
    image = Image.fromarray(picture(205, (40, 20)))
    expected = np.asarray(image.resize((16, 32), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(cache.images[5, 2], expected)


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
        from next.data.cache import open_cache
        from next.data.shards import open_manifest

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
    assert "built anew" in caplog.text


def test_a_full_disk_is_refused_with_the_bytes_needed_and_free(manifest, tmp_path):
    # 12 rows of 3 images of 2**20 x 2**20 pixels: more than any disk has free.
    needed = f"{ROWS * 3 * 2**40 * 3:,}"
    with pytest.raises(OSError, match=rf"needs {needed} bytes, but [\d,]+ are free.*data\.cache"):
        open_cache(manifest, "train", (2**20, 2**20), tmp_path)
    assert not [path for path in tmp_path.glob("decoded-*") if path.suffix != ".lock"]


def test_the_root_is_made_and_defaults_to_the_home_folder(tmp_path, monkeypatch):
    assert cache_root(tmp_path / "a" / "b").is_dir()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root(None) == tmp_path / ".cache" / "next-reid"
    assert cache_root("~/mine") == tmp_path / "mine"


def test_a_root_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"data\.cache must be a folder.*another folder"):
        cache_root(tmp_path / "file")
