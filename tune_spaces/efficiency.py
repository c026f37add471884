"""Two objectives: the score against the seconds that a step takes."""

from typing import Any

import optuna

OBJECTIVES = {"val/mAP": "max", "train/seconds_per_step": "min"}


def suggest(trial: optuna.trial.BaseTrial) -> dict[str, Any]:
    """Draw what costs time: experts, slots, widths, sampled patches."""
    semantic = trial.suggest_categorical("model.semantic.enabled", [True, False])
    structure = trial.suggest_categorical("model.structure.enabled", [True, False])
    settings: dict[str, Any] = {
        "model.semantic.enabled": semantic,
        "model.structure.enabled": structure,
    }
    if semantic:
        settings["model.semantic.experts"] = trial.suggest_categorical(
            "model.semantic.experts", [1, 2, 4, 8]
        )
        settings["model.semantic.expansion"] = trial.suggest_categorical(
            "model.semantic.expansion", [1.0, 2.0, 4.0]
        )
    if structure:
        settings["model.structure.experts"] = trial.suggest_categorical(
            "model.structure.experts", [1, 2, 4, 8]
        )
        settings["model.structure.slots"] = trial.suggest_int("model.structure.slots", 1, 4)
    return settings
