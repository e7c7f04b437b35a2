"""Where edits meet a model: hooks around its calls, put on and taken off, with the model's own classes and modules untouched.

The tensors of all edits live in one module of the model, `lorakit_edits`, so that the model's `parameters()`, `to` and
`train` reach them. Hooks stand on whatever module has a place's path at the time, so they are put on anew whenever deltas
wrap a layer or leave it: an edit of a layer's output sees what deltas have added to it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lorakit.core.hooks import CallHooks
from lorakit.core.routing import Routing
from lorakit.core.rows import first_tensor
from lorakit.core.state import ModelState, state_of
from lorakit.edits.anatomy import stacks_of, transformer_of
from lorakit.edits.attention import ATTENTION_EDITS, AttentionEdits, set_edits
from lorakit.edits.contract import Anatomy, Attention, Change, Edit, EditMethod, Edits, Place, Prompt
from lorakit.edits.prompt_rows import PromptHooks
from lorakit.edits.rows import active, weigh
from lorakit.errors import LorakitError

NAME = "lorakit_edits"


class ChangeHooks:
    """Around one layer: the `Change` edits of any number of adapters."""

    def __init__(self, state: ModelState, place: Place, prompt: PromptHooks) -> None:
        self.state, self.place, self.prompt = state, place, prompt
        self.edits: dict[str, Change] = {}
        self.calls = CallHooks(self._enter, self._leave)
        self.source_inputs: dict[int, Tensor] = {}
        """Thread -> the input of the place's source, between the call of that and the call of the layer."""

    def on(self, model: nn.Module) -> list[RemovableHandle]:
        """Put the hooks on the layer that has the place's path now."""
        handles = self.calls.on(model.get_submodule(self.place.path))
        if self.place.source:
            source = model.get_submodule(self.place.source)
            handles.append(source.register_forward_pre_hook(self._keep_source_input, with_kwargs=True))
        return handles

    def _keep_source_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if active(self.state.routing, self.edits):
            self.source_inputs[threading.get_ident()] = first_tensor(args, kwargs)

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not active(self.state.routing, self.edits):
            if not self.state.decided and not self.state.routing.names:
                self.state.say_idle()
            return None
        x = self.source_inputs.pop(threading.get_ident()) if self.place.source else first_tensor(args, kwargs)
        return args, kwargs, x

    def _leave(self, x: Tensor, output: Any) -> Any:
        if output is None:
            return None
        y = output if isinstance(output, Tensor) else output[0]
        total: Tensor | None = None
        for name in active(self.state.routing, self.edits):
            added = weigh(self.state.routing, name, self._change(self.edits[name], x, y), self.place.path)
            total = added if total is None else total + added
        if total is None:
            return None
        y = y + total.to(y.dtype)
        return y if isinstance(output, Tensor) else (y, *output[1:])

    def _change(self, edit: Change, x: Tensor, y: Tensor) -> Tensor:
        if not edit.chosen:
            return edit.change(x, y)
        call = self.prompt.present
        marks = None if call is None else call.marks(y.shape[1])
        if marks is None:
            raise LorakitError(
                f"{self.place.path} was called outside of its model, so that it is not known which of its tokens are the "
                f"prompt's; {edit.spec.name} needs a call of the whole model."
            )
        chosen = edit.select(marks)
        return torch.zeros_like(y).masked_scatter(
            chosen[..., None].expand_as(y), edit.change(x[chosen], y[chosen]).to(y.dtype)
        )


