"""A quantised base as a float model: every quantised layer becomes the plain layer that it stands for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.core.layer import Adapted
from lorakit.core.layout import Embedding, Linear
from lorakit.core.sites import adaptable_sites, sites_of
from lorakit.core.storage import FLOAT, storage_of

_MARKS = ("hf_quantizer", "quantization_method", "is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit")
"""Where transformers notes on a model that it is quantised."""


def float_layer(layer: nn.Module, dtype: torch.dtype, values: Mapping[str, Tensor] | None = None) -> nn.Module:
    """A float layer that computes what this packed one does, with `values` (by tensor name) in place of its own."""
    (site,) = sites_of(layer)
    given = values or {}
    weight = given.get(site.weight)
    if weight is None:
        weight = storage_of(layer, site.weight).read(layer, site.weight)
    bias = None if site.bias is None else given.get(site.bias, getattr(layer, site.bias))
    out, width = weight.shape
    with torch.device("meta"):
        made = (
            nn.Embedding(out, width) if isinstance(site.layout, Embedding) else nn.Linear(width, out, bias is not None)
        )
    made.weight = nn.Parameter(weight.detach().to(dtype), requires_grad=False)
    if isinstance(made, nn.Linear) and bias is not None:
        made.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=False)
    return made.train(layer.training)


def is_packed(module: nn.Module) -> bool:
    """Whether a layer holds its one matrix quantised."""
    sites = adaptable_sites(module)
    return (
        len(sites) == 1
        and isinstance(sites[0].layout, Linear | Embedding)
        and storage_of(module, sites[0].weight) is not FLOAT
    )


def unpack(model: nn.Module, dtype: torch.dtype) -> None:
    """Turn the packed layers of a model that are left into float ones, and forget that it was quantised."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and not isinstance(child, Adapted) and is_packed(child):
                made = float_layer(child, dtype)
                if isinstance(parent, Adapted):
                    parent.base = made
                else:
                    parent._modules[name] = made
    forget_quantised(model)


def forget_quantised(model: nn.Module) -> None:
    """Take off a model whose weights are floats what transformers reads that it is quantised by: on the model itself
    (save_pretrained, to, Trainer) and on its configuration (saved, and believed by the next load)."""
    for mark in _MARKS:
        with contextlib.suppress(AttributeError):
            delattr(model, mark)
    config = getattr(model, "config", None)
    configs: tuple[Any, ...] = (config, getattr(config, "text_config", None))
    for one in configs:
        if getattr(one, "quantization_config", None) is not None:
            del one.quantization_config


def cast_parameters(model: nn.Module, dtype: torch.dtype, but: Iterable[Tensor]) -> None:
    """The base's float parameters in another dtype; buffers (rotary frequencies) and the tensors `but` stay as they are."""
    kept = {id(tensor) for tensor in but}
    for parameter in model.parameters():
        if parameter.is_floating_point() and id(parameter) not in kept:
            parameter.data = parameter.data.to(dtype)
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "dtype"):
        config.dtype = dtype
