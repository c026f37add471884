"""What runs next: asked as Tune asks, with real studies and no cluster."""

import pickle
from functools import partial
from types import SimpleNamespace

import pytest
from optuna.trial import TrialState
from ray.core.generated.common_pb2 import ActorDiedErrorContext, NodeDeathInfo
from ray.exceptions import ActorDiedError, ActorUnavailableError, NodeDiedError, RayTaskError
from ray.tune.search import Searcher

from next.config import RunConfig, override
from next.training.distributed.nodes import Autoscaler, NodeType
from next.tuning.execution.deaths import (
    LostProcessError,
    error_of,
    how_it_died,
    is_lost_machine,
    unfit_node,
)
from next.tuning.execution.slots import Slots, gpu_share
from next.tuning.results import group, read_trials
from next.tuning.search.searcher import Pruning, Search
from next.tuning.search.space import Space
from next.tuning.search.study import create_studies, open_studies, set_waiting
from next.tuning.search.trial_record import DEFAULT, Repeat
from next.tuning.settings import SweepConfig

BASE = override(RunConfig(), {"optim.epochs": 4, "optim.warmup_epochs": 1})
CPUS = {"node-0": {"CPU": 8.0}}


def suggest(trial):
    return {"optim.lr": trial.suggest_float("optim.lr", 1e-4, 1e-2, log=True)}


def make_space(tmp_path, **objectives):
    return Space("mine", suggest, tmp_path / "mine.py", objectives or {"val/mAP": "max"})


def nodes(*have: dict[str, float]) -> dict[str, dict[str, float]]:
    """What each node has, by its id."""
    return {f"node-{number}": one for number, one in enumerate(have)}


def make_search(tmp_path, sweep, *, choose=lambda: None, space=None, new=True, base=BASE):
    space = space or make_space(tmp_path)
    path = tmp_path / "study.db"
    studies = (
        create_studies(path, "mine", space.objectives, sweep)
        if new
        else open_studies(path, "mine", sweep)
    )
    return Search(studies, space, sweep, base, Slots(base, sweep, CPUS), choose)


def run_to_end(search, trial_id, score=50.0, epochs=4):
    for epoch in range(1, epochs + 1):
        if search.report(trial_id, {"epoch": epoch, "val/mAP": score + epoch}):
            break
    search.on_trial_complete(trial_id)


SIX = SweepConfig(trials=6, grace_epochs=1, reduction=2)


def test_a_seed_takes_the_next_fold_and_the_search_stays_on_its_own(tmp_path):
    races = iter([Repeat("trial-0000", {"optim.lr": 1e-3}, seed) for seed in (8, 9, 10)])
    folds = {"seed": 7, "selection.folds": 3, "selection.fold": 1}
    sweep = SweepConfig(trials=8, noise_share=0.375, race_share=0.375)
    search = make_search(tmp_path, sweep, choose=lambda: next(races), base=override(BASE, folds))
    taken = {}
    for count in range(8):
        task = search.suggest(str(count))
        taken[task["name"]] = task["settings"].get("selection.fold", 1)
        run_to_end(search, str(count), score=50 + count)
    assert taken == {
        "default-seed7": 1,
        "default-seed8": 2,
        "default-seed9": 0,
        "trial-0000": 1,
        "trial-0001": 1,
        "trial-0000-seed8": 2,
        "trial-0000-seed9": 0,
        "trial-0000-seed10": 1,
    }
    trials = read_trials(search.studies, tmp_path, {"val/mAP": "max"}, 7)
    assert {trial.name: (trial.fold + 1) % 3 for trial in trials} == taken
    assert all("selection.fold" not in trial.settings for trial in trials), "no setting of its own"


def test_the_order_is_noise_then_search_then_race(tmp_path):
    races = iter([Repeat("trial-0000", {"optim.lr": 1e-3}, 1), None])
    search = make_search(tmp_path, SIX, choose=lambda: next(races))
    names = []
    for count in range(10):
        task = search.suggest(str(count))
        if task == Searcher.FINISHED:
            break
        names.append(task["name"])
        run_to_end(search, str(count))
    assert names == [
        "default-seed0",
        "default-seed1",
        "trial-0000",
        "trial-0001",
        "trial-0000-seed1",
    ]


