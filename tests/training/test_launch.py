"""Whole runs, in this process and on two workers of Ray Train, logged to a real MLflow."""

import json
import os
import re
import select
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
import urllib.parse
from pathlib import Path

import pytest
import torch

from next.config import override
from next.data.shards.reader import open_manifest
from next.tracking.run import read_metrics, start_server
from next.training.checkpointing.checkpoint import load_network, read_progress
from next.training.folder import claim_folder
from next.training.inputs import resolve
from next.training.launch import launch, read_history
from next.training.results.registration import read_card
from tests.exposure import exposed, leaks, planted

ROOT = Path(__file__).resolve().parents[2]
RAY_WARNINGS = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")


def test_a_run_leaves_scores_pictures_checkpoints_and_its_configuration(tiny_config):
    result = launch(tiny_config)
    files = {path.relative_to(result.folder).as_posix() for path in result.folder.rglob("*.*")}
    assert {
        "config.toml",
        "result.json",
        "journal.jsonl",
        "checkpoints/step-00000011-evaluated/state.json",
        "figures/learning_curves.png",
        "figures/cmc.png",
        "figures/rank_lists.png",
        "figures/embedding_map.png",
        "figures/confusion.png",
        "figures/expert_usage.png",
        "figures/attribute_usage.png",
        "figures/routing_maps.png",
    } <= files
    assert (result.folder / "checkpoints" / "best").resolve() == result.checkpoint.resolve()
    stored = json.loads((result.folder / "result.json").read_text())
    assert stored["test"] == result.assessment.metrics
    assert 0 < stored["test"]["test/mAP"] < 100
    assert stored["losses"] == result.outcome.losses


def test_the_same_name_continues_and_other_settings_are_refused_with_a_list(tiny_config):
    first = launch(tiny_config)
    again = launch(tiny_config)
    assert again.outcome.losses == []
    assert again.assessment.metrics == first.assessment.metrics
    changed = override(tiny_config, {"optim.lr": 5e-4, "model.semantic.experts": 4})
    with pytest.raises(
        ValueError, match=r"(?s)run 'tiny'.*experts: 2 -> 4.*optim.lr: 0.001 -> 0.0005"
    ):
        launch(changed)
    fresh = launch(override(changed, {"run.fresh": True}))
    assert fresh.outcome.step == len(fresh.outcome.losses)
    assert len(list(first.folder.parent.glob("tiny.*"))) == 1, "the earlier run is kept"


def test_a_run_that_is_finished_says_so_and_ends_well(tiny_config, caplog):
    caplog.set_level("INFO")
    first = launch(tiny_config)
    again = launch(override(tiny_config, {"scaling.num_workers": 2}))  # which starts no Ray
    assert "measured on held-out identities: 4 identities with" in caplog.text
    assert "WARNING: held-out identities: few: settings that differ by less than" in caplog.text
    assert "run tiny is finished (epoch 3, step 11): it is assessed again" in caplog.text
    assert again.assessment.metrics == first.assessment.metrics
    assert again.outcome == first.outcome._replace(losses=[])


def test_checkpoints_of_other_settings_or_data_are_refused_before_anything_starts(
    tiny_config, tmp_path
):
    """Checkpoints may outlive the run's folder, where the configuration is looked at first."""
    apart = {"checkpoint.storage_path": str(tmp_path / "kept"), "optim.epochs": 1}
    launch(override(tiny_config, apart))
    shutil.rmtree(tiny_config.run.storage_path)
    with pytest.raises(
        ValueError, match=r"(?s)checkpoints in .*kept/tiny are of another model.*experts: 2 -> 3"
    ):
        launch(override(tiny_config, apart | {"model.semantic.experts": 3}))
    assert not Path(tiny_config.run.storage_path).exists(), "a refused command writes nothing"
    resumed = launch(override(tiny_config, apart))
    assert resumed.outcome.losses == []
    logged = [row["step"] for row in read_metrics(resumed.folder) if "train/loss" in row["values"]]
    assert logged == list(range(1, resumed.outcome.step + 1)), "the journal is in the store, too"
    shutil.rmtree(tiny_config.run.storage_path)
    for name in ("journal", "artifacts", "figures", "images", "tables"):
        shutil.rmtree(tmp_path / "kept" / "tiny" / name)
    older = launch(override(tiny_config, apart))  # as a store of checkpoints alone has it
    assert older.outcome == resumed.outcome
    fresh = launch(override(tiny_config, apart | {"run.fresh": True}))
    assert fresh.outcome.losses
    assert len(list((tmp_path / "kept").iterdir())) == 2, "the earlier ones are set aside"


