import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from next.config import AugmentConfig
from next.data.draws import uniform
from next.data.loading.augment import (
    ERASE_ATTEMPTS,
    augment,
    compose,
    draw,
    drop_modalities,
    finish,
    move,
)

MEAN, STD = 0.4, 0.6
BLACK = -MEAN / STD
OFF = {"flip": 0.0, "pad": 0, "erase": 0.0}


def pictures(samples: int, modalities: int = 3, height: int = 12, width: int = 8) -> torch.Tensor:
    generator = np.random.default_rng(0)
    shape = (samples, modalities, height, width, 3)
    # 255 * MEAN is no pixel value, so that only an erased pixel is exactly 0.
    return torch.from_numpy(generator.integers(0, 102, shape, dtype=np.uint8))


def run(images: torch.Tensor, config: AugmentConfig, samples=None, draws=None, seed=1, epoch=2):
    count = len(images)
    return augment(
        images,
        config=config,
        mean=MEAN,
        std=STD,
        seed=seed,
        epoch=epoch,
        samples=np.arange(count) if samples is None else np.asarray(samples),
        draws=np.zeros(count, dtype=np.int64) if draws is None else np.asarray(draws),
    )


def naive(images, config: AugmentConfig, samples, draws, seed: int, epoch: int) -> np.ndarray:
    """One image after the other, pixel by pixel, in the words of the docstring."""
    batch, modalities, height, width, _ = images.shape
    out = np.empty((batch, modalities, 3, height, width))
    for b in range(batch):
        for m in range(modalities):
            key = (seed, epoch, int(samples[b]), int(draws[b]))
            flip, down, right = uniform("geometry", *key, 0 if config.shared_geometry else m, n=3)
            image = np.asarray(images[b, m])
            if flip < config.flip:
                image = image[:, ::-1]
            padded = np.pad(image, ((config.pad,) * 2, (config.pad,) * 2, (0, 0)))
            top = math.floor(down * (2 * config.pad + 1))
            left = math.floor(right * (2 * config.pad + 1))
            pixels = padded[top : top + height, left : left + width] / 255
            pixels = (pixels - MEAN) / STD
            erase, *numbers = uniform("erase", *key, m, n=1 + 4 * ERASE_ATTEMPTS)
            if erase < config.erase:
                for attempt in range(ERASE_ATTEMPTS):
                    share, slim, y, x = numbers[4 * attempt : 4 * attempt + 4]
                    low, high = config.erase_area
                    area = (low + (high - low) * share) * height * width
                    aspect = math.exp(math.log(0.3) - 2 * math.log(0.3) * slim)
                    tall, wide = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
                    if tall < height and wide < width:
                        top = math.floor(y * (height - tall + 1))
                        left = math.floor(x * (width - wide + 1))
                        pixels[top : top + tall, left : left + wide] = 0
                        break
            out[b, m] = pixels.transpose(2, 0, 1)
    return out


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 3),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.integers(0, 14),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.booleans(),
    st.integers(0, 5),
)
def test_equals_the_naive_loop_over_images(modalities, flip, pad, erase, shared, seed):
    config = AugmentConfig(flip=flip, pad=pad, erase=erase, shared_geometry=shared)
    images = pictures(5, modalities)
    samples, draws = np.asarray([3, 8, 1, 3, 7]), np.asarray([0, 1, 0, 1, 2])
    result = run(images, config, samples, draws, seed=seed, epoch=4)
    assert result.dtype == torch.float32
    expected = naive(images, config, samples, draws, seed, 4)
    np.testing.assert_allclose(result.numpy(), expected, atol=1e-6)


@settings(deadline=None, max_examples=30)
@given(
    st.integers(0, 30), st.booleans(), st.integers(0, 9), st.booleans(), st.sampled_from([8, 300])
)
def test_image_by_image_gives_the_bits_of_the_whole_batch_at_once(
    pad, shared, seed, enabled, width
):
    config = AugmentConfig(pad=pad, shared_geometry=shared, enabled=enabled)
    images, samples = pictures(6, width=width), np.arange(6)
    drawn = draw(tuple(images.shape), config, seed, 3, samples, samples * 0)
    expected = finish(move(images, drawn), drawn, MEAN, STD)
    out = np.full(images.shape, np.nan, dtype=np.float32)
    for share in ([0, 1, 2, 3], [], [4, 5]):
        compose(images.numpy(), drawn, MEAN, STD, out, samples=share)
    assert torch.equal(torch.from_numpy(out).movedim(-1, -3), expected)


def test_an_absent_image_is_zero_whatever_lies_in_its_place():
    images, present = pictures(2).numpy(), np.asarray([[True, False, True], [False, True, True]])
    out = np.full(images.shape, np.nan, dtype=np.float32)
    compose(images, None, MEAN, STD, out, present=present)
    assert not out[~present].any()
    assert (out[present] != 0).all()


