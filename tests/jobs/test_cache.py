import json
import runpy
from pathlib import Path

import pytest

from next.data.loading.cache import open_cache
from next.data.shards.reader import open_manifest

main = runpy.run_path(str(Path(__file__).resolve().parents[2] / "jobs" / "cache.py"))["main"]


@pytest.fixture
def folder(demo_shards, tmp_path) -> Path:
    """A cache that nobody reads, and the name of one that is read until the test ends."""
    open_cache(open_manifest(demo_shards), "train", (32, 16), tmp_path)
    return tmp_path


def test_the_table_tells_what_is_there_and_what_is_in_use(folder, demo_shards, capsys):
    mine = open_cache(open_manifest(demo_shards), "gallery", (32, 16), folder)
    assert main(["--cache", str(folder)]) == 0
    first, second, total = capsys.readouterr().out.splitlines()
    assert "in use  demo gallery, " in first
    assert "-       demo train, " in second
    assert str(folder) in total
    assert mine.path.exists()


def test_a_limit_removes_what_is_not_in_use(folder, demo_shards, capsys):
    mine = open_cache(open_manifest(demo_shards), "gallery", (32, 16), folder)
    assert main(["--cache", str(folder), "--limit", "0", "--dry-run"]) == 0
    assert "would remove 1: 0.00 GB" in capsys.readouterr().out
    assert main(["--cache", str(folder), "--limit", "0", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    (removed,) = answer["removed"]
    assert removed["about"].startswith("demo train, ")
    (left,) = answer["entries"]
    assert left["in_use"]
    assert left["path"] == str(mine.path)


def test_a_negative_limit_is_refused(folder):
    with pytest.raises(ValueError, match=r"--limit must be 0 or more gigabytes, but got -1"):
        main(["--cache", str(folder), "--limit", "-1"])
