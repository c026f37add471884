import logging
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from next.benchmark.card import load_card
from next.cli import (
    ProgressLine,
    Settings,
    base_config,
    call_verb,
    named_options,
    parse,
    run_defaults,
    run_job,
)
from next.config import RunConfig, override
from next.stopping import Stopped


@dataclass(frozen=True)
class Job:
    """A job."""

    dry_run: bool = False
    """Start nothing."""
    config: Settings = field(default_factory=RunConfig)


def test_settings_are_flags_under_their_own_names_with_hyphens_or_underscores():
    for flag in ("--optim.warmup_epochs", "--optim.warmup-epochs"):
        job = parse(Job, [flag, "2", "--dry-run", "--model.semantic.enabled", "False"])
        assert job.dry_run
        assert job.config.optim.warmup_epochs == 2
        assert not job.config.model.semantic.enabled


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--optim.lrr", "1"], ["Perhaps you meant", "--optim.lr"]),
        (["--optim.lr", "-1"], ["optim", "greater than 0", "-1"]),
        (["--captions.sampling", "some"], ["some", "subset"]),
    ],
)
def test_a_wrong_flag_ends_with_code_2_and_says_why(argv, words, capsys):
    with pytest.raises(SystemExit) as ended:
        parse(Job, argv)
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert all(word in said.out + said.err for word in words)


VERBS = {"run": lambda argv: len(argv), "list": lambda argv: 10 + len(argv)}


@pytest.mark.parametrize(
    ("argv", "code"),
    [(["run"], 0), (["run", "--a", "b"], 2), (["list", "x"], 11), (["--a", "b"], 12)],
)
def test_a_verb_gets_the_words_after_it_and_the_unsaid_one_gets_flags(argv, code):
    assert call_verb(argv, VERBS, "usage", unsaid="list") == code


@pytest.mark.parametrize(("argv", "code"), [(["--help"], 0), (["-h"], 0), ([], 2)])
def test_a_job_of_verbs_shows_its_usage(argv, code, capsys):
    assert call_verb(argv, VERBS, "usage: x {run,list}\n", unsaid="list") == code
    assert capsys.readouterr().out == "usage: x {run,list}\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["rum"], "must be one of run, list, but got 'rum'; did you mean run?"),
        (["--a"], "must be one of run, list, but got '--a'; did you mean run or list?"),
    ],
)
def test_a_wrong_verb_is_refused_with_the_near_match(argv, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call_verb(argv, VERBS, "usage")


def test_named_options_are_found_among_others():
    argv = ["--optim.lr", "1", "--card", "a.toml", "--data=b"]
    assert named_options(argv, "card", "data", "recipe") == {"card": "a.toml", "data": "b"}


def test_a_cards_recipe_is_chosen_by_its_name_and_a_wrong_name_lists_them():
    card = str(Path(__file__).resolve().parents[1] / "datasets" / "rgbnt201.toml")
    config = run_defaults(["--card", card, "--recipe", "demo-training"])
    assert (config.optim.schedule, config.selection.split) == ("peers", "test")
    assert config.batch.instances == 8, "the card's own recipe lies below it"
    with pytest.raises(FileNotFoundError, match=r"\(demo-training, .*gpu\), but got 'pears'"):
        run_defaults(["--card", card, "--recipe", "pears"])


def test_the_former_name_of_a_recipe_is_taken_with_a_warning(caplog):
    card = str(Path(__file__).resolve().parents[1] / "datasets" / "wmveid863.toml")
    config = run_defaults(["--card", card, "--recipe", "peers"])
    assert config == run_defaults(["--card", card, "--recipe", "peers-schedule"])
    assert "--recipe peers is the former name of peers-schedule" in caplog.text
    caplog.clear()
    old = load_card(card)  # as it lies within shards that were prepared earlier
    former = {"peers": old.recipes["peers-schedule"]}
    assert base_config(old.model_copy(update={"recipes": former}), "peers") == base_config(
        old, "peers-schedule"
    )
    assert "is the former name" in caplog.text


def test_a_recipe_replaces_the_card_and_flags_replace_both(tmp_path, demo_shards):
    recipe = tmp_path / "mine.toml"
    recipe.write_text("[optim]\nepochs = 7\nwarmup_epochs = 1\n")
    argv = ["--data", str(demo_shards), "--recipe", str(recipe)]
    config = run_defaults(argv)
    assert config.optim.epochs == 7
    assert config.model.backbone.name == "next-tiny", "from the card within the shards"
    assert config.data.uri == str(demo_shards)
    assert base_config(None, recipe).optim.epochs == 7


def test_fewer_epochs_than_a_recipes_warm_up_derive_another(tmp_path, caplog):
    """The commonest first flag works by itself; who gives a warm-up gets that, or an error."""
    caplog.set_level("INFO")
    datasets = Path(__file__).resolve().parents[1] / "datasets"
    demo, peers = (["--card", str(datasets / name)] for name in ("demo.toml", "rgbnt201.toml"))
    peers += ["--recipe", "demo-training"]
    for card, epochs in ((demo, "1"), (peers, "5")):
        for flags in (["--optim.epochs", epochs], [f"--optim.epochs={epochs}"]):
            config = run_defaults([*card, *flags])
            assert config.optim.warmup_epochs is None
            assert override(config, {"optim.epochs": int(epochs)}).optim.warmup == 0.2 * int(epochs)
    assert "optim.warmup_epochs = 10 of the recipe does not fit optim.epochs = 5" in caplog.text
    assert run_defaults([*demo, "--optim.epochs", "2"]).optim.warmup_epochs == 1.5, "it fits"
    both = [*demo, "--optim.epochs", "1", "--optim.warmup_epochs", "1"]
    assert run_defaults(both).optim.warmup_epochs == 1.5, "flags come on top of this"
    recipe = tmp_path / "mine.toml"
    recipe.write_text("optim.epochs = 1\n")
    assert run_defaults([*demo, "--recipe", str(recipe)]).optim.warmup == 0.2
    recipe.write_text("optim.epochs = 1\noptim.warmup_epochs = 2\n")
    with pytest.raises(ValueError, match=r"optim.warmup_epochs must not exceed optim.epochs"):
        run_defaults([*demo, "--recipe", str(recipe)])


def test_card_and_shards_of_two_benchmarks_are_refused(demo_shards):
    with pytest.raises(ValueError, match=r"--card is of RGBNT201, but the shards .* are of demo"):
        run_defaults(["--card", "datasets/rgbnt201.toml", "--data", str(demo_shards)])


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (ValueError("optim.lr must be positive"), 2, "error: optim.lr must be positive\n"),
        (FileNotFoundError("no such card"), 2, "error: no such card\n"),
        (
            KeyboardInterrupt(),
            75,
            "stopped; the rest is kept, and the same command goes on\n",
        ),
        (Stopped("stopped; go on by x"), 75, "stopped; go on by x\n"),
    ],
)
def test_what_a_user_can_mend_is_one_message_and_code_2(error, code, words, capsys, monkeypatch):
    def main(argv):
        raise error

    monkeypatch.setattr(sys, "argv", ["job"])
    with pytest.raises(SystemExit) as ended:
        run_job(main, kept="the rest is kept")
    assert ended.value.code == code
    assert capsys.readouterr().err == words


