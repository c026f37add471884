"""Search spaces: files with a module-level ``suggest(trial)`` that returns dotted settings.

A file may name what is optimised in ``OBJECTIVES``, metric -> ``max`` or ``min``; without it the
sweep looks for the largest ``val/mAP``.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_args

import optuna

from next.config import METRIC, Metric, RunConfig, near_matches, override

Suggest = Callable[[optuna.trial.BaseTrial], dict[str, Any]]

REPORTED: tuple[str, ...] = get_args(Metric)
"""What a trial reports after each evaluation, and so can be optimised."""

_DRY_SAMPLES = 200
_SHARED = ("run.", "tracking.", "scaling.", "selection.", "data.uri", "data.cache")
"""Settings that no space varies: where trials run, and by what they are judged."""
_BUILT_ON = (
    "data.modalities", "data.image_size", "data.placement", "model.modalities",
    "model.image_size", "model.identities", "model.cameras", "model.trained_cameras",
    "model.backbone.name", "model.backbone.pretrained", "model.backbone.file",
    "model.backbone.sha256", "model.backbone.activation", "model.backbone.text_name",
    "model.backbone.text_pretrained", "model.backbone.text_file", "model.backbone.text_sha256",
    "model.backbone.text_activation",
)  # fmt: skip
"""Settings of which the driver makes the decoded cache, the text bank and the weights that all
trials of a sweep share."""
_FITTED = ("data.", "batch.", "captions.sampling", "model.backbone.", "model.semantic.enabled")
"""Settings that may or may not fit the data, or ask for other weights."""


class Space(NamedTuple):
    """A loaded search space."""

    name: str
    """The file's name without ending."""
    suggest: Suggest
    """Define-by-run: draws with ``trial.suggest_*`` and returns dotted settings."""
    path: Path
    """The file."""
    objectives: Mapping[str, str]
    """Metric -> ``max`` or ``min``; the first one ranks the trials."""


def load_space(path: str | Path) -> Space:
    """Import a space's file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no Python file, cannot be imported, or defines no function ``suggest``.
    """
    path = Path(path)
    if not path.is_file():
        near = sorted(other.name for other in path.parent.glob("*.py"))
        raise FileNotFoundError(
            f"there is no search space {path}"
            + (f"; {path.parent} has {', '.join(near)}" if near else "")
        )
    if path.suffix != ".py":
        raise ValueError(f"a search space must be a .py file, but is {path}; rename it")
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
    objectives = vars(module).get("OBJECTIVES", {METRIC: "max"})
    _check_objectives(path, objectives)
    return Space(path.stem, suggest, path, objectives)


def judged_by(base: RunConfig, space: Space) -> RunConfig:
    """The settings of a sweep whose trials choose their epoch by the space's first objective.

    Raises:
        ValueError: ``selection`` asks for another metric.
    """
    metric, mode = next(iter(space.objectives.items()))
    wanted = {"selection.metric": metric, "selection.mode": mode}
    asked = base.selection
    if asked.metric not in (METRIC, metric) or asked.mode not in ("auto", mode):
        raise ValueError(
            f"selection.metric and selection.mode are those of the first objective in a sweep, "
            f"which space {space.name!r} has as {metric} ({mode}), but got {asked.metric} "
            f"({asked.mode}); leave them out, or write OBJECTIVES = "
            f'{{"{asked.metric}": ...}} into {space.path}'
        )
    return override(base, wanted)


Resolve = Callable[[RunConfig], object]
"""Raises where settings do not fit the data."""


def check_space(
    space: Space, base: RunConfig, resolve: Resolve | None = None, samples: int = _DRY_SAMPLES
) -> list[str]:
    """The names of the settings that a space varies; arguments as :func:`describe_space`."""
    return list(describe_space(space, base, resolve, samples))


