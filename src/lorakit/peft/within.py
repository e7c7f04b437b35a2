"""What programs import from modules within PEFT, such as `peft.utils.other`: names of files, devices, and wrapping for FSDP."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lorakit.files.bundle import CONFIG as CONFIG_NAME
from lorakit.files.formats import FORMATS

WEIGHTS_NAME = "adapter_model.bin"
SAFETENSORS_WEIGHTS_NAME = "adapter_model.safetensors"
INCLUDE_LINEAR_LAYERS_SHORTHAND = "all-linear"
DUMMY_MODEL_CONFIG = {"model_type": "custom"}
PEFT_TYPE_TO_PREFIX_MAPPING = {
    row.peft: {"ADALORA": "lora_", "LOHA": "hada_", "VERA": "vera_lambda_"}.get(row.peft, f"{row.peft.lower()}_")
    for row in FORMATS.values()
    if row.peft is not None
}
"""PEFT type -> what the names of its tensors start with."""


def infer_device() -> str:
    """The kind of device that torch finds first."""
    kinds = {"cuda": torch.cuda, "mps": torch.mps, "xpu": torch.xpu}
    return next((kind for kind, own in kinds.items() if own.is_available()), "cpu")


def _get_submodules(model: nn.Module, key: str) -> tuple[nn.Module, nn.Module, str]:
    """The module that holds a module, the module, and its name there."""
    parent, _, name = key.rpartition(".")
    return model.get_submodule(parent), model.get_submodule(key), name


@contextmanager
def disable_input_dtype_casting(model: nn.Module, active: bool = True) -> Iterator[None]:
    """Nothing to switch off: the input keeps its dtype up to the base layer, and only the adapter's own path casts it."""
    yield


def fsdp_auto_wrap_policy(model: nn.Module) -> Callable[..., bool]:
    """FSDP's wrapping of the model's own blocks, and of trained leaves apart from frozen ones."""
    from accelerate.utils.dataclasses import get_module_class_from_name
    from torch.distributed.fsdp.wrap import _or_policy, lambda_auto_wrap_policy, transformer_auto_wrap_policy

    blocks = {name for one in model.modules() for name in getattr(one, "_no_split_modules", None) or ()}
    names = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP", ",".join(blocks)).split(",")
    classes = {get_module_class_from_name(model, name) for name in names if name}
    if None in classes:
        raise TypeError("fsdp_auto_wrap_policy: could not find the transformer layer class to wrap in the model.")

    def trained_leaf(module: Any) -> bool:
        own = list(module.parameters(recurse=False))
        return bool(own) and not list(module.children()) and all(one.requires_grad for one in own)

    return functools.partial(
        _or_policy,
        policies=[
            functools.partial(lambda_auto_wrap_policy, lambda_fn=trained_leaf),
            functools.partial(transformer_auto_wrap_policy, transformer_layer_cls=classes),
        ],
    )


__all__ = [
    "CONFIG_NAME",
    "DUMMY_MODEL_CONFIG",
    "INCLUDE_LINEAR_LAYERS_SHORTHAND",
    "PEFT_TYPE_TO_PREFIX_MAPPING",
    "SAFETENSORS_WEIGHTS_NAME",
    "WEIGHTS_NAME",
    "_get_submodules",
    "disable_input_dtype_casting",
    "fsdp_auto_wrap_policy",
    "infer_device",
]
