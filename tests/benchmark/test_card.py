import json
from pathlib import Path

import pytest

from next.benchmark.card import UNKNOWN, NameParts, load_card
from next.config import LossConfig, RunConfig, override

ROOT = Path(__file__).resolve().parents[2]
CARDS = sorted((ROOT / "datasets").glob("*.toml"))


@pytest.fixture
def edited(tmp_path):
    """Writes RGBNT201's card with one piece of text replaced."""

    def write(old: str, new: str) -> Path:
        text = (ROOT / "datasets" / "rgbnt201.toml").read_text()
        assert text.count(old) == 1
        path = tmp_path / "edited.toml"
        path.write_text(text.replace(old, new))
        return path

    return write


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.stem)
def test_every_card_loads_and_its_recipe_is_a_valid_configuration(path):
    card = load_card(path)
    override(RunConfig(), card.recipe)
    assert type(card).model_validate(card.model_dump(mode="json")) == card


@pytest.mark.parametrize("name", ["rgbnt201", "rgbnt100", "msvr310", "wmveid863"])
def test_every_benchmark_has_the_peers_schedule_and_the_anchors_beside_it(name):
    card = load_card(ROOT / "datasets" / f"{name}.toml")
    peers = override(override(RunConfig(), card.recipe), card.recipes["peers-schedule"])
    assert (peers.optim.schedule, peers.augment.shared_geometry) == ("peers", False)
    assert (peers.optim.lr, peers.optim.tower_lr, peers.optim.weight_decay) == (3.5e-4, 5e-6, 1e-4)
    assert (peers.optim.epochs, peers.optim.warmup) == (50, 10)
    assert {"DeMo (AAAI25)", "NEXT (v4)"} <= set(card.anchors)


PEERS = {
    ("rgbnt201", "demo"): ((256, 128), 64, 8, 50, 10),
    ("rgbnt100", "demo"): ((128, 256), 128, 16, 30, 5),
    ("msvr310", "demo"): ((128, 256), 64, 4, 50, 10),
    ("rgbnt201", "idea"): ((256, 128), 64, 8, 50, 10),
    ("rgbnt100", "idea"): ((128, 256), 128, 16, 50, 10),
    ("msvr310", "idea"): ((128, 256), 64, 8, 50, 10),
}
"""Of the public codes: image size, batch, instances, epochs, warm-up."""


@pytest.mark.parametrize(("name", "peer"), PEERS)
def test_a_recipe_that_bears_a_peers_name_resolves_to_what_its_code_runs(name, peer):
    """All that the platform can express; the rates by tensor and epoch: test_optimizer.py."""
    card = load_card(ROOT / "datasets" / f"{name}.toml")
    config = override(override(RunConfig(), card.recipe), card.recipes[f"{peer}-training"])
    optim, augment = config.optim, config.augment
    batch = (config.batch.size, config.batch.instances)
    found = (card.image_size, *batch, optim.epochs, optim.warmup_epochs)
    assert found == PEERS[name, peer]
    base, tower, factor = (3.5e-4, 5e-6, 2.0) if peer == "demo" else (3.5e-6, 3.5e-6, 1.0)
    assert (optim.lr, optim.tower_lr, optim.bias_lr_factor) == (base, tower, factor)
    assert (optim.schedule_lr or optim.lr) == 3.5e-4
    assert (optim.schedule, optim.lr_noise, optim.final_lr_share) == ("peers", True, 0.001)
    assert (optim.name, optim.weight_decay, optim.decay) == ("adam", 1e-4, "all")
    assert (optim.clip_norm, optim.ema, optim.precision) == (None, None, "float32")
    assert config.loss == LossConfig(identity_weight=0.25, triplet_weight=1, label_smoothing=0.1)
    backbone = config.model.backbone
    assert (backbone.name, backbone.pretrained, backbone.camera_coefficient) == (
        *("ViT-B-16", "openai"),
        1.0,
    )
    assert (augment.flip, augment.pad, augment.erase) == (0.5, 10, 0.5)
    assert (augment.erase_area, augment.shared_geometry) == ((0.02, 0.33), False)
    assert (config.data.mean, config.data.std, config.data.test_resize) == (0.5, 0.5, "bilinear")
    assert config.selection.split == "test"


