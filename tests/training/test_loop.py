"""The loop on real shards of a tiny benchmark: same bits, resume, world size, failures."""

import gc
import inspect
import math
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from next.config import RunConfig, from_toml, override, to_toml
from next.data.loading.loader import train_batches
from next.data.shards.reader import open_manifest
from next.model.network import NEXT
from next.training.checkpointing.checkpoint import load_network, read_progress
from next.training.checkpointing.interruption import Interrupted, Request, Requests
from next.training.inputs import resolve, training_data
from next.training.loop import GlobalLoss, Outcome, Worker, train
from next.training.results.report import FolderReporter, TrainReporter
from next.training.step.step_log import NonFiniteLossError, RouterCollapseError
from tests.training.conftest import RequestsAt, together


def run(config: RunConfig, folder: Path) -> Outcome:
    data = training_data(config, open_manifest(config.data.uri))
    with FolderReporter(folder) as reporter:
        return train(config, data, reporter)


LONGER = {"batch.instances": 2, "selection.every": 100}
"""Seven small steps an epoch instead of three, and one evaluation."""


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_network(folder)[0].state_dict()


def test_one_seed_gives_one_loss_curve_to_the_last_bit_and_another_seed_another(ready, tmp_path):
    first = run(ready, tmp_path / "a")
    assert run(ready, tmp_path / "b").losses == first.losses
    other = run(override(ready, {"seed": 1}), tmp_path / "c")
    assert other.losses != first.losses
    assert len(first.losses) == first.step > 0


class Killed(Exception):
    """The process dies here."""


class Watching(Requests):
    """Shows the loop's variables after each step to a function."""

    def __init__(self, look: Callable[[dict[str, Any]], None]) -> None:
        super().__init__()
        self._look = look

    def take(self) -> Request:
        frames = [frame for frame in inspect.stack(0) if frame.function == "train"]
        self._look(frames[0].frame.f_locals)
        return super().take()


