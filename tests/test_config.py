import math
import tomllib

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from next.config import (
    LEGACY,
    MOST_SEED,
    RunConfig,
    differences,
    dotted,
    flatten,
    from_toml,
    load_recipe,
    override,
    predated,
    setting_names,
    to_toml,
)
from next.data.draws import uniform
from next.tuning.settings import SweepConfig


def test_override_replaces_and_leaves_the_original_alone():
    base = RunConfig()
    changed = override(base, {"optim.lr": 1e-2, "model.routing.temperature": 0.5})
    assert (changed.optim.lr, changed.model.routing.temperature) == (1e-2, 0.5)
    assert base == RunConfig()
    assert differences(base, changed) == {
        "optim.lr": (3.5e-4, 1e-2),
        "model.routing.temperature": (1.0, 0.5),
    }


def test_fewer_epochs_alone_are_no_error_and_a_warm_up_of_the_same_length_no_difference():
    short = override(RunConfig(), {"optim.epochs": 5})
    assert (short.optim.warmup_epochs, short.optim.warmup) == (None, 1.0)
    assert from_toml(to_toml(short)) == short
    given = override(RunConfig(), {"optim.warmup_epochs": 10.0})
    assert differences(given, RunConfig()) == {}, "as runs recorded it when ten was the default"
    other = override(RunConfig(), {"optim.warmup_epochs": 9})
    assert differences(other, RunConfig()) == {"optim.warmup_epochs": (9.0, None)}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optim.lrr": 1}, r"no setting named 'optim.lrr'; did you mean optim.lr"),
        ({"temperature": 1}, r"did you mean model.routing.temperature"),
        ({"model.semantic": 1}, r"model.semantic is a section, not a setting; set one of"),
        ({"optim.lr": -1}, r"optim.lr: Input should be greater than 0, but got -1"),
        ({"batch.identities": "many"}, r"batch.identities: .*valid integer.*'many'"),
        ({"captions.sampling": "some"}, r"captions.sampling: .*'all', 'subset'"),
        ({"augment.erase_area": (0.5, 0.1)}, r"0 < low <= high <= 1, but got \(0.5, 0.1\)"),
        ({"optim.warmup_epochs": 99}, r"must not exceed optim.epochs, but got 99.*to none, which"),
        ({"optim.cuda_graph": True}, r"cuda_graph needs scaling.use_gpu = true .* got False and 1"),
        ({"scaling.num_workers": 3}, r"multiple of scaling.num_workers.* 64 over 3"),
        ({"scaling.num_workers": (1, 4)}, r"multiple of scaling.num_workers.* 64 over 3; 12 and"),
        ({"scaling.num_workers": (4, 2)}, r"1 <= least <= most, but got \(4, 2\)"),
        ({"run.storage_path": "s3://b/runs"}, r"a local folder.*set checkpoint.storage_path"),
        ({"selection.holdout": 0}, r"selection.holdout must be positive.*selection.split = test"),
        ({"selection.folds": 3, "selection.fold": 3}, r"fold must be below selection.folds = 3"),
        ({"selection.split": "test", "selection.folds": 2}, r"selection.folds divides the train"),
        ({"optim.lr": math.inf}, r"optim.lr: Input should be a finite number, but got inf"),
        ({"seed": 2**70}, r"seed: Input should be less than or equal to 4611686018427387904"),
        ({"data.modalities": ("RGB", "RGB")}, r"data.modalities: must name each modality once"),
        ({"data.modalities": ()}, r"data.modalities: must name each modality once, and one at le"),
        ({"run.name": "../up"}, r"run.name: .*pattern"),
    ],
)
def test_a_bad_setting_is_named_with_its_rule(settings, message):
    with pytest.raises(ValueError, match=message):
        override(RunConfig(), settings)


def test_all_problems_are_reported_together():
    with pytest.raises(ValueError, match=r"(?s)optim.lrr.*batch.sise"):
        override(RunConfig(), {"optim.lrr": 1, "batch.sise": 2})


def test_toml_is_the_exact_inverse_also_where_a_default_was_unset():
    config = override(
        RunConfig(), {"model.backbone.pretrained": None, "data.modalities": ("RGB", "TIR")}
    )
    assert from_toml(to_toml(config)) == config
    elastic = override(config, {"scaling.num_workers": (1, 2)})
    assert from_toml(to_toml(elastic)) == elastic
    assert (elastic.scaling.min_workers, elastic.scaling.max_workers) == (1, 2)


def test_none_as_text_unsets_an_optional_setting_because_toml_has_no_null():
    config = override(RunConfig(), {"model.backbone.pretrained": "none"})
    assert config.model.backbone.pretrained is None
    assert override(config, {"captions.sampling": "none"}).captions.sampling == "none"


def test_recipe_with_a_typo_names_file_and_near_match(tmp_path):
    recipe = tmp_path / "fast.toml"
    recipe.write_text("[optim]\nepocs = 3\n")
    with pytest.raises(ValueError, match=r"fast.toml: .*optim.epocs.*did you mean optim.epochs"):
        load_recipe(recipe)
    recipe.write_text("[optim\n")
    with pytest.raises(ValueError, match=r"fast.toml is not valid TOML"):
        load_recipe(recipe)


def test_every_setting_has_a_docstring():
    from pydantic import BaseModel

    def sections(model: type[BaseModel]):
        for name, field in model.model_fields.items():
            assert field.description, f"{model.__name__}.{name}"
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                sections(field.annotation)

    sections(RunConfig)
    assert "model.semantic.experts" in setting_names()


def test_an_older_configuration_means_what_its_version_did():
    """For a setting that it did not know: LEGACY's value, else the default."""
    config = override(RunConfig(), {"optim.lr": 0.5, "model.backbone.pretrained": None})
    written = to_toml(config, without=[*LEGACY, "optim.accumulate", "model.backbone.pretrained"])
    assert "text_skip" not in written
    assert predated(written) == LEGACY
    assert from_toml(written) == override(config, LEGACY)
    assert predated(to_toml(config)) == {}


def test_what_older_versions_did_is_said_of_settings_whose_default_is_another():
    defaults = dict(flatten(RunConfig()))
    for name, value in LEGACY.items():
        assert value != defaults[name], f"{name}: the default needs no entry"
        assert dict(flatten(override(RunConfig(), {name: value})))[name] == value
        written = to_toml(override(RunConfig(), {name: None} if value is None else {}))
        assert (name in dotted(tomllib.loads(written))) == (value is not None), (
            f"{name} may be None, so a record without it says None"
        )


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 2**70, -(2**70), 1e300, -1e300])
@pytest.mark.parametrize("name", setting_names())
def test_every_number_has_bounds(name, value):
    """A setting that no run could have is refused, whatever kind it is of."""
    for given in (value, (value, value)):
        with pytest.raises(ValueError, match=name.split(".")[0]):
            override(RunConfig(), {name: given})


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 2**70, -(2**70), 1e300, -1e300])
@pytest.mark.parametrize("name", list(SweepConfig.model_fields))
def test_every_number_of_a_sweep_has_bounds(name, value):
    with pytest.raises(ValidationError, match=name):
        SweepConfig(**{name: value})


def test_the_largest_seed_is_one_that_everything_takes():
    assert override(RunConfig(), {"seed": MOST_SEED}).seed == MOST_SEED
    uniform("flip", MOST_SEED + 1000, 0)
    torch.manual_seed(MOST_SEED + 1000)
    np.random.default_rng(MOST_SEED + 1000)