class Relay(socketserver.ThreadingTCPServer):
    """Stands before a server, and can be gone for a while."""

    allow_reuse_address = True
    daemon_threads = True
    gone = False

    def __init__(self, port: int) -> None:
        self.target = port
        super().__init__(("127.0.0.1", 0), self.pass_on)
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def pass_on(self, client, address, server) -> None:
        if self.gone:
            return
        with socket.create_connection(("127.0.0.1", self.target)) as upstream:
            ends = {client: upstream, upstream: client}
            while not self.gone:
                for end in select.select(list(ends), [], [], 0.1)[0]:
                    data = end.recv(1 << 16)
                    if not data:
                        return
                    ends[end].sendall(data)


@pytest.mark.slow
def test_a_storage_that_is_gone_for_thirty_seconds_changes_nothing(
    tiny_config, s3, s3_server, monkeypatch, tmp_path, caplog
):
    relay = Relay(urllib.parse.urlsplit(s3_server.endpoint).port)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{relay.server_address[1]}")
    stored = override(
        tiny_config, {"checkpoint.storage_path": f"{s3}/kept", "checkpoint.every_steps": 2}
    )
    undisturbed = launch(override(stored, {"run.name": "undisturbed"}))

    def outage() -> None:
        folder = Path(stored.run.storage_path) / "tiny"
        while not (folder / "journal.jsonl").exists() or len(read_metrics(folder)) < 3:
            time.sleep(0.01)
        relay.gone, began = True, time.monotonic()
        while "cannot be written" not in caplog.text or time.monotonic() < began + 30:
            time.sleep(0.05)
        relay.gone = False

    cut = threading.Thread(target=outage)
    cut.start()
    try:
        result = launch(stored)
    finally:
        cut.join(60)
        relay.shutdown()
        relay.server_close()
    assert "cannot be reached" in caplog.text
    assert "is written now" in caplog.text
    assert result.outcome == undisturbed.outcome
    assert result.assessment.metrics == undisturbed.assessment.metrics
    steps = [row["step"] for row in read_metrics(result.folder) if "train/loss" in row["values"]]
    assert steps == list(range(1, result.outcome.step + 1))


@pytest.mark.slow
def test_a_run_whose_tracking_server_hangs_has_its_test_scores_and_says_how_to_deliver_the_rest(
    tiny_config, caplog
):
    config = override(tiny_config, {"tracking.enabled": True, "optim.epochs": 6})
    store = Path(config.run.storage_path, "mlflow")

    def stop_the_server() -> None:
        while not Path(config.run.storage_path, "tiny", "run.json").exists():
            time.sleep(0.01)  # so that it has answered this process
        os.kill(json.loads((store / "server.json").read_text())["pid"], signal.SIGSTOP)

    with start_server(store):  # or it would be stopped while it makes its database
        stopping = threading.Thread(target=stop_the_server)
        stopping.start()
        result = launch(config)
        stopping.join()
    stored = json.loads((result.folder / "result.json").read_text())
    assert stored["test"] == result.assessment.metrics
    logged = {name for row in read_metrics(result.folder) for name in row["values"]}
    assert "test/mAP" in logged
    assert "must have one writer" not in caplog.text
    assert "are not on the tracking server, which does not answer" in caplog.text
    command = re.findall(r"and so does: (.*)", caplog.text)[-1]
    assert command.endswith(f"-m next.tracking.replay {result.folder} --local {store}")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data.uri": None}, r"data.uri is not set; give the folder that jobs/prepare.py wrote"),
        ({"data.uri": "/no/where"}, r"/no/where/manifest.json: there is no manifest"),
        ({"batch.identities": 50}, r"must not exceed the \d+ train identities .*, but got 50"),
        ({"data.modalities": ("RGB", "TIR")}, r"names 'TIR', which demo lacks; it has RGB, NI, TI"),
        ({"model.identities": 3}, r"model.identities is taken from the data and must be"),
        ({"scaling.use_gpu": True}, r"torch sees no GPU here"),
        (
            {"tracking.enabled": True, "tracking.uri": "sqlite:///x.db"},
            r"must be an http:// or https:// address",
        ),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_written(tiny_config, settings, message):
    if "scaling.use_gpu" in settings and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises((ValueError, OSError), match=message):
        launch(override(tiny_config, settings))
    assert not Path(tiny_config.run.storage_path, "tiny").exists(), "the name is free"


