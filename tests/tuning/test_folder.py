"""The record of a sweep that an older version made."""

import json

import pytest

from jobs.sweep import main as sweep_job
from next.config import RunConfig, override
from next.data.shards.reader import open_manifest
from next.tuning.folder import read_standing
from next.tuning.report.report import report_sweep
from next.tuning.settings import SweepConfig
from next.tuning.sweep import prepare_sweep


def test_a_sweep_of_commit_a36958b_is_listed_reported_resumed_and_forked(
    tiny_config, older_runs, capsys
):
    folder = older_runs / "search"
    before = json.loads((folder / "sweep.json").read_text())
    where = ["--storage_path", str(older_runs)]
    assert sweep_job(["list", *where, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["finished"], row["best"], row["score"]) == (3, before["winner"], before["score"])

    report_sweep(folder)
    now = json.loads((folder / "sweep.json").read_text())
    assert (now["winner"], now["score"]) == (before["winner"], before["score"])
    page = (folder / "report.html").read_text()
    assert "Free axes" in page
    assert "The two best, query by query" in page

    resume = ["resume", "search", *where, "--trials", "4", "--dry-run", "--json"]
    assert sweep_job(resume) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["finished"], plan["trials"], plan["space_changed"]) == (3, 4, [])
    assert plan["data_digest"] == open_manifest(tiny_config.data.uri).digest
    assert sweep_job([*resume, "--fork", "next"]) == 0
    assert json.loads(capsys.readouterr().out)["inherited"] == 3
    assert read_standing(folder).base.model.semantic.text_skip is False


def test_a_sweep_does_not_keep_its_study_on_a_network_file_system(share):
    """Its tracking server is elsewhere, so that the study alone would be there."""
    kept = {"run.storage_path": str(share / "runs"), "tracking.uri": "http://127.0.0.1:9"}
    base = override(RunConfig(), kept | {"data.uri": "shards"})
    with pytest.raises(
        ValueError, match=r"run.storage_path must be on a disk of this machine for the study of a s"
    ):
        prepare_sweep(base, SweepConfig())
    assert list(share.iterdir()) == []
