"""The cluster of docs/running.md on machines that share nothing, by the page's own lines."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import secrets
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from tests.cluster.machines import HOME, NETWORK, RUNS, Machine, Machines
from tests.conftest import S3Server, guarded
from tests.deploy.conftest import ROOT, Finished, wait_for

PAGE = (ROOT / "docs" / "running.md").read_text()
BLOCKS = ("head", "worker", "mlflow", "submit", "jobs")
"""Of the page, which the tests here run."""
HEAD, SERVICES = 1, 9
"""Last parts of their addresses; workers have 2 to 8."""
_QUICK = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2500",
    "RAY_health_check_failure_threshold": "4",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "15",
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_worker_niceness": "0",
    "RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES": "80000000",
}
"""Ray gives a silent node up after some ten seconds instead of thirty, and a lost head after
fifteen instead of sixty. It kills nothing because of the memory that other tests take on this
machine, lets no other test go before its workers, and keeps few objects."""
_TRAINS_SECONDS = 5
"""After which a process of a trial has begun to train."""
_CLOCK = Path(__file__).with_name("clock.c")
_STORE = Path(__file__).with_name("object_store.py")
_FULL = "/srv/full"
ACTIVATE = ". .venv/bin/activate\n" if (ROOT / ".venv").exists() else ""
"""First line of the page's blocks, in a checkout that has its own environment."""
_PASSWORD = "a-long-enough-password"


def commands(name: str) -> str:
    """The shell lines of the page's block of this name."""
    found = _block(name)
    return found if ACTIVATE else found.removeprefix(". .venv/bin/activate\n")


def _block(name: str) -> str:
    [found] = re.findall(rf"<!-- run: {name} -->\n```bash\n(.*?)```", PAGE, re.DOTALL)
    return str(found)


def job(name: str, **instead: str) -> str:
    """The page's line that submits a job, from ``python`` on.

    Args:
        name: of the job, and of its command if it has one: ``train``, ``caption run``.
        **instead: other values of flags, or further flags, of ``.`` written as ``__``.
    """
    lines = (commands("submit") + _block("jobs")).replace("\\\n", " ").splitlines()
    file, _, command = name.partition(" ")
    start = f"ray job submit --working-dir . -- python jobs/{file}.py {command or '--'}"
    [line] = [line for line in lines if line.startswith(start)]
    words = line.removeprefix("ray job submit --working-dir . -- ").split("#")[0].split()
    for flag, value in instead.items():
        flag = "--" + flag.replace("__", ".")
        if flag in words:
            words[words.index(flag) + 1] = value
        else:
            words += [flag, value]
    return " ".join(words)


@dataclass(frozen=True)
class Logged:
    """A run in MLflow."""

    id: str
    name: str
    status: str
    parent: str | None
    metrics: dict[str, float]

    @staticmethod
    def of(run: dict) -> Logged:
        """As the REST API tells it."""
        tags = {tag["key"]: tag["value"] for tag in run["data"].get("tags", [])}
        metrics = {item["key"]: item["value"] for item in run["data"].get("metrics", [])}
        info = run["info"]
        parent = tags.get("mlflow.parentRunId")
        return Logged(info["run_id"], info["run_name"], info["status"], parent, metrics)


