"""Which sentences reach which expert, and in what form."""

from typing import Any

import optuna


def suggest(trial: optuna.trial.BaseTrial) -> dict[str, Any]:
    """Draw caption sampling, encoding and the experts that read them."""
    sampling = trial.suggest_categorical("captions.sampling", ["all", "subset", "split", "none"])
    settings: dict[str, Any] = {
        "captions.sampling": sampling,
        "model.semantic.experts": trial.suggest_categorical("model.semantic.experts", [2, 4, 8]),
    }
    if sampling == "none":
        return settings
    settings["captions.unreliable"] = trial.suggest_categorical(
        "captions.unreliable", [False, True]
    )
    settings["captions.evaluation"] = trial.suggest_categorical(
        "captions.evaluation", ["all", "split"]
    )
    settings["model.semantic.mixer_hidden"] = trial.suggest_categorical(
        "model.semantic.mixer_hidden", [4, 8, 16]
    )
    if sampling == "subset":
        settings["captions.keep"] = trial.suggest_float("captions.keep", 0.3, 0.95)
    return settings
