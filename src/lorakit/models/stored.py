"""What a base model says of itself before its weights are loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from lorakit.errors import LorakitError, first_line
from lorakit.models import hub
from lorakit.models.loading import find_local
from lorakit.reading import read_json


def stored_config(base: str) -> Any:
    """The transformers configuration of a base model; None for a GGUF file, which has none of its own."""
    place = find_local(base)
    if place is not None and not (place / "config.json").exists():
        return None
    return read_config(str(place) if place is not None else hub.find_on_hub(hub.snapshot(base, weights=False), {}))


def read_config(where: str | Path) -> Any:
    """transformers' configuration in a folder.

    Raises:
        LorakitError: it cannot be read, is no JSON, or of a model that this version of transformers does not know.
    """
    try:
        return transformers.AutoConfig.from_pretrained(hub.snapshot(str(where), weights=False))
    except OSError as problem:
        if isinstance(where, Path) or Path(where).is_dir():
            read_json(Path(where) / "config.json", "load model")  # says what is wrong with it, if that is it
        raise LorakitError(f'load model: "{where}" has no configuration ({first_line(problem)}).') from problem
    except (
        Exception
    ) as problem:  # a configuration may hold anything, and each of transformers' classes refuses in its way
        raise LorakitError(
            f'load model: the config.json of "{where}" is not one that transformers {transformers.__version__} reads '
            f"({first_line(problem)})."
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


def outline(where: str | Path, loader: str) -> nn.Module:
    """The model that a class of transformers' (`AutoModelForCausalLM`, ...) will load from a place, on the meta device.

    Raises:
        LorakitError: its configuration is none, or makes no such model.
    """
    return on_meta(read_config(where), loader, where).eval()


def on_meta(config: Any, loader: str, where: str | Path, **options: Any) -> nn.Module:
    """The model that a class of transformers' makes of a configuration, on the meta device; `where` names it in the error."""
    try:
        with torch.device("meta"):
            model: nn.Module = getattr(transformers, loader).from_config(config, **options)
    except Exception as problem:  # a configuration is made of any values, and so are the errors that they lead to
        raise LorakitError(
            f'load model: the config.json of "{where}" describes no model that transformers\' {loader} can make '
            f"({first_line(problem)})."
        ) from problem
    return model
