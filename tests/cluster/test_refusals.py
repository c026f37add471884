"""What is refused before anything starts, where machines share nothing."""

import pytest

from tests.cluster.cluster import Cluster, job

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.network,
    pytest.mark.cluster,
    pytest.mark.timeout(900),
]


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


def test_a_store_that_one_machine_cannot_write_is_refused_and_the_machine_is_named(cluster, recipe):
    with cluster.services.machine.network():
        keys = cluster.services.s3.new_user("s3:Get*", "s3:List*")
    reader = cluster.add_worker(5, **keys)
    try:
        cluster.wait_for_nodes(*cluster.workers)
        name = "read-only"
        done = cluster.submit(
            job("sweep", run__name=name, recipe=recipe, space="tune_spaces/quick.py")
        )
    finally:
        cluster.kill_worker(5)
    assert done.returncode == 1, done.stdout
    assert (
        f"checkpoint.storage_path must be read and written by every node of the cluster, but on "
        f"node {reader.address}: s3://data/checkpoints"
    ) in done.stdout
    assert "read-only for these credentials" in done.stdout
    assert_nothing_began(cluster, name)
