import json

import pytest

from next.data.caption_files import CaptionFiles, read_captions
from next.data.captions import split_sentences
from next.storage import open_folder

ITEM = {"item": "a.jpg", "description": "A man."}


def test_items_are_found_by_name_without_extension():
    items = [ITEM, {"item": "b.c.png", "description": ""}]
    assert read_captions("f", json.dumps(items).encode()) == {"a": "A man.", "b.c": ""}


def test_a_byte_order_mark_does_no_harm():
    assert read_captions("f", b"\xef\xbb\xbf" + json.dumps([ITEM]).encode()) == {"a": "A man."}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"[{", r"t.json is not JSON: .*line 1 column"),
        (b"\xff\xfe", r"t.json is not JSON"),
        (b'{"a": 1}', r"t.json: a caption file is a list .*but it holds a dict"),
        (b"[1]", r'entry 1 has no "item": 1'),
        (json.dumps([ITEM, {"image": "b.jpg"}]).encode(), r'entry 2 has no "item": .*b\.jpg'),
        (json.dumps([{"item": "a.jpg"}]).encode(), r'entry 1 has no "description"'),
        (json.dumps([{**ITEM, "description": None}]).encode(), r'entry 1 has no "description"'),
        (
            json.dumps([ITEM, {**ITEM, "description": "B."}]).encode(),
            r"entry 2 describes a.jpg a second time",
        ),
    ],
)
def test_a_file_of_another_form_is_refused_by_name_and_position(data, message):
    with pytest.raises(ValueError, match=message):
        read_captions("t.json", data)


@pytest.fixture
def files(tmp_path):
    items = [ITEM, {"item": "b.jpg", "description": "B."}, {"item": "c.jpg", "description": "C."}]
    (tmp_path / "t.json").write_text(json.dumps(items))
    return CaptionFiles(open_folder(tmp_path))


def test_the_first_name_that_the_file_has_is_taken(files):
    assert files.take("t.json", ["x", "b", "a"], "train", "1/b") == "B."
    assert files.take("t.json", ["x"], "train", "1/x") is None


def test_items_that_nobody_takes_are_counted(files):
    files.take("t.json", ["a"], "gallery", "a")
    files.take("t.json", ["a"], "query", "a")
    assert files.unused() == {"t.json": 2}


def test_a_file_of_which_nothing_is_taken_is_refused(files):
    files.take("t.json", ["x"], "train", "x")
    with pytest.raises(ValueError, match=r"t\.json: none of its 3 items .*there is a, b, c; mend"):
        files.unused()


def test_two_samples_cannot_take_one_item(files):
    files.take("t.json", ["a"], "train", "1/a")
    with pytest.raises(ValueError, match=r"item a is the caption of both 1/a and 2/a"):
        files.take("t.json", ["a"], "train", "2/a")


def test_a_missing_file_says_what_is_there_and_how_to_do_without(files):
    with pytest.raises(FileNotFoundError, match=r"s\.json: .*did you mean t\.json.*--no-captions"):
        files.take("s.json", ["a"], "train", "a")


def test_the_authors_files_of_rgbnt201_are_taken_whole(public_captions):
    files = sorted((public_captions / "RGBNT201").glob("*.json"))
    captions = [text for path in files for text in read_captions("f", path.read_bytes()).values()]
    sentences = [sentence for text in captions for sentence in split_sentences(text)]
    assert (len(files), len(captions)) == (6, 14_361)
    assert (len(sentences), len(set(sentences))) == (69_000, 2_916)
