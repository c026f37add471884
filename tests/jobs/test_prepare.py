import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from next.benchmark.card import load_card
from next.benchmark.procedural.benchmark import AS_REAL, VARIANTS, DemoSize, Variant
from next.cli import base_config
from next.config import override
from next.data.holdout import split_train
from next.data.loading.plan import epoch_plan, plan_hash
from next.data.shards.reader import open_manifest

ROOT = Path(__file__).resolve().parents[2]
JOB = str(ROOT / "jobs" / "prepare.py")
CARD = str(ROOT / "datasets" / "demo.toml")


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_procedural_benchmark_is_drawn_in_another_size_under_a_name_of_its_own(
    tmp_path, prepare, monkeypatch
):
    small = Variant(DemoSize(3, 2, 2, 2, image_size=(32, 16)), AS_REAL)
    monkeypatch.setitem(VARIANTS, "large-real-captions", small)
    asked = ("--draw", "large-real-captions", "--draw-seed", "3", "--out", tmp_path / "out")
    done = prepare(*asked)
    assert done.returncode == 0, done.stderr
    manifest = open_manifest(tmp_path / "out")
    assert manifest.benchmark.name == "demo-large-real-captions"
    assert manifest.benchmark.recipe == load_card(CARD).recipe
    truth = json.loads((tmp_path / "out-raw" / "attributes.json").read_text())
    assert (truth["seed"], truth["difficulty"]["caption_habit"]) == (3, AS_REAL.caption_habit)
    before = manifest.digest
    assert prepare(*asked).returncode == 0, "what is drawn is not drawn again"
    assert open_manifest(tmp_path / "out").digest == before


