"""Registered models: the best checkpoint with its card, loaded elsewhere, promoted on condition."""

import json
import os
import pickle
import pickletools
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch

from jobs.promote import main as promote_job
from next.config import RunConfig, override
from next.data.shards.reader import open_manifest
from next.serving.following import Follower
from next.serving.settings import ServeSettings
from next.tracking.registry.promotion import promote
from next.tracking.registry.versions import ModelCard, fetch_model, register, version_of
from next.training.checkpointing.checkpoint import export_checkpoint
from next.training.embedder import LOADER, Embedder
from next.training.launch import launch
from next.training.results.registration import register_run, weights_licence
from tests.conftest import TINY
from tests.serving.conftest import other_version, write
from tests.training.test_embedder import gallery_columns

ROOT = Path(__file__).resolve().parents[3]
NAME = "reid-tiny"


@pytest.fixture(scope="module")
def trained(server, demo_shards, cache_folder, tmp_path_factory):
    """A finished run whose best checkpoint is version 1 of a model."""
    place = {
        "data.uri": str(demo_shards),
        "data.cache": str(cache_folder),
        "run.storage_path": str(tmp_path_factory.mktemp("runs")),
        "run.name": "tiny",
        "tracking.enabled": True,
        "tracking.uri": server.uri,
        "tracking.model": NAME,
        "captions.evaluation": "all",
        # A place of its own for checkpoints: what is registered is found there too.
        "checkpoint.storage_path": str(tmp_path_factory.mktemp("kept")),
    }
    return launch(override(RunConfig(), TINY | place))


