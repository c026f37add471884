"""The checkpoints of a run: what is kept, what is continued from, what a failing disk does."""

import logging
import os
import shutil
import subprocess
import threading

import pytest
import torch

from next.config import RunConfig
from next.training.checkpointing.checkpoint import Progress, Snapshot, read_progress
from next.training.checkpointing.store import BackgroundWriter, CheckpointStore


def snapshot(
    step: int, score: float | None = None, size: int = 10, rank: float | None = None
) -> Snapshot:
    metrics = {} if score is None else {"val/mAP": score, "step": step}
    return Snapshot(
        {"weight": torch.full((size,), float(step))},
        None,
        {"optimizer": {}, "rng": torch.get_rng_state()},
        Progress(0, step, metrics=metrics, step_in_epoch=0 if metrics else step, rank=rank),
        RunConfig(),
    )


def names(store: CheckpointStore) -> list[str]:
    return store.folder.names()


def latest_step(store: CheckpointStore) -> int:
    folder = store.latest()
    assert folder is not None
    return read_progress(folder).step


def test_the_two_newest_and_the_best_are_kept_and_linked(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints")
    for step, score in (
        (1, None),
        (2, 30.0),
        (3, None),
        (4, 60.0),
        (5, 50.0),
        (6, None),
        (7, 60.0),
    ):
        store.save(snapshot(step, score))
    assert names(store) == [
        "best",
        "last",
        "step-00000004-evaluated",
        "step-00000006",
        "step-00000007-evaluated",
    ]
    assert os.readlink(tmp_path / "checkpoints" / "best") == "step-00000004-evaluated", (
        "the first of equals"
    )
    assert store.best().name == "step-00000004-evaluated"
    assert os.readlink(tmp_path / "checkpoints" / "last") == "step-00000007-evaluated"
    assert latest_step(store) == 7


def test_more_of_the_best_are_kept_if_asked_for(tmp_path):
    store = CheckpointStore(tmp_path, num_to_keep=2)
    for step, score in ((1, 10.0), (2, 30.0), (3, 20.0), (4, 5.0), (5, 6.0)):
        store.save(snapshot(step, score))
    assert [name[:13] for name in names(store)[2:]] == [
        f"step-0000000{step}" for step in (2, 3, 4, 5)
    ]


def test_the_best_is_the_one_that_the_selection_ranks_first_whatever_its_map(tmp_path):
    store = CheckpointStore(tmp_path)
    for step, score, rank in ((1, 10.0, -2.0), (2, 90.0, -3.0), (3, 20.0, -4.0), (4, 5.0, -5.0)):
        store.save(snapshot(step, score, rank=rank))
    assert read_progress(store.best()).step == 1
    assert os.readlink(tmp_path / "best") == "step-00000001-evaluated"


@pytest.mark.parametrize("damage", ["cut", "removed", "flipped", "record", "another score"])
def test_a_torn_checkpoint_is_never_taken_for_a_whole_one(tmp_path, damage, caplog):
    store = CheckpointStore(tmp_path)
    for step in (1, 2):
        store.save(snapshot(step, 10.0 * step))
    weights = tmp_path / "step-00000002-evaluated" / "model.safetensors"
    content = weights.read_bytes()
    if damage == "cut":
        weights.write_bytes(content[:-3])
    elif damage == "removed":
        weights.unlink()
    elif damage == "flipped":
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "another score":
        state = weights.with_name("state.json")
        state.write_text(state.read_text().replace('"val/mAP": 20.0', '"val/mAP": 90.0'))
    else:
        (weights.parent / "state.json").write_text('{"format": ')
    assert latest_step(store) == 1
    assert store.best().name == "step-00000001-evaluated"
    assert "torn" in caplog.text
    assert "falling back to the checkpoint before" in caplog.text


def test_a_score_that_was_changed_decides_nothing(tmp_path):
    store = CheckpointStore(tmp_path)
    for step in (1, 2):
        store.save(snapshot(step, 10.0 * step))
    state = tmp_path / "step-00000001-evaluated" / "state.json"
    state.write_text(state.read_text().replace('"val/mAP": 10.0', '"val/mAP": 90.0'))
    store.save(snapshot(3, 30.0))
    assert os.readlink(tmp_path / "best") == "step-00000003-evaluated"


def test_a_checkpoint_that_was_not_written_to_its_end_does_not_count(tmp_path, caplog):
    store = CheckpointStore(tmp_path)
    store.save(snapshot(1))
    shutil.copytree(tmp_path / "step-00000001", tmp_path / "step-00000002")
    (tmp_path / "step-00000002" / "state.json").unlink()
    shutil.copytree(tmp_path / "step-00000001", tmp_path / ".draft-step-00000003-x")
    assert latest_step(store) == 1
    assert caplog.text == ""
    store.save(snapshot(4))
    assert names(store) == ["last", "step-00000001", "step-00000004"]


def test_a_run_whose_checkpoints_are_all_torn_is_not_begun_anew_in_silence(tmp_path):
    store = CheckpointStore(tmp_path)
    store.save(snapshot(1))
    (tmp_path / "step-00000001" / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match=r"(?s)no checkpoint in .* is whole; set run.fresh.*torn"):
        latest_step(store)


def test_nothing_stored_is_nothing_to_continue_from(tmp_path):
    store = CheckpointStore(tmp_path / "none")
    assert store.latest() is None
    with pytest.raises(FileNotFoundError, match=r"has no evaluated checkpoint yet"):
        store.best()


class Gate(CheckpointStore):
    """Writes only when the test lets it; fails while it is told to."""

    def __init__(self, folder):
        super().__init__(folder)
        self.entered, self.opened = threading.Semaphore(0), threading.Semaphore(0)

    def save(self, snapshot):
        self.entered.release()
        assert self.opened.acquire(timeout=30)
        super().save(snapshot)


def test_training_goes_on_while_one_checkpoint_is_written_and_waits_for_it_at_the_next(tmp_path):
    store = Gate(tmp_path)
    writer = BackgroundWriter(store)
    writer.submit(lambda: snapshot(1))  # returns although nothing can be written
    assert store.entered.acquire(timeout=30)
    taken = threading.Event()

    def second() -> Snapshot:
        taken.set()
        return snapshot(2)

    training = threading.Thread(target=writer.submit, args=(second,))
    training.start()
    assert not taken.wait(0.2), (
        "one at a time, and the copy is of the moment when it can be written"
    )
    store.opened.release()
    assert taken.wait(30)
    store.opened.release()
    training.join(30)
    writer.close()
    assert latest_step(store) == 2


def test_what_changes_after_the_snapshot_is_not_in_the_checkpoint(tmp_path):
    from next.config import override
    from next.model.network import NEXT
    from next.training.checkpointing.checkpoint import load_weights, take_snapshot
    from next.training.step.optimizer import build_optimizer
    from tests.training.checkpointing.test_checkpoint import SETTINGS

    config = override(RunConfig(), SETTINGS)
    network = NEXT(config.model)
    store = Gate(tmp_path)
    writer = BackgroundWriter(store)
    expected = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    optimizer = build_optimizer(network, config.optim)
    writer.submit(lambda: take_snapshot(network, optimizer, Progress(0, 1), config))
    for parameter in network.parameters():
        parameter.data.zero_()
    store.opened.release()
    writer.close()
    load_weights(tmp_path / "step-00000001", network)
    found = network.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of one mebibyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)],
        check=False,
        capture_output=True,
    )
    if mounted.returncode:
        pytest.skip("no right to mount a file system here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_told_and_the_checkpoint_is_written_when_there_is_room(small_disk, caplog):
    caplog.set_level(logging.WARNING)
    store = CheckpointStore(small_disk / "checkpoints")
    store.save(snapshot(1, 10.0))
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"0" * (900 << 10))
    writer = BackgroundWriter(store, patience_s=60)
    writer.submit(lambda: snapshot(2, 20.0, size=60_000))
    for _ in range(300):
        if "cannot be written" in caplog.text:
            break
        threading.Event().wait(0.1)
    assert "the checkpoint of step 2 cannot be written" in caplog.text
    assert latest_step(store) == 1
    assert not list((small_disk / "checkpoints").glob("*.partial")), (
        "nothing is left of the attempt"
    )
    ballast.unlink()
    writer.close()
    assert latest_step(store) == 2


