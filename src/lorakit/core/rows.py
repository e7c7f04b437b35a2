"""The rows of a call: what of a layer's arguments belongs to which row of the batch, taken apart and joined again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lorakit.errors import LorakitError


def first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The input of a call: the first tensor among its arguments; LorakitError where there is none."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            return value
        if isinstance(value, nn.utils.rnn.PackedSequence):
            return value.data
    raise LorakitError("an adapted layer was called without any tensor.")


def pad(value: Any) -> Any:
    """A nested tensor padded with zeros; anything else as it is."""
    if isinstance(value, Tensor) and value.is_nested:
        return torch.nested.to_padded_tensor(value, 0.0)
    return value


def check_rows(x: Tensor, rows: int, axis: int, path: str) -> None:
    """LorakitError unless a layer's input `x` has so many rows along `axis` as the routing names."""
    found = x.shape[axis] if axis < x.ndim else 0
    if found != rows:
        hint = ""
        if found and found % rows == 0:
            hint = f" For beam search or several returned sequences use lk.use(model, route, copies={found // rows})."
        raise LorakitError(
            f"use: the routing has {rows} rows, but {path} was called with a batch of {found} (shape {tuple(x.shape)}); "
            f"give one entry per row of the batch.{hint}"
        )


def per_row(column: Tensor, y: Tensor, axis: int) -> Tensor:
    """One number per row (or token, with `axis` 1) as a tensor that multiplies `y`."""
    shape = [1] * y.ndim
    shape[axis] = -1
    return column.reshape(shape)


def take(value: Any, rows: Tensor, count: int) -> Any:
    """The rows of everything that has the batch as its first axis; other arguments as they are."""
    if isinstance(value, Tensor):
        return value.index_select(0, rows.to(value.device)) if value.ndim and value.shape[0] == count else value
    if type(value) in (tuple, list):
        return type(value)(take(item, rows, count) for item in value)
    if type(value) is dict:
        return {key: take(item, rows, count) for key, item in value.items()}
    return value


_ATTENTION_ARGUMENTS = (
    "query", "key", "value", "key_padding_mask", "need_weights", "attn_mask", "average_attn_weights", "is_causal"
)  # fmt: skip


def take_attention(
    base: nn.MultiheadAttention, args: tuple[Any, ...], kwargs: dict[str, Any], rows: Tensor
) -> dict[str, Any]:
    """The rows of an attention call by the arguments' names, since sizes do not tell the batch from the tokens."""
    given = {**dict(zip(_ATTENTION_ARGUMENTS, args, strict=False)), **kwargs}
    axis = 0 if base.batch_first else 1
    for name in ("query", "key", "value"):
        given[name] = given[name].index_select(axis, rows.to(given[name].device))
    padding, mask = given.get("key_padding_mask"), given.get("attn_mask")
    if padding is not None:
        given["key_padding_mask"] = padding.index_select(0, rows.to(padding.device))
    if mask is not None and mask.ndim == 3:  # (batch × heads, queries, keys); with two axes it is for all rows
        per_row = mask.unflatten(0, (-1, base.num_heads))
        given["attn_mask"] = per_row.index_select(0, rows.to(mask.device)).flatten(0, 1)
    return given


def take_recurrent(axis: int, args: tuple[Any, ...], kwargs: dict[str, Any], rows: Tensor) -> dict[str, Any]:
    """The rows of a recurrent layer's call: of its input along `axis`, of its states (layers, batch, hidden) along axis 1."""
    given = {**dict(zip(("input", "hx"), args, strict=False)), **kwargs}
    given["input"] = given["input"].index_select(axis, rows.to(given["input"].device))
    states = given.get("hx")
    if isinstance(states, Tensor):
        given["hx"] = states.index_select(1, rows.to(states.device))
    elif states is not None:
        given["hx"] = tuple(state.index_select(1, rows.to(state.device)) for state in states)
    return given


def join(
    pieces: list[Any],
    back: Tensor,
    axis: int,
    path: str,
    sizes: list[int] | None = None,
    along_all: bool = False,
) -> Any:
    """What calls with some rows each gave, as one call with all rows would have given it.

    Args:
        pieces: the outputs, all of one structure: tensors, or tuples, lists and dicts of them.
        back: (rows,): where each row of the batch stands in the pieces laid end to end.
        axis: the batch's axis.
        path: of the layer, for messages.
        sizes: how many rows each piece is of; a tensor that has not so many along its axis is refused, since its rows lie
            elsewhere (or it has none).
        along_all: whether `axis` is that of every element of a tuple, and not of the first alone.
    """
    first = pieces[0]
    if isinstance(first, Tensor):
        for piece, size in zip(pieces, sizes or (), strict=False):
            if piece.ndim <= axis or piece.shape[axis] != size:
                raise LorakitError(
                    f"use: {path} returns a tensor of shape {tuple(piece.shape)} for {size} rows of the batch, so that it "
                    "cannot be told which part of it is which row's; route the whole batch to one adapter."
                )
        return torch.cat(pieces, dim=axis).index_select(axis, back.to(first.device))
    if isinstance(first, tuple):
        joined = []
        for index, value in enumerate(first):
            along = axis if index == 0 or along_all else 0
            parts = [piece[index] for piece in pieces]
            joined.append(None if value is None else join(parts, back, along, path, sizes, along_all))
        return tuple(joined)
    raise LorakitError(f"use: {path} returns {type(first).__name__}, whose rows cannot be put together again.")
