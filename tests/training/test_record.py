"""What a run leaves beside its curves."""

import pytest

from next.config import override
from next.data.shards import open_manifest
from next.tracking.journal import Artifact, read_records
from next.tracking.run import open_run
from next.training import record
from next.training.inputs import resolve


@pytest.mark.parametrize("sent", [False, True])
def test_what_the_checkout_has_beyond_its_commit_is_kept_and_sent_on_request_alone(
    tiny_config, tmp_path, monkeypatch, sent
):
    monkeypatch.setattr(record, "provenance_diff", lambda: "+not yet published\n")
    manifest = open_manifest(tiny_config.data.uri)
    assert tiny_config.tracking.git_diff is False
    config = resolve(override(tiny_config, {"tracking.git_diff": sent}), manifest)
    folder = tmp_path / "run"
    with open_run(uri=None, experiment="demo", name="r", folder=folder) as run:
        record.record_inputs(run, config, manifest)
    assert (folder / "artifacts" / "git" / "diff.txt").read_text() == "+not yet published\n"
    records = (entry.record for entry in read_records(folder))
    named = [one.path for one in records if isinstance(one, Artifact)]
    assert named == ["artifacts/config.toml"] + ["artifacts/git/diff.txt"] * sent
