"""SIGTERM and Ctrl-C end every job, with what is kept and how to go on."""

import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from next.retrieval.gallery import GalleryFacts, write_facts
from next.retrieval.sources import open_shards
from next.storage import open_folder
from tests.jobs.stopped_job import IMPORTED, run

AGAIN = ", and the same command goes on\n"
SHARDS = "the shards that were finished are kept beside --out"
REGISTERED = ("--model", "models:/reid/1", "--tracking.uri", "SERVER")
JOBS = {
    "prepare": (["--card", "PIPE", "--source", "x", "--out", "FOLDER/out"], SHARDS),
    "prepare --check": (["--check", "SHARDS", "--recipe", "PIPE"], SHARDS),
    "cache": (["--cache", "FOLDER/cache"], "what was removed is gone"),
    "caption": (
        ["run", "--models", "PIPE", "--data", "SHARDS", "--out", "FOLDER/out"],
        "every answer that came is kept in the ledger",
    ),
    "train": (["--data", "SHARDS", "--recipe", "PIPE"], "nothing is half written"),
    "pretrain": (["--data", "SHARDS", "--recipe", "PIPE"], "nothing is half written"),
    "sweep": (
        ["--space", "x.py", "--data", "SHARDS", "--recipe", "PIPE"],
        "nothing is half written",
    ),
    "sweep list": (["--storage_path", "FOLDER/runs"], "nothing is half written"),
    "sweep report": (["first", "--storage_path", "FOLDER/runs"], "nothing is half written"),
    "doctor": (["--data", "SHARDS", "--recipe", "PIPE"], "nothing is half written"),
    "evaluate": (
        ["--data", "SHARDS", *REGISTERED],
        "the pictures that were drawn are kept",
    ),
    "promote": (
        ["--model", "reid", "--when", "test/mAP > 1", "--tracking.uri", "SERVER"],
        "the registry has what was done so far",
    ),
    "embed": (
        ["--data", "SHARDS", "--out", "FOLDER/gallery", *REGISTERED],
        "parts that were written are kept",
    ),
    "search": (
        ["--gallery", "FOLDER/found", "--images", "RGB=x.jpg", *REGISTERED],
        "the gallery is as it was",
    ),
    "export": (
        ["--data", "SHARDS", "--out", "FOLDER/exported", "--format", "torch", *REGISTERED],
        "nothing is half written",
    ),
    "serve": (
        ["--gallery", "FOLDER/found", *REGISTERED],
        "requests in flight were answered",
    ),
    "demo": (["--folder", "FOLDER/demo"], "what was drawn and prepared is kept"),
}
"""Flags of each job, and what it says that it kept. It is in the middle of reading PIPE, of asking
SERVER, or of drawing."""


@pytest.fixture(params=[signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def number(request) -> signal.Signals:
    return request.param


@pytest.fixture
def pipe(tmp_path) -> Path:
    """A file that a job waits for, also as what it finds in a cache and in a sweep."""
    path = tmp_path / "pipe.toml"
    os.mkfifo(path)
    for place in ("cache/decoded-x/about.json", "runs/first/config.toml"):
        (tmp_path / place).parent.mkdir(parents=True)
        (tmp_path / place).symlink_to(path)
    (tmp_path / "runs/first/sweep.toml").write_text("[sweep]\n[objectives]\n[description]\n")
    return path


@pytest.fixture
def gallery(demo_shards, tmp_path) -> Path:
    """The facts of a gallery, which is all that is read of one before its model."""
    source = open_shards(str(demo_shards), "gallery")
    facts = GalleryFacts(
        model="m", data=source.digest, origin=source.origin, modalities=("RGB", "NI", "TI"),
        width=8, precision="float16", branches=None, image_size=(32, 16),
    )  # fmt: skip
    write_facts(open_folder(tmp_path / "found"), facts, {"part-00000.parquet": 1})
    return tmp_path / "found"


@pytest.fixture
def server():
    """It takes calls, and answers none."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        yield silent


def test_no_job_is_left_out():
    scripts = {path.stem for path in (Path(__file__).resolve().parents[2] / "jobs").glob("*.py")}
    assert {job.split()[0] for job in JOBS} == scripts


@pytest.mark.parametrize("job", JOBS)
def test_a_job_that_is_stopped_says_what_is_kept_and_how_to_go_on_with_code_75(
    job, number, pipe, server, gallery, demo_shards, tmp_path
):
    name, *verb = job.split()
    if "--check" in verb:
        verb = []
    places = {
        "PIPE": str(pipe),
        "SHARDS": str(demo_shards),
        "FOLDER": str(tmp_path),
        "SERVER": f"http://127.0.0.1:{server.getsockname()[1]}",
    }
    flags, kept = JOBS[job]
    words = [*verb, *flags]
    for place, value in places.items():
        words = [word.replace(place, value) for word in words]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    process = context.Process(target=run, args=(name, words, str(tmp_path)))
    process.start()
    with ExitStack() as stack:
        stack.callback(process.kill)
        if "SERVER" in flags:
            server.settimeout(200)
            call, _ = server.accept()
            stack.enter_context(call)
        elif name == "demo":
            wait_until(lambda: (tmp_path / "demo").is_dir(), process)
        else:
            wait_until(lambda: writer(pipe, stack), process)
        os.kill(process.pid, number)
        process.join(60)
    said = (tmp_path / "said.txt").read_text(encoding="utf-8")
    assert process.exitcode == 75, said
    assert said.endswith(f"stopped; {kept}{AGAIN}")
    assert "Traceback" not in said


def wait_until(condition: Callable[[], bool], process: BaseProcess) -> None:
    while not condition():  # pytest ends a test that waits for ever
        assert process.is_alive()
        time.sleep(0.02)


def writer(pipe: Path, stack: ExitStack) -> bool:
    """Whether somebody reads the pipe, who then waits until the stack is closed."""
    try:
        stack.callback(os.close, os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))
    except OSError:  # nobody has opened it
        return False
    return True
