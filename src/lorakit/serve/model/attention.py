"""Attention of the serving model: it reads and writes the engine's pages, and each token sees its own request.

transformers calls attention by a registered name. A serving model's configuration names ours. Within a step ours writes the
new keys and values into their pages and attends over them; outside of one it calls what the model had before, so that the
model can still be used otherwise. Scale, softcap, sliding window and sinks arrive as arguments and are
honoured. A mask of the model's own, a bias, or dropout are not: such models are refused when the engine probes them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.models.attention import Override
from lorakit.serve.model import native
from lorakit.serve.model.batch import TILE, Batch
from lorakit.serve.model.cache import PAGE, Cache, LayerShape, gathered
from lorakit.serve.request import Refused


@dataclass(frozen=True)
class Asked:
    """What a layer asks of attention in addition to q, k and v."""

    scale: float
    softcap: float
    window: int
    sinks: Tensor | None

    @property
    def address(self) -> int:
        """Of the sinks; 0 where there are none."""
        return 0 if self.sinks is None else self.sinks.data_ptr()


@dataclass
class ForwardContext:
    """What the engine's thread tells the layers of its model: the batch of this step.

    Attributes:
        batch: the step, or None outside of one.
        cache: the pages, once the layers are known.
        seen: layer -> its shape, filled while the engine looks at the model for the first time.
        asked: layer -> what its attention was asked for in the last step.
        compiled: whether the loops of `native.cpp` are used.
        kernels: whether Triton's kernels are, on a GPU.
        trial: whether this is the trial of a model: weights in blocks are multiplied as floats, since rounding the inputs to
            bytes makes more of a difference than what the trial looks for.
    """

    batch: Batch | None = None
    cache: Cache | None = None
    seen: dict[int, LayerShape] = field(default_factory=dict)
    asked: dict[int, Asked] = field(default_factory=dict)
    compiled: bool = True
    kernels: bool = False
    trial: bool = False


def serve_attention(model: nn.Module, context: ForwardContext) -> Callable[[], None]:
    """Let the attention of a model follow a `ForwardContext`; returns what gives the model its own back.

    Raises:
        Refused: the model has no attention that transformers' registry names.
    """

    def attention(inner: Any, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *a: Any, **k: Any) -> Any:
        if context.batch is not None and context.cache is not None:
            return attend(context, module, query, key, value, *a, **k), None
        index = getattr(module, "layer_idx", None)
        if isinstance(index, int):
            context.seen[index] = LayerShape(key.shape[1], key.shape[3], value.shape[3])
        return inner(module, query, key, value, *a, **k)

    def mask(inner: Any, *args: Any, **kwargs: Any) -> Any:
        return inner(*args, **kwargs) if context.batch is None else None

    override = Override(f"serve_{id(context):x}", attention, mask)
    if not override.put_on(model):
        raise Refused(
            f"{type(model).__name__} takes no attention from transformers' registry, so its keys and values cannot be kept "
            "in the engine's pages. Causal models of transformers do."
        )
    return lambda: override.take_off(model)


def attend(
    context: ForwardContext,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """One layer's attention over the batch of the step.

    Args:
        query: (1, heads, tokens, key width); key, value: (1, key heads, tokens, width).
        softcap: logits become softcap · tanh(logits / softcap).
        sliding_window: a token sees itself and this many less one before it.
        s_aux: (heads,), a logit per head that only takes probability away.

    Returns:
        (1, tokens, heads, value width).

    Raises:
        Refused: the layer asks for something that this attention would do otherwise.
    """
    batch, cache = context.batch, context.cache
    assert batch is not None
    assert cache is not None
    if attention_mask is not None or kwargs.get("position_bias") is not None or dropout:
        raise Refused(
            f"{type(module).__name__} brings a mask, a bias or dropout of its own, which the engine cannot honour."
        )
    if kwargs.get("is_causal") is False or not getattr(module, "is_causal", True):
        raise Refused(f"{type(module).__name__} is not causal.")
    layer: int = module.layer_idx  # type: ignore[assignment]
    keys, values = cache.keys[layer], cache.values[layer]
    _, heads, tokens, d = query.shape
    _, key_heads, _, dv = value.shape
    scale = d**-0.5 if scaling is None else float(scaling)
    edits = batch.edits
    if edits is not None:
        key, value = edits.before(layer, key, value)
    sinks = None if s_aux is None else s_aux.float().contiguous()
    asked = context.asked[layer] = Asked(scale, softcap or 0.0, sliding_window or 0, sinks)
    if batch.kernels:
        from lorakit.native.triton import paged

        if not query.stride(3) == key.stride(3) == value.stride(3) == 1:
            query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        on = batch.on_gpu
        where = (keys, values, on.table, on.row, on.place, on.tiles, TILE)
        out = paged.attend(query, key, value, *where, scale, asked.softcap, asked.window, sinks)
    elif context.compiled and (function := native.find("attend", query.dtype)) is not None:
        if not query.stride(3) == key.stride(3) == value.stride(3) == 1:
            query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        out = query.new_empty(1, tokens, heads, dv)
        # fmt: off
        function(
            query.data_ptr(), query.stride(1), query.stride(2), key.data_ptr(), key.stride(1), key.stride(2),
            value.data_ptr(), value.stride(1), value.stride(2), out.data_ptr(), keys.data_ptr(), values.data_ptr(),
            *batch.addresses, heads, key_heads, d, dv, scale, asked.softcap, asked.window, asked.address,
        )
        # fmt: on
    else:
        pieces = []
        for (first, count), pages in zip(batch.spans, batch.pages, strict=True):
            part = slice(first, first + count)
            start = int(batch.place[first])
            _write(keys, values, pages, start, key[0, :, part], value[0, :, part])
            seen = -(-(start + count) // PAGE)
            k, v = gathered(keys, values, torch.tensor(pages[:seen], device=keys.device))
            pieces.append(_attend_run(query[0, :, part], k, v, start, scale, softcap, sliding_window, sinks))
        out = torch.cat(pieces, 0)[None]
    if edits is not None:
        edits.beside(layer, query, scale, out)
    return out


def _write(keys: Tensor, values: Tensor, pages: Any, start: int, key: Tensor, value: Tensor) -> None:
    """Put new keys and values (heads, tokens, width) into their places."""
    places = torch.arange(start, start + key.shape[1], device=keys.device)
    page = torch.tensor(pages, device=keys.device)[places // PAGE]
    keys[page, :, :, places % PAGE] = key.transpose(0, 1)
    values[page, :, places % PAGE] = value.transpose(0, 1)


def _attend_run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: int,
    scale: float,
    softcap: float | None,
    window: int | None,
    sinks: Tensor | None,
) -> Tensor:
    """q (heads, tokens, d) over k (key heads, d, length), v (key heads, length, dv) -> (tokens, heads, dv)."""
    heads, tokens, d = q.shape
    key_heads, _, length = k.shape
    scores = (q.reshape(key_heads, -1, d) @ k).float().view(heads, tokens, length) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    here = torch.arange(start, start + tokens, device=q.device)[:, None]
    there = torch.arange(length, device=q.device)[None]
    hidden = there > here
    if window:
        hidden = hidden | (here - there >= window)
    scores = scores.masked_fill(hidden, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks[:, None, None].expand(heads, tokens, 1)], -1)
    p = scores.softmax(-1)[..., :length].to(v.dtype)
    # What nobody sees may hold anything, and zero times anything is not always zero.
    v = v.masked_fill((there[0] >= start + tokens)[None, :, None], 0)
    return (p.view(key_heads, -1, length) @ v).view(heads, tokens, -1).transpose(0, 1)
