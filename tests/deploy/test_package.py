"""What ``ray job submit --working-dir .`` sends to the cluster."""

import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PLANTED = [
    ".git/objects/pack/big",
    ".venv/lib/big",
    "runs/first/checkpoints/best/model.safetensors",
    "demo/shards-0/train/part-0.parquet",
    "data/images.npy",
    "shards/rgbnt201/train/part-0.parquet",
    "elsewhere/my-shards/train/part-0.parquet",
    "elsewhere/weights.pt",
    "photos/0001.jpg",
    "next/__pycache__/config.cpython-311.pyc",
]


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    """The package that Ray's own client makes of a used checkout."""
    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import create_package

    folder = tmp_path_factory.mktemp("used") / "project"
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in [*filter(None, listed.stdout.split("\0"))]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / name)
    shutil.copyfile(ROOT / ".rayignore", folder / ".rayignore")
    for name in PLANTED:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(bytes(3_000_000))
    target = folder.parent / "package.zip"
    create_package(
        str(folder), target, include_gitignore=True, excludes=get_runtime_env_default_excludes()
    )
    return target


def test_the_package_is_small_and_leaves_out_data_runs_and_environments(packed):
    names = zipfile.ZipFile(packed).namelist()
    assert [name for name in names if name in PLANTED] == []
    assert not [name for name in names if name.startswith((".git/", ".venv", "tests/", "deploy/"))]
    assert packed.stat().st_size < 2_500_000, "Ray stores, it does not compress"


def test_the_package_holds_all_that_a_job_reads_from_the_project(packed):
    names = set(zipfile.ZipFile(packed).namelist())
    listed = subprocess.run(
        ["git", "ls-files", "next", "jobs", "datasets", "tune_spaces", "requirements.txt"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert set(listed.stdout.split()) <= names
