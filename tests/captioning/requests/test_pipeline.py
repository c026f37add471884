"""Ray Data with two workers; slow, as Ray takes its time to start."""

import asyncio
import os
import signal
import subprocess
import sys
import time

import pytest
import ray

from next.captioning.output import write_captions
from next.captioning.requests.ledger import Ledger
from next.captioning.requests.models import ModelConfig
from next.captioning.requests.pipeline import _RemoteBudget
from next.captioning.requests.spending import LEASE_S, Budget, BudgetConfig
from next.captioning.run import CaptionConfig, Captioner
from next.captioning.source import ShardSource
from next.data.shards.reader import open_manifest
from next.storage import open_folder
from tests.captioning.conftest import ROOT
from tests.captioning.scripted_endpoint import Script, scripted

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
TWO = CaptionConfig(workers=2)


@pytest.fixture(scope="module")
def cluster(s3_server):
    ray.init(
        address="local", num_cpus=4, include_dashboard=False, log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": str(ROOT), **s3_server.environment}},
    )  # fmt: skip
    yield
    ray.shutdown()


def models(url, **settings):
    defaults = {"name": "scripted-large", "base_url": url, "concurrency": 8, "backoff_s": 0.01}
    return [ModelConfig(**(defaults | settings))]


@pytest.mark.usefixtures("cluster")
def test_many_processes_ask_what_one_would(
    demo_raw, demo_source, demo_shards, s3, person, tmp_path
):
    """About folders, and then about shards in an object store, where nothing is new."""
    with scripted(demo_raw, Script(trouble={"500": 0.05})) as server:
        with Ledger(tmp_path / "ledger") as ledger:
            many = Captioner(demo_source, person, models(server.url), TWO)
            totals, images = many.ask(ledger)
            assert totals.images == totals.calls == 396
            assert set(server.stats.answers.values()) == {1}
            before = server.stats.requests
            open_folder(s3).upload_tree(demo_shards)
            shards = Captioner(ShardSource(open_manifest(s3)), person, models(server.url), TWO)
            again, same = shards.ask(ledger)
            assert (again.calls, again.known) == (0, 396)
            assert server.stats.requests == before
            assert same == images
            write_captions(many, ledger, images, tmp_path / "many", totals)
        with Ledger(tmp_path / "other") as ledger:
            one = Captioner(demo_source, person, models(server.url))
            totals, images = one.ask(ledger)
            write_captions(one, ledger, images, tmp_path / "one", totals)
    paths = sorted((tmp_path / "one" / "text").glob("*.json"))
    assert len(paths) == 6
    for path in paths:
        assert path.read_text() == (tmp_path / "many" / "text" / path.name).read_text()


@pytest.mark.usefixtures("cluster")
def test_workers_share_one_budget(demo_raw, demo_source, person, tmp_path):
    config = CaptionConfig(workers=2, budget=BudgetConfig(tokens=49 * 1200 + 2400))
    with scripted(demo_raw) as server, Ledger(tmp_path / "ledger") as ledger:
        totals, _ = Captioner(demo_source, person, models(server.url), config).ask(ledger)
        assert sum(server.stats.answers.values()) == 50
    assert totals.calls == 50
    assert totals.left == 346
    assert totals.known == 0


@pytest.mark.usefixtures("cluster")
def test_the_budget_keeps_reservations_of_a_worker_that_lives_and_drops_those_of_one_that_died():
    """What it held counts as spent, and the other one goes on."""

    class Holder:
        def __init__(self, budget):
            self._budget = _RemoteBudget(budget)

        async def hold(self, tokens):
            self._alive = asyncio.create_task(self._budget.send_heartbeats())
            return await self._budget.reserve(tokens, 0)

    budget = ray.remote(num_cpus=0)(Budget).remote(BudgetConfig(tokens=100), lease_s=LEASE_S / 3)
    dead, alive = (ray.remote(num_cpus=0)(Holder).remote(budget) for _ in range(2))
    assert ray.get(dead.hold.remote(40)) == "granted"
    time.sleep(LEASE_S / 2)
    assert ray.get(budget.reserve.remote(70, 0, "other")) == "wait", "it sends heartbeats"
    ray.kill(dead)
    deadline = time.monotonic() + 5 * LEASE_S
    while (grant := ray.get(budget.reserve.remote(70, 0, "other"))) == "wait":
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert grant == "spent"
    assert ray.get(alive.hold.remote(60)) == "granted"


@pytest.mark.usefixtures("cluster")
def test_a_workers_trouble_is_told_as_what_it_is(demo_source, person, tmp_path):
    with Ledger(tmp_path / "ledger") as ledger:
        captioner = Captioner(demo_source, person, models("http://127.0.0.1:1/v1"), TWO)
        with pytest.raises(ConnectionError, match="cannot be reached"):
            captioner.ask(ledger)


def test_a_killed_driver_loses_no_more_than_was_under_way(demo_raw, demo_source, person, tmp_path):
    """kill -9 of the driver; its workers may end their calls, and a new run waits for them."""
    file = tmp_path / "models.toml"
    with scripted(demo_raw, Script(latency=0.1)) as server:
        file.write_text(
            f'[[models]]\nname = "scripted-large"\nbase_url = "{server.url}"\nconcurrency = 8\n'
        )
        words = [sys.executable, str(ROOT / "jobs" / "caption.py"), "run", "--workers", "2"]
        words += ["--card", str(ROOT / "datasets" / "demo.toml"), "--source", str(demo_raw)]
        words += ["--models", str(file), "--out", str(tmp_path / "out")]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(words, cwd=ROOT, env=environment)
        deadline = time.monotonic() + 120
        while len(server.stats.answers) < 60 and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        with Ledger(tmp_path / "out" / "ledger") as ledger:
            paid = sum(server.stats.answers.values())
            assert paid >= 60
            assert paid - len(ledger) <= 8
            totals, _ = Captioner(demo_source, person, models(server.url)).ask(ledger)
        assert totals.images == 396
        assert sum(server.stats.answers.values()) - 396 <= 8
