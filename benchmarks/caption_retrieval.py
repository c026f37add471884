"""What captions are worth to retrieval: true, merged, single-model and no captions, over seeds.

    python benchmarks/caption_retrieval.py

The caption sets are those of ``benchmarks/captioning.py sources``: one procedural benchmark, whose
images stand under four sets of captions. NEXT is trained on each by the card's recipe, its best
epoch chosen on held-out train identities, and assessed on the test split once.

With random towers no caption can matter, as text and patches have nothing to do with each other.
So a ``next-tiny`` is aligned first, as CLIP was: contrastively, on pictures and true captions of
another procedural benchmark (its people and cameras appear in none of the four sets). First its
class tokens learn to tell captions apart, then the patches too, because TMSE compares texts with
patches. All runs start from these weights, with captions or without. ``--no-align`` leaves this
out.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import open_clip
import torch
from ablation import run_once, table
from captioning import CARD, CaptioningBenchmark, sources
from torch import Tensor
from torch.nn import functional as F

from next.benchmark.card import load_card
from next.benchmark.procedural.benchmark import DemoSize, write_demo
from next.captioning.schema.attributes import NOT_VISIBLE, load_schema
from next.captioning.schema.labels import load_labels
from next.captioning.schema.template import CaptionWriter
from next.cli import base_config, parse, run_job
from next.config import AugmentConfig, BackboneConfig, RunConfig, override, to_toml
from next.data.loading.augment import augment
from next.data.loading.cache import cache_root, open_cache
from next.data.shards.reader import open_manifest
from next.data.source.ingest import ScanOptions, prepare
from next.evaluation.ranking.metrics import retrieval_metrics
from next.model.towers.clip import ClipTower, load_clip
from next.training.inputs import resolve, test_data

WORLD_SEED = 1000
"""Of the procedural benchmark on which the towers are aligned."""
WORLD = DemoSize(600, 4, 2, 2)
BATCH = 128
"""Pictures of a step, each of another identity."""
PHASES = ((600, 0.0), (500, 1.0))
"""Steps, and the weight of the patches' loss beside the class tokens'."""
RATE = 1e-3


@dataclass(frozen=True)
class RetrievalBenchmark:
    """Train NEXT with true, merged, single-model and no captions, and compare test scores."""

    out: Path = Path("runs/caption-retrieval")
    """Folder of benchmarks, weights and results."""
    seeds: int = 3
    """Seeds of each set, from 0."""
    align: bool = True
    """Start from aligned towers; off: from random ones."""


def main(argv: Sequence[str]) -> int:
    """Parse, align, train, print."""
    job = parse(RetrievalBenchmark, argv)
    torch.set_num_threads(1)
    began = time.process_time()
    sources(CaptioningBenchmark("sources", out=job.out))
    settings: dict[str, Any] = {"threads": 1}
    if job.align:
        settings["model.backbone.pretrained"] = str(aligned(job.out).absolute())
    results: dict[str, dict[int, dict[str, float]]] = {}
    alone = {}
    for name in ("true", "merged", "single", "none"):
        shards = job.out / "shards" / name
        options = ScanOptions(captions=name != "none")
        manifest = prepare(load_card(CARD), job.out / "sources" / name, shards, options)
        config = override(
            base_config(manifest.benchmark, None), {**settings, "data.uri": str(shards)}
        )
        if name != "none":
            alone[name] = by_captions_alone(resolve(config, manifest))
            print(f"{name}: captions alone, without any picture: test mAP {alone[name]:.1f}")
        results[name] = {}
        for seed in range(job.seeds):
            _, _, scores = run_once(name, seed, to_toml(override(config, {"seed": seed})))
            results[name][seed] = scores
            print(f"{name} seed {seed}: test mAP {scores['mAP']:.1f}", flush=True)
    print(table(results, job.seeds))
    found = {
        "machine": f"{os.cpu_count()} cores, {platform.system()}, torch {torch.__version__}",
        "cpu_s": time.process_time() - began,
        "captions_alone_mAP": alone,
        "results": results,
    }
    path = job.out / f"retrieval-{'aligned' if job.align else 'random'}.json"
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"{found['cpu_s']:.0f} CPU s; written to {path}")
    return 0


def by_captions_alone(config: RunConfig) -> float:
    """Test mAP of ranking by the mean embedding of each modality's caption, without pictures."""
    test = test_data(config, open_manifest(str(config.data.uri)), None).gallery
    assert test.captions is not None
    text = test.captions.evaluate(np.arange(len(test)))[:, :, 0]  # all experts read the same
    found = text.reshape(len(test), -1)
    found /= np.linalg.norm(found, axis=1, keepdims=True).clip(min=1e-12)
    return retrieval_metrics(found, found, test.labels, test.labels, rule="camera").mAP


