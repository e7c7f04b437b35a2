"""Where layers sit in a model: an adapted layer takes its base's place under every name that this has, and gives it back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from lorakit.board import Board
from lorakit.layer import Adapted
from lorakit.layout import Site

Seats = dict[int, list[tuple[nn.Module, str]]]
"""A module's identity -> the parents and attributes that refer to it (a shared layer has several)."""


def seats_of(model: nn.Module) -> Seats:
    """The seats of all modules, an adapted layer taken as one."""
    seats: Seats = {}
    for parent in model.modules():
        if not isinstance(parent, Adapted):
            for name, child in parent._modules.items():
                seats.setdefault(id(child), []).append((parent, name))
    return seats


def seat(module: nn.Module, instead_of: nn.Module, seats: Seats) -> None:
    """Put a module wherever another one sits."""
    for parent, name in seats[id(instead_of)]:
        parent._modules[name] = module


def adapt(path: str, module: nn.Module, sites: list[Site], board: Board, seats: Seats) -> Adapted:
    """A new adapted layer, in the place of its base."""
    layer = Adapted(module, sites, board, path)
    if any(isinstance(parent, nn.TransformerEncoderLayer) for parent, _ in seats[id(module)]):
        # Torch's fused encoder reads its layers' weights and never calls them, unless a hook is registered.
        layer.register_forward_hook(_keep_call)
    seat(layer, module, seats)
    return layer


def _keep_call(module: nn.Module, args: Any, output: Any) -> None:
    """A forward hook that does nothing; its presence keeps torch's fused encoder away."""


def adapted_at(board: Board | None, path: str) -> Adapted | None:
    """The adapted layer of a path, if any adapter has made one."""
    for adapter in board.adapters.values() if board is not None else ():
        if path in adapter.layers:
            return adapter.layers[path]
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
