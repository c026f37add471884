"""Files of weights as their authors publish them, and what the driver makes of a tag."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import socket
import subprocess
import sys
import threading
import warnings
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import open_clip
import pytest
import torch
from open_clip.pretrained import _PRETRAINED
from safetensors.torch import save_file

from next.config import BackboneConfig, ModelConfig, RunConfig, override
from next.model.network import NEXT
from next.model.towers.backbone import Backbone, resolve_weights
from next.model.towers.clip import load_clip
from next.model.towers.text import TextTower
from next.model.weights.files import Origin, find_weights, read_weights, sha256
from next.training.checkpointing.checkpoint import Progress, load_network, save_checkpoint
from next.training.step.optimizer import build_optimizer

TINY = BackboneConfig(name="next-tiny", pretrained=None)
ROOT = Path(__file__).resolve().parents[3]


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

    config = resolve_weights(BackboneConfig(name="next-tiny", pretrained=str(path)), tmp_path)
    assert config.activation == "quick_gelu", "as all that OpenAI published in this form"
    cls, patches = Backbone(config, (64, 32)).eval()(
        images()[:, None], torch.ones(2, 1, dtype=torch.bool)
    )
    rows = TextTower(config).encode(["a red hat", "a blue bag"])
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
from next.model.towers.backbone import resolve_weights
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


CACHED = """
import socket, sys
from pathlib import Path
from next.model.weights.files import Origin, find_weights
def refuse(*_, **__): raise OSError("a connection was asked for")
socket.create_connection = refuse
print(find_weights("m", "t", Origin("org/name", ("none.bin", "w.bin")), Path(sys.argv[1])))
"""


def test_what_the_hubs_own_cache_has_is_taken_without_a_network(tmp_path):
    model = tmp_path / "hub" / "models--org--name"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text("a" * 40)
    (model / "snapshots" / ("a" * 40)).mkdir(parents=True)
    (model / "snapshots" / ("a" * 40) / "w.bin").write_bytes(b"weights")
    done = subprocess.run(
        [sys.executable, "-c", CACHED, str(tmp_path / "weights")],
        env=os.environ | {"HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.stdout.strip() == str(tmp_path / "weights" / "m.t.bin"), done.stderr
    assert (tmp_path / "weights" / "m.t.bin").read_bytes() == b"weights"


def test_who_has_the_weights_is_asked_for_before_a_client_tries_for_a_minute(tmp_path):
    """Nothing listens there; a library would try again and again."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}/w.pt"
    message = (
        r"the weights t of m .*\(127\.0\.0\.1 cannot be reached: .* and copy it to .*/m\.t\.pt"
    )
    with pytest.raises(ConnectionError, match=message):
        find_weights("m", "t", Origin("", (address,)), tmp_path)


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


def refuse_to_read(path: Path, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_weights(path)


class Restored(torch.nn.Module):
    """Writes a file when TorchScript restores it."""

    def __init__(self, place: str) -> None:
        super().__init__()
        self.place = place
        self.weight = torch.nn.Parameter(torch.zeros(2))

    @torch.jit.export
    def __getstate__(self) -> tuple[str, bool]:
        return self.place, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]) -> None:
        self.place = state[0]
        self.training = state[1]
        self.weight = torch.from_file(state[0], True, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_an_archive_that_would_run_code_runs_none(tmp_path):
    path, target = tmp_path / "evil.pt", tmp_path / "written"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        torch.jit.save(torch.jit.script(Restored(str(target))), path)
        torch.jit.load(path)
        assert target.exists(), "TorchScript runs it"
    target.unlink()
    refuse_to_read(path, r"evil\.pt must hold weights .* by code of its own, which is not run")
    config = BackboneConfig(name="next-tiny", pretrained=str(path))
    with pytest.raises(ValueError, match=r"by code of its own"):
        resolve_weights(config, tmp_path)  # which the driver does before it writes anything
    with pytest.raises(ValueError, match=r"by code of its own"):
        Backbone(config, (64, 32))
    assert not target.exists()


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (b"cposix\nsystem\n(S'touch written'\ntR.", r"refers to posix\.system, which is no tensor"),
        (b"ctorch.serialization\nload\n.", r"refers to torch\.serialization\.load"),
        (b"N.", r"it must hold a module, but holds NoneType"),
    ],
)
def test_a_pickle_within_an_archive_names_nothing_but_tensors(
    tmp_path, monkeypatch, payload, message
):
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile("evil.pt", "w") as archive:
        archive.writestr("evil/data.pkl", payload)
        archive.writestr("evil/constants.pkl", b"N.")
    refuse_to_read(Path("evil.pt"), message)
    assert os.listdir() == ["evil.pt"]


