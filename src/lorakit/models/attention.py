"""The one door to transformers' attention functions.

transformers calls attention by a name in a model's configuration, looked up in a registry of functions. An `Override` registers
a function over the one that a model has and names it in every configuration of that model. Overrides stack: an adapter's
keys and values, a packed training batch, a server's cache. Taking one off leaves the others as they are.
"""

from __future__ import annotations

import contextlib
import contextvars
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

Function = Callable[..., Any]

_PREFIX, _OVER = "lorakit_", "_over_"


@dataclass(frozen=True)
class Override:
    """A function over a model's attention.

    Attributes:
        name: tells overrides apart.
        attention: called as `attention(inner, module, query, key, value, attention_mask, **kwargs)` instead of the model's
            attention function, which is `inner(module, query, ...)`.
        mask: called as `mask(inner, *args, **kwargs)` instead of the model's mask function; None leaves masks as they are.
    """

    name: str
    attention: Function
    mask: Function | None = None

    def put_on(self, model: nn.Module) -> bool:
        """Call `attention` from now on; False where no configuration was changed, since none has attention or all have this
        override already."""
        changed = False
        for config in configurations(model):
            original, names = _split(config)
            if self.name not in names:
                _OVERRIDES[self.name] = self
                _set(config, original, [*names, self.name])
                changed = True
        return changed

    def take_off(self, model: nn.Module) -> None:
        """Call what the model had before, with the other overrides that it has."""
        for config in configurations(model):
            original, names = _split(config)
            if self.name in names:
                _set(config, original, [name for name in names if name != self.name])

    def is_on(self, model: nn.Module) -> bool:
        """Has the model this override?"""
        return any(self.name in _split(config)[1] for config in configurations(model))


_OVERRIDES: dict[str, Override] = {}


_unsearched: contextvars.ContextVar[bool] = contextvars.ContextVar("lorakit_unsearched", default=False)


@contextlib.contextmanager
def no_search_for_texts() -> Iterator[None]:
    """Within, transformers does not look through position ids for several texts in one row: whoever calls knows where they
    are, and looking makes the host wait for the device at every forward."""
    from transformers import masking_utils

    search = getattr(masking_utils, "find_packed_sequence_indices", None)
    if search is not None and not isinstance(search, partial):
        masking_utils.find_packed_sequence_indices = partial(_search, search)
    token = _unsearched.set(True)
    try:
        yield
    finally:
        _unsearched.reset(token)


def _search(original: Function, position_ids: Any) -> Any:
    return None if _unsearched.get() else original(position_ids)


def register(name: str, function: Function) -> None:
    """Let a configuration name `function` as its attention."""
    from transformers import AttentionInterface

    AttentionInterface.register(name, function)


def configurations(model: nn.Module) -> list[Any]:
    """Every distinct configuration in a model: its own, its parts', and the sub-configurations of these."""
    found: dict[int, Any] = {}
    waiting: list[Any] = [module.config for module in model.modules() if hasattr(module, "config")]
    while waiting:
        config = waiting.pop()
        if id(config) in found or not hasattr(config, "_attn_implementation_internal"):
            continue
        found[id(config)] = config
        waiting += [getattr(config, name, None) for name in getattr(config, "sub_configs", {})]
    return list(found.values())


def _split(config: Any) -> tuple[str | None, list[str]]:
    """The attention that a configuration had at first, and the names of the overrides, the innermost first."""
    original = config._attn_implementation_internal or ""
    names: list[str] = []
    while (name := original.partition(_OVER)[0].removeprefix(_PREFIX)) in _OVERRIDES:
        names.insert(0, name)
        original = original.partition(_OVER)[2]
    return original or None, names


def _set(config: Any, original: str | None, names: list[str]) -> None:
    """Name the overrides over `original` in a configuration; each stack of them is registered under a name of its own."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

    below = original or "eager"
    for name in names:
        own, over = f"{_PREFIX}{name}{_OVER}{below}", _OVERRIDES[name]
        register(own, partial(over.attention, partial(_attention, below)))
        if over.mask is not None:
            AttentionMaskInterface.register(own, partial(over.mask, partial(_mask, below)))
        elif below in ALL_MASK_ATTENTION_FUNCTIONS.valid_keys():
            AttentionMaskInterface.register(own, ALL_MASK_ATTENTION_FUNCTIONS[below])
        below = own
    config._attn_implementation_internal = below if names else original


def _attention(below: str, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The attention function registered under a name; a module's own "eager" one stands in its modelling file."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(below, eager)(module, *args, **kwargs)


def _mask(below: str, *args: Any, **kwargs: Any) -> Any:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    return ALL_MASK_ATTENTION_FUNCTIONS[below](*args, **kwargs)
