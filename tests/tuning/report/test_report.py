"""The report of a sweep that was played with known scores: no training, everything else real."""

import json
import re
import shutil
from pathlib import Path
from wsgiref.util import setup_testing_defaults

import numpy as np
import pytest

from jobs.sweep import main as sweep_job
from next.config import RunConfig, override, to_toml
from next.data.shards.reader import open_manifest
from next.evaluation.queries import FEW, PAIRED_SPREAD, few_identities
from next.training.inputs import resolve, training_data
from next.training.results.assessment import Assessment
from next.tuning.execution.slots import Slots
from next.tuning.folder import read_standing, write_record
from next.tuning.report.report import report_sweep
from next.tuning.search.searcher import Search
from next.tuning.search.space import describe_space, load_space
from next.tuning.search.study import FILE, create_studies
from next.tuning.search.trial_record import Repeat
from next.tuning.settings import SweepConfig
from next.tuning.statistics.axes import AXES, FEATURES
from next.tuning.statistics.importance import comparable, importances
from next.tuning.statistics.summary import leaderboard, summarise
from next.tuning.sweep import plan_resume

ROOT = Path(__file__).resolve().parents[3]
TINY = {
    "model.backbone.name": "next-tiny",
    "model.backbone.pretrained": None,
    "data.image_size": (32, 16),
    "batch.identities": 4,
    "batch.instances": 4,
    "optim.epochs": 3,
    "optim.warmup_epochs": 0.5,
    "selection.holdout": 0.34,
}
SWEEP = SweepConfig(trials=24, grace_epochs=1, reduction=3, seed=3)


def value_of(settings, epoch) -> float:
    """A known surface: sharp routing and many experts are good, up to a seed's noise."""
    temperature = settings.get("model.routing.temperature", 1.0)
    experts = settings.get("model.semantic.experts", 2)
    noise = np.random.default_rng(settings.get("seed", 0) + 17).normal(0, 0.6)
    return float(60 - 8 * np.log(temperature) + experts + 4 * np.log(epoch) + noise)


def play(search: Search, folder: Path, samples) -> None:
    """Run the sweep as Tune would, and write what trials write."""
    for step in range(200):
        task = search.suggest(str(step))
        if task == "FINISHED":
            return
        own = folder / "trials" / task["name"]
        own.mkdir(parents=True)
        pruned = False
        for epoch in (1, 2, 3):
            score = value_of(task["settings"], epoch)
            pruned = search.report(str(step), {"epoch": epoch, "val/mAP": score})
            if pruned:
                break
        if not pruned:
            write_measured(own, task["settings"], samples)
        search.on_trial_complete(str(step))


def write_measured(own: Path, settings, samples) -> None:
    score, generator = value_of(settings, 3), np.random.default_rng(len(str(settings)))
    features = generator.normal(size=(len(samples), 8)).astype(np.float16)
    np.savez(
        own / FEATURES,
        average_precision=score + generator.normal(0, 9, size=len(samples)),
        query_pid=samples.labels.pid,
        query=features,
        gallery=features,
        own=np.arange(len(samples)),
    )
    experts = settings.get("model.semantic.experts", 2)
    choice = {"captions.evaluation": "all", "flip": False, "rerank": None}
    axes = {
        "usage": {"semantic_entropy": [[0.4 + 0.05 * experts] * experts] * 3},
        "choices": 2,
        "default": choice | {"val/mAP": score},
        "best": [choice | {"flip": True, "val/mAP": score + 1}],
        "by_axis": {"flip": {"True": score + 1, "False": score}},
        "missing": {"patterns": ["RGB+NI", "RGB", "NI"], "mAP": [[60, 50, 40]] * 3},
    }
    (own / AXES).write_text(json.dumps(axes))


