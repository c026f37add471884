"""One tiny procedural benchmark, prepared once, for every test that needs real shards."""

import contextlib
import json
import os
import pwd
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import hypothesis
import pytest

from next.config import RunConfig, override
from tests.ports import free_port

# How fast examples are drawn says how busy the machine is, and nothing about the code.
hypothesis.settings.register_profile(
    "default", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("default")

# A process keeps the mode that it met first, and a head of another mode does not get along with
# it. So all clusters that tests start ask for tokens, as Ray's local ones do by themselves.
os.environ["RAY_AUTH_MODE"] = "token"
os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
# Ray's workers would let every other test go first (niceness 15) and run into their limits.
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - so Ray reads it

TINY = {
    "model.backbone.name": "next-tiny",
    "model.backbone.pretrained": None,
    "model.semantic.experts": 2,
    "model.structure.experts": 2,
    "data.image_size": (32, 16),
    "batch.identities": 4,
    "batch.instances": 4,
    "augment.pad": 2,
    "optim.lr": 1e-3,
    "optim.tower_lr": 1e-3,
    "optim.epochs": 3,
    "optim.warmup_epochs": 0.5,
    "selection.holdout": 0.34,
    "threads": 1,
    "tracking.enabled": False,
}
"""Settings that train in a second."""


_FIRST_DRILLS = ("training/test_faults", "tuning/execution/test_workers")
"""They take as long as all other tests that start Ray, without the last one."""
_NEXT_DRILL = "tuning/test_kills"
"""The process takes it that is first through with its own; last of all, it would run alone."""
_CLUSTER, _NEXT, _OTHERS = 0, 3, 4
_TOGETHER = (
    "captioning/quality/test_report",
    "captioning/test_run",
    "deploy/test_mlflow_server",
    "evaluation/test_common_slices",
    "evaluation/test_share",
    "export/test_export",
    "jobs/test_search",
    "jobs/test_serve",
    "retrieval/test_gallery",
    "retrieval/test_search",
    "serving/test_following",
    "tracking/registry/test_versions",
    "tracking/test_backends",
    "tracking/test_pages",
    "tuning/report/test_report",
)
"""Modules whose set-up takes longer than a test: each is of one process, which does it once."""


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in its own hook
def pytest_collection_modifyitems(items) -> None:
    """Keep the tests that start Ray in three processes, which begin with them.

    They wait more than they compute. Each process takes of the other tests when it is through with
    its own, so the three end at about the same time.
    """
    place = {item: _place(item) for item in items}
    for item, group in place.items():
        if group == _OTHERS:
            if (module := _module(item)) in _TOGETHER:
                item.add_marker(pytest.mark.xdist_group(module))
            continue
        item.add_marker(pytest.mark.xdist_group(f"ray-{group}"))
        if not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(600))
    items.sort(key=lambda item: place[item])


def _place(item) -> int:
    """Which group a test is in, by their order."""
    if not item.get_closest_marker("ray"):
        return _OTHERS
    module = _module(item)
    if module == _NEXT_DRILL:
        return _NEXT
    if item.path.parent.name == "cluster":
        return _CLUSTER
    return 1 if module in _FIRST_DRILLS else 2


def _module(item) -> str:
    name: str = item.path.relative_to(Path(__file__).parent).with_suffix("").as_posix()
    return name