class World(NamedTuple):
    """Pictures and their true captions."""

    pixels: np.ndarray
    """uint8 ``[R, M, H, W, 3]``."""
    captions: list[list[list[str]]]
    """``[R][M]`` sentences."""
    rows_of: list[np.ndarray]
    """Rows of each identity."""


class Batch(NamedTuple):
    """Pictures, and some sentences of each one's caption."""

    images: Tensor
    """``[B, 3, H, W]``."""
    sentences: list[str]
    """``[S]`` distinct."""
    chosen: Tensor
    """float ``[B, S]``, 1 where a sentence was taken for a picture."""


def aligned(out: Path) -> Path:
    """Weights of a ``next-tiny`` whose towers are aligned; trained if they are not there."""
    path = out / "aligned.pt"
    if path.exists():
        return path
    backbone, size = BackboneConfig(name="next-tiny", pretrained=None), load_card(CARD).image_size
    clip = load_clip(backbone, size)
    tower = ClipTower(clip.visual, size, backbone)
    texts = Texts(clip)
    world = open_world(out)
    for steps, patches in PHASES:
        optimizer = torch.optim.AdamW(clip.parameters(), lr=RATE, weight_decay=0.02)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, RATE, total_steps=steps, pct_start=0.1
        )
        for step, batch in enumerate(batches(world, steps)):
            scale = clip.logit_scale.exp().clamp(max=100)
            loss = alignment_loss(tower(batch.images), texts(batch), batch.chosen, scale, patches)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if step % 50 == 0:
                print(f"align: step {step} of {steps}, loss {loss.item():.3f}", flush=True)
    torch.save({name: value.contiguous() for name, value in clip.state_dict().items()}, path)
    return path


def alignment_loss(
    tokens: Tensor, texts: Tensor, chosen: Tensor, scale: Tensor, patches: float
) -> Tensor:
    """CLIP's loss of the class tokens, plus ``patches`` times the same of the patches.

    Equal texts are each other's positives. For the patches, an image is as similar to a text as
    its patches are in the softmax-weighted mean (after FILIP, arXiv 2111.07783).

    Args:
        tokens: ``[B, 1 + N, D]`` of the visual tower.
        texts: ``[B, D]`` unit.
        chosen: ``[B, S]`` which sentences each text is made of.
        scale: of the similarities.
        patches: weight.
    """
    tokens = F.normalize(tokens, dim=-1)
    same = (chosen[:, None] == chosen[None]).all(-1).float()
    target = same / same.sum(1, keepdim=True)

    def both_ways(logits: Tensor) -> Tensor:
        ways = (-(target * one.log_softmax(1)).sum(1).mean() for one in (logits, logits.T))
        return sum(ways, torch.zeros(())) / 2

    loss = both_ways(scale * tokens[:, 0] @ texts.T)
    if patches:
        similar = torch.einsum("bnd,cd->bcn", tokens[:, 1:], texts)
        loss = loss + patches * both_ways(scale * (similar * (similar * scale).softmax(-1)).sum(-1))
    return loss


