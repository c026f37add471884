"""What is refused before anything starts, where machines share nothing."""

import pytest

from tests.cluster.cluster import Cluster, job

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.network, pytest.mark.timeout(900)]


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
