"""Prompt rows in front of a model's input: they enter with the first tokens, and the output is cut back to the user's own.

`PromptHooks` stand around the stack of blocks that reads the input. Going in, a prompt's rows come before the embeddings, and
masks and positions grow with them; a call whose cache holds the prompt already only has its mask and positions grown. Coming
out, hidden states are cut back to the tokens that were given, so that the head, the loss and `labels` never see a prompt. In an
encoder-decoder the encoder's output keeps the rows, for the decoder to attend to, and the decoder's mask of them grows.

Rows of one batch may have prompts of different lengths, or none. `rows.Columns` has the geometry of that: shorter prompts are
filled up with columns that nobody sees, before the prompt where a cache follows, behind the text elsewhere (there, positions
are counted by the model itself).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lorakit.core.hooks import CallHooks
from lorakit.core.rows import check_rows
from lorakit.core.state import ModelState
from lorakit.edits.contract import Prompt
from lorakit.edits.rows import Columns, RowChoice, choose
from lorakit.errors import LorakitError


@dataclass(frozen=True)
class PromptCall:
    """One call of a stack with prompt rows: how many were added, where each row's own tokens start, which are the prompt's.

    Attributes:
        added: columns added to the input.
        own: the user's tokens in this call.
        starts: (rows,), where own tokens start if not at `added` in each row.
        prompt: (rows, own) of bool: the tokens of what the user asks, before any answer; None if no edit asks.
        cut: whether the output is cut back to the own tokens.
    """

    added: int
    own: int
    starts: Tensor | None = None
    prompt: Tensor | None = None
    cut: bool = True

    def marks(self, tokens: int) -> Tensor | None:
        """`prompt` over all tokens of the stack, (rows, tokens)."""
        if self.prompt is None or not self.added:
            return self.prompt
        marks = self.prompt.new_zeros(self.prompt.shape[0], tokens)
        if self.starts is None:
            marks[:, self.added : self.added + self.own] = self.prompt
        else:
            marks.scatter_(1, self.starts[:, None] + torch.arange(self.own, device=marks.device), self.prompt)
        return marks

    def own_tokens(self, value: Tensor, axis: int = 1) -> Tensor:
        """The user's own tokens of something that the stack computed."""
        if self.starts is None:
            return value.narrow(axis, self.added, self.own)
        index = (self.starts[:, None] + torch.arange(self.own, device=value.device)).reshape(
            [value.shape[0], *([1] * (axis - 1)), self.own, *([1] * (value.ndim - axis - 1))]
        )
        return value.gather(axis, index.expand([*value.shape[:axis], self.own, *value.shape[axis + 1 :]]))

    def cut_back(self, output: Any) -> Any:
        """A stack's output with the user's own tokens alone; None where it stays as it is."""
        if not self.added or not self.cut or output is None:
            return None
        if isinstance(output, Tensor):
            return self.own_tokens(output)
        if type(output) is tuple:
            return (self.own_tokens(output[0]), *output[1:])
        for name, axis in (("last_hidden_state", 1), ("hidden_states", 1), ("attentions", 2)):
            value = getattr(output, name, None)
            if isinstance(value, Tensor):
                setattr(output, name, self.own_tokens(value, axis))
            elif isinstance(value, tuple):
                setattr(output, name, tuple(v if v is None else self.own_tokens(v, axis) for v in value))
        return output