class Texts:
    """Encodes the texts of batches as the text bank does: the mean of unit sentence embeddings."""

    def __init__(self, clip: Any) -> None:
        self._tower = clip.text
        self._mask = clip.text.attn_mask
        self._tokenizer = open_clip.get_tokenizer("next-tiny")
        self._tokens: dict[str, Tensor] = {}

    def __call__(self, batch: Batch) -> Tensor:
        """``[B, D]`` unit."""
        for sentence in batch.sentences:
            if sentence not in self._tokens:
                self._tokens[sentence] = self._tokenizer([sentence])[0]
        tokens = torch.stack([self._tokens[sentence] for sentence in batch.sentences])
        longest = int((tokens != 0).sum(1).max())
        # The tower reads causally up to the end token: what is cut off here changes nothing.
        self._tower.attn_mask = self._mask[:longest, :longest]
        embedded = F.normalize(self._tower(tokens[:, :longest]), dim=-1)
        self._tower.attn_mask = self._mask
        return F.normalize(batch.chosen @ embedded, dim=-1)


def open_world(out: Path) -> World:
    """Draw and decode the pictures for aligning; captions are the schema's, of true attributes."""
    raw = out / "world"
    if not raw.exists():
        print(f"drawing {3 * WORLD.total_samples} pictures to align the towers on (once)")
        write_demo(raw, WORLD, seed=WORLD_SEED)
    manifest = prepare(load_card(CARD), raw, out / "shards" / "world")
    size = manifest.benchmark.image_size
    images = np.asarray(open_cache(manifest, "train", size, cache_root(None), None).images)
    schema = load_schema("person")
    truth, writer = load_labels(raw / "attributes.json", schema), CaptionWriter(schema)
    labels = manifest.labels("train")
    captions = []
    for sample in labels.sample_id:
        of_sample = []
        for modality in manifest.benchmark.modalities:
            shown = {attribute.name for attribute in schema.shown(modality)}
            values = truth.of(("train", str(sample), modality))
            known = {name: one for name, one in values.items() if one != NOT_VISIBLE}
            of_sample.append(writer.sentences({n: known[n] for n in known if n in shown}))
        captions.append(of_sample)
    rows_of = [np.flatnonzero(labels.pid == pid) for pid in np.unique(labels.pid)]
    shape = (len(captions), len(manifest.benchmark.modalities), *size, 3)
    return World(images.reshape(shape), captions, rows_of)


def batches(world: World, steps: int) -> Iterator[Batch]:
    """One picture of each of :data:`BATCH` identities; of its caption, each sentence or not."""
    rng = np.random.default_rng(0)
    config = AugmentConfig(pad=4, erase=0.0)
    for step in range(steps):
        people = rng.choice(len(world.rows_of), BATCH, replace=False)
        rows = np.array([rng.choice(world.rows_of[one]) for one in people])
        modalities = rng.integers(0, world.pixels.shape[1], BATCH)
        pixels = torch.from_numpy(world.pixels[rows, modalities])[:, None]
        nothing = np.zeros(BATCH, dtype=np.int64)
        images = augment(
            pixels, config=config, mean=0.5, std=0.5, seed=0, epoch=step, samples=rows,
            draws=nothing,
        )[:, 0]  # fmt: skip
        taken = []
        for row, modality in zip(rows, modalities, strict=True):
            caption = world.captions[row][modality]
            keep = rng.random(len(caption)) < 0.5
            if not keep.any():
                keep[rng.integers(len(caption))] = True
            taken.append([one for one, kept in zip(caption, keep, strict=True) if kept])
        number: dict[str, int] = {}
        for sentence in (one for some in taken for one in some):
            number.setdefault(sentence, len(number))
        chosen = torch.zeros(BATCH, len(number))
        for place, some in enumerate(taken):
            chosen[place, [number[one] for one in some]] = 1
        yield Batch(images, list(number), chosen)


if __name__ == "__main__":
    run_job(main)
