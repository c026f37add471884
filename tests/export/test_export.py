"""Exported models give the embeddings of the model, or are refused."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch

from next.export import bundle
from next.export.bundle import export
from next.export.graph import EmbeddingPath, inputs_of, open_graph
from next.export.parity import measure, require_parity
from next.retrieval.sources import open_shards
from next.training.embedder import Embedder

JOB = str(Path(__file__).resolve().parents[2] / "jobs" / "export.py")


@pytest.fixture(scope="module")
def source(demo_shards):
    return open_shards(demo_shards, "gallery")


@pytest.fixture(scope="module")
def onnx(trained_embedder, trained_checkpoint, source, tmp_path_factory):
    pytest.importorskip("onnxruntime")
    out = tmp_path_factory.mktemp("export") / "onnx"
    return export(trained_embedder, trained_checkpoint, out, "onnx", source)


def some_inputs(embedder: Embedder, count: int) -> dict[str, np.ndarray]:
    drawn = np.random.default_rng(0)
    shapes = inputs_of(embedder, text=True)
    present = drawn.random((count, len(embedder.modalities))) < 0.6
    present[~present.any(1), 0] = True
    text = drawn.normal(size=(count, *shapes["text"][1])).astype(np.float32)
    images = drawn.integers(0, 256, (count, *shapes["images"][1])).astype(np.uint8)
    return {"images": images, "present": present, "text": text}


def test_onnx_gives_what_torch_gives_for_any_batch_and_any_modalities(onnx, trained_embedder):
    run = open_graph(onnx.folder, "onnx")
    path = EmbeddingPath(trained_embedder).eval()
    for count in (1, 3, 16):
        inputs = some_inputs(trained_embedder, count)
        with torch.inference_mode():
            expected = path(**{name: torch.from_numpy(one) for name, one in inputs.items()})
        np.testing.assert_allclose(run(inputs), expected.numpy(), atol=1e-5)


def test_the_report_is_of_files_and_captions(onnx, trained_embedder, source, demo_shards):
    parity = onnx.parity
    assert parity.samples == sum(source.pieces)
    assert 0 < parity.largest_difference < 1e-5
    assert 0 < parity.largest_difference_missing < 1e-5
    assert parity.changed_ranks == 0
    assert parity.compared_ranks == 10 * parity.samples
    assert parity.mAP == parity.mAP_exported > 20
    frame = pandas.read_parquet(demo_shards / "gallery").iloc[:4]
    run = open_graph(onnx.folder, "onnx")
    names = trained_embedder.modalities
    present = np.ones((4, len(names)), dtype=bool)
    given = {
        "images": trained_embedder.decoded(
            [list(frame[f"image_{name}"]) for name in names], range(4)
        ),
        "present": present,
        "text": trained_embedder.text(frame, present),
    }
    np.testing.assert_allclose(run(given), trained_embedder.embed(frame), atol=1e-5)


def test_the_card_says_how_to_use_it(onnx, trained_embedder):
    card = json.loads((onnx.folder / "export.json").read_text())
    assert card["model"] == trained_embedder.digest
    assert card["opset"] == 20
    assert card["inputs"]["images"]["shape"] == ["batch", 3, 32, 16, 3]
    assert "not normalised: the model does it" in card["inputs"]["images"]["is"]
    assert card["captions"] == "go in as sentence embeddings"
    assert card["parity"]["changed_ranks"] == 0
    assert set(card["made_with"]) == {"torch", "onnx", "onnxscript", "onnxruntime"}


def test_a_model_that_normalises_twice_is_refused(trained_embedder, source):
    path = EmbeddingPath(trained_embedder).eval()

    def twice(inputs):
        given = {name: torch.from_numpy(one) for name, one in inputs.items()}
        pixels = (given["images"].movedim(-1, -3).float() - path.shift) * path.scale
        again = (pixels - path.shift) * path.scale
        with torch.inference_mode():
            found = trained_embedder.network(again, given["present"], given["text"]).embedding
        return torch.nn.functional.normalize(found, dim=1).numpy()

    parity = measure(trained_embedder, twice, source, samples=20, text=True)
    assert parity.changed_ranks > 0
    with pytest.raises(ValueError, match=r"must give torch's embeddings to 0\.0001 .* not written"):
        require_parity(parity, 1e-4)


def test_an_export_that_differs_leaves_nothing(
    trained_embedder, trained_checkpoint, source, tmp_path, monkeypatch
):
    def other(folder, kind):
        return lambda inputs: np.full((len(inputs["present"]), trained_embedder.width), np.nan)

    monkeypatch.setattr(bundle, "write_graph", lambda *args, **given: None)
    monkeypatch.setattr(bundle, "open_graph", other)
    with pytest.raises(ValueError, match="gives values that are not finite for some of 8"):
        export(trained_embedder, trained_checkpoint, tmp_path / "out", "torch", source, samples=8)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(FileExistsError, match="is there already; give a new folder, or remove it"):
        export(trained_embedder, trained_checkpoint, tmp_path / "out", "torch", source)


def test_torch_and_safetensors_are_read_back_by_others(
    trained_embedder, trained_checkpoint, source, demo_shards, tmp_path
):
    frame = pandas.read_parquet(demo_shards / "gallery").iloc[:3]
    found = export(
        trained_embedder, trained_checkpoint, tmp_path / "s", "safetensors", source, samples=8
    )
    assert found.card["opset"] is None
    again = Embedder(tmp_path / "s")
    assert again.digest == trained_embedder.digest
    np.testing.assert_allclose(again.embed(frame), trained_embedder.embed(frame), atol=1e-6)
    found = export(
        trained_embedder,
        trained_checkpoint,
        tmp_path / "t",
        "torch",
        source,
        text=False,
        samples=40,
    )
    assert found.card["captions"].startswith("are left out: the model was trained with them")
    assert set(found.card["inputs"]) == {"images", "present"}
    assert found.parity.mAP_with_captions is not None
    program = torch.export.load(tmp_path / "t" / "model.pt2").module()
    inputs = {
        n: torch.from_numpy(v) for n, v in some_inputs(trained_embedder, 5).items() if n != "text"
    }
    expected = EmbeddingPath(trained_embedder).eval()(**inputs).detach()
    np.testing.assert_allclose(program(**inputs).detach(), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (["--samples", "1"], "--samples must be 2 or more, but got 1"),
        (["--tolerance", "0"], "--tolerance must be positive, but got 0.0"),
        (["--split", "test"], "invalid choice"),
        (["--format", "safetensors", "--text", "none"], "safetensors hold the text tower, too"),
    ],
)
def test_what_cannot_be_exported_is_said(
    trained_checkpoint, demo_shards, tmp_path, monkeypatch, capsys, flags, error
):
    named = ["--model", trained_checkpoint, "--out", tmp_path / "o", "--data", demo_shards]
    monkeypatch.setattr(sys, "argv", ["export.py", *map(str, named), *flags])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(JOB, run_name="__main__")
    assert end.value.code == 2
    assert error in "".join(capsys.readouterr())
    assert list(tmp_path.iterdir()) == []


def test_the_job_plans_and_tells(trained_checkpoint, demo_shards, tmp_path, monkeypatch, capsys):
    for more, expected in [(["--dry-run"], "file"), ([], "parity")]:
        named = [
            "--model",
            trained_checkpoint,
            "--out",
            tmp_path / "o",
            "--data",
            demo_shards,
            "--json",
        ]
        flags = ["--format", "safetensors", "--samples", "6", *more]
        monkeypatch.setattr(sys, "argv", ["export.py", *map(str, named), *flags])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(JOB, run_name="__main__")
        answer = json.loads(capsys.readouterr().out)
        assert (end.value.code, expected in answer) == (0, True)
    assert answer["parity"]["largest_difference"] < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "smaller", "cost"), [("float16", 1.8, 0.5), ("int8", 1.6, 5)]
)
def test_fewer_bits_make_a_smaller_model_whose_cost_in_map_is_told(
    onnx, trained_embedder, trained_checkpoint, source, tmp_path, precision, smaller, cost
):
    how = {"precision": precision}
    found = export(trained_embedder, trained_checkpoint, tmp_path / "out", "onnx", source, **how)
    assert found.bytes < onnx.bytes / smaller
    parity = found.parity
    assert parity.largest_difference > onnx.parity.largest_difference
    assert abs(parity.mAP - parity.mAP_exported) <= cost
    assert (
        f"mAP {parity.mAP:.2f} in torch and {parity.mAP_exported:.2f} exported"
        in (parity.lines()[0])
    )
    assert found.card["precision"] == precision
    with pytest.raises(ValueError, match=r"must give torch's embeddings to 1e-06 .* not written"):
        export(
            *(trained_embedder, trained_checkpoint, tmp_path / "no", "onnx", source),
            **how,
            tolerance=1e-6,
        )
    with pytest.raises(ValueError, match=f"--precision {precision} is of --format onnx, but got"):
        export(*(trained_embedder, trained_checkpoint, tmp_path / "no", "torch", source), **how)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