def test_a_failure_is_code_1_with_its_traceback(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["job"])
    with pytest.raises(SystemExit) as ended:
        run_job(lambda argv: 1 // len(argv))
    assert ended.value.code == 1
    assert "ZeroDivisionError" in capsys.readouterr().err
    logging.getLogger("next").setLevel(logging.NOTSET)


def test_progress_in_a_log_says_the_last_sample_and_what_is_left(capsys):
    with ProgressLine("draw") as progress:
        for done in range(1, 11):
            progress(done, 10)
    assert capsys.readouterr().err.splitlines() == ["draw  10/10 samples  100%  about 0 s left"]


def test_progress_on_a_terminal_is_a_bar_that_is_drawn_anew(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with ProgressLine("draw") as progress:
        progress.shown = 0
        progress(5, 20)
        progress(20, 20)
    quarter, full = capsys.readouterr().err.split("\r")[1:]
    assert quarter.startswith("draw  █████░░░░░░░░░░░░░░░  5/20 samples  25%")
    assert full.startswith("draw  ████████████████████  20/20 samples  100%")


@dataclass(frozen=True)
class DataJob:
    """A job that reads and writes data."""

    data: str
    """Shards."""
    out: str | None = None
    """Results."""
    config: Settings = field(default_factory=RunConfig)


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--data", "shards/x", "--run.storage_path", "/x"], "--data must .* got 'shards/x'"),
        (["--data", "/x", "--run.storage_path", "/x", "--out", "y"], "--out must .* got 'y'"),
        (["--data", "s3://b/x"], "run.storage_path must be an absolute path in .* got 'runs'"),
        (
            ["--data", "/x", "--run.storage_path", "/x", "--checkpoint.storage_path", "c"],
            "checkpoint.storage_path must be an absolute path or s3:// .* got 'c'",
        ),
        (
            ["--data", "/x", "--run.storage_path", "/x", "--data.cache", "c"],
            "data.cache must .* got 'c'",
        ),
    ],
)
def test_in_a_ray_job_a_relative_folder_of_data_is_refused(argv, named, monkeypatch):
    parse(DataJob, argv)
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(ValueError, match=named):
        parse(DataJob, argv)


def test_in_a_ray_job_absolute_folders_and_buckets_are_fine(monkeypatch):
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    argv = ["--data", "s3://b/x", "--run.storage_path", "/runs", "--data.cache", "~/c"]
    assert parse(DataJob, argv).config.data.cache == "~/c"
    with pytest.raises(ValueError, match="--data must be an absolute path or s3:// address"):
        run_defaults(["--data", "shards/x"])