class Dying(Requests):
    """Lets the process die after so many steps, without another word."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step

    def take(self) -> Request:
        self.step -= 1
        if self.step == 0:
            raise Killed
        return super().take()


class Rows(list):
    """What was logged, by step and name, as the journal keeps it: the first value stays."""

    def __call__(self, metrics, step):
        self.append((step, metrics))

    def values(self) -> dict:
        found = {}
        for step, metrics in self:
            for name, value in metrics.items():
                if name not in ("train/samples_per_second", "train/seconds_per_step"):
                    found.setdefault((step, name), value)
        return found


def run_until(config, folder, rows=None, requests=None, worker=Worker()) -> Outcome:  # noqa: B008
    data = training_data(config, open_manifest(config.data.uri))
    rows = Rows() if rows is None else rows
    with FolderReporter(folder, checkpoint=config.checkpoint, requests=requests) as reporter:
        return train(config, data, reporter, worker, rows)


def assert_same_bits(ours: Path, theirs: Path) -> None:
    """Weights, optimizer and RNG of two checkpoints are equal to the last bit."""
    found, expected = weights(ours), weights(theirs)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    found, expected = (
        torch.load(folder / "optimizer.pt", weights_only=True) for folder in (ours, theirs)
    )
    assert torch.equal(found["rng"], expected["rng"])
    states = found["optimizer"]["state"]
    for key, state in expected["optimizer"]["state"].items():
        assert all(torch.equal(states[key][name], state[name]) for name in state), key


@pytest.mark.parametrize("settings", [{}, {"optim.ema": 0.9, "optim.accumulate": 3}])
def test_a_run_stopped_or_killed_at_any_step_ends_with_the_bits_of_an_undisturbed_one(
    ready, tmp_path, settings
):
    ready = override(ready, {"checkpoint.every_steps": 2, "optim.epochs": 2} | settings)
    rows = Rows()
    whole = run_until(ready, tmp_path / "whole", rows)
    steps = len(whole.losses)
    assert steps >= 6
    first_epoch = next(step for step, name in rows.values() if name == "val/mAP")
    for step in (
        {3, first_epoch} if settings else sorted({1, 3, first_epoch, first_epoch + 1, steps})
    ):
        for how, requests, error in (
            ("stopped", RequestsAt(step, Request.STOP), Interrupted),
            ("killed", Dying(step), Killed),
        ):
            folder, logged = tmp_path / f"{how}-{step}", Rows()
            with pytest.raises(error):
                run_until(ready, folder, logged, requests)
            rest = run_until(ready, folder, logged)
            done = steps - len(rest.losses)
            assert done == step if how == "stopped" else done <= step - 1
            assert whole.losses[done:] == rest.losses
            assert rest.metrics == whole.metrics
            assert logged.values() == rows.values()
            assert_same_bits(folder / "last", tmp_path / "whole" / "last")


def test_a_process_that_dies_between_its_checkpoint_and_its_metrics_loses_none(ready, tmp_path):
    """The checkpoint brings them along, and they are handed over again on resuming."""
    ready = override(ready, {"checkpoint.every_steps": 2, "optim.epochs": 1})
    rows, logged = Rows(), Rows()
    run_until(ready, tmp_path / "whole", rows)
    with pytest.raises(Interrupted):
        run_until(ready, tmp_path / "torn", Rows(), RequestsAt(3, Request.STOP))
    progress = read_progress(tmp_path / "torn" / "last")
    assert [step for step, _ in progress.rows] == [3], "those of the checkpoint before are out"
    run_until(ready, tmp_path / "torn", logged)
    steps = {step for step, _ in rows.values()}
    assert {step for step, _ in logged.values()} == steps - {1, 2}


def test_a_checkpoint_is_written_when_this_node_may_be_gone_soon_and_training_goes_on(
    ready, tmp_path
):
    ready = override(ready, {"optim.epochs": 1, "checkpoint.num_to_keep": 5})
    done = run_until(ready, tmp_path, requests=RequestsAt(2, Request.CHECKPOINT))
    assert len(done.losses) == done.step
    assert read_progress(tmp_path / "step-00000002").step_in_epoch == 2


def test_a_checkpoint_within_an_epoch_of_another_plan_is_refused(ready, tmp_path):
    with pytest.raises(Interrupted):
        run_until(ready, tmp_path, requests=RequestsAt(2, Request.STOP))
    with pytest.raises(ValueError, match=r"stands within epoch 1 of plan \w+, but this version"):
        run_until(override(ready, {"seed": 1}), tmp_path)


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


@pytest.mark.parametrize(
    ("dropped", "least"),
    [
        pytest.param(0.0, (0.9, 0.5, 0.0), id="flip, crop and sentences"),
        pytest.param(0.5, (0.9, 0.5, 0.5), id="and modalities that are left out"),
    ],
)
def test_a_sample_that_a_batch_repeats_is_drawn_anew_each_time(
    ready, tmp_path, monkeypatch, dropped, least
):
    """Identities of 8 samples fill 16 places of a batch: twice the same would teach nothing."""
    pairs: list[tuple[bool, ...]] = []

    def watched(*given, **settings):
        for batch in train_batches(*given, **settings):
            seen = {}
            for place, row in enumerate(batch.rows.tolist()):
                if row in seen:
                    pairs.append(
                        tuple(
                            not torch.equal(part[place], part[seen[row]])
                            for part in (batch.images, batch.text, batch.present)
                        )
                    )
                seen[row] = place
            yield batch

    monkeypatch.setattr("next.training.loop.train_batches", watched)
    settings = {"batch.instances": 16, "optim.epochs": 1, "data.drop_modality": dropped}
    run(override(ready, settings), tmp_path)
    assert len(pairs) >= 16
    assert (np.mean(pairs, axis=0) >= least).all(), "share of pairs that differ"


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


def test_losses_are_logged_within_an_epoch_and_how_often_changes_no_result(ready, tmp_path):
    ready = override(ready, LONGER | {"optim.epochs": 2})
    runs = {}
    for every in (1, 4, 1000):
        rows, seen = Rows(), []

        def look(loop, rows=rows, seen=seen):
            seen.append(len([step for step, row in rows if "train/loss" in row]))

        config = override(ready, {"tracking.every_steps": every})
        outcome = run_until(config, tmp_path / str(every), rows, Watching(look))
        runs[every] = (outcome, rows.values(), seen)
    steps = len(runs[1][2]) // 2
    assert steps == 7
    assert runs[1][2] == list(range(2 * steps)), "all but the step that was just taken"
    assert runs[4][2] == [0, 0, 0, 0, 4, 4, 4, 7, 7, 7, 7, 11, 11, 11]
    assert set(runs[1000][2]) == {0, steps}, "at the end of an epoch whatever is left"
    for every in (4, 1000):
        assert runs[every][:2] == runs[1][:2]
    losses = runs[1][0].losses
    assert runs[1][0].metrics["train/loss"] == sum(losses[steps:]) / steps


class Counted:
    """A hook that is alive as long as the graph of autograd that it is hooked to."""

    alive: ClassVar[weakref.WeakSet] = weakref.WeakSet()

    def __init__(self) -> None:
        self.alive.add(self)

    def __call__(self, *gradients: object) -> None:
        pass


@pytest.mark.parametrize("settings", [{}, {"optim.accumulate": 2}])
def test_no_step_leaves_its_graph_behind_and_no_more_than_its_losses(ready, tmp_path, settings):
    """Nothing of the graphs of an epoch, and of the tensors only the losses not yet read."""
    ready = override(ready, LONGER | {"optim.epochs": 3, "tracking.every_steps": 3} | settings)
    tensors: list[tuple[int, int]] = []

    def look(loop):
        gc.collect()
        assert not Counted.alive
        tensors.append(
            (
                len(loop["losses"]),
                sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects()),
            )
        )

    def hook(module, inputs, output):
        if isinstance(module, GlobalLoss):
            output.total.grad_fn.register_hook(Counted())

    hooked = torch.nn.modules.module.register_module_forward_hook(hook)
    try:
        run_until(ready, tmp_path, requests=Watching(look))
    finally:
        hooked.remove()
    settled = tensors[3:]  # the optimizer's moments are made in the first step
    counts = {waiting: {found for seen, found in settled if seen == waiting} for waiting in (1, 2)}
    assert len(settled) > 9
    assert all(len(found) == 1 for found in counts.values()), counts


def test_nan_is_found_within_so_many_steps_and_not_at_the_end_of_the_epoch(ready, tmp_path):
    taken = []

    def spoil(loop):
        taken.append(len(taken) + 1)
        if len(taken) == 2:
            next(iter(loop["network"].parameters())).data.fill_(math.nan)

    ready = override(ready, LONGER | {"optim.epochs": 1, "tracking.every_steps": 2})
    with pytest.raises(NonFiniteLossError, match=r"is nan from step 3 on, to step 4 at least"):
        run_until(ready, tmp_path, requests=Watching(spoil))
    assert taken[-1] == 4


def test_workers_tell_what_they_logged_within_an_epoch(ready, tmp_path):
    """Ray gets each row once, at the step where it was read."""
    ready = override(ready, LONGER | {"optim.epochs": 1, "tracking.every_steps": 2})
    sent: list[dict] = []
    requests = Watching(lambda loop: None)
    reporter = TrainReporter(
        tmp_path, 0, 1, send=sent.append, checkpoint=ready.checkpoint, requests=requests
    )
    data = training_data(ready, open_manifest(ready.data.uri))
    with reporter:
        done = train(ready, data, reporter, log_metrics=reporter.log_metrics)
    told = [[step for step, row in one["rows"] if "train/loss" in row] for one in sent]
    assert told[:3] == [[1, 2], [3, 4], [5, 6]]
    assert [step for steps in told for step in steps] == list(range(1, done.step + 1))


@pytest.mark.parametrize("stop", [None, 3])
def test_the_average_counts_the_steps_of_the_whole_run(ready, tmp_path, stop):
    """Also beyond what was read last, beyond an epoch, and after a resume."""
    average = {"optim.ema": 0.99, "optim.epochs": 2, "tracking.every_steps": 4}
    ready = override(ready, LONGER | average)
    torch.manual_seed(ready.seed)
    expected = [weight.detach().clone() for weight in NEXT(ready.model).parameters()]
    steps = 0

    def look(loop):
        nonlocal steps
        steps += 1
        decay = min(0.99, (1 + steps) / (10 + steps))
        for mean, weight in zip(expected, loop["network"].parameters(), strict=True):
            mean.mul_(decay).add_(weight.detach(), alpha=1 - decay)
        for mean, found in zip(expected, loop["average"].network.parameters(), strict=True):
            torch.testing.assert_close(found, mean, rtol=1e-5, atol=1e-6)
        if steps == stop:
            requests.make(Request.STOP)

    requests = Watching(look)
    if stop is not None:
        with pytest.raises(Interrupted):
            run_until(ready, tmp_path, requests=requests)
    run_until(ready, tmp_path, requests=Watching(look))
    assert steps == 14


def test_nan_stops_the_run_and_names_steps_part_and_remedy(ready, tmp_path):
    wild = override(ready, {"optim.lr": 1e12, "optim.tower_lr": 1e12, "optim.warmup_epochs": 0})
    with pytest.raises(
        NonFiniteLossError,
        match=r"loss\S* .*is (nan|inf).* from step \d+ on, to step \d+ .*\(epoch 1\).*optim.lr",
    ):
        run(wild, tmp_path)


def test_nan_keeps_the_last_good_checkpoint_and_none_that_has_it(ready, tmp_path, caplog):
    """A gradient that overflows spoils the weights after a loss that was still fine."""

    class Spoiling(Dying):
        """Spoils the weights in the step before the one that would see it."""

        def take(self) -> Request:
            self.step -= 1
            if self.step == 0:
                frames = [frame for frame in inspect.stack() if frame.function == "train"]
                network = frames[0].frame.f_locals["network"]
                next(iter(network.parameters())).data.fill_(math.nan)
            return Request.NONE

    ready = override(ready, {"checkpoint.every_steps": 1, "optim.epochs": 1})
    with pytest.raises(NonFiniteLossError, match=r"loss and .* is nan from step 3 on"):
        run_until(ready, tmp_path, requests=Spoiling(2))
    assert read_progress(tmp_path / "last").step == 1
    assert "step 2: " in caplog.text
    assert "is not finite; this checkpoint is not kept" in caplog.text


def test_other_data_is_refused(ready, tmp_path):
    run(ready, tmp_path)
    data = training_data(ready, open_manifest(ready.data.uri))
    with pytest.raises(ValueError, match=r"trained on data .* but data.uri holds other"):
        train(ready, data._replace(digest="other"), FolderReporter(tmp_path))


class Part(NamedTuple):
    """A run that some processes train together; many of them in one life of the processes."""

    config: str
    folder: Path
    stop: int = 0
    """Step after which the last rank is asked to stop; 0: never."""


class Ended(NamedTuple):
    """How it ended, which is alike on all ranks."""

    step: int
    losses: list[float] | None
    """None: it was stopped."""


def world_member(rank: int, world: int, meeting: str, parts: list[Part], queue) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=world)
    ended = []
    for part in parts:
        config = from_toml(part.config)
        requests = RequestsAt(part.stop if rank == world - 1 else 0, Request.STOP)
        data = training_data(config, open_manifest(config.data.uri))
        reporter = TrainReporter(
            part.folder,
            rank,
            world,
            send=lambda report: None,
            checkpoint=config.checkpoint,
            requests=requests,
        )
        try:
            with reporter:
                outcome = train(config, data, reporter, Worker(rank, world))
        except Interrupted as interrupted:
            ended.append(Ended(interrupted.step, None))
        else:
            ended.append(Ended(outcome.step, outcome.losses))
        dist.barrier()
    queue.put(ended)
    dist.destroy_process_group()


def train_together(world: int, meeting: Path, *parts: Part) -> list[Ended]:
    members = [(rank, world, str(meeting), list(parts)) for rank in range(world)]
    first, *others = together(world_member, members)
    assert all(other == first for other in others), "every rank saw the same"
    return first


def assert_close(losses: list[float], expected: list[float]) -> None:
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=2e-3, atol=2e-3)


@pytest.mark.slow
def test_world_size_is_invisible_also_through_a_stop_and_a_resume(ready, tmp_path):
    """1, 2 and 4 workers see the same global batches and come to the same losses."""
    ready = override(ready, {"tracking.every_steps": 2})
    longer = override(ready, {"optim.epochs": 6, "selection.every": 6})
    alone = run(longer, tmp_path / "alone").losses
    assert len(alone) >= 20
    with pytest.raises(Interrupted):
        run_until(ready, tmp_path / "mixed", requests=RequestsAt(5, Request.STOP))
    torn = Part(to_toml(ready), tmp_path / "torn")
    two, whole, stopped, rest, mixed = train_together(
        2,
        tmp_path / "meeting-2",
        Part(to_toml(longer), tmp_path / "two"),
        Part(to_toml(ready), tmp_path / "whole"),
        torn._replace(stop=4),
        torn,
        Part(to_toml(ready), tmp_path / "mixed"),
    )
    assert_close(two.losses[:20], alone[:20])
    assert (stopped.step, stopped.losses) == (5, None), "asked one rank, agreed a step later"
    assert rest == Ended(whole.step, whole.losses[5:])
    assert_same_bits(tmp_path / "torn" / "last", tmp_path / "whole" / "last")
    # What one process began, two continue: batches, learning rate and mining are the same.
    assert_close(mixed.losses, whole.losses[5:])
    (four,) = train_together(4, tmp_path / "meeting-4", Part(to_toml(longer), tmp_path / "four"))
    assert_close(four.losses[:20], alone[:20])


def test_a_router_that_collapsed_ends_the_run_and_says_which(tiny_config, tmp_path, monkeypatch):
    config = override(tiny_config, {"optim.collapse_steps": 3})
    manifest = open_manifest(str(config.data.uri))
    config = resolve(config, manifest)
    data = training_data(config, manifest)
    shares: list[dict[str, float]] = []

    def log(values, step):
        shares.append({k: v for k, v in values.items() if k.startswith("train/dominance")})

    train(config, data, FolderReporter(tmp_path / "healthy"), log_metrics=log)
    seen = [share for row in shares for share in row.values()]
    assert len(seen) == 2 * len([row for row in shares if row])
    assert all(0.5 <= share < 0.95 for share in seen), "two experts share the attention"

    monkeypatch.setattr(
        "next.training.step.step_log._EVERYTHING", 0.5
    )  # one of two always has that
    with pytest.raises(RouterCollapseError, match=r"one semantic expert got \d.* for 3 steps, up"):
        train(config, data, FolderReporter(tmp_path / "collapsed"))
