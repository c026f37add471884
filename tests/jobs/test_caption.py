import hashlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jobs.caption import main
from next.captioning.requests.ledger import Ledger
from next.data.shards.reader import open_manifest
from tests.captioning.scripted_endpoint import Script, scripted

ROOT = Path(__file__).resolve().parents[2]
CARD = str(ROOT / "datasets" / "demo.toml")


@pytest.fixture
def models(tmp_path):
    """Writes a file of models for an endpoint."""

    def write(url, names=("scripted-large", "scripted-small"), **settings):
        path = tmp_path / "models.toml"
        tables = []
        for name in names:
            fields = {"name": name, "base_url": url, "backoff_s": 0.01} | settings
            lines = [f"{key} = {json.dumps(value)}" for key, value in fields.items()]
            tables.append("\n".join(["[[models]]", *lines]))
        path.write_text("\n\n".join(tables))
        return str(path)

    return write


def run(raw, models, out, *flags):
    source = ["--card", CARD, "--source", str(raw)]
    return main(["run", *source, "--models", models, "--out", str(out), *flags])


def test_a_run_writes_captions_and_a_second_one_asks_nothing(demo_raw, models, tmp_path, capsys):
    out, labels = tmp_path / "out", str(demo_raw / "attributes.json")
    with scripted(demo_raw) as server:
        file = models(server.url, concurrency=8, price_in=1.0)
        assert run(demo_raw, file, out, "--dry-run", "--json") == 0
        plan = json.loads(capsys.readouterr().out)
        assert plan["open"] == {"scripted-large": 396, "scripted-small": 396}
        assert plan["total"]["money"] > 0
        assert server.stats.requests == 0
        assert run(demo_raw, file, out, "--labels", labels, "--json") == 0
        first = json.loads(capsys.readouterr().out)
        before = server.stats.requests
        assert run(demo_raw, file, out, "--shards", str(tmp_path / "shards")) == 0
        assert server.stats.requests == before
    assert first["totals"]["statuses"] == {"answered": 792}
    assert first["totals"]["spent"]["tokens"] == 792 * 1200
    assert first["score"]["accuracy"] > 95
    shown = capsys.readouterr().out
    assert "asked     0 (nothing), 792 known before" in shown
    assert (out / "text" / "train_RGB.json").is_file()
    assert json.loads((out / "report.json").read_text())["captions"] == 396
    assert open_manifest(tmp_path / "shards").splits["train"].captions["RGB"] == 96


