"""A replica of the service on Ray Serve, and how many requests it takes together."""

from __future__ import annotations

import asyncio
from typing import Any

import ray.serve._private.replica as replica_of_ray
import ray.util
from fastapi import HTTPException
from ray import serve

from next.serving.application import Answered, Item, build, work
from next.serving.following import Follower
from next.serving.settings import ServeSettings, digest_of, read_token, settings_of

NAME = "next-reid"
"""Of the application on Ray Serve."""
_LOOPBACK = "127.0.0.1"


@serve.ingress()
class Replica:
    """A process that holds the model and its galleries, and answers requests.

    Args:
        settings: of the service, as JSON can hold them.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        if ray.util.get_node_ip_address() == _LOOPBACK:
            _stay_on_loopback()
        self._settings = settings_of(settings)
        self._follower = Follower(self._settings)
        self._follower.start()
        # Made here, because a decorator would set sizes for all services alike.
        self._together = serve.batch(
            max_batch_size=self._settings.batch,
            batch_wait_timeout_s=self._settings.batch_wait_ms / 1000,
        )(_answer)

    def __serve_build_asgi_app__(self) -> Any:
        """Ray Serve's name for what makes the application, once the replica is there."""
        return build(self._settings, self._follower, self._batched)

    async def _batched(self, item: Item) -> Answered:
        answer = await self._together(item)
        if isinstance(answer, ValueError):
            raise HTTPException(422, f"{answer}")
        if isinstance(answer, Exception):
            raise answer
        found: Answered = answer
        return found


def _stay_on_loopback() -> None:
    """Have Ray Serve's server between replicas listen where this machine's Ray does.

    It asks for all interfaces, and takes calls without a token.
    """
    add = replica_of_ray.add_port_to_grpc_server

    def add_on_loopback(server: Any, address: str) -> Any:
        return add(server, f"{_LOOPBACK}:{address.rpartition(':')[2]}")

    replica_of_ray.add_port_to_grpc_server = add_on_loopback


async def _answer(items: list[Item]) -> list[Answered | Exception]:
    return await asyncio.to_thread(work, items)


def application(arguments: dict[str, Any]) -> serve.Application:
    """The application for Ray Serve's configuration files, such as a RayService's.

    Args:
        arguments: fields of :class:`next.serving.settings.ServeSettings` but the token, which the
            environment variable has (:data:`next.serving.settings.TOKEN`), and ``replicas``.

    Raises:
        ValueError: an unknown field, a bad value, or no token.
    """
    arguments = dict(arguments)
    replicas = int(arguments.pop("replicas", 1))
    token = digest_of(read_token(None))
    return bound(settings_of(arguments | {"token_digest": token}), replicas)


def bound(settings: ServeSettings, replicas: int) -> serve.Application:
    """The application of so many replicas, with a processor each."""
    deployed = serve.deployment(
        Replica,
        name="replica",
        num_replicas=replicas,
        max_ongoing_requests=settings.ongoing,
        max_queued_requests=settings.queued,
        graceful_shutdown_timeout_s=settings.drain_seconds,
        graceful_shutdown_wait_loop_s=0.2,
        health_check_period_s=2,
        ray_actor_options={"num_cpus": 1, "num_gpus": 1 if settings.use_gpu else 0},
    )
    return deployed.bind(settings.model_dump(mode="json"))
