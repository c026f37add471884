"""Trials of several workers: that they run, are pruned, take turns, and give back what they had."""

import logging
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import ray
import ray.train
from ray.exceptions import RayActorError
from ray.util.placement_group import placement_group

from next.config import RunConfig, override
from next.tracking.run import open_run
from next.training.distributed.cluster import require_room, start_ray
from next.tuning.execution.deaths import LostProcessError
from next.tuning.execution.reservations import reclaiming, worker_groups
from next.tuning.execution.workers import Evaluations, first_cause
from next.tuning.folder import Standing, read_standing
from next.tuning.search.space import Space, load_space
from next.tuning.sweep import SweepConfig, run_sweep

SPACE = '''
def suggest(trial):
    """The third trial does not learn."""
    rate = 1e-12 if trial.number == 2 else 1e-3
    return {"optim.lr": rate, "optim.tower_lr": rate, "seed": trial.number}
'''
EPOCHS = 4


@pytest.fixture(scope="module")
def cpus() -> Iterator[float]:
    """A cluster that is there before the sweeps are; how many CPUs it has."""
    start_ray(4)
    yield ray.cluster_resources()["CPU"]
    ray.shutdown()


@pytest.fixture
def space(tmp_path) -> Space:
    (tmp_path / "rates.py").write_text(SPACE)
    return load_space(tmp_path / "rates.py")


def sweep_of(config: RunConfig, space: Space, cpus_per_worker: float, trials: int) -> Standing:
    config = override(
        config,
        {"scaling.num_workers": 2, "scaling.cpus_per_worker": cpus_per_worker},
    )
    sweep = SweepConfig(
        trials=trials, concurrency=2, noise_share=0, race_share=0, grace_epochs=2, reduction=2,
        free_axes=False, pictures=0, sampler="random",
    )  # fmt: skip
    result = run_sweep(config, space, sweep)
    found = read_standing(result.folder)
    assert found.trials == result.trials, "the file says what the driver knows"
    return found


def wait_until(what, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_two_trials_of_two_workers_run_at_a_time_and_a_pruned_one_gives_its_resources_back(
    tiny_config, space, cpus
):
    config = override(tiny_config, {"run.name": "two", "optim.epochs": EPOCHS})
    found = sweep_of(config, space, cpus / 4, trials=3)
    states = [trial.state for trial in found.trials]
    assert "finished" in states[:2]
    assert states[2] == "pruned", "both that learn were there before it"
    first, second, third = found.studies.search.trials
    assert max(first.datetime_start, second.datetime_start) < min(
        first.datetime_complete, second.datetime_complete
    )
    assert third.datetime_start >= min(first.datetime_complete, second.datetime_complete)
    for trial in [trial for trial in found.trials if trial.state == "finished"]:
        assert [epoch for epoch, _ in trial.curve] == list(range(1, EPOCHS + 1))
        assert (Path(trial.folder) / "features.npz").exists(), "measured for the comparison"
    assert found.trials[2].epochs == 2
    wait_until(lambda: not worker_groups() and ray.available_resources().get("CPU") == cpus)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_trials_that_do_not_fit_side_by_side_run_one_after_the_other(tiny_config, space, cpus):
    config = override(tiny_config, {"run.name": "turns", "optim.epochs": 1})
    found = sweep_of(config, space, 0.375 * cpus, trials=2)
    assert [trial.state for trial in found.trials] == ["finished", "finished"]
    first, second = found.studies.search.trials
    assert second.datetime_start >= first.datetime_complete


@pytest.mark.ray
def test_a_trial_that_the_cluster_can_never_hold_is_refused_before_anything_is_written(
    tiny_config, space, cpus, monkeypatch
):
    at_once = partial(require_room, patience_s=0)
    monkeypatch.setattr("next.training.distributed.cluster.require_room", at_once)
    with pytest.raises(ValueError, match=r"scaling.num_workers needs room for 2 workers of .* CPU"):
        sweep_of(tiny_config, space, cpus, trials=2)
    assert not Path(tiny_config.run.storage_path).exists()


@pytest.mark.ray
def test_what_a_dead_trial_left_reserved_is_given_back_and_said(cpus, caplog):
    @ray.remote(num_cpus=0)
    class Trial:
        def reserve(self) -> bool:
            self.group = placement_group([{"CPU": cpus / 2}] * 2)
            return self.group.wait(10)

    trial = Trial.remote()
    assert ray.get(trial.reserve.remote())
    (group,) = worker_groups()
    assert not group.lost
    caplog.set_level(logging.WARNING, logger="next")
    with reclaiming(every_s=0.1):
        time.sleep(0.5)
        assert len(worker_groups()) == 1, "a living trial keeps what it has"
        ray.kill(trial)
        wait_until(lambda: not worker_groups())
    assert f"died and left 2 x ({cpus / 2:g} CPU) reserved; giving it back" in caplog.text
    wait_until(lambda: ray.available_resources().get("CPU") == cpus)


def test_evaluations_are_read_off_a_journal_once_each_as_a_trial_reports_them(tmp_path):
    told = Evaluations(tmp_path, batch=8)
    tracked = {"uri": None, "experiment": "demo", "name": "trial", "folder": str(tmp_path)}
    with open_run(**tracked) as run:
        for epoch in (1, 2):
            for step in (2 * epoch - 1, 2 * epoch):
                run.log_metrics({"train/loss": float(step)}, step=step)
            run.log_metrics({"train/epoch": epoch}, step=step)
            run.log_metrics({"train/samples_per_second": 16.0}, step=step)
            assert list(told.new()) == []
            run.log_metrics({"val/mAP": 50.0 + epoch}, step=step)
            (evaluation,) = told.new()
            assert evaluation == {
                "epoch": epoch,
                "step": 2 * epoch,
                "val/mAP": 50.0 + epoch,
                "train/loss": 2 * epoch - 0.5,
                "train/seconds_per_step": 0.5,
            }
    again = [evaluation["epoch"] for evaluation in Evaluations(tmp_path, batch=8).new()]
    assert again == [1, 2], "a trial that continues says them all again"


def test_a_trial_fails_with_what_its_worker_raised():
    failures = {1: KeyError("later"), 0: ValueError("heads must divide the width")}
    cause = first_cause(ray.train.WorkerGroupError("two workers", failures))
    assert isinstance(cause, ValueError)
    lost = ray.train.WorkerGroupError("nobody knows why", {})
    assert first_cause(lost) is lost


def test_a_worker_that_died_is_the_cause_of_what_the_others_raised():
    died = RayActorError(error_msg="The actor died because its node has died.")
    failures = {0: RuntimeError("connection reset by peer"), 1: died}
    cause = first_cause(ray.train.WorkerGroupError("two workers", failures))
    assert isinstance(cause, LostProcessError)
    assert cause.machine
