"""A service under load: requests a second, latency, errors, memory, and the death of a replica.

::

    python benchmarks/serving.py --clients 16 --seconds 60 --replicas 2

Draws the demo's data, embeds its gallery by a tiny network of random weights (which takes as long
as a trained one), starts jobs/serve.py as a process of its own, and lets clients search by images
of the gallery without a pause, each by a connection of its own. With two replicas or more the load
is repeated while one replica is killed by SIGKILL: a client sends again what failed.
"""

from __future__ import annotations

import http.client
import io
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
import torch

from next.cli import parse
from next.config import RunConfig, override
from next.data.shards.reader import open_manifest
from next.demo import demo_shards
from next.model.network import NEXT
from next.retrieval.embed import embedding_here, facts_of, write_gallery
from next.retrieval.sources import open_shards
from next.training.checkpointing.checkpoint import Progress, save_checkpoint
from next.training.embedder import Embedder

ROOT = Path(__file__).resolve().parents[1]
_RETRIES = 20
_RETRY_SECONDS = 0.25


@dataclass(frozen=True)
class ServingBenchmark:
    """Load a service on this machine."""

    clients: int = 16
    """That ask without a pause."""
    seconds: float = 60.0
    """Of each load."""
    replicas: int = 2
    """Processes that answer; with two or more, one is killed in a second load."""
    backbone: str = "next-tiny"
    """Name of the tower."""


