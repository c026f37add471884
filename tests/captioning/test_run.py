import hashlib
import json

import pytest

from next.captioning.output import caption_path, write_captions
from next.captioning.quality.report import measure, read_caption_files
from next.captioning.requests.ledger import Ledger
from next.captioning.requests.models import ModelConfig
from next.captioning.run import CaptionConfig, Captioner
from next.captioning.schema.attributes import load_schema
from next.captioning.schema.labels import demo_labels, judge, load_labels, score
from next.captioning.schema.merge import MergeConfig, calibrate, facts
from next.captioning.source import ShardSource
from next.data.captions import is_reliable
from next.data.shards.audit import audit
from next.data.shards.reader import open_manifest
from next.data.source.ingest import scan
from tests.captioning.scripted_endpoint import PERSONAS, Script, scripted


def models(url, **settings):
    return [ModelConfig(name=name, base_url=url, concurrency=8, **settings) for name in PERSONAS]


@pytest.fixture(scope="module")
def labels(demo_raw, person):
    return load_labels(demo_raw / "attributes.json", person)


@pytest.fixture(scope="module")
def asked(demo_raw, demo_source, person, tmp_path_factory):
    """The demo's images, asked about once: ledger, models, image hashes, totals."""
    folder = tmp_path_factory.mktemp("asked") / "ledger"
    with scripted(demo_raw) as server:
        asked_models = models(server.url)
        with Ledger(folder) as ledger:
            captioner = Captioner(demo_source, person, asked_models)
            totals, images = captioner.ask(ledger)
        return folder, asked_models, images, totals


def test_captions_are_written_where_the_card_finds_them(asked, demo_source, person, tmp_path):
    folder, asked_models, images, totals = asked
    with Ledger(folder) as ledger:
        result = write_captions(
            Captioner(demo_source, person, asked_models), ledger, images, tmp_path, totals
        )
    assert result.captions == len(images) == demo_source.count()
    benchmark = demo_source.benchmark
    for split in ("train", "gallery"):
        for modality in benchmark.modalities:
            path = tmp_path / caption_path(benchmark, split, modality)
            entries = json.loads(path.read_text())
            assert len(entries) == len(demo_source.samples[split])
            assert entries[0]["item"].endswith(".jpg")
            assert all(is_reliable(entry["description"]) for entry in entries)
    files = read_caption_files([tmp_path / "text"])
    report = measure(files, person)
    assert report.contradicting_samples == 0
    assert report.all.unknown_honest == report.all.placeholders == report.all.copied == 0


def test_the_caption_files_make_a_source_that_can_be_prepared(
    asked, demo_source, demo_raw, person, tmp_path
):
    folder, asked_models, images, totals = asked
    for name in ("train", "test"):
        (tmp_path / name).symlink_to(demo_raw / name)
    with Ledger(folder) as ledger:
        write_captions(
            Captioner(demo_source, person, asked_models), ledger, images, tmp_path, totals
        )
    found = scan(demo_source.benchmark, tmp_path)
    captions = [text for one in found.samples["train"] for text in one.sentences]
    assert all(captions)
    assert found.findings.unused_captions == {}


def test_new_thresholds_need_no_new_call(asked, demo_source, person, tmp_path):
    folder, asked_models, images, _ = asked  # the server is gone by now
    told = []
    for threshold in (0.3, 0.6, 0.95):
        config = CaptionConfig(merge=MergeConfig(threshold=threshold))
        with Ledger(folder) as ledger:
            captioner = Captioner(demo_source, person, asked_models, config)
            again, same = captioner.ask(ledger)
            assert again.calls == 0
            assert same == images
            told.append(write_captions(captioner, ledger, images, tmp_path, again).sources.total())
    assert told[0] > told[1] > told[2]


