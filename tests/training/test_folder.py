"""Runs that an older version began, and the record of a run."""

import json
import os
import shutil
import signal
import sys
import threading
import time
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

from next.config import LEGACY, RunConfig, flatten, from_toml, override, predated, to_toml
from next.data.shards.reader import open_manifest
from next.model.network import NEXT
from next.stopping import LostRayError, Stopped
from next.tracking.run import read_metrics, read_status
from next.training.checkpointing.interruption import Interrupted
from next.training.folder import (
    as_begun,
    changes,
    check_claim,
    claim_folder,
    data_of,
    going_on,
    holding,
)
from next.training.inputs import resolve
from next.training.launch import launch
from tests.conftest import TINY

OLDER = {"model.semantic.text_skip": False}


def age(record: Path) -> None:
    """Rewrite a record as a version wrote it that knew none of LEGACY's settings."""
    record.write_text(to_toml(from_toml(record.read_text()), without=LEGACY))
    state = record.with_name("state.json")
    if state.is_file():
        told = json.loads(state.read_text())
        del told["files"]["config.toml"], told["sha256"]  # hashes of that and of this file
        state.write_text(json.dumps(told))


@pytest.mark.slow
def test_a_run_of_an_older_version_goes_on_bit_for_bit_by_the_same_command(tiny_config, caplog):
    caplog.set_level("INFO")
    begun = launch(override(tiny_config, LEGACY))
    for record in begun.folder.rglob("config.toml"):
        if not record.parent.is_symlink():
            age(record)
    last = (begun.folder / "checkpoints" / "last").resolve()
    (last / "state.json").unlink()
    earlier = min(path for path in last.parent.glob("step-*") if path != last)
    step = json.loads((earlier / "state.json").read_text())["progress"]["step"]

    resumed = launch(tiny_config)
    [told] = {line for line in caplog.text.splitlines() if "going on as that did: " in line}
    assert "model.semantic.text_skip = False" in told
    assert resumed.outcome.losses == begun.outcome.losses[step:] != []
    stored = json.loads((resumed.folder / "result.json").read_text())
    assert stored["losses"] == begun.outcome.losses, "those of both sessions, each step once"
    assert resumed.assessment.metrics == begun.assessment.metrics
    assert from_toml((last / "config.toml").read_text()).model.semantic.text_skip is False

    # Checkpoints may outlive the run's folder; now the run is finished, and assessed again.
    age(last / "config.toml")
    apart = tiny_config.run.storage_path + "-checkpoints"
    shutil.move(last.parent, f"{apart}/tiny")
    shutil.rmtree(begun.folder)
    again = launch(override(tiny_config, {"checkpoint.storage_path": apart}))
    assert again.outcome.losses == []
    assert again.assessment.metrics == begun.assessment.metrics


def test_the_record_of_an_older_run_stays_as_it_is_so_that_its_command_works_again(tiny_config):
    manifest = open_manifest(tiny_config.data.uri)
    before = resolve(override(tiny_config, LEGACY), manifest)
    record = claim_folder(before) / "config.toml"
    age(record)
    for _ in range(2):
        older = resolve(as_begun(tiny_config, record), manifest)
        assert older == before
        claim_folder(older)
        assert predated(record.read_text()) == LEGACY


def test_what_is_set_on_purpose_is_refused_against_a_record_that_has_another(tiny_config):
    config = resolve(tiny_config, open_manifest(tiny_config.data.uri))
    record = claim_folder(override(config, OLDER)) / "config.toml"
    assert as_begun(config, record) == config, "the record knows the setting"
    with pytest.raises(ValueError, match=r"(?s)other settings.*text_skip: False -> True"):
        claim_folder(as_begun(config, record))


def test_without_a_record_nothing_changes(tiny_config, tmp_path):
    assert as_begun(tiny_config, tmp_path / "config.toml") is tiny_config
    assert changes(tiny_config, tiny_config) == ""
    assert dict(flatten(tiny_config))["model.semantic.text_skip"] is True


def test_a_dry_run_of_a_run_of_an_older_version_plans_the_run_as_it_goes_on(
    tiny_config, tmp_path, capsys
):
    """Its network has no scale of text scores, which the same command gives a new run."""
    manifest = open_manifest(tiny_config.data.uri)
    record = claim_folder(override(resolve(tiny_config, manifest), LEGACY)) / "config.toml"
    age(record)
    before = record.read_text()
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(to_toml(tiny_config, without=["run.name"]))
    given = ["--data", str(manifest.uri), "--recipe", str(recipe), "--dry-run", "--json"]
    planned = []
    for name in (record.parent.name, "another"):
        train_job().main([*given, "--run.name", name])
        planned.append(json.loads(capsys.readouterr().out)["parameters"])
    networks = [
        NEXT(resolve(config, manifest).model)
        for config in (override(tiny_config, LEGACY), tiny_config)
    ]
    assert planned == [sum(one.numel() for one in net.parameters()) for net in networks]
    assert planned[0] < planned[1]
    assert record.read_text() == before, "nothing was written"


