"""Published weights of every file format fill the towers exactly; tensors that do not match are
named."""

import argparse
import datetime
import errno
import io
import os
import pickle
import resource
import shutil
import subprocess
import sys
import zipfile
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import constants, file_download
from safetensors.torch import load, save
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Dinov2WithRegistersConfig,
    DINOv3ViTConfig,
    DINOv3ViTModel,
)
from transformers import Dinov2WithRegistersModel as HubVision

from dcris.checkpoints import backbones as weights
from dcris.checkpoints.backbones import fill_tower, tower_state
from dcris.checkpoints.checkpoint import identify_towers, load_checkpoint, load_trained, save_checkpoint, save_model
from dcris.checkpoints.convert_detris import read_state
from dcris.checkpoints.tensor_files import StoredTensor, open_tensors
from dcris.config import DataConfig, RunConfig, TextConfig, VisionConfig, refuse_other_run
from dcris.errors import DcrisError
from dcris.models.encoders import TEXT_TOWERS, VISION_TOWERS
from dcris.models.encoders.clip_text import ClipTextTower
from dcris.models.encoders.clip_vision import ClipVisionTower
from dcris.models.encoders.dino import DinoTower
from dcris.models.segmentation import ReferringSegmenter
from dcris.utils.hub import fetch
from hub import Hub
from models import TINY_CLIP_VISION, TINY_TEXT, TINY_VISION, error, images, randomise, tiny_config, tokens_ending_at
from published import archive_without_program, as_meta, as_openai, hub_clip, hub_dinov2, openai_clip, saved, written

VISION_REPO, TEXT_REPO = "facebook/dinov2-with-registers-base", "openai/clip-vit-base-patch16"
VISION, TEXT = "dinov2-base", "clip-vit-base-patch16"
GIANT = TINY_VISION.model_copy(update={"mlp": "swiglu"})
# Archives in OpenAI's form can only be made by what newer releases of torch advise against.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
TOLERANCE = 2e-5  # of float32 numbers about 1


def vision_tower(shape: VisionConfig = TINY_VISION) -> DinoTower:
    return DinoTower(shape).eval()


def text_tower(shape: TextConfig = TINY_TEXT) -> ClipTextTower:
    return ClipTextTower(shape).eval()


def file_of(folder: Path, name: str, content: bytes) -> str:
    path = folder / name
    path.write_bytes(content)
    return str(path)


@torch.no_grad()
def assert_same_images(tower: DinoTower, oracle: nn.Module) -> None:
    pixels = images(2, 3, 5)
    assert error(tower(pixels), oracle(pixels).last_hidden_state) < TOLERANCE


@torch.no_grad()
def assert_same_phrases(tower: ClipTextTower, oracle: Callable[[Tensor], Tensor]) -> None:
    tokens = tokens_ending_at((2, 5, 3), 7)
    assert error(tower(tokens).sentence, oracle(tokens)) < TOLERANCE


# What each form holds


def dinov3_config(shape: VisionConfig, **more: Any) -> DINOv3ViTConfig:
    """The DINOv3 configuration of transformers."""
    return DINOv3ViTConfig(
        hidden_size=shape.width,
        intermediate_size=4 * shape.width,
        num_hidden_layers=shape.depth,
        num_attention_heads=shape.heads,
        num_register_tokens=shape.registers,
        patch_size=shape.patch,
        **more,
    )


@pytest.mark.parametrize(("rows", "columns"), [(4, 4), (3, 5), (7, 2)])
@torch.no_grad()
def test_dinov3_from_the_hub(hub: Hub, tmp_path: Path, rows: int, columns: int) -> None:
    """DINOv3 has other positions, norms and keys than DINOv2; its features must be correct."""
    shape = VisionConfig(name="dinov3-base", family="dinov3", width=32, depth=3, heads=2, patch=16)
    oracle = DINOv3ViTModel(dinov3_config(shape, image_size=64)).eval()
    randomise(oracle)
    hub.push("facebook/dinov3-vitb16-pretrain-lvd1689m", {"model.safetensors": written(oracle, tmp_path / "m")})
    tower = DinoTower(shape).eval()
    randomise(tower)
    fill_tower(tower, shape.name)
    pixels = torch.randn(2, 3, 16 * rows, 16 * columns, generator=torch.Generator().manual_seed(1))
    expected = oracle(pixels, output_hidden_states=True)
    state = tower.advance(tower.start(pixels), feature_layers=range(shape.depth))
    for ours, theirs in zip(state.layer_outputs, expected.hidden_states[1:], strict=True):
        assert error(ours, theirs) < TOLERANCE
    assert error(tower(pixels), expected.last_hidden_state) < TOLERANCE
    # The numbers are also right in double precision: what is left above is rounding.
    assert error(tower.double()(pixels.double()), oracle.double()(pixels.double()).last_hidden_state) < 1e-6


def test_dinov3_refuses_other_weights(tmp_path: Path) -> None:
    """Weights of another family are refused with one sentence."""
    three = DinoTower(VisionConfig(name="x", family="dinov3", width=32, depth=4, heads=4, patch=16))
    path = tmp_path / "model.safetensors"
    path.write_bytes(written(hub_dinov2(TINY_VISION), tmp_path / "m"))
    with pytest.raises(DcrisError, match="is neither DINOv3 as the Hub has it"):
        fill_tower(three, str(path))
    path.write_bytes(written(DINOv3ViTModel(dinov3_config(three.config, image_size=64)), tmp_path / "n"))
    with pytest.raises(DcrisError, match="it is for another model"):
        fill_tower(vision_tower(), str(path))


