"""A Ray of this process alone, on this machine, that nobody else reaches.

Ray runs code for whoever connects to it and has its token. By itself it listens on all interfaces,
also where there is one machine, and writes the token readable by everybody.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from next.storage import drafting

_LOCK_SECONDS = 60.0


def on_cluster() -> bool:
    """Whether a cluster is given; else Ray, if it is needed at all, runs on this machine alone."""
    return os.environ.get("RAY_ADDRESS", "local") not in ("", "local")


def join_or_start_ray(cpus: int) -> None:
    """The cluster that ``RAY_ADDRESS`` names, else :func:`start_local_ray`; ended as that is."""
    if not on_cluster():
        start_local_ray(cpus)
        return
    import ray

    from next.session import beginning

    with beginning():
        ray.init(log_to_driver=False)


@contextmanager
def ray_for_data(workers: int) -> Iterator[None]:
    """Ray for so many workers of Ray Data, joined or started for the block if it does not run yet.

    Ray Data itself says nothing.
    """
    import ray
    import ray.data

    from next.session import end_ray

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    # Data of one small file keep one worker busy; that is as it should be.
    warnings.filterwarnings("ignore", message="The minimum number of concurrent actors")
    started = not ray.is_initialized()
    if started:
        join_or_start_ray((os.cpu_count() or 1) + workers)
    try:
        yield
    finally:
        if started:
            end_ray()


def start_local_ray(cpus: int) -> None:
    """Start Ray on loopback; who needs it must end it with :func:`next.session.end_ray`.

    Args:
        cpus: logical CPUs that it declares.

    Raises:
        TimeoutError: it does not come up.
    """
    import ray

    from next.session import beginning

    make_token()
    with _on_loopback(), beginning():
        try:
            ray.init(
                address="local",
                num_cpus=cpus,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        except Exception as error:
            if "timed out during startup" not in str(error):
                raise
            raise TimeoutError(
                "Ray did not come up on this machine within its own limit of 30 s: one of its "
                "processes was ended, or the machine is too busy; nothing that was kept is lost. "
                "Give the command again, when less else runs here"
            ) from None


@contextmanager
def _on_loopback() -> Iterator[None]:
    """A Ray that is started in the block has the node address 127.0.0.1.

    So all its processes listen there alone. Ray replaces that address by one of the network where
    it is asked for it, unless it believes that it cannot be a cluster (as on macOS).
    """
    from ray._private import ray_constants

    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def make_token() -> None:
    """Have the token of a Ray on this machine, readable by its owner alone, before Ray starts."""
    given = (os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token" or any(given):
        return
    from ray._private.authentication.authentication_token_generator import (
        generate_new_authentication_token,
    )

    path = Path.home() / ".ray" / "auth_token"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name("auth_token.lock"), timeout=_LOCK_SECONDS):
        if not path.exists():
            with drafting(path, private=True) as draft:
                made = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
                with os.fdopen(made, "w", encoding="utf-8") as file:
                    file.write(generate_new_authentication_token())
    path.chmod(0o600)  # Ray itself made it readable by everybody
