"""Pretraining on shards of a tiny benchmark: resume, what is learned from, the file, errors."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch

from jobs.pretrain import main as pretrain_job
from next.config import RunConfig, override, to_toml
from next.data.holdout import split_train
from next.data.shards.reader import open_manifest
from next.evaluation.ranking.captions import Retrieval
from next.model.network import NEXT
from next.training.checkpointing.interruption import Interrupted, Request, Requests
from next.training.inputs import resolve
from next.training.pretraining.alignment import align, prepare_pairs
from next.training.pretraining.run import plan_pretraining, pretrain
from next.training.results.report import FolderReporter
from tests.training.conftest import RequestsAt


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


def test_data_without_captions_are_refused(settings, demo_raw, tmp_path):
    from next.benchmark.card import load_card
    from next.data.source.ingest import prepare

    card = load_card(Path(__file__).resolve().parents[3] / "datasets" / "demo.toml")
    raw = tmp_path / "raw"
    shutil.copytree(demo_raw, raw)
    shutil.rmtree(raw / "text")
    prepare(card.model_copy(update={"captions": None}), raw, tmp_path / "shards")
    bare = override(settings, {"data.uri": str(tmp_path / "shards")})
    with pytest.raises(ValueError, match=r"holds no caption in its train split; give shards"):
        pretrain(bare)
