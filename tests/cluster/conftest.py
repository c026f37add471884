"""A cluster whose machines share nothing: a head without CPUs, workers, and the services."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from next.config import RunConfig, override, to_toml
from tests.cluster.cluster import Cluster, Services, cluster_of, job, services_of
from tests.cluster.machines import Machines
from tests.conftest import TINY
from tests.deploy.conftest import Finished


@pytest.fixture(scope="session")
def switch() -> Iterator[Machines]:
    """What machines can be added to, where this machine allows namespaces."""
    if os.geteuid() != 0:
        pytest.skip("machines of their own namespaces need root, and this is another user")
    missing = [name for name in ("unshare", "nsenter", "setpriv", "ip") if not shutil.which(name)]
    if missing:
        pytest.skip(f"machines of their own namespaces need {', '.join(missing)}")
    with tempfile.TemporaryDirectory(prefix="next-cluster-") as folder:
        try:
            machines = Machines(Path(folder))
            machines.add(99, {}).kill()
        except PermissionError as error:
            pytest.skip(f"namespaces are not allowed here: {error}")
        try:
            yield machines
        finally:
            machines.close()


def compile_sources() -> None:
    """Compile what the machines import: each would do it anew, as it may not write beside it."""
    [packages] = {path for path in sys.path if path.endswith("site-packages")}
    wanted = ("ray", "mlflow", "torch", "torchvision", "optuna", "pyarrow", "moto", "open_clip")
    subprocess.run(
        [
            *(sys.executable, "-m", "compileall", "-q", "-j", "2"),
            *("-x", re.escape(packages) + r"/(ray/(rllib|serve|llm)|torch/(testing|_inductor))/"),
            *(f"{packages}/{name}" for name in wanted),
        ],
        stdout=subprocess.DEVNULL,
        check=False,  # a file for another version of Python is no matter
    )


@pytest.fixture(scope="session")
def services(switch: Machines) -> Services:
    compile_sources()
    return services_of(switch)


@pytest.fixture(scope="session")
def cluster(switch: Machines, services: Services) -> Iterator[Cluster]:
    """A head and two workers."""
    with cluster_of(switch, services, 2, 3) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def prepared(cluster: Cluster, demo_raw) -> Finished:
    """The job that wrote the shards, with the page's line."""
    cluster.services.upload(demo_raw, "s3://data/raw")
    done = cluster.submit(job("prepare", card="datasets/demo.toml"))
    assert done.returncode == 0, done.stdout[-4000:]
    return done


@pytest.fixture(scope="session")
def recipe(cluster: Cluster, prepared) -> str:
    """A recipe on the head's disk (a new head's, too), with which a run takes seconds."""
    settings = to_toml(override(RunConfig(), TINY | {"tracking.enabled": True}))
    path = cluster.give("recipe.toml", settings)
    cluster.services.machine.path(path).write_text(settings)
    return path
