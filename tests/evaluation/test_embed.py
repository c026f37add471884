from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch

from next.data.loading.loader import evaluation_batches
from next.evaluation.embed import SampleUsage, embed, mean_usage, route
from next.evaluation.protocol import embed_pair


def batches_of(samples, config):
    return evaluation_batches(samples, config=config, device="cpu")


def forward(model, samples, config):
    """One batch of all samples, in evaluation mode."""
    (batch,) = batches_of(samples, config.model_copy(update={"selection": whole(config)}))
    model.eval()
    with torch.no_grad():
        return batch, model(batch.images, batch.present, batch.text, batch.camera)


def whole(config):
    return config.selection.model_copy(update={"batch": 1000})


def test_features_are_the_normalised_embeddings_in_order(make_model, samples, config):
    model = make_model()
    found = embed(model, batches_of(samples, config), "cpu")
    _, output = forward(model, samples, config)
    expected = output.embedding / output.embedding.norm(dim=1, keepdim=True)
    assert found.features.dtype == np.float32
    np.testing.assert_allclose(found.features, expected.numpy(), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found.features, axis=1), 1, atol=1e-6)
    assert found.rows.tolist() == list(range(24))


def naive_entropy(weights):
    return -sum(w * np.log(w) for w in weights if w > 0)


def test_usage_equals_a_naive_loop(make_model, samples, config):
    model = make_model()
    usage = embed(model, batches_of(samples, config), "cpu").usage
    batch, output = forward(model, samples, config)
    semantic, structure = output.routing.semantic.numpy(), output.routing.structure.numpy()
    patches = semantic.shape[3]
    for row in (0, 5, 11):
        there = batch.present[row].numpy()
        for m in range(3):
            for e in range(2):
                expected = naive_entropy(semantic[row, m, e]) / np.log(patches)
                if not there[m]:
                    expected = np.nan
                assert usage.semantic_entropy[row, m, e] == pytest.approx(
                    expected, abs=1e-5, nan_ok=True
                )
        for e in range(3):
            slots = structure[row][:, :, [2 * e, 2 * e + 1]]
            for m in range(3):
                share = slots[m].sum() / 2
                assert usage.structure_share[row, m, e] == pytest.approx(share, abs=1e-5)
            entropies = [naive_entropy(slots[..., s].ravel()) for s in range(2)]
            expected = np.mean(entropies) / np.log(there.sum() * patches)
            assert usage.structure_entropy[row, e] == pytest.approx(expected, abs=1e-5)


def test_shares_sum_to_one_and_absent_modalities_have_none(make_model, samples, config):
    usage = embed(make_model(), batches_of(samples, config), "cpu").usage
    np.testing.assert_allclose(usage.structure_share.sum(axis=1), 1, atol=1e-5)
    assert (usage.structure_share[~samples.present] == 0).all()
    assert np.isnan(usage.semantic_entropy[~samples.present]).all()
    known = usage.semantic_entropy[samples.present]
    assert ((known >= 0) & (known <= 1 + 1e-6)).all()


@pytest.mark.parametrize(
    ("settings", "missing"),
    [
        ({"model__semantic__enabled": False}, {"semantic_entropy"}),
        ({"model__structure__enabled": False}, {"structure_entropy", "structure_share"}),
        (
            {"model__semantic__enabled": False, "model__structure__enabled": False},
            {"semantic_entropy", "structure_entropy", "structure_share"},
        ),
    ],
)
def test_a_branch_that_is_off_has_no_usage(make_model, samples, config, settings, missing):
    found = embed(make_model(**settings), batches_of(samples, config), "cpu")
    some = found.take(np.arange(3)).usage
    for usage in (found.usage, some):
        assert {name for name, part in vars(usage).items() if part is None} == missing


def test_the_batch_size_does_not_change_the_features(make_model, samples, config):
    model = make_model()
    small = embed(model, batches_of(samples, config), "cpu")
    large = config.model_copy(update={"selection": whole(config)})
    np.testing.assert_allclose(
        embed(model, batches_of(samples, large), "cpu").features, small.features, atol=1e-5
    )


def test_memory_holds_the_features_of_query_and_gallery_once(make_model, samples, config):
    pair = embed_pair(make_model(), samples, samples, config=config, device="cpu")
    assert np.shares_memory(pair.query.features, pair.gallery.features)
    some = embed_pair(
        make_model(), samples.select(np.array([3, 1])), samples, config=config, device="cpu"
    )
    assert some.gallery.features.base is not None, "a view of all that were embedded"
    assert len(some.query.features) == 2