class PromptHooks:
    """Around the stack that reads the input, and around the decoder behind an encoder."""

    def __init__(self, state: ModelState, kind: str) -> None:
        self.state = state
        self.kind = kind
        """The anatomy's: "causal", "encoder" or "encoder-decoder"."""
        self.prompts: dict[str, Prompt] = {}
        self.prefixes: dict[str, int] = {}
        """Adapter -> the length of its prefix in the attention, by which positions are shifted."""
        self.watchers: set[str] = set()
        """Adapters that ask which tokens are the prompt's."""
        self.lengths: Tensor | None = None
        """(rows,): how many tokens of each row are its prompt, while `lk.prompts` says so."""
        self.calls = CallHooks(self._enter, PromptCall.cut_back)

    @property
    def present(self) -> PromptCall | None:
        """The call of the stack that is running, if an edit has to do with it."""
        return cast("PromptCall | None", self.calls.kept)

    def remove(self, name: str) -> None:
        """Forget an adapter."""
        self.prompts.pop(name, None)
        self.prefixes.pop(name, None)
        self.watchers.discard(name)

    def on(self, stack: nn.Module, decoder: nn.Module | None) -> list[RemovableHandle]:
        """Put the hooks on, where there is anything to do."""
        handles = self.calls.on(stack) if self.prompts or self.prefixes or self.watchers else []
        if decoder is not None and self.prompts:
            handles.append(decoder.register_forward_pre_hook(self._enter_decoder, with_kwargs=True))
        return handles

    def columns(self, prompts: RowChoice, device: torch.device) -> Columns:
        """The columns that these prompts add."""
        sizes = {name: self.prompts[name].rows().shape[0] for name in prompts.names}
        return prompts.columns(sizes, device, self.kind == "causal")

    def _enter(self, stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        routing = self.state.routing
        prompts, prefixes = choose(routing, self.prompts), choose(routing, self.prefixes)
        watched = self.watchers.intersection(routing.names)
        if not prompts.names and not prefixes.names and not watched:
            return None
        given = _by_name(stack, args, kwargs)
        call = _StackCall(self, stack, given, prompts, prefixes)
        marked = call.prompt_tokens() if watched else None
        added, starts = call.add_prompts()
        return (), given, PromptCall(added, call.own, starts, marked, self.kind != "encoder-decoder")

    def _enter_decoder(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Forward pre-hook of a decoder: the mask of the encoder's states grows by the prompt."""
        prompts = choose(self.state.routing, self.prompts)
        given = _by_name(decoder, args, kwargs)
        hidden, mask = given.get("encoder_hidden_states"), given.get("encoder_attention_mask")
        if not prompts.names or hidden is None:
            return None
        columns = self.columns(prompts, hidden.device)
        own = hidden.shape[1] - columns.width
        if mask is not None and (mask.ndim != 2 or mask.shape[1] != own):
            raise LorakitError(
                f"the encoder gave {hidden.shape[1]} states, {columns.width} of them a prompt's, and their mask has the shape "
                f"{tuple(mask.shape)}; it must be ({hidden.shape[0]}, {own}), and the encoder must have run with this adapter."
            )
        given["encoder_attention_mask"] = columns.grow_mask(mask, hidden, own)
        return (), given


def _by_name(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A call's arguments by their names."""
    return {**dict(zip(_parameters(type(module).forward), args, strict=False)), **kwargs} if args else dict(kwargs)


@functools.cache
def _parameters(forward: Callable[..., Any]) -> list[str]:
    """The names of what a module's forward takes."""
    return [*inspect.signature(forward).parameters][1:]


class _StackCall:
    """One call of the stack on its way in; `given` are its arguments by name, changed in place."""

    def __init__(
        self, hooks: PromptHooks, stack: Any, given: dict[str, Any], prompts: RowChoice, prefixes: RowChoice
    ) -> None:
        tokens = given.get("inputs_embeds") if given.get("input_ids") is None else given["input_ids"]
        if tokens is None:
            raise LorakitError(f"{type(stack).__name__} was called without input_ids and inputs_embeds.")
        for choice in (prompts, prefixes):
            if choice.index is not None and choice.names:
                check_rows(tokens, choice.index.shape[0], 0, type(stack).__name__)
        self.hooks, self.stack, self.given, self.prompts = hooks, stack, given, prompts
        self.tokens: Tensor = tokens
        self.own = tokens.shape[1]
        cache = given.get("past_key_values") if hooks.kind == "causal" else None
        self.cached = 0 if cache is None else int(cache.get_seq_length())
        """Tokens in the cache, a prompt's among them."""
        self.columns = hooks.columns(prompts, tokens.device)
        self.prefix = prefixes.numbers(hooks.prefixes, tokens.device)

    def add_prompts(self) -> tuple[int, Tensor | None]:
        """Put the prompts into the arguments; returns the columns that were added, and where each row's own tokens start."""
        columns, packed = self.columns, self.given.get("packed_batch")
        if packed is not None:
            return self._add_to_packed(packed), None
        if self.cached:
            self._check_cache()
        if columns.width:
            self._grow_mask()
        self._set_positions()
        if columns.width and not self.cached:
            if getattr(self.given.get("past_key_values"), "is_compileable", False):
                raise LorakitError(
                    f"{self.prompts.names[0]!r} adds {columns.width} rows to the input, for which a cache of fixed length "
                    "has no room; use the default cache (leave cache_implementation out)."
                )
            self._add_rows()
        return 0 if self.cached else columns.width, columns.lengths if columns.trailing else None

    def _add_to_packed(self, packed: Any) -> int:
        """A padding-free batch of training: one prompt above all of it, computed once."""
        if self.columns.lengths is not None or isinstance(self.prefix, Tensor) or not hasattr(packed, "under"):
            raise LorakitError(
                "a padding-free batch takes one prompt or prefix for all rows; use the padded path (train.fast_path: off)."
            )
        if self.columns.width:
            self.given["packed_batch"] = packed.under(self.columns.width)
            self._set_positions()
            self._add_rows()
        elif self.prefix:
            self._set_positions()
        return self.columns.width

    def _check_cache(self) -> None:
        mask = self.given.get("attention_mask")
        expected = self.cached - self.columns.width + self.own
        if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] != expected:
            raise LorakitError(
                f"the cache holds {self.cached} tokens, {self.columns.width} of them the prompt's, and the call adds "
                f"{self.own}; its mask is for {mask.shape[1]} tokens instead of {expected}. A cache must be continued with the "
                "adapter that it was begun with."
            )

    def _grow_mask(self) -> None:
        mask = self.given.get("attention_mask")
        own = self.own + max(0, self.cached - self.columns.width)

        def grown(one: Tensor | None) -> Tensor | None:
            return self.columns.grow_mask(one, self.tokens, own, enters=not self.cached)

        if isinstance(mask, dict):
            self.given["attention_mask"] = {key: grown(value) for key, value in mask.items()}
        elif mask is not None or self.columns.lengths is not None:
            self.given["attention_mask"] = grown(mask)

    def _add_rows(self) -> None:
        given, columns = self.given, self.columns
        tables = [self.hooks.prompts[name].rows() for name in self.prompts.names]
        rows = columns.per_row(tables, self.prompts.index, self.tokens.shape[0])
        embeds = given.get("inputs_embeds")
        if embeds is None:
            embeds = self.stack.get_input_embeddings()(given["input_ids"])
        given["inputs_embeds"] = columns.join(rows.to(device=embeds.device, dtype=embeds.dtype), embeds)
        given["input_ids"] = None
        if isinstance(given.get("token_type_ids"), Tensor):
            types = given["token_type_ids"]
            given["token_type_ids"] = columns.join(types.new_zeros(types.shape[0], columns.width), types)
        given.pop("cache_position", None)

    def _set_positions(self) -> None:
        """Positions behind the prompt and the prefix, where the model would count them otherwise."""
        columns = self.columns
        if "position_ids" not in _parameters(type(self.stack).forward):
            return  # relative positions, or counted by the model itself
        differ = columns.lengths is not None or isinstance(self.prefix, Tensor)
        own = self.given.get("position_ids")
        if own is None:
            if columns.trailing or (not differ and not self.prefix):
                return  # counted by the model itself, over prompt and text alike
            begin = first_position(self.stack) + (self.cached - columns.width if self.cached else 0)
            own = (begin + torch.arange(self.own, device=self.tokens.device))[None]
        prefix = self.prefix[:, None] if isinstance(self.prefix, Tensor) else self.prefix
        added = first_position(self.stack) + columns.positions(own.dtype, own.device) + prefix
        own = own + prefix + (columns.width if columns.lengths is None else columns.lengths[:, None])
        if columns.width and not self.cached:
            rows = torch.broadcast_shapes(own.shape[:-1], added.shape[:-1])
            added, own = added.expand(*rows, -1), own.expand(*rows, -1)
            own = columns.join(added, own) if columns.trailing else torch.cat([added, own], dim=-1)
        self.given["position_ids"] = own

    def prompt_tokens(self) -> Tensor:
        """(rows, own): the tokens of the user's prompt in this call. Unless `lk.prompts` says which, all that come before
        anything is in the cache."""
        rows, mask = self.tokens.shape[0], self.given.get("attention_mask")
        real = torch.ones(rows, self.own, dtype=torch.bool, device=self.tokens.device)
        if self.cached:
            return ~real
        if isinstance(mask, Tensor) and mask.ndim == 2:
            real = mask.bool()
        lengths = self.hooks.lengths
        if lengths is None:
            return real
        if lengths.shape[0] and rows % lengths.shape[0] == 0:  # several beams or answers of each row
            lengths = lengths.repeat_interleave(rows // lengths.shape[0])
        if lengths.shape[0] != rows:
            raise LorakitError(
                f"prompts: {lengths.shape[0]} lengths were given for a batch of {rows} rows; give one for each row."
            )
        return real & (real.cumsum(1) <= lengths.to(real.device)[:, None])


def first_position(module: nn.Module) -> int:
    """The position of a first token: RoBERTa and its kin count from behind the padding token."""
    for part in module.modules():
        if hasattr(part, "create_position_ids_from_input_ids") and isinstance(getattr(part, "padding_idx", None), int):
            return int(cast(Any, part).padding_idx) + 1
    return 0
