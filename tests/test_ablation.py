"""The ablation: rows of earlier calls stay, and which rows are compared with which."""

import importlib
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from next.config import to_toml
from next.data.shards.reader import open_manifest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def ablation(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("ablation")


def row(made_of: str, mean: float) -> dict:
    return {"mAP": mean, "rank1": mean, "val_mAP": mean, "seconds": 1.0, "made_of": made_of}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_call_with_other_methods_keeps_the_rows_of_earlier_ones(
    ablation, tiny_config, demo_shards, tmp_path, capsys
):
    manifest = open_manifest(demo_shards)
    queries = len(manifest.labels(manifest.resolve("query")).pid)
    baseline = {"0": row("a", 30.0), "1": row("b", 32.0)}
    earlier = {"CLS baseline": baseline, "NEXT": {"0": row("c", 33.0)}}
    for name, value in (("a", 0.3), ("b", 0.32), ("c", 0.33)):
        np.savez(tmp_path / f"{name}.npz", average_precision=np.full(queries, 100 * value))
    record = tmp_path / "ablation.json"
    record.write_text(json.dumps({"data_digest": manifest.digest, "results": earlier}))
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(to_toml(tiny_config))
    given = ["--data", str(demo_shards), "--recipe", str(recipe), "--out", str(tmp_path)]
    assert ablation.main([*given, "--methods", "untrained", "--seeds", "1"]) == 0
    kept = json.loads(record.read_text())["results"]
    assert {name: kept[name] for name in earlier} == earlier
    assert list(kept["untrained"]) == ["0"]
    told = capsys.readouterr().out
    assert "| NEXT | 1 | 33.0 | 33.0 | 33.0 | +3.00 (0.00; 1) to CLS baseline |" in told
    with pytest.raises(ValueError, match=r"was made with settings = .* give another --out"):
        ablation.main([*given, "--methods", "untrained", "--seeds", "1", "--optim.epochs", "2"])
    assert json.loads(record.read_text())["results"] == kept


def test_rows_are_compared_with_the_first_trained_one_with_such_towers(ablation):
    names = ["untrained", "CLS baseline", "NEXT", "CLS baseline, aligned", "NEXT, aligned"]
    assert ablation.references(names) == {
        "NEXT": "CLS baseline",
        "NEXT, aligned": "CLS baseline, aligned",
    }


def test_rows_with_other_weights_or_other_data_are_not_put_into_one_table(ablation, tmp_path):
    record = tmp_path / "ablation.json"
    made_with = {"data_digest": "d", "settings": "s", "weights": ["/a.safetensors", 5e-4]}
    assert ablation.earlier_results(record, made_with) == {}
    ablation.keep(record, made_with, {"NEXT": {"0": row("a", 30.0)}})
    without = {"data_digest": "d", "settings": "s"}
    assert ablation.earlier_results(record, without) == {"NEXT": {"0": row("a", 30.0)}}
    assert without == made_with, "the file goes on telling the weights of its rows"
    for name, value in (("data_digest", "e"), ("weights", ["/b.safetensors", 5e-4])):
        with pytest.raises(ValueError, match=rf"was made with {name} = .* give another --out"):
            ablation.earlier_results(record, made_with | {name: value})
