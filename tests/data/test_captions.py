import json
import logging
import threading
import time
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from next.config import CaptionsConfig
from next.data.captions import (
    CaptionSampler,
    CaptionTable,
    TextBank,
    bank_texts,
    find_text_bank,
    is_reliable,
    open_text_bank,
    split_sentences,
)
from next.data.draws import uniform
from next.data.loading.cache import clean_up, contents

WIDTH = 6


def vectors(texts: list[str]) -> np.ndarray:
    """A stand-in for a text tower: a unit vector that depends on the text alone."""
    rows = [np.random.default_rng(list(text.encode())).standard_normal(WIDTH) for text in texts]
    found = np.asarray(rows, dtype=np.float32).reshape(-1, WIDTH)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def bank_of(texts: list[str]) -> TextBank:
    return TextBank(texts, vectors(texts))


def sampler_of(
    captions: list[list[list[str]]], config: CaptionsConfig, experts: int = 3
) -> CaptionSampler:
    table = CaptionTable.build(captions)
    texts = bank_texts(table, config, experts) or ["nothing"]
    return CaptionSampler(table, bank_of(texts), config, experts)


CAPTIONED = [
    [
        ["A man.", "A red coat.", "Long hair.", "Carrying none.", "A blur."],
        ["A woman.", "A green coat."],
        [],
        ["Unknown age.", "Carrying unclear things."],
        ["A man.", "A man.", "Short hair.", "A bag.", "A hat.", "A scarf."],
    ],
    [
        ["A man in infrared."],
        ["A woman.", "Carrying none.", "Long hair."],
        ["A child."],
        ["None.", "A coat.", "A bag."],
        ["A man.", "A hat.", "A scarf."],
    ],
]


def usable(caption: list[str], config: CaptionsConfig) -> list[str]:
    return [text for text in caption if config.unreliable or is_reliable(text)]


def chosen_by_loop(
    caption: list[str],
    config: CaptionsConfig,
    mode: str,
    experts: int,
    key: tuple[int, ...],
    modality: int,
) -> list[list[str]]:
    """What each expert reads, one sentence after the other."""
    sentences = usable(caption, config)
    if mode == "none" or not sentences:
        return [[]] * experts
    if mode == "all":
        return [sentences] * experts
    if mode == "subset":
        hands = []
        for expert in range(experts):
            numbers = uniform("sentences", *key, modality, expert, n=len(sentences)).tolist()
            hand = [s for s, u in zip(sentences, numbers, strict=True) if u < config.keep]
            hands.append(hand or [sentences[numbers.index(min(numbers))]])
        return hands
    order = list(range(len(sentences)))
    if mode == "deal":
        numbers = uniform("dealing", *key, modality, n=len(sentences)).tolist()
        order.sort(key=numbers.__getitem__)
    hands_of_places: list[list[int]] = [[] for _ in range(experts)]
    for turn in range(max(experts, len(order))):
        hands_of_places[turn % experts].append(order[turn % len(order)])
    return [[sentences[place] for place in sorted(hand)] for hand in hands_of_places]


def text_by_loop(hand: list[str], encode: str) -> np.ndarray:
    if not hand:
        return np.zeros(WIDTH)
    if encode == "joint":
        return vectors([" ".join(hand)])[0]
    mean = np.mean(vectors(hand).astype(np.float64), axis=0)
    return mean / np.linalg.norm(mean)


@pytest.mark.parametrize("encode", ["sentences", "joint"])
@pytest.mark.parametrize("sampling", ["all", "subset", "split", "none"])
@pytest.mark.parametrize("unreliable", [False, True])
@pytest.mark.parametrize("experts", [1, 3, 4])
def test_training_text_equals_the_naive_loop(encode, sampling, unreliable, experts):
    config = CaptionsConfig(sampling=sampling, encode=encode, unreliable=unreliable, keep=0.4)
    sampler = sampler_of(CAPTIONED, config, experts)
    rows, draws = np.asarray([4, 0, 1, 2, 3, 0]), np.asarray([0, 0, 2, 1, 0, 1])
    mode = "deal" if sampling == "split" else sampling
    for epoch in range(6):
        text = sampler.train(rows, draws, seed=5, epoch=epoch)
        assert text.shape == (6, 2, experts, WIDTH)
        assert text.dtype == np.float32
        for place, modality in product(range(6), range(2)):
            key = (5, epoch, int(rows[place]), int(draws[place]))
            caption = CAPTIONED[modality][rows[place]]
            hands = chosen_by_loop(caption, config, mode, experts, key, modality)
            expected = [text_by_loop(hand, encode) for hand in hands]
            np.testing.assert_allclose(text[place, modality], expected, atol=1e-6)