def test_a_killed_driver_leaves_nothing_doubled_and_nothing_lost(tmp_path):
    sweep = SweepConfig(trials=6, noise_share=0, race_share=0, pruner="none")
    search = make_search(tmp_path, sweep)
    first, second = search.suggest("a"), search.suggest("b")
    run_to_end(search, "a", score=10.0)
    search.report("b", {"epoch": 2, "val/mAP": 20.0})
    again = make_search(tmp_path, SweepConfig(**{**sweep.model_dump(), "trials": 4}), new=False)
    tasks = []
    for count in range(10):
        task = again.suggest(str(count))
        if task == Searcher.FINISHED:
            break
        tasks.append(task)
        run_to_end(again, str(count))
    assert tasks[0]["name"] == second["name"] == "trial-0001"
    assert tasks[0]["settings"] == second["settings"]
    assert [task["name"] for task in tasks[1:]] == ["trial-0002", "trial-0003"]
    rates = {first["settings"]["optim.lr"], *(task["settings"]["optim.lr"] for task in tasks)}
    assert len(rates) == 4
    frozen = again.studies.search.trials
    assert [trial.state for trial in frozen] == [TrialState.COMPLETE] * 4
    assert frozen[1].user_attrs["curve"][0] == [2, [20.0]], "what was reported before is kept"


def test_what_a_stopped_driver_leaves_waits_in_the_study_and_goes_on_with_the_next_one(tmp_path):
    sweep = SweepConfig(trials=3, noise_share=0.34, race_share=0)
    first = make_search(tmp_path, sweep)
    assert not first.finished
    begun = [first.suggest("a"), first.suggest("b")]
    assert {task["name"] for task in begun} == {"default-seed0", "trial-0000"}
    first.note_time()
    for study in first.studies:
        set_waiting(study)
    states = [trial.state.name for study in first.studies for trial in study.trials]
    assert states == ["WAITING", "WAITING"]

    second = make_search(tmp_path, sweep, new=False)
    states = [trial.state.name for study in second.studies for trial in study.trials]
    assert states == ["RUNNING", "RUNNING"]
    assert [second.suggest("a"), second.suggest("b")] == begun
    for trial_id in ("a", "b"):
        run_to_end(second, trial_id)
    assert second.suggest("c")["name"] == "trial-0001", "none is drawn twice"
    run_to_end(second, "c")
    assert not second.finished
    assert second.suggest("d") == "FINISHED"
    assert second.finished


def test_failures_pruning_and_divergence_are_told_as_what_they_are(tmp_path):
    sweep = SweepConfig(trials=10, noise_share=0, race_share=0, grace_epochs=1, reduction=2)
    search = make_search(tmp_path, sweep)
    search.suggest("good")
    run_to_end(search, "good", score=80.0)
    search.suggest("poor")
    assert search.report("poor", {"epoch": 1, "val/mAP": 10.0}), "behind at the first rung"
    search.on_trial_complete("poor")
    search.suggest("nan")
    assert search.report("nan", {"epoch": 1, "val/mAP": float("nan")})
    search.on_trial_complete("nan")
    search.suggest("raised")
    assert search.report("raised", {"failed": "raised ValueError: heads"})
    search.on_trial_complete("raised")
    search.suggest("dumb")
    assert search.report("dumb", {"epoch": 1, "val/rank1": 3.0})
    search.on_trial_complete("dumb")
    search.suggest("silent")
    search.on_trial_complete("silent")
    for again in range(search.sweep.retries + 1):
        search.suggest(f"dead{again}")
        search.fail(f"dead{again}", "killed: its process ended")
        search.on_trial_complete(f"dead{again}", error=True)
    frozen = search.studies.search.trials
    assert [trial.state.name for trial in frozen] == ["COMPLETE", "PRUNED", *["FAIL"] * 5]
    errors = [trial.user_attrs.get("error", "") for trial in frozen]
    assert errors[2].startswith("diverged: ")
    assert errors[3] == "raised ValueError: heads"
    assert errors[4] == "metric: the trial did not report val/mAP; it reported val/rank1"
    assert errors[5] == "metric: the trial reported nothing"
    assert errors[6] == "killed: its process ended"