@pytest.fixture(scope="module")
def played(tmp_path_factory, demo_shards, cache_folder) -> Path:
    from tests.conftest import TINY

    storage = tmp_path_factory.mktemp("played")
    base = override(
        RunConfig(),
        TINY | {"data.uri": str(demo_shards), "data.cache": str(cache_folder)},
    )
    manifest = open_manifest(demo_shards)
    base = resolve(base, manifest)
    samples = training_data(base, manifest).query
    folder = storage / "played"
    folder.mkdir()
    (folder / "config.toml").write_text(to_toml(base))
    space = load_space(ROOT / "tune_spaces" / "experts.py")
    write_record(folder, space, SWEEP, describe_space(space, base))
    studies = create_studies(folder / FILE, "played", space.objectives, SWEEP)
    repeats = iter([Repeat("trial-0000", {}, 1)])
    search = Search(
        studies,
        space,
        SWEEP,
        base,
        Slots(base, SWEEP, {"node": {"CPU": 4.0}}),
        lambda: next(repeats, None),
    )
    play(search, folder, samples)
    return folder


def test_the_page_is_small_whole_and_shows_every_score_with_its_spread(played):
    page, summary = report_sweep(played)
    text = page.read_text()
    assert page.stat().st_size < 5_000_000
    fetched = re.findall(r"(?:src|href)=[\"']?([^\s\"'>]{0,5})", text)
    assert set(fetched) == {"data:"}, "nothing is fetched"
    for title in ("Leaderboard", "Search", "Experts and missing modalities", "Free axes"):
        assert title in text
    assert "The two best, query by query" in text
    assert text.count("<img ") >= 8
    board = text[text.index("Leaderboard") : text.index("<h2>Search")]
    scores = re.findall(r"<td>(\d\d\.?\d* [^<]*)</td>", board)
    assert len(scores) >= 10
    assert all("±" in score for score in scores)
    answer = json.loads(summary.read_text())
    assert len(answer["trials"]) == len(list((played / "trials").iterdir()))
    assert answer["noise_floor"]["degrees_of_freedom"] >= 3
    (best,) = (row for row in answer["leaderboard"] if row["name"] == answer["winner"])
    found = best["settings"]["model.routing.temperature"]
    assert found < 1.0, "the surface's good corner was found"
    measured = answer["measured_on"]["val/mAP"]
    told = f"val/mAP of {answer['winner_run']} rests on {measured['identities']} identities with "
    told += f"{measured['queries']} queries, standard error {measured['error']:.1f}"
    assert told in text
    assert "test/mAP" not in answer["measured_on"], "nothing was assessed"
    assert answer["leaderboard"][0]["name"] == "default", "known from seeds, not from one run"
    assert {verdict["theirs"] for verdict in answer["verdicts"]} >= {"default"}
    assert json.dumps(answer).find("NaN") < 0


def test_what_a_trials_files_say_is_shown_and_never_part_of_the_page(played, tmp_path):
    folder = tmp_path / "played"
    shutil.copytree(played, folder)
    found = read_standing(folder)
    own = folder / "trials" / summarise(found.settings, found.objectives).run
    axes = json.loads((own / AXES).read_text())
    script = "<script>alert(1)</script>"
    axes |= {"choices": script, "by_axis": {script: {script: 1.0}}}
    axes["best"][0]["captions.evaluation"] = script
    (own / AXES).write_text(json.dumps(axes))
    page, _ = report_sweep(folder)
    text = page.read_text()
    assert "<script" not in text
    assert text.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 4


def test_what_the_test_scores_rest_on_is_told_now_and_by_later_reports(played, tmp_path):
    folder = tmp_path / "played"
    shutil.copytree(played, folder)
    queries = {"average_precision": [20.0, 10.0, 20.0, 50.0], "pid": [2, 1, 2, 2]}
    assessment = Assessment({"test/mAP": 25.0}, [], {"test/mAP": (20.0, 30.0)}, queries, {})
    told = "test/mAP rests on 2 identities with 4 queries, standard error 7.5"
    page, _ = report_sweep(folder, assessment)
    assert told in page.read_text()
    page, summary = report_sweep(folder)
    assert told in page.read_text()
    kept = json.loads(summary.read_text())["measured_on"]["test/mAP"]
    assert kept == {"identities": 2, "queries": 4, "error": 7.5}


def test_the_leaderboard_ends_with_what_its_scores_rest_on(played):
    found = read_standing(played)
    summary = summarise(found.settings, found.objectives)
    assert summary.basis is not None
    *_, last = leaderboard(found.settings, found.varied, summary)
    told = f"val/mAP of {summary.run} rests on {summary.basis} (over held-out identities)"
    few = few_identities(summary.basis.identities, summary.basis.identities)
    assert last == (f"{told}; {few}" if few else told)
    least = 1.96 * PAIRED_SPREAD / summary.basis.identities**0.5
    assert (f"less than {least:.1f} mAP cannot be told" in last) == (summary.basis.identities < FEW)
    known = np.load(played / "trials" / summary.run / FEATURES)
    assert summary.basis.identities == len(np.unique(known["query_pid"]))
    assert summary.basis.queries == len(known["query_pid"])