@dataclass
class Load:
    """What clients saw."""

    seconds: list[float] = field(default_factory=list)
    """Of each answer, with the attempts before it."""
    failed: list[str] = field(default_factory=list)
    """Attempts that brought no answer, and how."""
    lost: int = 0
    """Requests that no attempt answered."""
    memory: list[int] = field(default_factory=list)
    """Bytes of all processes of the service, as it went on."""

    def as_json(self, seconds: float) -> dict[str, object]:
        """In numbers."""
        times = np.array(self.seconds) * 1000
        tenth = max(len(self.memory) // 10, 1)
        first, last = (
            np.median(part) / 2**20 for part in (self.memory[:tenth], self.memory[-tenth:])
        )
        return {
            "requests_per_second": round(len(times) / seconds, 1),
            "p50_ms": round(float(np.percentile(times, 50)), 1),
            "p99_ms": round(float(np.percentile(times, 99)), 1),
            "answered": len(times),
            "failed_attempts": len(self.failed),
            "how": sorted(set(self.failed))[:5],
            "lost": self.lost,
            "memory_mib_first": round(float(first)),
            "memory_mib_last": round(float(last)),
        }


def written(folder: Path, shards: Path, backbone: str) -> tuple[Path, Path]:
    """A checkpoint of random weights, and the gallery of the demo by it."""
    size = open_manifest(shards).benchmark.image_size
    settings = {
        "model.backbone.name": backbone,
        "model.backbone.pretrained": None,
        "model.backbone.activation": "gelu",
        "model.modalities": 3,
        "model.image_size": size,
        "model.identities": 100,
        "data.modalities": ("RGB", "NI", "TI"),
        "data.image_size": size,
        "captions.sampling": "none",
    }
    config = override(RunConfig(), settings)
    network = NEXT(config.model)
    optimizer = torch.optim.SGD(network.parameters())
    model = save_checkpoint(folder / "model", network, optimizer, Progress(), config)
    embedder, source = Embedder(model), open_shards(shards, "gallery")
    facts = facts_of(embedder, source, "float16")
    write_gallery(folder / "gallery", facts, source, embedding_here(embedder, facts, source))
    return model, folder / "gallery"


def bodies(shards: Path, count: int = 32) -> list[tuple[bytes, str]]:
    """Requests by images of the gallery: body and its content type."""
    found = []
    manifest = open_manifest(shards)
    for row in manifest.take("gallery", range(count)):
        boundary, body = uuid.uuid4().hex, io.BytesIO()
        for name, image in zip(manifest.benchmark.modalities, row.images, strict=True):
            head = f'form-data; name="image_{name}"; filename="{name}.jpg"'
            body.write(f"--{boundary}\r\nContent-Disposition: {head}\r\n\r\n".encode())
            body.write(image + b"\r\n")
        body.write(f"--{boundary}--\r\n".encode())
        found.append((body.getvalue(), f"multipart/form-data; boundary={boundary}"))
    return found


def ask(
    port: int, token: str, requests: Sequence[tuple[bytes, str]], end: float, load: Load
) -> None:
    """One client: send, read, and send again what failed."""
    connection, number = http.client.HTTPConnection("127.0.0.1", port, timeout=120), 0
    while time.monotonic() < end:
        body, kind = requests[number % len(requests)]
        number += 1
        began = time.monotonic()
        for _ in range(_RETRIES):
            try:
                headers = {"Content-Type": kind, "Authorization": f"Bearer {token}"}
                connection.request("POST", "/search?top=10", body, headers)
                answer = connection.getresponse()
                content = answer.read()
                if answer.status == 200 and len(json.loads(content)["results"]) == 10:
                    load.seconds.append(time.monotonic() - began)
                    break
                load.failed.append(f"{answer.status}")
            except (OSError, http.client.HTTPException) as error:
                load.failed.append(type(error).__name__)
                connection.close()
            time.sleep(_RETRY_SECONDS)
        else:
            load.lost += 1
    connection.close()


def resident(process: psutil.Process) -> int:
    """Bytes of a process and all below it, without what they share."""
    total = 0
    for one in (process, *process.children(recursive=True)):
        try:
            memory = one.memory_info()
        except psutil.Error:
            continue
        total += memory.rss - memory.shared
    return total


def loaded(
    job: ServingBenchmark, port: int, token: str, shards: Path, service: psutil.Process, kill: bool
) -> dict[str, object]:
    """All clients at once for the time of a load."""
    load, requests = Load(), bodies(shards)
    end = time.monotonic() + job.seconds
    clients = [
        threading.Thread(target=ask, args=(port, token, requests[n:] + requests[:n], end, load))
        for n in range(job.clients)
    ]
    for client in clients:
        client.start()
    killed = None
    while time.monotonic() < end:
        load.memory.append(resident(service))
        if kill and killed is None and time.monotonic() > end - job.seconds / 2:
            killed = kill_replica(service)
        time.sleep(1)
    for client in clients:
        client.join()
    return load.as_json(job.seconds) | ({"killed": killed} if kill else {})


def kill_replica(service: psutil.Process) -> str:
    """End one of the processes that answer; gives its title."""
    for one in service.children(recursive=True):
        title = " ".join(one.cmdline())
        if "ServeReplica" in title:
            os.kill(one.pid, signal.SIGKILL)
            return title.strip()
    raise RuntimeError("there is no replica to kill")


def main(argv: Sequence[str]) -> None:
    """Start, load, kill, print one JSON object."""
    job = parse(ServingBenchmark, argv)
    shards = demo_shards(Path("demo"))
    token = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="nx-", dir="/tmp") as place:  # Ray's sockets lie here
        model, gallery = written(Path(place), shards, job.backbone)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        words = ["--model", str(model), "--gallery", str(gallery), "--port", str(port), "--json"]
        environment = os.environ | {"NEXT_REID_TOKEN": token, "RAY_TMPDIR": place}
        service = subprocess.Popen(
            [sys.executable, "jobs/serve.py", *words, "--replicas", str(job.replicas)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
        )
        try:
            if service.stdout is None or not service.stdout.readline():
                raise RuntimeError("the service did not start")
            tree = psutil.Process(service.pid)
            warm = ServingBenchmark(job.clients, 5, job.replicas, job.backbone)
            loaded(warm, port, token, shards, tree, kill=False)
            answer: dict[str, object] = {"replicas": job.replicas, "clients": job.clients}
            answer["load"] = loaded(job, port, token, shards, tree, kill=False)
            if job.replicas > 1:
                answer["one_killed"] = loaded(job, port, token, shards, tree, kill=True)
        finally:
            service.send_signal(signal.SIGTERM)
            code = service.wait(120)
        print(json.dumps(answer | {"exit_code": code}))


if __name__ == "__main__":
    main(sys.argv[1:])
