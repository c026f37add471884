"""Pretraining on shards of a tiny benchmark: resume, what is learned from, the file, errors."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch

from jobs.pretrain import main as pretrain_job
from next.benchmark.card import load_card
from next.benchmark.procedural.benchmark import DemoSize, write_demo
from next.config import RunConfig, override, to_toml
from next.data.holdout import split_train
from next.data.shards.reader import Manifest, open_manifest
from next.data.source.ingest import prepare
from next.evaluation.queries import SPREAD
from next.evaluation.ranking.captions import Retrieval
from next.model.network import NEXT
from next.model.towers.alignment import TwoTowers
from next.training.checkpointing.checkpoint import read_progress
from next.training.checkpointing.interruption import Interrupted, Request, Requests
from next.training.inputs import resolve
from next.training.launch import launch
from next.training.pretraining.alignment import (
    Pairs,
    align,
    alignment_step,
    new_towers,
    pair_batches,
    plan_of_pairs,
    prepare_pairs,
)
from next.training.pretraining.run import check_pretraining, plan_pretraining, pretrain
from next.training.pretraining.trained_on import trained_on, trained_on_metadata
from next.training.results.report import FolderReporter
from next.training.step.optimizer import build_optimizer, set_learning_rates
from next.tuning.settings import SweepConfig
from next.tuning.sweep import prepare_sweep
from tests.training.conftest import RequestsAt

CARD = Path(__file__).resolve().parents[3] / "datasets" / "demo.toml"


@pytest.fixture
def settings(tiny_config) -> RunConfig:
    torch.set_num_threads(1)
    quick = {"optim.epochs": 2, "selection.every": 2, "batch.instances": 2}
    return override(tiny_config, quick | {"run.name": "towers"})


def test_stopped_and_started_again_it_logs_the_same_and_ends_with_the_same_bits(settings, tmp_path):
    config = resolve(settings, open_manifest(settings.data.uri))
    pairs = prepare_pairs(config)

    def train(folder: Path, requests: Requests | None = None) -> dict:
        rows: dict = {}
        with FolderReporter(folder, checkpoint=config.checkpoint, requests=requests) as reporter:
            align(config, pairs, reporter, lambda metrics, step: rows.update({step: metrics}))
        return rows

    whole = train(tmp_path / "whole")
    steps = len(whole)
    assert steps >= 6
    with pytest.raises(Interrupted):
        train(tmp_path / "torn", RequestsAt(2, Request.STOP))
    rest = train(tmp_path / "torn")
    assert {step: rest[step] for step in range(3, steps + 1)} == {
        step: whole[step] for step in range(3, steps + 1)
    }
    ours, theirs = (
        safetensors.torch.load_file(tmp_path / name / "last" / "model.safetensors")
        for name in ("whole", "torn")
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def towers_in_training(settings: RunConfig) -> tuple[RunConfig, Pairs, TwoTowers]:
    config = resolve(settings, open_manifest(settings.data.uri))
    return config, prepare_pairs(config), new_towers(config)


def test_steps_draw_images_to_their_captions(settings):
    config, pairs, network = towers_in_training(settings)
    optimizer = build_optimizer(network, config.optim)
    set_learning_rates(optimizer, 1.0, config.optim)
    plan = plan_of_pairs(config, pairs.data.train, 0)
    batch = next(pair_batches(config, pairs, plan, 0, 0))
    losses = [float(alignment_step(network, optimizer, *batch, config).total) for _ in range(20)]
    assert losses[-1] < 0.6 * losses[0], losses


def test_the_gradient_of_both_towers_is_clipped_together(settings):
    config, pairs, network = towers_in_training(override(settings, {"optim.clip_norm": 1e-3}))
    plan = plan_of_pairs(config, pairs.data.train, 0)
    batch = next(pair_batches(config, pairs, plan, 0, 0))
    moved = {}
    for clip in (1e-3, None):
        config = override(config, {"optim.clip_norm": clip})
        _, _, network = towers_in_training(settings)
        before = torch.nn.utils.parameters_to_vector(network.parameters()).detach().clone()
        sgd = torch.optim.SGD(network.parameters(), lr=1.0)
        alignment_step(network, sgd, *batch, config)
        after = torch.nn.utils.parameters_to_vector(network.parameters()).detach()
        moved[clip] = float((after - before).norm())
    assert moved[1e-3] == pytest.approx(1e-3, rel=0.01)
    assert moved[None] > 0.01


def test_a_run_that_cannot_be_evaluated_leaves_the_checkpoint_of_that_step(settings, tmp_path):
    """Mended, it goes on with the evaluation, and comes to the bits of a run that never failed."""
    config, pairs, _ = towers_in_training(settings)
    labels = pairs.data.query.labels
    torn = replace(pairs.data.query, labels=labels.replace(pid=labels.pid[:1]))
    broken = pairs._replace(data=pairs.data._replace(query=torn))

    def train(pairs: Pairs, name: str) -> dict[str, float]:
        with FolderReporter(tmp_path / name, checkpoint=config.checkpoint) as reporter:
            return align(config, pairs, reporter, lambda metrics, step: None)

    for _ in range(2):
        with pytest.raises(IndexError):
            train(broken, "failed")
        kept = read_progress(tmp_path / "failed" / "last")
        assert (kept.epoch, kept.step) == (1, 2 * kept.step_in_epoch), "before the evaluation"
    assert train(pairs, "failed") == train(pairs, "whole")


def test_it_learns_from_train_identities_alone_and_is_measured_on_those_held_out(settings):
    manifest = open_manifest(settings.data.uri)
    pairs = prepare_pairs(resolve(settings, manifest))
    labels = manifest.labels("train")
    train, held = split_train(settings, labels, manifest.benchmark.rule)
    assert set(labels.pid[train]).isdisjoint(labels.pid[held])
    np.testing.assert_array_equal(np.sort(pairs.data.train.rows), train)
    np.testing.assert_array_equal(np.sort(pairs.data.query.rows), held)


def test_the_result_is_a_file_that_a_run_starts_from_with_a_card_of_its_origin(settings, tmp_path):
    out = tmp_path / "aligned.safetensors"
    made = pretrain(settings, out)
    assert Path(made.weights) == out
    card = json.loads(Path(made.card).read_text())
    assert (card["model"], card["run"], card["modalities"]) == (
        *("next-tiny", "towers"),
        ["RGB", "NI", "TI"],
    )
    assert {f"val/{name}" for name in Retrieval._fields} <= card["metrics"].keys()
    assert "val/rank1_TI" in card["metrics"]
    journal = (Path(made.folder) / "journal.jsonl").read_text()
    assert "train/loss_pairs" in journal

    used = {"model.backbone.pretrained": str(out)}
    config = resolve(override(settings, used), open_manifest(settings.data.uri))
    assert config.model.backbone.file == str(out)
    network = NEXT(config.model)
    with safetensors.safe_open(out, "pt") as file:
        expected = file.get_tensor("visual.proj")
    assert torch.equal(network.backbone.tower.vit.proj.detach(), expected)

    again = pretrain(settings, out)
    assert again.metrics == made.metrics, "finished: the same file again"
    other = override(settings, {"seed": 1, "run.name": "other"})
    with pytest.raises(FileExistsError, match=r"is there and is not of this run's settings"):
        pretrain(other, out)
    assert not (Path(other.run.storage_path) / "other").exists(), "nothing was begun"


def test_the_plan_says_how_much_there_is_to_learn_from(settings, tmp_path, capsys):
    plan = plan_pretraining(settings)
    recipe = tmp_path / "settings.toml"
    recipe.write_text(to_toml(settings))
    flags = ["--data", str(settings.data.uri), "--recipe", str(recipe), "--dry-run", "--json"]
    assert pretrain_job(flags) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["texts"], told["plan_hash"]) == (plan.texts, plan.plan_hash)
    assert (plan.batch, plan.train_identities) == (min(8, plan.train_identities), 8)
    assert plan.captions > plan.train_identities
    assert plan.texts > 3
    assert plan.lines()[0].split() == ["data_digest", plan.data_digest]
    assert not (Path(settings.run.storage_path) / "towers").exists()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"model.backbone.name": "vit_small_patch16_dinov3"},
            r"model.backbone.name must be an open_clip model, which has a text tower",
        ),
        ({"captions.sampling": "none"}, r"captions.sampling must not be none in pretraining"),
        ({"optim.ema": 0.9}, r"optim.ema must be None in pretraining, but got 0.9"),
        ({"scaling.num_workers": 2}, r"scaling.num_workers must be 1 in pretraining, but got 2"),
        (
            {"selection.metric": "val/rank5"},
            r"selection.metric must be one of val/mAP, val/rank1, train/loss in pretraining, .* "
            r"but got val/rank5",
        ),
    ],
)
def test_what_it_does_not_offer_is_refused_before_anything_is_written(settings, wrong, message):
    with pytest.raises(ValueError, match=message):
        pretrain(override(settings, wrong))
    assert not Path(settings.run.storage_path).exists()


@pytest.fixture(scope="module")
def one_camera(tmp_path_factory) -> Manifest:
    """Ten train identities that one camera has seen, and a test split without a second one."""
    raw = tmp_path_factory.mktemp("one") / "raw"
    write_demo(raw, DemoSize(10, 4, 3, 4, train_cameras=1, image_size=(32, 16)))
    for path in raw.glob("test/*/*_cam2_*"):
        path.unlink()
    prepare(load_card(CARD), raw, raw.parent / "shards")
    return open_manifest(str(raw.parent / "shards"))


def test_data_that_no_run_can_be_measured_on_are_learned_from(settings, one_camera, caplog):
    """Captions are retrieved under no rule, so one camera is enough."""
    caplog.set_level("INFO")
    config = override(settings, {"data.uri": one_camera.uri})
    with pytest.raises(ValueError, match=r"test split of .*: no query has a match"):
        resolve(override(config, {"selection.draw": "any"}), one_camera)
    plan = plan_pretraining(config)
    assert "holding out any identities (selection.draw = any), since selection.hold" in caplog.text
    assert (plan.train_identities, plan.held_out_identities) == (7, 3)
    assert (plan.held_out.identities, plan.held_out.queries) == (3, 36)
    assert plan.held_out.score_error == pytest.approx(SPREAD / 3**0.5)
    assert (
        "WARNING              few: settings that differ by less than 11.3 mAP" in plan.lines()[-1]
    )
    made = pretrain(override(config, {"optim.epochs": 1}))
    assert 0 < made.metrics["val/rank1"] <= 100
    assert "measured on held-out identities: 3 identities with 36 queries; stand" in caplog.text
    assert "WARNING: held-out identities: few: settings that differ by less than 11" in caplog.text
    folds = override(config, {"selection.folds": 5})
    assert check_pretraining(folds)[1].selection.draw == "any"
    with pytest.raises(ValueError, match=r"at least 12 train identities, .* has 10; lower sel"):
        check_pretraining(override(config, {"selection.folds": 6}))


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ("held", r"of 2 identities to learn from of .*, but 0 of 7 have one; caption more"),
        ("train", r"of 2 held-out identities to be measured on .*, but 0 of 3 have one \(0 of 36"),
    ],
)
def test_captions_that_nothing_can_be_learned_from_or_measured_on_are_refused_before_work(
    settings, one_camera, tmp_path, kept, message
):
    manifest, config = check_pretraining(override(settings, {"data.uri": one_camera.uri}))
    labels = manifest.labels("train")
    train, held = split_train(config, labels, manifest.benchmark.rule)
    raw = tmp_path / "raw"
    shutil.copytree(Path(one_camera.folder.address).parent / "raw", raw)
    names = {name.split("_")[0] for name in labels.sample_id[held if kept == "held" else train]}
    for path in (raw / "text").glob("train_*.json"):
        captions = json.loads(path.read_text())
        kept_ones = [one for one in captions if Path(one["item"]).name.split("_")[0] in names]
        path.write_text(json.dumps(kept_ones))
    prepare(load_card(CARD), raw, tmp_path / "shards")
    few = override(settings, {"data.uri": str(tmp_path / "shards")})
    for begin in (plan_pretraining, pretrain):
        with pytest.raises(ValueError, match=message):
            begin(few)
    assert not Path(settings.run.storage_path).exists()


def test_weights_that_know_held_out_identities_are_refused_by_runs_and_sweeps(settings, tmp_path):
    out = tmp_path / "aligned.safetensors"
    pretrain(override(settings, {"optim.epochs": 1}), out)
    manifest = open_manifest(settings.data.uri)
    labels = manifest.labels("train")
    train, held = split_train(settings, labels, manifest.benchmark.rule)
    [known] = trained_on(out)
    assert (known.benchmark, known.digest) == ("demo", manifest.digest)
    assert known.identities == np.unique(labels.pid[train]).tolist()
    card = json.loads(out.with_suffix(".json").read_text())
    assert card["identities"] == {"learned": 8, "held_out": len(np.unique(labels.pid[held]))}
    assert card["selection"]["seed"] == 0

    used = override(settings, {"model.backbone.pretrained": str(out), "run.name": "uses"})
    assert resolve(used, manifest).model.backbone.file == str(out), "the same identities held out"
    other = override(used, {"selection.seed": 1})
    seen = np.intersect1d(
        labels.pid[split_train(other, labels, manifest.benchmark.rule).held_out], known.identities
    )
    message = rf"pretrained = {out} was trained on {len(seen)} of the \d identities that are held"
    for begin in (launch, pretrain):
        with pytest.raises(ValueError, match=message):
            begin(other)
    folds = override(used, {"selection.folds": 3})
    with pytest.raises(ValueError, match=r"(?s)was trained on .*so set selection.folds = 1"):
        prepare_sweep(folds, SweepConfig())
    resolve(override(other, {"selection.split": "test"}), manifest)
    assert not (Path(settings.run.storage_path) / "uses").exists()


def test_weights_of_weights_know_the_identities_of_both(settings, tmp_path):
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    once = override(settings, {"optim.epochs": 1})
    pretrain(once, first)
    used = {"model.backbone.pretrained": str(first), "run.name": "second"}
    pretrain(override(once, used), second)
    assert trained_on(second) == trained_on(first)
    manifest, config = check_pretraining(override(once, used))
    told = json.loads(trained_on_metadata(config, manifest, np.array([10**6])))
    assert told[0]["identities"] == [*trained_on(first)[0].identities, 10**6]


def test_other_data_of_the_same_benchmark_are_warned_of(settings, one_camera, tmp_path, caplog):
    out = tmp_path / "aligned.safetensors"
    pretrain(override(settings, {"data.uri": one_camera.uri, "optim.epochs": 1}), out)
    used = override(settings, {"model.backbone.pretrained": str(out), "selection.seed": 1})
    resolve(used, open_manifest(settings.data.uri))
    assert "was trained on other data of demo, in which" in caplog.text


def test_data_without_captions_are_refused(settings, demo_raw, tmp_path):
    card = load_card(CARD)
    raw = tmp_path / "raw"
    shutil.copytree(demo_raw, raw)
    shutil.rmtree(raw / "text")
    prepare(card.model_copy(update={"captions": None}), raw, tmp_path / "shards")
    bare = override(settings, {"data.uri": str(tmp_path / "shards")})
    with pytest.raises(ValueError, match=r"holds no caption in its train split; give shards"):
        pretrain(bare)