def test_what_does_not_fit_the_batch_is_refused_before_its_memory_is_read():
    images = pictures(2).numpy()
    out = np.full(images.shape, np.nan, dtype=np.float32)
    for wrong in (images[:, :, :5], images[:, :2], images.astype(np.float32)):
        with pytest.raises(ValueError, match=r"images must be uint8 and out float32 \[2, 3, 12, 8"):
            compose(wrong, None, MEAN, STD, out)
    assert np.isnan(out).all()


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans()), min_size=1, max_size=12),
    st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    st.integers(0, 5),
)
def test_dropped_modalities_equal_the_naive_loop(present, probability, seed):
    before = np.asarray(present)
    samples, draws, columns = np.arange(len(before)) * 3, np.arange(len(before)) % 2, (4, 0, 2)
    keys = {"seed": seed, "epoch": 7, "samples": samples, "draws": draws}
    after = drop_modalities(before, probability, **keys, columns=columns)
    for row, there in enumerate(before):
        numbers = {
            place: uniform("modalities", seed, 7, samples[row], draws[row], columns[place])[0]
            for place in np.flatnonzero(there)
        }
        kept = {place for place, number in numbers.items() if number >= probability}
        if numbers and not kept:
            kept = {max(numbers, key=numbers.__getitem__)}
        assert set(np.flatnonzero(after[row])) == kept


def test_modalities_are_dropped_as_often_as_is_set():
    samples = np.arange(4000)
    present = np.ones((4000, 3), dtype=bool)
    keys = {"seed": 0, "samples": samples, "draws": samples * 0, "columns": range(3)}
    first, second = (drop_modalities(present, 0.2, epoch=epoch, **keys) for epoch in (0, 1))
    np.testing.assert_allclose(first.mean(axis=0), 0.8 + 0.2**3 / 3, atol=0.02)
    assert (first != second).any()


def test_normalising_gives_channels_first_in_value_and_channels_last_in_memory():
    images = pictures(2)
    result = finish(images, None, MEAN, STD)
    expected = (images.permute(0, 1, 4, 2, 3).double() / 255 - MEAN) / STD
    np.testing.assert_allclose(result.numpy(), expected.numpy(), atol=1e-6)
    assert result.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)


def test_switched_off_it_only_normalises():
    images = pictures(3)
    config = AugmentConfig(enabled=False, flip=1, erase=1)
    torch.testing.assert_close(run(images, config), finish(images, None, MEAN, STD), rtol=0, atol=0)
    torch.testing.assert_close(
        run(images, AugmentConfig(**OFF)), finish(images, None, MEAN, STD), rtol=0, atol=0
    )


def test_a_sample_does_not_depend_on_its_neighbours_to_the_last_bit():
    config = AugmentConfig(pad=3)
    # A size that fills no vector register, so that a sample's place changes which code it takes.
    images = pictures(13, height=11, width=7)
    together = run(images, config)
    for part in (slice(0, 1), slice(4, 9), slice(12, 13)):
        alone = run(images[part], config, samples=np.arange(13)[part])
        assert torch.equal(alone, together[part])
    order = torch.randperm(13, generator=torch.Generator().manual_seed(0))
    assert torch.equal(run(images[order], config, samples=order.numpy()), together[order])


def test_every_key_changes_the_draw():
    images = pictures(1).expand(40, -1, -1, -1, -1).contiguous()
    config = AugmentConfig(pad=3, erase=1)
    base = run(images, config)
    assert len({image.numpy().tobytes() for image in base}) == 40, "samples differ"
    assert torch.equal(run(images, config), base)
    assert not torch.equal(run(images, config, seed=9), base)
    assert not torch.equal(run(images, config, epoch=9), base)
    assert not torch.equal(run(images, config, draws=np.ones(40, dtype=np.int64)), base)


@pytest.mark.parametrize("shared", [True, False])
def test_geometry_is_shared_by_modalities_if_set_so(shared):
    images = pictures(30, modalities=1).expand(-1, 3, -1, -1, -1).contiguous()
    result = run(images, AugmentConfig(pad=4, erase=0, shared_geometry=shared))
    assert torch.equal(result[:, 0], result[:, 1]) == shared
    assert torch.equal(result[:, 0], result[:, 2]) == shared


def test_rectangles_differ_between_modalities_and_fill_the_share_that_is_set():
    images = torch.full((400, 2, 64, 32, 3), 255, dtype=torch.uint8)
    config = AugmentConfig(flip=0, pad=0, erase=0.5, erase_area=(0.1, 0.3))
    erased = (run(images, config) == 0).all(dim=2)
    share = erased.float().mean(dim=(2, 3))
    hit = share > 0
    assert 0.45 < hit.float().mean() < 0.55
    assert not torch.equal(hit[:, 0], hit[:, 1])
    assert share[hit].min() > 0.09
    assert share[hit].max() < 0.31
    tall, wide = erased.any(dim=3).sum(dim=2)[hit], erased.any(dim=2).sum(dim=2)[hit]
    assert torch.equal(tall * wide, erased.sum(dim=(2, 3))[hit]), "one rectangle"
    assert (tall / wide).min() > 0.25
    assert (tall / wide).max() < 3.6


def test_padding_is_black():
    images = torch.full((50, 1, 12, 8, 3), 255, dtype=torch.uint8)
    result = run(images, AugmentConfig(flip=0, pad=2, erase=0))
    values = result.unique()
    np.testing.assert_allclose(values.numpy(), [BLACK, (1 - MEAN) / STD], atol=1e-6)


def test_the_input_is_left_alone():
    images = pictures(4)
    before = images.clone()
    run(images, AugmentConfig(erase=1))
    assert torch.equal(images, before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_what_the_cpu_gives():
    images = pictures(20)
    config = AugmentConfig(pad=3, shared_geometry=False)
    result = run(images.cuda(), config)
    assert result.is_cuda
    torch.testing.assert_close(result.cpu(), run(images, config), rtol=0, atol=0)
