"""Exact search of a large gallery against numpy's matrix product alone, in one run.

::

    python benchmarks/search.py --rows 1000000 --width 1536 --queries 256

Draws unit vectors as a gallery of the format that jobs/embed.py writes (float16), then measures, in
turn, `repeats` times each: the product of the queries with each block in float32 (numpy, the blocks
in memory already, nothing else), the search of blocks in memory, and the search of the files. Also
the largest memory of the process over what it had before the first search of the files.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch

from next.benchmark.card import load_card
from next.cli import parse
from next.evaluation.ranking.distances import Layout
from next.retrieval.gallery import Gallery, GalleryFacts, Origin, encode_part, write_facts
from next.retrieval.search import BLOCK, Block, search
from next.storage import open_folder

CARD = Path(__file__).resolve().parents[1] / "datasets" / "demo.toml"


@dataclass(frozen=True)
class SearchBenchmark:
    """Measure the search of a gallery of random unit vectors."""

    rows: int = 200_000
    """Of the gallery."""
    width: int = 1536
    """F, a multiple of six."""
    queries: int = 256
    """Of a batch."""
    repeats: int = 3
    """Of each measurement; the median is told."""
    threads: int = 2
    """Of torch; numpy's are those of OMP_NUM_THREADS."""
    in_memory: bool = True
    """Measure the product and the search in memory, too: 6 bytes for each number of the gallery."""


def drawn(rows: int, width: int, seed: int) -> np.ndarray:
    """Unit vectors, float16 ``[rows, width]``."""
    found = np.random.default_rng(seed).standard_normal((rows, width), dtype=np.float32)
    found /= np.linalg.norm(found, axis=1, keepdims=True)
    return found.astype(np.float16)


def write(folder: Path, rows: int, width: int) -> Gallery:
    """A gallery of random vectors in parts of :data:`BLOCK` rows."""
    facts = GalleryFacts(
        model="0" * 64,
        data="0" * 64,
        origin=Origin(kind="folder", address=str(folder), split="gallery", card=load_card(CARD)),
        modalities=("RGB", "NI", "TI"),
        width=width,
        precision="float16",
        branches=2,
        image_size=(64, 32),
    )
    place, parts = open_folder(folder), {}
    for number, start in enumerate(range(0, rows, BLOCK)):
        count = min(BLOCK, rows - start)
        names = [f"{row:08}" for row in range(start, start + count)]
        columns = {"sample_id": names, "pid": [-1] * count, "camera": [-1] * count}
        columns |= {"scene": [-1] * count, "time": [None] * count}
        columns["modalities"] = [list(facts.modalities)] * count
        part = f"part-{number:05}.parquet"
        place.write(part, encode_part(facts, columns, drawn(count, width, number)))
        parts[part] = count
    return write_facts(place, facts, parts)


class Peak:
    """Largest resident memory while the block runs, over that at its start; bytes."""

    def __enter__(self) -> Peak:
        self._process, self.bytes = psutil.Process(), 0
        self._before = self._process.memory_info().rss
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.02):
            self.bytes = max(self.bytes, self._process.memory_info().rss - self._before)

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()


def timed(call: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def main(argv: Sequence[str]) -> None:
    """Draw, measure in turn, print one JSON object."""
    job = parse(SearchBenchmark, argv)
    torch.set_num_threads(job.threads)
    with tempfile.TemporaryDirectory(prefix="next-search-") as folder:
        gallery = write(Path(folder), job.rows, job.width)
        query = drawn(job.queries, job.width, 10**6).astype(np.float32)
        query /= np.linalg.norm(query, axis=1, keepdims=True)
        layout = Layout(2, 3)
        answer: dict[str, object] = {"rows": job.rows, "width": job.width, "queries": job.queries}
        with Peak() as peak:
            files = [timed(lambda: search(query, gallery.blocks(), layout=layout))]
        answer["memory_mib_over_start"] = round(peak.bytes / 2**20)
        product, memory = [], []
        if job.in_memory:
            blocks = [block.features for block in gallery.blocks()]
            whole = [block.astype(np.float32) for block in blocks]
        for _ in range(job.repeats):
            if job.in_memory:
                product.append(timed(lambda: [query @ block.T for block in whole]))
                memory.append(timed(lambda: search(query, map(Block, whole), layout=layout)))
            files.append(timed(lambda: search(query, gallery.blocks(), layout=layout)))
        for name, seconds in (("product", product), ("memory", memory), ("files", files)):
            if seconds:
                answer[f"{name}_s"] = round(statistics.median(seconds), 3)
                answer[f"{name}_spread_s"] = round(max(seconds) - min(seconds), 3)
        if job.in_memory:
            ratios = [ours / theirs for ours, theirs in zip(memory, product, strict=True)]
            answer["memory_over_product"] = round(statistics.median(ratios), 3)
            of_files = [ours / theirs for ours, theirs in zip(files[1:], product, strict=True)]
            answer["files_over_product"] = round(statistics.median(of_files), 3)
        print(json.dumps(answer))


if __name__ == "__main__":
    main(sys.argv[1:])