@pytest.mark.parametrize("encode", ["sentences", "joint"])
@pytest.mark.parametrize("evaluation", ["all", "split", "none"])
@pytest.mark.parametrize("experts", [1, 3, 4])
def test_text_at_evaluation_equals_the_naive_loop(encode, evaluation, experts):
    config = CaptionsConfig(sampling="subset", encode=encode, evaluation=evaluation)
    sampler = sampler_of(CAPTIONED, config, experts)
    text = sampler.evaluate(np.arange(5))
    for row, modality in product(range(5), range(2)):
        caption = CAPTIONED[modality][row]
        hands = chosen_by_loop(caption, config, evaluation, experts, (), modality)
        expected = [text_by_loop(hand, encode) for hand in hands]
        np.testing.assert_allclose(text[row, modality], expected, atol=1e-6)


captions_of_rows = st.lists(
    st.lists(st.sampled_from(["A.", "B.", "C.", "D.", "E.", "None."]), max_size=6, unique=True),
    min_size=1,
    max_size=4,
)


@settings(deadline=None)
@given(
    captions_of_rows,
    st.sampled_from(["all", "subset", "split"]),
    st.sampled_from(["sentences", "joint"]),
    st.integers(1, 7),
    st.integers(0, 100),
)
def test_every_expert_reads_a_reliable_sentence_if_there_is_one(
    captions, sampling, encode, experts, epoch
):
    config = CaptionsConfig(sampling=sampling, encode=encode, keep=0.1)
    sampler = sampler_of([captions], config, experts)
    rows = np.arange(len(captions))
    length = np.linalg.norm(sampler.train(rows, rows * 0, seed=0, epoch=epoch), axis=-1)
    has_text = np.asarray([bool(usable(caption, config)) for caption in captions])
    np.testing.assert_allclose(length[has_text], 1, atol=1e-5)
    assert (length[~has_text] == 0).all()


def test_dealing_gives_every_sentence_to_one_expert():
    captions = [[[f"Sentence {number}." for number in range(7)]]]
    sampler = sampler_of(captions, CaptionsConfig(sampling="split"), experts=3)
    sampler.bank.embeddings[:] = 0
    sampler.bank.embeddings[np.arange(6), np.arange(6)] = 1
    text = sampler.train(np.asarray([0]), np.asarray([0]), seed=0, epoch=0)[0, 0]
    # Sentence 6 has no axis of its own; each other one is read by exactly one expert.
    assert ((text > 0).sum(axis=0) == 1).all()


def test_a_sample_does_not_depend_on_its_neighbours_to_the_last_bit():
    generator = np.random.default_rng(0)
    captions = [
        [[f"{m}-{n}." for n in generator.integers(0, 30, 7)] for _ in range(20)] for m in range(2)
    ]
    for sampling, encode in product(["all", "subset", "split"], ["sentences", "joint"]):
        sampler = sampler_of(captions, CaptionsConfig(sampling=sampling, encode=encode))
        rows, draws = generator.integers(0, 20, 16), generator.integers(0, 3, 16)
        together = sampler.train(rows, draws, seed=0, epoch=1)
        for place in range(16):
            alone = sampler.train(rows[[place]], draws[[place]], seed=0, epoch=1)
            np.testing.assert_array_equal(alone[0], together[place])


def test_some_modalities_get_what_they_get_among_all():
    sampler = sampler_of(CAPTIONED, CaptionsConfig())
    rows = np.arange(5)
    everything = sampler.train(rows, rows, seed=0, epoch=1)
    some = sampler.train(rows, rows, seed=0, epoch=1, modalities=[1])
    np.testing.assert_array_equal(some, everything[:, [1]])
    np.testing.assert_array_equal(
        sampler.evaluate(rows, modalities=[1, 0]), sampler.evaluate(rows)[:, [1, 0]]
    )


