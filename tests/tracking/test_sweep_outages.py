"""A real sweep on Ray whose MLflow server is killed and out of disk, and whose driver is killed."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from next.config import override, to_toml
from next.tracking.delivery.client import connect
from next.tracking.delivery.delivery import read_address
from next.tracking.journal import FILE_NAME
from next.tracking.server import start_server
from tests.tracking.conftest import child_run_ids
from tests.tracking.test_nothing_lost import fill, small_disk
from tests.tracking.test_run import in_journal, on_server
from tests.tuning.test_sweep import sweep_job, wait_for

TRIALS = 4
EPOCHS = 90
"""So that the sweep outlasts what happens to it, on a fast machine too."""


def journals(folder: Path) -> list[Path]:
    """Of the sweep's runs, so far."""
    return [*folder.glob(FILE_NAME), *folder.glob(f"trials/*/{FILE_NAME}")]


def logged(folder: Path) -> int:
    """Bytes of what the sweep's runs have logged."""
    return sum(path.stat().st_size for path in journals(folder))


def delivered(folder: Path) -> int:
    """Bytes of that which the server has acknowledged."""
    return sum(read_address(path.parent).delivered for path in journals(folder))


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_a_sweep_whose_server_and_driver_die_has_every_value_in_mlflow_once(tiny_config, tmp_path):
    config = override(
        tiny_config,
        {"run.name": "sweep", "tracking.enabled": True, "optim.epochs": EPOCHS},
    )
    settings, log = tmp_path / "settings.toml", tmp_path / "log.txt"
    settings.write_text(to_toml(config))
    folder = Path(config.run.storage_path) / "sweep"
    with small_disk(tmp_path / "disk", megabytes=48) as disk:
        store = disk / "mlflow"
        first = start_server(store)
        try:
            driver = sweep_job(
                *("--space", "tune_spaces/quick.py", "--data", str(config.data.uri)),
                *("--recipe", str(settings), "--trials", str(TRIALS), "--sweep.pruner", "none"),
                *("--sweep.concurrency", "1", "--sweep.noise_share", "0", "--sweep.race_share"),
                *("0", "--sweep.pictures", "1", "--tracking.uri", first.uri),
                home=tmp_path,
                log=log,
            )
            try:

                def goes_on() -> None:
                    """Training logs as it does with a server."""
                    now = logged(folder)
                    wait_for(lambda: logged(folder) > now + 20_000, driver, log)

                wait_for(lambda: delivered(folder) > 20_000, driver, log)
                os.killpg(first.pid, signal.SIGKILL)
                killed = time.monotonic()
                goes_on()
                time.sleep(max(0.0, killed + 30 - time.monotonic()))
                before = delivered(folder)
                assert before < logged(folder)
                with start_server(store) as second:
                    assert second.uri == first.uri
                    wait_for(lambda: delivered(folder) > before + 20_000, driver, log)
                    with pytest.raises(OSError, match="space"):
                        fill(disk / "filler")
                    goes_on()
                    driver.kill()
                    driver.wait()
                    (disk / "filler").unlink()
                    assert delivered(folder) < logged(folder)
                    assert not (folder / "sweep.json").exists(), "it was killed on the way"

                    storage = ("--storage_path", config.run.storage_path)
                    resumed = sweep_job("resume", "sweep", *storage, home=tmp_path, log=log)
                    try:
                        assert resumed.wait(timeout=600) == 0, log.read_text()[-3000:]
                    finally:
                        resumed.kill()
                    compare_with_journals(folder, second.uri)
            finally:
                driver.kill()
                driver.wait()
        finally:
            first.close()


def compare_with_journals(folder: Path, uri: str) -> None:
    """Every value of every journal is on the server, once, and nothing else is."""
    client, parent = connect(uri), read_address(folder)
    trials = [path.parent for path in folder.glob(f"trials/*/{FILE_NAME}")]
    assert len(trials) == TRIALS
    children = child_run_ids(uri, str(parent.experiment_id), str(parent.run_id))
    assert sorted(children) == sorted(str(read_address(trial).run_id) for trial in trials)
    for run in (folder, *trials):
        address = read_address(run)
        values = in_journal(run)
        assert set(values.values()) == {1}
        assert on_server(client, address.run_id) == values, run
        assert client.get_run(address.run_id).info.status == "FINISHED"
        assert address.delivered == (run / FILE_NAME).stat().st_size
        assert address.aside == []
    for trial in trials:
        run = client.get_run(read_address(trial).run_id)
        assert {"git.commit", "next.data_digest", "next.plan_hash"} <= set(run.data.tags)
        [data] = run.inputs.dataset_inputs
        assert json.loads(data.dataset.source)["digest"] == run.data.tags["next.data_digest"]
        assert data.dataset.schema
        assert "config.toml" in [found.path for found in client.list_artifacts(run.info.run_id)]
    pictured = [one for one in trials if list((one / "images").glob("figures~missing*.png"))]
    assert len(pictured) == 1
    shown = client.list_artifacts(read_address(pictured[0]).run_id, "images")
    assert any("figures~missing" in picture.path for picture in shown)
    assert sum(name == "val/mAP" for name, *_ in in_journal(trials[0])) == EPOCHS
