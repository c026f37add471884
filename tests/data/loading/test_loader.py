import logging
import threading
import weakref
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from next.config import RunConfig, override
from next.data.captions import CaptionSampler, CaptionTable, TextBank, bank_texts
from next.data.labels import Labels
from next.data.loading.augment import augment, finish
from next.data.loading.loader import (
    Batch,
    SampleSet,
    evaluation_batches,
    open_samples,
    train_batches,
)
from next.data.loading.plan import epoch_plan, occurrences, worker_slice
from next.data.shards.reader import Manifest, open_manifest
from next.data.source.ingest import prepare

WIDTH, EXPERTS = 5, 3
CONFIG = override(
    RunConfig(),
    {
        "seed": 4,
        "augment.pad": 2,
        "model.semantic.experts": EXPERTS,
        "selection.batch": 7,
        "batch.identities": 3,
        "batch.instances": 4,
    },
)


def vectors(texts: list[str]) -> np.ndarray:
    rows = [np.random.default_rng(list(text.encode())).standard_normal(WIDTH) for text in texts]
    found = np.asarray(rows, dtype=np.float32).reshape(-1, WIDTH)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def sample_set(rows: int = 24, modalities: tuple[str, ...] = ("RGB", "NI", "TI")) -> SampleSet:
    """Random samples of six identities; every fifth lacks its second image."""
    generator = np.random.default_rng(0)
    present = np.ones((rows, len(modalities)), dtype=bool)
    present[::5, 1:2] = False
    captions = [
        [[f"{m} {s}." for s in generator.integers(0, 9, 3)] for _ in range(rows)]
        for m in modalities
    ]
    table = CaptionTable.build(captions)
    texts = bank_texts(table, CONFIG.captions, EXPERTS)
    bank = TextBank(texts, vectors(texts))
    pid = np.arange(rows) % 6 * 10 + 100
    return SampleSet(
        labels=Labels(
            np.asarray([f"s{row}" for row in range(rows)]), pid, pid % 7, np.full(rows, -1)
        ),
        images=generator.integers(0, 256, (rows, len(modalities), 12, 8, 3), dtype=np.uint8),
        present=present,
        captions=CaptionSampler(table, bank, CONFIG.captions, EXPERTS),
        modalities=modalities,
    )


def epoch_of(
    samples: SampleSet, rank: int = 0, world: int = 1, epoch: int = 2, device: str = "cpu"
) -> Iterator[Batch]:
    plan = epoch_plan(samples.labels.pid, seed=4, epoch=epoch, p=3, k=4)
    return train_batches(
        samples,
        worker_slice(plan, rank, world),
        worker_slice(occurrences(plan), rank, world),
        config=CONFIG,
        epoch=epoch,
        classes=np.unique(samples.labels.pid),
        device=device,
    )


def assert_equal(ours: Batch, theirs: Batch) -> None:
    for name, one, other in zip(Batch._fields, ours, theirs, strict=True):
        assert torch.equal(one, other), name