def test_no_recipe_bears_a_peers_name_where_the_peers_published_no_settings():
    card = load_card(ROOT / "datasets" / "wmveid863.toml")
    assert not [name for name in card.recipes if name.startswith(("demo", "idea"))]


def test_the_recipe_of_a_card_follows_the_field():
    batches = {
        name: load_card(ROOT / "datasets" / f"{name}.toml").recipe
        for name in ("rgbnt201", "rgbnt100", "msvr310", "wmveid863")
    }
    assert {
        name: (recipe["batch.identities"] * recipe["batch.instances"], recipe["batch.instances"])
        for name, recipe in batches.items()
    } == {"rgbnt201": (64, 8), "rgbnt100": (128, 16), "msvr310": (64, 4), "wmveid863": (64, 4)}


@pytest.mark.parametrize(
    ("card", "name", "parts"),
    [
        ("rgbnt201", "000030_cam1_1_12.jpg", NameParts(30, 1, UNKNOWN)),
        ("msvr310", "0038_s014_v7_003.jpg", NameParts(38, 7, 14)),
        ("rgbnt100", "0001_c0008_001.jpg", NameParts(1, 8, UNKNOWN)),
        ("wmveid863", "0325_v1_n0_s003_000.jpg", NameParts(325, 1, 3)),
        ("wmveid863", "v2_n1_s999_04.jpg", NameParts(None, 2, UNKNOWN)),
        ("wmveid863", "0865_0865_vis_v1_n0_03.jpg", None),
        ("rgbnt201", "x000030_cam1_1_12.jpg", None),
        ("rgbnt201", "000030_cam1_1_12.jpg.bak", None),
        ("rgbnt201", "000030_cam1_1_12.jpg\n", None),
    ],
)
def test_a_name_is_read_as_a_whole(card, name, parts):
    assert load_card(ROOT / "datasets" / f"{card}.toml").grammar.read(name) == parts


@pytest.mark.parametrize(("card", "folder"), [("rgbnt201", "RGBNT201"), ("msvr310", "MSVR310")])
def test_the_grammar_takes_every_name_of_the_real_benchmark_and_finds_the_asserted_counts(
    public_captions, card, folder
):
    benchmark = load_card(ROOT / "datasets" / f"{card}.toml")
    for split, part in (("train", "train"), ("gallery", "test")):
        for modality in benchmark.modalities:
            items = json.loads((public_captions / folder / f"{part}_{modality}.json").read_text())
            parts = [benchmark.grammar.read(item["item"]) for item in items]
            assert None not in parts
            asserted = getattr(benchmark.counts, split)
            assert len(parts) == asserted.samples
            assert len({part.pid for part in parts}) == asserted.identities