def describe_space(
    space: Space, base: RunConfig, resolve: Resolve | None = None, samples: int = _DRY_SAMPLES
) -> dict[str, str]:
    """Draw from the space before anything starts; setting -> what it is drawn from, as text.

    A setting that is returned without being drawn is described by the values that were seen. Two
    spaces with one description search the same settings.

    Args:
        space: what to draw from.
        base: settings that all trials share, resolved.
        resolve: fits the settings of a trial to the data, as the trial would; None: they are not
            held against any.
        samples: how often to draw.

    Raises:
        ValueError: a drawn setting is unknown (with the near match), out of range, does not fit the
            data, is shared by all trials or drawn from two ranges, or the function fails or returns
            no settings.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    drawn: dict[str, str] = {}
    fixed: dict[str, set[str]] = {}
    resolved: set[str] = set()
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
        _require_own(space, settings)
        try:
            config = override(base, settings)
            fitted = repr({name: settings[name] for name in settings if name.startswith(_FITTED)})
            if resolve is not None and fitted not in resolved:
                resolve(config)
                resolved.add(fitted)
        except ValueError as error:
            raise ValueError(f"space {space.name!r}: {error} (drawn: {settings})") from None
        for name, distribution in trial.distributions.items():
            text = _describe(distribution)
            if drawn.setdefault(name, text) != text:
                raise ValueError(
                    f"space {space.name!r} draws {name} from {drawn[name]} in one case and from "
                    f"{text} in another; a setting has one range, so draw it under one condition"
                )
        for name in settings:
            drawn.setdefault(name, "")
            if name not in trial.distributions:
                fixed.setdefault(name, set()).add(repr(settings[name]))
    for name, values in fixed.items():
        parts = ([drawn[name]] if drawn[name] else []) + sorted(values)
        drawn[name] = " or ".join(parts)
    return drawn


def _require_own(space: Space, settings: Mapping[str, Any]) -> None:
    """Raise if a space varies what all trials of a sweep share.

    Raises:
        ValueError: it does; the message names the settings.
    """
    shared = sorted(str(name) for name in settings if str(name).startswith(_SHARED))
    if shared:
        raise ValueError(
            f"space {space.name!r} varies {', '.join(shared)}, but where trials run and by "
            f"what they are judged is the same for all of them; set it for the whole sweep"
        )
    built = sorted(set(settings) & set(_BUILT_ON))
    if built:
        raise ValueError(
            f"space {space.name!r} varies {', '.join(built)}, but of that the decoded cache, the "
            f"text bank or the weights are made, which all trials of a sweep share; run one sweep "
            f"for each value (--{built[0]})"
        )


def space_difference(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """What two descriptions differ in, a line each; empty for the same space."""
    lines = [f"{name}: {old[name]} -> not varied" for name in old if name not in new]
    lines += [f"{name}: not varied -> {new[name]}" for name in new if name not in old]
    lines += [
        f"{name}: {old[name]} -> {new[name]}"
        for name in old
        if name in new and old[name] != new[name]
    ]
    return lines


def _describe(distribution: optuna.distributions.BaseDistribution) -> str:
    if isinstance(distribution, optuna.distributions.CategoricalDistribution):
        return f"one of {', '.join(map(str, distribution.choices))}"
    kind = "whole number" if isinstance(distribution, optuna.distributions.IntDistribution) else ""
    text = f"{kind} {distribution.low} to {distribution.high}".strip()
    text += " (log)" if distribution.log else ""
    step = distribution.step
    return text + (f" in steps of {step}" if step not in (None, 1) else "")


def _check_objectives(path: Path, objectives: Any) -> None:
    if not isinstance(objectives, dict) or not objectives:
        raise ValueError(
            f'{path}: OBJECTIVES must be a dict such as {{"val/mAP": "max"}}, but is {objectives!r}'
        )
    for metric, direction in objectives.items():
        if metric not in REPORTED:
            near = near_matches(str(metric), list(REPORTED))
            raise ValueError(
                f"{path}: OBJECTIVES names {metric!r}, which no trial reports; "
                + (f"did you mean {near[0]}?" if near else f"choose from {', '.join(REPORTED)}")
            )
        if direction not in ("max", "min"):
            raise ValueError(
                f"{path}: OBJECTIVES must say max or min for {metric}, but says {direction!r}"
            )