def test_no_sampling_means_no_text_at_evaluation_either():
    sampler = sampler_of(CAPTIONED, CaptionsConfig(sampling="none", evaluation="all"))
    assert not sampler.evaluate(np.arange(5)).any()


def test_the_caption_of_an_absent_image_is_dropped():
    present = np.ones((5, 2), dtype=bool)
    present[0, 1] = False
    table = CaptionTable.build(CAPTIONED, present)
    assert (table.ids[0, 1] == -1).all()
    assert (table.ids[1, 1] >= 0).sum() == 3


def test_a_table_numbers_distinct_sentences_in_order():
    table = CaptionTable.build(CAPTIONED)
    assert table.ids.dtype == np.int32
    assert table.ids.shape == (5, 2, 6)
    for row, modality in product(range(5), range(2)):
        known = [table.sentences[number] for number in table.ids[row, modality] if number >= 0]
        assert known == CAPTIONED[modality][row]
    assert len(set(table.sentences)) == len(table.sentences)


def test_rows_without_any_caption_make_an_empty_table():
    config = CaptionsConfig()
    table = CaptionTable.build([[[], []]])
    assert bank_texts(table, config, 4) == []
    for encode in ("sentences", "joint"):
        config = CaptionsConfig(encode=encode)
        sampler = CaptionSampler(table, bank_of(["other"]), config, experts=4)
        rows = np.arange(2)
        assert not sampler.train(rows, rows, seed=0, epoch=0).any()
        assert not sampler.evaluate(rows).any()


def test_unreliable_sentences_need_no_room_in_the_bank():
    table = CaptionTable.build(CAPTIONED)
    assert "Carrying none." not in bank_texts(table, CaptionsConfig(), 4)
    assert "Carrying none." in bank_texts(table, CaptionsConfig(unreliable=True), 4)
    assert bank_texts(table, CaptionsConfig(sampling="none"), 4) == []


def test_joint_texts_are_all_selections_and_no_more():
    table = CaptionTable.build([[["A.", "B.", "C."]]])
    joint = {
        "all": {"A. B. C."},
        "subset": {"A.", "B.", "C.", "A. B.", "A. C.", "B. C.", "A. B. C."},
        "split": {"A.", "B.", "C.", "A. B.", "A. C.", "B. C.", "A. B. C."},
    }
    for sampling, expected in joint.items():
        texts = bank_texts(table, CaptionsConfig(sampling=sampling, encode="joint"), 2)
        assert len(texts) == len(expected)
        assert set(texts) == expected
    dealt = CaptionsConfig(sampling="split", evaluation="split", encode="joint")
    assert set(bank_texts(table, dealt, 3)) == {"A.", "B.", "C."}


def test_joint_encoding_of_long_captions_is_refused_before_anything_is_enumerated():
    table = CaptionTable.build([[[f"{n}." for n in range(10)]]])
    config = CaptionsConfig(sampling="subset", encode="joint")
    with pytest.raises(ValueError, match=r"at most 9 sentences, but one has 10.*encode = sentenc"):
        bank_texts(table, config, 4)
    assert len(bank_texts(table, CaptionsConfig(sampling="all", encode="joint"), 4)) == 1


def test_joint_encoding_of_too_many_texts_is_refused():
    table = CaptionTable.build([[[f"{row} {n}." for n in range(9)] for row in range(400)]])
    config = CaptionsConfig(sampling="subset", encode="joint")
    with pytest.raises(ValueError, match=r"more than 200,000 distinct texts.*encode = sentences"):
        bank_texts(table, config, 4)


def test_a_sampler_refuses_a_bank_that_lacks_a_text():
    table = CaptionTable.build(CAPTIONED)
    with pytest.raises(ValueError, match=r"lacks the text 'A man\.'.*built again"):
        CaptionSampler(table, bank_of(["A woman."]), CaptionsConfig(), 4)