def test_a_trial_at_its_last_epoch_is_finished_however_poor_and_not_pruned(tmp_path):
    sweep = SweepConfig(trials=4, noise_share=0, race_share=0, grace_epochs=1, reduction=2)
    search = make_search(tmp_path, sweep)
    for name, scores in {"good": (60, 70, 75, 80), "late": (61, 71, 76, 5)}.items():
        search.suggest(name)
        for epoch, score in enumerate(scores, 1):
            assert not search.report(name, {"epoch": epoch, "val/mAP": float(score)})
        search.on_trial_complete(name)
    assert [trial.state.name for trial in search.studies.search.trials] == ["COMPLETE"] * 2
    assert [trial.value for trial in search.studies.search.trials] == [80.0, 76.0]


def test_a_run_that_came_back_from_the_dead_is_not_failed_and_repeats_no_epoch(tmp_path):
    search = make_search(tmp_path, SweepConfig(trials=1, noise_share=0, race_share=0))
    begun = search.suggest("a")
    search.report("a", {"epoch": 2, "val/mAP": 20.0})
    search.fail("a", "killed: its process ended")
    search.on_trial_complete("a", error=True)
    assert not search.ended
    assert search.suggest("b") == begun, "it goes on before anything else is drawn"
    assert not search.report("b", {"epoch": 2, "val/mAP": 20.0})
    assert not search.report("b", {"epoch": 4, "val/mAP": 40.0})
    search.on_trial_complete("b")
    (trial,) = search.studies.search.trials
    assert trial.state == TrialState.COMPLETE
    assert trial.value == 40.0
    assert trial.user_attrs["curve"] == [[2, [20.0]], [4, [40.0]]]
    assert trial.user_attrs["deaths"] == 1
    assert search.suggest("c") == Searcher.FINISHED


def test_a_run_whose_machines_are_lost_goes_on_elsewhere_however_few_retries_there_are(tmp_path):
    sweep = SweepConfig(trials=1, noise_share=0, race_share=0, retries=0)
    search = make_search(tmp_path, sweep)
    for lost in range(10):
        assert search.suggest(f"{lost}")["name"] == "trial-0000"
        search.fail(f"{lost}", "killed: its machine was lost", machine_lost=True)
        search.on_trial_complete(f"{lost}", error=True)
    assert search.suggest("last")["name"] == "trial-0000"
    search.fail("last", "killed: its machine 10.0.0.3 was lost", machine_lost=True)
    search.on_trial_complete("last", error=True)
    (trial,) = search.studies.search.trials
    assert trial.state == TrialState.FAIL, "eleven machines in a row: it is taken for the cause"
    assert trial.user_attrs["error"] == "killed: its machine 10.0.0.3 was lost"
    assert "deaths" not in trial.user_attrs


def test_the_target_ends_the_search_and_leaves_the_race(tmp_path):
    sweep = SweepConfig(trials=20, target=60.0, noise_share=0)
    search = make_search(tmp_path, sweep, choose=lambda: Repeat(DEFAULT, {}, 7))
    search.suggest("a")
    run_to_end(search, "a", score=70.0)
    assert search.over() == "the target of 60"
    assert search.suggest("b")["name"] == "default-seed7"