@pytest.mark.parametrize("shape", [TINY_VISION, GIANT], ids=["gelu", "swiglu"])
def test_vision_tower_from_the_hub(hub: Hub, tmp_path: Path, shape: VisionConfig) -> None:
    """The features of published DINOv2 weights must be correct."""
    oracle = hub_dinov2(shape)
    commit = hub.push(VISION_REPO, {"model.safetensors": written(oracle, tmp_path / "m")})
    tower = vision_tower(shape)
    fill_tower(tower, VISION)
    assert_same_images(tower, oracle)
    assert tower.source == {"source": f"{VISION_REPO}/model.safetensors", "revision": commit}


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_text_tower_from_the_hub(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    """CLIP's text encoder must be read correctly, without loading its image encoder (three fifths
    of the file)."""
    oracle = hub_clip(TINY_TEXT)
    content = written(oracle, tmp_path / "m")
    if file.endswith(".bin"):  # the old files hold position numbers too
        numbers = {f"{half}_model.embeddings.position_ids": torch.arange(12)[None] for half in ("text", "vision")}
        content = saved({**load(content), **numbers})
    hub.push(TEXT_REPO, {file: content})
    read: list[str] = []

    def spying(path: Path) -> dict[str, StoredTensor]:
        def reader(name: str, stored: StoredTensor) -> StoredTensor:
            return StoredTensor(stored.shape, stored.floating, lambda: read.append(name) or stored.read())

        return {name: reader(name, stored) for name, stored in open_tensors(path).items()}

    monkeypatch.setattr(weights, "open_tensors", spying)
    tower = text_tower()
    fill_tower(tower, TEXT)
    assert_same_phrases(tower, lambda tokens: oracle.get_text_features(tokens).pooler_output)
    assert tower.logit_scale.item() == oracle.logit_scale.item()
    assert read
    assert not [name for name in read if name.startswith(("vision", "visual")) or "position_ids" in name]


@pytest.mark.parametrize("shape", [TINY_VISION, GIANT], ids=["gelu", "swiglu"])
@pytest.mark.parametrize("in_zip", [True, False], ids=["zip", "old"])
def test_vision_tower_from_metas_file(tmp_path: Path, shape: VisionConfig, in_zip: bool) -> None:
    """The file that Meta publishes works without the Hub."""
    oracle = hub_dinov2(shape)
    state = as_meta(load(written(oracle, tmp_path)), shape.depth)
    path = tmp_path / "dinov2_vitb14_reg4_pretrain.pth"
    torch.save(state, path, _use_new_zipfile_serialization=in_zip)
    tower = vision_tower(shape)
    fill_tower(tower, str(path))
    assert_same_images(tower, oracle)
    assert tower.source == {"source": path.name}


def test_clip_vision_tower_from_the_hub(hub: Hub, tmp_path: Path) -> None:
    """CLIP's image encoder gives the published features, with interpolated positions."""
    shape = TINY_CLIP_VISION.model_copy(update={"grid": 5, "published_grid": 3})
    oracle = hub_clip(TINY_TEXT, shape)
    content = written(oracle, tmp_path / "m")
    commit = hub.push(TEXT_REPO, {"model.safetensors": content})
    tower = ClipVisionTower(shape).eval()
    fill_tower(tower, TEXT)
    assert tower.source == {"source": f"{TEXT_REPO}/model.safetensors", "revision": commit}
    (tmp_path / "openai.pt").write_bytes(saved(as_openai(load(content))))
    other = ClipVisionTower(shape).eval()
    fill_tower(other, str(tmp_path / "openai.pt"))
    pixels = torch.randn(2, 3, 5 * shape.patch, 5 * shape.patch, generator=torch.Generator().manual_seed(0))
    expected = oracle.vision_model(pixels, interpolate_pos_encoding=True)
    for each in (tower, other):
        with torch.no_grad():
            assert error(each(pixels)[:, 0], oracle.visual_projection(expected.pooler_output)) < TOLERANCE
        assert error(each.positions[0], oracle.vision_model.embeddings.position_embedding.weight[0]) == 0
    with pytest.raises(DcrisError, match=r"position_embedding.weight .* has the shape \[10, 48\], but .* \[26, 48\]"):
        fill_tower(ClipVisionTower(shape.model_copy(update={"published_grid": None})), TEXT)
    with pytest.raises(DcrisError, match=r"neither DINOv2 .* nor DINOv2 "):
        fill_tower(vision_tower(), str(tmp_path / "openai.pt"))


def test_text_tower_from_openais_archive(tmp_path: Path) -> None:
    """No program in a downloaded file is run: this one is invalid, so running it would fail."""
    oracle = openai_clip(TINY_TEXT)
    path = tmp_path / "ViT-B-16.pt"
    archive_without_program(oracle, path)
    with pytest.raises(RuntimeError):
        torch.jit.load(path)
    tower = text_tower()
    fill_tower(tower, str(path))
    assert {value.dtype for value in tower_state(tower).values()} == {torch.float32}
    assert_same_phrases(tower, oracle)


def test_text_tower_from_openais_state_dict(tmp_path: Path) -> None:
    """State dicts saved from OpenAI's model work."""
    oracle = openai_clip(TINY_TEXT)
    tower = text_tower()
    fill_tower(tower, file_of(tmp_path, "clip.pt", saved(oracle.half().state_dict())))
    assert_same_phrases(tower, oracle.float())


def test_named_towers_have_the_published_sizes() -> None:
    """The published file of a tower name must match that tower."""
    with torch.device("meta"):
        for shape in VISION_TOWERS.values():
            if shape.family == "clip":
                clip = CLIPVisionModelWithProjection(
                    CLIPVisionConfig(
                        hidden_size=shape.width,
                        intermediate_size=4 * shape.width,
                        num_hidden_layers=shape.depth,
                        num_attention_heads=shape.heads,
                        patch_size=shape.patch,
                        projection_dim=shape.projected_width,
                    )
                )
                assert count(ClipVisionTower(shape)) == count(clip)
                continue
            if shape.family == "efficientnet":  # compared with the package in test_towers_from_pypi.py
                continue
            if shape.family == "dinov3":
                ours = count(DinoTower(shape)) - shape.depth * shape.width  # the biases of keys, which are zeros
                assert ours == count(DINOv3ViTModel(dinov3_config(shape, image_size=224)))
                continue
            theirs = HubVision(
                Dinov2WithRegistersConfig(
                    hidden_size=shape.width,
                    num_hidden_layers=shape.depth,
                    num_attention_heads=shape.heads,
                    image_size=518,
                    patch_size=14,
                    use_swiglu_ffn=shape.name == "dinov2-giant",
                )
            )
            assert count(DinoTower(shape)) == count(theirs)
        for shape in TEXT_TOWERS.values():
            if shape.family == "bert":
                continue
            large = shape.name == "clip-vit-large-patch14"
            sizes: dict[str, Any] = (
                {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12} if large else {}
            )
            theirs = CLIPTextModelWithProjection(CLIPTextConfig(**sizes, projection_dim=768 if large else 512))
            assert count(ClipTextTower(shape)) == count(theirs) + 1  # the scale belongs to both halves
    clips = {shape.name for shape in VISION_TOWERS.values() if shape.family == "clip"}
    assert clips == {name for name, shape in TEXT_TOWERS.items() if shape.family == "clip"}
    assert CLIPConfig().text_config.max_position_embeddings == TextConfig().length


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# What does not fit


def _hub_vision(folder: Path) -> dict[str, Tensor]:
    return load(written(hub_dinov2(TINY_VISION), folder))


def _hub_text(folder: Path) -> dict[str, Tensor]:
    return load(written(hub_clip(TINY_TEXT), folder))


FAMILIES: dict[str, tuple[Callable[[], Any], Callable[[Path], dict[str, Tensor]], str]] = {
    "hub dinov2": (vision_tower, _hub_vision, "encoder.layer.2.attention.attention.key.weight"),
    "meta dinov2": (vision_tower, lambda folder: as_meta(_hub_vision(folder), 4), "blocks.2.attn.qkv.weight"),
    "hub clip": (text_tower, _hub_text, "text_projection.weight"),
    "openai clip": (text_tower, lambda folder: openai_clip(TINY_TEXT).state_dict(), "text_projection"),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fault", ["missing", "left over", "another shape", "whole numbers"])
def test_the_first_mismatching_tensor_is_named(tmp_path: Path, family: str, fault: str) -> None:
    """A file for another model is refused, and the first tensor that does not match is named."""
    make, state_of, name = FAMILIES[family]
    state = state_of(tmp_path)
    if fault == "missing":
        del state[name]
        expected = f"no tensor {name};"
    elif fault == "left over":
        state["classifier.weight"] = torch.zeros(2)
        expected = "a tensor classifier.weight that"
    elif fault == "whole numbers":
        state[name] = torch.zeros(state[name].shape, dtype=torch.int8)
        expected = f"tensor {name} of .* has integer values"
    else:
        rows, *rest = state[name].shape
        state[name] = torch.zeros(rows + 3, *rest)
        expected = rf"tensor {name} of .*\[{rows + 3}, .*needs \[{rows}, "
    tower = make()
    before = {key: value.clone() for key, value in tower_state(tower).items()}
    with pytest.raises(DcrisError, match=expected):
        fill_tower(tower, file_of(tmp_path, "weights.pth", saved(state)))
    assert all(torch.equal(value, before[key]) for key, value in tower_state(tower).items())


def test_other_files_are_refused(tmp_path: Path) -> None:
    """Files of other content give one sentence."""
    clip = file_of(tmp_path, "clip.pth", saved(openai_clip(TINY_TEXT).state_dict()))
    with pytest.raises(DcrisError, match=r"neither DINOv2.*embeddings\.cls_token.*nor DINOv2.*cls_token"):
        fill_tower(vision_tower(), clip)
    with pytest.raises(DcrisError, match=r"holds no weights by name; its entries are 'epoch' \(int\)"):
        fill_tower(vision_tower(), file_of(tmp_path, "run.pth", saved({"epoch": 3})))
    with pytest.raises(DcrisError, match="holds a list"):
        fill_tower(vision_tower(), file_of(tmp_path, "list.pth", saved([1])))
    with pytest.raises(DcrisError, match=r"no weights 'dinov3'.*dinov2-small, .*tiny-vision"):
        fill_tower(vision_tower(), "dinov3")


@pytest.mark.parametrize("keep", [0, 5, 500, -40])
@pytest.mark.parametrize("name", ["model.safetensors", "model.pth", "old.pth", "archive.pt"])
def test_truncated_files_are_reported(tmp_path: Path, name: str, keep: int) -> None:
    """A truncated download gives one sentence."""
    path = tmp_path / name
    if name == "archive.pt":
        archive_without_program(openai_clip(TINY_TEXT), path)
    elif name == "model.safetensors":
        path.write_bytes(save(openai_clip(TINY_TEXT).state_dict()))
    else:
        torch.save(openai_clip(TINY_TEXT).state_dict(), path, _use_new_zipfile_serialization=name == "model.pth")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DcrisError, match=rf"{name} cannot be read as weights \(.*\); it may be cut short"):
        fill_tower(text_tower(), str(path))


class Trap:
    """Unpickling it creates a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("kind", ["zip", "old", "archive"])
def test_files_with_code_are_refused(tmp_path: Path, kind: str) -> None:
    """A manipulated file on a mirror must not run code."""
    trace, path = tmp_path / "trace", tmp_path / "pytorch_model.bin"
    state = {**openai_clip(TINY_TEXT).state_dict(), "positional_embedding": Trap(trace)}
    if kind == "archive":
        archive_without_program(openai_clip(TINY_TEXT), tmp_path / "good.pt")
        with zipfile.ZipFile(tmp_path / "good.pt") as good, zipfile.ZipFile(path, "w") as bad:
            for entry in good.infolist():
                harmless = not entry.filename.endswith("/data.pkl")
                bad.writestr(entry.filename, good.read(entry) if harmless else pickle.dumps(Trap(trace), 2))
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(DcrisError, match=r"pytorch_model\.bin tries to run code \(\w+\.mkdir\)"):
        fill_tower(text_tower(), str(path))
    assert not trace.exists()


def test_archives_cannot_read_outside_their_numbers(tmp_path: Path) -> None:
    """A crafted file must not copy memory outside of its numbers into the weights."""
    path = tmp_path / "a.pt"
    archive_without_program(openai_clip(TINY_TEXT), path)
    with zipfile.ZipFile(path) as whole:
        entries = {entry.filename: whole.read(entry) for entry in whole.infolist()}
    largest = max((name for name in entries if "/data/" in name), key=lambda name: len(entries[name]))
    entries[largest] = entries[largest][:-2]
    with zipfile.ZipFile(path, "w") as spoilt:
        for name, content in entries.items():
            spoilt.writestr(name, content)
    with pytest.raises(DcrisError, match="cannot be read as weights"):
        fill_tower(text_tower(), str(path))


# The way from the Hub


@pytest.fixture
def served(hub: Hub) -> Hub:
    """With one repository whose only weights are in a .bin file, so that both names are
    requested."""
    hub.push(VISION_REPO, {"pytorch_model.bin": bytes(range(256)) * 256})
    return hub


FILES = ("model.safetensors", "pytorch_model.bin")


def test_a_cached_file_is_not_downloaded_again(served: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Downloaded weights are cached and work offline."""
    first = fetch(VISION_REPO, "main", FILES)
    assert first.name == "pytorch_model.bin"
    assert first.path.read_bytes() == bytes(range(256)) * 256
    assert served.bodies() == ["pytorch_model.bin"]
    assert fetch(VISION_REPO, "main", FILES) == first
    assert served.bodies() == ["pytorch_model.bin"]
    asked = len(served.requests)
    assert fetch(VISION_REPO, first.commit, FILES) == first
    assert len(served.requests) == asked  # a commit cannot have changed
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch(VISION_REPO, "main", FILES) == first
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    served.stop()
    assert fetch(VISION_REPO, "main", FILES) == first


def test_a_pinned_revision_does_not_change(served: Hub) -> None:
    """A pinned commit does not change when the repository does."""
    old = fetch(VISION_REPO, "main", FILES)
    served.push(VISION_REPO, {"model.safetensors": b"x" * 10, "pytorch_model.bin": b"new" * 100})
    new = fetch(VISION_REPO, "main", FILES)
    assert new.commit != old.commit
    assert fetch(VISION_REPO, old.commit, FILES) == old


def test_an_interrupted_download_is_continued(served: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupted download is continued."""
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    served.cuts = [20_000, 30_000]
    assert fetch(VISION_REPO, "main", FILES).path.read_bytes() == bytes(range(256)) * 256
    ranges = [asked for method, _, asked in served.requests if method == "GET"]
    assert ranges == [None, "bytes=20000-", "bytes=50000-"]


def test_a_failed_download_is_reported(served: Hub, tmp_path: Path) -> None:
    """A truncated download is detected."""
    served.cuts = [0] * 20
    with pytest.raises(DcrisError, match=rf"downloading {VISION_REPO} from {served.url} failed \(.*\); try again"):
        fetch(VISION_REPO, "main", FILES)
    served.cuts = []
    assert fetch(VISION_REPO, "main", FILES).path.stat().st_size == 256 * 256


def test_a_damaged_download_is_deleted(served: Hub) -> None:
    """A damaged download does not stay in the cache."""
    served.damage = True
    with pytest.raises(DcrisError, match=r"pytorch_model\.bin of .* arrived damaged: its SHA-256 is .*try again"):
        fetch(VISION_REPO, "main", FILES)
    served.damage = False
    assert fetch(VISION_REPO, "main", FILES).path.read_bytes() == bytes(range(256)) * 256


def test_a_damaged_header_is_reported(hub: Hub) -> None:
    """A published file that is damaged gives one sentence."""
    hub.push(VISION_REPO, {"model.safetensors": b"\x00" * 100})
    with pytest.raises(
        DcrisError, match=r"model\.safetensors cannot be read as weights .* delete it and download it again"
    ):
        fill_tower(vision_tower(), VISION)


@pytest.mark.parametrize(
    ("repo", "revision", "names", "sentence"),
    [
        ("facebook/nothing", "main", FILES, "no repository facebook/nothing on http.*or it is private"),
        (VISION_REPO, "v9", FILES, f"{VISION_REPO} has no revision v9; use a branch, a tag or a full commit hash"),
        (VISION_REPO, "main", ("a.safetensors", "b.bin"), r"revision main has no file a\.safetensors or b\.bin"),
    ],
    ids=["repository", "revision", "file"],
)
def test_missing_repositories_revisions_and_files(
    served: Hub, repo: str, revision: str, names: tuple[str, ...], sentence: str
) -> None:
    """A typing mistake gives one sentence."""
    with pytest.raises(DcrisError, match=sentence):
        fetch(repo, revision, names)


def test_no_network_and_no_cache(served: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error without a network says what to do."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DcrisError, match=rf"{VISION_REPO} at .* not in the cache .*HF_HUB_OFFLINE.*path of a file"):
        fetch(VISION_REPO, "main", FILES)
    assert not served.requests
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    served.stop()
    with pytest.raises(
        DcrisError, match=rf"not in the cache .*{served.url} cannot be reached \(.*refused.*path of a file"
    ):
        fetch(VISION_REPO, "main", FILES)


@pytest.mark.parametrize(
    ("number", "sentence"),
    [
        (errno.ENOSPC, "is full; free disk space there, or set HF_HOME"),
        (errno.EROFS, "cannot write to the cache .*HF_HOME"),
    ],
)
def test_a_full_disk(served: Hub, monkeypatch: pytest.MonkeyPatch, number: int, sentence: str) -> None:
    """A full disk is reported as such."""

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(file_download, "http_get", refuse)
        with pytest.raises(DcrisError, match=sentence):
            fetch(VISION_REPO, "main", FILES)
    assert fetch(VISION_REPO, "main", FILES).path.is_file()


@pytest.mark.slow
def test_settings_of_the_hub_are_respected(hub: Hub, tmp_path: Path) -> None:
    """HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE are respected."""
    hub.push(VISION_REPO, {"model.safetensors": written(hub_dinov2(TINY_VISION), tmp_path)})
    program = (
        "from dcris.config import VisionConfig; from dcris.models.encoders.dino import DinoTower\n"
        "from dcris.checkpoints.backbones import fill_tower\n"
        f"tower = DinoTower(VisionConfig.model_validate_json('''{TINY_VISION.model_dump_json()}'''))\n"
        f"fill_tower(tower, '{VISION}'); print(tower.source['revision'])"
    )
    settings = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_CACHE": ""}
    settings = {key: value for key, value in settings.items() if value}

    def run(**more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", program]
        return subprocess.run(command, env={**settings, **more}, capture_output=True, text=True, check=False)

    online = run()
    assert online.returncode == 0, online.stderr
    assert hub.bodies() == ["model.safetensors"]
    hub.stop()
    offline = run(HF_HUB_OFFLINE="1")
    assert offline.stdout == online.stdout
    assert list((tmp_path / "home/hub").glob("models--*"))


def test_a_checkpoint_uses_the_commit_it_was_trained_on(hub: Hub, tmp_path: Path) -> None:
    """A checkpoint still loads after the repository of its towers has moved."""
    shapes = {
        "vision": TINY_VISION.model_copy(update={"name": VISION}),
        "text": TINY_TEXT.model_copy(update={"name": TEXT}),
    }
    hub.push(VISION_REPO, {"model.safetensors": written(hub_dinov2(TINY_VISION), tmp_path / "v")})
    hub.push(TEXT_REPO, {"model.safetensors": written(hub_clip(TINY_TEXT), tmp_path / "t")})
    config = RunConfig(recipe="tiny", model=tiny_config(**shapes), data=DataConfig(word_length=12))
    model = ReferringSegmenter(config.model)
    weights.load_towers(model)
    towers = identify_towers(model)
    optimizer = torch.optim.Adam(p for p in model.parameters() if p.requires_grad)
    saved_at = save_checkpoint(tmp_path / "run", model, towers, optimizer, config, 1).path
    hub.push(VISION_REPO, {"model.safetensors": written(hub_dinov2(TINY_VISION, seed=1), tmp_path / "w")})
    shutil.rmtree(tmp_path / "cache")
    again, pinned = load_checkpoint(saved_at)
    assert identify_towers(again) == towers
    assert pinned.model.vision.revision == towers["vision"]["revision"]
    refuse_other_run(config, pinned, saved_at)  # so that a run can go on there too
    moved = ReferringSegmenter(config.model)
    weights.load_towers(moved)
    with pytest.raises(
        DcrisError, match=f"another vision encoder than {VISION} .* revision {towers['vision']['revision']}"
    ):
        load_trained(moved, saved_at)


def test_towers_are_read_again_when_their_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their fingerprint is remembered by file: a checkpoint must still refuse other towers."""
    monkeypatch.setattr("dcris.utils.cache._SETTLED", -(10**12))
    monkeypatch.setenv("DCRIS_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "dino.safetensors"
    path.write_bytes(written(hub_dinov2(TINY_VISION), tmp_path / "v"))
    vision = TINY_VISION.model_copy(update={"name": str(path)})
    text = TINY_TEXT.model_copy(update={"name": "random"})
    config = RunConfig(recipe="tiny", model=tiny_config(vision=vision, text=text), data=DataConfig(word_length=12))
    torch.manual_seed(0)
    model = ReferringSegmenter(config.model)
    weights.load_towers(model)
    save_model(tmp_path / "model", model, identify_towers(model), config, with_towers=True)
    for _ in range(2):
        load_checkpoint(tmp_path / "model")
    towers = tmp_path / "model" / "towers.safetensors"
    content = bytearray(towers.read_bytes())
    content[-1] ^= 1
    with towers.open("r+b") as file:
        file.write(content)
    with pytest.raises(DcrisError, match=r"another (vision|text) encoder"):
        load_checkpoint(tmp_path / "model")
    towers.unlink()  # random weights are nowhere else, so nothing is allocated for them
    with pytest.raises(DcrisError, match=r"has no towers\.safetensors"):
        load_checkpoint(tmp_path / "model")


def test_a_file_of_ones_own_can_be_overwritten_while_it_is_used(hub: Hub, tmp_path: Path) -> None:
    """It is copied. A file of the Hub, which nobody overwrites, is mapped and never written."""
    content = written(hub_dinov2(TINY_VISION), tmp_path / "v")
    path = tmp_path / "dino.safetensors"
    path.write_bytes(content)
    tower = vision_tower()
    fill_tower(tower, str(path))
    before = {name: value.clone() for name, value in tower_state(tower).items()}
    with path.open("r+b") as file:
        file.write(bytes(len(content)))
    assert all(torch.equal(value, before[name]) for name, value in tower_state(tower).items())
    hub.push(VISION_REPO, {"model.safetensors": content})
    cached = fill_tower(tower, VISION)
    assert cached is not None
    assert all(torch.equal(value, before[name]) for name, value in tower_state(tower).items())
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.add_(1)
    assert cached.path.read_bytes() == content


# What other people's checkpoints hold beside the weights, and where they keep them


WEIGHTS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(3)}


def assert_weights(path: Path) -> None:
    found = {name: stored.read() for name, stored in open_tensors(path).items()}
    assert found.keys() == WEIGHTS.keys()
    assert all(torch.equal(value, WEIGHTS[name]) for name, value in found.items())
    assert read_state(path).keys() == WEIGHTS.keys()  # what `dcris convert` reads


@pytest.mark.parametrize("in_zip", [True, False], ids=["zip", "old"])
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_numpy_numbers_beside_the_weights(tmp_path: Path, in_zip: bool, protocol: int) -> None:
    """A checkpoint with numpy numbers in it is not damaged."""
    beside = {
        "best_iou": np.float64(0.7),
        "epoch": np.int64(3),
        "half": np.float16(1),
        "flag": np.bool_(True),
        "kind": np.dtype("float32"),
        "rng": np.random.default_rng(0).integers(9, size=5),
        "objects": np.array([None, "a"], dtype=object),
        "python": [1.5, None, "text", b"bytes", {1, 2}, 2j, bytearray(b"x"), 2**70, (1, [2])],
        "counts": Counter("aab"),
        "lists": defaultdict(list, {"a": [1]}),
        "torch": [torch.float16, torch.Size([1, 2]), torch.device("cpu"), torch.strided],
        "optimizer": {
            "state": {0: {"exp_avg": torch.zeros(2)}},
            "param_groups": [{"lr": np.float32(0.1), "params": [0]}],
        },
    }
    path, content = tmp_path / "best.pth", {**beside, "state_dict": OrderedDict(WEIGHTS)}
    torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=in_zip)
    assert_weights(path)


@pytest.mark.parametrize("module", ["numpy.core.multiarray", "numpy._core.multiarray"])
def test_both_module_names_of_numpy(tmp_path: Path, module: str) -> None:
    """numpy 2 renamed a module that its pickled numbers name; both names work."""
    number = f"c{module}\nscalar\n(cnumpy\ndtype\n(X\2\0\0\0f8K\0K\1tRX\4\0\0\0abcdtR".encode()
    (tmp_path / "best.pth").write_bytes(saved({"best": "@", "state_dict": WEIGHTS}))
    with zipfile.ZipFile(tmp_path / "best.pth") as whole:
        entries = {entry.filename: whole.read(entry) for entry in whole.infolist()}
    with zipfile.ZipFile(tmp_path / "best.pth", "w") as changed:
        for name, content in entries.items():
            changed.writestr(name, content.replace(b"X\1\0\0\0@", number))
    assert_weights(tmp_path / "best.pth")


class Settings:
    """A class of another program."""


@pytest.mark.parametrize("in_zip", [True, False], ids=["zip", "old"])
@pytest.mark.parametrize(
    ("value", "name"),
    [
        (argparse.Namespace(lr=1), "argparse.Namespace"),
        (Path("runs"), r"pathlib\.\w*Path"),
        (Settings(), r"test_weights\.Settings"),
        (nn.Linear(2, 2), r"torch\.nn\.modules\.linear\.Linear"),
        (datetime.date(2024, 1, 1), r"datetime\.date"),
    ],
)
def test_other_objects_beside_the_weights_are_named(tmp_path: Path, value: object, name: str, in_zip: bool) -> None:
    """The error names the object and says what to do."""
    path = tmp_path / "best_refcoco.pth"
    torch.save({"state_dict": WEIGHTS, "args": value}, path, _use_new_zipfile_serialization=in_zip)
    for read in (open_tensors, read_state):
        with pytest.raises(
            DcrisError, match=rf"best_refcoco\.pth holds {name} beside .*torch\.save\(checkpoint"
        ) as caught:
            read(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"model": state},
        lambda state: {"model": state, "optimizer": {"state": {}}, "epoch": 3},
        lambda state: {"state_dict": state, "rng_state": torch.zeros(3), "cuda_rng": torch.zeros(4)},
        lambda state: {"model_state_dict": state},
        lambda state: {"module": state},
        lambda state: {"network": state},
        lambda state: {"ema": state},
        lambda state: {"ema": {"decay": 0.9, "module": state}},
        lambda state: {"model": {"state_dict": state}},
        lambda state: {"student": state, "loss": 0.5},
        lambda state: {f"module.{name}": value for name, value in state.items()},
        lambda state: {"state_dict": {f"_orig_mod.module.{name}": value for name, value in state.items()}},
        lambda state: {"model": {f"module._orig_mod.model.{name}": value for name, value in state.items()}},
        lambda state: {f"model.module.{name}": value for name, value in state.items()},
        lambda state: {name.replace("a.", "a._orig_mod."): value for name, value in state.items()},
        lambda state: {"ema": {"n_averaged": torch.tensor(5)} | {f"module.{name}": state[name] for name in state}},
    ],
)
def test_weights_are_found_in_usual_structures(tmp_path: Path, wrap: Callable[[Any], Any]) -> None:
    """Weights are found in the usual structures of checkpoints."""
    torch.save(wrap(WEIGHTS), tmp_path / "best.pth")
    assert_weights(tmp_path / "best.pth")


