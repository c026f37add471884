"""How a service is set, and the token that those who use it must know."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from next.config import Section, describe
from next.storage import drafting

TOKEN = "NEXT_REID_TOKEN"
"""Environment variable that has the token, instead of a file."""
SHORTEST = 16
"""Characters of a token."""

Positive = Annotated[int, Field(ge=1)]


class ServeSettings(Section):
    """What each replica of a service is told; nothing of it is secret."""

    model: str
    """Folder of a checkpoint, or a registered model (models:/NAME/VERSION, models:/NAME@ALIAS)."""
    gallery: str
    """Folder of a gallery that jobs/embed.py wrote, or of several such folders."""
    token_digest: str
    """SHA-256 of the token, in hexadecimal digits: whoever reads the settings cannot use it."""
    tracking_uri: str | None = None
    """MLflow server that has a registered model."""
    most_mebibytes: Annotated[float, Field(gt=0)] = 32.0
    """Of a request."""
    most_megapixels: Annotated[float, Field(gt=0, le=64)] = 25.0
    """Of an image, in millions of pixels."""
    most_results: Positive = 100
    """That a request may ask for."""
    refresh_seconds: Annotated[float, Field(gt=0)] = 10.0
    """Between looks for new galleries and new versions of the model."""
    batch: Positive = 16
    """Requests that are embedded and searched together at most."""
    batch_wait_ms: Annotated[float, Field(ge=0)] = 5.0
    """That a request waits for others to come along."""
    ongoing: Positive = 64
    """Requests that a replica works on at a time."""
    queued: Positive = 256
    """Requests that wait for a replica; more are answered 503 at once."""
    drain_seconds: Annotated[float, Field(gt=0, le=50)] = 30.0
    """That requests in flight have to finish when the service is stopped; Ray Serve waits 60 s for
    all that is to end."""
    use_gpu: bool = False
    """Compute on a GPU, one for each replica."""

    @property
    def device(self) -> str:
        """Where a replica computes."""
        return "cuda" if self.use_gpu else "cpu"


def settings_of(values: Mapping[str, Any]) -> ServeSettings:
    """Settings from their values by name.

    Raises:
        ValueError: one is unknown, missing or out of range; a line for each.
    """
    try:
        return ServeSettings.model_validate(dict(values))
    except ValidationError as error:
        raise ValueError(describe(error)) from None


def digest_of(token: str) -> str:
    """What a service keeps of a token."""
    return hashlib.sha256(token.encode()).hexdigest()


def is_token(given: str, digest: str) -> bool:
    """Whether this is the token of a digest; takes as long for every wrong one."""
    return hmac.compare_digest(digest_of(given), digest)


def read_token(file: Path | None) -> str:
    """The token of a service.

    Args:
        file: that holds it, made with a new one if there is none; None: the environment variable
            :data:`TOKEN` has it.

    Raises:
        OSError: the file cannot be read or written.
        ValueError: it is too short.
    """
    if file is None:
        token, where = os.environ.get(TOKEN, "").strip(), f"the environment variable {TOKEN}"
    else:
        if not file.exists():
            _make(file)
        token, where = file.read_text(encoding="utf-8").strip(), str(file)
    if len(token) < SHORTEST or not token.isascii() or len(token.split()) != 1:
        raise ValueError(
            f"{where} must hold a token of {SHORTEST} ASCII characters or more without spaces, "
            f"but has {len(token)}; make one by: openssl rand -hex 32"
        )
    return token


def _make(file: Path) -> None:
    """Write a new token that its owner alone can read."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with drafting(file, private=True) as draft:
        made = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(made, "w", encoding="utf-8") as text:
            text.write(secrets.token_hex(32) + "\n")
