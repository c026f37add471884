import json
from pathlib import Path

import pytest

from next.captioning.quality.report import (
    clip_token_counter,
    guess_schema,
    has_placeholder,
    is_copied,
    measure,
    read_caption_files,
    unknown_by_paper,
)
from next.captioning.schema.attributes import load_schema
from next.data.captions import split_sentences


def write(folder: Path, name: str, captions: dict[str, str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    entries = [{"item": item, "description": text} for item, text in captions.items()]
    path.write_text(json.dumps(entries))
    return path


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("captions")
    write(
        folder,
        "train_RGB.json",
        {
            "a.jpg": "An adult male. He is wearing a black jacket with none visible footwear.",
            "b.jpg": "A [age] female. She is carrying a handbag, backpack, or suitcase.",
            "c.jpg": "",
        },
    )
    write(
        folder,
        "train_TI.json",
        {
            "a.jpg": "An adult female. She is wearing a coat, Unknown.",
            "b.jpg": "An adult female. The image appears blurry.",
            "c.jpg": "An adult female. " + "The image appears clear. " * 20,
        },
    )
    return measure(read_caption_files([folder]), load_schema("person"))


def test_words_and_sentences_are_counted_by_file_modality_and_in_all(report):
    assert report.files["train_RGB.json"].words == 24
    assert report.modalities["RGB"] == report.files["train_RGB.json"]
    assert report.all.captions == 6
    assert report.all.words == 24 + 9 + 7 + 83
    assert report.all.sentences == 2 + 2 + 0 + 2 + 2 + 21
    assert report.all.distinct_sentences == 4 + 4
    assert report.all.empty == 1
    assert report.mean_words_of_files == pytest.approx((24 / 3 + 99 / 3) / 2)
    assert sum(report.all.lengths) == 6


def test_the_two_rules_of_unknown_differ(report):
    assert report.modalities["RGB"].unknown == pytest.approx(100 / 3)
    assert report.modalities["TI"].unknown == 0
    assert report.modalities["TI"].unknown_honest == pytest.approx(100 / 3)
    assert unknown_by_paper("carrying none today")
    assert not unknown_by_paper("carrying none.")


def test_dirt_is_found(report):
    assert report.all.placeholders == 1
    assert report.all.copied == 1
    assert report.all.overflow == pytest.approx(100 / 6)
    assert report.all.longest_tokens == 2 + 4 + 20 * 5
    assert report.examples["placeholders"] == ["train RGB b: A [age] female."]


def test_modalities_contradict_where_no_value_is_common_to_all(report):
    assert report.samples == 3
    assert report.compared["gender"] == 2
    assert report.contradictions == {"gender": 1, "upper": 1}
    assert report.contradicting_samples == 1
    assert report.examples["contradictions"][0] == "train a: gender is male (RGB), female (TI)"


def test_coverage_is_the_share_of_captions_that_mention_an_attribute(report):
    assert report.all.coverage["gender"] == pytest.approx(100 * 5 / 6)
    assert report.all.coverage["upper_colour"] == pytest.approx(100 / 6)
    assert report.all.coverage["hair"] == 0


def test_the_report_can_be_written_as_json(report):
    tree = json.loads(json.dumps(report.as_dict()))
    assert tree["modalities"]["RGB"]["words"] == 24


@pytest.mark.parametrize(
    ("text", "copied"),
    [
        ("She is not carrying a handbag, backpack, or suitcase.", True),
        ("He is carrying a none.", True),
        ("He is carrying a carrying luggage.", True),
        ("Short | medium hair.", True),
        ("A black jacket with jeans, paired with casual sneakers.", False),
        ("He is carrying a backpack and holding a phone.", False),
        ("A dark (possibly black or dark blue) jacket.", False),
    ],
)
def test_copied_words_of_the_prompt_are_told_from_plain_sentences(text, copied):
    assert is_copied(text) == copied


def test_placeholders_are_gaps_of_templates():
    assert has_placeholder("A [age] [gender].")
    assert has_placeholder("A {upper_color} jacket.")
    assert has_placeholder("A <type> in a street.")
    assert not has_placeholder("An adult (seen from the back).")


def test_an_item_that_stands_twice_is_counted(tmp_path):
    path = tmp_path / "train_RGB.json"
    path.write_text(json.dumps([{"item": "a.jpg", "description": "A man."}] * 3))
    assert measure(read_caption_files([path]), load_schema("person")).all.repeated_items == 2


def test_the_schema_is_guessed_from_the_captions(tmp_path):
    schemas = [load_schema("person"), load_schema("vehicle")]
    car = write(
        tmp_path, "train_vis.json", {"a.jpg": "A white Benz sedan. Side mirrors are intact."}
    )
    man = write(tmp_path, "train_RGB.json", {"a.jpg": "An adult male with short straight hair."})
    assert guess_schema(read_caption_files([car]), schemas).name == "vehicle"
    assert guess_schema(read_caption_files([man]), schemas).name == "person"


def test_bad_files_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no \*\.json file"):
        read_caption_files([tmp_path / "empty"])
    good = write(tmp_path, "train_RGB.json", {"a.jpg": "A man."})
    with pytest.raises(FileNotFoundError, match=r"beside it are train_RGB\.json"):
        read_caption_files([tmp_path / "train_NI.json"])
    with pytest.raises(ValueError, match="is given twice"):
        read_caption_files([good, tmp_path])
    (tmp_path / "bad.json").write_text("[1")
    with pytest.raises(ValueError, match=r"bad\.json is not JSON"):
        read_caption_files([tmp_path / "bad.json"])
    (tmp_path / "bad.json").write_text('[{"item": "a.jpg"}]')
    with pytest.raises(ValueError, match='entry 1 has no "description"'):
        read_caption_files([tmp_path / "bad.json"])
    with pytest.raises(ValueError, match="there is no caption"):
        measure(read_caption_files([write(tmp_path / "x", "a_b.json", {})]), load_schema("person"))


def test_tokens_of_sentences_add_up_to_those_of_the_caption(public_captions):
    count = clip_token_counter()
    files = read_caption_files([public_captions / "RGBNT201" / "test_RGB.json"])
    for caption in files[0].captions[::40]:
        assert sum(map(count, split_sentences(caption.text))) == count(caption.text)


def test_the_public_captions_of_rgbnt201_give_the_published_figures(public_captions):
    report = measure(read_caption_files([public_captions / "RGBNT201"]), load_schema("person"))
    words = {name: group.words for name, group in report.modalities.items()}
    assert words == {"RGB": 201934, "NI": 190389, "TI": 167144}
    assert round(report.mean_words_of_files, 2) == 38.94
    unknown = {name: round(group.unknown, 2) for name, group in report.modalities.items()}
    assert unknown == {"RGB": 9.80, "NI": 1.69, "TI": 0.69}
    assert round(report.all.unknown, 2) == 4.06
    honest = {name: round(group.unknown_honest, 2) for name, group in report.modalities.items()}
    assert honest == {"RGB": 14.81, "NI": 8.67, "TI": 8.29}
    assert round(report.all.unknown_honest, 2) == 10.59
    assert report.all.sentences == 69000
    assert report.all.distinct_sentences == 2916
    assert report.all.placeholders == 2
    assert report.all.copied > 1000
    assert report.samples == 4787
    assert report.contradictions["gender"] > 1000
