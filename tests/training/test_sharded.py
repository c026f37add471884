"""``data.placement = sharded`` in the real loop, on one worker and on two."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from next.benchmark.card import load_card
from next.config import RunConfig, from_toml, override, to_toml
from next.data.holdout import split_train
from next.data.loading.cache import contents
from next.data.loading.plan import deal_shards, training_plan
from next.data.shards.reader import open_manifest
from next.data.source.ingest import prepare
from next.evaluation.protocol import evaluate
from next.training.checkpointing.checkpoint import load_network
from next.training.checkpointing.interruption import Requests
from next.training.folder import claim_folder
from next.training.inputs import resolve, training_data
from next.training.loop import Worker, train
from next.training.results.report import TrainReporter
from tests.training.conftest import together
from tests.training.test_loop import run

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def in_shards_of(ready, demo_raw, tmp_path, monkeypatch) -> Callable[[int], RunConfig]:
    """The tiny run on shards of so many identities each."""

    def prepared(identities: int) -> RunConfig:
        samples = np.bincount(open_manifest(ready.data.uri).labels("train").pid).max()
        monkeypatch.setattr("next.data.shards.layout.GROUP_ROWS", int(samples) * identities)
        monkeypatch.setattr("next.data.shards.layout.SHARD_BYTES", 1)
        out = tmp_path / "shards"
        prepare(load_card(ROOT / "datasets" / "demo.toml"), demo_raw, out)
        settings = {"data.uri": str(out), "data.placement": "sharded", "data.cache": str(tmp_path)}
        return override(ready, settings)

    return prepared


def test_one_worker_on_its_own_shards_trains_as_on_all_of_the_data(in_shards_of, tmp_path):
    """Also within a limit that has no room for what an earlier run left."""
    sharded = in_shards_of(1)
    replicated = override(sharded, {"data.placement": "replicated"})
    outcome = run(replicated, tmp_path / "a")
    assert run(sharded, tmp_path / "b") == outcome
    held = sum(entry.bytes for entry in contents(tmp_path))
    limited = override(sharded, {"data.cache_limit": held * 0.9e-9, "data.image_size": (32, 24)})
    run(override(limited, {"model.image_size": (32, 24), "optim.epochs": 1}), tmp_path / "c")
    assert sum(entry.bytes for entry in contents(tmp_path)) < held


def test_shards_that_hold_too_few_identities_are_refused_before_the_run(in_shards_of):
    config = in_shards_of(3)
    crowded = override(config, {"scaling.num_workers": 2, "batch.identities": 8})
    with pytest.raises(ValueError, match=r"= 4 identities .* but epoch \d deals only 3 to one"):
        resolve(crowded, open_manifest(config.data.uri))
    many = override(config, {"scaling.num_workers": 8, "batch.identities": 8})
    with pytest.raises(ValueError, match="a train shard for each worker, but got 4 shards for 8"):
        resolve(many, open_manifest(config.data.uri))
    with pytest.raises(ValueError, match=r"multiple of scaling.num_workers with data.placement"):
        override(config, {"scaling.num_workers": 3, "batch.instances": 6})


def test_a_run_on_sharded_data_is_not_continued_by_another_number_of_workers(in_shards_of):
    """Which batches there are depends on it; with all data everywhere it does not."""
    sharded = in_shards_of(1)
    claim_folder(sharded)
    claim_folder(override(sharded, {"run.max_failures": 9}))
    more = override(sharded, {"scaling.num_workers": 2})
    with pytest.raises(
        ValueError, match=r"(?s)Changed:.*num_workers: 1 -> 2 \(data.placement = sharded plans its"
    ):
        claim_folder(more)
    replicated = {"data.placement": "replicated", "run.name": "everywhere"}
    claim_folder(override(sharded, replicated))
    claim_folder(override(more, replicated))


def member(rank: int, meeting: str, config: str, folder: str, queue) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=2)
    own = override(from_toml(config), {"data.cache": f"{folder}/cache-{rank}"})
    data = training_data(own, open_manifest(own.data.uri))
    reporter = TrainReporter(
        folder, rank, 2, send=lambda report: None, checkpoint=own.checkpoint, requests=Requests()
    )
    scores: list[dict[str, float]] = []
    with reporter:
        losses = train(
            own,
            data,
            reporter,
            Worker(rank, 2),
            on_evaluation=lambda found, progress: scores.append(found.metrics.as_dict()),
        ).losses
    queue.put((losses, scores))
    dist.destroy_process_group()


def test_two_workers_decode_only_what_is_dealt_to_them(in_shards_of, tmp_path):
    settings = {"optim.epochs": 1, "scaling.num_workers": 2, "selection.batch": 8}
    config = override(in_shards_of(1), settings)
    common = (str(tmp_path / "meeting"), to_toml(config), str(tmp_path / "run"))
    (losses, scores), other = together(member, [(rank, *common) for rank in range(2)])
    assert other == (losses, scores), "the loss is of the global batch, the scores of all samples"
    network, trained = load_network(tmp_path / "run" / "last")
    data = training_data(trained, open_manifest(trained.data.uri))
    alone = evaluate(
        network, data.query, data.gallery, rule=data.rule, config=trained, device="cpu"
    )
    assert scores == [alone.metrics.as_dict()]
    manifest = open_manifest(config.data.uri)
    labels = manifest.labels("train")
    pids, (rows, held_out) = labels.pid, split_train(config, labels, "camera")
    shards = manifest.shard_of_row("train")[rows]
    owner = deal_shards(np.bincount(shards), 2, seed=config.seed, epoch=0)[shards]
    plan = training_plan(config, pids[rows], shards, epoch=0, world=2)
    assert len(losses) == len(plan)
    for rank in range(2):
        about = [entry.about for entry in contents(tmp_path / "run" / f"cache-{rank}")]
        decoded = [int(words.split(",")[1].split()[0]) for words in about if ", " in words]
        assert sum(decoded) == (owner == rank).sum() + len(held_out)