def test_the_key_is_in_no_file_that_a_run_writes(demo_raw, models, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("CAPTION_KEY", "sk-secret-123")
    with scripted(demo_raw, Script(key="sk-secret-123")) as server:
        file = models(server.url, names=["scripted-large"], api_key_env="CAPTION_KEY")
        assert run(demo_raw, file, tmp_path / "out", "--shards", str(tmp_path / "shards")) == 0
        assert server.stats.keys == {"sk-secret-123"}
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 10
    assert not [path for path in written if b"sk-secret" in path.read_bytes()]
    assert "sk-secret" not in "".join(capfd.readouterr())


def test_thresholds_move_without_endpoint_and_key(demo_raw, models, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CAPTION_KEY", "sk-secret-123")
    with scripted(demo_raw) as server:
        file = models(server.url, names=["scripted-large"], api_key_env="CAPTION_KEY")
        assert run(demo_raw, file, tmp_path / "out", "--budget.tokens", "301200", "--json") == 0
    first = json.loads(capsys.readouterr().out)
    monkeypatch.delenv("CAPTION_KEY")
    flags = ("--no-ask", "--merge.threshold", "0.95", "--rewrite", "scripted-large")
    assert run(demo_raw, file, tmp_path / "out", *flags) == 0
    shown = capsys.readouterr().out
    assert "asked     0 (nothing), 250 known before" in shown
    assert "LEFT      146 questions, as --no-ask asks nothing" in shown
    assert "rewritten 0 sentences, 0 refused by the check" in shown
    second = json.loads((tmp_path / "out" / "report.json").read_text())
    assert second["captions"] <= first["captions"] == 250
    assert sum(second["sources"].values()) < sum(first["sources"].values())
    assert second["settings"]["merge"]["threshold"] == 0.95


def test_a_dry_run_writes_nothing_and_disturbs_no_run(demo_raw, models, tmp_path, capsys):
    file = models("http://127.0.0.1:1/v1")
    assert run(demo_raw, file, tmp_path / "out", "--dry-run") == 0
    assert not (tmp_path / "out").exists()
    with Ledger(tmp_path / "out" / "ledger"):  # a run under way
        assert run(demo_raw, file, tmp_path / "out", "--dry-run") == 0
    assert "nothing was asked (--dry-run)" in capsys.readouterr().out


def test_a_data_set_without_captions_gets_them(models, tmp_path, capsys):
    """RGBNT100's layout: three tiles in a file, no captions, and a card that names none."""
    source = tmp_path / "source" / "rgbir"
    for folder, pids in (("bounding_box_train", (1, 2)), ("query", (51,)), ("bounding_box_test",
                         (51, 52))):  # fmt: skip
        (source / folder).mkdir(parents=True)
        for pid, camera in itertools.product(pids, (1, 2)):
            noise = np.random.default_rng(10 * pid + camera).integers(0, 256, (16, 96), np.uint8)
            Image.fromarray(noise).save(source / folder / f"{pid:04d}_c{camera:04d}_001.jpg")
    (source / "query" / "0052_c0001_001.jpg").write_bytes(b"no image")
    words = ["run", "--card", str(ROOT / "datasets" / "rgbnt100.toml"), "--out"]
    words += [str(tmp_path / "out"), "--source", str(source.parent), "--allow-count-mismatch"]
    with scripted(None) as server:
        words += ["--models", models(server.url)]
        with pytest.raises(ValueError, match=r"0052_c0001_001\.jpg .* leave such files out"):
            main(words)
        assert main([*words, "--on-bad", "skip"]) == 0
        shown = capsys.readouterr().out
        assert "30 have a caption" in shown
        assert "3 without: unreadable" in shown
        assert 'train = "text/train_{modality}.json", gallery = ' in shown
        shards = tmp_path / "shards"
        assert main([*words, "--on-bad", "skip", "--no-ask", "--shards", str(shards)]) == 0
        assert set(server.stats.answers.values()) == {1}
    manifest = open_manifest(shards)
    assert manifest.splits["query"].captions == {"RGB": 2, "NI": 2, "TI": 2}
    assert [skipped.file for skipped in manifest.file.findings.skipped] == [
        "rgbir/query/0052_c0001_001.jpg"
    ]
    thermal = " ".join(sentence for of_sample in manifest.sentences("train") for sentence in
                       of_sample[2])  # fmt: skip
    assert "roof" in thermal


def test_only_some_models_can_be_asked(demo_raw, models, tmp_path, capsys):
    with scripted(demo_raw) as server:
        file = models(server.url)
        text = Path(file).read_text()  # the key of a model that is not asked need not be there
        Path(file).write_text(text.replace("\n\n", '\napi_key_env = "NOT_SET_KEY"\n\n', 1))
        assert run(demo_raw, file, tmp_path / "out", "--only", "scripted-small", "--json") == 0
        assert {name.split()[0] for name in server.stats.answers} == {"scripted-small"}
        with pytest.raises(ValueError, match="did you mean scripted-small"):
            run(demo_raw, file, tmp_path / "out", "--only", "scripted-smal")
    capsys.readouterr()


def test_a_spent_budget_is_told_and_the_next_run_goes_on(demo_raw, models, tmp_path, capsys):
    with scripted(demo_raw) as server:
        file = models(server.url, names=["scripted-large"], concurrency=4)
        assert run(demo_raw, file, tmp_path / "out", "--budget.tokens", "121200") == 0
        shown = capsys.readouterr().out
        assert "asked     100 (100 answered), 0 known before" in shown
        assert "LEFT      296 questions, as the budget is spent; run again with more" in shown
        assert run(demo_raw, file, tmp_path / "out") == 0
        assert set(server.stats.answers.values()) == {1}
    assert "asked     296 (296 answered), 100 known before" in capsys.readouterr().out


def test_a_run_of_which_most_images_were_refused_fails_and_says_why(
    demo_raw, models, tmp_path, capsys
):
    with scripted(demo_raw, Script(always="400")) as server:
        file = models(server.url, names=["scripted-large"], concurrency=8)
        assert run(demo_raw, file, tmp_path / "out") == 1
        shown = capsys.readouterr()
        reason = "This model's maximum context length is N tokens, but your messages took N"
        assert re.search(f"396 refused: .*{reason}", shown.out)
        assert (
            "error: 396 of 396 images have no answer, which is more than 50% (--most-" in shown.err
        )
        assert run(demo_raw, file, tmp_path / "out", "--no-ask", "--json") == 1, "known from before"
        (told,) = json.loads(capsys.readouterr().out)["reasons"].items()
        assert re.search(f"refused: .*{reason}", told[0])
        assert told[1] == 396
        assert run(demo_raw, file, tmp_path / "out", "--most-failed", "1") == 0
        capsys.readouterr()


def test_a_few_refused_images_fail_no_run_and_are_counted_by_reason(
    demo_raw, models, tmp_path, capsys
):
    images = sorted((demo_raw / "train" / "RGB").iterdir())[:3]
    refused = frozenset(hashlib.sha256(path.read_bytes()).hexdigest() for path in images)
    with scripted(demo_raw, Script(refused=refused)) as server:
        file = models(server.url, names=["scripted-large"], concurrency=8)
        assert run(demo_raw, file, tmp_path / "out") == 0
        shown = capsys.readouterr().out
        assert re.search(r"3 refused: .*Image rejected by the content policy", shown)
        assert run(demo_raw, file, tmp_path / "out", "--most-failed", "0.001") == 1
    assert "3 of 396 images have no answer" in capsys.readouterr().err


def test_what_a_user_gets_wrong_ends_with_one_line_and_code_2(demo_raw, models, tmp_path):
    file = models("http://127.0.0.1:1/v1", names=["m"], api_key_env="NOT_SET_KEY")
    words = ["run", "--card", CARD, "--source", str(demo_raw), "--out", str(tmp_path / "out")]
    result = subprocess.run(
        [sys.executable, str(ROOT / "jobs" / "caption.py"), *words, "--models", file],
        capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert result.returncode == 2
    assert result.stderr.startswith("error: model m: the environment variable NOT_SET_KEY must hol")
    assert len(result.stderr.splitlines()) == 1


def test_an_endpoint_that_is_down_ends_a_run_before_anything_is_written(demo_raw, models, tmp_path):
    with pytest.raises(ConnectionError, match="cannot be reached"):
        run(demo_raw, models("http://127.0.0.1:1/v1", names=["m"]), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").rglob("*")] == ["ledger"]


def test_a_budget_of_nothing_is_refused(demo_raw, models, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        run(demo_raw, models("http://127.0.0.1:1/v1"), tmp_path / "out", "--budget.money", "0")
    assert ended.value.code == 2
    shown = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert "must be greater than 0, but got 0, with which nothing can be asked" in shown


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "--out is needed"),
        (("--out", "x"), "--card and --source are needed, or --data"),
        (("--out", "x", "--data", "y", "--card", CARD), "--data takes no --card or --source"),
    ],
)
def test_flags_that_do_not_fit_are_refused(models, flags, message):
    with pytest.raises(ValueError, match=message):
        main(["run", "--models", models("http://127.0.0.1:1/v1"), *flags])


def test_a_killed_run_goes_on_and_pays_for_nothing_twice(demo_raw, models, tmp_path):
    concurrency = 8
    with scripted(demo_raw, Script(latency=0.05)) as server:
        file = models(server.url, names=["scripted-large"], concurrency=concurrency)
        words = [sys.executable, str(ROOT / "jobs" / "caption.py"), "run", "--card", CARD]
        words += ["--source", str(demo_raw), "--models", file, "--out", str(tmp_path / "out")]
        process = subprocess.Popen(words, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
        try:
            deadline = time.monotonic() + 60
            while len(server.stats.answers) < 120 and time.monotonic() < deadline:
                time.sleep(0.01)
        finally:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        time.sleep(0.2)  # what was under way arrives
        paid = sum(server.stats.answers.values())
        assert 120 <= paid < 396, "killed in the middle"
        rows = sum(
            len(part.read_bytes().splitlines())
            for part in (tmp_path / "out" / "ledger").glob("*.jsonl")
        )
        assert paid - rows <= concurrency, "no more was lost than was under way"
        assert main(words[2:]) == 0
        assert len(server.stats.answers) == 396
        assert sum(server.stats.answers.values()) - 396 <= concurrency
        assert max(server.stats.answers.values()) <= 2


def test_the_commands_are_named(capsys):
    assert main([]) == 2, "as sweep.py without a word"
    assert main(["--help"]) == 0
    assert "quality" in capsys.readouterr().out
    with pytest.raises(ValueError, match="did you mean quality"):
        main(["qualty"])


def test_quality_prints_tables_and_draws(tmp_path, capsys):
    path = tmp_path / "train_RGB.json"
    path.write_text(json.dumps([{"item": "a.jpg", "description": "A male. He carries [item]."}]))
    assert main(["quality", str(path), "--figures", str(tmp_path / "figures")]) == 0
    shown = capsys.readouterr().out
    assert "train_RGB.json" in shown
    assert "A male. He carries [item]" not in shown
    assert "train RGB a: He carries [item]." in shown
    assert len(list((tmp_path / "figures").glob("*.png"))) == 4
    with pytest.raises(ValueError, match="caption files or folders are needed"):
        main(["quality"])


def test_quality_of_the_public_vehicle_captions_as_json(public_captions, capsys):
    assert main(["quality", str(public_captions / "MSVR310"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["schema"] == "vehicle"
    assert report["all"]["overflow"] > 90