def test_choice_among_several_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The choice between trained and averaged weights is fixed and reported."""
    other = {name: value + 1 for name, value in WEIGHTS.items()}
    torch.save({"ema": other, "model": WEIGHTS}, tmp_path / "best.pth")
    assert open_tensors(tmp_path / "best.pth")["b"].read() == 3
    assert "holds weights under model, ema; using model" in capsys.readouterr().err
    torch.save({"teacher": other, "student": WEIGHTS}, tmp_path / "best.pth")
    with pytest.raises(DcrisError, match="several sets of weights, under teacher, student; save the right one alone"):
        open_tensors(tmp_path / "best.pth")
    torch.save({"a": WEIGHTS["b"], "_orig_mod.a": WEIGHTS["b"]}, tmp_path / "best.pth")
    with pytest.raises(DcrisError, match="two tensors of one name"):
        open_tensors(tmp_path / "best.pth")


@pytest.mark.parametrize("in_zip", [True, False], ids=["zip", "old"])
def test_tensors_of_every_kind_and_layout(tmp_path: Path, in_zip: bool) -> None:
    """Transposed tensors, slices and all types keep their values."""
    kinds = [
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
    ]
    kinds += [torch.uint8, torch.bool, torch.complex64]
    state = {str(kind): torch.arange(6).to(kind) for kind in kinds}
    whole = torch.arange(24.0).reshape(4, 6)
    views = {
        "rows": whole[1:3],
        "columns": whole[:, ::2],
        "turned": whole.T,
        "tied": whole,
        "empty": whole[:0],
        "one": whole[2, 2],
    }
    views |= {"repeated": whole[0, 0].expand(3, 4), "parameter": nn.Parameter(whole)}
    if in_zip:
        state |= {str(kind): torch.arange(6).to(kind) for kind in (torch.uint16, torch.float8_e4m3fn)}
    torch.save(state | views, tmp_path / "all.pth", _use_new_zipfile_serialization=in_zip)
    found = open_tensors(tmp_path / "all.pth")
    for name, value in (state | views).items():
        read = found[name].read()
        assert (found[name].shape, found[name].floating) == (tuple(value.shape), value.is_floating_point())
        assert read.dtype == value.dtype
        assert torch.equal(read.to(torch.complex128), value.detach().to(torch.complex128))
    found["rows"].read().zero_()
    assert open_tensors(tmp_path / "all.pth")["rows"].read().any()  # the file stays as it is


# Small files that ask for much


def rezipped(source: Path, path: Path, change: Callable[[str, bytes], bytes], how: int = zipfile.ZIP_STORED) -> Path:
    """Copy a zip file with changed entries."""
    with zipfile.ZipFile(source) as whole:
        entries = {entry.filename: whole.read(entry) for entry in whole.infolist()}
    with zipfile.ZipFile(path, "w", how) as changed:
        for name, content in entries.items():
            changed.writestr(name, change(name, content))
    return path


def replaced(end: str, content: bytes) -> Callable[[str, bytes], bytes]:
    return lambda name, old: content if name.endswith(end) else old


class Tensor2:
    """Pickle a tensor of any shape on the first storage."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return torch._utils._rebuild_tensor_v2, self.arguments


