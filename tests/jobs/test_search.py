"""jobs/embed.py and jobs/search.py: from a checkpoint to the right identity."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from next.data.shards.reader import open_manifest
from next.retrieval.gallery import open_gallery

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def place(trained_checkpoint, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("search")
    (folder / "best").symlink_to(trained_checkpoint)
    return folder


@pytest.fixture
def job(monkeypatch, capsys):
    """Runs a job as a script within this process; gives its code, and what it says."""

    def run(name: str, *arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / "jobs" / name), run_name="__main__")
        return end.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def gallery(job, place, demo_shards) -> Path:
    out = place / "gallery"
    if not out.exists():
        code, said, error = job(
            *("embed.py", "--model", place / "best", "--data", demo_shards, "--out", out, "--json")
        )
        assert code == 0, error
        answer = json.loads(said)
        assert answer["embedded"] == answer["rows"] == len(open_gallery(out))
        assert answer["samples_per_second"] > 0
    return out


def test_images_find_the_identity_that_they_show(job, place, gallery, demo_raw, demo_shards):
    """Two images of three and no caption, as in the README."""
    labels = open_manifest(demo_shards).labels("gallery")
    row = 5
    files = [f"{m}={demo_raw}/test/{m}/{labels.sample_id[row]}.jpg" for m in ("RGB", "TI")]
    flags = ("--gallery", gallery, "--model", place / "best", "--json", "--images", *files)
    code, said, error = job("search.py", *flags)
    assert code == 0, error
    [query] = json.loads(said)["queries"]
    assert query["results"][0]["pid"] == labels.pid[row]
    known = ("--pid", labels.pid[row], "--camera", labels.camera[row])
    code, said, error = job("search.py", *flags, *known)
    assert code == 0, error
    [query] = json.loads(said)["queries"]
    same = [one["camera"] for one in query["results"] if one["pid"] == labels.pid[row]]
    assert labels.camera[row] not in same, "by the card's rule"
    assert query["removed_by_rule"] > 0


def test_rows_of_a_gallery_find_what_evaluations_find(job, place, gallery, demo_shards, tmp_path):
    picture = tmp_path / "sheet.png"
    code, said, error = job(
        *("search.py", "--gallery", gallery, "--queries", gallery, "--json", "--picture", picture)
    )
    assert code == 0, error
    answer = json.loads(said)
    assert answer["model"] == open_gallery(gallery).facts.model
    assert len(answer["queries"]) == answer["rows"]
    first = [one["results"][0]["pid"] == one["pid"] for one in answer["queries"]]
    code, said, _ = job(
        *("evaluate.py", "--checkpoint", place / "best", "--data", demo_shards, "--json"),
        *("--out", tmp_path),
    )
    # float16 may swap two that are as near as each other.
    assert 100 * np.mean(first) == pytest.approx(json.loads(said)["metrics"]["test/rank1"], abs=3)
    with Image.open(picture) as drawn:
        assert drawn.width > 500
        assert np.asarray(drawn.convert("L")).std() > 20, "there is something to see"


def test_the_table_names_model_gallery_and_samples(job, gallery):
    name = str(open_gallery(gallery).labels().sample_id[0])
    code, said, _ = job(
        *("search.py", "--gallery", gallery, "--queries", gallery, "--samples", name, "--top", 2),
        *("--rule", "none"),
    )
    assert code == 0
    lines = said.splitlines()
    assert open_gallery(gallery).facts.model[:16] in lines[0]
    assert lines[2] == f"query {name}"
    assert [line.split()[0] for line in lines[4:]] == ["1", "2"]
    assert all(line.split()[-1] != name for line in lines[4:]), "a query does not find itself"


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (["--images", "RGB=a.jpg"], "--images need --model, the model that embedded the gallery"),
        ([], "give --images, or --queries: what is to be searched for"),
        (["--queries", "G", "--samples", "nobody"], "has no sample 'nobody'"),
        (["--queries", "G", "--camera", "1"], "--pid, --camera and --captions are of --images"),
        (["--queries", "G", "--top", "0"], "--top must be 1 or more, but got 0"),
        (["--queries", "none"], "there is no finished gallery; write one with jobs/embed.py"),
        (["--images", "RGB", "--model", "M"], "--images must be MODALITY=VALUE, each once"),
        (["--images", "SAR=a.jpg", "--model", "M"], "image_SAR names a modality that the model la"),
        (["--images", "RGB=a.jpg", "--model", "M"], "column image_RGB: there is no file a.jpg"),
    ],
)
def test_what_cannot_be_searched_is_one_line_and_code_2(job, place, gallery, flags, error):
    named = {"G": gallery, "M": place / "best"}
    code, said, told = job("search.py", "--gallery", gallery, *(named.get(f, f) for f in flags))
    assert (code, said) == (2, "")
    assert error in told
    assert len(told.splitlines()) == 1


def test_what_cannot_be_embedded_is_one_line_and_code_2(job, place, gallery, demo_shards, tmp_path):
    model = ("embed.py", "--model", place / "best")
    for flags, error in [
        ((), "give --data, or --card and --source: what is to be embedded"),
        (("--data", demo_shards, "--workers", 0), "--workers must be 1 or more, but got 0"),
    ]:
        code, _, told = job(*model, "--out", tmp_path / "g", *flags)
        assert code == 2
        assert error in told
    code, _, told = job(
        *model, "--data", demo_shards, "--out", gallery, "--precision", "float32", "--dry-run"
    )
    assert code == 2
    assert "is a part of another gallery: precision float16 instead of float32" in told


def test_a_dry_run_says_what_is_left(job, place, gallery, demo_shards, tmp_path):
    model = ("embed.py", "--model", place / "best", "--data", demo_shards, "--json", "--dry-run")
    for out, there in ((gallery, 1), (tmp_path / "new", 0)):
        code, said, _ = job(*model, "--out", out)
        assert code == 0
        answer = json.loads(said)
        assert (answer["parts"], answer["parts_there"]) == (1, there)
    assert not (tmp_path / "new").exists()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_two_workers_write_the_gallery_of_one_process(job, place, gallery, demo_raw, tmp_path):
    code, said, error = job(
        *("embed.py", "--model", place / "best", "--out", tmp_path / "g", "--workers", 2, "--json"),
        *("--card", ROOT / "datasets" / "demo.toml", "--source", demo_raw),
    )
    assert code == 0, error
    ours, theirs = open_gallery(tmp_path / "g"), open_gallery(gallery)
    assert json.loads(said)["rows"] == len(theirs)
    assert ours.facts.model == theirs.facts.model
    rows = range(len(theirs))
    np.testing.assert_allclose(ours.embeddings(rows), theirs.embeddings(rows), atol=1e-3)
