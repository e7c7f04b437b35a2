"""Where layers sit in a model: an adapted layer takes its base's place under every name that this has, and gives it back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import nn

from lorakit.core.known import read_by
from lorakit.core.layer import Adapted
from lorakit.core.layout import Site
from lorakit.core.state import ModelState

Parents = dict[int, list[tuple[nn.Module, str]]]
"""A module's identity -> the parents and attributes that refer to it (a shared layer has several)."""


def parents_of(model: nn.Module) -> Parents:
    """The parents of all modules, an adapted layer taken as one."""
    parents: Parents = {}
    for parent in model.modules():
        if not isinstance(parent, Adapted):
            for name, child in parent._modules.items():
                parents.setdefault(id(child), []).append((parent, name))
    return parents


def replace_module(module: nn.Module, instead_of: nn.Module, parents: Parents) -> None:
    """Put a module wherever another one sits, in plain lists of its parents too, from which some models call their layers."""
    for parent, name in parents[id(instead_of)]:
        parent._modules[name] = module
        for held in vars(parent).values():
            if type(held) is list:
                held[:] = [module if one is instead_of else one for one in held]


def adapt(path: str, module: nn.Module, sites: list[Site], state: ModelState, parents: Parents) -> Adapted:
    """A new adapted layer, in the place of its base."""
    layer = Adapted(module, sites, state, path)
    if any(isinstance(parent, nn.TransformerEncoderLayer) for parent, _ in parents[id(module)]):
        # Torch's fused encoder reads its layers' weights and never calls them, unless a hook is registered.
        layer.register_forward_hook(_keep_call)
    owners = [(read_by(type(parent)), name) for parent, name in parents[id(module)]]
    layer.read = frozenset(own for own in ("weight", "bias") if any(f"{name}.{own}" in known for known, name in owners))
    replace_module(layer, module, parents)
    return layer


def _keep_call(module: nn.Module, args: Any, output: Any) -> None:
    """A forward hook that does nothing; its presence keeps torch's fused encoder away."""


def adapted_at(state: ModelState | None, path: str) -> Adapted | None:
    """The adapted layer of a path, if any adapter has made one."""
    for adapter in state.adapters.values() if state is not None else ():
        if path in adapter.layers:
            return cast(Adapted, adapter.layers[path])
    return None


def ties(modules: Mapping[str, nn.Module]) -> dict[str, list[str]]:
    """Path -> paths of other modules that hold one of the same parameters, for the modules that share any."""
    owners: dict[int, list[str]] = {}
    for path, module in modules.items():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(path)
    shared: dict[str, list[str]] = {}
    for paths in owners.values():
        for path in paths if len(paths) > 1 else ():
            others = [other for other in paths if other != path]
            shared[path] = list(dict.fromkeys(shared.get(path, []) + others))
    return shared