def test_a_training_batch_holds_what_the_plan_says():
    samples = sample_set()
    plan = epoch_plan(samples.labels.pid, seed=4, epoch=2, p=3, k=4)
    draws = occurrences(plan)
    batches = list(epoch_of(samples))
    assert len(batches) == len(plan)
    for batch, rows, draw in zip(batches, plan, draws, strict=True):
        assert batch.rows.tolist() == rows.tolist()
        assert batch.labels.tolist() == (samples.labels.pid[rows] // 10 - 10).tolist()
        assert batch.camera.tolist() == samples.labels.camera[rows].tolist()
        assert batch.present.tolist() == samples.present[rows].tolist()
        images = augment(
            torch.from_numpy(samples.images[rows]),
            config=CONFIG.augment,
            mean=0.5,
            std=0.5,
            seed=4,
            epoch=2,
            samples=rows,
            draws=draw,
        )
        assert torch.equal(batch.images[batch.present], images[batch.present])
        assert samples.captions is not None
        text = torch.from_numpy(samples.captions.train(rows, draw, seed=4, epoch=2))
        assert torch.equal(batch.text[batch.present], text[batch.present])


def test_absent_images_have_neither_pixels_nor_text():
    samples = sample_set()
    at_evaluation = evaluation_batches(samples, config=CONFIG, device="cpu")
    for batch in (*epoch_of(samples), *at_evaluation):
        assert not batch.images[~batch.present].any()
        assert not batch.text[~batch.present].any()
        assert batch.text[batch.present].norm(dim=-1).sub(1).abs().max() < 1e-5


def test_the_parts_of_all_workers_are_the_batch_of_one():
    samples = sample_set()
    for whole, *parts in zip(
        epoch_of(samples), *(epoch_of(samples, rank, 3) for rank in range(3)), strict=True
    ):
        assert_equal(whole, Batch(*map(torch.cat, zip(*parts, strict=True))))


def test_an_epoch_is_the_same_whenever_it_is_read():
    for first, second in zip(epoch_of(sample_set()), epoch_of(sample_set()), strict=True):
        assert_equal(first, second)


def test_a_sample_is_augmented_alike_in_every_set_that_holds_it():
    samples = sample_set()
    rows = np.asarray([3, 9, 15, 21])
    plan, draws = np.asarray([[0, 1, 2, 3]]), np.asarray([[0, 0, 0, 0]])
    arguments = {"config": CONFIG, "epoch": 1, "classes": np.asarray([130]), "device": "cpu"}
    (among_some,) = train_batches(samples.select(rows), plan, draws, **arguments)
    (among_all,) = train_batches(
        samples, rows[plan], draws, **arguments | {"classes": np.unique(samples.labels.pid)}
    )
    assert torch.equal(among_some.images, among_all.images)
    assert torch.equal(among_some.text, among_all.text)
    assert among_some.rows.tolist() == [0, 1, 2, 3]


def test_evaluation_reads_every_sample_once_in_order_without_augmentation():
    samples = sample_set()
    batches = list(evaluation_batches(samples, config=CONFIG, device="cpu"))
    assert [len(batch.rows) for batch in batches] == [7, 7, 7, 3]
    whole = Batch(*map(torch.cat, zip(*batches, strict=True)))
    assert whole.rows.tolist() == list(range(24))
    assert whole.labels.tolist() == samples.labels.pid.tolist()
    expected = finish(torch.from_numpy(samples.images), None, 0.5, 0.5)
    assert torch.equal(whole.images[whole.present], expected[whole.present])
    assert samples.captions is not None
    text = torch.from_numpy(samples.captions.evaluate(np.arange(24)))
    assert torch.equal(whole.text[whole.present], text[whole.present])


def test_fewer_modalities_are_a_sample_set_too():
    samples = sample_set()
    fewer = samples.with_modalities(["TI", "RGB"]).select(np.arange(20, 4, -1))
    assert len(fewer) == 16
    assert fewer.modalities == ("TI", "RGB")
    for config in (CONFIG, override(CONFIG, {"selection.batch": 64})):
        parts = evaluation_batches(fewer, config=config, device="cpu")
        ours = Batch(*map(torch.cat, zip(*parts, strict=True)))
        parts = evaluation_batches(samples, config=config, device="cpu")
        theirs = Batch(*map(torch.cat, zip(*parts, strict=True)))
        order = torch.arange(20, 4, -1)
        assert torch.equal(ours.images, theirs.images[order][:, [2, 0]])
        assert torch.equal(ours.text, theirs.text[order][:, [2, 0]])
        assert torch.equal(ours.present, theirs.present[order][:, [2, 0]])
    assert fewer.with_modalities(["RGB"]).with_modalities(["RGB"]).columns == (0,)


def test_modalities_that_are_not_there_are_refused():
    with pytest.raises(ValueError, match=r"'NIR', which these data lack; did you mean NI\?"):
        sample_set().with_modalities(["RGB", "NIR"])
    with pytest.raises(ValueError, match=r"each once, but got \['RGB', 'RGB'\]"):
        sample_set().with_modalities(["RGB", "RGB"])
    with pytest.raises(ValueError, match="one modality or more"):
        sample_set().with_modalities([])


def test_parts_of_a_sample_set_must_fit_each_other():
    with pytest.raises(ValueError, match=r"needs present \[24, 3\], but got \[23, 3\]"):
        replace(sample_set(), present=np.ones((23, 3), dtype=bool))


def test_an_identity_that_is_no_class_is_refused():
    samples = sample_set()
    with pytest.raises(ValueError, match="but 150 is missing"):
        train_batches(
            samples,
            np.zeros((1, 2), dtype=np.int64),
            np.zeros((1, 2), dtype=np.int64),
            config=CONFIG,
            epoch=0,
            classes=np.asarray([100, 110, 120, 130, 140]),
            device="cpu",
        )


def test_an_empty_set_has_no_batches():
    empty = sample_set().select(np.empty(0, dtype=np.int64))
    assert len(empty) == 0
    assert list(evaluation_batches(empty, config=CONFIG, device="cpu")) == []


def test_an_error_is_raised_where_its_batch_would_have_come():
    samples = sample_set()
    plan = np.asarray([[0, 1], [2, 99], [3, 4]])
    batches = train_batches(
        samples,
        plan,
        plan * 0,
        config=CONFIG,
        epoch=0,
        classes=np.unique(samples.labels.pid),
        device="cpu",
    )
    assert next(batches).rows.tolist() == [0, 1]
    with pytest.raises(IndexError, match="99"):
        next(batches)


def test_a_consumer_that_stops_early_leaves_no_thread():
    before = threading.active_count()
    batches = epoch_of(sample_set())
    next(batches)
    assert threading.active_count() > before
    batches.close()
    assert threading.active_count() == before


def test_threads_do_not_change_a_bit():
    before, batches = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            batches.append(next(epoch_of(sample_set())))
    finally:
        torch.set_num_threads(before)
    assert_equal(batches[0], batches[1])
    assert_equal(batches[0], batches[2])


def test_a_loop_that_lets_each_batch_go_holds_no_earlier_one():
    earlier = []
    for batch in epoch_of(sample_set()):
        assert [held for held in earlier if held() is not None] == []
        earlier.append(weakref.ref(batch.images))
        del batch
    assert len(earlier) > 1


def test_a_dropped_modality_is_as_good_as_absent():
    samples = sample_set()
    config = override(CONFIG, {"data.drop_modality": 0.6})
    plan = epoch_plan(samples.labels.pid, seed=4, epoch=2, p=3, k=4)
    arguments = {"epoch": 2, "classes": np.unique(samples.labels.pid), "device": "cpu"}
    some = train_batches(samples, plan, occurrences(plan), config=config, **arguments)
    dropped = 0
    for batch, whole in zip(some, epoch_of(samples), strict=True):
        assert batch.present.any(dim=1).all()
        assert not (batch.present & ~whole.present).any()
        assert not batch.images[~batch.present].any()
        assert not batch.text[~batch.present].any()
        assert torch.equal(batch.images[batch.present], whole.images[batch.present])
        assert torch.equal(batch.text[batch.present], whole.text[batch.present])
        dropped += int((whole.present & ~batch.present).sum())
    assert dropped > 0
    evaluated = evaluation_batches(samples, config=config, device="cpu")
    present = torch.cat([batch.present for batch in evaluated])
    assert present.tolist() == samples.present.tolist(), "only in training"


def test_modalities_are_dropped_alike_whichever_others_are_read():
    samples = sample_set()
    config = override(CONFIG, {"data.drop_modality": 0.3})
    plan = epoch_plan(samples.labels.pid, seed=4, epoch=2, p=3, k=4)
    arguments = {"epoch": 2, "classes": np.unique(samples.labels.pid), "device": "cpu"}
    (all_of, *_), (two_of, *_) = (
        train_batches(some, plan, occurrences(plan), config=config, **arguments)
        for some in (samples, samples.with_modalities(["TI", "RGB"]))
    )
    alike = all_of.present[:, [2, 0]]
    one_stays = alike.any(dim=1)
    assert torch.equal(two_of.present[one_stays], alike[one_stays])


@pytest.fixture
def manifest(source, make_card, tmp_path) -> Manifest:
    (source.path("000007_cam1_0_00.jpg", "NI")).unlink()
    out = tmp_path / "shards"
    prepare(make_card(), source.root, out)
    return open_manifest(out)


class Tower:
    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    def encode(self, texts: list[str]) -> np.ndarray:
        self.asked.append(texts)
        return vectors(texts)


def opened(manifest: Manifest, split: str, config: RunConfig, tower: Tower, **more) -> SampleSet:
    return open_samples(
        manifest,
        split,
        config=config,
        text_tower_key="tower",
        encode=tower.encode,
        width=WIDTH,
        **more,
    )


@pytest.fixture
def config(tmp_path) -> RunConfig:
    return override(CONFIG, {"data.cache": str(tmp_path / "cache"), "batch.identities": 2})


def test_samples_come_from_shards_and_every_text_is_encoded_once(manifest, config):
    tower = Tower()
    train = opened(manifest, "train", config, tower)
    assert len(train) == 12
    assert train.images.shape == (12, 3, 32, 16, 3)
    assert train.modalities == ("RGB", "NI", "TI")
    assert train.present.sum() == 35
    (texts,) = tower.asked
    assert len(texts) == len(set(texts)) == 3 + 16, "one sentence a modality, one a sample"

    again = [opened(manifest, split, config, tower) for split in ("train", "gallery", "query")]
    assert len(tower.asked) == 1, "one bank for all splits"
    plan = epoch_plan(train.labels.pid, seed=0, epoch=0, p=2, k=4)
    for samples in (train, again[0]):
        (first, *_) = train_batches(
            samples,
            plan,
            occurrences(plan),
            config=config,
            epoch=0,
            classes=np.unique(train.labels.pid),
            device="cpu",
        )
        assert first.images.shape == (8, 3, 3, 32, 16)
        assert first.text.shape == (8, 3, EXPERTS, WIDTH)
    np.testing.assert_array_equal(again[1].images, again[2].images)


def test_a_table_read_from_shards_is_the_one_built_from_their_captions(manifest):
    present = manifest.present("train")
    assert not present.all()
    for mask in (None, present):
        read = CaptionTable.read(manifest, "train", mask)
        built = CaptionTable.build(manifest.sentences("train"), mask)
        assert read.sentences == built.sentences
        assert read.reliable.tolist() == built.reliable.tolist()
        np.testing.assert_array_equal(read.ids, built.ids)


def test_settings_choose_modalities_and_image_size(manifest, config):
    config = override(config, {"data.modalities": ("TI", "RGB"), "data.image_size": (16, 8)})
    samples = opened(manifest, "gallery", config, Tower())
    (batch,) = evaluation_batches(samples, config=config, device="cpu")
    assert batch.images.shape == (4, 2, 3, 16, 8)
    assert batch.text.shape == (4, 2, EXPERTS, WIDTH)
    with pytest.raises(ValueError, match="did you mean RGB"):
        opened(manifest, "gallery", override(config, {"data.modalities": ("RBG",)}), Tower())


def test_without_text_no_bank_is_built(manifest, config):
    tower = Tower()
    config = override(config, {"captions.sampling": "none"})
    samples = opened(manifest, "gallery", config, tower)
    assert samples.captions is None
    assert tower.asked == []
    (batch,) = evaluation_batches(samples, config=config, device="cpu")
    assert batch.text.shape == (4, 3, EXPERTS, WIDTH)
    assert not batch.text.any()


def test_data_without_captions_give_no_text(source, make_card, tmp_path, config):
    prepare(make_card(captions=None), source.root, tmp_path / "plain")
    samples = opened(open_manifest(tmp_path / "plain"), "gallery", config, Tower())
    (batch,) = evaluation_batches(samples, config=config, device="cpu")
    assert batch.text.shape == (4, 3, EXPERTS, WIDTH)
    assert not batch.text.any()


def test_joint_encoding_tells_how_many_captions_are_cut(manifest, config, caplog):
    caplog.set_level(logging.WARNING)
    config = override(config, {"captions.encode": "joint"})
    asked: list[list[str]] = []

    def overflow(texts: list[str]) -> float:
        asked.append(texts)
        return 0.925

    samples = opened(manifest, "gallery", config, Tower(), overflow=overflow)
    assert "92.5 % of the distinct captions" in caplog.text
    assert len(asked[0]) == 12
    assert asked[0][0].startswith("An adult in RGB. 000258")
    (batch,) = evaluation_batches(samples, config=config, device="cpu")
    assert batch.text[batch.present].norm(dim=-1).sub(1).abs().max() < 1e-5
    caplog.clear()
    opened(manifest, "gallery", config, Tower(), overflow=lambda texts: 0.0)
    assert not caplog.text


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_that_is_behind_gets_the_same_batches():
    samples = sample_set()
    expected, found = [], []
    for epoch in range(8):
        expected += list(epoch_of(samples, epoch=epoch))
        for batch in epoch_of(samples, epoch=epoch, device="cuda"):
            torch.cuda._sleep(20_000_000)  # some ten milliseconds, in which the next one is made
            found.append(Batch(*(tensor.clone() for tensor in batch)))
            del batch
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert_equal(one.to("cpu"), other)
