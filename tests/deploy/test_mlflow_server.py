"""The command of ``deploy/mlflow`` as it stands there, on a real PostgreSQL, with its own rules."""

import base64
import contextlib
import os
import secrets
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import psycopg2
import pytest
import yaml

from tests.deploy.conftest import BIN, end_tree, wait_for
from tests.ports import free_port

DEPLOY = Path(__file__).resolve().parents[2] / "deploy" / "mlflow"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def postgres(postgresql) -> str:
    """Address of a server with a user and an empty database of the names in the page."""
    where = postgresql.rpartition("@")[2].partition("/")[0]
    connection = psycopg2.connect(f"postgresql://next@{where}/postgres")
    connection.autocommit = True  # no transaction may create a database
    with contextlib.closing(connection), connection.cursor() as cursor:
        cursor.execute("CREATE USER mlflow")
        cursor.execute("CREATE DATABASE mlflow OWNER mlflow")
    return where


def status(port: int, host: str, password: str | None) -> int:
    """What the server answers to a client that reached it under this name."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/api/2.0/mlflow/experiments/search",
        data=b'{"max_results": 1}',
        headers={"Host": host, "Content-Type": "application/json"},
    )
    if password is not None:
        pair = base64.b64encode(f"admin:{password}".encode()).decode()
        request.add_header("Authorization", f"Basic {pair}")
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return int(error.code)
    except OSError:
        return 0


def test_it_takes_runs_under_its_name_with_the_password_and_refuses_all_else(postgres, tmp_path):
    service = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["mlflow"]
    password = secrets.token_urlsafe(18)
    port = free_port()
    (tmp_path / "data").mkdir()
    auth = (DEPLOY / "basic_auth.ini").read_text().replace("/data/", f"{tmp_path}/data/")
    (tmp_path / "basic_auth.ini").write_text(auth)
    known = {
        "${POSTGRES_PASSWORD:?}@postgres:5432": f"@{postgres}",
        "${MLFLOW_SECRET_KEY:?set it in deploy/mlflow/.env}": secrets.token_hex(16),
        "${MLFLOW_ADMIN_PASSWORD:?set it in deploy/mlflow/.env}": password,
        "${MLFLOW_HOST:-mlflow}": "mlflow",
        "/etc/mlflow/basic_auth.ini": str(tmp_path / "basic_auth.ini"),
        "=/data/": f"={tmp_path}/data/",
        "--host=0.0.0.0": "--host=127.0.0.1",
        "--port=5000": f"--port={port}",
        "--workers=2": "--workers=1",
    }

    def here(text: str) -> str:
        for there, value in known.items():
            text = text.replace(there, value)
        return text

    command = [here(word) for word in service["command"]]
    command[0] = str(BIN / command[0])
    environment = {name: here(str(value)) for name, value in service["environment"].items()}
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(
            command,
            env=os.environ | environment | {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"},
            cwd=tmp_path,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        wait_for(
            "MLflow", lambda: server.poll() is not None or status(port, "mlflow:5000", None), 100
        )
        assert server.poll() is None, (tmp_path / "log").read_text()[-3000:]
        assert status(port, "mlflow:5000", None) == 401
        assert status(port, "mlflow:5000", "wrong") == 401
        assert status(port, "mlflow:5000", password) == 200
        assert status(port, "elsewhere:5000", password) == 403
        tables = subprocess.run(
            [sys.executable, "-c", COUNT, postgres], capture_output=True, text=True, check=True
        )
        assert int(tables.stdout) > 10, "the runs are in PostgreSQL"
    finally:
        end_tree(server.pid)
        server.wait(10)


COUNT = """
import sys, psycopg2
host, port = sys.argv[1].split(":")
with psycopg2.connect(host=host, port=port, user="mlflow", dbname="mlflow") as connection:
    cursor = connection.cursor()
    cursor.execute("select count(*) from information_schema.tables where table_schema = 'public'")
    print(cursor.fetchone()[0])
"""