def test_a_search_for_the_least_keeps_and_reaches_it(tmp_path):
    space = make_space(tmp_path, **{"train/loss": "min"})
    sweep = SweepConfig(trials=8, target=0.5, noise_share=0, race_share=0, pruner="none")
    search = make_search(tmp_path, sweep, space=space)
    losses = {"a": (3.0, 1.0, 2.0), "b": (2.5, 4.0, 4.5), "c": (1.5, 0.4, 0.6)}
    for name, curve in losses.items():
        assert search.over() is None, "0.5 is not reached yet"
        search.suggest(name)
        for epoch, loss in enumerate(curve, 1):
            search.report(name, {"epoch": epoch, "train/loss": loss})
        search.on_trial_complete(name)
    assert search.over() == "the target of 0.5"
    again = make_search(tmp_path, sweep, space=space, new=False)
    assert again.over() == "the target of 0.5", "read from the study, too"
    assert [trial.value for trial in again.studies.search.trials] == [1.0, 2.5, 0.4]
    assert again.studies.search.best_trial.number == 2
    trials = read_trials(again.studies, tmp_path, space.objectives, 0)
    assert [trial.score for trial in trials] == [1.0, 2.5, 0.4]
    assert [trial.rank for trial in trials] == [-1.0, -2.5, -0.4], "larger is better"
    assert [one.name for one in group(trials, space.objectives, {})] == [
        "trial-0002", "trial-0000", "trial-0001",
    ]  # fmt: skip


def test_no_trial_begins_when_the_hours_are_spent_earlier_sessions_included(tmp_path):
    sweep = SweepConfig(trials=20, hours=1.0)
    search = make_search(tmp_path, sweep)
    search.studies.search.set_user_attr("spent_seconds", 3590.0)
    again = make_search(tmp_path, sweep, new=False)
    assert again.over() == "1 hours"
    assert again.suggest("a")["name"] == "default-seed0", "the race's share is left"
    run_to_end(again, "a")
    again.studies.search.set_user_attr("spent_seconds", 3601.0)
    over = make_search(tmp_path, sweep, new=False)
    assert over.suggest("a") == Searcher.FINISHED


def test_two_objectives_are_told_together_and_never_pruned(tmp_path):
    space = make_space(tmp_path, **{"val/mAP": "max", "train/seconds_per_step": "min"})
    sweep = SweepConfig(trials=2, noise_share=0, race_share=0, grace_epochs=1, reduction=2)
    search = make_search(tmp_path, sweep, space=space)
    for name, score in (("a", 50.0), ("b", 1.0)):
        search.suggest(name)
        for epoch in (1, 2, 3, 4):
            result = {"epoch": epoch, "val/mAP": score - epoch, "train/seconds_per_step": 0.5}
            assert not search.report(name, result)
        search.on_trial_complete(name)
    assert [trial.values for trial in search.studies.search.trials] == [[49.0, 0.5], [0.0, 0.5]]
    assert [trial.number for trial in search.studies.search.best_trials] == [0]


def test_no_more_trials_run_at_a_time_than_the_nodes_hold():
    sweep = SweepConfig(trials=8, concurrency=6)
    two = override(BASE, {"scaling.cpus_per_worker": 2.0})
    assert Slots(two, sweep, nodes({"CPU": 8.0})).concurrency == 4
    assert Slots(two, sweep, nodes({"CPU": 3.0}, {"CPU": 3.0})).concurrency == 2, "none spans nodes"
    assert Slots(two, sweep, nodes({}, {"CPU": 64.0})).concurrency == 6
    gpu = override(BASE, {"scaling.use_gpu": True})
    half = SweepConfig(trials=8, concurrency=6, gpus_per_trial=0.5)
    assert Slots(gpu, half, nodes({"CPU": 64.0, "GPU": 2.0})).concurrency == 4