def test_msvr310s_query_counts_are_those_of_ids_with_two_scenes(public_captions):
    benchmark = load_card(ROOT / "datasets" / "msvr310.toml")
    items = json.loads((public_captions / "MSVR310" / "test_RGB.json").read_text())
    parts = [benchmark.grammar.read(item["item"]) for item in items]
    scenes: dict[int, set[int]] = {}
    for part in parts:
        scenes.setdefault(part.pid, set()).add(part.scene)
    queries = [part for part in parts if len(scenes[part.pid]) > 1]
    assert len(queries) == benchmark.counts.query.samples
    assert len({part.pid for part in queries}) == benchmark.counts.query.identities


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('rule = "camera"', 'rulle = "camera"', r"edited.toml: rulle: .* did you mean rule"),
        ('kind = "folders"', 'kinds = "folders"', r"storage.kinds: .* did you mean kind"),
        ("train.path", "trian.path", r"splits.trian: there is no such key; did you mean train"),
        ("query.same_as", "query.sameas", r"splits.query.sameas: .* did you mean same_as"),
        ("samples = 836", "sample = 836", r"counts.gallery.sample: .* did you mean samples"),
        ("rank1 = 86.6", "rank_1 = 86.6", r"anchors.NEXT \(v4\).rank_1: .* did you mean rank1"),
        ('kind = "folders"', 'kind = "folder"', r"storage.kind: .*'folders'.* but got 'folder'"),
        ('name = "RGBNT201"', "", r"edited.toml: name is required"),
        (
            "batch.instances = 8\n\n[recipes.demo",
            "batch.instance = 8\n\n[recipes.demo",
            r"recipe: .*'batch.instance'; did you mean batch.ins",
        ),
        (
            'geometry and choice of epoch\noptim.schedule = "peers"',
            'geometry and choice of epoch\noptim.schedule = "peer"',
            r"recipes.peers-schedule: optim.schedule: .*'peer'",
        ),
        (
            "batch.instances = 8\n\n[recipes.demo",
            "batch.instances = 1\n\n[recipes.demo",
            r"recipe: batch.instances: .*but got 1",
        ),
        ('query.same_as = "gallery"', 'query.same_as = "query"', r"same_as must name a split"),
        ('query.same_as = "gallery"', "query = {}", r"splits.query: .*either path or same_as"),
        ('train.path = "train_171"', 'train.same_as = "gallery"', r"train must have a path"),
        ('train.path = "train_171"', 'train.path = "/abs"', r"train.path: .*below the source"),
        ('"train_171"', '"../train_171"', r"train.path: .*below the source"),
        ('rule = "camera"', 'rule = "scene"', r"must have a group scene with rule = scene"),
        ("(?P<pid>", "(?P<id>", r"grammar.pattern: .*among pid, camera, scene, but it has id"),
        ("(?P<pid>", "(", r"must have a group pid"),
        ("(?P<pid>", "((?P<pid>", r"grammar.pattern: not a regular expression"),
        ('["RGB", "NI", "TI"]', '["RGB", "NI", "NI"]', r"modalities: modalities must differ"),
        ('["RGB", "NI", "TI"]', '["RGB", "N I"]', r"modalities: .*but got 'N I'"),
        ('kind = "folders"', 'kind = "folders"\nfolders.T = "t"', r"folders.T: no modality"),
        ('kind = "folders"', 'kind = "tiles"\nfolders.TI = "t"', r"no meaning with .*tiles"),
        ("text/train_{modality}", "text/train", r"captions.train: .*must hold \{modality\}"),
        ("[captions]", '[captions]\nnames = ["{x}"]', r"captions.names: each name must hold"),
        (
            "[captions]",
            '[captions]\nquery = "{modality}"',
            r"captions.query: .*the same as gallery",
        ),
        ("[grammar]", "[grammar]\nnone = {scene = 9}", r"grammar.none.scene: .*no such group"),
        ("[256, 128]", "[256, 0]", r"image_size: .*at least 1"),
        ("[256, 128]", "[256, 128", r"is not valid TOML"),
    ],
)
def test_a_wrong_card_is_refused_by_file_and_key(edited, old, new, message):
    with pytest.raises(ValueError, match=message):
        load_card(edited(old, new))


def test_a_card_that_is_not_there_names_one_of_a_similar_name():
    with pytest.raises(FileNotFoundError, match=r"no such card; did you mean rgbnt201\.toml"):
        load_card(ROOT / "datasets" / "rgbnt21.toml")


def test_a_group_that_matches_no_number_is_refused(edited):
    card = load_card(edited(r"(?P<pid>\d{6})", r"(?P<pid>\w{6})"))
    with pytest.raises(ValueError, match=r"the group pid must match digits only, .*'abcdef'"):
        card.grammar.read("abcdef_cam1_1_12.jpg")


def test_published_results_are_told_line_by_line():
    lines = load_card(ROOT / "datasets" / "rgbnt201.toml").published()
    assert lines[0] == "published   DeMo (AAAI25)              mAP 79.0  rank-1 82.3"
    assert lines[2] == "published   NEXT (v4)                  mAP 82.4  rank-1 86.6"
    assert load_card(ROOT / "datasets" / "rgbnt201.toml").anchors_json()["NEXT (v4)"]["mAP"] == 82.4
    assert load_card(ROOT / "datasets" / "demo.toml").published() == []
