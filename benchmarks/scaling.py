"""What a data set of many rows takes before it is trained on: the index of labels, and a plan.

    python benchmarks/scaling.py --rows 100_000_000 --memory 8

Each part runs in a process of its own that may hold no more than so many GiB. Rows are made up: ten
to an identity, 2,000 to a shard. CPU time is given, which a busy machine does not change much.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from next.benchmark.card import load_card
from next.data.loading.plan import epoch_plan, plan_hash
from next.data.shards.index import decode_piece, encode_piece, read_labels, write_index
from next.data.shards.manifest import Findings, ManifestFile, ShardEntry, SplitEntry
from next.storage import open_folder

ROOT = Path(__file__).resolve().parents[1]
SHARD = 2000


@dataclass(frozen=True)
class Arguments:
    """What to measure."""

    rows: int = 1_000_000
    """Rows of train."""
    memory: float = 8
    """GiB of address space that a part may take."""
    only: str = ""
    """A part, in this process."""


def main() -> None:
    """Measure each part, or one."""
    job = tyro.cli(Arguments)
    parts = {"index": index, "plan": plan}
    if job.only:
        resource.setrlimit(resource.RLIMIT_AS, (int(job.memory * 2**30),) * 2)
        print(json.dumps({"part": job.only, "rows": job.rows} | parts[job.only](job.rows)))
        return
    for part in parts:
        command = [sys.executable, __file__, "--rows", str(job.rows), "--memory", str(job.memory)]
        subprocess.run([*command, "--only", part], check=False)


def peak() -> float:
    """GiB that this process held at most."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)


def plan(rows: int) -> dict[str, Any]:
    """The plan of one epoch of 32 identities with 4 samples each."""
    pids, before, began = np.arange(rows) // 10, peak(), time.process_time()
    made = epoch_plan(pids, seed=0, epoch=0, p=32, k=4)
    cpu = time.process_time() - began
    return {"cpu_s": round(cpu, 1), "peak": peak(), "before": before, "hash": plan_hash(made)[:12]}


def index(rows: int) -> dict[str, Any]:
    """The index written, and read once."""
    card, shards = load_card(ROOT / "datasets" / "demo.toml"), -(-rows // SHARD)
    digest = "0" * 64
    entries = tuple(
        ShardEntry(
            file=f"train/{n:05d}.parquet", rows=SHARD, bytes=1, sha256=digest, content=digest
        )
        for n in range(shards)
    )
    file = ManifestFile(
        digest=digest,
        card=card,
        splits={"train": SplitEntry(rows=shards * SHARD, shards=entries)},
        findings=Findings(),
    )

    def pieces() -> Iterator[Any]:
        cameras = np.random.default_rng(0).integers(0, 16, SHARD).tolist()
        for shard in range(shards):
            first = shard * SHARD
            made = [
                ((first + n) // 10, camera, -1, *(True for _ in card.modalities))
                for n, camera in enumerate(cameras)
            ]
            yield decode_piece(encode_piece(made, card.modalities))

    with tempfile.TemporaryDirectory() as folder:
        began = time.process_time()
        with Path(folder, "labels.parquet").open("wb") as sink:
            write_index(sink, file, {"train": pieces()})
        written, size = time.process_time() - began, Path(folder, "labels.parquet").stat().st_size
        labels = read_labels(open_folder(folder), file, "train", lambda: {"train": pieces()})
        read = time.process_time() - began - written
    figures = {"write_cpu_s": round(written, 1), "read_cpu_s": round(read, 1), "bytes": size}
    manifest = len(file.model_dump_json())
    return figures | {"rows_read": len(labels.pid), "manifest_bytes": manifest, "peak": peak()}


if __name__ == "__main__":
    main()