def test_temperature_matters_most_on_a_surface_of_temperature_and_experts(played):
    found = read_standing(played)
    compared = comparable([trial for trial in found.trials if trial.of is None], found.objectives)
    shares = importances(found.studies.search, compared.scores)
    assert sum(one.share for one in shares.values()) == pytest.approx(1.0)
    first, *others = shares
    assert first == "model.routing.temperature"
    assert shares[first].told_apart
    assert not all(shares[name].told_apart for name in others)
    assert all(one.low <= one.share <= one.high for one in shares.values())
    assert "captions.keep" not in shares, "only some trials have it"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="there is no Chromium")
def test_the_page_fits_a_wide_and_a_narrow_screen_without_network(played):
    from playwright.sync_api import sync_playwright

    page, _ = report_sweep(played)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        for width in (1280, 390):
            tab = browser.new_page(viewport={"width": width, "height": 900})
            asked: list[str] = []
            tab.on("request", lambda request, asked=asked: asked.append(request.url))
            tab.goto(page.as_uri())
            assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
            assert tab.evaluate("document.documentElement.scrollWidth") == width
            broken = "[...document.images].filter(i => !i.complete || !i.naturalWidth).length"
            assert tab.evaluate(broken) == 0
        browser.close()


def test_optunas_dashboard_opens_the_study(played):
    import optuna
    from optuna_dashboard import wsgi

    storage = optuna.storages.RDBStorage(f"sqlite:///{played / FILE}")
    answer: dict = {}

    def get(path: str):
        environ = {"PATH_INFO": path}
        setup_testing_defaults(environ)
        begin = lambda status, headers, *error: answer.update(s=status)  # noqa: E731
        body = b"".join(wsgi(storage)(environ, begin))
        assert answer["s"].startswith("200"), body[:300]
        return json.loads(body)

    names = {entry["study_name"]: entry for entry in get("/api/studies")["study_summaries"]}
    assert set(names) == {"played", "played seeds"}
    detail = get(f"/api/studies/{names['played']['study_id']}")
    states = {trial["state"] for trial in detail["trials"]}
    assert states == {"Complete", "Pruned"}
    assert any(trial["intermediate_values"] for trial in detail["trials"])
    storage.engine.dispose()


def test_a_sweep_without_a_score_has_no_report_yet(tmp_path, played):
    folder = tmp_path / "new"
    folder.mkdir()
    for name in ("config.toml", "sweep.toml"):
        shutil.copy(played / name, folder / name)
    create_studies(folder / FILE, "new", {"val/mAP": "max"}, SWEEP)
    with pytest.raises(ValueError, match=r"no trial of new has reported a score yet"):
        report_sweep(folder)