class Pointing(pickle.Pickler):
    """Pickles "@" as torch pickles a storage: as a reference to numbers elsewhere."""

    def persistent_id(self, value: object) -> object:
        return ("storage", torch.FloatStorage, "0", "cpu", 6) if value == "@" else None


def pointing(content: object) -> bytes:
    stream = io.BytesIO()
    Pointing(stream, 2).dump(content)
    return stream.getvalue()


def tensor(offset: object, shape: object, stride: object, storage: object = "@") -> bytes:
    return pointing({"a": Tensor2(storage, offset, shape, stride, False, {})})


@pytest.mark.parametrize("kind", ["zip", "archive"])
@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x02Nr" + (2**29).to_bytes(4, "little") + b".",
        b"\x80\x02(" + b"]" * 2_000_000 + b"l.",
        b"\x80\x02(" + b"\x8f" * 2_000_000 + b"l.",
        b"\x80\x04\x8e" + (2**33).to_bytes(8, "little") + b".",
        b"\x80\x02c__builtin__\nbytearray\n\x8a\x05\0\0\0\0\1\x85R.",
        b"\x80\x02ctorch\nFloatTensor\nJ\0\0\0\x40\x85R.",
        tensor(0, (10**10,), (0,)),
        tensor(0, (10**5, 10**5), (1, 1)),
        tensor(0, (7,), (1,)),
        tensor(1, (6,), (1,)),
        tensor(-1, (6,), (1,)),
        tensor(0, (2,), (-1,)),
        tensor(0, (2, 3), (3,)),
        tensor(0, (10**30,), (0,)),
        tensor(10**30, (1,), (1,)),
        tensor(0, [6], [1]),
        tensor("x", (6,), (1,)),
        tensor(0, (True,), (1,)),
        tensor(0, (6,), (1,), "no storage"),
    ],
    ids=lambda data: f"{len(data)} bytes",
)
def test_small_files_that_claim_much_memory_are_refused(tmp_path: Path, data: bytes, kind: str) -> None:
    """300 bytes took 4 GB: sizes in a pickle are checked against the file before memory is
    allocated."""
    torch.save({"a": torch.zeros(6)}, tmp_path / "good.pth")
    path = rezipped(tmp_path / "good.pth", tmp_path / "bad.pth", replaced("data.pkl", data))
    if kind == "archive":
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("good/constants.pkl", b"\x80\x02).")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DcrisError) as caught:
        fill_tower(text_tower(), str(path))
    assert "\n" not in str(caught.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000  # KiB
    assert kind == "archive" or "bad.pth" in str(caught.value)


@pytest.mark.parametrize("start", [b"", b"PK\3\4", b"\x80\2"])
def test_a_huge_file_is_not_mapped_before_it_is_recognised(tmp_path: Path, start: bytes) -> None:
    """Any file may be given, and under a limit on the address space mapping 20 GB fails as if the
    memory had run out.
    """
    path = tmp_path / "weights.pth"
    path.write_bytes(start)
    os.truncate(path, 20_000_000_000)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (4 << 30), hard))
    try:
        with pytest.raises(DcrisError, match="cannot be read as weights"):
            open_tensors(path)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.parametrize("entry", ["data.pkl", "data/0"])
