"""Serve a model and galleries over HTTP: embed images, search by images, a page for people."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING

from next.cli import ModelFlags, Place, parse, run_job

if TYPE_CHECKING:
    from next.serving.following import Follower

TOKEN_FILE = Path("~/.next-reid/token")


@dataclass(frozen=True)
class ServeJob:
    """Answer POST /embed and POST /search until it is stopped; GET / is a page for people."""

    model: str
    """Folder of a checkpoint such as runs/NAME/checkpoints/best, or a registered model:
    models:/NAME/VERSION or models:/NAME@champion. A newer one is taken when galleries by it are
    there (jobs/embed.py --again)."""
    gallery: str
    """Folder of a gallery that jobs/embed.py wrote, or of several such folders, which are searched
    together; one that is added later is seen."""
    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 is all of this machine's, and sends images and token in clear
    text: put a proxy with TLS before it."""
    port: int = 8000
    """Port to listen at."""
    token_file: Path | None = None
    """File with the token that requests must bring, made with a new one if it is not there; None:
    the environment variable NEXT_REID_TOKEN, else ~/.next-reid/token."""
    replicas: int = 1
    """Processes that share the work, each with a processor and the whole model and gallery."""
    most_mebibytes: float = 32.0
    """Of a request."""
    most_megapixels: float = 25.0
    """Of an image, in millions of pixels."""
    most_results: int = 100
    """That a request may ask for."""
    batch: int = 16
    """Requests that are embedded and searched together at most."""
    batch_wait_ms: float = 5.0
    """That a request waits for others to come along."""
    refresh_seconds: float = 10.0
    """Between looks for new galleries and new versions of the model."""
    drain_seconds: float = 30.0
    """That requests in flight have to finish when the service is stopped."""
    use_gpu: bool | None = None
    """Compute on a GPU, one for each replica; None: if this machine has one."""
    dry_run: bool = False
    """Check model, gallery, token and port, and serve nothing."""
    json: bool = False
    """Print the answers as JSON objects, one a line."""
    place: Place = ModelFlags()  # noqa: RUF009 (frozen)


def main(argv: Sequence[str]) -> int:
    """Parse, call, exit code."""
    job = parse(ServeJob, argv)
    if job.replicas < 1 or not 1 <= job.port <= 65535:
        raise ValueError(
            f"--replicas must be 1 or more and --port from 1 to 65535, but got {job.replicas} and "
            f"{job.port}"
        )
    # After the command line, because they take seconds.
    import torch

    from next.serving.following import Follower
    from next.serving.launch import registry_of, require_free, serve_here
    from next.serving.settings import digest_of, settings_of
    from next.training.step.process import wanted_device

    if job.place.threads is not None:
        torch.set_num_threads(job.place.threads)
    token, where = _token(job)
    storage = str(job.place.storage_path)
    with registry_of(job.model, job.place.tracking_uri, storage) as uri:
        same = (
            *("most_mebibytes", "most_megapixels", "most_results", "batch", "batch_wait_ms"),
            *("refresh_seconds", "drain_seconds"),
        )
        settings = settings_of(
            {
                "model": job.model if uri else _absolute(job.model),
                "gallery": _absolute(job.gallery),
                "token_digest": digest_of(token),
                "tracking_uri": uri,
                "use_gpu": wanted_device(job.use_gpu).type == "cuda",
                **{name: getattr(job, name) for name in same},
            }
        )
        if job.dry_run:
            require_free(job.host, job.port)
            _tell(job, where, Follower(settings))
            return 0
        serve_here(
            settings,
            host=job.host,
            port=job.port,
            replicas=job.replicas,
            ready=lambda held: _tell(job, where, held),
        )
    return 0


def _absolute(address: str) -> str:
    """An address that means the same to replicas, which are not started here."""
    return address if "://" in address else str(Path(address).expanduser().absolute())


def _token(job: ServeJob) -> tuple[str, str]:
    """The token, and where it is from."""
    from os import environ

    from next.serving.settings import TOKEN, read_token

    if job.token_file is None and environ.get(TOKEN):
        return read_token(None), TOKEN
    file = (job.token_file or TOKEN_FILE).expanduser()
    return read_token(file), str(file)


def _tell(job: ServeJob, where: str, held: Follower) -> None:
    host = f"[{job.host}]" if ip_address(job.host).version == 6 else job.host
    collection, model = held.holding.collection, held.holding.model
    answer = {
        "address": f"http://{host}:{job.port}",
        "token": where,
        "model": model.digest,
        "gallery": collection.digest,
        "galleries": len(collection.parts),
        "rows": len(collection),
        "replicas": job.replicas,
    }
    shown = (
        f"{'would serve' if job.dry_run else 'serving'} {len(collection)} rows by model "
        f"{model.digest[:16]} at {answer['address']} (page /, interface /docs); requests bring the "
        f"token of {where}"
    )
    print(json.dumps(answer) if job.json else shown, flush=True)


if __name__ == "__main__":
    run_job(main, kept="requests in flight were answered")
