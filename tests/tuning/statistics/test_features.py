"""Features of trials that a disk or somebody has changed."""

import json

import numpy as np
import pytest

from next.tuning.statistics.features import read_axes, read_features, write_axes


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "features.npz"
    np.savez_compressed(path, **ODD | {"average_precision": np.linspace(0, 1, 5)})
    return path


ODD = {
    "average_precision": np.ones(5),
    "query_pid": np.arange(5),
    "query": np.eye(5, dtype=np.float16),
    "gallery": np.ones((7, 5), dtype=np.float16),
    "own": np.arange(5),
}
"""Of five queries; whole, and with something odd in place of a part."""


def test_what_was_kept_is_read(path):
    assert read_features(path)["average_precision"].tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert read_features(path.with_name("none.npz")) is None


def flipped(path):
    np.savez(path, **ODD | {"average_precision": np.array([0.25, 0.5, 1, 1, 1])})
    content, old = path.read_bytes(), np.array(0.25).tobytes()
    assert content.count(old) == 1
    path.write_bytes(content.replace(old, np.array(0.75).tobytes()))


def shortened(path):
    """NumPy then reads fewer bytes, and never comes to the checksum at their end."""
    np.savez(path, **ODD | {"gallery": np.ones((500, 50))})
    content = path.read_bytes()
    assert content.count(b"(500, 50)") == 1
    path.write_bytes(content.replace(b"(500, 50)", b"(400, 50)"))


@pytest.mark.parametrize(
    "damage",
    [
        flipped,
        shortened,
        lambda path: path.write_bytes(path.read_bytes()[:100]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(bytes(300)),
        lambda path: path.write_text("<html>"),
        lambda path: np.savez(path, query_pid=np.arange(5)),
        lambda path: np.savez(path, **{n: a for n, a in ODD.items() if n != "gallery"}),
        lambda path: np.savez(path, **ODD | {"average_precision": np.ones(4)}),
        lambda path: np.savez(path, **ODD | {"query": np.ones((4, 5))}),
        lambda path: np.savez(path, **ODD | {"gallery": np.ones((7, 3))}),
        lambda path: np.savez(path, **ODD | {"average_precision": np.array(["x"] * 5)}),
        lambda path: np.savez(path, **ODD | {"average_precision": np.array([{}] * 5)}),
    ],
    ids=[
        "flipped",
        "shortened",
        "cut",
        "empty",
        "zeros",
        "page",
        "lacking",
        "no gallery",
        "shapes",
        "queries",
        "widths",
        "texts",
        "objects",
    ],
)
def test_what_is_damaged_is_named_and_ends_nothing(path, caplog, damage):
    damage(path)
    assert read_features(path) is None
    assert f"{path} is damaged (" in caplog.text
    assert "bring the file back from a copy" in caplog.text


def test_a_damaged_array_is_found_wherever_it_is(path):
    content = path.read_bytes()
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 0x10
        path.write_bytes(changed)
        found = read_features(path)
        assert found is None or found["average_precision"].tolist() == [0, 0.25, 0.5, 0.75, 1]


AXES = {
    "usage": {"semantic": [0.5, float("nan")]},
    "choices": 2,
    "default": {"val/mAP": 30.0},
    "best": [{"val/mAP": 31.5}],
    "by_axis": {},
}


def test_axes_come_back_as_they_were_written(tmp_path):
    write_axes(tmp_path / "axes.json", AXES)
    assert repr(read_axes(tmp_path / "axes.json")) == repr(AXES)
    (tmp_path / "older.json").write_text(json.dumps({"usage": {}}))
    assert read_axes(tmp_path / "older.json") == {"usage": {}}, "without a checksum"
    assert read_axes(tmp_path / "none.json") is None


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("31.5", "91.5"),
        lambda text: text[:20],
        lambda text: "[]",
        lambda text: "",
        lambda text: "\0" * 40,
        lambda text: '{"usage": 1}',
        lambda text: '{"best": []}',
        lambda text: '{"usage": {}, "best": []}',
    ],
)
def test_axes_that_were_changed_are_named_and_end_nothing(tmp_path, caplog, change):
    path = tmp_path / "axes.json"
    write_axes(path, AXES)
    path.write_text(change(path.read_text()))
    assert read_axes(path) is None
    assert f"{path} is damaged (" in caplog.text
