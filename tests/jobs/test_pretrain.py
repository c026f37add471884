"""The job in a process of its own: SIGTERM, exit code, and on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def command(shards: Path, cache: Path, folder: Path, *more: str) -> list[str]:
    flags = {
        "--data": shards,
        "--data.cache": cache,
        "--data.image_size": "32 16",
        "--run.storage_path": folder,
        "--run.name": "towers",
        "--tracking.enabled": "False",
        "--tracking.every_steps": "1",
        "--batch.instances": "2",
        "--threads": "1",
    }
    words = [word for name, value in flags.items() for word in (name, *str(value).split())]
    return [sys.executable, "jobs/pretrain.py", *words, *more]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_sigterm_ends_it_with_code_75_and_the_same_command_goes_on(
    demo_shards, cache_folder, tmp_path
):
    journal = tmp_path / "towers" / "journal.jsonl"
    start = command(demo_shards, cache_folder, tmp_path, "--optim.epochs", "3", "--json")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(start, cwd=ROOT, env=environment, **pipes)
    try:
        while not (journal.exists() and "train/loss" in journal.read_text()):
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)  # pytest ends a test that waits for ever
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=250)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 75, said
    done = subprocess.run(start, cwd=ROOT, env=environment, timeout=250, check=False, **pipes)
    assert done.returncode == 0, done.stderr
    assert "continuing after epoch" in done.stderr
    answer = json.loads(done.stdout)
    assert Path(answer["weights"]).is_file()
    assert "epoch 3/3" in done.stderr


def test_a_wrong_name_of_the_file_is_refused_before_torch_is_imported(demo_shards):
    start = [sys.executable, "jobs/pretrain.py", "--data", str(demo_shards), "--out", "towers.pt"]
    done = subprocess.run(start, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "error: --out must end in .safetensors, but got towers.pt\n"
