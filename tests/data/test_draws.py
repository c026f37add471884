import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from next.data.draws import uniform

key = st.integers(-(2**40), 2**40)


@given(key, key, st.integers(1, 8))
def test_a_draw_is_a_function_of_its_keys_alone(seed, sample, n):
    alone = uniform("flip", seed, sample, n=n)
    among = uniform("flip", seed, np.asarray([[5], [sample]]), n=n)
    assert alone.shape == (n,)
    assert among.shape == (2, 1, n)
    np.testing.assert_array_equal(among[1, 0], alone)
    assert ((alone >= 0) & (alone < 1)).all()


@given(key, st.integers(1, 8))
def test_asking_for_more_numbers_keeps_the_first_ones(seed, n):
    np.testing.assert_array_equal(uniform("flip", seed, n=n + 3)[:n], uniform("flip", seed, n=n))


def test_keys_broadcast_against_each_other():
    grid = uniform("flip", 1, np.arange(3)[:, None], np.arange(4)[None, :], n=2)
    assert grid.shape == (3, 4, 2)
    np.testing.assert_array_equal(grid[2, 1], uniform("flip", 1, 2, 1, n=2))


def test_purpose_and_every_key_and_their_order_change_the_draw():
    draws = [
        uniform("flip", 1, 2, 3),
        uniform("crop", 1, 2, 3),
        uniform("flip", 2, 1, 3),
        uniform("flip", 1, 3, 2),
        uniform("flip", 1, 2),
        uniform("flip", 1, 2, 3, 0),
    ]
    assert len(np.unique(np.concatenate(draws))) == len(draws)


@pytest.mark.parametrize("varied", range(3))
def test_neighbouring_keys_give_even_and_unrelated_numbers(varied):
    keys: list[np.ndarray] = [np.asarray(7)] * 3
    keys[varied] = np.arange(100_000)
    values = uniform("flip", *keys)[:, 0]
    share = np.histogram(values, bins=20, range=(0, 1))[0] / len(values)
    np.testing.assert_allclose(share, 0.05, atol=0.004)
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.02


def test_draws_never_change():
    # If this fails, every recorded order of data and every seed means something else.
    np.testing.assert_array_equal(
        uniform("flip", 1, -2, 3, n=2), np.asarray([0.5675756395626125, 0.5546208679417952])
    )


def test_a_long_row_of_numbers_may_be_asked_for_in_parts():
    whole = uniform("flip", np.arange(3), 7, n=10)
    parts = [uniform("flip", np.arange(3), 7, n=n, first=first) for first, n in ((0, 4), (4, 6))]
    np.testing.assert_array_equal(np.concatenate(parts, axis=-1), whole)
