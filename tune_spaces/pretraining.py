"""How fast each tower learns from captions, and how a caption is read; for ``--sweep.task``.

jobs/sweep.py --space tune_spaces/pretraining.py --sweep.task pretraining --data DATA
"""

from typing import Any

import optuna


def suggest(trial: optuna.trial.BaseTrial) -> dict[str, Any]:
    """Draw both towers' rates, the decay, and which sentences of a caption are read."""
    return {
        "optim.lr": trial.suggest_float("optim.lr", 1e-6, 3e-3, log=True),
        "optim.tower_lr": trial.suggest_float("optim.tower_lr", 1e-6, 3e-3, log=True),
        "optim.weight_decay": trial.suggest_float("optim.weight_decay", 1e-4, 0.2, log=True),
        "captions.sampling": trial.suggest_categorical("captions.sampling", ["all", "subset"]),
    }
