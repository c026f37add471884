"""The optimiser: learning rates, weight decay, schedule, losses and augmentation."""

from typing import Any

import optuna


def suggest(trial: optuna.trial.BaseTrial) -> dict[str, Any]:
    """Draw what decides how well any of these models learns; experts stay as they are."""
    settings: dict[str, Any] = {
        "optim.name": trial.suggest_categorical("optim.name", ["adam", "adamw"]),
        "optim.lr": trial.suggest_float("optim.lr", 1e-4, 1e-2, log=True),
        "optim.tower_lr": trial.suggest_float("optim.tower_lr", 1e-6, 5e-3, log=True),
        "optim.weight_decay": trial.suggest_float("optim.weight_decay", 1e-5, 1e-1, log=True),
        "optim.final_lr_share": trial.suggest_float("optim.final_lr_share", 1e-3, 0.3, log=True),
        "loss.triplet_weight": trial.suggest_float("loss.triplet_weight", 0.25, 4.0, log=True),
        "loss.label_smoothing": trial.suggest_float("loss.label_smoothing", 0.0, 0.2),
        "augment.enabled": trial.suggest_categorical("augment.enabled", [True, False]),
    }
    if settings["augment.enabled"]:
        settings["augment.erase"] = trial.suggest_float("augment.erase", 0.0, 0.7)
    return settings