def test_a_benchmark_becomes_shards_and_a_table_of_what_is_in_them(raw, tmp_path, prepare):
    done = prepare("--card", CARD, "--source", raw, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    manifest = open_manifest(tmp_path / "out")
    head, train, gallery, query = (line.split() for line in done.stdout.splitlines()[:4])
    assert head == [
        "split", "identities", "of", "1", "sample", "samples", "RGB", "NI", "TI", "missing",
        "captions", "uncaptioned", "sentences",
    ]  # fmt: skip
    sentences = [
        str(sum(manifest.splits[split].sentences.values())) for split in ("train", "gallery")
    ]
    assert train == ["train", "3", "0", "6", "6", "6", "6", "0", "18", "0", sentences[0]]
    assert gallery == ["gallery", "2", "0", "4", "4", "4", "4", "0", "12", "0", sentences[1]]
    assert query == ["query", "=", "gallery"]
    assert f"digest    {manifest.digest}" in done.stdout
    assert re.search(r"prepare  10/10 samples  100%  about 0 s left", done.stderr)


def test_the_command_runs_from_anywhere_and_its_stderr_is_the_error_alone(tmp_path):
    done = subprocess.run(
        [sys.executable, JOB, "--check", "nowhere"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 2
    assert re.fullmatch(r"error: .*nowhere/manifest\.json: there is no manifest.*\n", done.stderr)


def test_json_says_it_to_machines_and_a_second_call_finds_the_work_done(raw, tmp_path, prepare):
    arguments = ("--card", CARD, "--source", raw, "--out", tmp_path / "out", "--json")
    first, second = json.loads(prepare(*arguments).stdout), json.loads(prepare(*arguments).stdout)
    assert first == second
    assert first["digest"] == open_manifest(tmp_path / "out").digest
    assert first["splits"]["train"]["identities"] == 3
    assert files(tmp_path) == {"raw", "out"}


def test_a_dry_run_counts_and_writes_nothing(raw, tmp_path, prepare):
    done = prepare("--card", CARD, "--source", raw, "--dry-run")
    assert done.returncode == 0
    assert "nothing was decoded or written" in done.stdout
    assert files(tmp_path) == {"raw"}


def test_check_approves_sound_shards_and_points_at_a_flipped_byte(raw, tmp_path, prepare):
    prepare("--card", CARD, "--source", raw, "--out", tmp_path / "out")
    done = prepare("--check", tmp_path / "out")
    assert "every byte and every image is as it should be" in done.stdout
    assert re.search(r"images that do not decode +30 +0\n", done.stdout)
    assert re.search(r"train identities in gallery or query +3 +0\n", done.stdout)
    assert re.search(r"gallery identities with one sample +2 +0\n", done.stdout)
    assert "queries   test split: 2 identities with 4 queries; standard error about" in done.stdout
    assert "WARNING   test split: few: settings that differ by less than 13.9 mAP" in done.stdout
    assert "WARNING   selection.holdout needs at least 4 train identities" in done.stdout
    assert "check  10/10 samples  100%" in done.stderr
    shard = tmp_path / "out" / "gallery" / "00000.parquet"
    data = bytearray(shard.read_bytes())
    data[1000] ^= 1
    shard.write_bytes(data)
    done = prepare("--check", tmp_path / "out")
    assert done.returncode == 2
    assert re.search(r"error: .*gallery/00000\.parquet: its sha256 is not", done.stderr)


def test_a_drawn_benchmark_can_be_rehearsed_too(tmp_path, prepare):
    asked = ("--draw", "demo", "--out", tmp_path / "out", "--dry-run", "--json")
    plan = json.loads(prepare(*asked).stdout)
    assert plan == {
        "name": "demo", "seed": 0, "raw": str(tmp_path / "out-raw"), "drawn_before": False,
        "out": str(tmp_path / "out"),
    }  # fmt: skip
    assert files(tmp_path) == set()


def test_check_refuses_data_on_which_nothing_can_be_measured(raw, tmp_path, prepare):
    for path in (raw / "test").glob("*/*_cam2_*"):
        path.unlink()
    for more in ((), ("--dry-run",)):
        told = prepare("--card", CARD, "--source", raw, "--out", tmp_path / "out", *more)
        assert told.returncode == 0
        assert "queries   train split: 3 identities with 6 queries" in told.stdout
        assert "WARNING   nothing can be measured on the test split: no query has" in told.stdout
    done = prepare("--check", tmp_path / "out")
    assert done.returncode == 2
    assert "queries   test split: 0 identities with 0 queries, 2 distractors\n" in done.stdout
    assert re.search(r"error: nothing can be measured on the test split .*camera", done.stderr)


def test_check_names_the_identities_that_leak(raw, tmp_path, prepare):
    for modality in ("RGB", "NI", "TI"):
        image = sorted((raw / "train" / modality).iterdir())[0]
        image.rename(raw / "test" / modality / image.name)
    prepare("--card", CARD, "--source", raw, "--out", tmp_path / "out")
    done = prepare("--check", tmp_path / "out", "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["leaked_identities"] == [1]
    assert "LEAK      in train and test: 1\n" in prepare("--check", tmp_path / "out").stdout


def test_a_contact_sheet_shows_each_split(raw, tmp_path, prepare, monkeypatch):
    (raw / "train" / "NI" / sorted(os.listdir(raw / "train" / "NI"))[0]).unlink()
    card = tmp_path / "card.toml"
    card.write_text(Path(CARD).read_text().replace('missing = "error"', 'missing = "keep"'))
    prepare("--card", card, "--source", raw, "--out", tmp_path / "out")
    done = prepare("--peek", tmp_path / "out", "--picture", tmp_path / "sheet.png")
    assert done.stdout == f"picture   {tmp_path / 'sheet.png'}\n"
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.height > sheet.width > 600
    monkeypatch.chdir(tmp_path)
    assert json.loads(prepare("--out", "out", "--peek", "--json").stdout) == {
        "picture": str(tmp_path / "peek-demo.png")
    }
    done = prepare("--peek", tmp_path / "out", "--picture", tmp_path / "sheet.jpg")
    assert done.returncode == 2
    assert "written as .png" in done.stderr


def test_the_order_is_shown_to_be_the_same_for_every_number_of_workers(raw, tmp_path, prepare):
    prepare("--card", CARD, "--source", raw, "--out", tmp_path / "out")
    settings = {"seed": 3, "batch.identities": 2, "selection.holdout": 0, "selection.split": "test"}
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items()))
    arguments = ("--out", tmp_path / "out", "--verify-order", "--world", "1,2,4,8")
    done = prepare(*arguments, "--recipe", recipe)
    assert done.returncode == 0, done.stderr
    manifest = open_manifest(tmp_path / "out")
    config = override(base_config(manifest.benchmark, None), settings)
    labels = manifest.labels("train")
    pids = labels.pid[split_train(config, labels, "camera").train]
    plan = epoch_plan(pids, seed=3, epoch=0, p=2, k=4)
    first = done.stdout.splitlines()[1].split()
    assert first == ["0", str(len(plan)), str(plan.size), *[plan_hash(plan)[:12]] * 5]
    assert f"plan      {plan_hash(plan)} (epoch 0, seed 3" in done.stdout
    assert "the same global batches for 1, 2, 4, 8 workers" in done.stdout
    answer = json.loads(prepare(*arguments, "--recipe", recipe, "--epochs", "1", "--json").stdout)
    assert (answer["equal"], set(answer["epochs"][0]["joined"])) == (True, {"1", "2", "4", "8"})
    done = prepare(*arguments[:2], "--verify-order", "--world", "1,3", "--recipe", recipe)
    assert (done.returncode, "must be a multiple of scaling.num_workers" in done.stderr) == (
        2,
        True,
    )
    assert "--epochs must be 1 or more" in prepare(*arguments, "--epochs", "0").stderr
    done = prepare(*arguments[:2], "--verify-order", "--world", "two")
    assert done.returncode == 2
    assert "--world must be numbers" in done.stderr


def test_what_is_skipped_is_said(raw, tmp_path, prepare):
    (raw / "train" / "NI" / "Copy of 1.jpg").write_bytes(b"")
    bad = sorted((raw / "test" / "TI").iterdir())[0]
    bad.write_bytes(bad.read_bytes()[:-200])
    done = prepare("--card", CARD, "--source", raw, "--out", tmp_path / "out", "--on-bad", "skip")
    assert done.returncode == 0, done.stderr
    assert "left out  2 files, which manifest.json lists" in done.stdout
    listed = [item.file for item in open_manifest(tmp_path / "out").file.findings.skipped]
    assert listed == [f"test/TI/{bad.name}", "train/NI/Copy of 1.jpg"]


def no_image(raw: Path) -> None:
    sorted((raw / "train" / "RGB").iterdir())[0].write_text("text")


def no_match(raw: Path) -> None:
    for path in (raw / "train" / "RGB").iterdir():
        path.rename(path.with_suffix(".jpeg"))


def one_odd(raw: Path) -> None:
    (raw / "train" / "RGB" / "odd.jpg").write_text("text")


def no_folder(raw: Path) -> None:
    (raw / "test" / "TI").rename(raw / "test" / "TIR")


def no_json(raw: Path) -> None:
    (raw / "text" / "test_TI.json").write_text("<html>")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (no_image, r"raw/train/RGB/000001_cam1_0_00\.jpg is no image that Pillow can open"),
        (no_match, r"raw/train/RGB: none of its 6 files matches .*000001_cam1_0_00\.jpeg"),
        (one_odd, r"1 file in .*: train/RGB/odd\.jpg does not match grammar\.pattern"),
        (no_folder, r"raw/test/TI: there is no such folder .*did you mean TIR\?"),
        (no_json, r"raw/text/test_TI\.json is not JSON"),
    ],
)
def test_a_source_that_does_not_fit_is_one_clear_message_and_no_output(
    raw, tmp_path, prepare, damage, message
):
    damage(raw)
    done = prepare("--card", CARD, "--source", raw, "--out", tmp_path / "out")
    assert done.returncode == 2
    assert re.search(rf"^error: .*{message}", done.stderr, re.MULTILINE)
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert files(tmp_path) == {"raw"}