@dataclass
class Services:
    """The machine that has the object store and MLflow; jobs are submitted from it, too."""

    machine: Machine
    s3: S3Server
    tracking: str
    server: subprocess.Popen
    """MLflow's."""
    store: subprocess.Popen
    """The object store's."""

    def wait(self) -> None:
        """Return when MLflow answers."""

        def there() -> bool:
            assert self.server.poll() is None, self.machine.said(self.server)
            return self.answers(f"{self.tracking}/health")

        wait_for("MLflow", there, 400, lambda: self.machine.said(self.server))

    def answers(self, url: str) -> bool:
        """Whether a GET from here succeeds."""
        return _status(self.machine, url) == 200

    @property
    def environment(self) -> dict[str, str]:
        """What a login needs to use them, beside addresses."""
        return self.s3.environment | {
            "MLFLOW_TRACKING_USERNAME": "admin",
            "MLFLOW_TRACKING_PASSWORD": _PASSWORD,
        }

    @contextmanager
    def full(self) -> Iterator[None]:
        """The object store's disk is full in the block: it can be read and not written."""
        place = self.machine.path(_FULL)
        place.touch()
        try:
            yield
        finally:
            place.unlink()

    def upload(self, folder: Path, uri: str, last: tuple[str, ...] = ()) -> None:
        """Copy a folder of the tests' machine into the object store."""
        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        paths.sort(key=lambda path: path.name in last)
        with self.machine.network():
            client = self.s3.client()
            for path in paths:
                client.upload_file(
                    str(path), bucket, f"{prefix}/{path.relative_to(folder).as_posix()}"
                )

    def writers(self, uri: str) -> set[str]:
        """Addresses of the machines that wrote anything below an address of the object store."""
        below = re.escape(uri.removeprefix("s3:/"))
        log = self.machine.said(self.store, None)
        return set(re.findall(rf'(\S+) - - \[[^]]*\] "PUT {below}', log))

    def keys(self, uri: str) -> list[str]:
        """All that lies below an address of the object store."""
        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        with self.machine.network():
            pages = self.s3.client().get_paginator("list_objects_v2")
            return [
                entry["Key"]
                for page in pages.paginate(Bucket=bucket, Prefix=prefix)
                for entry in page.get("Contents", [])
            ]

    def runs(self, experiment: str) -> list[Logged]:
        """All runs of an experiment in MLflow; none before there is one."""
        try:
            found = self.mlflow(f"experiments/get-by-name?experiment_name={experiment}")
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return []
            raise
        ids = [found["experiment"]["experiment_id"]]
        runs = self.mlflow("runs/search", experiment_ids=ids, max_results=1000).get("runs", [])
        return [Logged.of(run) for run in runs]

    def steps(self, run: Logged, metric: str) -> list[int]:
        """The steps at which a run has a value of a metric in MLflow; doubled ones twice."""
        path = f"metrics/get-history?run_id={run.id}&metric_key={metric}&max_results=10000"
        return [int(value["step"]) for value in self.mlflow(path).get("metrics", [])]

    def mlflow(self, path: str, **body: object) -> dict:
        """An answer of MLflow's REST API: ``runs/search`` and so on."""
        pair = base64.b64encode(f"admin:{_PASSWORD}".encode()).decode()
        request = urllib.request.Request(
            f"{self.tracking}/api/2.0/mlflow/{path}",
            data=json.dumps(body).encode() if body else None,
            headers={"Authorization": f"Basic {pair}", "Content-Type": "application/json"},
        )
        with self.machine.network(), urllib.request.urlopen(request, timeout=30) as answer:
            return dict(json.loads(answer.read()))


