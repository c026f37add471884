"""Where runs are kept: SQLite through the local server, and a team's server with passwords."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from next.tracking.delivery.client import connect
from next.tracking.delivery.delivery import read_address
from next.tracking.registry.versions import ModelCard, fetch_model, register
from next.tracking.run import check_server, open_run
from next.training.embedder import LOADER
from tests.tracking.conftest import mlflow_server
from tests.tracking.test_run import in_journal, on_server

ROOT = Path(__file__).resolve().parents[2]
PROCESSES, STEPS = 8, 150
PASSWORD = "a-long-enough-password"

CARD = ModelCard(
    benchmark="demo",
    data_digest="d" * 64,
    scores={"test/mAP": 50.0},
    interval={"test/mAP": (45.0, 55.0)},
    modalities=["RGB"],
    subsets=[["RGB"]],
    weights_licence="none",
    seed=0,
    run="r",
)

EIGHT = """
import os, sys
import mlflow  # before the fork, so that it is imported once
from pathlib import Path
from next.tracking.run import open_run

uri, folder, processes, steps = sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:])

def work(number):
    own = folder / str(number)
    with open_run(uri=uri, experiment="eight", name=f"r{number}", folder=own) as run:
        for step in range(steps):
            run.log_metrics({f"m{k}": step * number + k / 10 for k in range(10)}, step=step)
        run.close(timeout=120)

children = []
for number in range(processes):
    child = os.fork()
    if child == 0:
        try:
            work(number)
        except BaseException:
            os._exit(1)
        os._exit(0)
    children.append(child)
sys.exit(any(os.waitpid(child, 0)[1] for child in children))
"""


def log_from_eight_processes(uri: str, folder: Path) -> None:
    """Every value of eight processes that log at once is on the server, once."""
    done = subprocess.run(
        [
            *(sys.executable, "-W", "ignore", "-c", EIGHT),
            *(uri, str(folder), str(PROCESSES), str(STEPS)),
        ],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    client = connect(uri)
    runs = [folder / str(number) for number in range(PROCESSES)]
    for run in runs:
        logged = in_journal(run)
        assert sum(logged.values()) == STEPS * 10
        assert on_server(client, read_address(run).run_id) == logged
    assert len({read_address(run).experiment_id for run in runs}) == 1


@pytest.mark.slow
def test_eight_processes_log_at_once_through_the_local_server_to_sqlite(server, tmp_path):
    log_from_eight_processes(server.uri, tmp_path)


@pytest.fixture(scope="module")
def team_server(postgresql, s3_server, tmp_path_factory):
    """MLflow as a team runs it: PostgreSQL, artifacts on S3, user and password."""
    folder = tmp_path_factory.mktemp("team")
    settings = folder / "auth.ini"
    deployed = (ROOT / "deploy" / "mlflow" / "basic_auth.ini").read_text()
    settings.write_text(deployed.replace("/data/", f"{folder}/"))
    environment = s3_server.environment | {
        "MLFLOW_AUTH_CONFIG_PATH": str(settings),
        "MLFLOW_AUTH_ADMIN_PASSWORD": PASSWORD,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "a key of this test",
        "MLFLOW_S3_ENDPOINT_URL": s3_server.endpoint,
    }
    flags = ["--backend-store-uri", postgresql, "--app-name", "basic-auth"]
    flags += ["--artifacts-destination", f"{s3_server.new_bucket()}/mlflow"]
    with mlflow_server(folder / "server.log", *flags, environment=environment) as uri:
        yield uri


@pytest.fixture
def login(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)


@pytest.mark.slow
def test_eight_processes_log_at_once_to_postgresql_behind_a_password(team_server, login, tmp_path):
    log_from_eight_processes(team_server, tmp_path)


@pytest.mark.slow
def test_a_picture_a_checkpoint_and_a_model_come_back_from_s3_byte_for_byte(
    team_server, s3_server, login, tmp_path
):
    picture, checkpoint = tmp_path / "cmc.png", tmp_path / "best"
    Image.effect_noise((800, 600), 50).save(picture)
    checkpoint.mkdir()
    save_file({"weight": torch.randn(1000, 1000)}, checkpoint / "model.safetensors")
    (checkpoint / "config.toml").write_text("seed = 0\n")
    with open_run(uri=team_server, experiment="s3", name="r", folder=tmp_path / "run") as run:
        run.log_image(picture, "figures/cmc", step=0)
        run.log_artifact(checkpoint, "checkpoints")
        run_id = run.run_id
    client = connect(team_server)
    [shown] = [
        found.path
        for found in client.list_artifacts(run_id, "images")
        if found.path.endswith(".png")
    ]
    weights = checkpoint / "model.safetensors"
    for source, name in [(picture, shown), (weights, "checkpoints/model.safetensors")]:
        local = client.download_artifacts(run_id, name, str(tmp_path))
        assert Path(local).read_bytes() == source.read_bytes(), name

    version = register(
        team_server,
        "reid",
        checkpoint,
        run_id=run_id,
        loader=LOADER,
        inputs={"image_RGB": "binary"},
        width=8,
        card=CARD,
        requirements=["torch"],
    )
    fetched = fetch_model(team_server, version.uri, tmp_path / "fetched", loader=LOADER)
    assert (fetched / "model.safetensors").read_bytes() == weights.read_bytes()
    store = s3_server.client()
    kept = [
        listed["Key"]
        for bucket in store.list_buckets()["Buckets"]
        for listed in store.list_objects_v2(Bucket=bucket["Name"]).get("Contents", [])
    ]
    assert sum(key.endswith("model.safetensors") and run_id in key for key in kept) == 2


@pytest.mark.slow
def test_a_wrong_password_is_an_error_before_anything_starts(team_server, demo_shards, tmp_path):
    with pytest.raises(PermissionError, match="wants a user and a password"):
        check_server(team_server)
    flags = ["--data", str(demo_shards), "--tracking.uri", team_server]
    done = subprocess.run(
        [sys.executable, "jobs/train.py", *flags, "--run.storage_path", str(tmp_path / "runs")],
        cwd=ROOT,
        env=os.environ
        | {"MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_PASSWORD": "a-wrong-password"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 2, done.stderr[-2000:]
    assert "wants a user and a password, and does not accept ours" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "runs").glob("*/checkpoints"))
