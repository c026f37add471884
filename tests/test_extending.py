"""What is touched to add a part: shown on a copy of the package, and on files of one's own.

CONTRIBUTING.md has the same list.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from next.benchmark.card import load_card
from next.captioning.requests.ledger import Ledger
from next.captioning.requests.models import load_models
from next.captioning.run import Captioner
from next.captioning.schema.attributes import load_schema
from next.captioning.source import FolderSource
from next.data.source.ingest import ScanOptions, prepare
from tests.captioning.scripted_endpoint import PERSONAS, Script, scripted

ROOT = Path(__file__).resolve().parents[1]

ADDED = {
    "a sampler": {
        "next/tuning/settings.py": ("(sampler: Literal\\[)", r'\1"steady", '),
        "next/tuning/search/samplers.py": (
            r"(SAMPLERS: .*\{\n)",
            r'\1    "steady": lambda sweep, seed: optuna.samplers.PartialFixedSampler('
            r'{"experts": 4}, RandomSampler(seed=seed)),\n',
        ),
    },
    "a picture": {
        "next/pictures/model/presence_maps.py": """
from next.pictures.canvas import house_style, plot_figure, save
from next.pictures.heatmaps import heat_map


def presence_map(path, evaluated):
    samples = evaluated.gallery
    with house_style():
        figure = plot_figure(6, 6)
        names = samples.labels.sample_id.tolist()
        heat_map(figure.subplots(), "present", 100.0 * samples.present, names, samples.modalities)
        return save(figure, path)
""",
        "next/pictures/model/all.py": (
            r"(?s)(\nfrom __future__ import annotations\n)(.*PICTURES: [^{]*\{\n)",
            r"\1\nfrom next.pictures.model.presence_maps import presence_map\2"
            r'    "presence.png": presence_map,\n',
        ),
    },
    "a check of the doctor": {
        "next/doctor/swap.py": """
import psutil

from next.doctor.finding import Finding


def swap(inquiry):
    return Finding("swap", "ok", f"{psutil.swap_memory().total} bytes")
""",
        "next/doctor/examination.py": (
            r"(?s)(from next\.doctor import )(.*CHECKS: [^\n]*\{\n)",
            r'\1swap, \2    "swap": swap.swap,\n',
        ),
    },
}
"""What is added -> the files that are new, by their text, or changed, by a substitution."""

USED = """
import json, sys
from pathlib import Path

import optuna

from next.config import RunConfig, override
from next.doctor import examination
from next.doctor.finding import Inquiry
from next.evaluation.protocol import evaluate
from next.model.network import NEXT
from next.pictures.model.all import Evaluated, draw_evaluation, read_queries
from next.tuning.search.study import ask, create_studies
from next.tuning.settings import SweepConfig
from tests.evaluation.conftest import SETTINGS, draw_samples

out = Path(sys.argv[1])
sweep = SweepConfig(trials=4, sampler="steady", noise_share=0, race_share=0)
study = create_studies(out / "study.db", "s", {"val/mAP": "max"}, sweep).search
drawn = []
for _ in range(3):
    trial = ask(study)
    drawn.append(trial.suggest_categorical("experts", [1, 2, 4]))
    study.tell(trial, 1.0)

config = override(RunConfig(), SETTINGS)
model, samples = NEXT(config.model), draw_samples()
how = {"rule": "camera", "config": config, "device": "cpu"}
found = evaluate(model, samples, samples, **how)
queries = read_queries(found, samples, samples)
pictures = draw_evaluation(out, Evaluated(model, found, samples, samples, queries, **how))

check = examination.CHECKS["swap"]
examination.CHECKS.clear()
examination.CHECKS["swap"] = check
table = examination.table(examination.examine(Inquiry(config, out)))
drawn_files = [path.name for path in pictures if path.exists()]
print(json.dumps([str(Path(examination.__file__).parents[1]), sorted(drawn), drawn_files, table]))
"""


def add(folder: Path, part: str) -> None:
    for path, how in ADDED[part].items():
        file = folder / path
        if isinstance(how, str):
            assert not file.exists()
            file.write_text(how, encoding="utf-8")
            continue
        changed, count = re.subn(*how, file.read_text(encoding="utf-8"), count=1)
        assert count == 1, f"{path} has no place for {part}"
        file.write_text(changed, encoding="utf-8")


@pytest.mark.slow
def test_a_sampler_a_picture_and_a_check_touch_two_files_each(tmp_path):
    shutil.copytree(ROOT / "next", tmp_path / "next")
    for part, files in ADDED.items():
        add(tmp_path, part)
        assert len(files) <= 2, part
    (tmp_path / "out").mkdir()
    paths = os.pathsep.join(map(str, (tmp_path, ROOT)))
    said = subprocess.run(
        [sys.executable, "-c", USED, "out"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert said.returncode == 0, said.stderr
    package, drawn, pictures, table = json.loads(said.stdout.splitlines()[-1])
    assert Path(package) == tmp_path / "next"
    assert drawn == [4, 4, 4]
    assert "presence.png" in pictures
    assert len(table) == 1
    assert "swap" in table[0]


CARD = """
name = "parking-lot"
object = "person"
image_size = [32, 16]
modalities = ["RGB", "TI"]
rule = "camera"

[storage]
kind = "folders"
missing = "error"

[grammar]
pattern = 'p(?P<pid>\\d+)-c(?P<camera>\\d)\\.png'

[splits]
train.path = "seen"
gallery.path = "kept"
query.same_as = "gallery"
"""


@pytest.fixture
def parking_lot(tmp_path) -> Path:
    """A raw folder as nobody else's: 2 identities to train on, 2 to rank, 2 cameras."""
    draw = np.random.default_rng(0)
    for split, pids in (("seen", (1, 2)), ("kept", (3, 4))):
        for modality in ("RGB", "TI"):
            folder = tmp_path / "source" / split / modality
            folder.mkdir(parents=True)
            for pid in pids:
                for camera in (1, 2):
                    pixels = draw.integers(0, 256, (32, 16, 3), dtype=np.uint8)
                    Image.fromarray(pixels).save(folder / f"p{pid}-c{camera}.png")
    (tmp_path / "card.toml").write_text(CARD)
    return tmp_path


def test_a_data_set_is_one_card(parking_lot):
    card = load_card(parking_lot / "card.toml")
    manifest = prepare(card, parking_lot / "source", parking_lot / "shards")
    assert manifest.resolve("query") == "gallery"
    assert manifest.labels("gallery").pid.tolist() == [3, 3, 4, 4]
    assert manifest.labels("train").pid.tolist() == [1, 1, 2, 2]


def test_a_caption_model_is_one_entry_of_a_file(parking_lot):
    card = load_card(parking_lot / "card.toml")
    source = FolderSource.open(card, parking_lot / "source", ScanOptions())
    new = Script(personas={"brand-new": PERSONAS["scripted-large"]})
    with scripted(None, new) as server, Ledger(parking_lot / "ledger") as ledger:
        models = parking_lot / "models.toml"
        models.write_text(f'[[models]]\nname = "brand-new"\nbase_url = "{server.url}"\n')
        captioner = Captioner(source, load_schema("person"), load_models(models))
        totals, images = captioner.ask(ledger)
        assert len(images) == totals.calls == 16
        assert set(captioner.plan(ledger).known.values()) == {16}
