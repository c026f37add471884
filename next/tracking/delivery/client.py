"""The client's side of MLflow: connecting, finding runs, and telling its errors apart."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any

from next.addresses import reach_directly, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient

RUN_KEY = "next.run_key"
"""Tag that carries :attr:`next.tracking.journal.Opened.key`."""

_DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # we try again ourselves; MLflow's 7 take 4 minutes
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",  # a loaded server may need that for a thousand values
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # The server may keep artifacts in a bucket that this machine cannot reach; MLflow would read
    # them there by presigned addresses, and give up after a minute.
    "MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD": "false",
    "MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD": "false",
}

_EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}
"""Opens MLflow's pages for training; it shows those for language models otherwise."""


class NotDelivered(Exception):
    """The server cannot be reached or cannot take records now; try again later."""


def connect(uri: str) -> MlflowClient:
    """A client of a server, which leaves MLflow's global state alone.

    Short timeouts are set in this process's environment where it does not set its own. MLflow is
    imported here, on first use: it takes 1 to 2 s.
    """
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    reach_directly(uri)
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def experiment_by_name(client: MlflowClient, name: str) -> str:
    """The id of an experiment, created if it is not there; several may ask at once.

    Raises:
        NotDelivered: the experiment was deleted.
    """
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            return str(client.create_experiment(name, tags=_EXPERIMENT_TAGS))
        except MlflowException as error:
            experiment = client.get_experiment_by_name(name)  # somebody was quicker
            if experiment is None:
                raise NotDelivered(short_message(error)) from error
    if experiment.lifecycle_stage != "active":
        raise NotDelivered(
            f"experiment {name!r} is deleted on the server; restore it, or choose another name in "
            f"tracking.experiment"
        )
    return str(experiment.experiment_id)


def find_by_key(
    client: MlflowClient, experiment_id: str, key: str, keep: str | None = None
) -> Any | None:
    """The MLflow run with this ``next.run_key``, alone.

    A server that answers too late creates a run twice.

    Args:
        client: of the server.
        experiment_id: MLflow's id.
        key: of the run.
        keep: id of the one that stays where there are several; None: the oldest.
    """
    from mlflow.entities import ViewType

    runs = client.search_runs(
        [experiment_id],
        filter_string=f"tags.`{RUN_KEY}` = '{key}'",
        run_view_type=ViewType.ALL,
        order_by=["attributes.start_time ASC", "attributes.run_id ASC"],
    )
    active = [run for run in runs if run.info.lifecycle_stage == "active"]
    active.sort(key=lambda run: run.info.run_id != keep)
    for double in active[1:]:
        client.delete_run(double.info.run_id)
    return active[0] if active else runs[0] if runs else None


def check_server(uri: str) -> None:
    """Ask a server whether it would take runs, so that a job fails at its start and not later.

    Raises:
        ValueError: a bad address.
        PermissionError: the server wants other credentials.
        ConnectionError: it cannot be reached, or does not take us.
    """
    from mlflow.exceptions import MlflowException

    try:
        connect(tracking_uri(uri)).search_experiments(max_results=1)
    except MlflowException as error:
        reason = short_message(error)
        if http_status(error) == 401:
            raise PermissionError(
                f"the tracking server at {uri} wants a user and a password, and does not accept "
                f"ours; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD ({reason})"
            ) from error
        raise ConnectionError(
            f"the tracking server at {uri} must take runs, but it does not; check that it runs, "
            f"and that its --allowed-hosts has the name in this address ({reason})"
        ) from error


def http_status(error: Exception) -> int:
    """What the server answered; 500 for an error that is not its answer."""
    from mlflow.exceptions import MlflowException

    return int(error.get_http_status_code()) if isinstance(error, MlflowException) else 500


def short_message(error: Exception) -> str:
    """What matters of a message: the system's error, or else the first line."""
    text = str(error) or type(error).__name__
    system = re.search(r"\[Errno [^'\")]*|\b[Tt]imed out", text)
    return system[0] if system else text.splitlines()[0][:300]
