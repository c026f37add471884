"""Preparing data measured: RGBNT201's size, from folders and from a real S3 server on loopback.

::

    python benchmarks/prepare.py            # folders: prepare (goal: under 30 s), again, check
    python benchmarks/prepare.py --ray 2    # the same shards written by Ray tasks, too
    python benchmarks/prepare.py --s3       # from bucket to bucket, too; the server is moto

The source has the authors' names and captions of RGBNT201, of which the tests have a copy, and
14,361 synthetic JPEGs of 256 x 128 pixels, each different. Every time is that of the whole command,
its start included. Prints a table and writes JSON to ``--out``.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tyro
from PIL import Image
from rich.console import Console
from rich.table import Table

from next.data.source.ingest import REMOTE_THREADS
from next.storage import open_folder

ROOT = Path(__file__).resolve().parents[1]
JOB = [sys.executable, str(ROOT / "jobs" / "prepare.py")]
CARD = ["--card", str(ROOT / "datasets" / "rgbnt201.toml")]
MODALITIES = ("RGB", "NI", "TI")
CAPTIONS = ROOT / "tests" / "fixtures" / "captions.tar.xz"
SPLITS = {"train": "train_171", "test": "test"}
PORT = 5977
KEYS = {
    "AWS_ENDPOINT_URL": f"http://127.0.0.1:{PORT}",
    "AWS_ACCESS_KEY_ID": "benchmark",
    "AWS_SECRET_ACCESS_KEY": "benchmark",
    "AWS_REGION": "us-east-1",
}


class Timed(NamedTuple):
    """What one call of a command took."""

    wall: float
    """Seconds."""
    cpu: float
    """Seconds of its own processes; those of Ray and of the server are not in it."""


Row = tuple[str, list[Timed], str]
"""What was timed, how long it took each time, and a note."""


@dataclass(frozen=True)
class Arguments:
    """Preparing data measured."""

    repeats: int = 3
    """Runs of each command; the median counts."""
    ray: int = 0
    """Ray tasks at a time; 0: not measured."""
    s3: bool = False
    """From bucket to bucket, too (once)."""
    out: Path = Path("runs/benchmarks/prepare.json")
    """JSON to write."""


def main(arguments: Arguments) -> int:
    """Draw the source, time the commands, print and write."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="next-prepare-") as name:
        folder = Path(name)
        raw = folder / "raw"
        draw_source(raw)
        local = [*JOB, *CARD, "--source", str(raw), "--out", str(folder / "out")]
        times = []
        for _ in range(arguments.repeats):
            shutil.rmtree(folder / "out", ignore_errors=True)
            times.append(timed(local))
        size = sum(open_folder(folder / "out").walk().values()) / 1e6
        rows.append(("prepare, folder to folder", times, f"{size:.0f} MB"))
        rows.append(("the same again (compared, kept)", [timed(local)], ""))
        check = [*JOB, "--check", str(folder / "out")]
        rows.append(("--check", [timed(check) for _ in range(arguments.repeats)], ""))
        if arguments.ray:
            out = folder / "by-ray"
            ray = [*JOB, *CARD, "--source", str(raw), "--out", str(out)]
            times = [timed([*ray, "--workers", str(arguments.ray)])]
            same = read_digest(out) == read_digest(folder / "out")
            rows.append((f"prepare, {arguments.ray} Ray tasks", times, f"same digest: {same}"))
        if arguments.s3:
            rows += measure_s3(raw, folder / "out")
    report(rows, arguments.out)
    return 0


