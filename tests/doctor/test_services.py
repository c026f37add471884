"""Each mistake around a run made on purpose, with real servers, and the check that finds it."""

import email.utils
import http.server
import os
import shutil
import socket
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from next.config import RunConfig, override
from next.doctor import cluster, machine, services
from next.doctor.examination import CHECKS, examine, table
from next.doctor.finding import Finding, Inquiry
from next.storage import require_own_disk
from next.tracking.run import open_run, start_server
from next.tuning.settings import SweepConfig

LOCK = Path(__file__).resolve().parents[2] / "requirements.txt"


def inquire(settings: dict | None = None) -> Inquiry:
    return Inquiry(override(RunConfig(), settings or {}), LOCK)


@pytest.fixture(autouse=True)
def _shell_that_names_no_cluster(monkeypatch, tmp_path):
    names = ["RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"]
    for name in [*names, "RAY_AUTH_TOKEN_PATH"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


def test_a_cluster_without_a_token_is_found(monkeypatch, tmp_path):
    assert services.token(inquire()).verdict == "ok", "a Ray of its own makes its own"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:1")
    found = services.token(inquire())
    assert (found.verdict, found.mend.split("  #")[0]) == ("error", "export RAY_AUTH_MODE=token")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    found = services.token(inquire())
    assert "there is neither RAY_AUTH_TOKEN nor" in found.found
    assert "ray get-auth-token --generate" in found.mend
    file = tmp_path / ".ray" / "auth_token"
    file.parent.mkdir()
    file.write_text("ab" * 32)
    file.chmod(0o644)
    found = services.token(inquire())
    assert (found.verdict, found.mend) == ("error", f"chmod 600 {file}")
    file.chmod(0o600)
    assert services.token(inquire()).verdict == "ok"


def test_a_cluster_that_does_not_answer_is_found(monkeypatch):
    assert services.cluster(inquire()).verdict == "skipped"
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.7:6379")
    assert services.cluster_address() == "http://10.0.0.7:8265"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:1")
    found = services.cluster(inquire())
    assert "nobody answers as a Ray head at http://127.0.0.1:1" in found.found
    assert "export RAY_API_SERVER_ADDRESS=" in found.mend
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://user:hunter2@127.0.0.1:1")
    assert "http://***@127.0.0.1:1" in services.cluster(inquire()).found


def test_more_workers_than_cores_share_them_and_missing_gpus_are_an_error():
    assert cluster.capacity(inquire()).verdict == "ok"
    found = cluster.capacity(inquire({"scaling.num_workers": 64}))
    assert found.verdict == "warning"
    assert "asked: 64 x (1 CPU, 0 GPU); this machine has" in found.found
    wanted = torch.cuda.device_count() + 1
    settings = {"scaling.num_workers": wanted, "scaling.use_gpu": True, "batch.identities": 8}
    found = cluster.capacity(inquire(settings))
    assert found.verdict == "error"
    assert f"and {wanted - 1} GPUs that torch sees" in found.found
    assert found.mend.startswith("--scaling.")


def test_storage_that_cannot_be_written_is_found_and_none_is_made(tmp_path, s3):
    good = cluster.storage(inquire({"run.storage_path": str(tmp_path / "a" / "runs")}))
    assert good.verdict == "ok"
    assert not (tmp_path / "a").exists(), "a check leaves nothing behind"
    (tmp_path / "file").write_text("")
    found = cluster.storage(inquire({"run.storage_path": str(tmp_path / "file" / "runs")}))
    assert found.verdict == "error"
    assert cluster.storage(inquire({"checkpoint.storage_path": f"{s3}/c"})).verdict == "ok"
    found = cluster.storage(inquire({"checkpoint.storage_path": "s3://no-such-bucket-here/c"}))
    assert found.verdict == "error"
    assert "no-such-bucket-here" in found.found


@pytest.mark.slow
def test_a_tracking_server_that_is_away_or_refuses_the_host_is_found(tmp_path):
    assert services.tracking(inquire()).verdict == "ok"
    assert services.tracking(inquire({"tracking.enabled": False})).verdict == "skipped"
    with start_server(tmp_path / "mlflow") as server:
        assert services.tracking(inquire({"tracking.uri": server.uri})).verdict == "ok"
        port = server.uri.rpartition(":")[2]
        # 127.0.0.1, written so that the server does not know the name.
        found = services.tracking(inquire({"tracking.uri": f"http://2130706433:{port}"}))
        assert found.verdict == "error"
        assert "Invalid Host header" in found.found
        assert found.mend == f"mlflow server ... --allowed-hosts '2130706433,2130706433:{port}'"
    found = services.tracking(inquire({"tracking.uri": server.uri}))
    assert "must take runs, but it does not" in found.found
    assert found.mend.startswith(f"curl {server.uri}/health")


@contextmanager
def serving(ahead: float):
    """A server whose clock is so many seconds ahead."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def date_time_string(self, timestamp=None):
            return email.utils.formatdate(time.time() + ahead, usegmt=True)

        def log_message(self, *words):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_a_clock_that_differs_from_a_servers_is_found():
    with serving(ahead=0) as uri:
        found = services.clock(inquire({"tracking.uri": uri}))
        assert (found.verdict, found.found.split(" and")[0]) == ("ok", "agrees with 1 servers")
    with serving(ahead=-3600) as uri:
        found = services.clock(inquire({"tracking.uri": uri}))
    assert found.verdict == "error"
    assert "the clock of the tracking server is 3" in found.found
    assert "in the past of this machine's clock" in found.found


def test_missing_damaged_and_other_data_are_found(demo_shards, tmp_path):
    assert services.data(inquire()).verdict == "skipped"
    found = services.data(inquire({"data.uri": str(tmp_path / "none")}))
    assert "there is no manifest" in found.found
    assert "jobs/prepare.py" in found.mend
    copy = tmp_path / "shards"
    shutil.copytree(demo_shards, copy)
    runs = {"run.storage_path": str(tmp_path / "runs"), "run.name": "first"}
    settings = {"data.uri": str(copy)} | runs
    assert "every byte of 2 of 2 shards agrees" in services.data(inquire(settings)).found
    tags = {"next.data_digest": "0" * 64}
    where = {"uri": None, "experiment": "demo", "name": "first"}
    open_run(**where, folder=tmp_path / "runs" / "first", tags=tags).close()
    found = services.data(inquire(settings))
    assert found.verdict == "error"
    assert "run first was trained on digest 0000000000000000, these shards have" in found.found
    shard = next(copy.rglob("00000.parquet"))
    changed = bytearray(shard.read_bytes())
    changed[len(changed) // 2] ^= 1
    shard.write_bytes(changed)
    found = services.data(inquire(settings | {"run.name": "second"}))
    assert found.verdict == "error"
    assert "its sha256 is not the manifest's" in found.found


def test_few_queries_are_warned_of_and_none_is_an_error(demo_shards, tmp_path):
    assert services.queries(inquire()).verdict == "skipped"
    assert services.queries(inquire({"data.uri": str(tmp_path / "none")})).verdict == "skipped"
    settings = {"data.uri": str(demo_shards), "selection.holdout": 0.34}
    found = services.queries(inquire(settings))
    assert found.verdict == "warning"
    assert "held-out identities: 4 identities with 32 queries; standard error" in found.found
    assert "few: settings that differ by less than 9.8 mAP cannot be told apart" in found.found
    found = services.queries(inquire(settings | {"selection.folds": 7}))
    assert found.verdict == "error"
    assert "selection.folds = 7 needs at least 14 train identities that can be" in found.found


def test_a_check_that_hangs_is_an_error_and_holds_nobody_up(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, says nothing
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", uri)
        findings = {found.check: found for found in examine(inquire(), seconds=1.5)}
    assert list(findings) == list(CHECKS)
    assert findings["cluster"].found.startswith("no answer within 2 s")
    assert findings["versions"].verdict == "ok"


@pytest.mark.parametrize(("load", "verdict"), [(0.5, "error"), (50.0, "warning")])
def test_on_a_busy_machine_a_check_that_does_not_end_is_no_error(monkeypatch, load, verdict):
    wake = threading.Event()
    monkeypatch.setitem(CHECKS, "cluster", lambda inquiry: wake.wait(60))
    monkeypatch.setattr(os, "getloadavg", lambda: (load * len(os.sched_getaffinity(0)), 0.0, 0.0))
    found = {found.check: found for found in examine(inquire(), seconds=0.5)}["cluster"]
    wake.set()
    assert found.verdict == verdict
    assert ("what it asks hangs" if verdict == "error" else "on a busy machine") in found.found


def test_a_check_that_breaks_is_an_error_of_its_own_and_the_table_shows_what_mends(tmp_path):
    (tmp_path / "file").write_text("")
    findings = examine(inquire({"data.cache": str(tmp_path / "file")}))
    broken = next(found for found in findings if found.check == "cache")
    assert broken.verdict == "error"
    assert "data.cache must be a folder" in broken.found
    lines = table([Finding("token", "error", "none", "chmod"), Finding("data", "ok", "fine")])
    assert lines == [
        "ERROR token          none",
        "                     mend: chmod",
        "ok    data           fine",
    ]


MOUNTS = """\
22 1 0:21 / / rw,relatime - ext4 /dev/sda1 rw
23 22 0:40 / {share} rw,relatime shared:1 - nfs4 10.0.0.1:/srv rw
24 23 0:41 / {share}/disk rw - ext4 /dev/sdb1 rw
"""


def test_a_database_on_a_network_file_system_is_found_and_refused(monkeypatch, tmp_path):
    share = tmp_path / "share"
    (tmp_path / "mounts").write_text(MOUNTS.format(share=share))
    monkeypatch.setattr("next.storage._MOUNTS", tmp_path / "mounts")
    on_share = {"run.storage_path": str(share / "runs")}
    found = machine.databases(inquire(on_share))
    assert found.verdict == "error"
    assert f"{share}/runs is on a network file system (nfs4), where SQLite's" in found.found
    assert found.mend.startswith("--run.storage_path LOCAL-FOLDER --checkpoint.storage_path s3://")
    away = {"tracking.uri": "http://mlflow:5000"}
    assert machine.databases(inquire(on_share | away)).verdict == "skipped"
    sweeping = inquire(on_share | away)._replace(sweep=SweepConfig())
    assert "log in study.db is damaged" in machine.databases(sweeping).found
    on_disk = {"run.storage_path": str(share / "disk" / "runs")}
    assert machine.databases(inquire(on_disk)).verdict == "ok", "a disk below the share"
    with pytest.raises(ValueError, match=r"run.storage_path must be on a disk of this machine"):
        require_own_disk(share / "runs", "run.storage_path", "the study of a sweep")


def test_an_nvidia_driver_that_is_too_old_for_the_cuda_of_torch_is_found(monkeypatch, tmp_path):
    line = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  {}  Tue Mar  4\n"
    file = tmp_path / "version"
    monkeypatch.setattr(cluster, "_DRIVER", file)
    assert cluster.gpu_driver(inquire()).verdict == "skipped"
    monkeypatch.setattr(cluster, "_cuda_version", lambda: "13.2.86")
    assert "no machine has an NVIDIA driver" in cluster.gpu_driver(inquire()).found
    file.write_text(line.format("570.86.15"))
    found = cluster.gpu_driver(inquire())
    assert found.verdict == "error"
    assert "needs the NVIDIA driver 580 or newer, but: this machine 570.86.15" in found.found
    opened = line.format("580.65.06").replace("Kernel Module", "Open Kernel Module for x86_64")
    file.write_text(opened)
    assert cluster.gpu_driver(inquire()).verdict == "ok"


@pytest.fixture
def surveyed(monkeypatch) -> dict:
    """What two nodes of a cluster told the survey, beside their head."""
    told = {"gpu_driver": None, "versions": {"torch": "2.15.0"}}
    nodes = {f"10.0.0.{number}": told | {"clock": [0.0, 0.0, 0.0]} for number in (2, 3)}
    survey = {"most": None, "driver": dict(told), "weights": [], "nodes": nodes, "silent": {}}
    listed = [{"resources_total": {"CPU": 2.0}, "is_head_node": one == 0} for one in range(3)]
    monkeypatch.setattr(cluster, "living_nodes", lambda: listed)
    monkeypatch.setattr(cluster, "_survey", lambda inquiry: survey)
    return survey


def test_a_node_that_does_not_answer_the_survey_is_named(surveyed):
    assert cluster.nodes(inquire()).verdict == "ok"
    surveyed["silent"]["10.0.0.3"] = "did not say within 4 s what it has"
    found = cluster.nodes(inquire())
    assert (found.verdict, found.found) == (
        "warning",
        "10.0.0.3 did not say within 4 s what it has",
    )


def test_weights_that_do_not_reach_every_node_are_found(surveyed):
    given = {"model.backbone.pretrained": "/srv/tower.pt"}
    found = cluster.weights(inquire(given))
    assert (found.verdict, found.mend) == ("error", "scp /srv/tower.pt HEAD:/srv/tower.pt")
    surveyed["weights"] = ["/srv/tower.pt"]
    found = cluster.weights(inquire(given))
    assert found.verdict == "error"
    assert found.found == "/srv/tower.pt; no store brings them to the other machines"
    assert found.mend == "--checkpoint.storage_path s3://BUCKET/checkpoints"
    stored = given | {"checkpoint.storage_path": "s3://bucket/kept"}
    found = cluster.weights(inquire(stored))
    assert (found.verdict, found.found) == (
        *("ok", "/srv/tower.pt; each node takes them from s3://bucket/kept"),
    )
    assert cluster.weights(inquire({"model.backbone.pretrained": None})).verdict == "skipped"


def test_a_head_that_would_train_and_results_that_stay_on_it_are_found(surveyed, tmp_path):
    found = cluster.head(inquire())
    assert found.verdict == "warning"
    assert "the head would train, too: it has room for 2 workers" in found.found
    found = cluster.storage(inquire({"run.storage_path": str(tmp_path)}))
    assert found.verdict == "error"
    assert f"checkpoints go to the local folder {tmp_path} and the cluster has 3 no" in found.found
