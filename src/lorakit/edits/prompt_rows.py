"""In front of a model's input: rows of a prompt enter with the first tokens, and what comes out is the user's own.

A `Front` stands around the stack of blocks that reads the input, as two hooks. Going in, the prompt's rows come before the
embeddings, and masks and positions grow with them; a call whose cache holds the prompt already only has its mask and positions
grown. Coming out, hidden states are cut back to the tokens that were given, so that the head, the loss and `labels` never see
a prompt. In an encoder-decoder the encoder's output keeps the rows, for the decoder to look at (`Behind` grows its mask).

Rows of one batch may have prompts of different lengths, or none: shorter ones are filled up with rows that nobody sees, before
the prompt where a cache follows, behind the text elsewhere (there, positions are counted by the model itself).
"""

from __future__ import annotations

import contextvars
import inspect
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorakit.core.rows import check_rows
from lorakit.core.state import ModelState
from lorakit.edits.contract import Prompt
from lorakit.errors import LorakitError


@dataclass(frozen=True)
class Reading:
    """One call of a stack: how many rows stand in front, where each row's own tokens start, which of them are a prompt's.

    Attributes:
        front: rows added to the input.
        own: the user's tokens in this call.
        starts: (rows,), where own tokens start if not at `front` in each row.
        prompt: (rows, own) of bool: the tokens of what the user asks, before any answer; None if nobody wants to know.
        cut: whether the output is cut back to the own tokens.
    """

    front: int
    own: int
    starts: Tensor | None = None
    prompt: Tensor | None = None
    cut: bool = True

    def marks(self, tokens: int) -> Tensor | None:
        """`prompt` over all tokens of the stack, (rows, tokens)."""
        if self.prompt is None or not self.front:
            return self.prompt
        marks = self.prompt.new_zeros(self.prompt.shape[0], tokens)
        if self.starts is None:
            marks[:, self.front : self.front + self.own] = self.prompt
        else:
            marks.scatter_(1, self.starts[:, None] + torch.arange(self.own, device=marks.device), self.prompt)
        return marks

    def own_tokens(self, value: Tensor, axis: int = 1) -> Tensor:
        """The user's own tokens of something that the stack computed."""
        if self.starts is None:
            return value.narrow(axis, self.front, self.own)
        index = (self.starts[:, None] + torch.arange(self.own, device=value.device)).reshape(
            [value.shape[0], *([1] * (axis - 1)), self.own, *([1] * (value.ndim - axis - 1))]
        )
        return value.gather(axis, index.expand([*value.shape[:axis], self.own, *value.shape[axis + 1 :]]))


_reading: contextvars.ContextVar[tuple[Reading | None, ...]] = contextvars.ContextVar("lorakit_reading", default=())


def reading() -> Reading | None:
    """The call that is going on, if a Front has anything to do with it."""
    stack = _reading.get()
    return stack[-1] if stack else None


@dataclass(frozen=True)
class Owned:
    """Which of the held edits each row of a batch has: one name for all rows, or an index into `names` per row, -1 for none."""

    names: tuple[str, ...]
    index: Tensor | None = None

    def per_row(self, values: dict[str, int], device: torch.device) -> int | Tensor:
        """A number of each edit as one number, or one per row, (rows,); 0 where a row has none."""
        if not self.names:
            return 0
        if self.index is None:
            return values[self.names[0]]
        table = torch.tensor([*(values[name] for name in self.names), 0], device=device)
        return table[self.index.to(device)]


def owned(state: ModelState, held: dict[str, Any]) -> Owned:
    """Who has which of the edits that act whole or not at all (`EditMethod.blends` is False)."""
    routing = state.routing
    names = tuple(name for name in routing.names if name in held)
    if routing.weights is not None:
        given = dict(zip(routing.names, routing.weights, strict=True))
        return Owned(tuple(name for name in names if given[name] != 0.0)[:1])
    if not names or routing.table is None:
        return Owned(())
    columns = routing.table[:, [routing.names.index(name) for name in names]]
    index = torch.where(columns.any(dim=1), columns.argmax(dim=1), -1)
    return Owned(names, index)


