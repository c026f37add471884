"""A real MLflow server for the tests of this folder that look at what it holds."""

import pytest

from next.tracking.server import start_server


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    with start_server(tmp_path_factory.mktemp("mlflow")) as server:
        yield server