class Tower:
    """Counts what it is asked to encode."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    def encode(self, texts: list[str]) -> np.ndarray:
        self.asked.append(list(texts))
        return vectors(texts)


def test_a_bank_encodes_each_distinct_text_once_and_is_then_read_from_its_file(tmp_path):
    tower = Tower()
    first = open_text_bank(["a", "b", "a"], tower.encode, "key", tmp_path)
    again = open_text_bank(["b"], tower.encode, "key", tmp_path)
    assert tower.asked == [["a", "b"]]
    assert (first.encoded, again.encoded) == (2, 0)
    assert again.texts == ["a", "b"]
    assert not again.embeddings.flags.owndata, "mapped from the file"
    np.testing.assert_array_equal(again.embeddings, vectors(["a", "b"]))
    assert again.rows(["b", "a", "b"]).tolist() == [1, 0, 1]
    assert not list(tmp_path.glob("*partial*"))


@pytest.mark.parametrize("what", ["vector", "text"])
def test_a_bank_of_which_a_byte_was_changed_is_built_anew(tmp_path, caplog, what):
    tower = Tower()
    texts = ["a first text", "a second text"]
    open_text_bank(texts, tower.encode, "key", tmp_path)
    (path,) = tmp_path.glob("text-*.arrow")
    content = path.read_bytes()
    old = b"a second" if what == "text" else vectors(texts)[1].tobytes()[:4]
    assert content.count(old) == 1
    path.write_bytes(content.replace(old, bytes(byte ^ 1 for byte in old)))
    again = open_text_bank(texts, tower.encode, "key", tmp_path)
    assert tower.asked == [texts, texts]
    assert again.texts == texts
    np.testing.assert_array_equal(again.embeddings, vectors(texts))
    assert f"its column {what} is not what was written" in caplog.text


def test_a_bank_grows_by_the_texts_that_it_lacks(tmp_path):
    tower = Tower()
    open_text_bank(["a", "b"], tower.encode, "key", tmp_path)
    grown = open_text_bank(["c", "a"], tower.encode, "key", tmp_path)
    assert tower.asked == [["a", "b"], ["c"]]
    assert grown.texts == ["a", "b", "c"]
    np.testing.assert_array_equal(grown.embeddings, vectors(["a", "b", "c"]))


def test_a_bank_tells_its_size_its_build_time_and_its_hit_rate(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    built = open_text_bank(["a", "b", "a"], vectors, "key", tmp_path)
    assert (built.asked, built.encoded, built.hit_rate) == (2, 2, 0.0)
    assert built.bytes == 2 * WIDTH * 4
    assert built.seconds > 0
    grown = open_text_bank(["a", "b", "c", "d"], vectors, "key", tmp_path)
    assert (grown.asked, grown.encoded, grown.hit_rate) == (4, 2, 0.5)
    found = find_text_bank("key", tmp_path)
    assert found is not None
    assert (found.asked, found.encoded, found.hit_rate) == (4, 0, 1.0)
    assert "4 asked for, 50.0 % of them were there; encoded 2 in" in caplog.text
    assert "4 asked for, 100.0 % of them were there; opened in" in caplog.text


def test_a_bank_that_is_read_is_not_cleaned_up(tmp_path):
    bank = open_text_bank(["a", "b"], vectors, "key", tmp_path)
    (entry,) = contents(tmp_path)
    assert (entry.kind, entry.in_use) == ("text", True)
    assert clean_up(tmp_path, 0) == []
    assert bank.rows(["b"]).tolist() == [1]
    del bank
    assert [entry.kind for entry in clean_up(tmp_path, 0)] == ["text"]


def test_a_bank_beyond_the_limit_is_refused(tmp_path):
    with pytest.raises(OSError, match=r"48 bytes are needed, but data\.cache_limit"):
        open_text_bank(["a", "b"], vectors, "key", tmp_path, limit=4e-8)
    assert contents(tmp_path) == []


def test_banks_of_other_keys_are_other_files(tmp_path):
    tower = Tower()
    open_text_bank(["a"], tower.encode, "one", tmp_path)
    open_text_bank(["a"], tower.encode, "two", tmp_path)
    assert len(tower.asked) == 2
    assert find_text_bank("three", tmp_path) is None


def test_who_comes_second_waits_for_the_bank_and_encodes_nothing(tmp_path):
    tower = Tower()

    def slowly(texts: list[str]) -> np.ndarray:
        time.sleep(0.3)
        return tower.encode(texts)

    banks: list[TextBank] = []
    threads = [
        threading.Thread(target=lambda: banks.append(open_text_bank(["a"], slowly, "k", tmp_path)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert tower.asked == [["a"]]
    assert [bank.texts for bank in banks] == [["a"]] * 3


def test_a_failed_encoding_leaves_no_bank(tmp_path):
    def fail(texts: list[str]) -> np.ndarray:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        open_text_bank(["a"], fail, "key", tmp_path)
    assert find_text_bank("key", tmp_path) is None
    assert not list(tmp_path.glob("*partial*"))
    assert open_text_bank(["a"], vectors, "key", tmp_path).encoded == 1


def test_a_damaged_bank_is_built_anew(tmp_path, caplog):
    open_text_bank(["a"], vectors, "key", tmp_path)
    (file,) = tmp_path.glob("*.arrow")
    file.write_bytes(file.read_bytes()[:100])
    assert open_text_bank(["a"], vectors, "key", tmp_path).encoded == 1
    assert "built again" in caplog.text


@pytest.mark.parametrize(
    ("encode", "message"),
    [
        (
            lambda texts: vectors(texts)[:1],
            r"must give float32 \[2, D\], but gave float32 \[1, 6\]",
        ),
        (lambda texts: vectors(texts).astype(float), r"must give float32 .* but gave float64"),
        (
            lambda texts: vectors(texts) * np.float32(2),
            r"rows of length 1, but gave one of length 2\.000",
        ),
        (lambda texts: vectors(texts) * np.float32(np.nan), "rows of length 1, but gave one of"),
    ],
)
def test_an_encoder_that_gives_something_else_is_refused(tmp_path, encode, message):
    with pytest.raises(ValueError, match=message):
        open_text_bank(["a", "b"], encode, "key", tmp_path)


def test_a_bank_of_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="at least one text"):
        open_text_bank([], vectors, "key", tmp_path)


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("", []),
        ("  \n", []),
        ("A man", ["A man"]),
        (
            " A man.  A coat, e.g., red!\nA bag? Yes. ",
            ["A man.", "A coat, e.g., red!", "A bag?", "Yes."],
        ),
    ],
)
def test_sentences_end_where_white_space_follows_a_closing_mark(text, sentences):
    assert split_sentences(text) == sentences


@pytest.mark.parametrize(
    ("sentence", "reliable"),
    [
        ("He is carrying none.", False),
        ("NONE", False),
        ("Unknown-coloured coat.", False),
        ("It is unclear, or unknowable.", False),
        ("Nonetheless a coat.", True),
        ("An unknowing man.", True),
    ],
)
def test_unreliable_words_count_as_whole_words_in_any_case(sentence, reliable):
    assert is_reliable(sentence) == reliable


@pytest.fixture(scope="module")
def captions_of_rgbnt201(public_captions) -> list[list[list[str]]]:
    """All captions of both splits, [M][row][sentence]."""
    folder = public_captions / "RGBNT201"
    captions = []
    for modality in ("RGB", "NI", "TI"):
        items = [
            item
            for split in ("train", "test")
            for item in json.loads((folder / f"{split}_{modality}.json").read_text())
        ]
        captions.append([split_sentences(item["description"]) for item in items])
    return captions


def test_the_public_captions_of_rgbnt201_are_read_whole(captions_of_rgbnt201, tmp_path):
    table = CaptionTable.build(captions_of_rgbnt201)
    rows, modalities, _ = table.ids.shape
    assert rows * modalities == 14_361
    assert (table.ids >= 0).sum() == 69_000
    assert len(table.sentences) == 2_916

    tower = Tower()
    config = CaptionsConfig(unreliable=True)
    bank = open_text_bank(bank_texts(table, config, 4), tower.encode, "rgbnt201", tmp_path)
    assert bank.encoded == 2_916
    sampler = CaptionSampler(table, bank, config, 4)
    text = sampler.train(np.arange(rows), np.zeros(rows, dtype=np.int64), seed=0, epoch=0)
    np.testing.assert_allclose(np.linalg.norm(text, axis=-1), 1, atol=1e-5)


def test_all_selections_of_the_public_captions_fit_a_joint_bank(captions_of_rgbnt201):
    config = CaptionsConfig(encode="joint", sampling="subset")
    texts = bank_texts(CaptionTable.build(captions_of_rgbnt201), config, 4)
    assert 50_000 < len(texts) < 200_000