class Front:
    """Around the stack that reads the input."""

    def __init__(self, state: ModelState, stack: nn.Module, kind: str) -> None:
        self.state = state
        self.kind = kind
        self.prompts: dict[str, Prompt] = {}
        self.shifts: dict[str, int] = {}
        """Adapter -> by how much a prefix in the attention shifts positions."""
        self.watchers: set[str] = set()
        """Adapters that want to know which tokens are the prompt's."""
        self.names = [*inspect.signature(type(stack).forward).parameters][1:]

    def enter(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Forward pre-hook of the stack."""
        prompts, shifts = owned(self.state, self.prompts), owned(self.state, self.shifts)
        watched = self.watchers.intersection(self.state.routing.names)
        if not prompts.names and not shifts.names and not watched:
            _reading.set((*_reading.get(), None))
            return None
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        main = given.get("inputs_embeds") if given.get("input_ids") is None else given["input_ids"]
        if main is None:
            raise LorakitError(f"{type(module).__name__} was called without input_ids and inputs_embeds.")
        past = given.get("past_key_values") if self.kind == "causal" else None
        seen = 0 if past is None else int(past.get_seq_length())
        call = _Entry(self, module, given, main, seen, prompts, shifts)
        state = call.grow()
        if watched:
            state = Reading(state.front, state.own, state.starts, call.prompt_tokens(), state.cut)
        _reading.set((*_reading.get(), state))
        return (), given

    def leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """Forward hook of the stack; it is called when the forward failed, too."""
        stack = _reading.get()
        _reading.set(stack[:-1])
        state = stack[-1] if stack else None
        if state is None or not state.front or not state.cut or output is None:
            return None
        if isinstance(output, Tensor):
            return state.own_tokens(output)
        if type(output) is tuple:
            return (state.own_tokens(output[0]), *output[1:])
        for name, axis in (("last_hidden_state", 1), ("hidden_states", 1), ("attentions", 2)):
            value = getattr(output, name, None)
            if isinstance(value, Tensor):
                setattr(output, name, state.own_tokens(value, axis))
            elif isinstance(value, tuple):
                setattr(output, name, tuple(v if v is None else state.own_tokens(v, axis) for v in value))
        return output


class _Entry:
    """One call of the stack on its way in; `given` are its arguments by name, changed in place."""

    def __init__(
        self, front: Front, module: Any, given: dict[str, Any], main: Tensor, seen: int, prompts: Owned, shifts: Owned
    ) -> None:
        self.front, self.module, self.given, self.main, self.seen = front, module, given, main, seen
        self.prompts = prompts
        for one in (prompts, shifts):
            if one.index is not None and one.names:
                check_rows(main, one.index.shape[0], 0, type(module).__name__)
        self.count, self.own = main.shape[:2]
        device = main.device
        sizes = {name: front.prompts[name].rows().shape[0] for name in prompts.names}
        self.before = prompts.per_row(sizes, device)
        self.shift = self.before + shifts.per_row(front.shifts, device)
        self.prefixed = shifts.per_row(front.shifts, device)
        self.width = max(sizes.values(), default=0)
        self.causal = front.kind == "causal"
        self.unpadded = given.get("attention_mask")
        mixed = isinstance(self.before, Tensor)
        step = torch.arange(self.width, device=device)
        self.real: Tensor | None = None
        """(rows, width): which of the added columns are a prompt's, where rows differ."""
        if mixed and self.width:
            lengths = cast(Tensor, self.before)[:, None]
            self.real = step >= self.width - lengths if self.causal else step < lengths
        self.behind = mixed and not self.causal and self.width > 0

    def grow(self) -> Reading:
        """Change the arguments; returns what the way out has to know."""
        flat = self.given.get("flat_batch")
        if flat is not None:
            return self._grow_flat(flat)
        first = self.seen == 0
        starts = cast(Tensor, self.before) if self.behind else None
        if not first:
            self._check_cache()
        if self.width:
            self._grow_mask()
        self._grow_positions(first)
        if self.width and first:
            past = self.given.get("past_key_values")
            if getattr(past, "is_compileable", False):
                raise LorakitError(
                    f"{self.prompts.names[0]!r} adds {self.width} rows to the input, for which a cache of fixed length has no "
                    "room; use the default cache (leave cache_implementation out)."
                )
            self._grow_input(self._rows())
        return Reading(self.width if first else 0, self.own, starts, None, self.front.kind != "encoder-decoder")

    def _grow_flat(self, flat: Any) -> Reading:
        """A flat row of training: one prompt above everything, computed once."""
        if (
            isinstance(self.shift, Tensor)
            or isinstance(self.before, Tensor)
            or self.prefixed
            or not hasattr(flat, "under")
        ):
            raise LorakitError(
                "a flat row of training takes the same prompt for all of it, and no prefix; use the padded path "
                "(train.fast_path: off)."
            )
        if self.width:
            self.given["flat_batch"] = flat.under(self.width)
            self._grow_positions(True)
            self._grow_input(self._rows())
        return Reading(self.width, self.own)

    def _check_cache(self) -> None:
        mask = self.given.get("attention_mask")
        expected = self.seen - self.width + self.own
        if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] != expected:
            raise LorakitError(
                f"the cache holds {self.seen} tokens, {self.width} of them the prompt's, and {self.own} come now; the mask is "
                f"for {mask.shape[1]} and not for {expected}. A cache must be continued with the adapter that it was begun "
                "with."
            )

    def _rows(self) -> Tensor:
        """(rows, width, hidden), zero where nobody looks."""
        tables = [self.front.prompts[name].rows() for name in self.prompts.names]
        if self.prompts.index is None:
            return tables[0].expand(self.count, -1, -1)
        padded = []
        for table in tables:
            empty = table.new_zeros(self.width - table.shape[0], table.shape[1])
            padded.append(torch.cat([empty, table] if self.causal else [table, empty]))
        padded.append(torch.zeros_like(padded[0]))
        return torch.stack(padded)[self.prompts.index.to(padded[0].device)]

    def _grow_input(self, rows: Tensor) -> None:
        given = self.given
        embeds = given.get("inputs_embeds")
        if embeds is None:
            embeds = self.module.get_input_embeddings()(given["input_ids"])
        given["inputs_embeds"] = self._joined(rows.to(device=embeds.device, dtype=embeds.dtype), embeds)
        given["input_ids"] = None
        if isinstance(given.get("token_type_ids"), Tensor):
            types = given["token_type_ids"]
            given["token_type_ids"] = self._joined(types.new_zeros(types.shape[0], self.width), types)
        given.pop("cache_position", None)

    def _joined(self, rows: Tensor, own: Tensor) -> Tensor:
        """Added columns (rows, width, …) and own ones: before them, or, where rows differ and no cache follows, each row's
        own right behind its prompt."""
        if not self.behind:
            return torch.cat([rows, own], dim=1)
        whole = torch.cat([rows, own], dim=1)
        step = torch.arange(whole.shape[1], device=own.device)
        before = cast(Tensor, self.before)[:, None]
        # column t is the prompt's t, then own t - p, then what is left over of the prompt's filling
        index = torch.where(step < before, step, self.width + step - before)
        index = torch.where(index >= whole.shape[1], before + index - whole.shape[1], index)
        return whole.gather(1, index.reshape(*index.shape, *[1] * (own.ndim - 2)).expand_as(whole))

    def _grow_mask(self) -> None:
        mask = self.given.get("attention_mask")
        if isinstance(mask, dict):
            self.given["attention_mask"] = {key: self._grown(value) for key, value in mask.items()}
        elif mask is not None or self.real is not None:
            self.given["attention_mask"] = self._grown(mask)

    def _grown(self, mask: Tensor | None) -> Tensor | None:
        device = self.main.device
        real = self.real
        if mask is None:
            if real is None:
                return None
            mask = torch.ones(self.count, self.own + max(0, self.seen - self.width), dtype=torch.long, device=device)
        if mask.ndim == 2:
            added = mask.new_ones(mask.shape[0], self.width) if real is None else real.to(mask.dtype)
            return self._joined(added, mask)
        if mask.ndim != 4 or self.behind:
            raise LorakitError(
                f"an attention mask of shape {tuple(mask.shape)} cannot be grown by a prompt; give one of (rows, tokens)."
            )
        return self._grown_square(mask, real)

    def _grown_square(self, mask: Tensor, real: Tensor | None) -> Tensor:
        """A mask (rows, 1, queries, keys), of bool or added to scores: columns for the prompt, and rows where it enters."""
        closed = torch.finfo(mask.dtype).min if mask.is_floating_point() else 0
        opened = 0 if mask.is_floating_point() else 1
        seen = mask.new_full((*mask.shape[:-1], self.width), opened)
        if real is not None:
            seen = seen.masked_fill(~real[:, None, None, :], closed)
        mask = torch.cat([seen, mask], dim=-1)
        if self.seen:
            return mask
        rows = mask.new_full((*mask.shape[:-2], self.width, mask.shape[-1]), closed)
        order = torch.ones(self.width, self.width, dtype=torch.bool, device=mask.device)
        order = order.tril() if self.causal else order
        if real is not None:
            order = (order & real[:, None, None, :]) | torch.eye(self.width, dtype=torch.bool, device=mask.device)
        rows[..., : self.width] = torch.where(order, opened, closed).to(mask.dtype)
        return torch.cat([rows, mask], dim=-2)

    def _grow_positions(self, first: bool) -> None:
        if "position_ids" not in self.front.names:
            return  # relative positions, or counted by the model itself
        shift = self.shift[:, None] if isinstance(self.shift, Tensor) else self.shift
        given = self.given.get("position_ids")
        if given is None:
            if self.behind or (not isinstance(self.shift, Tensor) and not self.prefixed):
                return  # counted by the model itself, over prompt and text alike
            begin = first_position(self.module) + (self.seen - self.width if not first else 0)
            given = (begin + torch.arange(self.own, device=self.main.device))[None]
        own = given + shift
        if first and self.width:
            step = torch.arange(self.width, device=given.device, dtype=given.dtype)
            if self.real is not None and not self.behind:
                step = (step - (self.width - cast(Tensor, self.before)[:, None])).clamp_min(0)
            prefixed = self.prefixed[:, None] if isinstance(self.prefixed, Tensor) else self.prefixed
            added = first_position(self.module) + step + prefixed
            rows = torch.broadcast_shapes(own.shape[:-1], added.shape[:-1])
            added, own = added.expand(*rows, -1), own.expand(*rows, -1)
            own = self._joined(added, own) if self.behind else torch.cat([added, own], dim=-1)
        self.given["position_ids"] = own

    def prompt_tokens(self) -> Tensor:
        """(rows, own): the tokens of the user's prompt in this call. Without being told (`prompts`), all that come before
        anything is in the cache."""
        real = torch.ones(self.count, self.own, dtype=torch.bool, device=self.main.device)
        if self.seen:
            return ~real
        if isinstance(self.unpadded, Tensor) and self.unpadded.ndim == 2:
            real = self.unpadded.bool()
        lengths = self.front.state.prompts
        if lengths is None:
            return real
        if lengths.shape[0] and self.count % lengths.shape[0] == 0:  # several beams or answers of each row
            lengths = lengths.repeat_interleave(self.count // lengths.shape[0])
        if lengths.shape[0] != self.count:
            raise LorakitError(
                f"prompts: {lengths.shape[0]} lengths were given for a batch of {self.count} rows; give one for each row."
            )
        return real & (real.cumsum(1) <= lengths.to(real.device)[:, None])


def first_position(module: nn.Module) -> int:
    """The position of a first token: RoBERTa and its kin count from behind the padding token."""
    for part in module.modules():
        if hasattr(part, "create_position_ids_from_input_ids") and isinstance(getattr(part, "padding_idx", None), int):
            return int(cast(Any, part).padding_idx) + 1
    return 0


class Behind:
    """Around the decoder of an encoder-decoder: its view of the encoder grows by the prompt."""

    def __init__(self, front: Front, stack: nn.Module) -> None:
        self.front = front
        self.names = [*inspect.signature(type(stack).forward).parameters][1:]

    def enter(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Forward pre-hook of the decoder."""
        prompts = owned(self.front.state, self.front.prompts)
        if not prompts.names:
            return None
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        hidden, mask = given.get("encoder_hidden_states"), given.get("encoder_attention_mask")
        if hidden is None:
            return None
        width = max(self.front.prompts[name].rows().shape[0] for name in prompts.names)
        own = hidden.shape[1] - width
        if mask is not None and (mask.ndim != 2 or mask.shape[1] != own):
            raise LorakitError(
                f"the encoder gave {hidden.shape[1]} states, {width} of them a prompt's, and their mask has the shape "
                f"{tuple(mask.shape)}; it must be ({hidden.shape[0]}, {own}), and the encoder must have run with this adapter."
            )
        entry = _Entry(self.front, module, {"attention_mask": mask}, hidden[:, width:], 0, prompts, Owned(()))
        given["encoder_attention_mask"] = entry._grown(mask)
        return (), given
