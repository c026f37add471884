"""The process behind :func:`next.tracking.server.start_server`: MLflow's application, alone.

``mlflow server`` is a parent that only waits beside a worker that serves, and both import all of
MLflow, one after the other: 8.7 s and 475 MB on two idle cores. Serving the same application from
this process takes 4.4 s and 260 MB. The names taken from MLflow for that are the application's
address and the variables by which ``mlflow server`` configures its worker; the tests of
``tests/tracking/test_server.py`` hold them against the installed version.
"""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import sys
import threading
import time
import warnings
from pathlib import Path

_WATCH_SECONDS = 0.5
_GRACE_SECONDS = 5.0
_KEEP_ALIVE_SECONDS = 120
"""Longer than clients pause: a call that meets the closing of its connection fails."""


def serve(folder: Path, listener: socket.socket) -> None:
    """Serve ``folder``'s store on a bound socket until nobody holds its lease."""
    threading.Thread(target=_watch_lease, args=(folder / "server.lease",), daemon=True).start()
    for name in [name for name in os.environ if name.startswith(("MLFLOW_", "_MLFLOW_"))]:
        del os.environ[name]  # whatever the user set for clients is not meant for this server
    os.environ |= {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    warnings.simplefilter("ignore")  # MLflow's own imports raise some
    from mlflow.server import constants
    from mlflow.server.handlers import initialize_backend_stores

    store, artifacts = f"sqlite:///{folder / 'mlflow.db'}", folder / "mlartifacts"
    artifacts.mkdir(exist_ok=True)
    os.environ |= {
        constants.BACKEND_STORE_URI_ENV_VAR: store,
        constants.REGISTRY_STORE_URI_ENV_VAR: store,
        constants.ARTIFACT_ROOT_ENV_VAR: "mlflow-artifacts:/",
        constants.ARTIFACTS_DESTINATION_ENV_VAR: artifacts.as_uri(),
        constants.SERVE_ARTIFACTS_ENV_VAR: "true",
    }
    initialize_backend_stores(store, store, "mlflow-artifacts:/")

    import uvicorn

    config = uvicorn.Config(
        "mlflow.server.fastapi_app:app",
        access_log=False,
        log_level="warning",
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
    )
    uvicorn.Server(config).run(sockets=[listener])


def _watch_lease(lease: Path) -> None:
    """End this process once no other one holds the lease (a dead process holds nothing)."""
    with lease.open("a", encoding="utf-8") as file:
        while True:
            time.sleep(_WATCH_SECONDS)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(_GRACE_SECONDS)
            os._exit(1)


if __name__ == "__main__":
    serve(Path(sys.argv[1]), socket.socket(fileno=int(sys.argv[2])))
