import json
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
import torch

from next.config import override
from next.data.shards.reader import open_manifest
from next.training.checkpointing.checkpoint import read_config
from next.training.distributed.assessment_workers import _on_workers
from next.training.inputs import resolve, training_data
from next.training.loop import train
from next.training.results.assessment import assess
from next.training.results.report import FolderReporter

JOB_FILE = Path(__file__).resolve().parents[2] / "jobs" / "evaluate.py"


@pytest.fixture(scope="module")
def job() -> ModuleType:
    """The job, in this process."""
    spec = spec_from_file_location("evaluate_job", JOB_FILE)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("evaluated")


@pytest.fixture
def flags(tiny_config, run_folder) -> list[str]:
    manifest = open_manifest(tiny_config.data.uri)
    settings = {"optim.epochs": 1, "optim.warmup_epochs": 0, "data.drop_modality": 0.3}
    settings |= {"selection.batch": 16}
    config = resolve(override(tiny_config, settings), manifest)
    if not (run_folder / "last").exists():
        with FolderReporter(run_folder) as reporter:
            train(config, training_data(config, manifest), reporter)
    return ["--checkpoint", str(run_folder / "last"), "--data", str(manifest.uri), "--missing"]


def test_missing_prints_the_cases_their_mean_and_every_pair(job, flags, capsys):
    assert job.main(flags) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["missing", "mAP", "R-1", "R-5", "R-10", "queries"]
    names = [line.split()[0] for line in lines[1:9]]
    assert names == ["-", "r", "n", "t", "rn", "rt", "nt", "mean"]
    across = next(line for line in lines if "RGB+NI+TI" in line)
    assert across.split()[-1] == "TI"
    assert len(lines) == 1 + 8 + 1 + 1 + 1 + 7 + 1, "no published figures for this benchmark"
    assert Path(lines[-1].split()[-1]).name == "missing.png"


def test_missing_as_json_has_all_scores(job, flags, capsys):
    assert job.main([*flags, "--split", "val", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["modalities"] == ["RGB", "NI", "TI"]
    assert len(answer["any_to_any"]) == 49
    assert set(answer["missing"]) == {"r", "n", "t", "rn", "rt", "nt"}
    assert 0 < answer["mean"]["mAP"] <= 100
    (pair,) = [
        one for one in answer["any_to_any"] if (one["query"], one["gallery"]) == (["TI"], ["TI"])
    ]
    assert pair["mAP"] == answer["missing"]["rn"]["mAP"]


def test_the_number_of_the_literature_is_there_on_request(job, flags, capsys):
    def scores(*more: str) -> dict:
        assert job.main([*flags, "--json", *more]) == 0
        pairs = json.loads(capsys.readouterr().out)["any_to_any"]
        return {(tuple(one["query"]), tuple(one["gallery"])): one["mAP"] for one in pairs}

    common, whole = scores(), scores("--whole-features")
    alike = [pair for pair in common if pair[0] == pair[1]]
    assert [common[pair] for pair in alike] == [whole[pair] for pair in alike]
    assert common[("RGB",), ("RGB", "NI", "TI")] != whole[("RGB",), ("RGB", "NI", "TI")]


def test_features_are_centred_or_whitened_on_request(job, flags, capsys, monkeypatch):
    """Fitted on train samples: none of those that are searched."""
    monkeypatch.setattr(
        "next.training.results.assessment.draw_evaluation", lambda *args, **given: []
    )
    one = [flag for flag in flags if flag != "--missing"]
    scores, matrices = [], []
    for kind in ("plain", "centred", "whitened"):
        assert job.main([*one, "--json", "--features", kind]) == 0
        scores.append(json.loads(capsys.readouterr().out)["metrics"]["test/mAP"])
        assert job.main([*flags, "--json", "--features", kind]) == 0
        matrices.append(json.loads(capsys.readouterr().out))
    assert len(set(scores)) == 3
    assert [matrix["full"]["mAP"] for matrix in matrices] == scores
    assert len({matrix["missing"]["rn"]["mAP"] for matrix in matrices}) == 3


def test_a_matrix_that_is_too_costly_is_left_out_and_the_log_says_how_to_ask(
    flags, tmp_path, caplog, monkeypatch
):
    monkeypatch.setattr("next.evaluation.missing.MOST_SAMPLES", 3)
    monkeypatch.setattr(
        "next.training.results.assessment.draw_evaluation", lambda *args, **given: []
    )
    checkpoint, data = Path(flags[1]), flags[3]
    caplog.set_level("INFO", "next")
    found = assess(
        checkpoint, open_manifest(data), tmp_path, device=torch.device("cpu"), missing=True
    )
    assert found.subsets == {}
    assert "`jobs/evaluate.py --checkpoint ... --missing` does" in caplog.text


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_two_workers_come_to_the_bits_of_one_process(job, flags, capsys, tmp_path):
    def answer(*more: str) -> dict:
        assert job.main([*flags[:4], "--json", *more]) == 0
        return json.loads(capsys.readouterr().out)

    alone = answer("--out", str(tmp_path / "alone"))
    shared = answer("--workers", "2", "--out", str(tmp_path / "shared"))
    assert shared["metrics"] == alone["metrics"]
    names = [Path(each).name for each in alone["pictures"]]
    assert [Path(each).name for each in shared["pictures"]] == names
    for name in names:
        own = [tmp_path / place / "figures" / name for place in ("alone", "shared")]
        assert own[0].read_bytes() == own[1].read_bytes(), name


@pytest.mark.cluster  # two starts of two workers
@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)  # by themselves the others would wait for half an hour
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_an_error_of_one_worker_alone_ends_the_others_and_is_raised_as_itself(flags):
    def with_one_that_raises(checkpoint, manifest, *, share, device, error):
        if share.rank:
            raise error
        torch.distributed.barrier()

    checkpoint, manifest = Path(flags[1]), open_manifest(flags[3])
    two = {"scaling.num_workers": 2, "run.max_failures": 1}
    config = override(read_config(checkpoint), two)
    for error, told in (
        (ValueError("a column is missing"), r"worker 1 on \S+: a column is missing"),
        (ConnectionResetError("the store is away"), "^the store is away"),
    ):
        with pytest.raises(type(error), match=told):
            _on_workers(config, checkpoint, manifest, with_one_that_raises, {"error": error})


def test_no_worker_is_refused(job, flags):
    with pytest.raises(ValueError, match="--workers must be 1 or more, but got 0"):
        job.main([*flags, "--workers", "0"])


def test_published_figures_stand_beside_the_benchmark_they_are_of(job):
    published = job.REFERENCES["RGBNT201"]
    six = [value for name, value in published.items() if name != "mean"]
    assert sum(six) / 6 == pytest.approx(published["mean"], abs=0.05)
