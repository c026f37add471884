"""Galleries of a small trained model in folders of one folder, and a service that searches them."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx2
import pytest
import torch

from next.retrieval.embed import embedding_here, facts_of, write_gallery
from next.retrieval.sources import open_shards
from next.serving.settings import ServeSettings, digest_of
from next.training.checkpointing.checkpoint import Progress, load_network, save_checkpoint
from next.training.embedder import Embedder
from tests.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "a-token-of-the-tests-0123456789"


def write(model: Embedder, shards: Path, split: str, out: Path | str):
    """A gallery of a split."""
    source = open_shards(shards, split)
    facts = facts_of(model, source, "float16")
    return write_gallery(out, facts, source, embedding_here(model, facts, source)).gallery


def other_version(checkpoint: Path, folder: Path) -> Path:
    """A checkpoint whose weights are a little others."""
    network, config = load_network(checkpoint)
    with torch.no_grad():
        for weight in network.parameters():
            weight.mul_(1.001)
    optimizer = torch.optim.SGD(network.parameters())
    return save_checkpoint(folder, network, optimizer, Progress(), config)


@pytest.fixture(scope="module")
def place(trained_checkpoint, trained_embedder, demo_shards, tmp_path_factory) -> Path:
    """A folder with ``model`` and ``galleries/first``."""
    folder = tmp_path_factory.mktemp("serving")
    shutil.copytree(trained_checkpoint, folder / "model")
    write(trained_embedder, demo_shards, "gallery", folder / "galleries" / "first")
    return folder


@pytest.fixture
def settings(place) -> ServeSettings:
    return ServeSettings(
        model=str(place / "model"),
        gallery=str(place / "galleries"),
        token_digest=digest_of(TOKEN),
    )


@dataclass
class Service:
    """jobs/serve.py in a process of its own."""

    process: subprocess.Popen
    answer: dict
    """What it said when it was ready."""
    log: Path

    @property
    def address(self) -> str:
        return self.answer["address"]

    def client(self, token: str | None = TOKEN) -> httpx2.Client:
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        return httpx2.Client(base_url=self.address, headers=headers, timeout=120)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=120)


def started(folder: Path, *flags: object, port: int | None = None) -> Service:
    """A service with a Ray of its own, when it answers."""
    home = folder / "home"
    home.mkdir(exist_ok=True)
    log = folder / "service.log"
    # Paths of Ray's sockets must be short.
    own = {"HOME": str(home), "RAY_TMPDIR": tempfile.mkdtemp(prefix="sv-", dir="/tmp")}
    own |= {"NEXT_REID_TOKEN": TOKEN, "PYTHONUNBUFFERED": "1"}
    with log.open("w") as errors:
        process = subprocess.Popen(
            [
                *(sys.executable, "jobs/serve.py", "--json", "--port", str(port or free_port())),
                *map(str, flags),
            ],
            cwd=ROOT,
            env={k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | own,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    watch = threading.Timer(540, process.kill)
    watch.start()
    line = process.stdout.readline()
    watch.cancel()
    if not line:
        process.stdout.close()
        process.wait(timeout=60)
        pytest.fail(log.read_text()[-3000:])
    return Service(process, json.loads(line), log)


@pytest.fixture(scope="module")
def service(place) -> Iterator[Service]:
    """Of two replicas, which look for what is new twice a second."""
    found = started(
        place,
        *("--model", place / "model", "--gallery", place / "galleries", "--replicas", 2),
        *("--refresh_seconds", 0.5, "--most_mebibytes", 2, "--most_megapixels", 1),
    )
    yield found
    if found.process.poll() is None:
        found.stop()
    found.process.stdout.close()
    assert not re.search(TOKEN, found.log.read_text())