@dataclass
class Cluster:
    """A head without CPUs and the workers that were added."""

    machines: Machines
    services: Services
    environment: dict[str, str]
    """Of a login on every machine."""
    token: str
    head: Machine = None  # type: ignore[assignment]
    workers: dict[int, Machine] = field(default_factory=dict)
    _given: dict[str, str] = field(default_factory=dict)

    def start_head(self) -> Machine:
        """Switch a head on, in place of one that was killed."""
        self.head = self._machine(HEAD)
        for path, text in self._given.items():
            self.head.path(path).write_text(text)
        # On a machine that is busy with other tests Ray may not start within the 30 s it gives.
        again = f"until (\n{commands('head')}\n); do ray stop --force; done"
        self._head_runs = self.head.start(again)
        return self.head

    def give(self, name: str, text: str) -> str:
        """Write a file to the disk of every head to come, and of this one; its path there."""
        self._given[f"/srv/{name}"] = text
        self.head.path(f"/srv/{name}").write_text(text)
        return f"/srv/{name}"

    def add_worker(self, number: int, *, ahead_s: int = 0, **environment: str) -> Machine:
        """Switch a worker on; it joins by itself.

        Args:
            number: last part of its address.
            ahead_s: seconds by which its clock is ahead.
            **environment: of its login.
        """
        machine = self._machine(number, **environment)
        clock = ""
        if ahead_s:
            library = "/srv/clock.so"
            build = ["cc", "-shared", "-fPIC", "-o", str(machine.path(library)), str(_CLOCK)]
            subprocess.run([*build, "-ldl"], check=True, timeout=60)
            clock = f"export LD_PRELOAD={library} CLOCK_AHEAD_S={ahead_s}\n"
        machine.start(clock + commands("worker"))
        self.workers[number] = machine
        return machine

    def training(self) -> set[str]:
        """Addresses of the machines on which a process of a run or trial trains by now."""
        rooms = {
            os.readlink(f"/proc/{machine.pid}/ns/pid"): machine.address
            for machine in (self.head, *self.workers.values())
        }
        found = set()
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess, OSError):  # it has ended, is a zombie
                name = "".join(process.cmdline()[:1])
                old = time.time() - process.create_time() > _TRAINS_SECONDS
                if old and name.startswith(("ray::ImplicitFunc", "ray::RayTrainWorker")):
                    found.add(rooms.get(os.readlink(f"/proc/{process.pid}/ns/pid"), "elsewhere"))
        return found - {"elsewhere"}

    def kill_worker(self, number: int) -> None:
        """Cut a worker's power."""
        self.workers.pop(number).kill()

    def switch_off(self, *numbers: int) -> None:
        """Cut the power of those of these workers that have it."""
        for number in set(numbers) & set(self.workers):
            self.kill_worker(number)

    def nodes(self) -> dict[str, str]:
        """State of each node that the head knows of, by address; of two, that of the living."""
        answer = self._ask("/api/v0/nodes?limit=100&detail=1")
        found = answer["data"]["result"]["result"] if answer else []
        states = sorted((node["node_ip"], node["state"]) for node in found)
        return {address: state for address, state in reversed(states)}

    def wait_for_nodes(self, *numbers: int, seconds: float = 400) -> None:
        """Return when the head and just these workers live."""
        wanted = sorted(f"{NETWORK}.{number}" for number in (HEAD, *numbers))

        def there() -> bool:
            return [a for a, state in sorted(self.nodes().items()) if state == "ALIVE"] == wanted

        wait_for(f"the nodes {wanted}", there, seconds, lambda: self.head.said(self._head_runs))

    def submit(self, job: str, *, options: str = "", timeout: float = 500) -> Finished:
        """``ray job submit --working-dir . -- JOB`` from the machine of the services."""
        return self.services.machine.run(self._submission(job, options), timeout)

    def submitting(self, job: str, *, options: str = "") -> subprocess.Popen:
        """The same, not waited for; ``services.machine.said`` has what it prints."""
        return self.services.machine.start(self._submission(job, options))

    def _submission(self, job: str, options: str) -> str:
        [first] = re.findall(r"^export RAY_AUTH_MODE.*$", commands("submit"), re.MULTILINE)
        return f"{ACTIVATE}{first}\nexec ray job submit --working-dir . {options} -- {job}"

    def _machine(self, number: int, **environment: str) -> Machine:
        machine = self.machines.add(number, self.environment | environment)
        write_token(machine, self.token)
        return machine

    def _ask(self, path: str) -> dict | None:
        request = urllib.request.Request(
            f"http://{self.head.address}:8265{path}",
            headers={"Authorization": f"Bearer {self.token}"},
        )
        try:
            with self.head.network(), urllib.request.urlopen(request, timeout=10) as answer:
                return dict(json.loads(answer.read()))
        except (OSError, ValueError):
            return None


def give_another(machine: Machine, package: str, version: str) -> None:
    """As a machine has that was set up before; its ``PYTHONPATH`` is ``/srv/other``."""
    metadata = machine.path(f"/srv/other/{package}-{version}.dist-info/METADATA")
    metadata.parent.mkdir(parents=True)
    metadata.write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")


