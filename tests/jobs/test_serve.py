"""jobs/serve.py before it serves: what it checks, and what it refuses in one line."""

import json
import os
import runpy
import shutil
import socket
import stat
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from next.retrieval.gallery import FACTS, open_gallery
from tests.ports import free_port
from tests.serving.conftest import TOKEN, other_version, write

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def place(trained_checkpoint, trained_embedder, demo_shards, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("serve")
    (folder / "model").symlink_to(trained_checkpoint)
    write(trained_embedder, demo_shards, "gallery", folder / "galleries" / "first")
    return folder


@pytest.fixture
def serve(monkeypatch, capsys, place):
    """Runs the job as a dry run; gives its code, and what it says."""

    def run(*flags: object, gallery: object = None) -> tuple[int, str, str]:
        words = {"--model": place / "model", "--gallery": gallery or place / "galleries"}
        words |= {"--port": free_port()}
        words |= dict(zip(flags[::2], flags[1::2], strict=True))
        line = [
            "serve.py",
            "--dry-run",
            "--json",
            *(str(w) for pair in words.items() for w in pair),
        ]
        monkeypatch.setattr(sys, "argv", line)
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / "jobs" / "serve.py"), run_name="__main__")
        return end.value.code, *capsys.readouterr()

    return run


def refused(answer: tuple[int, str, str], error: str) -> None:
    code, said, told = answer
    assert (code, said) == (2, ""), told
    assert error in told
    assert len(told.splitlines()) == 1


def test_a_dry_run_says_what_would_be_served_and_where_the_token_is(serve, place, monkeypatch):
    monkeypatch.setenv("HOME", str(place))
    monkeypatch.delenv("NEXT_REID_TOKEN", raising=False)
    code, said, error = serve()
    assert code == 0, error
    answer = json.loads(said)
    gallery = open_gallery(place / "galleries" / "first")
    assert (answer["model"], answer["gallery"]) == (gallery.facts.model, gallery.digest)
    assert answer["rows"] == len(gallery)
    file = place / ".next-reid" / "token"
    assert answer["token"] == str(file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600, "its owner alone reads it"
    token = file.read_text()
    assert len(token.strip()) == 64
    assert serve()[0] == 0
    assert file.read_text() == token, "made once"
    monkeypatch.setenv("NEXT_REID_TOKEN", TOKEN)
    _, said, _ = serve(gallery=place / "galleries" / "first")
    assert json.loads(said)["token"] == "NEXT_REID_TOKEN"


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (("--host", "nowhere"), "--host must be an address, such as 127.0.0.1 or 0.0.0.0, but got"),
        (("--host", "192.0.2.1"), "--host 192.0.2.1 is no address of this machine"),
        (("--port", 0), "--port from 1 to 65535, but got 1 and 0"),
        (("--replicas", 0), "--replicas must be 1 or more"),
        (("--batch", 0), "batch: Input should be greater than or equal to 1"),
        (("--use_gpu", "True"), "--use-gpu is set, but torch sees no GPU here"),
        (("--model", "none"), "none"),
        (("--model", "models:/reid@champion"), "must hold the store of a local MLflow server"),
    ],
)
def test_flags_that_cannot_be_are_one_line_and_code_2(serve, flags, error, monkeypatch, tmp_path):
    monkeypatch.setenv("NEXT_REID_TOKEN", TOKEN)
    refused(serve(*flags, "--storage_path", tmp_path), error)


def test_a_tracking_server_that_is_stopped_is_one_line(serve, monkeypatch):
    monkeypatch.setenv("NEXT_REID_TOKEN", TOKEN)
    flags = (
        "--model",
        "models:/reid@champion",
        "--tracking.uri",
        f"http://127.0.0.1:{free_port()}",
    )
    refused(serve(*flags), "127.0.0.1")


def test_a_port_that_is_in_use_is_one_line(serve, monkeypatch):
    monkeypatch.setenv("NEXT_REID_TOKEN", TOKEN)
    with socket.socket() as other:
        # As Ray Serve's proxies listen: two of them would share the port.
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        refused(serve("--port", port), f"--port {port} of 127.0.0.1 is in use by another program")


@pytest.mark.parametrize("token", ["short", "", "two words of a token here", "ä" * 20])
def test_a_token_that_is_none_is_one_line(serve, token, tmp_path):
    file = tmp_path / "token"
    file.write_text(token, encoding="utf-8")
    refused(serve("--token_file", file), f"{file} must hold a token of 16 ASCII characters or more")


def rewritten(gallery: Path, out: Path, change) -> Path:
    """A copy of a gallery whose embeddings are changed behind its back."""
    shutil.copytree(gallery, out)
    [part] = out.glob("part-*.parquet")
    table = pq.read_table(part)
    column = table.column("embedding").combine_chunks()
    width = column.type.list_size
    values = change(column.flatten().to_numpy(zero_copy_only=False).reshape(-1, width).copy())
    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
    embedding = pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
    place = table.column_names.index("embedding")
    pq.write_table(table.set_column(place, "embedding", embedding), part)
    return out


def test_a_gallery_that_cannot_be_searched_is_one_line(
    serve, place, trained_checkpoint, trained_embedder, demo_shards, tmp_path, monkeypatch
):
    monkeypatch.setenv("NEXT_REID_TOKEN", TOKEN)
    whole = place / "galleries" / "first"

    def with_nan(values):
        values[3, 7] = np.nan
        return values

    refused(
        serve(gallery=rewritten(whole, tmp_path / "nan", with_nan)),
        "embeddings must be finite, but row 3 is not",
    )
    refused(
        serve(gallery=rewritten(whole, tmp_path / "narrow", lambda values: values[:, :-8])),
        f"must hold embeddings of width {trained_embedder.width}, but does not",
    )
    facts = json.loads((whole / FACTS).read_text())
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / FACTS).write_text(json.dumps(facts | {"parts": {}}))
    refused(serve(gallery=empty), "is an empty gallery: there is nothing to find in it")
    (tmp_path / "nothing").mkdir()
    refused(serve(gallery=tmp_path / "nothing"), "but there is no finished one; write one with")
    newer = other_version(trained_checkpoint, tmp_path / "newer")
    refused(serve("--model", newer), "embeddings of two models cannot be compared")
    assert os.listdir(place / "galleries") == ["first"], "nothing was written"