def test_everything_that_is_held_of_an_image_is_kept(asked, demo_source, person, tmp_path):
    folder, asked_models, images, totals = asked
    with Ledger(folder) as ledger:
        write_captions(
            Captioner(demo_source, person, asked_models), ledger, images, tmp_path, totals
        )
    lines = [json.loads(line) for line in (tmp_path / "beliefs.jsonl").read_text().splitlines()]
    assert len(lines) == len(images)
    assert {line["modality"] for line in lines} == {"RGB", "NI", "TI"}
    belief = lines[0]["attributes"]["gender"]
    assert set(belief) == {"value", "confidence", "source", "candidates"}
    sources = {one["source"] for line in lines for one in line["attributes"].values()}
    assert sources == {"own", "complemented", "overruled"}


def test_new_shards_hold_the_captions_under_a_new_digest(asked, demo_shards, person, tmp_path):
    folder, asked_models, _, _ = asked
    old = open_manifest(demo_shards)
    with Ledger(folder) as ledger:
        captioner = Captioner(ShardSource(old), person, asked_models)
        totals, images = captioner.ask(ledger)
        assert totals.calls == 0, "an image is known by its bytes, wherever it lies"
        result = write_captions(
            captioner, ledger, images, tmp_path / "out", totals, shards=tmp_path / "shards"
        )
    new = open_manifest(tmp_path / "shards")
    assert new.digest != old.digest
    assert audit(new).problems == ()
    for split in ("train", "gallery"):
        assert (new.labels(split).sample_id == old.labels(split).sample_id).all()
        rows = zip(new.iter_images(split), old.iter_images(split), strict=True)
        assert all(one == other for one, other in rows)
        assert new.sentences(split) != old.sentences(split)
        assert all(caption for of_image in new.sentences(split) for caption in of_image)
    assert result.captions == len(images)


def test_merging_leaves_a_quarter_unknown_at_no_lower_accuracy(
    asked, demo_source, person, labels, tmp_path
):
    """One model alone and image by image, the best of these, and all models merged.

    Confidences are calibrated on the train split's labels; all scores are of the other split.
    """
    folder, asked_models, images, _ = asked
    threshold = 0.6

    def scored(chosen, across):
        config = CaptionConfig(merge=MergeConfig(across=across, threshold=threshold))
        captioner = Captioner(demo_source, person, chosen, config)
        with Ledger(folder) as ledger:
            answers = list(captioner.answers(ledger, images))
        train = [(image, one.by_model) for image, one in answers if image[0] == "train"]
        calibration = calibrate(judge(train, labels, person))
        test = [pair for pair in answers if pair[0][0] == "gallery"]
        believed = captioner.believe(test, calibration)
        said = {image: facts(beliefs, threshold) for image, _, beliefs in believed}
        return score(said, labels, person)

    singles = [scored([model], across=False) for model in asked_models]
    merged = scored(asked_models, across=True)
    mean_unknown = sum(one.unknown for one in singles) / len(singles)
    best = max(singles, key=lambda one: one.accuracy * (100 - one.unknown))
    assert merged.unknown <= mean_unknown / 4
    assert merged.unknown <= best.unknown / 4
    assert merged.accuracy >= max(one.accuracy for one in singles)
    assert mean_unknown > 10, "else there would be nothing to gain"


def test_a_refused_image_has_no_caption_and_the_others_of_its_sample_have(
    demo_raw, demo_source, person, tmp_path
):
    first = next(iter(demo_source.pictures()))
    refused = hashlib.sha256(first.image).hexdigest()
    script = Script(refused=frozenset([refused]))
    with scripted(demo_raw, script) as server, Ledger(tmp_path / "ledger") as ledger:
        captioner = Captioner(demo_source, person, models(server.url)[:1])
        totals, images = captioner.ask(ledger)
        result = write_captions(captioner, ledger, images, tmp_path, totals)
    assert totals.statuses["refused"] == 1
    assert result.without == {"refused": 1}
    assert result.captions == len(images) - 1
    lines = [json.loads(line) for line in (tmp_path / "beliefs.jsonl").read_text().splitlines()]
    sample = [line for line in lines if line["sample"] == first.sample]
    assert {line["modality"]: line["caption"] is None for line in sample} == {
        "RGB": True, "NI": False, "TI": False,
    }  # fmt: skip


