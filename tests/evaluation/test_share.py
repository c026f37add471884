"""One evaluation by several processes that gather what each embedded and ranked."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from next.config import RunConfig, override
from next.evaluation.missing import missing_matrix
from next.evaluation.protocol import Evaluation, evaluate
from next.evaluation.share import Share
from next.model.network import NEXT
from tests.evaluation.conftest import SETTINGS, draw_samples
from tests.training.conftest import together

CASES: list[dict[str, Any]] = [
    {"selection.batch": 5},
    {"selection.batch": 7, "model.semantic.enabled": False},
    {"selection.batch": 11, "model.structure.enabled": False},
    {"selection.batch": 40},
]
"""Of 27 samples: unequal shares, two branches and one, and one batch for all ranks."""


@given(count=st.integers(0, 1000), world=st.integers(1, 64))
def test_the_parts_are_everything_once_in_order_and_even(count, world):
    parts = Share(0, world).parts(count)
    assert [row for part in parts for row in part] == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert [Share(rank, world).of(count) for rank in range(world)] == parts


def evaluated(settings: dict[str, Any], share: Share) -> tuple[Evaluation, int]:
    """A gallery and queries of which three are seen anew, and the samples that went through."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = override(RunConfig(), SETTINGS | settings)
    model, samples = NEXT(config.model), draw_samples()
    present = samples.present.copy()
    present[[2, 9, 17]] = [True, False, False]
    queries = replace(samples, present=present).select(np.array([2, 9, 17, 4, 20]))
    seen: list[int] = []
    model.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    found = evaluate(
        model, queries, samples, rule="camera", config=config, device="cpu", share=share
    )
    return found, sum(seen)


def with_modalities_missing(share: Share) -> np.ndarray:
    """mAP of every pair of sets of modalities."""
    torch.manual_seed(0)
    config = override(RunConfig(), SETTINGS | CASES[0])
    model, samples = NEXT(config.model), draw_samples()
    found = missing_matrix(
        model, samples, samples, rule="camera", config=config, device="cpu", share=share
    )
    return found.mAP


def arrays(found: Evaluation) -> list[np.ndarray]:
    sides = [found.query, found.gallery]
    usage = [part for side in sides for part in vars(side.usage).values() if part is not None]
    features = [part for side in sides for part in (side.features, side.rows)]
    metrics = [value for value in vars(found.metrics).values() if isinstance(value, np.ndarray)]
    return [*features, *usage, *metrics, found.own]


def member(rank: int, world: int, meeting: str, queue) -> None:
    dist.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=world)
    answers = []
    for settings in CASES:
        found, seen = evaluated(settings, Share(rank, world))
        answers.append((arrays(found), found.metrics.as_dict(), found.forwards, seen))
    queue.put((rank, answers, with_modalities_missing(Share(rank, world))))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def members(tmp_path_factory) -> list[Any]:
    meeting = str(tmp_path_factory.mktemp("ranks") / "meeting")
    answers = together(member, [(rank, 3, meeting) for rank in range(3)])
    return sorted(answers, key=lambda answer: answer[0])


@pytest.fixture(scope="module")
def ranks(members) -> list[list[Any]]:
    return [answers for _, answers, _ in members]


def test_every_rank_comes_to_the_scores_of_one_process_with_modalities_missing(members):
    alone = with_modalities_missing(Share())
    assert alone.shape == (7, 7)
    for _, _, found in members:
        np.testing.assert_array_equal(found, alone)


@pytest.mark.parametrize("case", range(len(CASES)))
def test_every_rank_comes_to_the_bits_of_one_process_and_embeds_only_its_share(ranks, case):
    alone, seen_alone = evaluated(CASES[case], Share())
    assert seen_alone == alone.forwards == 27
    for answer in ranks:
        found, scores, forwards, _ = answer[case]
        assert scores == alone.metrics.as_dict()
        assert forwards == 27
        for ours, theirs in zip(found, arrays(alone), strict=True):
            np.testing.assert_array_equal(ours, theirs)
    seen = [answer[case][3] for answer in ranks]
    assert sum(seen) == 27
    size = CASES[case]["selection.batch"]
    assert max(seen) <= size * -(-(24 // size + 2) // 3)
