"""Two towers: the loss against loops, and weights that come back from a file."""

import json

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from next.config import BackboneConfig
from next.model.towers.alignment import Captions, TwoTowers, cropped
from next.model.towers.backbone import Backbone
from next.model.towers.clip import IMAGE_SIZE, load_clip

TINY = BackboneConfig(name="next-tiny", pretrained=None)
SIZE = (32, 16)


def tokens(*texts: str) -> torch.Tensor:
    return open_clip.get_tokenizer("next-tiny")(list(texts))


def test_texts_are_read_without_their_common_padding_and_come_out_the_same():
    towers = TwoTowers(TINY, SIZE)
    given = tokens("a man in a red coat.", "no.")
    assert cropped(given).shape[1] < given.shape[1]
    expected = F.normalize(towers.text(given), dim=-1)
    torch.testing.assert_close(towers.texts(cropped(given)), expected, rtol=1e-5, atol=1e-6)


def test_the_loss_is_the_mean_over_modalities_of_both_cross_entropies():
    """Four samples; one has no caption in the first modality, one shares its words in the second;
    the third modality has one pair only, which there is nothing to tell from."""
    torch.manual_seed(0)
    towers = TwoTowers(TINY, SIZE)
    images = torch.randn(4, 3, 3, *SIZE)
    members = (torch.rand(4, 3, 5) < 0.5).float()
    members[..., 0] = 1
    pairs = (torch.tensor([0, 2, 3]), torch.tensor([0, 1, 3]), torch.tensor([2]))
    texts = cropped(tokens("red coat.", "blue hat.", "a bag.", "a man.", "boots."))
    losses = towers(images, Captions(texts, members, pairs))
    read, scale = towers.texts(texts), towers.logit_scale.exp()
    expected = []
    for modality, rows in enumerate(pairs[:2]):
        total = 0.0
        for place, row in enumerate(rows):
            image = towers.images(images[row, modality][None])[0]
            captions = [F.normalize(members[one, modality] @ read, dim=0) for one in rows]
            logits = torch.stack([scale * image @ caption for caption in captions])
            total += F.cross_entropy(logits, torch.tensor(place))
            others = [towers.images(images[one, modality][None])[0] for one in rows]
            back = torch.stack([scale * captions[place] @ other for other in others])
            total += F.cross_entropy(back, torch.tensor(place))
        expected.append(total / 2 / len(rows))
    assert losses.total.item() == pytest.approx(sum(expected).item() / 2, rel=1e-4)
    assert [losses.parts[f"pairs/{one}"].item() for one in (0, 1)] == pytest.approx(
        [one.item() for one in expected], rel=1e-4
    )
    losses.total.backward()
    assert towers.logit_scale.grad
    assert towers.text.token_embedding.weight.grad.abs().sum() > 0
    assert towers.backbone.tower.vit.proj.grad.abs().sum() > 0


def test_the_scale_stays_between_one_and_a_hundred():
    towers = TwoTowers(TINY, SIZE)
    for value, expected in ((-3.0, 1.0), (9.0, 100.0), (2.0, 7.389)):
        towers.logit_scale.data.fill_(value)
        towers.limit_scale()
        assert towers.logit_scale.exp().item() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("size", [(64, 32), (32, 16)])
def test_a_file_of_the_weights_is_what_backbone_and_text_tower_take(tmp_path, size):
    """Also where the towers were trained at another image size than the model's own."""
    towers = TwoTowers(TINY, size).eval()
    for parameter in towers.parameters():
        parameter.data.add_(0.01 * torch.randn(parameter.shape))
    path = tmp_path / "weights.safetensors"
    save_file(towers.weights(), path, {IMAGE_SIZE: json.dumps(size)})
    config = TINY.model_copy(update={"pretrained": str(path)})
    backbone = Backbone(config, size).eval()
    images = torch.randn(2, 3, *size)
    found = backbone(images[:, None], torch.ones(2, 1, dtype=torch.bool)).cls[:, 0]
    torch.testing.assert_close(F.normalize(found, dim=-1), towers.images(images))
    given = tokens("a red coat.")
    text = F.normalize(load_clip(config).text.eval()(given), dim=-1)
    torch.testing.assert_close(text, towers.texts(cropped(given)), rtol=1e-5, atol=1e-6)
    again = TwoTowers(config, size)
    for name, value in towers.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert Backbone(config, (48, 48)).patch_grid == (6, 6), "positions are resized further"


def test_a_tower_without_a_text_tower_is_refused():
    config = BackboneConfig(name="vit_small_patch16_dinov3", pretrained=None)
    with pytest.raises(ValueError, match=r"must be an open_clip model, which has a text tower"):
        TwoTowers(config, SIZE)