def test_a_plan_says_what_a_run_would_cost(asked, demo_source, person, tmp_path):
    folder, asked_models, images, _ = asked
    priced = [model.model_copy(update={"price_in": 1000.0}) for model in asked_models]
    with Ledger(tmp_path / "ledger") as empty:
        plan = Captioner(demo_source, person, priced).plan(empty)
    assert plan.images == len(images)
    assert set(plan.open.values()) == {len(images)}
    assert plan.total.money == pytest.approx(3 * len(images) * 1500 * 1e-3)
    with Ledger(folder) as ledger:
        other = priced[0].model_copy(update={"seed": 7})
        plan = Captioner(demo_source, person, [other, priced[1]]).plan(ledger)
    assert plan.open == {"scripted-large": len(images), "scripted-small": 0}
    assert plan.cost["scripted-large"].tokens == len(images) * 1200, "as experienced"


def test_sentences_are_rewritten_where_the_check_takes_them(
    asked, demo_raw, demo_source, person, tmp_path
):
    folder, asked_models, images, totals = asked
    with scripted(demo_raw) as server:
        rewriter = models(server.url)[0]
        for _ in range(2):
            with Ledger(folder) as ledger:
                captioner = Captioner(demo_source, person, asked_models, rewriter=rewriter)
                result = write_captions(captioner, ledger, images, tmp_path, totals)
        assert set(server.stats.answers.values()) == {1}
        assert server.stats.requests == len(server.stats.answers) + 1, "and one probe"
    assert result.rewritten > 10
    assert result.kept > 10
    texts = [
        entry["description"]
        for entry in json.loads((tmp_path / "text" / "test_RGB.json").read_text())
    ]
    assert any(" wears " in text for text in texts)
    assert not any("sunny" in text for text in texts)


def test_labels_of_ones_own_are_read_and_checked(person, tmp_path):
    path = tmp_path / "labels.json"
    path.write_text(json.dumps({"train": {"a": {"gender": "male", "quality": {"TI": "blurry"}}}}))
    labels = load_labels(path, person)
    assert labels.of(("train", "a", "TI")) == {"gender": "male", "quality": "blurry"}
    assert labels.of(("train", "a", "RGB")) == {"gender": "male"}
    assert labels.of(("train", "b", "RGB")) == {}
    for tree, message in (
        ({"train": {"a": {"gendr": "male"}}}, "did you mean gender"),
        ({"train": {"a": {"gender": "mal"}}}, "gender cannot be 'mal'; did you mean male"),
        (["train"], "labels are"),
    ):
        path.write_text(json.dumps(tree))
        with pytest.raises(ValueError, match=message):
            load_labels(path, person)


def test_the_demos_labels_are_values_of_the_schema(demo_raw, person):
    truth = demo_labels(json.loads((demo_raw / "attributes.json").read_text()))
    assert sum(map(len, truth.values())) == 132
    for one in truth["train"].values():
        assert set(one) == {attribute.name for attribute in person.attributes}


def test_a_score_counts_what_could_be_said(person, tmp_path):
    path = tmp_path / "labels.json"
    path.write_text(json.dumps({"t": {"a": {"gender": "male", "hair": "long", "time": "daytime"}}}))
    labels = load_labels(path, person)
    said = {("t", "a", "RGB"): {"gender": "male", "hair": "short"}, ("t", "a", "TI"): {}}
    found = score(said, labels, person)
    assert (found.asked, found.known, found.right) == (5, 2, 1)
    assert found.unknown == pytest.approx(60)
    assert found.accuracy == pytest.approx(50)


def test_a_modality_that_the_schema_does_not_know_is_an_error_before_anything_is_asked(
    demo_source, tmp_path
):
    schema = load_schema("person")
    without = {name: spectrum for name, spectrum in schema.modalities.items() if name != "TI"}
    changed = schema.model_copy(update={"modalities": without})
    with pytest.raises(ValueError, match="no spectrum is given for modality 'TI'"):
        Captioner(demo_source, changed, models("http://127.0.0.1:1/v1"))
