"""Search spaces: files with a module-level ``suggest(trial)`` that returns dotted settings."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import optuna

from next.config import RunConfig, override

Suggest = Callable[[optuna.Trial], dict[str, Any]]

_DRY_SAMPLES = 200


class Space(NamedTuple):
    """A loaded search space."""

    name: str
    """The file's name without ending."""
    suggest: Suggest
    """Define-by-run: draws with ``trial.suggest_*`` and returns dotted settings."""


def load_space(path: str | Path) -> Space:
    """Import a space's file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be imported, or defines no function ``suggest``.
    """
    path = Path(path)
    if not path.is_file():
        near = sorted(other.name for other in path.parent.glob("*.py"))
        raise FileNotFoundError(
            f"there is no search space {path}"
            + (f"; {path.parent} has {', '.join(near)}" if near else "")
        )
    name = f"tune_space_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # Tune pickles the function by its module's name
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"{path} cannot be imported: {error!r}; mend the file") from error
    suggest = vars(module).get("suggest")
    if not callable(suggest):
        raise ValueError(
            f"{path} must define a function suggest(trial) that returns dotted settings, "
            f"but it defines {', '.join(key for key in vars(module) if key[0] != '_') or 'nothing'}"
        )
    return Space(path.stem, suggest)


def check_space(space: Space, base: RunConfig, samples: int = _DRY_SAMPLES) -> list[str]:
    """Draw from the space before anything starts; returns the names of the settings it varies.

    Raises:
        ValueError: a drawn setting is unknown (with the near match) or out of range, or the
            function fails or returns no settings.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    names: dict[str, None] = {}
    for _ in range(samples):
        trial = study.ask()
        try:
            settings = space.suggest(trial)
        except Exception as error:
            raise ValueError(
                f"space {space.name!r} fails on a random trial: {error!r}; mend suggest(trial)"
            ) from error
        if not isinstance(settings, dict) or not settings:
            raise ValueError(
                f"space {space.name!r} must return a dict of dotted settings, "
                f"but returned {settings!r}"
            )
        stray = sorted(set(trial.params) - set(settings))
        if stray:
            raise ValueError(
                f"space {space.name!r} draws {', '.join(stray)} without returning it; give "
                f"trial.suggest_* the setting's own name and return the value under it"
            )
        try:
            override(base, settings)
        except ValueError as error:
            raise ValueError(f"space {space.name!r}: {error} (drawn: {settings})") from None
        names |= dict.fromkeys(settings)
    return list(names)