def train_job() -> ModuleType:
    """``jobs/train.py``, in this process."""
    path = Path(__file__).resolve().parents[2] / "jobs" / "train.py"
    spec = spec_from_file_location("train_job", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("name", "epochs", "steps", "ended"),
    [("first", 3, 11, "FINISHED"), ("stopped", 200, 63, "KILLED")],
)
def test_a_run_that_commit_a36958b_began_goes_on_by_its_command_and_with_its_data(
    demo_shards, older_runs, name, epochs, steps, ended
):
    manifest = open_manifest(demo_shards)
    command = {"run.name": name, "run.storage_path": str(older_runs), "optim.epochs": epochs}
    recipe = manifest.benchmark.recipe | TINY | {"data.uri": str(demo_shards)}
    config = override(RunConfig(), recipe | command)
    record = older_runs / name / "config.toml"
    older = resolve(as_begun(config, record), manifest)
    assert older.model.semantic.text_skip is False
    assert data_of(record.parent) == manifest.digest
    losses = [row["step"] for row in read_metrics(record.parent) if "train/loss" in row["values"]]
    assert losses == list(range(1, steps + 1))
    assert read_status(record.parent) == ended
    check_claim(older, digest=manifest.digest).take()
    assert from_toml(record.read_text()) == older
    with pytest.raises(ValueError, match=rf"(?s)run '{name}'.*optim.lr: 0.001 -> 0.002"):
        check_claim(override(older, {"optim.lr": 2e-3}), digest=manifest.digest)
    with pytest.raises(ValueError, match=rf"run '{name}' .* was started with data of digest 9e06"):
        check_claim(older, digest="a" * 64)


def test_the_warm_up_that_an_older_version_had_by_default_goes_on_where_no_flag_gives_one(
    demo_shards, older_runs
):
    """Commit a36958b wrote 10 epochs down; now they are derived from ``optim.epochs``."""
    manifest = open_manifest(demo_shards)
    record = older_runs / "first" / "config.toml"
    text = record.read_text().replace("warmup_epochs = 0.5", "warmup_epochs = 10.0")
    record.write_text(text.replace("epochs = 3", "epochs = 20"))
    command = {"run.name": "first", "run.storage_path": str(older_runs), "optim.epochs": 20}
    given = {name: value for name, value in TINY.items() if name != "optim.warmup_epochs"}
    recipe = manifest.benchmark.recipe | given | {"data.uri": str(demo_shards)}
    config = override(RunConfig(), recipe | command | {"optim.warmup_epochs": None})
    older = as_begun(config, record)
    assert older.optim.warmup_epochs == 10
    for _ in range(2):  # the record stays as it is
        check_claim(resolve(older, manifest), digest=manifest.digest).take()
    given = override(config, {"optim.warmup_epochs": 4.0})
    with pytest.raises(ValueError, match=r"(?s)optim.warmup_epochs: 10.0 -> 4.0"):
        check_claim(resolve(as_begun(given, record), manifest), digest=manifest.digest)
    record.write_text(record.read_text().replace("warmup_epochs = 10.0", "warmup_epochs = 5.0"))
    assert as_begun(config, record).optim.warmup_epochs is None, "a flag gave it"


def test_a_run_goes_on_with_its_own_data_alone(tiny_config):
    config = resolve(tiny_config, open_manifest(tiny_config.data.uri))
    folder = claim_folder(config, digest="a" * 64)
    assert data_of(folder) == "a" * 64
    claim_folder(config, digest="a" * 64)
    with pytest.raises(
        ValueError, match=r"was started with data of digest a{64}, but .* has b{64}"
    ):
        claim_folder(config, digest="b" * 64)
    claim_folder(override(config, {"run.fresh": True}), digest="b" * 64)
    assert data_of(folder) == "b" * 64