def test_the_peak_of_an_embedding_is_little_above_its_features(make_model, samples, config):
    """It was 5.4 times the features, which at a million rows of 3,072 numbers are 12 GB."""
    model, many = make_model(), samples.select(np.tile(np.arange(len(samples)), 40))
    embed_pair(model, samples, samples, config=config, device="cpu")  # what is made once
    tracemalloc.start()
    try:
        found = embed_pair(model, samples, many, config=config, device="cpu")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    held = found.query.features.nbytes + found.gallery.features.nbytes
    assert peak < 1.5 * held, f"{peak / held:.2f} times the features"


def test_each_part_keeps_its_mode_and_no_gradient_is_kept(make_model, samples, config):
    model = make_model().train()
    model.backbone.eval()
    modes = {name: part.training for name, part in model.named_modules()}
    embed(model, batches_of(samples, config), "cpu")
    assert {name: part.training for name, part in model.named_modules()} == modes
    assert all(parameter.grad is None for parameter in model.parameters())


def test_modes_come_back_after_an_error(make_model, samples, config):
    model = make_model(model__modalities=2).train()
    with pytest.raises(ValueError, match="2 modalities"):
        embed(model, batches_of(samples, config), "cpu")
    assert model.training


def test_training_goes_on_after_embedding(make_model, samples, config):
    model = make_model()
    embed(model, batches_of(samples, config), "cpu")
    batch = first_batch(samples, config)
    model(batch.images, batch.present, batch.text, batch.camera).embedding.sum().backward()
    assert any(parameter.grad is not None for parameter in model.parameters())


def first_batch(samples, config):
    return next(iter(batches_of(samples, config)))


def test_nothing_to_embed_is_an_error(make_model, samples, config):
    with pytest.raises(ValueError, match="nothing to embed"):
        embed(make_model(), batches_of(samples.select(np.array([], dtype=int)), config), "cpu")


def test_the_routing_of_a_batch(make_model, samples, config):
    model = make_model().train()
    batch = first_batch(samples, config)
    routing = route(model, batch)
    assert routing.semantic.shape == (5, 3, 2, 8)
    assert routing.structure.shape == (5, 3, 8, 6)
    assert not routing.semantic.requires_grad
    assert set(routing.entropy) == {"semantic", "structure"}
    assert model.training


def usage_of(semantic, share):
    return SampleUsage(np.asarray(semantic), None, np.asarray(share))


def test_means_over_samples_and_cameras():
    # One modality less in the second sample; one expert; cameras 4, 4 and 9.
    semantic = [[[0.0], [1.0]], [[1.0], [np.nan]], [[0.5], [0.5]]]
    share = [[[0.2], [0.8]], [[1.0], [0.0]], [[0.6], [0.4]]]
    found = mean_usage(usage_of(semantic, share), np.array([4, 4, 9]), patches=16)
    np.testing.assert_allclose(found.semantic_entropy, [[0.5], [0.75]])
    np.testing.assert_allclose(found.semantic_patches, [[(1 + 16 + 4) / 3], [(16 + 4) / 2]])
    np.testing.assert_allclose(found.structure_share, [[0.6], [0.4]])
    assert found.structure_entropy is None
    assert found.cameras == (4, 9)
    np.testing.assert_allclose(found.semantic_entropy_by_camera, [[[0.5], [1.0]], [[0.5], [0.5]]])
    np.testing.assert_allclose(found.structure_share_by_camera, [[[0.6], [0.4]], [[0.6], [0.4]]])


def test_an_unknown_camera_is_none_of_the_cameras():
    usage = usage_of(np.ones((2, 1, 1)), np.ones((2, 1, 1)))
    assert mean_usage(usage, np.array([-1, 3]), patches=4).cameras == (3,)
    none = mean_usage(usage, np.array([-1, -1]), patches=4)
    assert none.cameras == ()
    assert none.structure_share_by_camera is None


def test_a_modality_that_no_sample_has_is_nan():
    semantic = [[[0.5], [np.nan]]]
    found = mean_usage(usage_of(semantic, [[[1.0], [0.0]]]), np.array([1]), patches=4)
    assert np.isnan(found.semantic_entropy).tolist() == [[False], [True]]


def test_an_even_expert_uses_all_its_tokens():
    usage = usage_of(np.ones((1, 1, 1)), np.ones((1, 1, 1)))
    assert mean_usage(usage, np.array([1]), patches=16).semantic_patches.item() == pytest.approx(16)
    few = mean_usage(usage, np.array([1]), patches=16, tokens_per_expert=4)
    assert few.semantic_patches.item() == pytest.approx(4)


def test_usage_and_cameras_of_other_samples_are_an_error():
    usage = usage_of(np.ones((2, 1, 1)), np.ones((2, 1, 1)))
    with pytest.raises(ValueError, match="same samples, but got 2 and 3"):
        mean_usage(usage, np.array([1, 1, 1]), patches=4)
