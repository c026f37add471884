"""A small space for a first look, and for the demo: few values, each of which matters."""

from typing import Any

import optuna


def suggest(trial: optuna.trial.BaseTrial) -> dict[str, Any]:
    """Draw expert counts, routing temperature and caption sampling from few values."""
    settings: dict[str, Any] = {
        "model.semantic.experts": trial.suggest_categorical("model.semantic.experts", [2, 4, 8]),
        "model.structure.experts": trial.suggest_categorical("model.structure.experts", [2, 4]),
        "model.routing.temperature": trial.suggest_float(
            "model.routing.temperature", 0.25, 2.0, log=True
        ),
        "captions.sampling": trial.suggest_categorical(
            "captions.sampling", ["all", "subset", "none"]
        ),
    }
    if settings["captions.sampling"] == "subset":
        settings["captions.keep"] = trial.suggest_float("captions.keep", 0.4, 0.9)
    return settings