def test_slots_follow_the_nodes_and_no_trial_is_drawn_for_one_that_is_still_to_come(tmp_path):
    sweep = SweepConfig(trials=8, concurrency=4, noise_share=0, race_share=0, pruner="none")
    space = make_space(tmp_path)
    studies = create_studies(tmp_path / "study.db", "mine", space.objectives, sweep)
    slots = Slots(BASE, sweep, nodes({"CPU": 0.0}), most=lambda takes: 3.0)
    search = Search(studies, space, sweep, BASE, slots, lambda: None)
    assert search.suggest("a") is not None, "the first one says that a machine is wanted"
    assert search.suggest("b") is None
    assert slots.missing(search.wanted()) == 2, "the cluster never holds more than three"
    assert slots.text(search.wanted()) == "0 of 4 places (3 at most), waiting for machines"
    slots.count(nodes({"CPU": 0.0}, {"CPU": 1.0}, {"CPU": 1.0}))
    assert search.suggest("b") is not None
    assert search.suggest("c") is None
    assert slots.missing(search.wanted()) == 1
    slots.count(nodes(*[{"CPU": 1.0}] * 3))
    assert slots.text(search.wanted()) == "3 of 4 places, which is all that the cluster can hold"
    slots.waiting_s = 11.0
    assert search.suggest("c") is None, "b is drawn and others hold its place"
    slots.waiting_s = 0.0
    assert search.suggest("c") is not None
    slots.count(nodes({"CPU": 1.0}))
    run_to_end(search, "a")
    assert search.suggest("d") is None, "two go on for which one place is left"
    for name in ("b", "c"):
        run_to_end(search, name)
    assert search.suggest("d") is not None
    assert len(studies.search.trials) == 4
    alone = Slots(BASE, sweep, nodes({"CPU": 2.0}))
    assert (alone.missing(4), alone.text(4)) == (0, "2 of 4 places"), "nothing comes to one machine"
    assert alone.text(2) is None


def test_a_trial_that_waits_is_drawn_anew_once_a_node_that_it_is_kept_off_can_be_used(tmp_path):
    search = make_search(
        tmp_path, SweepConfig(trials=3, concurrency=2, noise_share=0, race_share=0)
    )
    slots = search.slots
    slots.count(nodes({"CPU": 1.0}, {"CPU": 1.0}))
    slots.refuse("f00d", "another torch")
    slots.count(nodes({"CPU": 1.0}))
    task = search.suggest("a")
    assert task["avoid"] == ["f00d"]
    slots.count(nodes({"CPU": 0.0}))  # the other one is lost before the trial is placed
    assert search.suggest("b") is None
    stopped = []

    class Controller:
        def get_live_trials(self):
            return [SimpleNamespace(trial_id="a", status="PENDING", config=task)]

        def stop_trial(self, trial):
            stopped.append(trial.trial_id)
            search.on_trial_complete(trial.trial_id)

    pruning = Pruning(search)
    assert pruning.choose_trial_to_run(Controller()).trial_id == "a"
    slots.refused.clear()  # the node is mended
    slots.count(nodes({"CPU": 1.0}))
    assert pruning.choose_trial_to_run(Controller()) is None
    assert stopped == ["a"]
    assert search.suggest("c") == task | {"avoid": []}
    assert search.done == 0


def test_nothing_is_drawn_while_no_node_can_be_used(tmp_path):
    search = make_search(
        tmp_path, SweepConfig(trials=3, concurrency=2, noise_share=0, race_share=0)
    )
    search.slots.count(nodes({"CPU": 0.0}))
    search.slots.refuse("f00d", "another torch")
    assert search.suggest("a") is None, "it would be kept off the only node"
    search.slots.refused.clear()
    assert search.suggest("a") is not None, "a machine is to come"


def test_a_machine_is_asked_for_in_place_of_the_only_one_which_cannot_be_used(tmp_path):
    sweep = SweepConfig(trials=3, concurrency=1, noise_share=0, race_share=0, pruner="none")
    space = make_space(tmp_path)
    studies = create_studies(tmp_path / "study.db", "mine", space.objectives, sweep)
    slots = Slots(BASE, sweep, nodes({"CPU": 1.0}), most=lambda takes: 4.0)
    search = Search(studies, space, sweep, BASE, slots, lambda: None)
    assert slots.missing(search.wanted()) == 0
    slots.refuse("node-0", "its disk is full")
    slots.count({})
    assert search.suggest("a") is None
    assert slots.missing(search.wanted()) == 1
    assert slots.text(search.wanted()) == (
        "0 of 1 places, waiting for machines (1 machine left out)"
    )
    slots.count(nodes({}, {"CPU": 1.0}))
    assert slots.missing(search.wanted()) == 0
    assert search.suggest("a") is not None