def test_a_run_keeps_and_assesses_the_epoch_that_its_selection_metric_chose(tiny_config):
    """The smallest mAP here, which is never the epoch that mAP itself would choose."""
    config = override(tiny_config, {"selection.mode": "min", "run.name": "worst"})
    result = launch(config)
    scores = [row["val/mAP"] for _, row in read_history(result.folder) if "val/mAP" in row]
    assert len(set(scores)) > 1
    assert read_progress(result.checkpoint).metrics["val/mAP"] == min(scores)
    stored = json.loads((result.folder / "result.json").read_text())
    assert stored["selection"] == {"val/mAP": min(scores)}
    card = read_card(result.folder)
    assert card.scores["val/mAP"] == min(scores)
    record = result.folder / "card.json"
    record.write_text(record.read_text().replace(card.data_digest[:8], "00000000", 1))
    with pytest.raises(ValueError, match=r"card.json is damaged .*; give the command of the run"):
        read_card(result.folder)
    record.write_text("{")
    with pytest.raises(ValueError, match=r"card.json is damaged"):
        read_card(result.folder)


def test_a_metric_that_is_never_reported_is_refused_by_its_setting(tiny_config):
    with pytest.raises(ValueError, match=r"selection.metric: .*'val/mAP'.*but got 'val/map'"):
        override(tiny_config, {"selection.metric": "val/map"})


def test_a_new_run_is_named_by_its_time(tiny_config):
    config = resolve(tiny_config, open_manifest(tiny_config.data.uri))
    assert claim_folder(override(config, {"run.name": None})).name.startswith("run-")


SCRIPT = """
import sys
from pathlib import Path
from next.config import from_toml
from next.training.launch import launch
if __name__ == "__main__":
    result = launch(from_toml(Path(sys.argv[1]).read_text()))
    print("URL", result.url)
"""


def run_script(folder: Path, config, **environment: str) -> subprocess.CompletedProcess:
    """Launch in a process of its own: a Ray of its own, which ends with it."""
    from next.config import to_toml

    script, settings = folder / "run.py", folder / "settings.toml"
    script.write_text(SCRIPT)
    settings.write_text(to_toml(config))
    return subprocess.run(
        [sys.executable, str(script), str(settings)],
        env=os.environ | {"HOME": str(folder), "RAY_TMPDIR": "/tmp", **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=560,
        check=False,
    )


@pytest.mark.ray
@pytest.mark.slow
def test_two_workers_of_ray_train_come_to_what_one_process_comes_to(tiny_config, tmp_path):
    alone = launch(tiny_config)
    settings = {
        "run.name": "two",
        "scaling.num_workers": 2,
        "scaling.cpus_per_worker": 0.5,
        "tracking.enabled": True,
    }
    hidden = planted()
    with exposed(tmp_path) as seen:  # Ray, its workers, their process group, and MLflow
        done = run_script(tmp_path, override(tiny_config, settings), **hidden)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "URL http://127.0.0.1:" in done.stdout
    assert len(seen.places) > 12
    assert seen.beyond_loopback() == []
    folder = Path(tiny_config.run.storage_path) / "two"
    hidden["RAY_AUTH_TOKEN"] = os.environ["RAY_AUTH_TOKEN"]
    assert seen.told(hidden) == []
    assert leaks([tmp_path, folder.parent], hidden) == []
    assert not any(secret in done.stdout + done.stderr for secret in hidden.values())
    stored = json.loads((folder / "result.json").read_text())
    torch.testing.assert_close(
        torch.tensor(stored["losses"]), torch.tensor(alone.outcome.losses), rtol=2e-3, atol=2e-3
    )
    assert abs(stored["test"]["test/mAP"] - alone.assessment.metrics["test/mAP"]) < 3
    load_network(folder / "checkpoints" / "best")


@pytest.mark.parametrize("share", ["nfs4"], indirect=True)
def test_a_run_keeps_no_mlflow_of_its_own_on_a_network_file_system(tiny_config, share):
    there = {"run.storage_path": str(share / "runs"), "tracking.enabled": True}
    with pytest.raises(
        ValueError, match=r"run.storage_path must be on a disk of this machine for MLflow's databas"
    ):
        launch(override(tiny_config, there))
    assert list(share.rglob("*.db")) == []
