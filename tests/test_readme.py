"""What the README tells a newcomer to type exists."""

import re
from collections import Counter
from pathlib import Path

from next.data.shards.reader import open_manifest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_every_path_that_the_readme_names_exists():
    named = set(re.findall(r"(?:jobs|datasets|tune_spaces|benchmarks)/[\w.]+\.\w+", README))
    assert len(named) > 5
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


def test_every_make_target_of_the_readme_is_in_the_makefile():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"make ([a-z-]+)", README))
    assert {"demo", "test"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_every_flag_of_the_readme_is_a_flag_of_its_job():
    from next.config import setting_names

    job_flags = {
        *("draw", "gallery", "images", "picture", "format"),
        *("card", "source", "out", "data", "dry-run", "check", "peek", "verify-order", "world"),
        *("space", "trials", "checkpoint", "missing", "model", "run", "when", "models", "recipe"),
    }
    flags = set(re.findall(r"--([a-z][\w.-]*)", README)) - {"help", "json"}
    settings = set(setting_names())
    assert {flag for flag in flags if flag not in settings} <= job_flags


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 200


def test_the_shards_are_read_by_other_tools_as_the_readme_says(demo_shards, tmp_path, monkeypatch):
    """All but the lines of Ray Data, which tests/data/shards/test_writer.py runs."""
    [snippet] = re.findall(r"```python\n(import pandas\n\npandas.*?)```", README, re.DOTALL)
    of_pandas, of_duckdb, of_ray = re.split(r"(?=^import )", snippet, flags=re.MULTILINE)[1:]
    assert 'ray.data.read_parquet("shards/rgbnt201/train")' in of_ray
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "rgbnt201").symlink_to(demo_shards)
    monkeypatch.chdir(tmp_path)
    labels = open_manifest(demo_shards).labels("train")
    names: dict = {}
    exec(of_pandas.replace("\npandas.", "\nframe = pandas."), names)
    assert names["frame"]["sample_id"].tolist() == labels.sample_id.tolist()
    assert names["frame"]["pid"].tolist() == labels.pid.tolist()
    exec(of_duckdb.replace("\nduckdb.", "\nanswer = duckdb."), names)
    assert dict(names["answer"].fetchall()) == dict(Counter(labels.pid.tolist()))
