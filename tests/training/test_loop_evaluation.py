"""Evaluation within the loop: dealt over the workers, and never the end of a run's last steps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from next.config import RunConfig, from_toml, override, to_toml
from next.data.shards.reader import open_manifest
from next.evaluation.protocol import Evaluation, evaluate
from next.evaluation.share import Share
from next.model.network import NEXT
from next.training.checkpointing.checkpoint import Progress, load_network, read_progress
from next.training.checkpointing.interruption import Requests
from next.training.inputs import training_data
from next.training.loop import Outcome, Worker, train
from next.training.results.assessment import assess
from next.training.results.report import FolderReporter, TrainReporter
from tests.training.conftest import together


def evaluating_member(rank: int, world: int, meeting: str, config: str, queue) -> None:
    """Trains one epoch, and assesses; tells what it was given of both, and what it embedded."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{meeting}/rendezvous", rank=rank, world_size=world)
    own = override(from_toml(config), {"data.cache": f"{meeting}/cache-{rank}"})
    data = training_data(own, open_manifest(own.data.uri))
    reporter = TrainReporter(
        f"{meeting}/run", rank, world, send=lambda report: None, checkpoint=own.checkpoint,
        requests=Requests(),
    )  # fmt: skip
    seen: list[int] = []
    found: list[Any] = []

    def count(module, inputs, output) -> None:
        if isinstance(module, NEXT) and not module.training:
            seen.append(len(inputs[0]))

    def keep(evaluation: Evaluation, progress: Progress) -> None:
        usage = evaluation.gallery.usage.semantic_entropy
        found.append((evaluation.query.features.copy(), usage, evaluation.metrics.as_dict()))

    hook = torch.nn.modules.module.register_module_forward_hook(count)
    with reporter:
        train(own, data, reporter, Worker(rank, world), on_evaluation=keep)
    hook.remove()
    dist.barrier()  # the first one has written the checkpoint
    where = {"folder": Path(f"{meeting}/assessed"), "device": torch.device("cpu")}
    manifest = open_manifest(own.data.uri)
    assessed = assess(
        Path(f"{meeting}/run/last"), manifest, split="val", share=Share(rank, world), **where
    )
    queue.put((rank, found, sum(seen), assessed))
    dist.destroy_process_group()


def test_each_worker_embeds_its_share_and_sees_the_whole_evaluation(ready, tmp_path):
    """Its scores are those that one process gives the checkpoint."""
    settings = {"optim.epochs": 1, "scaling.num_workers": 2, "selection.batch": 16}
    config = override(ready, settings)
    members = [(rank, 2, str(tmp_path), to_toml(config)) for rank in range(2)]
    answers = sorted(together(evaluating_member, members), key=lambda answer: answer[0])
    network, trained = load_network(tmp_path / "run" / "last")
    data = training_data(trained, open_manifest(trained.data.uri))
    alone = evaluate(
        network, data.query, data.gallery, rule=data.rule, config=trained, device="cpu"
    )
    for _, found, _, _ in answers:
        ((features, usage, scores),) = found
        np.testing.assert_array_equal(features, alone.query.features)
        np.testing.assert_array_equal(usage, alone.gallery.usage.semantic_entropy)
        assert scores == alone.metrics.as_dict()
    seen = [answer[2] for answer in answers]
    assert sum(seen) == alone.forwards
    assert max(seen) - min(seen) <= 16
    first, second = (answer[3] for answer in answers)
    assert first.metrics == second.metrics
    assert len(first.queries["query"]) == len(data.query)
    assert (second.queries, second.pictures) == ({}, []), "no rank but the first reads the names"


def run(config: RunConfig, folder: Path, *, blind: bool = False) -> Outcome:
    """``blind``: no held-out identity has two cameras, so that no query has a match."""
    data = training_data(config, open_manifest(config.data.uri))
    if blind:
        labels = data.query.labels
        one_camera = replace(data.query, labels=labels.replace(camera=np.zeros_like(labels.pid)))
        data = data._replace(query=one_camera, gallery=one_camera)
    with FolderReporter(folder, checkpoint=config.checkpoint) as reporter:
        return train(config, data, reporter)


def test_a_run_that_cannot_be_evaluated_leaves_the_checkpoint_of_that_step(ready, tmp_path):
    """Mended, it goes on with the evaluation, and comes to the bits of a run that never failed."""
    config = override(ready, {"optim.epochs": 2})
    with pytest.raises(ValueError, match="no query has a match"):
        run(config, tmp_path / "failed", blind=True)
    kept = read_progress(tmp_path / "failed" / "last")
    assert kept.step > 0
    assert (kept.epoch, kept.step_in_epoch) == (0, kept.step)
    with pytest.raises(ValueError, match="no query has a match"):
        run(config, tmp_path / "failed", blind=True)
    assert read_progress(tmp_path / "failed" / "last").step == kept.step, "nothing is trained twice"

    rest = run(config, tmp_path / "failed")
    whole = run(config, tmp_path / "whole")
    assert rest.losses == whole.losses[kept.step :]
    assert rest.metrics == whole.metrics


def test_a_worker_rescues_its_checkpoint_without_waiting_for_the_others(ready, tmp_path):
    """The others may be waiting in the evaluation that this one could not do."""
    sent: list[dict[str, Any]] = []
    for rank in range(2):
        reporter = TrainReporter(
            tmp_path, rank, 1, send=sent.append, checkpoint=ready.checkpoint, requests=Requests()
        )
        data = training_data(ready, open_manifest(ready.data.uri))
        labels = data.query.labels.replace(camera=np.zeros_like(data.query.labels.pid))
        blind = replace(data.query, labels=labels)
        with pytest.raises(ValueError, match="no query has a match"), reporter:
            train(ready, data._replace(query=blind, gallery=blind), reporter)
        assert read_progress(tmp_path / "step-00000004").step_in_epoch == 4
    assert sent == [], "nothing is reported"