def test_a_zip_bomb_is_not_unpacked(tmp_path: Path, entry: str) -> None:
    """1.5 MB that unpack to 1.5 GB; torch never compresses."""
    torch.save({"a": torch.zeros(6)}, tmp_path / "good.pth")
    change = replaced(entry, bytes(20_000_000))
    path = rezipped(tmp_path / "good.pth", tmp_path / "bad.pth", change, zipfile.ZIP_DEFLATED)
    with pytest.raises(DcrisError, match=r"bad\.pth cannot be read as weights \(its entry .* is compressed\)"):
        open_tensors(path)


def test_endlessly_nested_modules(tmp_path: Path) -> None:
    """Thirty modules that each contain the next one twice have a billion names; a module may
    contain itself."""
    torch.save({"a": torch.zeros(6)}, tmp_path / "good.pth")
    new = b"c__torch__\nM\n)\x81"
    twice = b"".join(new + b"q%c" % n + b"}(X\1\0\0\0ah%cX\1\0\0\0bh%cub" % (n - 1, n - 1) for n in range(2, 32))
    itself = new + b"q\0}X\1\0\0\0ah\0sb."
    for data in (b"\x80\x02" + new + b"q\1" + twice + b".", b"\x80\x02" + itself):
        path = rezipped(tmp_path / "good.pth", tmp_path / "bad.pth", replaced("data.pkl", data))
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("good/constants.pkl", b"\x80\x02).")
        with pytest.raises(DcrisError, match="are nested too deeply"):
            open_tensors(path)


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_pipes_folders_and_devices_are_reported(tmp_path: Path, kind: str, name: str) -> None:
    """A pipe would block forever, and /dev/zero would fill the memory."""
    path = tmp_path / name
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(DcrisError, match=rf"cannot read .*{name}: it is a {kind}, not a"):
        open_tensors(path)
