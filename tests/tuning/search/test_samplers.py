"""Which sampler and which pruner a sweep gets."""

import typing

import optuna
import pytest

from next.tuning.search.samplers import PRUNERS, SAMPLERS, make_pruner, make_sampler
from next.tuning.settings import SweepConfig

SWEEP = SweepConfig(trials=12)


def names(field):
    return set(typing.get_args(SweepConfig.model_fields[field].annotation))


def test_the_names_that_a_sweep_takes_are_those_that_are_made():
    assert names("sampler") == {"auto", *SAMPLERS}
    assert names("pruner") == set(PRUNERS)


def test_the_sampler_follows_the_number_of_objectives():
    assert isinstance(make_sampler(SWEEP, 1, 0), optuna.samplers.TPESampler)
    assert isinstance(make_sampler(SWEEP, 2, 0), optuna.samplers.NSGAIISampler)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_that_goes_on_draws_nothing_twice(name):
    sweep = SweepConfig(trials=12, sampler=name)
    study = optuna.create_study(directions=["maximize"])
    drawn = []
    for begun in range(4):
        study.sampler = make_sampler(sweep, 1, begun)
        trial = study.ask()
        drawn.append(trial.suggest_float("lr", 0, 1))
        study.tell(trial, 1.0)
    assert len(set(drawn)) == 4


def test_several_objectives_are_not_pruned():
    assert isinstance(make_pruner(SWEEP, 1), optuna.pruners.SuccessiveHalvingPruner)
    assert isinstance(make_pruner(SWEEP, 2), optuna.pruners.NopPruner)