def draw_source(root: Path) -> None:
    """Write the source: the authors' names and captions, drawn images."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 16, 8, 3), np.uint8)

    def draw(place: tuple[int, Path]) -> None:
        number, path = place
        image = Image.fromarray(noise[number % 64]).resize((128, 256), Image.Resampling.BICUBIC)
        pixels = np.array(image)
        pixels[:8, :8] = np.frombuffer(number.to_bytes(3, "big"), np.uint8)  # each differs
        grain = np.random.default_rng(number).integers(-9, 10, (*pixels.shape[:2], 1), np.int16)
        data = io.BytesIO()
        Image.fromarray(np.clip(pixels + grain, 0, 255).astype(np.uint8)).save(
            data, "JPEG", quality=90
        )
        path.write_bytes(data.getvalue())

    with tempfile.TemporaryDirectory() as unpacked, tarfile.open(CAPTIONS) as archive:
        archive.extractall(unpacked, filter="data")
        shutil.copytree(Path(unpacked) / "RGBNT201", root / "text")
    paths = []
    for split, name in SPLITS.items():
        for modality in MODALITIES:
            (root / name / modality).mkdir(parents=True)
            items = json.loads(
                (root / "text" / f"{split}_{modality}.json").read_text(encoding="utf-8")
            )
            paths += [root / name / modality / item["item"] for item in items]
    with ThreadPoolExecutor() as pool:
        list(pool.map(draw, enumerate(paths)))


def measure_s3(raw: Path, expected: Path) -> Iterator[Row]:
    """From bucket to bucket, and what the server alone takes to hand over the same files."""
    with s3_server():
        bucket = open_folder("s3://bench")
        before = os.times()
        bucket.upload_tree(raw, "raw")
        yield "upload of the source", [_since(before)], ""
        paths = list(bucket.walk("raw"))
        before = os.times()
        with ThreadPoolExecutor(REMOTE_THREADS) as pool:
            total = sum(pool.map(lambda path: len(bucket.read(f"raw/{path}")), paths))
        yield "reading the source alone", [_since(before)], f"{total / 1e6:.0f} MB"
        job = [*JOB, *CARD, "--source", "s3://bench/raw", "--out", "s3://bench/out"]
        times = [timed(job)]
        same = (
            bucket.below("out").read("manifest.json") == (expected / "manifest.json").read_bytes()
        )
        yield "prepare, bucket to bucket", times, f"same manifest: {same}"
        yield "--check of a bucket", [timed([*JOB, "--check", "s3://bench/out"])], ""


@contextmanager
def s3_server() -> Iterator[None]:
    """A moto server with an empty bucket, named by the environment."""
    os.environ |= KEYS
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(PORT)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(300):
            try:
                request = urllib.request.Request(f"{KEYS['AWS_ENDPOINT_URL']}/bench", method="PUT")
                urllib.request.urlopen(request, timeout=5).close()
                break
            except OSError:
                time.sleep(0.1)
        yield
    finally:
        server.kill()
        server.wait()


def timed(command: Sequence[str]) -> Timed:
    """Times of a command that must succeed."""
    before = os.times()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return _since(before)


def _since(before: os.times_result) -> Timed:
    spent = [after - earlier for after, earlier in zip(os.times(), before, strict=True)]
    return Timed(spent[4], sum(spent[:4]))


def read_digest(folder: Path) -> str:
    """The digest of a set of shards."""
    return str(json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["digest"])


def report(rows: Sequence[Row], out: Path) -> None:
    """Print the table and write the JSON."""
    load = os.getloadavg()[0]
    table = Table("what", "median s", "min-max", "CPU s", "", title=f"load at the end {load:.1f}")
    for what, times, note in rows:
        walls = [one.wall for one in times]
        spread = f"{min(walls):.1f}-{max(walls):.1f}" if len(walls) > 1 else "once"
        cpu = statistics.median(one.cpu for one in times)
        table.add_row(what, f"{statistics.median(walls):.1f}", spread, f"{cpu:.1f}", note)
    Console().print(table)
    out.parent.mkdir(parents=True, exist_ok=True)
    answer = [
        {"what": what, "seconds": [one._asdict() for one in times], "note": note}
        for what, times, note in rows
    ]
    out.write_text(json.dumps({"load": load, "rows": answer}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments, description=__doc__)))