@pytest.mark.parametrize("blank", ["", " "])
def test_what_an_older_version_was_started_with_is_read_from_its_journal(tiny_config, blank):
    config = resolve(tiny_config, open_manifest(tiny_config.data.uri))
    folder = claim_folder(config)
    assert data_of(folder) is None
    claim_folder(config, digest="b" * 64)  # nothing says otherwise
    (folder / "data.toml").unlink()
    tags = f'{{"type":"tags","values":{{"next.data_digest":{blank}"{"a" * 64}"}}}}'
    (folder / "journal.jsonl").write_text(f'{{"type":"run"}}\n{tags}\n')
    with pytest.raises(ValueError, match=r"was started with data of digest a{64}"):
        check_claim(config, digest="b" * 64)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.toml", b"seed = 1\nthrea"),
        ("config.toml", b"\0" * 300),
        ("config.toml", b"seed = \xff"),
        ("data.toml", b'digest = "ab'),
        ("data.toml", b""),
    ],
)
def test_a_record_that_was_torn_is_named_with_what_to_do(tiny_config, name, content):
    config = resolve(tiny_config, open_manifest(tiny_config.data.uri))
    folder = claim_folder(config, digest="a" * 64)
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"/{name} is damaged \(.*\); (bring it back|write the)"):
        claim_folder(config, digest="a" * 64)


def test_a_claim_that_is_refused_or_not_taken_writes_nothing(tiny_config):
    config = resolve(tiny_config, open_manifest(tiny_config.data.uri))
    claim = check_claim(config, digest="a" * 64)
    assert not claim.folder.exists()
    claim.take()
    before = {path: path.read_bytes() for path in claim.folder.iterdir()}
    for settings, digest in (({"optim.lr": 0.5}, "a"), ({}, "b")):
        with pytest.raises(ValueError, match="was started with"):
            claim_folder(override(config, settings), digest=digest * 64)
    assert {path: path.read_bytes() for path in claim.folder.iterdir()} == before


def test_a_run_that_another_process_trains_is_neither_moved_nor_continued(tiny_config, tmp_path):
    folder = claim_folder(resolve(tiny_config, open_manifest(tiny_config.data.uri)))
    before = sorted(folder.rglob("*"))
    held = rf"run tiny in {folder} is being written by \S+ \(process {os.getpid()}\) since"
    with holding(folder):
        for fresh in (False, True):
            with pytest.raises(ValueError, match=held):
                launch(override(tiny_config, {"run.fresh": fresh}))
    assert sorted(folder.rglob("*")) == before
    assert list(folder.parent.iterdir()) == [folder]

    kept = {"checkpoint.storage_path": str(tmp_path / "kept")}
    elsewhere = {"run.storage_path": str(tmp_path / "other")}
    with (
        holding(folder, str(tmp_path / "kept" / "tiny")),
        pytest.raises(ValueError, match=rf"run tiny in {tmp_path}/kept/tiny is being written by"),
    ):
        launch(override(tiny_config, kept | elsewhere))


@pytest.mark.parametrize(
    ("settings", "how"),
    [
        ({}, "the same command continues there"),
        ({"run.name": None}, "the same command with --run.name tiny continues there"),
        ({"run.fresh": True}, "the same command without --run.fresh continues there"),
    ],
)
def test_who_is_stopped_hears_which_command_goes_on(tiny_config, settings, how, monkeypatch):
    config = override(tiny_config, settings)
    folder = Path(config.run.storage_path) / "tiny"
    kept = rf"the checkpoints of run tiny are kept in {folder}, and {how}$"
    with (
        pytest.raises(Interrupted, match=f"^stopped after step 7 with a checkpoint; {how}$"),
        going_on(config, folder),
    ):
        raise Interrupted(7)
    with pytest.raises(Stopped, match=f"^stopped; {kept}"), going_on(config, folder):
        raise KeyboardInterrupt
    monkeypatch.setattr("next.stopping._lost", ["the raylet"])
    with pytest.raises(LostRayError, match=f"^the raylet; {kept}"), going_on(config, folder):
        raise KeyboardInterrupt


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_in_one_process_stops_with_a_checkpoint_and_is_killed_in_its_journal(
    tiny_config, number
):
    folder = Path(tiny_config.run.storage_path) / "tiny"
    without_end = {"optim.epochs": 10_000, "selection.every": 10_000, "tracking.every_steps": 1}

    def stop() -> None:
        while not (folder / "journal.jsonl").exists() or not read_metrics(folder):
            time.sleep(0.02)  # pytest ends a test that waits for ever
        os.kill(os.getpid(), number)

    threading.Thread(target=stop, daemon=True).start()
    with pytest.raises(Interrupted, match="the same command continues there") as told:
        launch(override(tiny_config, without_end))
    assert read_status(folder) == "KILLED"
    last = (folder / "checkpoints" / "last").resolve()
    assert last.name == f"step-{told.value.step:08d}"