def test_shards_of_another_source_are_kept(raw, tmp_path, prepare):
    prepare("--card", CARD, "--source", raw, "--out", tmp_path / "out")
    digest = open_manifest(tmp_path / "out").digest
    for folder in ("RGB", "NI", "TI"):
        sorted((raw / "train" / folder).iterdir())[0].unlink()
    done = prepare("--card", CARD, "--source", raw, "--out", tmp_path / "out")
    assert done.returncode == 2
    assert re.search(rf"error: .*digest {digest[:12]}, but this source and card give", done.stderr)
    assert open_manifest(tmp_path / "out").digest == digest
    assert files(tmp_path) == {"raw", "out"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--card, --source and --out are needed"),
        (("--draw", "large", "--source", "x", "--out", "y"), "--draw makes its own source: leave"),
        (("--draw", "large"), "--draw needs a local folder as --out, but got None"),
        (("--card", CARD, "--source", "x"), "--card, --source and --out are needed"),
        (("--check", "x", "--out", "y"), "without --card, --source or --out"),
        (("--check", "x", "--peek", "y"), "give one of them"),
        (("--peek",), "--peek needs a folder of shards, its own or that of --out"),
        (("--card", CARD, "--source", "x", "--out", "y", "--workers", "-1"), "must be 0 or more"),
        (("--check", "nowhere"), "nowhere/manifest.json: there is no manifest"),
        (("--card", "dem.toml", "--source", "x", "--out", "y"), "dem.toml: there is no such card"),
        (("--on-bed", "skip"), "on_bad"),
    ],
)
def test_a_wrong_command_is_refused_with_code_2(prepare, arguments, message):
    done = prepare(*arguments)
    assert done.returncode == 2
    assert message in done.stderr + done.stdout
    assert "Traceback" not in done.stderr
