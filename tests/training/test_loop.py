"""The loop on real shards of a tiny benchmark: same bits, resume, world size, failures."""

import multiprocessing
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from next.config import RunConfig, from_toml, override, to_toml
from next.data.shards import open_manifest
from next.training.checkpoint import load_network
from next.training.inputs import resolve, training_data
from next.training.loop import NonFiniteLossError, Outcome, Worker, train
from next.training.report import FolderReporter


@pytest.fixture
def ready(tiny_config) -> RunConfig:
    torch.set_num_threads(1)
    return resolve(tiny_config, open_manifest(tiny_config.data.uri))


def run(config: RunConfig, folder: Path, worker: Worker = Worker()) -> Outcome:  # noqa: B008
    data = training_data(config, open_manifest(config.data.uri))
    return train(config, data, FolderReporter(folder), worker)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_network(folder)[0].state_dict()


def test_one_seed_gives_one_loss_curve_to_the_last_bit_and_another_seed_another(ready, tmp_path):
    first = run(ready, tmp_path / "a")
    assert run(ready, tmp_path / "b").losses == first.losses
    other = run(override(ready, {"seed": 1}), tmp_path / "c")
    assert other.losses != first.losses
    assert len(first.losses) == first.step > 0


@pytest.mark.parametrize("settings", [{}, {"optim.ema": 0.9, "optim.accumulate": 3}])
def test_an_interrupted_run_ends_with_the_bits_of_an_uninterrupted_one(ready, tmp_path, settings):
    ready = override(ready, settings)

    class Interrupted(Exception):
        pass

    class Interrupting(FolderReporter):
        def report(self, metrics, write, *, is_best):
            super().report(metrics, write, is_best=is_best)
            if metrics["epoch"] == 1:
                raise Interrupted

    whole = run(ready, tmp_path / "whole")
    data = training_data(ready, open_manifest(ready.data.uri))
    with pytest.raises(Interrupted):
        train(ready, data, Interrupting(tmp_path / "torn"))
    rest = run(ready, tmp_path / "torn")
    assert whole.losses[-len(rest.losses) :] == rest.losses
    assert len(rest.losses) < len(whole.losses)
    assert rest.metrics == whole.metrics
    ours, theirs = weights(tmp_path / "whole" / "last"), weights(tmp_path / "torn" / "last")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    "settings", [{"optim.accumulate": 3}, {"model.backbone.checkpointing": True}]
)
def test_what_saves_memory_changes_no_result(ready, tmp_path, settings):
    whole = run(ready, tmp_path / "whole")
    saving = run(override(ready, settings), tmp_path / "saving")
    torch.testing.assert_close(
        torch.tensor(saving.losses), torch.tensor(whole.losses), rtol=2e-3, atol=2e-3
    )


def test_the_average_of_the_weights_is_what_is_evaluated_and_kept(ready, tmp_path):
    averaged = override(ready, {"optim.ema": 0.999, "optim.epochs": 1, "selection.every": 1})
    plain = run(override(averaged, {"optim.ema": None}), tmp_path / "plain")
    outcome = run(averaged, tmp_path / "averaged")
    assert outcome.losses == plain.losses, "training itself is untouched"
    assert outcome.metrics != plain.metrics
    folder = tmp_path / "averaged" / "last"
    trained = load_file(folder / "trained.safetensors")
    assert all(
        torch.equal(trained[name], value)
        for name, value in weights(tmp_path / "plain" / "last").items()
    )
    assert any(not torch.equal(trained[name], value) for name, value in weights(folder).items())


def test_a_finished_run_reports_again_and_trains_no_further(ready, tmp_path):
    done = run(ready, tmp_path)
    reports = []
    data = training_data(ready, open_manifest(ready.data.uri))
    again = train(ready, data, FolderReporter(tmp_path, reports.append))
    assert reports == [done.metrics]
    assert (again.losses, again.step, again.best) == ([], done.step, done.best)


def test_learning_is_seen_in_the_loss(ready, tmp_path):
    outcome = run(override(ready, {"optim.epochs": 12}), tmp_path)
    per_epoch = len(outcome.losses) // 12
    first = sum(outcome.losses[:per_epoch]) / per_epoch
    assert sum(outcome.losses[-per_epoch:]) / per_epoch < 0.8 * first


def test_metrics_are_logged_for_every_step_once(ready, tmp_path):
    seen = []
    data = training_data(ready, open_manifest(ready.data.uri))
    outcome = train(
        ready,
        data,
        FolderReporter(tmp_path),
        log_metrics=lambda metrics, step: seen.append((step, metrics)),
    )
    losses = [(step, metrics["train/loss"]) for step, metrics in seen if "train/loss" in metrics]
    assert losses == list(enumerate(outcome.losses, 1))
    rates = [metrics for _, metrics in seen if "train/lr_tower" in metrics]
    assert len(rates) == ready.optim.epochs
    assert rates[-1]["train/lr_heads"] == pytest.approx(ready.optim.lr * ready.optim.final_lr_share)
    validated = [step for step, metrics in seen if "val/mAP" in metrics]
    assert len(validated) == ready.optim.epochs
    assert validated[-1] == outcome.step


def test_nan_stops_the_run_and_names_steps_part_and_remedy(ready, tmp_path):
    wild = override(ready, {"optim.lr": 1e12, "optim.tower_lr": 1e12, "optim.warmup_epochs": 0})
    with pytest.raises(
        NonFiniteLossError, match=r"loss\S* is (nan|inf) from step \d+ on \(epoch 1\).*optim.lr"
    ):
        run(wild, tmp_path)


def test_other_data_is_refused(ready, tmp_path):
    run(ready, tmp_path)
    data = training_data(ready, open_manifest(ready.data.uri))
    with pytest.raises(ValueError, match=r"trained on data .* but data.uri holds other"):
        train(ready, data._replace(digest="other"), FolderReporter(tmp_path))


def world_member(rank: int, world: int, port: int, config: str, folder: str, queue) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    outcome = run(from_toml(config), Path(folder) / str(rank), Worker(rank, world))
    if rank == 0:
        queue.put(outcome.losses)
    dist.destroy_process_group()


@pytest.mark.slow
def test_world_size_is_invisible(ready, tmp_path):
    """1, 2 and 4 workers see the same global batches and come to the same losses."""
    config = override(ready, {"optim.epochs": 10, "selection.every": 10})
    alone = run(config, tmp_path / "alone").losses
    assert len(alone) >= 20
    spawn = multiprocessing.get_context("spawn")
    for world in (2, 4):
        queue = spawn.Queue()
        port = 29500 + os.getpid() % 2000 + world
        members = [
            spawn.Process(
                target=world_member,
                args=(rank, world, port, to_toml(config), str(tmp_path / f"{world}"), queue),
            )
            for rank in range(world)
        ]
        for member in members:
            member.start()
        together = queue.get(timeout=200)
        for member in members:
            member.join(timeout=60)
            assert member.exitcode == 0
        torch.testing.assert_close(
            torch.tensor(together[:20]), torch.tensor(alone[:20]), rtol=2e-3, atol=2e-3
        )
