"""What is refused before anything starts, where machines share nothing."""

import re

import pytest

from tests.cluster.cluster import Cluster, give_another, job

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.network,
    pytest.mark.timeout(1500),
]


def submitted_beside(cluster: Cluster, number: int, recipe: str, name: str) -> str:
    """What a sweep says that is refused because of a machine, which is switched off then."""
    try:
        cluster.wait_for_nodes(*cluster.workers)
        line = job("sweep", run__name=name, recipe=recipe, space="tune_spaces/quick.py")
        done = cluster.submit(line)
    finally:
        cluster.kill_worker(number)
    assert done.returncode == 1, done.stdout
    assert_nothing_began(cluster, name)
    return str(done.stdout)


def assert_nothing_began(cluster: Cluster, name: str) -> None:
    assert cluster.services.keys(f"s3://data/checkpoints/{name}/") == []
    assert not cluster.head.path(f"/srv/runs/{name}/sweep.toml").exists()
    assert name not in {run.name for run in cluster.services.runs("demo")}


def test_a_sweep_without_a_store_is_refused_with_the_setting_that_mends_it(cluster, recipe):
    line = job("sweep", run__name="unstored", recipe=recipe, space="tune_spaces/quick.py")
    done = cluster.submit(line.replace(" --checkpoint.storage_path $KEEP", ""))
    assert done.returncode == 1, done.stdout
    assert "must be seen by every node of the cluster, but node 10.77.0." in done.stdout
    assert "set checkpoint.storage_path to s3://bucket/prefix" in done.stdout
    assert_nothing_began(cluster, "unstored")


@pytest.mark.cluster
def test_a_store_that_one_machine_cannot_write_is_refused_and_the_machine_is_named(cluster, recipe):
    with cluster.services.machine.network():
        keys = cluster.services.s3.new_user("s3:Get*", "s3:List*")
    reader = cluster.add_worker(5, **keys)
    said = submitted_beside(cluster, 5, recipe, "read-only")
    assert (
        f"checkpoint.storage_path must be read and written by every node of the cluster, but on "
        f"node {reader.address}: s3://data/checkpoints"
    ) in said
    assert "read-only for these credentials" in said


@pytest.mark.cluster
def test_a_store_that_one_machine_cannot_reach_is_refused_and_the_machine_is_named(cluster, recipe):
    away = cluster.add_worker(5)
    done = away.run(f"ip route add prohibit {cluster.services.machine.address}")
    assert done.returncode == 0, done.stdout
    said = submitted_beside(cluster, 5, recipe, "out-of-reach")
    assert f"node {away.address}" in said
    assert "Could not connect to server" in said


@pytest.mark.cluster
def test_a_machine_whose_clock_is_an_hour_ahead_is_named(cluster, recipe):
    ahead = cluster.add_worker(6, ahead_s=3600)
    said = submitted_beside(cluster, 6, recipe, "ahead")
    assert ahead.address in said
    assert re.search(r"its clock is 3[56]\d\d s ahead of the driver's", said), said


@pytest.mark.cluster
def test_a_machine_with_another_torch_is_named(cluster, recipe):
    other = cluster.add_worker(6, PYTHONPATH="/srv/other")
    give_another(other, "torch", "2.14.0")
    said = submitted_beside(cluster, 6, recipe, "other")
    assert other.address in said
    assert "torch is 2.14.0, the driver has " in said
