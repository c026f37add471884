"""Real MLflow servers: the local one for most tests of this folder, and MLflow's own command."""

import os
import signal
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from next.tracking.delivery.client import connect
from next.tracking.server import start_server
from tests.ports import free_port


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    with start_server(tmp_path_factory.mktemp("mlflow")) as server:
        yield server


@pytest.fixture(scope="session")
def client(server):
    return connect(server.uri)


def child_run_ids(uri: str, experiment_id: str, parent_id: str) -> list[str]:
    """MLflow's ids of a run's children, oldest first."""
    runs = connect(uri).search_runs(
        [experiment_id],
        filter_string=f"tags.`mlflow.parentRunId` = '{parent_id}'",
        order_by=["attributes.start_time ASC"],
    )
    return [run.info.run_id for run in runs]


@contextmanager
def mlflow_server(log: Path, *flags: str, environment: dict[str, str]):
    """``mlflow server`` as an operator starts it; its address."""
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--workers", "1"]
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*command, "--port", str(port), *flags],
            env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"} | environment,
            stdout=file,
            stderr=file,
            start_new_session=True,
            cwd=log.parent,
        )
    try:
        deadline = time.monotonic() + 180
        while True:
            with (
                suppress(OSError),
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5),
            ):
                break
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        with suppress(ProcessLookupError):  # it ended by itself; the assertion above says why
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