def test_a_disk_that_stays_full_ends_the_run_with_what_to_do(small_disk):
    store = CheckpointStore(small_disk / "checkpoints")
    store.save(snapshot(1, 10.0))
    writer = BackgroundWriter(store, patience_s=0.1)
    writer.submit(lambda: snapshot(2, 20.0, size=600_000))
    with pytest.raises(OSError, match=r"step 2 could not be written for 0 s .*No space left.*same"):
        writer.wait()
    assert latest_step(store) == 1
    writer.close(OSError())


def test_an_object_store_keeps_checkpoints_alike(s3):
    """Uploaded with the record last, read whole, the torn passed over, the old removed."""
    store = CheckpointStore(f"{s3}/runs/one")
    assert store.latest() is None
    for step, score in ((1, 10.0), (2, 30.0), (3, 20.0), (4, None)):
        store.save(snapshot(step, score))
    assert names(store) == [
        "step-00000002-evaluated",
        "step-00000003-evaluated",
        "step-00000004",
    ]
    again = CheckpointStore(store.uri)
    assert latest_step(again) == 4
    assert read_progress(again.best()).step == 2
    assert (again.best() / "model.safetensors").is_file()
    # An upload that was cut off has no record; one that was spoilt differs from its record.
    again.folder.write("step-00000005/model.safetensors", b"half")
    assert latest_step(CheckpointStore(store.uri)) == 4
    again.folder.write("step-00000004/model.safetensors", b"spoilt")
    assert latest_step(CheckpointStore(store.uri)) == 3
    again.set_aside("old")
    assert CheckpointStore(store.uri).latest() is None
    assert latest_step(CheckpointStore(f"{s3}/runs/one.old")) == 3