@pytest.fixture(scope="module")
def fetched(server, trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fetched")
    return fetch_model(server.uri, f"models:/{NAME}@candidate", folder, loader=LOADER)


@pytest.fixture(scope="module")
def split(demo_shards, trained):
    return gallery_columns(demo_shards, trained.checkpoint)


def is_pickle(data: bytes) -> bool:
    try:
        return sum(1 for _ in pickletools.genops(data)) > 2
    except Exception:
        return False


@pytest.mark.slow
def test_mlflow_loads_it_in_a_fresh_process_and_checks_the_signature(
    server, trained, split, tmp_path
):
    columns, expected = split
    pandas.DataFrame(columns).to_parquet(tmp_path / "samples.parquet")
    code = (
        "import sys, mlflow, numpy, pandas\n"
        "mlflow.set_tracking_uri(sys.argv[1])\n"
        "model = mlflow.pyfunc.load_model(sys.argv[2])\n"
        "found = model.predict(pandas.read_parquet(sys.argv[3]))\n"
        "numpy.save(sys.argv[4], found)\n"
        "try:\n"
        "    model.predict(pandas.DataFrame({'image_RGB': [1.5]}))\n"
        "except mlflow.MlflowException as error:\n"
        "    print('REFUSED', error)\n"
    )
    done = subprocess.run(
        [
            *(sys.executable, "-W", "ignore", "-c", code, server.uri, f"models:/{NAME}/1"),
            *(str(tmp_path / "samples.parquet"), str(tmp_path / "found.npy")),
        ],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    np.testing.assert_allclose(np.load(tmp_path / "found.npy"), expected, atol=1e-5)
    assert "REFUSED" in done.stdout


def test_nothing_of_the_model_is_a_pickle(fetched, tmp_path):
    root = next(folder for folder in fetched.parents if (folder / "MLmodel").exists())
    files = [path for path in root.rglob("*") if path.is_file()]
    assert {"MLmodel", "model.safetensors", "text.safetensors", "config.toml", "card.json"} <= {
        path.name for path in files
    }
    for path in files:
        assert not zipfile.is_zipfile(path), path
        assert not is_pickle(path.read_bytes()), path
    torch.save({"a": 1}, tmp_path / "pickled.pt")
    assert zipfile.is_zipfile(tmp_path / "pickled.pt"), "the check finds what torch pickles"
    assert is_pickle(pickle.dumps({"a": 1}))


def test_the_card_says_what_the_model_is_worth_and_on_what(client, trained, demo_shards):
    version = client.get_model_version_by_alias(NAME, "candidate")
    card = json.loads(version.tags["next.card"])
    assert card["data_digest"] == open_manifest(demo_shards).digest
    assert card["scores"]["test/mAP"] == pytest.approx(trained.assessment.metrics["test/mAP"])
    low, high = card["interval"]["test/mAP"]
    assert 0 <= low < card["scores"]["test/mAP"] < high <= 100
    assert card["subsets"][0] == card["modalities"]
    assert len(card["subsets"]) == 2 ** len(card["modalities"]) - 1
    sets = ["+".join(subset) for subset in card["subsets"]]
    assert list(card["subset_scores"]) == sets
    assert card["subset_scores"][sets[0]] == pytest.approx(card["scores"]["test/mAP"])
    assert all(0 < score <= 100 for score in card["subset_scores"].values())
    assert f"| {sets[-1]} | {card['subset_scores'][sets[-1]]:.1f} |" in version.description
    assert card["seed_spread"] == {}
    assert "One seed was run" in version.description
    assert [picture.name for picture in trained.assessment.pictures][-1] == "missing.png"
    assert card["weights_licence"] == "the run's own (random start)"
    assert "| test/mAP |" in version.description
    assert version.run_id


def test_the_card_tells_the_spread_over_seeds_from_that_over_queries():
    card = ModelCard(
        benchmark="demo",
        data_digest="d" * 64,
        scores={"val/mAP": 48.25, "test/mAP": 50.0},
        interval={"test/mAP": (45.0, 55.0)},
        modalities=["RGB", "NI"],
        subsets=[["RGB", "NI"], ["RGB"], ["NI"]],
        weights_licence="none",
        seed=0,
        run="r",
        subset_scores={"RGB+NI": 50.0, "RGB": 40.0},
        seed_spread={"val/mAP": (3.391, 12)},
    )
    lines = card.markdown().splitlines()
    assert "| val/mAP | 48.2 | - | ± 3.39 (12 degrees of freedom) |" in lines
    assert "| test/mAP | 50.0 | 45.0 to 55.0 | - |" in lines
    assert "| RGB | 40.0 |" in lines
    assert "| NI | - |" in lines
    assert "One seed" not in card.markdown()


@pytest.mark.parametrize("name", ["extra.pkl", "deep/model.joblib", "weights.pt"])
def test_a_folder_with_what_may_be_a_pickle_is_not_registered(tmp_path, name):
    """Before the server is asked at all: nobody listens there."""
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(pickle.dumps(1))
    card = ModelCard("demo", "d" * 64, {}, {}, ["RGB"], [["RGB"]], "none", 0, "r")
    with pytest.raises(ValueError, match=rf"{name} may hold a pickle, which executes code"):
        register(
            "http://127.0.0.1:1", NAME, tmp_path, run_id="r", loader=LOADER, inputs={}, width=8,
            card=card, requirements=[],
        )  # fmt: skip
    assert not (tmp_path / "card.json").exists()


def test_the_licence_follows_the_weights_that_training_began_with():
    backbone = RunConfig().model.backbone
    assert weights_licence(backbone) == "MIT (OpenAI's CLIP)"
    own = backbone.model_copy(update={"pretrained": "my.safetensors"})
    assert weights_licence(own) == "not known; see the source of my.safetensors"


@pytest.mark.slow
def test_the_job_assesses_a_registered_model_and_gets_the_same_scores(
    server, trained, demo_shards, tmp_path
):
    flags = ["--model", f"models:/{NAME}/1", "--tracking.uri", server.uri, "--threads", "1"]
    done = subprocess.run(
        [
            *(sys.executable, "jobs/evaluate.py", "--data", str(demo_shards), "--json"),
            *(*flags, "--out", str(tmp_path)),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout)["metrics"] == trained.assessment.metrics


def test_a_promotion_needs_a_condition_that_holds(server, client, trained):
    score = trained.assessment.metrics["test/mAP"]
    with pytest.raises(ValueError, match="a promotion needs a condition"):
        promote(server.uri, NAME, [])
    refused = promote(server.uri, NAME, [f"test/mAP >= {score + 1:.1f}", "test/mAP > champion"])
    assert not refused.promoted
    assert refused.champion is None
    assert "not met" in refused.findings[0]
    assert "there is no champion yet" in refused.findings[1]

    first = promote(server.uri, NAME, [f"test/mAP >= {score - 1:.1f}"])
    assert first.promoted
    champion = client.get_model_version_by_alias(NAME, "champion")
    assert champion.version == str(first.version.version)
    assert f"test/mAP >= {score - 1:.1f}: {score:.2f}" in champion.tags["next.promoted_when"]

    other = json.loads(champion.tags["next.card"]) | {"data_digest": "f" * 64}
    client.set_model_version_tag(NAME, champion.version, "next.card", json.dumps(other))
    elsewhere = register_run(trained.folder, server.uri, NAME)
    with pytest.raises(ValueError, match=r"was measured on data .*, but the champion f{16}"):
        promote(server.uri, NAME, ["test/mAP >= 0"])
    client.delete_model_version(NAME, str(elsewhere.version))
    client.set_model_version_tag(NAME, champion.version, "next.card", champion.tags["next.card"])
    again = register_run(trained.folder, server.uri, NAME)
    equal = promote(server.uri, NAME, ["test/mAP > champion + 0.5"])
    assert not equal.promoted
    assert equal.version == again
    assert equal.champion == first.version
    assert promote(server.uri, NAME, ["test/mAP >= champion"]).promoted
    assert client.get_model_version_by_alias(NAME, "champion").version == str(again.version)


def test_the_promotion_job_answers_scripts_and_its_rehearsal_changes_nothing(
    server, client, trained, capsys
):
    score = trained.assessment.metrics["test/mAP"]

    def standing() -> list[tuple[str, dict[str, str], list[str]]]:
        versions = client.search_model_versions(f"name = '{NAME}'")
        return sorted((v.version, dict(v.tags), list(v.aliases)) for v in versions)

    def ask(*more: str) -> tuple[int, str]:
        code = promote_job(["--model", NAME, "--tracking.uri", server.uri, *more])
        return code, capsys.readouterr().out

    before = standing()
    rehearse = ("--run", str(trained.folder), "--when", f"test/mAP >= {score - 1:.1f}", "--dry-run")
    code, said = ask(*rehearse, "--json")
    answer = json.loads(said)
    assert code == 0
    assert answer["promoted"] is True
    assert answer["scores"]["test/mAP"] == score
    assert "registered" not in answer
    assert isinstance(answer["findings"], list)
    code, said = ask(*rehearse)
    assert code == 0
    assert "would be champion" in said
    assert said.endswith("nothing was registered or promoted (--dry-run)\n")
    code, said = ask("--when", "test/mAP >= 100.5", "--dry-run", "--json")
    assert (code, json.loads(said)["promoted"]) == (1, False)
    assert standing() == before

    code, said = ask(*rehearse[:-1], "--json")
    answer = json.loads(said)
    assert code == 0
    assert answer["promoted"] is True
    assert answer["registered"] == answer["version"] != answer["champion_before"]
    assert standing() != before


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        (["mAP better"], "a condition must be METRIC OPERATOR VALUE"),
        (["test/map > 3"], r"has no test/map; it has test/mAP"),
    ],
)
def test_a_condition_that_says_nothing_is_refused(server, trained, conditions, message):
    with pytest.raises(ValueError, match=message):
        promote(server.uri, NAME, conditions)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("reid-tiny", "must be given as models:/NAME/VERSION or models:/NAME@ALIAS"),
        ("models:/reid-tiny@nobody", "there is no version models:/reid-tiny@nobody"),
        ("models:/reid-tiny/99", "99"),
    ],
)
def test_a_model_that_is_not_there_is_an_error(server, trained, tmp_path, model, message):
    with pytest.raises(ValueError, match=message):
        fetch_model(server.uri, model, tmp_path, loader=LOADER)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("pickle", r"extra\.pkl may hold a pickle, which executes code when it is loaded"),
        ("place", r"'\.\./\.\./' must name a file within .*, but leads out of it"),
        ("code", r"must be a model of this package \(loader .*, no code of its own\)"),
    ],
)
def test_a_version_that_somebody_else_made_is_not_loaded(
    server, client, fetched, tmp_path, damage, message
):
    root = next(folder for folder in fetched.parents if (folder / "MLmodel").exists())
    made = tmp_path / "model"
    shutil.copytree(root, made)
    description = (made / "MLmodel").read_text()
    inside = fetched.relative_to(root).as_posix()
    if damage == "pickle":
        (made / "data" / "extra.pkl").write_bytes(pickle.dumps(1))
    elif damage == "place":
        description = description.replace(f"data: {inside}", "data: ../../")
    else:
        description = description.replace(f"data: {inside}", f"code: code\n    data: {inside}")
    assert damage == "pickle" or description != (made / "MLmodel").read_text()
    (made / "MLmodel").write_text(description)
    run = client.create_run(client.create_experiment(f"foreign-{damage}"))
    client.log_artifacts(run.info.run_id, str(made), "model")
    name = f"foreign-{damage}"
    client.create_registered_model(name)
    client.create_model_version(name, f"{run.info.artifact_uri}/model", run.info.run_id)
    with pytest.raises(ValueError, match=message):
        fetch_model(server.uri, f"models:/{name}/1", tmp_path / "here", loader=LOADER)


