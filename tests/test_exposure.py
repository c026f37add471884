"""What is looked for in the processes and files of a test is found where somebody plants it."""

import base64
import os
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from tests.exposure import exposed, leaks, planted

OPEN = """
import os, socket, sys, time
from pathlib import Path

home = Path(os.environ["HOME"])
if sys.argv[1] == "daemon":
    if os.fork():
        os._exit(0)
    os.setsid()
if sys.argv[1] == "token":
    (home / ".ray").mkdir()
    token = home / ".ray" / "auth_token"
    token.touch()
    token.chmod(0o644)
places = {"daemon": "0.0.0.0", "all": "0.0.0.0", "loopback": "127.0.0.1"}
if sys.argv[1] in places:
    listening = socket.create_server((places[sys.argv[1]], 0))
while not (home / "seen").exists():
    time.sleep(0.01)
"""


def watched(home: Path, kind: str, found, *words: str):
    """What is seen of a process that opens something, once ``found`` says that it is seen."""
    with exposed(home) as seen:
        process = subprocess.Popen(
            [sys.executable, "-c", OPEN, kind, *words], env=os.environ | {"HOME": str(home)}
        )
        while not found(seen):  # pytest ends a test that waits for ever
            time.sleep(0.01)
        (home / "seen").touch()
        process.wait()
    return seen


@pytest.mark.parametrize("kind", ["all", "daemon"])
def test_a_listener_beyond_loopback_is_seen_even_of_who_left_its_parent(tmp_path, kind):
    seen = watched(tmp_path, kind, lambda seen: seen.places)
    assert [line.rpartition(" at ")[2] for line in seen.beyond_loopback()] == ["0.0.0.0"]


def test_a_listener_on_loopback_is_none_beyond_it(tmp_path):
    seen = watched(tmp_path, "loopback", lambda seen: seen.places)
    assert seen.beyond_loopback() == []


def test_a_token_that_others_may_read_is_seen(tmp_path):
    assert 0o644 in watched(tmp_path, "token", lambda seen: seen.modes).modes


def test_a_secret_on_a_command_line_is_seen(tmp_path):
    hidden = planted(["HF_TOKEN", "CAPTION_KEY"])
    word = f"--key={hidden['HF_TOKEN']}"
    seen = watched(tmp_path, "line", lambda seen: seen.told(hidden), word)
    assert seen.told(hidden) == ["HF_TOKEN"]


def in_a_header(folder: Path, secret: str) -> None:
    for name in ("a", "ab", "abc"):  # which move the secret within the groups of base64
        text = base64.b64encode(f"{name}:{secret}".encode()).decode()
        (folder / f"{name}.log").write_text(f"Authorization: Basic {text}\n")


def in_a_database(folder: Path, secret: str) -> None:
    with closing(sqlite3.connect(folder / "mlflow.db")) as connection, connection:
        connection.execute("CREATE TABLE params (value TEXT)")
        connection.execute("INSERT INTO params VALUES (?)", (f"uri={secret}",))


def in_an_array(folder: Path, secret: str) -> None:
    np.savez_compressed(folder / "features.npz", names=np.array([secret.encode()]))


def in_a_page(folder: Path, secret: str) -> None:
    (folder / "report.html").write_text(f"<td>{secret}</td>")


def in_a_journal(folder: Path, secret: str) -> None:
    (folder / "deep").mkdir()
    (folder / "deep" / "journal.jsonl").write_text(f'{{"type":"tags","values":{{"a":"{secret}"}}}}')


@pytest.mark.parametrize(
    "plant", [in_a_header, in_a_database, in_an_array, in_a_page, in_a_journal]
)
def test_a_secret_in_a_file_is_found_however_it_was_written(tmp_path, plant):
    hidden = planted(["MLFLOW_TRACKING_PASSWORD", "HF_TOKEN"])
    plant(tmp_path, hidden["MLFLOW_TRACKING_PASSWORD"])
    files = sorted(str(path) for path in tmp_path.rglob("*") if path.is_file())
    assert sorted(leaks([tmp_path], hidden)) == [f"{f}: MLFLOW_TRACKING_PASSWORD" for f in files]
