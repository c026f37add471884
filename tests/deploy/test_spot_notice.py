"""The notice that EC2 takes a spot machine back, from its metadata to Ray."""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from tests.deploy.conftest import ROOT, Head, run, wait_for

SCRIPT = ROOT / "deploy" / "spot_notice.py"
KEY = "X-aws-ec2-metadata-token"
DRAINED = """
import json
from ray._private.services import canonicalize_bootstrap_address_or_die
from ray._private.state import GlobalState
from ray._raylet import GcsClientOptions

address = canonicalize_bootstrap_address_or_die("auto")
state = GlobalState()  # a driver would start processes on the node
state._initialize_global_state(
    GcsClientOptions.create(
        address, None, allow_cluster_id_nil=True, fetch_cluster_id_if_nil=False
    )
)
print(json.dumps(state.get_draining_nodes()))
"""
BUSY = """
import time, ray
ray.init(address="auto", logging_level="ERROR", log_to_driver=False)
@ray.remote(num_cpus=1)
class Worker:
    def begins(self):
        return "busy"
worker = Worker.remote()
print(ray.get(worker.begins.remote()), flush=True)
time.sleep(300)
"""


class Metadata(ThreadingHTTPServer):
    """Speaks as EC2's metadata do, version 2: nobody gets in without a key, 404 is no notice."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.notice: str | None = None
        self.asked: list[str] = []


class Answers(BaseHTTPRequestHandler):
    server: Metadata

    def do_PUT(self) -> None:
        fits = self.path == "/latest/api/token" and self.headers[f"{KEY}-ttl-seconds"]
        self.say(*((200, "key") if fits else (400, "")))

    def do_GET(self) -> None:
        if self.headers[KEY] != "key":
            return self.say(401, "")
        self.server.asked.append(self.path)
        there = self.path == "/latest/meta-data/spot/instance-action" and self.server.notice
        return self.say(*((200, self.server.notice) if there else (404, "")))

    def say(self, code: int, body: str) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *words: object) -> None:
        pass


@pytest.fixture
def metadata() -> Iterator[Metadata]:
    with Metadata() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.mark.ray
def test_ray_drains_the_node_until_the_machine_goes(head: Head, metadata: Metadata, tmp_path: Path):
    def draining() -> dict[str, int]:
        done = run([sys.executable, "-c", DRAINED], head.environment, 60)
        return json.loads(done.stdout.splitlines()[-1])

    assert draining() == {}
    where = ["--metadata", f"http://127.0.0.1:{metadata.server_port}"]
    with (
        process([sys.executable, "-c", BUSY], head, tmp_path / "busy") as (_, busy),
        process([sys.executable, str(SCRIPT), *where], head, tmp_path / "notice") as (
            watcher,
            said,
        ),
    ):
        wait_for("a look without a notice", lambda: metadata.asked, 30, said)
        wait_for("work on the node, else it goes at once", lambda: "busy" in busy(), 60)
        assert watcher.poll() is None
        end = datetime.now(UTC) + timedelta(minutes=2)
        metadata.notice = json.dumps({"action": "terminate", "time": f"{end:%Y-%m-%dT%H:%M:%SZ}"})
        assert watcher.wait(60) == 0, said()
        assert f"at {end:%H:%M:%S} UTC" in said()
        [deadline] = wait_for("the node to be drained", draining, 30).values()
    assert deadline / 1000 == pytest.approx(end.timestamp(), abs=3)


@contextmanager
def process(command: list[str], head: Head | None, log: Path) -> Iterator:
    """A process and what gives its output so far; killed at the end."""
    with log.open("wb") as output:
        started = subprocess.Popen(
            command, env=head and head.environment, stdout=output, stderr=output
        )
    try:
        yield started, log.read_text
    finally:
        started.kill()
        started.wait()


def test_it_goes_on_while_the_metadata_do_not_answer_and_tells_what_is_wrong(tmp_path: Path):
    with Metadata() as gone:
        port = gone.server_port
    where = ["--metadata", f"http://127.0.0.1:{port}"]
    with process([sys.executable, str(SCRIPT), *where], None, tmp_path / "log") as (watcher, said):
        wait_for("a word", lambda: "refused" in said(), 30)
        assert watcher.poll() is None


def test_each_worker_of_the_cluster_file_runs_it_once_ray_has_started():
    config = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    assert (
        config["file_mounts"]["/home/ubuntu/spot_notice.py"] == SCRIPT.relative_to(ROOT).as_posix()
    )
    *before, start = config["worker_start_ray_commands"]
    assert "&& (setsid nohup python ~/spot_notice.py" in start, "a failed start stays a failure"
    assert not any("spot_notice" in words for words in config["head_start_ray_commands"])
    for command in (*before, start, *config["head_start_ray_commands"], *config["setup_commands"]):
        subprocess.run(["bash", "-n", "-c", command], check=True)
