"""Edits in the batch: what stands around the model's calls, for the tokens of its own rows.

    prompt rows      embeddings in place of token ids, at the positions before the text
    prefixes         tokens before the text whose keys and values are given, whatever the layers make of them
    gated prompts    a softmax of their own beside the attention's (LLaMA-Adapter)
    input gains      the input of a linear layer, times numbers of its own (IA3)
    changes          something added to what a module gives, for all tokens or for chosen ones (bottlenecks, LoReFT)

Rows with prompts and prefixes thus have further tokens, with negative ids, and pages for them, which requests of the same
adapter share as they share equal beginnings. Hooks are on the model for the length of a step that has such rows; a step
without any knows nothing of them. Each row is computed apart, so that it gets the same bits whoever is beside it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorakit.adapter.adapter import Adapter
from lorakit.core.state import state_of
from lorakit.edits.contract import Attention, Change, Place, Prompt
from lorakit.edits.hooks import EditHooks


@dataclass(frozen=True)
class Around:
    """The edits of one adapter.

    Attributes:
        rows: (tokens, hidden), prompt rows.
        prefix: layer -> keys and values (key heads, tokens, width) that stand before the text.
        gated: layer -> keys and values (heads, tokens, width) with a softmax of their own, and its gate (heads or 1,).
        changes: where something is added, and what.
        tokens: how many tokens stand before the text.
        bytes: memory that all this takes.
        gains: linear layer -> (in,), what multiplies its input.
    """

    rows: Tensor | None
    prefix: Mapping[int, tuple[Tensor, Tensor]]
    gated: Mapping[int, tuple[Tensor, Tensor, Tensor]]
    changes: Mapping[Place, Change]
    tokens: int
    bytes: int
    gains: Mapping[str, Tensor] = field(default_factory=dict)

    def chosen(self, before: int, prompt: int) -> frozenset[int] | None:
        """The positions of a request at which its changes act, its prompt of so many tokens standing behind `before` others;
        None where they act at all."""
        edit = next(iter(self.changes.values()), None)
        if edit is None or not edit.chosen:
            return None
        marks = torch.ones(1, prompt, dtype=torch.bool)
        return frozenset(before + place for place in edit.select(marks)[0].nonzero().flatten().tolist())


def around(adapter: Adapter, dtype: torch.dtype) -> Around:
    """The edits of an adapter on a model, on their own."""
    hooks = cast(EditHooks, state_of(adapter.model).edits)
    rows: Tensor | None = None
    prefix: dict[int, tuple[Tensor, Tensor]] = {}
    gated: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    changes: dict[Place, Change] = {}
    for place, edit in adapter.edits.items():
        if isinstance(edit, Prompt):
            rows = edit.rows().detach().clone()
        elif isinstance(edit, Change):
            changes[place] = copy.deepcopy(edit).requires_grad_(False)
        elif isinstance(edit, Attention):
            module: Any = adapter.model.get_submodule(place.path)
            like = torch.empty(0, dtype=dtype, device=next(module.parameters()).device)
            keys, values = (one.detach().clone() for one in hooks.attention[place.path].tensors(edit, module, like))
            if edit.joint:
                prefix[module.layer_idx] = keys, values
            else:
                gated[module.layer_idx] = keys, values, cast(Tensor, edit.gate()).detach().clone()
    held = [one for pair in (*prefix.values(), *gated.values()) for one in pair]
    held += [one for change in changes.values() for one in change.state_dict().values()] + (
        [] if rows is None else [rows]
    )
    tokens = len(rows) if rows is not None else next((keys.shape[1] for keys, _ in prefix.values()), 0)
    return Around(rows, prefix, gated, changes, tokens, sum(one.numel() * one.element_size() for one in held))


@dataclass(frozen=True)
class Edited:
    """The tokens of one row of a step, and one adapter whose edits act on them.

    Attributes:
        first, count: its tokens in the step.
        start: the position of the first.
        around, weight: the edits, and what they count.
        chosen: the positions at which changes act; None for all.
    """

    first: int
    count: int
    start: int
    around: Around
    weight: float
    chosen: frozenset[int] | None = None

    @property
    def tokens(self) -> slice:
        return slice(self.first, self.first + self.count)

    @property
    def before(self) -> tuple[slice, slice] | None:
        """Which tokens of the step stand before the text, and which of all such they are."""
        end = min(self.around.tokens, self.start + self.count)
        return (slice(self.first, self.first + end - self.start), slice(self.start, end)) if end > self.start else None

    def at(self) -> Tensor | slice | None:
        """Tokens of the step at which changes act; None where that is nowhere."""
        if self.chosen is None:
            return self.tokens
        places = sorted(place for place in self.chosen if self.start <= place < self.start + self.count)
        return torch.tensor(places) - self.start + self.first if places else None


@dataclass
class Edits:
    """All edits of a step."""

    rows: Sequence[Edited]
    sources: dict[Place, Tensor] = field(default_factory=dict)

    @contextmanager
    def on(self, model: Any) -> Iterator[None]:
        """Hooks around the calls of a model, for the length of a block."""
        handles = []
        embedded = [(own, one.around.rows) for one in self.rows if one.around.rows is not None and (own := one.before)]
        if embedded:

            def embed(module: nn.Module, args: Any, output: Tensor) -> Tensor:
                output = output.clone()
                for (here, which), rows in embedded:
                    output[0, here] = rows[which].to(output)
                return output

            handles.append(model.get_input_embeddings().register_forward_hook(embed))
        for path in dict.fromkeys(path for one in self.rows for path in one.around.gains):
            handles.append(model.get_submodule(path).register_forward_pre_hook(self._scaling(path)))
        for place in dict.fromkeys(place for one in self.rows for place in one.around.changes):
            if place.source:
                source = model.get_submodule(place.source)
                handles.append(source.register_forward_pre_hook(self._keeping(place)))
            handles.append(model.get_submodule(place.path).register_forward_hook(self._changing(place)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _scaling(self, path: str) -> Any:
        def scale(module: nn.Module, args: tuple[Any, ...]) -> Any:
            x = args[0].clone()
            flat = x.view(-1, x.shape[-1])
            for one in self.rows:
                gain = one.around.gains.get(path)
                if gain is not None:
                    flat[one.tokens] *= (gain if one.weight == 1 else 1 + one.weight * (gain - 1)).to(x)
            return (x, *args[1:])

        return scale

    def _keeping(self, place: Place) -> Any:
        def keep(module: nn.Module, args: tuple[Any, ...]) -> None:
            self.sources[place] = args[0]

        return keep

    def _changing(self, place: Place) -> Any:
        def change(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            y = output if isinstance(output, Tensor) else output[0]
            x = self.sources.pop(place) if place.source else y
            flat_x, flat_y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
            result = flat_y.clone()
            for one in self.rows:
                edit, at = one.around.changes.get(place), one.at()
                if edit is not None and at is not None:
                    result[at] += (one.weight * edit.change(flat_x[at], flat_y[at])).to(y.dtype)
            changed = result.view(y.shape)
            return changed if isinstance(output, Tensor) else (changed, *output[1:])

        return change

    def before(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """A layer's keys and values (1, key heads, tokens, width) with those of prefixes in their places."""
        for one in self.rows:
            if (own := one.before) and layer in one.around.prefix:
                (here, which), (keys, values) = own, one.around.prefix[layer]
                key, value = key.clone(), value.clone()
                key[0, :, here], value[0, :, here] = keys[:, which], values[:, which]
        return key, value

    def beside(self, layer: int, query: Tensor, scale: float, output: Tensor) -> None:
        """Add to what a layer's attention gives, (1, tokens, heads, width), in place, what gated prompts do."""
        for one in self.rows:
            if layer in one.around.gated:
                keys, values, gate = one.around.gated[layer]
                groups = query.shape[1] // keys.shape[0]
                keys, values = (part.repeat_interleave(groups, dim=0) for part in (keys, values))
                scores = torch.matmul(query[0, :, one.tokens], keys.transpose(1, 2)) * scale
                wide = torch.promote_types(scores.dtype, torch.float32)
                shares = scores.softmax(dim=-1, dtype=wide).to(query.dtype)
                added = torch.matmul(shares, values) * gate.to(query.dtype)[:, None, None]
                output[0, one.tokens] += one.weight * added.transpose(0, 1)
