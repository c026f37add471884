"""How the workers of a run find each other.

On a cluster as Ray Train has it. On this machine alone by a store of PyTorch's on loopback: the one
that ``torch.distributed`` makes by itself listens on all interfaces, and asks nobody who he is.
"""

from __future__ import annotations

import socket
from datetime import timedelta
from typing import Any

import ray
import ray.train.torch
import ray.util
import torch.distributed as dist
from ray.train.torch.config import _set_torch_distributed_env_vars, _TorchBackend

_LOOPBACK = "127.0.0.1"
_stores: list[dist.TCPStore] = []
"""What this process offers to others."""


def torch_config() -> ray.train.torch.TorchConfig:
    """For the workers of a trainer, by where the Ray runs that this process is connected to."""
    alone = ray.util.get_node_ip_address() == _LOOPBACK
    return _LoopbackConfig() if alone else ray.train.torch.TorchConfig()


class _LoopbackConfig(ray.train.torch.TorchConfig):
    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _LoopbackBackend


class _LoopbackBackend(_TorchBackend):
    """Ray's, which is asked for another way to begin alone."""

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        port = worker_group.execute_single(0, _offer)
        worker_group.execute(_set_torch_distributed_env_vars)
        on_gpus = worker_group.get_resources_per_worker().get("GPU", 0) > 0
        wait = timedelta(seconds=backend_config.timeout_s)
        size = len(worker_group)
        ray.get(
            [
                worker_group.execute_single_async(
                    rank, _join, port, rank, size, "nccl" if on_gpus else "gloo", wait
                )
                for rank in range(size)
            ]
        )


def _offer() -> int:
    """Port of a store that this process, rank 0, keeps for the others."""
    with socket.socket() as listener:
        listener.bind((_LOOPBACK, 0))
        listener.listen(128)
        port: int = listener.getsockname()[1]
        store = dist.TCPStore(
            _LOOPBACK,
            port,
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )
    _stores[:] = [store]
    return port


def _join(port: int, rank: int, size: int, backend: str, wait: timedelta) -> None:
    store = _stores[0] if rank == 0 else dist.TCPStore(_LOOPBACK, port, timeout=wait)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=wait)
