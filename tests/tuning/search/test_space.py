from pathlib import Path

import pytest

from next.config import RunConfig, override
from next.data.shards.reader import open_manifest
from next.training.inputs import resolve
from next.tuning.report.comparison import drawn_settings
from next.tuning.search.space import check_space, judged_by, load_space

SPACES = Path(__file__).resolve().parents[3] / "tune_spaces"


@pytest.mark.parametrize("path", sorted(SPACES.glob("*.py")), ids=lambda path: path.stem)
def test_every_space_of_the_project_fits_the_settings(path):
    assert check_space(load_space(path), RunConfig())


def test_experts_varies_what_the_paper_asks_and_keep_only_where_it_applies():
    space = load_space(SPACES / "experts.py")
    assert set(check_space(space, RunConfig())) == {
        "model.semantic.experts",
        "model.structure.experts",
        "model.structure.slots",
        "model.routing.temperature",
        "captions.sampling",
        "captions.keep",
    }


def write(folder: Path, body: str) -> Path:
    path = folder / "mine.py"
    path.write_text(body)
    return path


def test_a_typo_in_a_space_names_the_near_match(tmp_path):
    body = "def suggest(trial):\n    return {'optim.lrr': trial.suggest_float('optim.lrr', 1, 2)}\n"
    space = load_space(write(tmp_path, body))
    with pytest.raises(ValueError, match=r"space 'mine': .*'optim.lrr'; did you mean optim.lr"):
        check_space(space, RunConfig())


def test_a_range_that_reaches_too_far_is_found_before_anything_starts(tmp_path):
    body = (
        "def suggest(trial):\n"
        "    return {'captions.keep': trial.suggest_float('captions.keep', 0.5, 1.5)}\n"
    )
    with pytest.raises(ValueError, match=r"captions.keep: .*less than or equal to 1.*drawn:"):
        check_space(load_space(write(tmp_path, body)), RunConfig())


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("import no_such_module", r"mine.py cannot be imported: ModuleNotFoundError"),
        ("def sugest(trial): ...", r"must define a function suggest.*defines sugest"),
    ],
)
def test_a_file_that_is_no_space_says_why(tmp_path, body, message):
    with pytest.raises(ValueError, match=message):
        load_space(write(tmp_path, body))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def suggest(trial): return None", r"must return a dict.*returned None"),
        ("def suggest(trial): return 1 / 0", r"fails on a random trial: ZeroDivisionError"),
        (
            "def suggest(trial):\n    return {'optim.lr': trial.suggest_float('lr', 0.1, 1)}",
            r"draws lr without returning it",
        ),
        (
            "def suggest(trial):\n"
            "    share = trial.suggest_float('selection.holdout', 0.1, 0.3)\n"
            "    return {'selection.holdout': share, 'scaling.num_workers': 2}",
            r"varies scaling.num_workers, selection.holdout, but .* the same for all of them",
        ),
    ],
)
def test_a_space_that_misbehaves_says_how(tmp_path, body, message):
    space = load_space(write(tmp_path, body))
    with pytest.raises(ValueError, match=message):
        check_space(space, RunConfig())


OBJECTIVES = """
OBJECTIVES = {"train/loss": "min", "val/mAP": "max"}
def suggest(trial): return {"optim.lr": trial.suggest_float("optim.lr", 1e-4, 1e-2)}
"""


def test_the_first_objective_chooses_the_epoch_of_every_trial(tmp_path):
    space = load_space(write(tmp_path, OBJECTIVES))
    selection = judged_by(RunConfig(), space).selection
    assert (selection.metric, selection.mode) == ("train/loss", "min")
    assert judged_by(judged_by(RunConfig(), space), space).selection == selection
    plain = judged_by(RunConfig(), load_space(SPACES / "quick.py")).selection
    assert (plain.metric, plain.mode) == ("val/mAP", "max")


@pytest.mark.parametrize(
    "asked", [{"selection.metric": "val/rank1"}, {"selection.mode": "max"}], ids=str
)
def test_a_sweep_that_is_to_choose_its_epochs_by_another_metric_is_refused(tmp_path, asked):
    space = load_space(write(tmp_path, OBJECTIVES))
    with pytest.raises(ValueError, match=r"first objective in a sweep, which space 'mine' has as"):
        judged_by(override(RunConfig(), asked), space)


def test_a_missing_file_lists_what_is_there():
    with pytest.raises(FileNotFoundError, match=r"no search space .*expert.py; .*experts.py"):
        load_space(SPACES / "expert.py")


def test_a_file_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("")
    with pytest.raises(ValueError, match=r"must be a .py file, but is .*mine.toml; rename it"):
        load_space(path)


def test_the_axes_of_a_comparison_are_settings_that_every_trial_has():
    drawn = drawn_settings(load_space(SPACES / "quick.py"))
    assert drawn.numeric - drawn.always == {"captions.keep"}
    assert drawn.always - drawn.numeric == {"captions.sampling"}


@pytest.mark.parametrize(
    "setting",
    ["data.image_size", "data.modalities", "model.backbone.name", "model.backbone.pretrained"],
)
def test_a_space_over_what_all_trials_share_is_refused(tmp_path, setting):
    body = (
        f"def suggest(trial): return {{'{setting}': trial.suggest_categorical('{setting}', [1])}}"
    )
    message = rf"space 'mine' varies {setting}, .* all trials of a sweep share; run one sweep for"
    with pytest.raises(ValueError, match=message):
        check_space(load_space(write(tmp_path, body)), RunConfig())


def test_each_setting_that_a_trial_may_have_is_held_against_the_data(tmp_path, tiny_config):
    manifest = open_manifest(tiny_config.data.uri)
    base = resolve(tiny_config, manifest)
    body = (
        "def suggest(trial):\n"
        "    return {'batch.identities': trial.suggest_categorical('batch.identities', [2, 400])}"
    )
    space = load_space(write(tmp_path, body))
    assert check_space(space, base) == ["batch.identities"], "nothing of it contradicts itself"
    message = r"space 'mine': .*must not exceed the \d+ train identities .*drawn: .*400"
    with pytest.raises(ValueError, match=message):
        check_space(space, base, lambda config: resolve(config, manifest))


def test_what_fits_the_data_is_asked_once_for_each_setting_that_decides_it(tmp_path):
    body = (
        "def suggest(trial):\n"
        "    return {'batch.identities': trial.suggest_int('batch.identities', 2, 4),\n"
        "            'optim.lr': trial.suggest_float('optim.lr', 1e-5, 1e-3)}"
    )
    asked = []
    check_space(load_space(write(tmp_path, body)), RunConfig(), asked.append)
    assert sorted(config.batch.identities for config in asked) == [2, 3, 4]
