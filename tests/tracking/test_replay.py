"""A run's journal that is brought to a server by hand."""

import sys

import pytest

from jobs.doctor import main as doctor_job
from next.tracking.registry.versions import registry_server
from next.tracking.replay import _main


@pytest.mark.parametrize("share", ["virtiofs"], indirect=True)
def test_no_local_server_is_started_on_a_network_file_system(share, monkeypatch):
    told = "must be on a disk of this machine for MLflow's database"
    run = share / "first"
    monkeypatch.setattr(sys, "argv", ["replay", str(run), "--local", str(share / "mlflow")])
    with pytest.raises(SystemExit, match=rf"--local {told}"):
        _main()
    with pytest.raises(ValueError, match=rf"the folder above --replay {told}"):
        doctor_job(["--replay", str(run)])
    assert list(share.iterdir()) == []
    (share / "mlflow").mkdir()
    (share / "mlflow" / "mlflow.db").touch()
    with (
        pytest.raises(ValueError, match=rf"--storage_path {told}"),
        registry_server(None, share),
    ):
        raise AssertionError("it has started")
    assert [path.name for path in (share / "mlflow").iterdir()] == ["mlflow.db"]
