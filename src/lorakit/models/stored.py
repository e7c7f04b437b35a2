"""What a base model says of itself before its weights are loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from lorakit.errors import LorakitError
from lorakit.models import hub
from lorakit.models.loading import find_local


def stored_config(base: str) -> Any:
    """The transformers configuration of a base model; None for a GGUF file, which has none of its own."""
    place = find_local(base)
    if place is not None and not (place / "config.json").exists():
        return None
    return read_config(str(place) if place is not None else hub.find_on_hub(hub.snapshot(base, weights=False), {}))


def read_config(where: str | Path) -> Any:
    """transformers' configuration in a folder.

    Raises:
        LorakitError: it is no JSON, or of a model that this version of transformers does not know.
        OSError: it cannot be read.
    """
    try:
        return transformers.AutoConfig.from_pretrained(hub.snapshot(str(where), weights=False))
    except (ValueError, TypeError, KeyError, AttributeError) as problem:
        raise LorakitError(
            f"{where}: config.json is not one that transformers {transformers.__version__} reads "
            f"({(str(problem) or type(problem).__name__).splitlines()[0]})."
        ) from problem


def stored_dtype(base: str) -> torch.dtype:
    """The dtype that a base model is stored in; bf16 for a GGUF file, whose weights have none of torch's."""
    config = stored_config(base)
    if config is None:
        return torch.bfloat16
    return config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32


def skeleton(where: str | Path, guess: bool = False) -> nn.Module:
    """The model of a configuration on the meta device, which costs no memory and no weights.

    Args:
        where: a folder with config.json, or a name on the hub.
        guess: take transformers' class for the configuration where the named architecture is none of transformers'.

    Raises:
        LorakitError: the architecture is none of transformers', or its configuration is none.
        OSError: the configuration cannot be read.
    """
    config = read_config(where)
    names = getattr(config, "architectures", None) or [None]
    kind = getattr(transformers, names[0] or "", None)
    if kind is None and guess:  # a class of the user's own, or a configuration that nobody has saved with its model
        causal = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
        kind = (transformers.AutoModelForCausalLM if causal else transformers.AutoModel).from_config
    if kind is None:
        raise LorakitError(
            f"{where}: config.json names the architecture {names[0]!r}, which transformers {transformers.__version__} does not "
            "have."
        )
    with torch.device("meta"):
        model: nn.Module = kind(config)
    return model.eval()
