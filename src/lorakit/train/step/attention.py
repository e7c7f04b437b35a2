"""Attention over a packed batch: every example sees itself and the shared prefixes above it, exactly, without padding.

It is computed in one of three ways: by C++ or Triton kernels over the tree of runs (tree.py); where long examples share
nothing, by torch's own attention, one example after another; or by batched products (batched_attention.py), which take
every device, dtype and kind of score. Where there is a choice it is measured (`_fastest`). An encoder's texts are
padded inside (encoder_attention.py).

`packed_attention(model)` puts the function over the model's own. The batch travels as the keyword argument `packed_batch` of
the model's forward, which gradient checkpointing stores and repeats by itself. Calls without that argument (evaluation,
generate) take the attention that the model had.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from lorakit.adapter.adapter import adapters
from lorakit.edits.attention import with_edits
from lorakit.models.attention import Override, no_search_for_texts
from lorakit.native.choice import Way, fastest
from lorakit.train.step import last_block, tree
from lorakit.train.step.batched_attention import PackedAttention, plan_attention
from lorakit.train.step.encoder_attention import attend_both_ways
from lorakit.train.step.packing import PackedBatch, PackedTexts

LONG = 512
"""From this mean length on, examples that share nothing may go through torch's own attention, one by one: shorter ones lose."""

_ways: dict[tuple[object, ...], str] = {}

_in_packed_forward: contextvars.ContextVar[bool] = contextvars.ContextVar("lorakit_packed_forward", default=False)


def packed_attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    packed_batch: PackedBatch | PackedTexts | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in each layer. query `[1, heads, tokens, head_dim]` -> `[1, tokens, heads, head_dim]`.

    Raises ValueError where it cannot be right: dropout on attention, a mask or bias of the model's own, a batch of
    more than one row, or a forward pass over a packed batch that did not arrive.
    """
    if packed_batch is None:
        if _in_packed_forward.get():
            raise ValueError("packed attention: this model does not pass keyword arguments to its attention")
        raise ValueError("packed attention: called without packed_batch; this name is only for lorakit's own forward")
    if isinstance(packed_batch, PackedTexts):
        return attend_both_ways(packed_batch, module, (query, key, value), dropout, scaling, kwargs), None
    if dropout:
        raise ValueError(f"packed attention: attention dropout is {dropout}, which is not supported; set it to 0")
    if attention_mask is not None or kwargs.get("position_bias") is not None:
        raise ValueError("packed attention: the model has its own mask or bias; use train.fast_path: off")
    if query.shape[0] != 1 or query.shape[2] != packed_batch.tokens or key.shape[2] != packed_batch.tokens:
        raise ValueError(
            f"packed attention: query {tuple(query.shape)} and key {tuple(key.shape)} are not one row of "
            f"{packed_batch.tokens} tokens"
        )
    if not getattr(module, "is_causal", True) or kwargs.get("is_causal") is False:
        raise ValueError("packed attention: this layer is not causal")
    packed_batch.windows.add(sliding_window)
    plain = softcap is None and s_aux is None
    alone = plain and _is_long(packed_batch, sliding_window)
    scale = query.shape[3] ** -0.5 if scaling is None else float(scaling)
    if alone and not query.is_cuda and not tree.suits(packed_batch, query):
        return _attend_long(packed_batch, query, key, value, scale), None
    q, k, v = (tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value))
    if q.shape[2] != k.shape[2] or v.shape[2] != k.shape[2]:
        raise ValueError("packed attention: keys and values differ in width; use train.fast_path: off")

    def by_torch(*one: Tensor) -> Tensor:
        rows = (part.transpose(0, 1)[None] for part in one)
        return _attend_long(packed_batch, next(rows), next(rows), next(rows), scale)[0]

    def by_tree(*one: Tensor) -> Tensor:
        run: Any = tree.TreeAttention.apply
        return run(*one, packed_batch, scale, sliding_window)  # type: ignore[no-any-return]

    def by_blocks(*one: Tensor) -> Tensor:
        run: Any = PackedAttention.apply
        plan = plan_attention(packed_batch, q.shape[1], k.shape[1], q.shape[2], sliding_window)
        return run(*one, s_aux, plan, scale, softcap, sliding_window)  # type: ignore[no-any-return]

    ways: dict[str, Callable[..., Tensor]] = {}
    if plain and tree.suits(packed_batch, query):
        ways["tree"] = by_tree
    if alone:
        ways["torch"] = by_torch
    if query.is_cuda or not ways:  # on processors batched products have never been the fastest of several
        ways["blocks"] = by_blocks
    return ways[_fastest(ways, packed_batch, (q, k, v))](q, k, v)[None], None


def _fastest(ways: dict[str, Callable[..., Tensor]], batch: PackedBatch, given: tuple[Tensor, ...]) -> str:
    """The fastest way to attend over a batch like this one, forward and backward, measured on the first of its kind."""
    if len(ways) == 1:
        return next(iter(ways))
    q, k, _ = given
    mean = batch.used // len(batch.segments)
    shape = (str(q.dtype).removeprefix("torch."), *q.shape[1:], k.shape[1], "about", 1 << mean.bit_length())
    key = (*ways, *shape, q.device)
    if key not in _ways:

        def case(way: Callable[..., Tensor]) -> Callable[[], object]:
            def run() -> None:
                with torch.enable_grad():
                    leaves = [one.detach().requires_grad_() for one in given]
                    way(*leaves).sum().backward()

            return run

        cases: dict[str, Way] = {name: lambda way=way: [case(way)] for name, way in ways.items()}  # type: ignore[misc]
        _ways[key] = fastest("attention", shape, cases, q.device)
    return _ways[key]


def _is_long(batch: PackedBatch, window: int | None) -> bool:
    """Does torch's own causal attention suit this batch: long examples that share nothing, no window that matters?"""
    segments = batch.segments
    alone = all(segment.parent < 0 for segment in segments)
    longest = max(segment.length for segment in segments)
    return alone and batch.used >= LONG * len(segments) and (window is None or longest <= window)


