"""Real MLflow servers: the local one for most tests of this folder, and MLflow's own command."""

import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from next.tracking.client import connect
from next.tracking.server import start_server
from tests.ports import free_port


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    with start_server(tmp_path_factory.mktemp("mlflow")) as server:
        yield server


@pytest.fixture(scope="session")
def client(server):
    return connect(server.uri)


@pytest.fixture(scope="session")
def postgresql():
    """URI of a PostgreSQL on loopback, of Debian's package; it never runs as root."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not folders:
        pytest.skip("no PostgreSQL is installed (`make services` does it)")
    programs = folders[-1].parent
    user = None
    if os.geteuid() == 0:
        with suppress(KeyError):
            user = pwd.getpwnam("postgres").pw_name
        if user is None:
            pytest.skip("PostgreSQL does not run as root, and there is no user postgres")
    # pytest's own folders are closed to other users.
    folder = Path(tempfile.mkdtemp(prefix="next-postgresql-"))
    port = free_port()
    try:
        if user is not None:
            shutil.chown(folder, user, user)
        run = {"user": user, "cwd": folder, "capture_output": True, "check": True, "text": True}
        data = str(folder / "data")
        initdb = [str(programs / "initdb"), "-D", data, "-U", "next", "-A", "trust", "-N"]
        subprocess.run(initdb, **run)
        settings = f"-p {port} -c listen_addresses=127.0.0.1 -c fsync=off -k {folder}"
        control = [str(programs / "pg_ctl"), "-D", data, "-l", str(folder / "log"), "-w"]
        subprocess.run([*control, "-o", settings, "start"], **run)
        try:
            yield f"postgresql+psycopg2://next@127.0.0.1:{port}/postgres"
        finally:
            subprocess.run([*control, "-m", "immediate", "stop"], **run)
    finally:
        shutil.rmtree(folder)


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