def test_machines_are_asked_for_by_what_a_trial_takes_of_a_gpu():
    """Four machines with a GPU each, of which one lives; four trials share a GPU."""
    sweep = SweepConfig(trials=20, concurrency=8, noise_share=0, race_share=0)
    machine, most = {"CPU": 4.0, "GPU": 1.0}, Autoscaler([NodeType({"CPU": 4.0, "GPU": 1.0}, 4)], 4)
    base = override(BASE, {"scaling.use_gpu": True})
    slots = Slots(base, sweep, nodes(machine), most=partial(most.holds, head={}))
    assert slots.text(8) == "1 of 8 places (4 at most), waiting for machines"
    assert slots.missing(8) == 3
    slots.learn({"gpu_peak_mib": 16_000.0, "gpu_mib": 80_000.0})
    assert slots.gpus == 0.25
    assert slots.text(8) == "4 of 8 places, waiting for machines"
    assert slots.missing(8) == 4
    slots.count(nodes(machine, machine))
    assert (slots.missing(8), slots.text(8)) == (0, None)
    many = Slots(base, SweepConfig(concurrency=20), nodes(*[machine] * 4), most=slots._most)
    many.learned = 0.25
    assert many.text(20) == "16 of 20 places, which is all that the cluster can hold"


def test_a_sweep_wants_no_machine_for_trials_that_it_has_not(tmp_path):
    sweep = SweepConfig(trials=3, concurrency=8, noise_share=0, race_share=0)
    search = make_search(tmp_path, sweep)
    assert search.wanted() == 3
    for name in ("a", "b"):
        search.suggest(name)
        run_to_end(search, name)
    assert search.wanted() == 1


@pytest.mark.parametrize(
    ("workers", "have", "concurrency"),
    [(2, [8.0], 4), (3, [8.0], 2), (2, [3.0, 3.0], 3), (8, [8.0], 1), ((2, 4), [6.0], 1)],
)
def test_trials_of_several_workers_begin_only_where_all_of_them_fit(workers, have, concurrency):
    base = override(BASE, {"scaling.num_workers": workers, "batch.identities": 24})
    slots = Slots(base, SweepConfig(concurrency=9), nodes(*[{"CPU": c} for c in have]), "node:here")
    assert slots.concurrency == concurrency
    assert slots.resources({"gpus": 0.0, "avoid": []}).bundles == [{"node:here": 0.001}], (
        "all in the workers"
    )


def test_the_first_trials_peak_memory_says_how_many_share_a_gpu():
    base = override(BASE, {"scaling.use_gpu": True})
    slots = Slots(base, SweepConfig(trials=8, concurrency=4), nodes({"CPU": 8.0, "GPU": 1.0}))
    assert slots.ready(0)
    assert not slots.ready(1), "the first one is alone"
    assert slots.gpus == 1.0
    slots.learn({"gpu_peak_mib": 20_000.0, "gpu_mib": 80_000.0})
    assert slots.gpus == pytest.approx(0.333)
    assert slots.ready(2)
    assert slots.resources({"gpus": slots.gpus, "avoid": []}).bundles == [
        {"CPU": 1.0, "GPU": 0.333}
    ]


def test_trials_share_a_gpu_once_the_first_one_has_said_what_it_takes(tmp_path):
    base = override(BASE, {"scaling.use_gpu": True})
    sweep = SweepConfig(trials=4, concurrency=3, noise_share=0, race_share=0, pruner="none")
    space = make_space(tmp_path)
    studies = create_studies(tmp_path / "study.db", "mine", space.objectives, sweep)
    slots = Slots(base, sweep, nodes({"CPU": 8.0, "GPU": 1.0}))
    search = Search(studies, space, sweep, base, slots, lambda: None)
    assert search.suggest("a")["gpus"] == 1.0
    assert search.suggest("b") is None, "it waits until the first one has reported"
    measured = {"epoch": 1, "val/mAP": 50.0, "gpu_peak_mib": 20_000.0, "gpu_mib": 80_000.0}
    search.report("a", measured)
    second, third = search.suggest("b"), search.suggest("c")
    assert second["gpus"] == third["gpus"] == pytest.approx(0.333), "three with a quarter of room"
    assert slots.resources(second).bundles == [{"CPU": 1.0, "GPU": 0.333}]
    search.report("b", measured | {"gpu_peak_mib": 70_000.0})
    run_to_end(search, "a")
    assert search.suggest("d")["gpus"] == second["gpus"], "the first one's peak is the guide"


