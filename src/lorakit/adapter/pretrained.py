"""What transformers' own methods do on a model with adapters: `save_pretrained` and `resize_token_embeddings`.

A model that has adapters is still saved as its base, under the base's own names, and each adapter as a folder in PEFT's form
beside it. In a Trainer's checkpoint the tensors of an adapter that is trained are in the model's file too, behind names that
the base has not (`from_pretrained` passes over them), since a Trainer resumes from that file alone. The two methods are set
on the model object with the first adapter and taken off with the last; a copy or a pickle of the model has them for itself.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from torch import nn

from lorakit.adapter.adapter import Adapter, adapters
from lorakit.core.contents import OWN
from lorakit.core.state import state_of
from lorakit.core.walking import AdapterModules, walk
from lorakit.errors import LorakitError

log = logging.getLogger("lorakit")


class SavePretrained:
    """`model.save_pretrained` while adapters are on the model."""

    name = "save_pretrained"

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """Write the base as transformers does, and every adapter into a folder of its name below.

        An adapter that its method has no file format for is named in the log. LorakitError where an adapter is merged just
        now, since the file would not hold the base.
        """
        model, state = self.model, state_of(self.model)
        if state.merged:
            raise LorakitError(
                f"save_pretrained: adapter {sorted(state.merged)[0]!r} is merged into the weights just now; leave `merged` "
                "first, or lk.merge for good and save then."
            )
        on = adapters(model)
        checkpoint = "state_dict" in kwargs  # how Trainer calls it, with None too; nobody else has a reason to
        trained = any(parameter.requires_grad for adapter in on.values() for parameter in adapter.parameters())
        if checkpoint and trained:
            kwargs.setdefault("save_original_format", False)  # a run resumes by the names that the model has now
        elif kwargs.get("state_dict") is not None:
            kwargs["state_dict"] = {key: tensor for key, tensor in kwargs["state_dict"].items() if not is_ours(key)}
        with _written(model, alone=not (checkpoint and trained)):
            result = cast(Any, type(model)).save_pretrained(model, save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            for adapter in on.values():
                _save(adapter, Path(save_directory) / adapter.name)
        return result


def _save(adapter: Adapter, folder: Path) -> None:
    try:
        adapter.save(folder)
    except LorakitError as problem:
        log.warning("save_pretrained: adapter %r is not written: %s", adapter.name, problem)


def is_ours(key: str) -> bool:
    """Whether a key of a model's state dict is of an adapter."""
    return f".{OWN}" in key or key.startswith((OWN, "lorakit_"))


@contextmanager
def _written(model: nn.Module, alone: bool) -> Iterator[None]:
    """Within the block transformers sees the model without what lorakit has set on it; `alone`, without adapters' tensors."""
    state = state_of(model)
    ours = (
        {name: module for name, module in model._modules.items() if isinstance(module, AdapterModules)} if alone else {}
    )
    for name in ours:
        del model._modules[name]
    state.base_alone = alone
    try:
        yield
    finally:
        state.base_alone = False
        model._modules.update(ours)


class ResizeTokenEmbeddings:
    """`model.resize_token_embeddings` while adapters are on the model."""

    name = "resize_token_embeddings"

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> Any:
        """Give the base's embeddings another size; LorakitError where an adapter has tensors of the present size.

        Those would have to grow with them, by rows that nobody has trained or asked for.
        """
        model = cast(Any, self.model)
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            for name, adapter in adapters(model).items() if new_num_tokens is not None or args or kwargs else ():
                path = next((path for path, own in adapter.layers.items() if layer is own or layer is own.base), None)
                inside = next((one for one in adapter.saved if self._within(layer, one)), None)
                if path is not None or inside is not None:
                    raise LorakitError(
                        f"resize_token_embeddings: adapter {name!r} has tensors of the size of {path or inside}, which is to "
                        f"be resized. Resize first and attach afterwards; or lk.merge, or lk.detach(model, {name!r}), before."
                    )
        return type(model).resize_token_embeddings(model, new_num_tokens, *args, **kwargs)

    def _within(self, layer: Any, whole: str) -> bool:
        return any(module is layer for path, module in walk(self.model) if path.startswith(f"{whole}."))


_METHODS = (SavePretrained, ResizeTokenEmbeddings)


def take_over(model: nn.Module) -> None:
    """Set the methods on a model of transformers that has its first adapter."""
    for method in _METHODS:
        if callable(getattr(type(model), method.name, None)):
            object.__setattr__(model, method.name, method(model))


def give_back(model: nn.Module) -> None:
    """Take them off."""
    for method in _METHODS:
        model.__dict__.pop(method.name, None)


# -- tensors of an adapter that no layer holds -----------------------------------------------------------------------------

SHARED = "lorakit_deltas"
"""The module of a model in which pools and routers live, so that its `parameters()`, `to` and `state_dict` reach them."""


class Shared(AdapterModules):
    """Adapter -> its pool and its router."""

    def forward(self, x: Any) -> Any:
        """What it is given: a model that is an nn.Sequential calls all of its children."""
        return x


def share(adapter: Adapter) -> None:
    """Make an adapter's pool and router part of its model, where they hold anything."""
    held = {"pool": adapter.pool, "router": adapter.router}
    own = {
        name: module
        for name, module in held.items()
        if module is not None and (any(True for _ in module.parameters()) or any(True for _ in module.buffers()))
    }
    if own:
        model = adapter.model
        holder = model._modules.setdefault(SHARED, Shared())
        cast(Shared, holder)._modules[adapter.name] = nn.ModuleDict(own)


def unshare(model: nn.Module, name: str) -> None:
    """Take them off; with the last one nothing is left on the model."""
    holder = model._modules.get(SHARED)
    if holder is not None:
        holder._modules.pop(name, None)
        if not holder._modules:
            del model._modules[SHARED]