def test_a_version_that_names_another_loader_is_not_loaded(server, trained, tmp_path):
    with pytest.raises(ValueError, match=r"must be a model of this package .*; it is not loaded"):
        fetch_model(server.uri, f"models:/{NAME}/1", tmp_path, loader="somebody.else")


def test_a_service_takes_the_version_that_its_alias_moves_to_with_its_galleries(
    server, client, trained, fetched, demo_shards, tmp_path
):
    address = f"models:/{NAME}@served"
    client.set_registered_model_alias(NAME, "served", 1)
    first = Embedder.load(address, device="cpu", tracking_uri=server.uri)
    write(first, demo_shards, "gallery", tmp_path / "galleries" / "first")
    settings = ServeSettings(
        model=address,
        gallery=str(tmp_path / "galleries"),
        token_digest="0" * 64,
        tracking_uri=server.uri,
    )
    follower = Follower(settings)
    assert follower.holding.model.digest == first.digest

    root = next(folder for folder in fetched.parents if (folder / "MLmodel").exists())
    made, inside = tmp_path / "made", fetched.relative_to(root)
    shutil.copytree(root, made)
    shutil.rmtree(made / inside / "checkpoint")
    newer = other_version(fetched / "checkpoint", tmp_path / "newer")
    export_checkpoint(newer, made / inside / "checkpoint")
    run = client.create_run(client.create_experiment("newer"))
    client.log_artifacts(run.info.run_id, str(made), "model")
    version = client.create_model_version(
        NAME, f"{run.info.artifact_uri}/model", run.info.run_id
    ).version
    client.set_registered_model_alias(NAME, "served", version)
    assert version_of(server.uri, address).version == int(version)
    with pytest.raises(ValueError, match="is new, but 1 of 1 galleries are not embedded by it yet"):
        follower.look()
    assert follower.holding.model.digest == first.digest
    second = Embedder.load(address, device="cpu", tracking_uri=server.uri)
    write(second, demo_shards, "gallery", tmp_path / "galleries" / "again")
    follower.look()
    assert follower.holding.model.digest == second.digest != first.digest
    assert list(follower.holding.collection.parts) == ["again"]
