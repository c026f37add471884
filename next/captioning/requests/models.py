"""Which models are asked, where, how fast, and at what price: a TOML file."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from next.addresses import require_no_secret, server_address
from next.captioning.requests.spending import Spending
from next.captioning.schema.attributes import validated
from next.config import Section, near_matches

_KEY = "the variable that api_key_env names"
_SECRET_NAME = re.compile(
    r"^(?:token|key)$|api_?key|password|authorization|credential|secret$"
    r"|(?:auth|access|secret)[_-]?(?:key|token)",
    re.IGNORECASE,
)
_SECRET = re.compile(r"(?:sk-|Bearer )\S{4,}")


class ModelConfig(Section):
    """One model behind one URL."""

    name: str = Field(min_length=1)
    """As the endpoint calls it."""
    base_url: str
    """Such as ``http://localhost:8000/v1``."""
    api_key_env: str | None = None
    """Environment variable that holds the key; None: the endpoint wants none."""
    concurrency: int = Field(default=16, ge=1)
    """Calls under way at a time."""
    requests_per_minute: float | None = Field(default=None, gt=0)
    """None: no limit of ours."""
    tokens_per_minute: float | None = Field(default=None, gt=0)
    """None: no limit of ours."""
    timeout_s: float = Field(default=120, gt=0)
    """Seconds until a call counts as lost."""
    retries: int = Field(default=6, ge=0)
    """Times that a call is sent again after 408, 409, 425, 429, 5xx, a time-out or a cut line."""
    backoff_s: float = Field(default=0.5, gt=0)
    """Seconds before the first retry, doubled for each further one, with jitter."""
    reasks: int = Field(default=1, ge=0)
    """Times that a model is asked again after an answer that cannot be read; these cost."""
    structured: Literal["auto", "json_schema", "json_object", "none"] = "auto"
    """How the form of the answer is demanded; auto: the strictest way that the endpoint takes."""
    max_tokens: int | None = Field(default=1500, ge=16)
    """Longest answer; None: not sent (a model may want ``extra = { max_completion_tokens = ... }``
    instead)."""
    temperature: float | None = Field(default=0.0, ge=0)
    """None: not sent, as some models refuse it."""
    seed: int | None = None
    """None: not sent."""
    extra: dict[str, Any] = Field(default_factory=dict)
    """Further fields of the request's body."""
    price_in: float = Field(default=0.0, ge=0)
    """Price of a million tokens of prompts, images included."""
    price_out: float = Field(default=0.0, ge=0)
    """Price of a million tokens of answers."""
    expected_tokens_in: int = Field(default=1500, ge=1)
    """Tokens of one prompt with its image, until there is experience."""
    expected_tokens_out: int = Field(default=600, ge=1)
    """Tokens of one answer, until there is experience."""

    @field_validator("base_url")
    @classmethod
    def _is_a_url(cls, url: str) -> str:
        return server_address(url, instead=_KEY)

    def settings(self) -> dict[str, Any]:
        """What decides an answer beside image, prompt and model."""
        fields = {name: getattr(self, name) for name in ("max_tokens", "temperature", "seed")}
        return {name: value for name, value in fields.items() if value is not None} | self.extra

    def cost(self, tokens_in: int, tokens_out: int) -> Spending:
        """Tokens and their price."""
        money = (tokens_in * self.price_in + tokens_out * self.price_out) / 1e6
        return Spending(tokens_in + tokens_out, money)

    def key(self) -> str | None:
        """The key, from the environment.

        Raises:
            ValueError: the variable is not set or empty.
        """
        if self.api_key_env is None:
            return None
        key = os.environ.get(self.api_key_env, "").strip()
        if not key:
            raise ValueError(
                f"model {self.name}: the environment variable {self.api_key_env} must hold the "
                f"key of {self.base_url}, but it is not set; export it, or remove api_key_env if "
                f"the endpoint wants no key"
            )
        return key


class ModelsFile(Section):
    """A TOML file of ``[[models]]``."""

    models: tuple[ModelConfig, ...] = Field(min_length=1)
    """Asked all; their names differ."""

    @field_validator("models")
    @classmethod
    def _names_differ(cls, models: tuple[ModelConfig, ...]) -> tuple[ModelConfig, ...]:
        names = [model.name for model in models]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"names must differ, but {name!r} stands twice; remove one")
        return models


def load_models(path: str | Path) -> tuple[ModelConfig, ...]:
    """Read the models to ask.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not TOML, or a key or value is wrong; the message names file, model and key.
    """
    path = Path(path)
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        beside = [other.name for other in path.parent.glob("*.toml")]
        close = near_matches(path.name, beside)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise FileNotFoundError(f"{path}: there is no such file of models{hint}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from None
    tables = tree.get("models")
    for number, table in enumerate(tables if isinstance(tables, list) else [], start=1):
        label = table.get("name", number) if isinstance(table, dict) else number
        _refuse_secrets(table, f"{path}: model {label}")
        validated(ModelConfig, table, f"{path}: model {label}")
    return validated(ModelsFile, tree, str(path)).models


def _refuse_secrets(table: Any, where: str) -> None:
    """A key does not belong into the file; the message does not repeat it."""
    if not isinstance(table, dict):
        return
    require_no_secret(str(table.get("base_url", "")), f"{where}: base_url", instead=_KEY)
    name = table.get("api_key_env")
    if name is not None and not re.fullmatch(r"[A-Z_][A-Z0-9_]*", str(name)):
        raise ValueError(
            f"{where}: api_key_env must name an environment variable (capital letters), and not "
            f"hold the key itself"
        )
    for name in _secrets(table.get("extra")):
        raise ValueError(
            f"{where}: extra.{name} must hold no key, since extra is written to the ledger; name "
            f"the environment variable that holds it in api_key_env"
        )


def _secrets(fields: Any) -> Iterator[str]:
    """Dotted names of the fields, at any depth, that hold a key by their name or their look."""
    pairs = fields.items() if isinstance(fields, dict) else ()
    for name, value in pairs:
        if _SECRET_NAME.search(str(name)) or (isinstance(value, str) and _SECRET.match(value)):
            yield str(name)
        yield from (f"{name}.{inner}" for inner in _secrets(value))