@pytest.fixture(scope="module")
def short_folder() -> Iterator[Path]:
    """A folder with a short path: Ray's sockets lie below it, and their names have a limit."""
    folder = Path(tempfile.mkdtemp(prefix="nx", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def demo_raw(tmp_path_factory) -> Path:
    from next.benchmark.procedural.benchmark import DemoSize, write_demo

    folder = tmp_path_factory.mktemp("demo") / "raw"
    write_demo(folder, DemoSize(12, 8, 6, 6), seed=1)
    return folder


@pytest.fixture(scope="session")
def demo_shards(demo_raw) -> Path:
    from next.benchmark.card import load_card
    from next.data.source.ingest import prepare

    card = load_card(Path(__file__).resolve().parents[1] / "datasets" / "demo.toml")
    out = demo_raw.parent / "shards"
    prepare(card, demo_raw, out)
    return out


@pytest.fixture(scope="session")
def cache_folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def tiny_config(demo_shards, cache_folder, tmp_path) -> RunConfig:
    return override(
        RunConfig(),
        TINY
        | {
            "data.uri": str(demo_shards),
            "data.cache": str(cache_folder),
            "run.storage_path": str(tmp_path / "runs"),
            "run.name": "tiny",
        },
    )


@pytest.fixture
def older_runs(demo_shards, tmp_path) -> Path:
    """Storage path with what commit a36958b made of this benchmark, without weights and pictures.

    ``first`` is a run of three epochs, ``stopped`` one of 200 that SIGTERM ended after 63 steps,
    ``search`` a sweep of three trials over ``tune_spaces/quick.py``; all with :data:`TINY`.
    """
    with tarfile.open(Path(__file__).with_name("fixtures") / "a36958b.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    for record in tmp_path.rglob("*.toml"):
        text = record.read_text().replace("SHARDS", str(demo_shards))
        record.write_text(text.replace("RUNS", str(tmp_path)))
    return tmp_path


@pytest.fixture(scope="session")
def public_captions(tmp_path_factory) -> Path:
    """Folder of the captions that NEXT's authors published: ``RGBNT201/`` and ``MSVR310/``."""
    folder = tmp_path_factory.mktemp("captions")
    with tarfile.open(Path(__file__).with_name("fixtures") / "captions.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="session")
def trained_checkpoint(demo_shards, cache_folder, tmp_path_factory) -> Path:
    """The best checkpoint of a small run, which finds identities far above chance."""
    from next.training.launch import launch

    settings = TINY | {
        "data.uri": str(demo_shards),
        "data.cache": str(cache_folder),
        "run.storage_path": str(tmp_path_factory.mktemp("trained") / "runs"),
        "optim.epochs": 6,
    }
    return launch(override(RunConfig(), settings)).checkpoint


@pytest.fixture(scope="session")
def trained_embedder(trained_checkpoint):
    """That checkpoint as an embedder; tests do not change it."""
    from next.training.embedder import Embedder

    return Embedder.load(trained_checkpoint, device="cpu")


class S3Server(NamedTuple):
    """A server that speaks S3 and checks signatures, and a user of it who may do everything."""

    endpoint: str
    environment: dict[str, str]
    """Variables by which AWS tools find server and user."""
    log: Path | None = None
    """The server's log, a line a request."""

    def requests(self, uri: str) -> list[str]:
        """Method and path of every request below a URI so far."""
        assert self.log is not None
        below = uri.removeprefix("s3:/")
        lines = re.findall(r'"([A-Z]+ /\S*) HTTP', self.log.read_text())
        return [line for line in lines if line.partition(" ")[2].startswith(below)]

    def client(self, service: str = "s3"):
        import boto3

        return boto3.client(
            service,
            endpoint_url=self.endpoint,
            aws_access_key_id=self.environment["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=self.environment["AWS_SECRET_ACCESS_KEY"],
            region_name="us-east-1",
        )

    def new_bucket(self) -> str:
        """The URI of an empty bucket."""
        name = f"bucket-{uuid.uuid4().hex[:12]}"
        self.client().create_bucket(Bucket=name)
        return f"s3://{name}"

    def new_user(self, *actions: str) -> dict[str, str]:
        """The environment of a user who may do only this, such as ``s3:Get*``."""
        iam, name = self.client("iam"), f"user-{uuid.uuid4().hex[:12]}"
        statement = {"Effect": "Allow", "Action": list(actions), "Resource": "*"}
        policy = json.dumps({"Version": "2012-10-17", "Statement": [statement]})
        iam.create_user(UserName=name)
        key = iam.create_access_key(UserName=name)["AccessKey"]
        iam.put_user_policy(UserName=name, PolicyName="may", PolicyDocument=policy)
        keys = {
            "AWS_ACCESS_KEY_ID": key["AccessKeyId"],
            "AWS_SECRET_ACCESS_KEY": key["SecretAccessKey"],
        }
        return self.environment | keys


def guarded(endpoint: str) -> S3Server:
    """A server of moto, which checks every request's signature and rights from now on."""
    anybody = {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "first",
        "AWS_SECRET_ACCESS_KEY": "first",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    user = S3Server(endpoint, anybody).new_user("s3:*", "iam:*")
    check = urllib.request.Request(
        f"{endpoint}/moto-api/reset-auth", data=b"0", headers={"Content-Type": "text/plain"}
    )
    urllib.request.urlopen(check, timeout=60).close()
    return S3Server(endpoint, user)


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory) -> Iterator[S3Server]:
    """A real S3 server on loopback; the tests that want it in their environment take ``s3``."""
    log = tmp_path_factory.mktemp("s3") / "server.log"
    port = free_port()
    endpoint = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
    try:
        for _ in range(600):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        yield guarded(endpoint)._replace(log=log)
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def s3(s3_server, monkeypatch) -> str:
    """The URI of an empty bucket, whose server and user the environment names."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    return s3_server.new_bucket()


@pytest.fixture(scope="session")
def postgresql() -> Iterator[str]:
    """URI of a PostgreSQL on loopback, of Debian's package; it never runs as root."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not folders:
        pytest.skip("no PostgreSQL is installed (`make services` does it)")
    programs = folders[-1].parent
    user = None
    if os.geteuid() == 0:
        with contextlib.suppress(KeyError):
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


@pytest.fixture(params=["nfs4", "9p", "virtiofs", "fuse", "fuse.s3fs"])
def share(request, monkeypatch, tmp_path) -> Path:
    """A folder that the table of mounts has as one of another machine."""
    folder = tmp_path / "share"
    folder.mkdir()
    (tmp_path / "mounts").write_text(
        "22 1 0:21 / / rw,relatime - ext4 /dev/sda1 rw\n"
        f"23 22 0:40 / {folder} rw,relatime shared:1 - {request.param} 10.0.0.1:/srv rw\n"
    )
    monkeypatch.setattr("next.storage._MOUNTS", tmp_path / "mounts")
    return folder
