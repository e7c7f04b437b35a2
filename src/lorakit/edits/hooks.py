"""Where edits meet a model: hooks around its calls, put on and taken off, with the model's own classes and modules untouched.

The tensors of all edits live in one module of the model, `lorakit_edits`, so that the model's `parameters()`, `to` and
`train` reach them. Hooks stand on whatever module has a place's path at the time, so they are put on anew whenever deltas
wrap a layer or leave it: an edit of a layer's output sees what deltas have added to it.
"""

from __future__ import annotations

import contextvars
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorakit.core.rows import check_rows, first_tensor, per_row
from lorakit.core.state import ModelState
from lorakit.edits.anatomy import stacks_of, transformer_of
from lorakit.edits.attention import Beside, close_door, hang, open_door
from lorakit.edits.contract import Anatomy, Attention, Change, Edit, Edits, Place, Prompt
from lorakit.edits.prompt_rows import Behind, Front, reading
from lorakit.errors import LorakitError

NAME = "lorakit_edits"

_sources: contextvars.ContextVar[dict[int, Tensor]] = contextvars.ContextVar("lorakit_sources")


class Around:
    """Around one layer: the `Change` edits of any number of adapters."""

    def __init__(self, state: ModelState, place: Place) -> None:
        self.state = state
        self.place = place
        self.edits: dict[str, Change] = {}

    def keep(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the source: its input, for `add` to see in the same block."""
        if not any(name in self.edits for name in self.state.routing.names):
            return
        held = _sources.get(None)
        if held is None:
            _sources.set(held := {})
        held[id(self)] = first_tensor(args, kwargs)

    def add(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Forward hook of the layer."""
        routing = self.state.routing
        names = [name for name in routing.names if name in self.edits]
        if not names:
            return None
        y = output if isinstance(output, Tensor) else output[0]
        x = _sources.get({}).pop(id(self)) if self.place.source else first_tensor(args, kwargs)
        total: Tensor | None = None
        for name in names:
            column = routing.names.index(name)
            if routing.weights is not None and routing.weights[column] == 0.0:
                continue
            change = self._change(self.edits[name], x, y)
            if routing.weights is not None:
                change = change if routing.weights[column] == 1.0 else change * routing.weights[column]
            else:
                check_rows(y, routing.rows, routing.axis, self.place.path)
                weights = routing.table_on(y.device)[:, column]
                change = change * per_row(weights, change, routing.axis).to(change.dtype)
            total = change if total is None else total + change
        if total is None:
            return None
        y = y + total.to(y.dtype)
        return y if isinstance(output, Tensor) else (y, *output[1:])

    def _change(self, edit: Change, x: Tensor, y: Tensor) -> Tensor:
        if not edit.chosen:
            return edit.change(x, y)
        now = reading()
        marks = None if now is None else now.marks(y.shape[1])
        if marks is None:
            raise LorakitError(
                f"{self.place.path} was called outside of its model, so that nobody can tell which of its tokens are the "
                f"prompt's; {edit.spec.name} needs a call of the whole model."
            )
        chosen = edit.select(marks)
        return torch.zeros_like(y).masked_scatter(
            chosen[..., None].expand_as(y), edit.change(x[chosen], y[chosen]).to(y.dtype)
        )


class Seams:
    """All seams of one model."""

    def __init__(self, state: ModelState, model: nn.Module) -> None:
        self.state = state
        self.model = model
        self.front: Front | None = None
        self.behind: Behind | None = None
        self.around: dict[Place, Around] = {}
        self.beside: dict[str, Beside] = {}
        self.handles: list[Any] = []

    def put(self, name: str, edits: Mapping[Place, Edit], anatomy: Anatomy) -> None:
        """Seat an adapter's edits; their tensors become part of the model."""
        holder = cast(Edits | None, self.model._modules.get(NAME))
        if holder is None:
            holder = Edits()
            self.model.add_module(NAME, holder)
        holder[name] = nn.ModuleList(edits.values())
        stacks = stacks_of(self.model)
        if self.front is None:
            self.front = Front(self.state, stacks["front"], anatomy.kind)
            if "decoder" in stacks:
                self.behind = Behind(self.front, stacks["decoder"])
        for place, edit in edits.items():
            if isinstance(edit, Prompt):
                self.front.prompts[name] = edit
            elif isinstance(edit, Change):
                self.around.setdefault(place, Around(self.state, place)).edits[name] = edit
                if edit.chosen:
                    self.front.watchers.add(name)
            elif isinstance(edit, Attention):
                self._put_beside(name, place, edit, anatomy)
        self.seat()

    def _put_beside(self, name: str, place: Place, edit: Attention, anatomy: Anatomy) -> None:
        if place.path not in self.beside:
            relative = None
            for block in (*anatomy.blocks, *anatomy.decoder_blocks):
                if block.attention == place.path:
                    relative = _relative(self.model, block.path.rpartition(".")[0])
            self.beside[place.path] = Beside(self.state, place.path, anatomy.key_heads, relative)
        self.beside[place.path].edits[name] = edit
        if edit.joint and self.behind is None:  # a decoder beside an encoder counts its positions by itself
            cast(Front, self.front).shifts[name] = cast(Any, edit.spec).tokens

    def take(self, names: Iterable[str]) -> None:
        """Take adapters' edits off; with the last ones nothing is left on the model."""
        holder = cast(Any, self.model._modules.get(NAME))
        for name in names:
            if holder is None or name not in holder:
                continue
            del holder[name]
            for held in (*self.around.values(), *self.beside.values()):
                cast(Any, held).edits.pop(name, None)
            if self.front is not None:
                self.front.prompts.pop(name, None)
                self.front.shifts.pop(name, None)
                self.front.watchers.discard(name)
        if holder is not None and not len(holder):
            del self.model._modules[NAME]
        self.seat()

    def seat(self) -> None:
        """Put every hook where its path leads now, and none where nothing is left to do."""
        for handle in self.handles:
            handle.remove()
        self.handles = []
        for path in list(self.beside):
            hang(self.model.get_submodule(path), self.beside[path] if self.beside[path].edits else None)
            if not self.beside[path].edits:
                del self.beside[path]
        (open_door if self.beside else close_door)(transformer_of(self.model))
        self.around = {place: around for place, around in self.around.items() if around.edits}
        for place, around in self.around.items():
            if place.source:
                source = self.model.get_submodule(place.source)
                self.handles.append(source.register_forward_pre_hook(around.keep, with_kwargs=True))
            layer = self.model.get_submodule(place.path)
            self.handles.append(layer.register_forward_hook(around.add, with_kwargs=True))
        front = self.front
        if front is not None and (front.prompts or front.shifts or front.watchers):
            stacks = stacks_of(self.model)
            self.handles += [
                stacks["front"].register_forward_pre_hook(front.enter, with_kwargs=True),
                stacks["front"].register_forward_hook(front.leave, with_kwargs=True, always_call=True),
            ]
        if self.behind is not None and front is not None and front.prompts:
            decoder = stacks_of(self.model)["decoder"]
            self.handles.append(decoder.register_forward_pre_hook(self.behind.enter, with_kwargs=True))


def _relative(model: nn.Module, stack: str) -> Any:
    """The first attention in a stack that computes relative position scores."""
    for module in model.get_submodule(stack).modules():
        if getattr(module, "has_relative_attention_bias", False) and hasattr(module, "compute_bias"):
            return module
    return None


def seams_of(state: ModelState, model: nn.Module) -> Seams:
    """The seams of a model, made when the first edit comes."""
    if state.seams is None:
        state.seams = Seams(state, model)
    return cast(Seams, state.seams)
