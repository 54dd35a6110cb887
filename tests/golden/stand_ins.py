"""What the scripts beside this file put in the place of files and packages that published code asks for and does not need."""

import sys
import types
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn


def stub_modules(modules: Mapping[str, Mapping[str, Any]]) -> None:
    """Let modules be imported that hold nothing but what is given; those they lie in come first."""
    for name, content in modules.items():
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__dict__.update(content)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, sys.modules[name])


def stand_in_for_clip(clip: Any, width: int, text: int) -> None:
    """Have `clip`, a published model.clip, find a CLIP file of zeros: its sizes are read off it, and nothing else is."""
    state = {
        "visual.proj": torch.zeros(1),
        "visual.conv1.weight": torch.zeros(width, 3, 16, 16),
        "visual.positional_embedding": torch.zeros(197, width),
        **{f"visual.transformer.resblocks.{layer}.attn.in_proj_weight": torch.zeros(1) for layer in range(12)},
        "positional_embedding": torch.zeros(77, text),
        "ln_final.weight": torch.zeros(text),
        "text_projection": torch.zeros(text, text),
        "token_embedding.weight": torch.zeros(49408, text),
        **{f"transformer.resblocks.{layer}.any": torch.zeros(1) for layer in range(12)},
    }
    archive = SimpleNamespace(eval=lambda: SimpleNamespace(state_dict=lambda: state))
    torch.jit.load = lambda *_, **__: archive
    clip.CLIP.load_state_dict = lambda self, state, strict: None


def in_double(network: nn.Module, clip: Any) -> None:
    """Turn a network to double precision, in its layer norms, too: CLIP's go through float32."""
    clip.LayerNorm.forward = nn.LayerNorm.forward
    network.double()
