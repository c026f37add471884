"""Files of weights as their authors publish them, and what the driver makes of a tag."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import subprocess
import sys
import threading
import warnings
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import open_clip
import pytest
import torch
from open_clip.pretrained import _PRETRAINED
from safetensors.torch import save_file

from next.config import BackboneConfig, ModelConfig, RunConfig, override
from next.model.backbone import Backbone, resolve_weights
from next.model.clip import load_clip
from next.model.network import NEXT
from next.model.text import TextTower
from next.model.weights import Origin, find_weights, read_weights, sha256
from next.training.checkpoint import Progress, load_network, save_checkpoint
from next.training.optimizer import build_optimizer

TINY = BackboneConfig(name="next-tiny", pretrained=None)
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def tag(monkeypatch) -> str:
    """A tag of the small model, as open_clip lists them, for weights that want QuickGELU."""
    listed = {"hf_hub": "somebody/next-tiny/", "quick_gelu": True}
    monkeypatch.setitem(_PRETRAINED, "next-tiny", {"published": listed})
    return "published"


def donor() -> open_clip.CustomTextCLIP:
    return load_clip(TINY.model_copy(update={"seed": 7}))


def images(height: int = 64, width: int = 32) -> torch.Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))


def test_openais_archive_gives_the_tokens_of_openais_model(tmp_path):
    """A TorchScript archive in half precision with the model's numbers among its tensors."""
    settings = open_clip.get_model_config("next-tiny")
    torch.manual_seed(3)
    theirs = open_clip.CLIP(**settings, quick_gelu=True).eval()
    with torch.no_grad():
        for value in theirs.parameters():
            value.copy_(value.half())
    for name in ("input_resolution", "context_length", "vocab_size"):
        vars(theirs).pop(name, None)
        theirs.register_buffer(name, torch.tensor(77))
    text = open_clip.get_tokenizer("next-tiny")(["a red hat", "a blue bag"])
    path = tmp_path / "ViT.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, but so are the archives
        traced = torch.jit.trace(theirs, (images(), text), check_trace=False)
        torch.jit.save(traced.half(), path)
    theirs.float()

    settings = open_clip.get_model_config("next-tiny") | {"quick_gelu": True}
    open_clip.factory._MODEL_CONFIGS["next-tiny-quickgelu"] = settings
    config = BackboneConfig(name="next-tiny-quickgelu", pretrained=str(path))
    try:
        cls, patches = Backbone(config, (64, 32)).eval()(
            images()[:, None], torch.ones(2, 1, dtype=torch.bool)
        )
        rows = TextTower(config).encode(["a red hat", "a blue bag"])
    finally:
        del open_clip.factory._MODEL_CONFIGS["next-tiny-quickgelu"]
    theirs.visual.output_tokens = True
    pooled, tokens = theirs.visual(images())
    torch.testing.assert_close(cls[:, 0], pooled, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(patches[:, 0], tokens @ theirs.visual.proj, atol=1e-5, rtol=1e-5)
    expected = theirs.encode_text(text, normalize=True).detach()
    torch.testing.assert_close(torch.from_numpy(rows), expected, atol=1e-5, rtol=1e-5)


def test_a_tag_is_found_in_the_folder_of_weights_and_named_by_its_hash(tag, tmp_path):
    path = tmp_path / f"next-tiny.{tag}.safetensors"
    save_file(donor().state_dict(), path)
    found = resolve_weights(TINY.model_copy(update={"pretrained": tag}), tmp_path)
    assert found.file == str(path)
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert resolve_weights(found, tmp_path) == found
    loaded = Backbone(found, (64, 32))
    assert torch.equal(loaded.tower.vit.proj, donor().visual.proj)
    block = loaded.tower.vit.transformer.resblocks[0]
    assert "QuickGELU" in type(block.mlp.gelu).__name__, "the tag says so"
    with pytest.raises(ValueError, match=r"must have SHA-256 0+, but have [0-9a-f]+; use the file"):
        resolve_weights(found.model_copy(update={"sha256": "0" * 64, "file": None}), tmp_path)
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(ValueError, match=r"must have SHA-256"):
        Backbone(found, (64, 32))
    path.unlink()
    with pytest.raises(
        FileNotFoundError, match=r"next-tiny are not on this machine: .*data\.cache"
    ):
        Backbone(found, (64, 32))


def test_a_model_is_built_from_no_tag_that_the_driver_did_not_resolve(tag, tmp_path):
    with pytest.raises(ValueError, match=r"a tag whose file the driver has found, but is 'publis"):
        Backbone(TINY.model_copy(update={"pretrained": tag}), (64, 32))
    other = {"pretrained": tag, "file": str(tmp_path / "ViT-B-16.openai.safetensors")}
    with pytest.raises(ValueError, match=r"ViT-B-16\.openai.*a sweep vary no backbone"):
        Backbone(TINY.model_copy(update=other), (64, 32))


def test_a_checkpoint_keeps_the_activation_of_its_tag(tag, tmp_path):
    """Its weights replace the pretrained ones, but the model stays the one that was trained."""
    save_file(donor().state_dict(), tmp_path / f"next-tiny.{tag}.safetensors")
    facts = {
        "model.modalities": 1, "model.image_size": (64, 32), "model.identities": 2,
        "model.backbone.name": "next-tiny", "model.backbone.pretrained": tag,
    }  # fmt: skip
    config = override(RunConfig(), facts)
    backbone = resolve_weights(config.model.backbone, tmp_path)
    config = override(
        config, {"model.backbone.file": backbone.file, "model.backbone.sha256": backbone.sha256}
    )
    network = NEXT(config.model).eval()
    folder = save_checkpoint(
        tmp_path / "last", network, build_optimizer(network, config.optim), Progress(), config
    )
    (tmp_path / f"next-tiny.{tag}.safetensors").unlink()
    again, _ = load_network(folder)
    inputs = images()[:, None], torch.ones(2, 1, dtype=torch.bool)
    assert torch.equal(again(*inputs).embedding, network(*inputs).embedding)


OFFLINE = """
import sys
from pathlib import Path
from next.config import BackboneConfig
from next.model.backbone import resolve_weights
for name, tag in (("ViT-B-16", "openai"), ("vit_base_patch16_dinov3.lvd1689m", "openai")):
    try:
        resolve_weights(BackboneConfig(name=name, pretrained=tag), Path(sys.argv[1]))
    except ConnectionError as error:
        print(error)
"""


def test_a_machine_without_a_network_is_told_which_file_to_bring_where(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE, str(tmp_path / "weights")],
        env=os.environ | {"HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    clip, dino = done.stdout.splitlines()
    assert "fetch open_clip_model.safetensors of the Hugging Face repository timm/vit_base" in clip
    assert f"copy it to {tmp_path}/weights/ViT-B-16.openai.safetensors" in clip
    assert "fetch model.safetensors of the Hugging Face repository timm/vit_base_patch16_di" in dino
    assert f"{tmp_path}/weights/vit_base_patch16_dinov3.lvd1689m.safetensors" in dino


def test_processes_that_fetch_one_file_at_once_all_succeed(tmp_path):
    content = os.urandom(4 << 20)
    (tmp_path / "published.pt").write_bytes(content)
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    handler.log_message = lambda *_: None
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        origin = Origin("", (f"http://127.0.0.1:{server.server_port}/published.pt",))
        processes = multiprocessing.get_context("fork")
        together = processes.Barrier(3)

        def fetch() -> None:
            together.wait(60)
            find_weights("next-tiny", "published", origin, tmp_path / "weights")

        every = [processes.Process(target=fetch) for _ in range(3)]
        for one in every:
            one.start()
        for one in every:
            one.join(60)
        server.shutdown()
    assert [one.exitcode for one in every] == [0, 0, 0]
    assert os.listdir(tmp_path / "weights") == ["next-tiny.published.pt"]
    assert (tmp_path / "weights" / "next-tiny.published.pt").read_bytes() == content


def test_an_unknown_tag_is_refused_with_the_known_ones(tmp_path):
    for name, tag, message in (
        ("ViT-B-16", "opneai", r"weights file or a tag of ViT-B-16 \(openai, .*'opneai'"),
        ("next-tiny", "/no/such/file.pt", r"tag of next-tiny \(it has none\)"),
        ("vit_base_patch16_dinov3", "lvd", r"tag of vit_base_patch16_dinov3 \(lvd1689m\)"),
        ("vit_base_patch16_dinov3.lvd", "openai", r"tag of vit_base.* but got 'lvd'"),
    ):
        with pytest.raises(ValueError, match=message):
            resolve_weights(BackboneConfig(name=name, pretrained=tag), tmp_path)


def test_a_file_that_holds_no_weights_is_refused(tmp_path):
    (tmp_path / "notes.pt").write_text("no weights")
    with pytest.raises(ValueError, match=r"notes\.pt must hold weights .* but cannot be read"):
        read_weights(tmp_path / "notes.pt")
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    with pytest.raises(ValueError, match=r"must hold tensors by name, but holds list"):
        read_weights(tmp_path / "list.pt")


def test_the_text_towers_key_names_the_file_and_not_its_place(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        save_file(donor().state_dict(), tmp_path / folder / "clip.safetensors")
    here, there = (
        TextTower(
            TINY.model_copy(update={"pretrained": str(tmp_path / folder / "clip.safetensors")})
        )
        for folder in ("a", "b")
    )
    assert here.key == there.key != TextTower(TINY).key
    assert "_tower" not in vars(here), "the key does not build the tower"
    assert sha256(tmp_path / "a/clip.safetensors") == sha256(tmp_path / "b/clip.safetensors")


def test_the_default_backbone_is_openais_clip():
    assert ModelConfig().backbone.name == "ViT-B-16"
    assert ModelConfig().backbone.pretrained == "openai"