class EditHooks:
    """The hooks of all edits on one model (`core.state.EditsOnModel`)."""

    def __init__(self, state: ModelState, model: nn.Module, kind: str) -> None:
        self.state, self.model = state, model
        self.stacks = stacks_of(model)
        self.methods: dict[str, EditMethod] = {}
        self.prompt = PromptHooks(state, kind)
        self.changes: dict[Place, ChangeHooks] = {}
        self.attention: dict[str, AttentionEdits] = {}
        self.handles: list[RemovableHandle] = []

    def add(self, name: str, method: EditMethod, edits: Mapping[Place, Edit], anatomy: Anatomy) -> None:
        """Put an adapter's edits around the model's calls; their tensors become part of the model."""
        if NAME not in self.model._modules:
            self.model.add_module(NAME, Edits())
        cast(Edits, self.model._modules[NAME])[name] = nn.ModuleList(edits.values())
        self.methods[name] = method
        for place, edit in edits.items():
            if isinstance(edit, Prompt):
                self.prompt.prompts[name] = edit
            elif isinstance(edit, Change):
                self.changes.setdefault(place, ChangeHooks(self.state, place, self.prompt)).edits[name] = edit
                if edit.chosen:
                    self.prompt.watchers.add(name)
            elif isinstance(edit, Attention):
                at = self.attention.get(place.path) or AttentionEdits(self.state, self.model, place.path, anatomy)
                self.attention[place.path] = at
                at.edits[name] = edit
                # a decoder beside an encoder counts its positions by itself
                if edit.joint and "decoder" not in self.stacks:
                    self.prompt.prefixes[name] = cast(Any, method).tokens
        self.rehook()

    def remove(self, names: Iterable[str]) -> None:
        """Take adapters' edits off; with the last ones nothing is left on the model."""
        holder = cast(Any, self.model._modules.get(NAME))
        for name in names:
            if self.methods.pop(name, None) is None:
                continue
            del holder[name]
            for held in (*self.changes.values(), *self.attention.values()):
                cast(Any, held).edits.pop(name, None)
            self.prompt.remove(name)
        if not self.methods and NAME in self.model._modules:
            del self.model._modules[NAME]
        self.rehook()

    def rehook(self) -> None:
        """Put every hook where its path leads now, and none where nothing is left to do."""
        for handle in self.handles:
            handle.remove()
        for path, at in self.attention.items():
            set_edits(self.model.get_submodule(path), at if at.edits else None)
        self.attention = {path: at for path, at in self.attention.items() if at.edits}
        (ATTENTION_EDITS.put_on if self.attention else ATTENTION_EDITS.take_off)(transformer_of(self.model))
        self.changes = {place: hooks for place, hooks in self.changes.items() if hooks.edits}
        self.handles = [handle for hooks in self.changes.values() for handle in hooks.on(self.model)]
        self.handles += self.prompt.on(self.stacks["input"], self.stacks.get("decoder"))

    def check(self, routing: Routing) -> None:
        """Refuse shares of edits that act whole or not at all, and two of a kind for one row."""
        whole = {name: self.methods[name] for name in routing.names if name in self.methods}
        whole = {name: method for name, method in whole.items() if not method.blends}
        if not whole:
            return
        if routing.axis:
            raise LorakitError(f"use: {next(iter(whole))!r} acts on whole rows, and the route is one for each token.")
        for row in [routing.weights] if routing.weights is not None else cast(Tensor, routing.table).tolist():
            taken: dict[str, str] = {}
            for name, weight in zip(routing.names, row, strict=True):
                if name not in whole or weight == 0.0:
                    continue
                method = whole[name]
                if weight != 1.0:
                    raise LorakitError(
                        f"use: {name!r} was given the weight {weight:g}. A {method.family} ({method.name}) cannot be blended: "
                        "its weight must be 0 or 1. Give rows one each by a list; deltas and bottlenecks blend."
                    )
                if method.family in taken:
                    raise LorakitError(
                        f"use: one row was given two of a kind, {taken[method.family]!r} and {name!r}, both a {method.family}; "
                        "a row has one. Deltas and bottlenecks may act beside it."
                    )
                taken[method.family] = name


def edit_hooks(model: nn.Module, anatomy: Anatomy) -> EditHooks:
    """The hooks of a model's edits, made when the first edit comes."""
    state = state_of(model)
    if state.edits is None:
        state.edits = EditHooks(state, model, anatomy.kind)
    return cast(EditHooks, state.edits)


@contextmanager
def prompts(model: nn.Module, lengths: Sequence[int] | Tensor) -> Iterator[None]:
    """Within the block each row's first tokens, so many, are its prompt, for edits that act on a prompt alone (ReFT).

    Padding does not count. Without it the prompt of a row is all that comes before anything is in the cache: what `generate`
    is given, or the whole text of a classifier. Training on prompts with their answers has to say where the answers begin.

    Args:
        model: a model with adapters; LorakitError where it has none.
        lengths: (rows,): how many tokens of each row are its prompt.
    """
    hooks = cast("EditHooks | None", state_of(model).edits)
    if hooks is None:
        yield
        return
    before, hooks.prompt.lengths = hooks.prompt.lengths, torch.as_tensor(lengths)
    try:
        yield
    finally:
        hooks.prompt.lengths = before
