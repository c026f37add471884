"""The paper's question: how many experts, how sharp the routing, which sentences for whom."""

from typing import Any

import optuna


def suggest(trial: optuna.trial.BaseTrial) -> dict[str, Any]:
    """Draw expert counts, routing temperature and caption sampling."""
    settings: dict[str, Any] = {
        "model.semantic.experts": trial.suggest_categorical("model.semantic.experts", [1, 2, 4, 8]),
        "model.structure.experts": trial.suggest_categorical(
            "model.structure.experts", [1, 2, 4, 8]
        ),
        "model.structure.slots": trial.suggest_int("model.structure.slots", 1, 4),
        "model.routing.temperature": trial.suggest_float(
            "model.routing.temperature", 0.1, 4.0, log=True
        ),
        "captions.sampling": trial.suggest_categorical(
            "captions.sampling", ["all", "subset", "split", "none"]
        ),
    }
    if settings["captions.sampling"] == "subset":
        settings["captions.keep"] = trial.suggest_float("captions.keep", 0.3, 0.9)
    return settings
