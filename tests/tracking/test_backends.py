"""Where runs are kept: SQLite through the local server, and a team's server with passwords."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from next.tracking.client import connect
from next.tracking.delivery import read_address
from next.tracking.run import check_server
from tests.tracking.conftest import mlflow_server
from tests.tracking.test_run import in_journal, on_server

ROOT = Path(__file__).resolve().parents[2]
PROCESSES, STEPS = 8, 150
PASSWORD = "a-long-enough-password"

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
    settings.write_text(
        "[mlflow]\n"
        "default_permission = READ\n"
        f"database_uri = sqlite:///{folder / 'users.db'}\n"
        "admin_username = admin\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
    )
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
