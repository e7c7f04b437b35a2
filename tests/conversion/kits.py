"""Small models of the kinds that other tools adapt, and what an adapter folder changes in them."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaForCausalLM

import lorakit as lk

CLIP = {
    "vocab_size": 40,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@cache
def unet() -> nn.Module:
    """The one UNet that tests share; it is bare between them."""
    return fresh_unet()


def fresh_unet() -> nn.Module:
    """A UNet of Stable Diffusion's build: attention, residual blocks, a sampler down and one up."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=4,
    ).eval()


@cache
def clip() -> nn.Module:
    """The one text encoder that tests share."""
    return fresh_clip()


def fresh_clip() -> nn.Module:
    """A text encoder of Stable Diffusion."""
    torch.manual_seed(1)
    return CLIPTextModel(CLIPTextConfig(**CLIP)).eval()


@cache
def llama(**changes: Any) -> LlamaForCausalLM:
    """The one language model of these sizes that tests share."""
    return fresh_llama(**changes)


def fresh_llama(**changes: Any) -> LlamaForCausalLM:
    """A language model with grouped heads, every size another."""
    torch.manual_seed(2)
    values = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 44,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    }
    return LlamaForCausalLM(LlamaConfig(**{**values, **changes})).eval()


def random(seed: int, *size: int) -> Tensor:
    """Numbers of a size that training would give."""
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)) * 0.2


def changes(model: nn.Module, folder: Path) -> dict[str, Tensor]:
    """Layer -> what the adapter of a folder adds to its weight, in the weight's own shape."""
    adapter = lk.load(model, folder, name="converted")
    found = {}
    with torch.no_grad():
        for path, site, delta in adapter.deltas():
            W = adapter.layers[path].base.get_parameter(site.weight)
            found[path] = site.layout.weight(delta.dense(site.layout.matrix(W)), W)
    lk.detach(model)
    return found


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same layers, each with the same change to rounding."""
    assert sorted(found) == sorted(expected)
    for path, value in expected.items():
        torch.testing.assert_close(found[path], value, rtol=1e-5, atol=1e-6, msg=lambda m, p=path: f"{p}: {m}")


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    """A safetensors file, its tensors contiguous."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata=metadata)
    return path


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A safetensors file's tensors and metadata."""
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118


def equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same names and the same bits."""
    assert sorted(found) == sorted(expected)
    for key, value in expected.items():
        assert found[key].shape == value.shape, key
        assert torch.equal(found[key].double(), value.double()), key


def trained(model: nn.Module, method: Any, folder: Path, seed: int = 0, **options: Any) -> Path:
    """An adapter with random numbers on a model, saved as a folder; the model is bare again."""
    adapter = lk.attach(model, method, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    adapter.save(folder)
    lk.detach(model)
    return folder
