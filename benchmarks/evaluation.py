"""What evaluation costs: ranking against a float32 product, and one rank against two.

    python benchmarks/evaluation.py ranking
    python benchmarks/evaluation.py ranks

Times are of CPU, so that what else the machine does counts little; a rank has one thread.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist

from next.config import RunConfig, override
from next.data.labels import Labels
from next.data.loading.loader import SampleSet
from next.evaluation.protocol import evaluate
from next.evaluation.ranking.metrics import nearest, retrieval_metrics
from next.evaluation.share import Share
from next.model.network import NEXT

SETTINGS = {
    "model.backbone.name": "next-tiny",
    "model.backbone.pretrained": None,
    "model.modalities": 3,
    "model.image_size": (32, 16),
    "model.identities": 5,
    "data.image_size": (32, 16),
    "captions.sampling": "none",
}
REPEATS = 3


def labels(rows: int, identities: int) -> Labels:
    """Samples of identities and two cameras, by turns."""
    number = np.arange(rows)
    return Labels(
        number.astype(str), number % identities, number // identities % 2, np.full(rows, -1)
    )


def cpu_seconds(work: Callable[[], object]) -> list[float]:
    """Of this process, for each repeat."""
    times = []
    for _ in range(REPEATS):
        begin = time.process_time()
        work()
        times.append(time.process_time() - begin)
    return sorted(times)


def told(times: list[float]) -> str:
    """Median, least and most."""
    return f"{times[len(times) // 2]:.2f} s CPU ({times[0]:.2f} to {times[-1]:.2f})"


def measure_ranking(queries: int = 1000, gallery: int = 50_000, width: int = 256) -> None:
    """Scores and first rows, beside the product in float32 that gives no exact ties."""
    generator = np.random.default_rng(0)
    sides = [
        generator.standard_normal((rows, width)).astype(np.float32) for rows in (queries, gallery)
    ]
    for side in sides:
        side /= np.linalg.norm(side, axis=1, keepdims=True)
    query, rows = sides
    of_query, of_gallery = labels(queries, 500), labels(gallery, 500)

    def product() -> None:
        squares = np.einsum("gf,gf->g", rows, rows)
        for start in range(0, queries, 167):
            block = -2.0 * query[start : start + 167] @ rows.T
            block += squares

    plain = cpu_seconds(product)
    scores = cpu_seconds(lambda: retrieval_metrics(query, rows, of_query, of_gallery))
    lists = cpu_seconds(lambda: nearest(query, rows, of_query, of_gallery, range(queries)))
    print(f"{queries} x {gallery}, {width} wide")
    print(f"  float32 product alone       {told(plain)}")
    print(f"  scores and first rows       {told(scores)}: {scores[1] / plain[1]:.2f} times that")
    print(f"  the ten nearest rows        {told(lists)}: {lists[1] / plain[1]:.2f} times that")


def evaluated(share: Share, samples: int) -> tuple[float, float, dict[str, float]]:
    """CPU and wall seconds of one evaluation on this rank, and the scores."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = override(RunConfig(), SETTINGS)
    images = np.random.default_rng(0).integers(0, 256, (500, 3, 32, 16, 3)).astype(np.uint8)
    gallery = SampleSet(
        labels=labels(samples, 500),
        images=images[np.arange(samples) % 500],
        present=np.ones((samples, 3), dtype=bool),
        captions=None,
        modalities=("RGB", "NI", "TI"),
        text_width=128,
    )
    query = gallery.select(np.arange(0, samples, 10))
    model = NEXT(config.model)
    begin, wall = time.process_time(), time.perf_counter()
    found = evaluate(model, query, gallery, rule="camera", config=config, device="cpu", share=share)
    spent = time.process_time() - begin
    return spent, time.perf_counter() - wall, found.metrics.as_dict()


def rank_member(rank: int, world: int, meeting: str, samples: int, queue) -> None:  # type: ignore[no-untyped-def]
    """One rank; the answer goes through the queue."""
    if world > 1:
        dist.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=world)
    queue.put(evaluated(Share(rank, world), samples))
    if world > 1:
        dist.destroy_process_group()


def measure_ranks(samples: int = 20_000) -> None:
    """One rank and two, each in processes of their own."""
    context = multiprocessing.get_context("spawn")
    spent = {}
    scores = {}
    for world in (1, 2):
        queue = context.Queue()
        with tempfile.TemporaryDirectory() as folder:
            members = [
                context.Process(
                    target=rank_member, args=(rank, world, f"{folder}/meeting", samples, queue)
                )
                for rank in range(world)
            ]
            for member in members:
                member.start()
            answers = [queue.get() for _ in members]
            for member in members:
                member.join()
        spent[world] = max(cpu for cpu, _, _ in answers)
        scores[world] = [found for *_, found in answers]
        seconds = ", ".join(f"{cpu:.1f}" for cpu, _, _ in answers)
        print(f"{world} ranks: {seconds} s CPU each, {max(wall for _, wall, _ in answers):.1f} s")
    print(f"the busiest of two ranks does 1/{spent[1] / spent[2]:.2f} of one rank's work")
    print(f"equal scores: {all(one == scores[1][0] for one in scores[2])} {scores[1][0]}")


PARTS = {"ranking": measure_ranking, "ranks": measure_ranks}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="+", choices=list(PARTS))
    for part in parser.parse_args().parts:
        PARTS[part]()