def write_token(machine: Machine, token: str) -> None:
    """As ``scp`` of the head's token would."""
    place = machine.path(f"{HOME}/.ray/auth_token")
    place.write_text(token)
    place.chmod(0o600)


def services_of(machines: Machines) -> Services:
    """A machine with an object store that checks signatures, PostgreSQL, and MLflow on it.

    MLflow is still starting (:meth:`Services.wait`).
    """
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    if not programs:
        pytest.skip("no PostgreSQL is installed (`make services` does it)")
    machine = machines.add(SERVICES, {"OMP_NUM_THREADS": "1"})
    store = f"http://{machine.address}:5001"
    objects = machine.serve([sys.executable, str(_STORE), machine.address, "5001", _FULL])
    done = machine.run(
        f"""
        set -e
        mkdir /srv/postgresql && chown postgres /srv/postgresql
        echo {_PASSWORD} > /tmp/password && chmod 644 /tmp/password
        setpriv --reuid=postgres --regid=postgres --clear-groups \
          {programs[-1].parent}/initdb -D /srv/postgresql/data -U mlflow -A scram-sha-256 \
          --pwfile /tmp/password -N
        """
    )
    assert done.returncode == 0, done.stdout
    machine.serve(
        [
            *(str(programs[-1]), "-D", "/srv/postgresql/data", "-k", "/tmp"),
            *("-c", "listen_addresses=127.0.0.1", "-c", "fsync=off"),
        ],
        user="postgres",
    )
    wait_for("the object store", lambda: _status(machine, f"{store}/moto-api/") == 200, 60)
    with machine.network():
        s3 = guarded(store)
        for bucket in ("data", "mlflow"):
            s3.client().create_bucket(Bucket=bucket)
    tracking = f"http://{machine.address}:5000"
    settings = (ROOT / "deploy" / "mlflow" / "basic_auth.ini").read_text()
    machine.path("/srv/basic_auth.ini").write_text(settings.replace("/data/", "/srv/"))
    database = f"postgresql+psycopg2://mlflow:{_PASSWORD}@127.0.0.1:5432/postgres"
    server = machine.serve(
        [
            *(sys.executable, "-m", "mlflow", "server", "--host", machine.address),
            *("--port", "5000", "--workers", "1", "--app-name", "basic-auth"),
            *("--allowed-hosts", f"{machine.address}:5000", "--backend-store-uri", database),
            *("--artifacts-destination", "s3://mlflow/artifacts"),
        ],
        **s3.environment,
        MLFLOW_AUTH_CONFIG_PATH="/srv/basic_auth.ini",
        MLFLOW_AUTH_ADMIN_PASSWORD=_PASSWORD,
        MLFLOW_FLASK_SERVER_SECRET_KEY=secrets.token_hex(16),
        MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false",
    )

    return Services(machine, s3, tracking, server, objects)


@contextmanager
def cluster_of(machines: Machines, services: Services, *workers: int) -> Iterator[Cluster]:
    """A head and these workers, with the logins that docs/running.md sets up."""
    login = (
        services.environment
        | _QUICK
        | {
            "HEAD": f"{NETWORK}.{HEAD}",
            "RAW": "s3://data/raw",
            "DATA": "s3://data/shards",
            "KEEP": "s3://data/checkpoints",
            "RUNS": RUNS,
            "TRACKING": services.tracking,
            "OMP_NUM_THREADS": "1",
        }
    )
    cluster = Cluster(machines, services, login, secrets.token_hex(32))
    services.machine.environment |= login
    write_token(services.machine, cluster.token)
    cluster.start_head()
    for number in workers:
        cluster.add_worker(number)
    try:
        cluster.wait_for_nodes(*workers)
        services.wait()
        yield cluster
    finally:
        for machine in (*cluster.workers.values(), cluster.head):
            if machine.runs:
                machine.kill()


def _status(machine: Machine, url: str) -> int:
    try:
        with machine.network(), urllib.request.urlopen(url, timeout=5) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return int(error.code)
    except OSError:
        return 0
