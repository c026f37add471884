"""One real MLflow server for all tests of this folder."""

import pytest

from next.tracking.client import connect
from next.tracking.server import start_server


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    with start_server(tmp_path_factory.mktemp("mlflow")) as server:
        yield server


@pytest.fixture(scope="session")
def client(server):
    return connect(server.uri)