def test_the_list_of_sweeps_has_numbers_as_numbers(played, capsys):
    assert sweep_job(["list", "--storage_path", str(played.parent), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["sweep"] == "played"
    assert isinstance(row["score"], float)
    assert isinstance(row["half_width"], float)
    assert {type(row[name]) for name in ("of", "finished", "pruned", "failed")} == {int}
    assert sweep_job(["list", "--storage_path", str(played.parent)]) == 0
    assert f"score {row['score']:.4g}  " in capsys.readouterr().out


def content(folder: Path) -> dict[Path, bytes]:
    """All files below a folder, without those in which SQLite notes who reads."""
    found = [path for path in folder.rglob("*") if path.is_file()]
    return {path: path.read_bytes() for path in found if not path.name.endswith("-shm")}


def test_a_resume_can_be_rehearsed(played, capsys, tmp_path):
    before = content(played.parent)
    asked = ["resume", "played", "--storage_path", str(played.parent), "--dry-run", "--json"]
    assert sweep_job([*asked, "--trials", "50"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["sweep"], plan["driver"], plan["trials"]) == ("played", "none", 50)
    assert plan["finished"] > 0
    assert plan["space_changed"] == []
    changed = tmp_path / "experts.py"
    body = (ROOT / "tune_spaces" / "experts.py").read_text()
    changed.write_text(
        body.replace('"model.structure.slots", 1, 4', '"model.structure.slots", 1, 8')
    )
    sweep_job([*asked, "--space", str(changed)])
    (line,) = json.loads(capsys.readouterr().out)["space_changed"]
    assert line == "model.structure.slots: whole number 1 to 4 -> whole number 1 to 8"
    assert content(played.parent) == before


def test_a_fork_can_be_rehearsed(played, capsys, tmp_path):
    drawn = [trial for trial in read_standing(played).trials if trial.of is None]
    slots = [trial.settings["model.structure.slots"] for trial in drawn]
    narrow = tmp_path / "narrow.py"
    body = (ROOT / "tune_spaces" / "experts.py").read_text()
    narrow.write_text(
        body.replace('"model.structure.slots", 1, 4', '"model.structure.slots", 1, 2')
    )
    before = content(played.parent)
    asked = ["resume", "played", "--storage_path", str(played.parent), "--dry-run", "--json"]
    assert sweep_job([*asked, "--space", str(narrow), "--fork", "next"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["fork"] == str(played.parent / "next")
    assert 0 < plan["inherited"] == sum(number <= 2 for number in slots) < len(slots)
    with pytest.raises(
        ValueError, match=r"a sweep named 'played' exists .*choose another run.name"
    ):
        sweep_job([*asked, "--fork", "played"])
    assert content(played.parent) == before


def test_a_sweep_goes_on_with_its_own_data_alone(played, tmp_path):
    copy = tmp_path / "played"
    shutil.copytree(played, copy)
    (copy / "data.toml").write_text(f'digest = "{"a" * 64}"\n')
    with pytest.raises(ValueError, match=r"sweep played was started with data of digest a{64}"):
        plan_resume(copy)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("sweep.toml", "trials = ", "trials = 1"),
        ("sweep.toml", 'space = "experts"', 'space = "other"'),
        ("sweep.toml", "[sweep]", "[swe"),
        ("config.toml", "seed = 0", "seed = 1"),
    ],
)
def test_a_record_of_which_a_digit_was_changed_is_refused(played, tmp_path, name, old, new):
    copy = tmp_path / "played"
    shutil.copytree(played, copy)
    text = (copy / name).read_text()
    assert old in text
    (copy / name).write_text(text.replace(old, new, 1))
    message = rf"{name} is damaged \(.*\); bring it back from a copy or from the sweep's store"
    with pytest.raises(ValueError, match=message):
        read_standing(copy)
    with pytest.raises(ValueError, match=message):
        plan_resume(copy)


def test_a_record_of_an_older_version_has_no_sum_and_is_read(played, tmp_path):
    copy = tmp_path / "played"
    shutil.copytree(played, copy)
    lines = (copy / "sweep.toml").read_text().splitlines()
    kept = [line for line in lines if not line.startswith(("sha256 = ", "settings = "))]
    assert len(kept) == len(lines) - 2
    (copy / "sweep.toml").write_text("\n".join(kept))
    assert len(read_standing(copy).trials) == len(read_standing(played).trials)


@pytest.mark.parametrize("change", [lambda text: text[:90], lambda text: text.replace("7", "8", 1)])
def test_scores_on_test_that_were_changed_are_not_told_again(played, tmp_path, caplog, change):
    copy = tmp_path / "played"
    shutil.copytree(played, copy)
    report_sweep(copy)
    path = copy / "sweep.json"
    path.write_text(change(path.read_text()))
    report_sweep(copy)
    assert f"{path} is damaged (" in caplog.text
    assert "`jobs/sweep.py resume played` measures the winner again" in caplog.text
    assert json.loads(path.read_text())["winner"], "it is written anew"


def test_what_others_have_published_stands_beside_the_winner(played):
    known = {"NEXT (v4)": {"mAP": 82.4, "rank1": 86.6}}
    page, written = report_sweep(played, published=known)
    assert json.loads(written.read_text())["published"] == known
    assert "published: NEXT (v4)" in page.read_text()
    page, written = report_sweep(played)  # later, and without the card
    assert json.loads(written.read_text())["published"] == known
    assert "mAP 82.4, rank-1 86.6" in page.read_text()