def _attend_long(batch: PackedBatch, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
    """Each segment through torch's own causal attention. -> `[1, tokens, heads, head_dim]`."""
    rows = []
    for segment in batch.segments:
        run = slice(segment.start, segment.start + segment.length)
        out = torch.nn.functional.scaled_dot_product_attention(
            query[:, :, run],
            key[:, :, run],
            value[:, :, run],
            is_causal=True,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        rows.append(out.transpose(1, 2))
    fill = batch.tokens - batch.used
    if fill:
        rows.append(query.new_zeros(1, fill, query.shape[1], value.shape[3]))
    return torch.cat(rows, 1)


def _attention(inner: Callable[..., Any], module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Packed where a packed batch comes along, else what the model had before."""
    if kwargs.get("packed_batch") is not None or _in_packed_forward.get():
        return with_edits(packed_attention_forward, module, args, kwargs, packed=True)
    return inner(module, *args, **kwargs)


def _mask(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """None for a packed batch, else the mask the model had before."""
    return None if _in_packed_forward.get() else inner(*args, **kwargs)


_OVERRIDE = Override("packed", _attention, _mask)


@contextlib.contextmanager
def packed_attention(model: torch.nn.Module) -> Iterator[None]:
    """Inside, `model` takes packed batches; every other call to it is as before. Restored on leaving.

    Keep it open around backward too: activation checkpointing runs the layers again there.
    """
    changed = _OVERRIDE.put_on(model)
    try:
        decoder: Any = getattr(model, "get_decoder", None)
        with last_block.opened(decoder and decoder()):
            yield
    finally:
        if changed:
            _OVERRIDE.take_off(model)


def is_packed(model: torch.nn.Module) -> bool:
    """Is `packed_attention(model)` open?"""
    return _OVERRIDE.is_on(model)


def edits_obstacle(model: torch.nn.Module, texts: bool = False) -> str | None:
    """Why an edit on the model cannot act on a packed batch, or None; `texts`: a batch of whole texts for an encoder."""
    for adapter in adapters(model).values():
        if adapter.edits:
            spec = adapter.method
            reason = spec.needs_padding or ("every text needs the prompt for itself" if texts and spec.family else None)
            if reason is not None:
                return f"{spec.name} does not support packing: {reason}"
    return None


def packed_call(model: torch.nn.Module, batch: PackedBatch | PackedTexts, **arguments: Any) -> Any:
    """Call a model, or one without its head, on a packed batch, inside `packed_attention`."""
    token = _in_packed_forward.set(True)
    try:
        with no_search_for_texts():
            return model(
                input_ids=batch.input_ids,
                position_ids=batch.position_ids,
                return_dict=True,
                packed_batch=batch,
                **arguments,
            )
    finally:
        _in_packed_forward.reset(token)


def packed_hidden(decoder: torch.nn.Module, batch: PackedBatch) -> Tensor:
    """Hidden states of a packed batch, `[tokens, hidden]`, from a model without its head, inside `packed_attention`."""
    hidden: Tensor = packed_call(decoder, batch, use_cache=False).last_hidden_state
    return hidden[0]
