"""Retrieval between samples of other modalities, by a network that has learned something."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from next.config import RunConfig, from_toml, override, to_toml
from next.data.shards.reader import open_manifest
from next.evaluation.missing import MissingMatrix, missing_matrix
from next.training.checkpointing.checkpoint import load_network
from next.training.inputs import resolve, training_data
from next.training.loop import train
from next.training.results.report import FolderReporter
from tests.conftest import TINY


@pytest.fixture(scope="module")
def matrices(demo_shards, cache_folder, tmp_path_factory) -> dict[bool, MissingMatrix]:
    """Of the identities that it was trained on, over whole features and over common slices."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    place = {"data.uri": str(demo_shards), "data.cache": str(cache_folder)}
    longer = {"optim.epochs": 12, "selection.every": 12}
    config = override(RunConfig(), TINY | place | longer)
    manifest = open_manifest(str(demo_shards))
    config = resolve(config, manifest)
    data = training_data(config, manifest)
    folder = tmp_path_factory.mktemp("learned")
    with FolderReporter(folder) as reporter:
        train(config, data, reporter)
    network, _ = load_network(folder / "last")
    found = {
        common: missing_matrix(
            network,
            data.train,
            data.train,
            rule=data.rule,
            config=override(config, {"evaluation.common_slices": common}),
            device="cpu",
        )
        for common in (False, True)
    }
    torch.set_num_threads(threads)
    return found


ALL = ("RGB", "NI", "TI")


def score(matrix: MissingMatrix, query: tuple[str, ...], gallery: tuple[str, ...]) -> float:
    row, column = matrix.subsets.index(query), matrix.subsets.index(gallery)
    return float(matrix.mAP[row, column])


@pytest.mark.parametrize("one", ALL)
def test_one_modality_finds_all_of_them_nearly_as_well_as_its_own(matrices, one):
    """Over whole features it finds little more than chance does."""
    whole, common = (score(matrices[kind], (one,), ALL) for kind in (False, True))
    itself = score(matrices[True], (one,), (one,))
    assert common > 1.4 * whole
    assert common > 0.85 * itself > whole


def test_the_matrix_is_about_symmetric(matrices):
    """Between sets that have a modality in common."""

    def lopsided(matrix: MissingMatrix) -> float:
        pairs = [
            (one, other)
            for one in matrix.subsets
            for other in matrix.subsets
            if len(one) > len(other) and set(one) & set(other)
        ]
        gaps = [score(matrix, *pair) - score(matrix, *pair[::-1]) for pair in pairs]
        return float(np.abs(gaps).mean())

    assert lopsided(matrices[True]) < 5
    assert lopsided(matrices[False]) > 3 * lopsided(matrices[True])


def test_the_same_modalities_on_both_sides_score_as_before_to_the_bit(matrices):
    for place in range(len(matrices[True].subsets)):
        whole, common = (matrices[kind].cases[place][place].metrics for kind in (False, True))
        np.testing.assert_array_equal(whole.average_precision, common.average_precision)


def test_a_run_of_before_goes_on_comparing_whole_features():
    """Its curve would jump otherwise; where a run says nothing else, slices are compared."""
    written = to_toml(RunConfig())
    assert from_toml(written).evaluation.common_slices
    before = "\n".join(line for line in written.splitlines() if "common_slices" not in line)
    assert not from_toml(before).evaluation.common_slices