@pytest.mark.parametrize(
    ("peak", "size", "concurrency", "share"),
    [(10, 80, 2, 0.5), (10, 80, 16, 0.166), (79, 80, 4, 1.0), (300, 80, 4, 1.0)],
)
def test_shares_of_a_gpu_leave_room_above_the_peak(peak, size, concurrency, share):
    assert gpu_share(peak, size, concurrency) == pytest.approx(share)


def test_a_death_says_whether_it_was_memory():
    text = "ray.exceptions.OutOfMemoryError: Task was killed due to the node running low on memory"
    assert how_it_died(text).startswith("out of memory: ray.exceptions.OutOfMemoryError")
    assert how_it_died("The actor died: RayActorError").startswith("killed: ")
    assert how_it_died(None) == "killed: its process ended"


def test_what_ended_a_trial_is_read_where_tune_has_just_written_it(tmp_path):
    trial = SimpleNamespace(
        pickled_error_file=str(tmp_path / "error.pkl"), error_file=str(tmp_path / "error.txt")
    )
    assert error_of(trial) is None
    (tmp_path / "error.pkl").write_bytes(b"half an error")
    (tmp_path / "error.txt").write_text(
        "Failure # 1\nThe actor died unexpectedly before finishing this task.\n\tip: 10.0.0.3\n"
        "The actor died because its node has died. Node Id: 5c205c\n"
    )
    assert is_lost_machine(error_of(trial))
    assert how_it_died(error_of(trial)) == "killed: its machine 10.0.0.3 was lost"
    told = RayTaskError("train", "a traceback", LostProcessError("no way", True, "f00d"))
    (tmp_path / "error.pkl").write_bytes(pickle.dumps(told))
    assert (how_it_died(error_of(trial)), unfit_node(error_of(trial))) == ("no way", "f00d")
    bare = SimpleNamespace(pickled_error_file=None, error_file=None)
    assert error_of(bare) is None


def test_a_lost_machine_is_told_from_a_process_that_died():
    context = ActorDiedErrorContext(
        actor_id=bytes(16),
        node_ip_address="10.0.0.3",
        error_message="The actor died because its node has died. Node Id: 5c205c",
    )
    lost = ActorDiedError(context)
    assert is_lost_machine(lost)
    assert how_it_died(lost) == "killed: its machine 10.0.0.3 was lost"
    # By the trial, of one of its workers, through Ray's pickling.
    told = RayTaskError("train", "a traceback", LostProcessError.of(lost))
    told = pickle.loads(pickle.dumps(told))
    assert is_lost_machine(told)
    assert how_it_died(told) == "killed: its machine 10.0.0.3 was lost"
    assert is_lost_machine(NodeDiedError("gone"))
    assert is_lost_machine(ActorUnavailableError("no answer", None)), "its machine is cut off"
    assert LostProcessError.of(ValueError("its node has died")) is None
    context.error_message = "The actor is dead because its worker process has died."
    died = ActorDiedError(context)
    assert not is_lost_machine(died)
    assert how_it_died(died).startswith("killed: ")
    context.node_death_info.reason = NodeDeathInfo.AUTOSCALER_DRAIN_PREEMPTED
    assert is_lost_machine(ActorDiedError(context)), "a spot machine that was taken away"
    assert not is_lost_machine(None)
    assert not is_lost_machine("RayActorError: its node has died")
