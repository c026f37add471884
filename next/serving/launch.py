"""A service on this machine, from its checks to the last answer: what ``jobs/serve.py`` does.

Ray Serve's proxy listens at one address (loopback by default) and hands requests to replicas; Ray
itself listens on loopback alone. When the service is asked to stop, requests in flight are answered
first.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from ipaddress import ip_address

from next.local_ray import start_local_ray
from next.serving.following import Follower
from next.serving.settings import ServeSettings
from next.stopping import lost_ray
from next.tracking.registry.versions import registry_server

_DRAINED_SECONDS = 0.2
_PATIENCE = {
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "30",
}
"""Ray Serve ends a proxy that is not ready after 5 s; on a busy machine its imports take longer."""


def serve_here(
    settings: ServeSettings,
    *,
    host: str,
    port: int,
    replicas: int,
    ready: Callable[[Follower], None],
) -> None:
    """Serve until somebody interrupts.

    Args:
        settings: of the service.
        host: address to listen at.
        port: likewise.
        replicas: processes that share the work.
        ready: called when requests are answered, with what they are answered with.

    Raises:
        OSError: model or gallery cannot be read, or the port is in use.
        ValueError: model and gallery do not fit, or the host is no address of this machine.
        KeyboardInterrupt: it was interrupted, and all that was in flight is answered.
    """
    require_free(host, port)
    checked = Follower(settings)  # what cannot be served is told before anything starts
    with _serving(host, port, replicas, settings):
        ready(checked)
        del checked
        while True:
            time.sleep(3600)


@contextmanager
def registry_of(model: str, tracking_uri: str | None, storage_path: str) -> Iterator[str | None]:
    """The server that has a registered model, while the block runs; None: the model is a folder."""
    if not model.startswith("models:"):
        with nullcontext():
            yield None
        return
    with registry_server(tracking_uri, storage_path) as uri:
        yield uri


def require_free(host: str, port: int) -> None:
    """Refuse a port that somebody listens on: two of Ray's proxies would share it in silence.

    Raises:
        OSError: it is in use.
        ValueError: the host is no address of this machine.
    """
    try:
        family = socket.AF_INET6 if ip_address(host).version == 6 else socket.AF_INET
    except ValueError:
        raise ValueError(
            f"--host must be an address, such as 127.0.0.1 or 0.0.0.0, but got {host!r}"
        ) from None
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen()
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise OSError(
                    f"--port {port} of {host} is in use by another program; give another --port, "
                    f"or stop that program"
                ) from None
            if error.errno == errno.EADDRNOTAVAIL:
                raise ValueError(f"--host {host} is no address of this machine") from None
            raise OSError(f"--port {port} of {host} cannot be listened on: {error}") from None


@contextmanager
def _serving(host: str, port: int, replicas: int, settings: ServeSettings) -> Iterator[None]:
    """Ray and the service on it, while the block runs; then drained and ended."""
    from ray import serve
    from ray.exceptions import RayError

    from next.serving.deployment import NAME, bound
    from next.session import end_ray

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    for name, seconds in _PATIENCE.items():
        os.environ.setdefault(name, seconds)
    start_local_ray(replicas + 1)
    try:
        try:
            serve.start(
                proxy_location="HeadOnly",
                http_options={"host": host, "port": port},
                logging_config={"log_level": "WARNING", "enable_access_log": False},
            )
        except (RayError, TimeoutError):
            raise TimeoutError(
                "Ray Serve did not come up on this machine within its own limit of 60 s: one of "
                "its processes was ended, or the machine is too busy. Give the command again, when "
                "less else runs here"
            ) from None
        try:
            serve.run(bound(settings, replicas), name=NAME, route_prefix="/")
            yield
        finally:
            if lost_ray() is None:
                serve.delete(NAME)  # waits for the requests in flight, and takes no others
                time.sleep(_DRAINED_SECONDS)  # the proxy sends the last answers
    finally:
        end_ray()
