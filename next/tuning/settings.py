"""How a space is searched."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from next.config import Fraction, Section

RECORD = "sweep.toml"
"""File in a sweep's folder: how the space is searched, and what the space was."""
COUNT = "record.json"
"""File in a sweep's store: how often its record was stored; without it none was stored whole."""
FEATURES, AXES = "features.npz", "axes.json"
"""Files in a trial's folder: what its best epoch gave each held-out sample, and its free axes."""

Task = Literal["training", "pretraining"]
"""What the trials of a sweep do."""


class SweepConfig(Section):
    """How a space is searched."""

    task: Task = "training"
    """What a trial does: train the network, or its towers on images and captions as
    jobs/pretrain.py does. Of pretraining, the best weights are what a sweep ends with."""
    trials: int = Field(default=20, ge=1, le=10**6)
    """Trials in all, with those that repeat a setting over seeds."""
    hours: float | None = Field(default=None, gt=0, le=1e6)
    """No trial begins after so many hours, those of earlier sessions included; None: no limit."""
    target: float | None = Field(default=None, ge=-1e9, le=1e9)
    """The search ends once the first objective is as good as this; None: it goes on."""
    concurrency: int = Field(default=2, ge=1, le=2**16)
    """Trials at a time, at most; fewer where the cluster cannot hold so many."""
    sampler: Literal["auto", "tpe", "random", "quasi-random", "nsga2"] = "auto"
    """tpe: multivariate, with groups for conditional settings; random: independent draws;
    quasi-random: a scrambled Sobol sequence; nsga2: evolution over several objectives; auto: tpe
    for one objective, nsga2 for several."""
    pruner: Literal["asha", "median", "none"] = "asha"
    """asha: stop trials that fall behind at the rungs; median: stop those that are worse than the
    median trial was at this epoch; none: train every trial to the end (so do several
    objectives)."""
    grace_epochs: int = Field(default=4, ge=1, le=10**6)
    """Epochs that every trial gets before it may be pruned."""
    reduction: int = Field(default=3, ge=2, le=10**6)
    """Of the trials that reach a rung, one in so many goes on (``pruner = asha``)."""
    noise_share: Fraction = Field(default=0.15, ge=0, le=0.5)
    """Share of the trials that repeats the settings the sweep started from over seeds: the noise
    floor, and what the winner has to beat."""
    race_share: Fraction = Field(default=0.15, ge=0, le=0.5)
    """Share of the trials, the last ones, that gives the best settings more seeds."""
    free_axes: bool = True
    """Measure each finished trial with what only matters at evaluation: captions, temperature,
    flip, branch weights, re-ranking, missing modalities."""
    retries: int = Field(default=1, ge=0, le=10**6)
    """How often a trial whose process was killed goes on from its checkpoint. A trial that raises
    is not repeated; one whose machine was lost goes on elsewhere and is not counted."""
    seed: int = Field(default=0, ge=0, le=2**32 - 1)
    """Seed of the sampler (exact only with one trial at a time)."""
    pictures: int = Field(default=4, ge=0, le=10**6)
    """Best settings of which pictures are drawn, for MLflow's image grid."""
    lease_s: float = Field(default=60, gt=0, le=1e9)
    """With checkpoint.storage_path: seconds after its last sign of life until a driver that is gone
    is given up, so that another head may go on with the sweep."""
    gpus_per_trial: float | None = Field(default=None, gt=0, le=1)
    """Share of a GPU that a trial takes; None: the first trial gets one alone, and
    its peak memory says how many of the others share one. Read only with scaling.use_gpu, and by
    trials of one worker; of several, each has a GPU of its own."""

    @model_validator(mode="after")
    def _something_is_left_to_search(self) -> SweepConfig:
        if self.search_runs < 1:
            raise ValueError(
                f"sweep.trials must leave a trial to the search, but {self.trials} trials with "
                f"sweep.noise_share {self.noise_share} and sweep.race_share {self.race_share} "
                f"leave {self.search_runs}; raise sweep.trials or lower the shares"
            )
        return self

    @property
    def noise_runs(self) -> int:
        """Trials that repeat the starting settings; two at least where there is room for them."""
        return _runs(self.noise_share, self.trials)

    @property
    def race_runs(self) -> int:
        """Trials that give the best settings more seeds."""
        return _runs(self.race_share, self.trials)

    @property
    def search_runs(self) -> int:
        """Trials that the sampler draws."""
        return self.trials - self.noise_runs - self.race_runs


def _runs(share: float, trials: int) -> int:
    """A share in trials: two at least, without which there is no spread, if six are there."""
    runs = round(share * trials)
    return max(runs, 2) if share and trials >= 6 else runs
