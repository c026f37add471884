import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from next.data.demo import DemoSize, write_demo
from next.data.shards import open_manifest

ROOT = Path(__file__).resolve().parents[2]
JOB = str(ROOT / "jobs" / "prepare.py")
CARD = str(ROOT / "datasets" / "demo.toml")


@pytest.fixture
def raw(tmp_path) -> Path:
    write_demo(tmp_path / "raw", DemoSize(3, 2, 2, 2, image_size=(32, 16)))
    return tmp_path / "raw"


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the job as a script, within this process."""

    def run(*arguments: str | Path) -> Done:
        monkeypatch.setattr(sys, "argv", ["prepare.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(JOB, run_name="__main__")
        return Done(end.value.code, *capsys.readouterr())

    return run


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_benchmark_becomes_shards_and_a_table_of_what_is_in_them(raw, tmp_path, run):
    done = run("--card", CARD, "--source", raw, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    manifest = open_manifest(tmp_path / "out")
    head, train, gallery, query = (line.split() for line in done.stdout.splitlines()[:4])
    assert head == [
        "split",
        "identities",
        "of",
        "1",
        "sample",
        "samples",
        "RGB",
        "NI",
        "TI",
        "missing",
        "captions",
        "sentences",
    ]
    sentences = [
        str(sum(manifest.splits[split].sentences.values())) for split in ("train", "gallery")
    ]
    assert train == ["train", "3", "0", "6", "6", "6", "6", "0", "18", sentences[0]]
    assert gallery == ["gallery", "2", "0", "4", "4", "4", "4", "0", "12", sentences[1]]
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


def test_json_says_it_to_machines_and_a_second_call_finds_the_work_done(raw, tmp_path, run):
    arguments = ("--card", CARD, "--source", raw, "--out", tmp_path / "out", "--json")
    first, second = json.loads(run(*arguments).stdout), json.loads(run(*arguments).stdout)
    assert first == second
    assert first["digest"] == open_manifest(tmp_path / "out").digest
    assert first["splits"]["train"]["identities"] == 3
    assert files(tmp_path) == {"raw", "out"}


def test_a_dry_run_counts_and_writes_nothing(raw, tmp_path, run):
    done = run("--card", CARD, "--source", raw, "--dry-run")
    assert done.returncode == 0
    assert "nothing was decoded or written" in done.stdout
    assert files(tmp_path) == {"raw"}


def test_check_approves_sound_shards_and_points_at_a_flipped_byte(raw, tmp_path, run):
    run("--card", CARD, "--source", raw, "--out", tmp_path / "out")
    assert (
        "every byte and every image is as it should be" in run("--check", tmp_path / "out").stdout
    )
    shard = tmp_path / "out" / "gallery" / "00000.parquet"
    data = bytearray(shard.read_bytes())
    data[1000] ^= 1
    shard.write_bytes(data)
    done = run("--check", tmp_path / "out")
    assert done.returncode == 2
    assert re.search(r"error: .*gallery/00000\.parquet: its sha256 is not", done.stderr)


def test_what_is_skipped_is_said(raw, tmp_path, run):
    (raw / "train" / "NI" / "Copy of 1.jpg").write_bytes(b"")
    bad = sorted((raw / "test" / "TI").iterdir())[0]
    bad.write_bytes(bad.read_bytes()[:-200])
    done = run("--card", CARD, "--source", raw, "--out", tmp_path / "out", "--on-bad", "skip")
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
    raw, tmp_path, run, damage, message
):
    damage(raw)
    done = run("--card", CARD, "--source", raw, "--out", tmp_path / "out")
    assert done.returncode == 2
    assert re.search(rf"^error: .*{message}", done.stderr, re.MULTILINE)
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert files(tmp_path) == {"raw"}


def test_shards_of_another_source_are_kept(raw, tmp_path, run):
    run("--card", CARD, "--source", raw, "--out", tmp_path / "out")
    digest = open_manifest(tmp_path / "out").digest
    for folder in ("RGB", "NI", "TI"):
        sorted((raw / "train" / folder).iterdir())[0].unlink()
    done = run("--card", CARD, "--source", raw, "--out", tmp_path / "out")
    assert done.returncode == 2
    assert re.search(rf"error: .*digest {digest[:12]}, but this source and card give", done.stderr)
    assert open_manifest(tmp_path / "out").digest == digest
    assert files(tmp_path) == {"raw", "out"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--card, --source and --out are needed"),
        (("--card", CARD, "--source", "x"), "--card, --source and --out are needed"),
        (("--check", "x", "--out", "y"), "--check takes no --card, --source or --out"),
        (("--check", "nowhere"), "nowhere/manifest.json: there is no manifest"),
        (("--card", "dem.toml", "--source", "x", "--out", "y"), "dem.toml: there is no such card"),
        (("--on-bed", "skip"), "on_bad"),
    ],
)
def test_a_wrong_command_is_refused_with_code_2(run, arguments, message):
    done = run(*arguments)
    assert done.returncode == 2
    assert message in done.stderr + done.stdout
    assert "Traceback" not in done.stderr