def test_an_archive_that_is_packed_to_burst_or_points_beyond_its_bytes_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/data.pkl", b"N.")
        archive.writestr("bomb/constants.pkl", b"N.")
    refuse_to_read(tmp_path / "bomb.pt", r"data\.pkl in it is compressed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(torch.nn.Linear(3, 5)), tmp_path / "linear.pt")
    with zipfile.ZipFile(tmp_path / "linear.pt") as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    root = next(iter(files)).partition("/")[0]
    with zipfile.ZipFile(tmp_path / "short.pt", "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data[:8] if name == f"{root}/data/0" else data)
    refuse_to_read(tmp_path / "short.pt", r"numbers must be in data/0, but it has 2")


def saved(path: Path) -> Path:
    save_file(donor().state_dict(), path)
    return path


def tokens(config: BackboneConfig) -> torch.Tensor:
    with torch.no_grad():
        seen = Backbone(config, (64, 32)).eval()(
            images()[:, None], torch.ones(2, 1, dtype=torch.bool)
        )
    return seen.patches


def test_a_tag_and_its_file_by_path_give_the_same_tokens_or_a_refusal(tag, tmp_path):
    folder = tmp_path / "weights"
    folder.mkdir()
    stored = saved(folder / f"next-tiny.{tag}.safetensors")
    elsewhere = saved(tmp_path / "clip.safetensors")

    def by(pretrained: object, **settings: str) -> BackboneConfig:
        given = {"pretrained": str(pretrained)} | settings
        return resolve_weights(TINY.model_copy(update=given), folder)

    expected = tokens(by(tag))
    assert torch.equal(tokens(by(stored)), expected), "its name is the tag's"
    assert torch.equal(tokens(by(elsewhere)), expected), "its bytes are the tag's"
    stored.unlink()
    with pytest.raises(
        ValueError, match=r"activation must be given with .*clip\.safetensors: .* of published, ge"
    ):
        by(elsewhere)
    assert torch.equal(tokens(by(elsewhere, activation="quick_gelu")), expected)
    assert not torch.equal(tokens(by(elsewhere, activation="gelu")), expected)
    marked = tmp_path / "marked.safetensors"
    save_file(donor().state_dict(), marked, {"next.activation": '"quick_gelu"'})
    assert torch.equal(tokens(by(marked)), expected), "it says so itself"


def test_a_relative_path_is_the_same_file_for_whoever_reads_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    saved(tmp_path / "clip.safetensors")
    monkeypatch.chdir(tmp_path)
    found = [
        resolve_weights(TINY.model_copy(update={"pretrained": given}), tmp_path / "weights")
        for given in ("clip.safetensors", "~/clip.safetensors")
    ]
    assert {one.file for one in found} == {str(tmp_path / "clip.safetensors")}
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert torch.equal(tokens(found[0]), tokens(found[1]))
    with pytest.raises(ValueError, match=r"or a tag whose file the driver has found"):
        Backbone(TINY.model_copy(update={"pretrained": "../clip.safetensors"}), (64, 32))
    with pytest.raises(ValueError, match=r"'~nobody-at-all/w\.pt' names the home folder of a user"):
        resolve_weights(TINY.model_copy(update={"pretrained": "~nobody-at-all/w.pt"}), tmp_path)


@pytest.mark.parametrize(
    ("inside", "prefix"),
    [
        ((), "_orig_mod."),
        (("state_dict",), "module."),
        (("model_state_dict",), "model."),
        (("model",), "_orig_mod.module."),
        (("teacher",), "backbone."),
        (("net",), "base."),
        (("state_dict",), "net."),
        (("model", "state_dict"), "teacher.backbone."),
    ],
)
def test_weights_are_found_behind_what_others_put_before_their_names(tmp_path, inside, prefix):
    named = {prefix + name: value for name, value in donor().state_dict().items()}
    tree: dict[str, object] = named | {"classifier.weight": torch.zeros(3, 2)}
    for name in reversed(inside):
        tree = {name: tree, "epoch": 3}
    torch.save(tree, tmp_path / "theirs.pt")
    found = Backbone(TINY.model_copy(update={"pretrained": str(tmp_path / "theirs.pt")}), (64, 32))
    assert torch.equal(found.tower.vit.proj, donor().visual.proj)


def test_a_teacher_is_taken_and_its_student_left(tmp_path):
    both = {
        f"{who}.backbone.{name}": value + (who == "student") if name == "visual.proj" else value
        for who in ("student", "teacher")
        for name, value in donor().state_dict().items()
    }
    torch.save(both, tmp_path / "both.pt")
    found = Backbone(TINY.model_copy(update={"pretrained": str(tmp_path / "both.pt")}), (64, 32))
    assert torch.equal(found.tower.vit.proj, donor().visual.proj)


def test_weights_that_do_not_fit_are_refused_with_three_names_and_a_count(tmp_path):
    weights = donor().state_dict()
    names = sorted(weights)[:5]
    save_file(
        {name: weights[name] for name in weights if name not in names}, tmp_path / "w.safetensors"
    )
    config = TINY.model_copy(update={"pretrained": str(tmp_path / "w.safetensors")})
    with pytest.raises(ValueError, match=r"fit in missing \S+ \[.*\]; missing .*; .* and 2 more$"):
        Backbone(config, (64, 32))


def test_weights_that_are_no_numbers_are_refused_by_name(tmp_path):
    weights = donor().state_dict()
    weights["visual.proj"][0, 0] = torch.nan
    save_file(weights, tmp_path / "w.safetensors")
    config = TINY.model_copy(update={"pretrained": str(tmp_path / "w.safetensors")})
    with pytest.raises(ValueError, match=r"must be finite .* in visual\.proj; their training div"):
        Backbone(config, (64, 32))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"<!DOCTYPE html>\n<html><body>Sign in</body></html>",
            r"is a page of HTML, as a download",
        ),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", r"a pointer of Git LFS; f"),
        (b"", r"is empty"),
    ],
)
@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_a_file_that_is_something_else_is_said_to_be_that(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    refuse_to_read(tmp_path / name, rf"{name} must hold weights .*{message}")


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
