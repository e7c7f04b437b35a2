"""Attention over a flat row: every example sees itself and the shared runs above it, exactly, without padding outside.

Three ways lead there. On a processor with a compiler one compiled pass over the tree of runs (tree.py); where long examples
share nothing, torch's own attention, one example after another; else batched products (blocks.py), which take every device,
dtype and kind of score. An encoder's texts are padded inside (texts.py).

The function reaches models through transformers' own registry: `flat_attention(model)` switches a model to it and
back. The batch travels as the keyword argument `flat_batch` of the model's forward, which gradient checkpointing
stores and repeats by itself. Calls without that argument (evaluation, generate) take the attention the model had.
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
from lorakit.models.attention import Override
from lorakit.train.step import last_block, tree
from lorakit.train.step.blocks import FlatAttention, plan_attention
from lorakit.train.step.encoder_attention import attend_both_ways
from lorakit.train.step.packing import FlatBatch, TextBatch

LONG = 512
"""From this mean length on, examples that share nothing go through torch's own attention, one by one, if the compiled pass
is not there or the processor multiplies tiles (AMX): there it takes 0.74 of the time of batched products at 1,536 tokens."""

_in_flat_forward: contextvars.ContextVar[bool] = contextvars.ContextVar("lorakit_flat_forward", default=False)


def flat_attention_forward(
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
    flat_batch: FlatBatch | TextBatch | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in each layer. query `[1, heads, tokens, head_dim]` -> `[1, tokens, heads, head_dim]`.

    Raises ValueError where it cannot be right: dropout on attention, a mask or bias of the model's own, a batch of
    more than one row, or a forward pass over a flat row whose batch did not arrive.
    """
    if flat_batch is None:
        if _in_flat_forward.get():
            raise ValueError("flat attention: this model does not hand keyword arguments to its attention")
        raise ValueError("flat attention: called without flat_batch; this name is only for lorakit's own forward")
    if isinstance(flat_batch, TextBatch):
        return attend_both_ways(flat_batch, module, (query, key, value), dropout, scaling, kwargs), None
    if dropout:
        raise ValueError(f"flat attention: attention dropout is {dropout}; only 0 is supported; set it to 0")
    if attention_mask is not None or kwargs.get("position_bias") is not None:
        raise ValueError("flat attention: the model brings its own mask or bias; use the padded path")
    if query.shape[0] != 1 or query.shape[2] != flat_batch.tokens or key.shape[2] != flat_batch.tokens:
        raise ValueError(
            f"flat attention: query {tuple(query.shape)} and key {tuple(key.shape)} are not one row of "
            f"{flat_batch.tokens} tokens"
        )
    if not getattr(module, "is_causal", True) or kwargs.get("is_causal") is False:
        raise ValueError("flat attention: this layer is not causal")
    flat_batch.windows.add(sliding_window)
    plain = softcap is None and s_aux is None
    compiled = plain and tree.suits(flat_batch, query)
    if plain and _is_long(flat_batch, sliding_window) and not (compiled and not _torch_is_faster()):
        return _attend_long(flat_batch, query, key, value, scaling), None
    q, k, v = (tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value))
    if q.shape[2] != k.shape[2] or v.shape[2] != k.shape[2]:
        raise ValueError("flat attention: keys and values differ in width; use the padded path")
    scale = q.shape[2] ** -0.5 if scaling is None else float(scaling)
    if compiled:
        attended: Tensor = tree.TreeAttention.apply(q, k, v, flat_batch, scale, sliding_window)  # type: ignore[no-untyped-call]
        return attended[None], None
    plan = plan_attention(flat_batch, q.shape[1], k.shape[1], q.shape[2], sliding_window)
    out: Tensor = FlatAttention.apply(q, k, v, s_aux, plan, scale, softcap, sliding_window)  # type: ignore[no-untyped-call]
    return out[None], None


def _is_long(batch: FlatBatch, window: int | None) -> bool:
    """Does torch's own causal attention suit this batch: long examples without company, no window that matters?"""
    segments = batch.segments
    alone = all(segment.parent < 0 for segment in segments)
    longest = max(segment.length for segment in segments)
    return alone and batch.used >= LONG * len(segments) and (window is None or longest <= window)


def _torch_is_faster() -> bool:
    """Does torch's attention beat the compiled pass on long rows? Not without AMX: 1.5 times its time at 2,000 tokens, three
    times at 300 (docs/benchmarks.md); with AMX nobody has measured."""
    return bool(torch.cpu._is_amx_tile_supported())


def _attend_long(batch: FlatBatch, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
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
    """Flat where a flat batch comes along, else what the model had before."""
    if kwargs.get("flat_batch") is not None or _in_flat_forward.get():
        return with_edits(flat_attention_forward, module, args, kwargs, packed=True)
    return inner(module, *args, **kwargs)


def _mask(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """None for a flat row, else the mask the model had before."""
    return None if _in_flat_forward.get() else inner(*args, **kwargs)


_FLAT = Override("flat", _attention, _mask)


@contextlib.contextmanager
def flat_attention(model: torch.nn.Module) -> Iterator[None]:
    """Inside, `model` can take flat rows; every other call to it goes on as before. Restored on leaving.

    Keep it open around backward too: activation checkpointing runs the layers again there.
    """
    changed = _FLAT.put_on(model)
    try:
        decoder: Any = getattr(model, "get_decoder", None)
        with last_block.opened(decoder and decoder()):
            yield
    finally:
        if changed:
            _FLAT.take_off(model)


def is_flat(model: torch.nn.Module) -> bool:
    """Is `flat_attention(model)` open?"""
    return _FLAT.is_on(model)


def edits_obstacle(model: torch.nn.Module, texts: bool = False) -> str | None:
    """Why an edit on the model cannot act on a flat row, or None; `texts`: a row of whole texts for an encoder."""
    for adapter in adapters(model).values():
        if adapter.edits:
            spec = adapter.method
            reason = spec.needs_padding or ("every text needs the prompt for itself" if texts and spec.family else None)
            if reason is not None:
                return f"{spec.name} does not go with flat rows: {reason}"
    return None


def flat_call(model: torch.nn.Module, batch: FlatBatch | TextBatch, **arguments: Any) -> Any:
    """Call a model, or one without its head, on a flat row, inside `flat_attention`."""
    token = _in_flat_forward.set(True)
    try:
        return model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            return_dict=True,
            flat_batch=batch,
            **arguments,
        )
    finally:
        _in_flat_forward.reset(token)


def flat_hidden(decoder: torch.nn.Module, batch: FlatBatch) -> Tensor:
    """Hidden states of a flat batch, `[tokens, hidden]`, from a model without its head, inside `flat_attention`."""
    hidden: Tensor = flat_call(decoder, batch, use_cache=False).last_hidden_state
    return hidden[0]
