"""A real sweep: Ray Tune, Optuna, MLflow; its driver killed and resumed, then assessed once."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from jobs.sweep import main as plan
from next.config import override, to_toml
from next.tracking.run import start_server
from next.tuning.folder import find_sweep, read_standing
from next.tuning.search.space import load_space
from next.tuning.sweep import SweepConfig, resume_sweep, run_sweep
from tests.exposure import exposed, leaks, planted

ROOT = Path(__file__).resolve().parents[2]
EPOCHS = 6


def sweep_job(*flags: str, home: Path, log: Path, **environment: str) -> subprocess.Popen:
    with log.open("w") as out:
        return subprocess.Popen(
            [sys.executable, "jobs/sweep.py", *flags],
            cwd=ROOT,
            env=os.environ | {"HOME": str(home), "RAY_TMPDIR": "/tmp"} | environment,
            stdout=out,
            stderr=subprocess.STDOUT,
            umask=0o022,  # as most users have it
        )


def wait_for(what, process: subprocess.Popen, log: Path, seconds: float = 280) -> None:
    until = time.monotonic() + seconds
    while not what():
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < until, log.read_text()[-3000:]
        time.sleep(0.1)


def rows(folder: Path) -> list[tuple[int, int, str]]:
    with closing(sqlite3.connect(folder / "study.db")) as connection:
        query = "SELECT study_id, number, state FROM trials ORDER BY study_id, number"
        return connection.execute(query).fetchall()


def half_trained(folder: Path) -> list[Path]:
    """Trials that are running and have a checkpoint."""
    found = [
        path.parent.parent.parent
        for path in folder.glob("trials/trial-*/checkpoints/step-*/state.json")
    ]
    return [path for path in found if not (path / "features.npz").exists()]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_a_killed_sweep_resumes_with_nothing_lost_or_doubled_and_ends_in_mlflow(
    tiny_config, tmp_path, short_folder, monkeypatch
):
    """And it tells nobody the secrets that it was started with."""
    monkeypatch.delenv("RAY_AUTH_TOKEN")  # Ray makes one, as for a user
    hidden = planted()
    with exposed(tmp_path) as seen:
        folder = kill_and_resume(tiny_config, tmp_path, RAY_TMPDIR=str(short_folder), **hidden)
    token = tmp_path / ".ray" / "auth_token"
    hidden["RAY_AUTH_TOKEN"] = token.read_text().strip()
    assert len(seen.places) > 4, "those of two drivers, of their Rays and of MLflow"
    assert seen.beyond_loopback() == []
    assert seen.modes == {0o600}
    assert seen.told(hidden) == []
    token.unlink()
    left = [path for path in short_folder.rglob("*.log") if path.is_file()]
    assert len(left) > 10, "Ray's logs are there to be looked at"
    for name in ("mlflow/mlflow.db", "sweep/report.html", "sweep/journal.jsonl", "sweep/study.db"):
        assert (folder.parent / name).is_file()
    assert leaks([tmp_path, short_folder, folder.parent], hidden) == []


def kill_and_resume(tiny_config, tmp_path: Path, **environment: str) -> Path:
    config = override(
        tiny_config,
        {"run.name": "sweep", "tracking.enabled": True, "optim.epochs": EPOCHS},
    )
    (tmp_path / "settings.toml").write_text(to_toml(config))
    storage = Path(config.run.storage_path)
    folder = storage / "sweep"
    log = tmp_path / "log.txt"
    start = [
        *("--space", "tune_spaces/quick.py", "--data", str(config.data.uri)),
        *("--recipe", str(tmp_path / "settings.toml"), "--trials", "7"),
        *("--sweep.grace_epochs", "1", "--sweep.reduction", "2"),
    ]
    driver = sweep_job(*start, home=tmp_path, log=log, **environment)
    wait_for(lambda: half_trained(folder), driver, log)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    before = rows(folder)
    settings = {t.name: t.settings for t in read_standing(folder).trials}
    assert ("RUNNING" in {state for _, _, state in before}) or len(before) > 2

    again = ["resume", "sweep", "--storage_path", str(storage), "--trials", "8"]
    log = tmp_path / "resumed.txt"
    driver = sweep_job(*again, home=tmp_path, log=log, **environment)
    assert driver.wait(timeout=800) == 0, log.read_text()[-3000:]
    printed = log.read_text()

    after = rows(folder)
    ended = [row for row in before if row[2] in ("COMPLETE", "PRUNED")]
    assert [row for row in after if row in ended] == ended, "what had ended is as it was"
    assert {state for _, _, state in after} <= {"COMPLETE", "PRUNED"}
    assert len(after) == 8
    found = read_standing(folder)
    assert {t.name: t.settings for t in found.trials if t.name in settings} == settings
    for trial in found.trials:
        epochs = [epoch for epoch, _ in trial.curve]
        assert epochs == sorted(set(epochs)), "no evaluation is doubled"
        assert epochs == list(range(1, len(epochs) + 1)), "and none is lost"
    drawn = [tuple(t.settings.items()) for t in found.trials if t.of is None]
    assert len(drawn) == len(set(drawn)) == 4
    assert sum(t.of == "default" for t in found.trials) == 2
    assert any(t.of not in (None, "default") for t in found.trials), "the best were raced"

    answer = json.loads((folder / "sweep.json").read_text())
    assert answer["noise_floor"]["degrees_of_freedom"] >= 1
    assert answer["verdicts"][0]["theirs"] == "default"
    assert f"on the test split, once: {answer['winner']} " in printed
    assert (answer["winner"] == "default") == ("keep the default: " in printed)
    assert "noise floor: val/mAP moves by" in printed
    assert "not separated" in printed or " over " in printed
    assert "± " in printed
    assert (folder / "checkpoints" / "best" / "model.safetensors").exists()

    check_mlflow(storage, found)
    check_free_axes(folder, found)
    check_changed_space(folder, tmp_path)
    return folder


def check_mlflow(storage: Path, found) -> None:
    import mlflow

    with start_server(storage / "mlflow") as server:
        client = mlflow.MlflowClient(server.uri)
        experiment = client.get_experiment_by_name("demo")
        runs = client.search_runs([experiment.experiment_id])
        kinds = [run.data.tags.get("next.kind") for run in runs]
        assert kinds.count("sweep") == 1, "the resumed sweep is one run"
        assert kinds.count("trial") == len(found.trials)
        for run in runs:
            if run.data.tags["next.kind"] == "sweep":
                figures = client.list_artifacts(run.info.run_id, "figures")
                assert "figures/sweep.png" in [figure.path for figure in figures]
                assert "test/mAP" in run.data.metrics
                continue
            assert run.info.status == "FINISHED"
            varied = {name for trial in found.trials for name in trial.settings}
            assert set(run.data.params) <= varied | {"seed"}, "a child carries what varies"
            assert not any(name.startswith("test/") for name in run.data.metrics)
            (trial,) = [trial for trial in found.trials if trial.name == run.info.run_name]
            assert ("next.pruned" in run.data.tags) == (trial.state == "pruned")
            curve = client.get_metric_history(run.info.run_id, "val/mAP")
            assert len(curve) == len(trial.curve), "no value is logged twice"


def check_free_axes(folder: Path, found) -> None:
    finished = [trial for trial in found.trials if trial.state == "finished"]
    for trial in finished:
        axes = json.loads((Path(trial.folder) / "axes.json").read_text())
        assert axes["default"]["val/mAP"] == pytest.approx(trial.score, abs=1e-3)
        assert axes["choices"] >= 2 * 3 * 3 * 13, "mirrored x temperature x weights x re-ranking"
        assert set(axes["by_axis"]["features"]) == {"plain", "centred", "whitened"}
        assert axes["best"][0]["val/mAP"] >= axes["best"][1]["val/mAP"]
        assert len(axes["missing"]["patterns"]) == 7
        assert axes["missing"]["mAP"][0][0] == pytest.approx(trial.score, abs=1e-3)
    assert not any(
        (Path(t.folder) / "axes.json").exists() for t in found.trials if t.state == "pruned"
    )


def check_changed_space(folder: Path, tmp_path: Path) -> None:
    changed = tmp_path / "quick.py"
    body = (ROOT / "tune_spaces" / "quick.py").read_text()
    changed.write_text(body.replace("0.25, 2.0", "0.25, 4.0").replace("[2, 4, 8]", "[2, 4]"))
    with pytest.raises(ValueError, match=r"space of sweep sweep has changed") as refused:
        resume_sweep(folder, space=changed)
    message = str(refused.value)
    assert "model.semantic.experts: one of 2, 4, 8 -> one of 2, 4" in message
    assert "model.routing.temperature: 0.25 to 2.0 (log) -> 0.25 to 4.0 (log)" in message
    assert "--fork NEW-NAME" in message


def test_a_sweep_says_what_does_not_fit_before_it_starts(tiny_config):
    space = load_space(ROOT / "tune_spaces" / "quick.py")
    several = override(tiny_config, {"scaling.num_workers": 2, "scaling.use_gpu": True})
    with pytest.raises(ValueError, match=r"among trials of one worker, but scaling.num_workers is"):
        run_sweep(several, space, SweepConfig(gpus_per_trial=0.5))
    with pytest.raises(ValueError, match=r"data.uri is not set"):
        run_sweep(override(tiny_config, {"data.uri": None}), space, SweepConfig())
    with pytest.raises(ValueError, match=r"must leave a trial to the search"):
        SweepConfig(trials=2, noise_share=0.5, race_share=0.5)
    assert not Path(tiny_config.run.storage_path).exists()


def test_the_plan_of_a_sweep_says_what_its_runs_are_measured_on(tiny_config, tmp_path, capsys):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(to_toml(tiny_config))
    given = ["--space", str(ROOT / "tune_spaces" / "quick.py"), "--data", tiny_config.data.uri]
    given += ["--recipe", str(recipe), "--dry-run"]
    assert plan([*given, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["measured_on"]
    assert told["held-out identities"]["identities"] == 4
    assert told["test split"]["queries"] == 36
    assert plan(given) == 0
    text = capsys.readouterr().out
    assert "measured on held-out identities: 4 identities with 32 queries; standard" in text
    assert "WARNING: held-out identities: few: settings that differ by less than 9.8 mAP" in text


def test_a_sweep_of_a_name_that_exists_is_refused(tiny_config):
    folder = Path(tiny_config.run.storage_path) / "tiny"
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(to_toml(tiny_config))
    space = load_space(ROOT / "tune_spaces" / "quick.py")
    with pytest.raises(ValueError, match=r"a run named 'tiny' exists.*choose another run.name"):
        run_sweep(tiny_config, space, SweepConfig())
    (folder / "sweep.toml").write_text("")
    with pytest.raises(ValueError, match=r"a sweep named 'tiny' exists.*sweep.py resume"):
        run_sweep(tiny_config, space, SweepConfig())


def test_an_unknown_sweep_names_its_near_match(tmp_path):
    (tmp_path / "experts-1").mkdir()
    (tmp_path / "experts-1" / "sweep.toml").write_text("")
    with pytest.raises(FileNotFoundError, match=r"no sweep 'expert-1'.*did you mean experts-1"):
        find_sweep(tmp_path, "expert-1")
    with pytest.raises(FileNotFoundError, match=r"there is no sweep in .*experts-2"):
        resume_sweep(tmp_path / "experts-2")
    assert find_sweep(tmp_path, "experts-1") == tmp_path / "experts-1"
