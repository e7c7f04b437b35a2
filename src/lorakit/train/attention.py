"""Attention over a flat row: every example sees itself and the shared runs above it, exactly, without padding outside.

A batch is cut into blocks. A block is a few runs of tokens (its lanes, padded to one length) that hang on the
same path of ancestors. Scores against the path are one matmul for all lanes together, since its keys are the
same for all of them; scores inside the lanes are a batched matmul; one softmax joins the two. Long runs are cut
into pieces that hang on each other, so that what causality hides is never computed and nothing of size tokens x
tokens exists; where long examples share nothing and nothing is special about them, torch's own attention takes
them one by one. Query heads that share a key head are folded into the rows of the matmul. The backward pass
forms the probabilities again from the log of their sum; only q, k, v, the output and that sum are kept.

The function reaches models through transformers' own registry: `flat_attention(model)` switches a model to it and
back. The batch travels as the keyword argument `flat_batch` of the model's forward, which gradient checkpointing
stores and repeats by itself. Calls without that argument (evaluation, generate) take the attention the model had.
"""

from __future__ import annotations

import contextlib
import contextvars
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorakit.adapter import adapters
from lorakit.anatomy import configurations
from lorakit.attending import with_edits
from lorakit.train import fusion, last_block
from lorakit.train.packing import FlatBatch, Segment, TextBatch

PIECE = 256
"""Longest run computed at once; longer ones are cut. The fastest of 128, 256 and 512 at rows of 1,536."""

LONG = 512
"""From this mean length on, examples that share nothing go through torch's own attention, one by one: on the machine
of docs/benchmarks.md it takes 0.74 of the time at 1,536 tokens, and more than three times the time at 35."""

LANE_MULTIPLE = 16
"""Lanes are padded to a multiple of this, which keeps the number of distinct matmul shapes small."""

LANE_WASTE = 1.5
"""Lanes of one block may differ in length by this factor at most, or up to 32 tokens; beyond it they go into separate
blocks."""

KEEP = 1 << 22
"""A block keeps its probabilities for the backward pass up to this many numbers; beyond, they are computed again."""

_keep: contextvars.ContextVar[int] = contextvars.ContextVar("lorakit_attention_keep", default=KEEP)

PREFIX = "lorakit_flat_over_"
_in_flat_forward: contextvars.ContextVar[bool] = contextvars.ContextVar("lorakit_flat_forward", default=False)


# ---------------------------------------------------------------------------------------------------------------
# The plan: which rows meet which


@dataclass(frozen=True)
class Block:
    """Lanes that share a path. Indices are rows of `[tokens * heads, head_dim]`.

    `query_index` is `[key_heads * lanes * fold * length]`, `key_index` `[key_heads * lanes * length]`, `path`
    `[path tokens]` (rows of tokens) or None. `padding` `[groups, 1, length, 1]` is infinite at padded queries: added to
    the log of the sum, it makes them add nothing to the gradient of the keys they see. `offset` is the length of the
    path, which is how far a lane's first token lies behind the path's first.
    """

    lanes: int
    length: int
    query_index: Tensor
    key_index: Tensor
    padding: Tensor
    path: Tensor | None
    offset: int


@dataclass(frozen=True)
class Plan:
    """All blocks of a batch for one head layout, and where each token's result lies in the blocks' results."""

    blocks: tuple[Block, ...]
    query_return: Tensor
    key_return: Tensor
    query_heads: int
    key_heads: int
    head_dim: int
    tokens: int
    used: int


def plan_attention(batch: FlatBatch, query_heads: int, key_heads: int, head_dim: int, window: int | None) -> Plan:
    """Work out the blocks of a batch once; the batch keeps them for its other layers."""
    key = (query_heads, key_heads, head_dim, window)
    plan: Plan | None = batch.plans.get(key)
    if plan is None:
        plan = batch.plans[key] = _build_plan(batch, query_heads, key_heads, head_dim, window)
    return plan


def _build_plan(batch: FlatBatch, query_heads: int, key_heads: int, head_dim: int, window: int | None) -> Plan:
    device = batch.input_ids.device
    fold = query_heads // key_heads
    groups: dict[int, list[Segment]] = {}
    paths: dict[int, list[tuple[int, int]]] = {-1: []}
    pieces = _cut(batch.segments)
    for index, piece in enumerate(pieces):
        paths[index] = [*paths[piece.parent], (piece.start, piece.length)]
        groups.setdefault(piece.parent, []).append(piece)

    blocks: list[Block] = []
    query_return = torch.zeros(batch.tokens, query_heads, dtype=torch.long)
    key_return = torch.zeros(batch.tokens, key_heads, dtype=torch.long)
    query_rows = key_rows = 0
    key_head = torch.arange(key_heads)
    for parent, members in groups.items():
        path_rows = torch.tensor([t for start, n in paths[parent] for t in range(start, start + n)], dtype=torch.long)
        first = 0
        if window is not None:
            # The lane's first token still sees the window - 1 tokens before it; what lies further back, nobody does.
            first = max(0, path_rows.numel() - (window - 1))
            path_rows = path_rows[first:]
        for lanes in _lanes(members):
            length = -(-max(segment.length for segment in lanes) // LANE_MULTIPLE) * LANE_MULTIPLE
            count = len(lanes)
            starts = torch.tensor([segment.start for segment in lanes])
            lengths = torch.tensor([segment.length for segment in lanes])
            step = torch.arange(length)
            # Padding repeats the lane's last token: valid memory, and no real query looks that far ahead.
            tokens = starts[:, None] + torch.minimum(step[None], lengths[:, None] - 1)  # [lanes, length]
            heads = torch.arange(query_heads).view(key_heads, fold)
            query_index = tokens[None, :, None, :] * query_heads + heads[:, None, :, None]
            key_index = tokens[None] * key_heads + key_head[:, None, None]

            real = step[None] < lengths[:, None]
            where = torch.arange(key_heads * count * fold * length).view(key_heads, count, fold, length)
            query_return[tokens[real]] = (query_rows + where).permute(1, 3, 0, 2).reshape(count, length, -1)[real]
            where = torch.arange(key_heads * count * length).view(key_heads, count, length)
            key_return[tokens[real]] = (key_rows + where).permute(1, 2, 0)[real]
            padding = torch.zeros(count, length).masked_fill_(~real, float("inf"))
            padding = padding.expand(key_heads, count, length).reshape(key_heads * count, 1, length, 1)
            query_rows += query_index.numel()
            key_rows += key_index.numel()
            blocks.append(
                Block(
                    lanes=count,
                    length=length,
                    query_index=query_index.reshape(-1).to(device),
                    key_index=key_index.reshape(-1).to(device),
                    padding=padding.to(device),
                    path=path_rows.to(device) if path_rows.numel() else None,
                    offset=path_rows.numel(),
                )
            )
    return Plan(
        blocks=tuple(blocks),
        query_return=query_return.view(-1).to(device),
        key_return=key_return.view(-1).to(device),
        query_heads=query_heads,
        key_heads=key_heads,
        head_dim=head_dim,
        tokens=batch.tokens,
        used=batch.used,
    )


def _cut(segments: tuple[Segment, ...]) -> list[Segment]:
    """Segments with every run longer than PIECE replaced by a chain of pieces."""
    pieces: list[Segment] = []
    last_of: dict[int, int] = {-1: -1}
    for index, segment in enumerate(segments):
        parent = last_of[segment.parent]
        count = -(-segment.length // PIECE)
        done = 0
        for part in range(count):
            length = segment.length * (part + 1) // count - done
            pieces.append(Segment(segment.start + done, length, segment.position + done, parent))
            parent = len(pieces) - 1
            done += length
        last_of[index] = parent
    return pieces


def _lanes(members: list[Segment]) -> list[list[Segment]]:
    """Siblings sorted into blocks of similar length."""
    result: list[list[Segment]] = []
    for segment in sorted(members, key=lambda segment: -segment.length):
        if result and result[-1][0].length <= max(LANE_WASTE * segment.length, 2 * LANE_MULTIPLE):
            result[-1].append(segment)
        else:
            result.append([segment])
    return result


# ---------------------------------------------------------------------------------------------------------------
# The softmax over path and lane, and its derivative. Small functions: compiled where that pays.


def _hidden_path(scores: Tensor, window: int) -> Tensor:
    """True where a query lies `window` or more behind a key of the path. scores: [groups, fold, length, path]."""
    query = torch.arange(scores.shape[2], device=scores.device)[:, None] + scores.shape[3]
    return query - torch.arange(scores.shape[3], device=scores.device)[None] >= window


def _hidden_lane(scores: Tensor, window: int | None) -> Tensor:
    """True where a key lies ahead of a query, or out of the window. scores: [groups, fold, length, length]."""
    distance = (
        torch.arange(scores.shape[2], device=scores.device)[:, None]
        - torch.arange(scores.shape[3], device=scores.device)[None]
    )
    hidden = distance < 0
    return hidden if window is None else hidden | (distance >= window)


def _shape_scores(scores: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Raw products to the logits of the softmax, in fp32 (fp64 stays)."""
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32)) * scale
    return wide if softcap is None else softcap * torch.tanh(wide / softcap)


def softmax_joined(
    path: Tensor | None,
    lane: Tensor,
    sink: Tensor | None,
    padding: Tensor,
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Probabilities over path and lane together, and the log of the sum: [groups, fold, length, 1], fp32."""
    own = _shape_scores(lane, scale, softcap).masked_fill(_hidden_lane(lane, window), float("-inf"))
    top = own.amax(-1, keepdim=True)
    if path is not None:
        above = _shape_scores(path, scale, softcap)
        if window is not None:
            above = above.masked_fill(_hidden_path(path, window), float("-inf"))
        top = torch.maximum(top, above.amax(-1, keepdim=True))
    own = torch.exp(own - top)
    total = own.sum(-1, keepdim=True)
    if sink is not None:
        total = total + torch.exp(sink - top)
    if path is None:
        share = torch.where(padding == 0, 1 / total, 0.0)
        return None, (own * share).to(lane.dtype), total.log() + top + padding
    above = torch.exp(above - top)
    total = total + above.sum(-1, keepdim=True)
    share = torch.where(padding == 0, 1 / total, 0.0)
    return (above * share).to(path.dtype), (own * share).to(lane.dtype), total.log() + top + padding


def softmax_kept_backward(p: Tensor, grad: Tensor, delta: Tensor, *, scale: float) -> Tensor:
    """The gradient of the raw scores from kept probabilities (zero at padded queries)."""
    wide = torch.promote_types(p.dtype, torch.float32)
    return (p.to(wide) * (grad.to(wide) - delta) * scale).to(p.dtype)


def softmax_joined_backward(
    scores: Tensor,
    grad: Tensor,
    log_sum: Tensor,
    delta: Tensor,
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
    in_path: bool,
) -> tuple[Tensor, Tensor]:
    """Probabilities again, and the gradient of the raw scores. `grad` is that of the probabilities."""
    logits = _shape_scores(scores, scale, softcap)
    p = torch.exp(logits - log_sum)
    if in_path:
        if window is not None:
            p = p.masked_fill(_hidden_path(scores, window), 0.0)
    else:
        p = p.masked_fill(_hidden_lane(scores, window), 0.0)
    inner = p * (grad - delta) * scale
    if softcap is not None:
        inner = inner * (1 - (logits / softcap) ** 2)
    return p.to(scores.dtype), inner.to(scores.dtype)


class FlatAttention(torch.autograd.Function):
    """q `[tokens, query_heads, head_dim]`, k and v `[tokens, key_heads, head_dim]` -> output like q."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        plan: Plan,
        scale: float,
        softcap: float | None,
        window: int | None,
    ) -> Tensor:
        rows, log_sums = [], []
        kept: list[Tensor | None] = []
        for block in plan.blocks:
            queries, keys, values, path_keys, path_values = gathered = _gather(plan, block, q, k, v)
            path, lane = _scores(plan, block, queries, keys, path_keys)
            path, lane, log_sum = fusion.call(
                softmax_joined,
                path,
                lane,
                _sink(plan, block, sinks),
                block.padding,
                scale=scale,
                softcap=softcap,
                window=window,
            )
            small = softcap is None and lane.numel() + (0 if path is None else path.numel()) <= _keep.get()
            kept += [*gathered, path, lane] if small else [None] * 7
            out = torch.bmm(lane.view(-1, queries.shape[1], block.length), values)
            if path is not None and path_values is not None:
                out = out.view(plan.key_heads, -1, plan.head_dim)
                out.baddbmm_(path.view(plan.key_heads, -1, block.offset), path_values)
            rows.append(out.view(-1, plan.head_dim))
            log_sums.append(log_sum)
        out = _join(rows).index_select(0, plan.query_return).view(plan.tokens, plan.query_heads, plan.head_dim)
        ctx.save_for_backward(q, k, v, sinks, out, *log_sums, *kept)
        ctx.plan, ctx.scale, ctx.softcap, ctx.window = plan, scale, softcap, window
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        q, k, v, sinks, out, *rest = ctx.saved_tensors
        plan, scale, softcap, window = ctx.plan, ctx.scale, ctx.softcap, ctx.window
        log_sums, kept = rest[: len(plan.blocks)], rest[len(plan.blocks) :]
        grad = grad.contiguous().view(-1, plan.head_dim)
        delta_rows = fusion.call(_row_products, grad, out.view(-1, plan.head_dim))
        query_rows, key_rows, value_rows = [], [], []
        path_grads: list[tuple[Tensor, Tensor, Tensor]] = []
        sink_grad = None if sinks is None else torch.zeros_like(sinks, dtype=delta_rows.dtype)
        for index, (block, log_sum) in enumerate(zip(plan.blocks, log_sums, strict=True)):
            *gathered, path, lane = kept[7 * index : 7 * index + 7]
            remembers = lane is not None
            queries, keys, values, path_keys, path_values = gathered if remembers else _gather(plan, block, q, k, v)
            if not remembers:
                path, lane = _scores(plan, block, queries, keys, path_keys)
            grads_out = grad.index_select(0, block.query_index).view_as(queries)
            delta = delta_rows.index_select(0, block.query_index).view_as(log_sum)
            rows = queries.shape[1]
            grad_lane = torch.bmm(grads_out, values.transpose(1, 2)).view_as(lane)
            if remembers:
                p, inner = lane, fusion.call(softmax_kept_backward, lane, grad_lane, delta, scale=scale)
            else:
                p, inner = fusion.call(
                    softmax_joined_backward,
                    lane,
                    grad_lane,
                    log_sum,
                    delta,
                    scale=scale,
                    softcap=softcap,
                    window=window,
                    in_path=False,
                )
            p, inner = p.view(-1, rows, block.length), inner.view(-1, rows, block.length)
            value_rows.append(torch.bmm(p.transpose(1, 2), grads_out).view(-1, plan.head_dim))
            key_rows.append(torch.bmm(inner.transpose(1, 2), queries).view(-1, plan.head_dim))
            grad_queries = torch.bmm(inner, keys)
            if path is not None and path_keys is not None and path_values is not None and block.path is not None:
                all_grads = grads_out.view(plan.key_heads, -1, plan.head_dim)
                all_queries = queries.view(plan.key_heads, -1, plan.head_dim)
                grad_path = torch.bmm(all_grads, path_values.transpose(1, 2)).view_as(path)
                if remembers:
                    p, inner = path, fusion.call(softmax_kept_backward, path, grad_path, delta, scale=scale)
                else:
                    p, inner = fusion.call(
                        softmax_joined_backward,
                        path,
                        grad_path,
                        log_sum,
                        delta,
                        scale=scale,
                        softcap=softcap,
                        window=window,
                        in_path=True,
                    )
                p, inner = (
                    p.view(plan.key_heads, -1, block.offset),
                    inner.view(plan.key_heads, -1, block.offset),
                )
                path_grads.append(
                    (
                        block.path,
                        torch.bmm(inner.transpose(1, 2), all_queries),
                        torch.bmm(p.transpose(1, 2), all_grads),
                    )
                )
                grad_queries = torch.baddbmm(grad_queries.view(plan.key_heads, -1, plan.head_dim), inner, path_keys)
            query_rows.append(grad_queries.view(-1, plan.head_dim))
            if sink_grad is not None and sinks is not None:
                p_sink = torch.exp(_sink(plan, block, sinks) - log_sum)
                p_sink = -(p_sink * delta).view(plan.key_heads, block.lanes, -1, block.length).sum((1, 3))
                sink_grad += p_sink.reshape(-1)

        grad_q = _join(query_rows).index_select(0, plan.query_return).view_as(q)
        grad_k = _join(key_rows).index_select(0, plan.key_return).view_as(k)
        grad_v = _join(value_rows).index_select(0, plan.key_return).view_as(v)
        for filled in (grad_q, grad_k, grad_v):
            filled[plan.used :] = 0
        for path_rows, of_keys, of_values in path_grads:
            grad_k.index_add_(0, path_rows, of_keys.transpose(0, 1))
            grad_v.index_add_(0, path_rows, of_values.transpose(0, 1))
        return (
            grad_q,
            grad_k,
            grad_v,
            None if sink_grad is None or sinks is None else sink_grad.to(sinks.dtype),
            None,
            None,
            None,
            None,
        )


@contextlib.contextmanager
def keeping(numbers: int) -> Iterator[None]:
    """Within, a block keeps its probabilities up to this many numbers."""
    token = _keep.set(numbers)
    try:
        yield
    finally:
        _keep.reset(token)


def _row_products(grad: Tensor, out: Tensor) -> Tensor:
    wide = torch.promote_types(grad.dtype, torch.float32)
    return (grad.to(wide) * out.to(wide)).sum(-1)


def _gather(
    plan: Plan, block: Block, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """A block's queries `[groups, fold * length, d]`, keys and values `[groups, length, d]`, and the path's
    `[key_heads, path, d]`, where groups = key_heads * lanes."""
    groups, d = plan.key_heads * block.lanes, plan.head_dim
    queries = q.view(-1, d).index_select(0, block.query_index).view(groups, -1, d)
    keys = k.view(-1, d).index_select(0, block.key_index).view(groups, -1, d)
    values = v.view(-1, d).index_select(0, block.key_index).view(groups, -1, d)
    if block.path is None:
        return queries, keys, values, None, None
    path_keys = k.index_select(0, block.path).transpose(0, 1)
    path_values = v.index_select(0, block.path).transpose(0, 1)
    return queries, keys, values, path_keys.contiguous(), path_values.contiguous()


def _scores(
    plan: Plan, block: Block, queries: Tensor, keys: Tensor, path_keys: Tensor | None
) -> tuple[Tensor | None, Tensor]:
    """Raw products `[groups, fold, length, path]` (or None) and `[groups, fold, length, length]`."""
    groups = queries.shape[0]
    lane = torch.bmm(queries, keys.transpose(1, 2)).view(groups, -1, block.length, block.length)
    if path_keys is None:
        return None, lane
    path = torch.bmm(queries.view(plan.key_heads, -1, plan.head_dim), path_keys.transpose(1, 2))
    return path.view(groups, -1, block.length, block.offset), lane


def _sink(plan: Plan, block: Block, sinks: Tensor | None) -> Tensor | None:
    """The sinks of each group's heads: `[groups, fold, 1, 1]`."""
    if sinks is None:
        return None
    wide = sinks.to(torch.promote_types(sinks.dtype, torch.float32)).view(plan.key_heads, 1, -1)
    return wide.expand(-1, block.lanes, -1).reshape(plan.key_heads * block.lanes, -1, 1, 1)


def _join(rows: list[Tensor]) -> Tensor:
    return rows[0] if len(rows) == 1 else torch.cat(rows)


# ---------------------------------------------------------------------------------------------------------------
# The way into a model


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
        return _attend_both_ways(flat_batch, module, (query, key, value), dropout, scaling, kwargs), None
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
    if softcap is None and s_aux is None and _is_long(flat_batch, sliding_window):
        return _attend_long(flat_batch, query, key, value, scaling), None
    q, k, v = (tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value))
    if q.shape[2] != k.shape[2] or v.shape[2] != k.shape[2]:
        raise ValueError("flat attention: keys and values differ in width; use the padded path")
    plan = plan_attention(flat_batch, q.shape[1], k.shape[1], q.shape[2], sliding_window)
    scale = q.shape[2] ** -0.5 if scaling is None else float(scaling)
    out: Tensor = FlatAttention.apply(q, k, v, s_aux, plan, scale, softcap, sliding_window)  # type: ignore[no-untyped-call]
    return out[None], None


def _is_long(batch: FlatBatch, window: int | None) -> bool:
    """Does torch's own causal attention suit this batch: long examples without company, no window that matters?"""
    segments = batch.segments
    alone = all(segment.parent < 0 for segment in segments)
    longest = max(segment.length for segment in segments)
    return alone and batch.used >= LONG * len(segments) and (window is None or longest <= window)


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


class _Move(torch.autograd.Function):
    """Rows to places of a larger tensor, zeros between, or back from them. Places are distinct, so nothing adds up."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, place: Tensor, size: int | None) -> Tensor:
        ctx.save_for_backward(place)
        ctx.rows, ctx.spreads = rows.shape[0], size is not None
        if size is None:
            return rows.index_select(0, place)
        return rows.new_zeros(size, rows.shape[1]).index_copy_(0, place, rows)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        (place,) = ctx.saved_tensors
        grad = grads[0].contiguous()
        if ctx.spreads:
            return grad.index_select(0, place), None, None
        return grad.new_zeros(ctx.rows, grad.shape[1]).index_copy_(0, place, grad), None, None


class _Drop(torch.autograd.Function):
    """Zeros instead of a share of the numbers. The others are not scaled up: what they are multiplied with is smaller.

    Sixteen random bits decide each, to 1 in 65,536 of the share; drawing them is several times as fast as torch's own
    Bernoulli numbers, which were a tenth of a step here.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, share: float) -> Tensor:
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device).random_(-(2**63), None)
        kept = bits.view(torch.int16)[: x.numel()].view(x.shape) >= round(share * 2**16) - 2**15
        ctx.save_for_backward(kept)
        return x * kept

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        (kept,) = ctx.saved_tensors
        return grads[0] * kept, None


def _attend_both_ways(
    batch: TextBatch,
    module: torch.nn.Module,
    heads: tuple[Tensor, Tensor, Tensor],
    dropout: float,
    scaling: float | None,
    given: dict[str, Any],
) -> Tensor:
    """An encoder's attention: each text sees all of itself. heads: `[1, heads, tokens, head_dim]` each.

    Padding exists in here alone, and matmuls suit it: texts are short.
    """
    if getattr(module, "is_causal", False) or given.get("is_causal"):
        raise ValueError("flat attention: this layer is causal, but the row holds texts for an encoder")
    if given.get("position_bias") is not None or heads[1].shape[1] != heads[0].shape[1]:
        raise ValueError("flat attention: a bias or shared key heads in an encoder; use the padded path")
    _, count, tokens, d = heads[0].shape
    if tokens != batch.tokens:
        raise ValueError(f"flat attention: {tokens} queries are not one row of {batch.tokens} tokens")
    texts, _, longest = batch.hidden.shape
    if count not in batch.plans:
        text, step = batch.place // longest, batch.place % longest
        row = (text[:, None] * count + torch.arange(count, device=text.device)) * longest + step[:, None]
        wide = batch.hidden[:, None].expand(texts, count, 1, longest).reshape(texts * count, 1, longest)
        bias = torch.zeros(wide.shape, dtype=heads[0].dtype, device=wide.device).masked_fill_(wide, float("-inf"))
        batch.plans[count] = row.view(-1), bias
    place, bias = batch.plans[count]
    size = texts * count * longest
    q, k, v = (
        _Move.apply(one[0].transpose(0, 1).reshape(-1, d), place, size).view(-1, longest, d)  # type: ignore[no-untyped-call]
        for one in heads
    )
    scores = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=d**-0.5 if scaling is None else float(scaling))
    p = scores.softmax(-1)
    if dropout:
        p = _Drop.apply(p, dropout)  # type: ignore[no-untyped-call]
    out: Tensor = _Move.apply(torch.bmm(p, v).view(-1, d), place, None)  # type: ignore[no-untyped-call]
    return (out / (1 - dropout) if dropout else out).view(1, tokens, count, d)


def _attention_over(original: str) -> Callable[..., Any]:
    """The registered function: flat where a flat batch comes along, else what the model had before."""

    def forward(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("flat_batch") is not None or _in_flat_forward.get():
            return with_edits(flat_attention_forward, module, args, kwargs, flat=True)
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        return ALL_ATTENTION_FUNCTIONS.get_interface(original, eager)(module, *args, **kwargs)

    return forward


def _mask_over(original: str) -> Callable[..., Any]:
    """The registered mask function: none for a flat row, else the mask the model had before."""

    def mask(*args: Any, **kwargs: Any) -> Any:
        if _in_flat_forward.get():
            return None
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

        return ALL_MASK_ATTENTION_FUNCTIONS[original](*args, **kwargs)

    return mask


@contextlib.contextmanager
def flat_attention(model: torch.nn.Module) -> Iterator[None]:
    """Inside, `model` can take flat rows; every other call to it goes on as before. Restored on leaving.

    Keep it open around backward too: activation checkpointing runs the layers again there.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    changed = []
    for config in configurations(model):
        original = config._attn_implementation_internal or "eager"
        if original.startswith(PREFIX):
            continue
        name = PREFIX + original
        AttentionInterface.register(name, _attention_over(original))
        AttentionMaskInterface.register(name, _mask_over(original))
        changed.append((config, config._attn_implementation_internal))
        config._attn_implementation_internal = name
    try:
        decoder: Any = getattr(model, "get_decoder", None)
        with last_block.opened(decoder and decoder()):
            yield
    finally:
        for config, before in changed:
            config._attn_implementation_internal = before


def is_flat(model: torch.nn.Module) -> bool:
    """Is `flat_attention(model)` open?"""
    return any((config._attn_implementation_internal or "").startswith(PREFIX) for config in configurations(model))


def edits_obstacle(model: torch.nn.Module, texts: bool = False) -> str | None:
    """Why an edit on the model cannot act on a flat row, or None; `texts`: a row of whole texts for an encoder."""
    for adapter in adapters(model).values():
        if adapter.edits:
            spec = adapter.method
            reason = spec.flat or ("every text needs the prompt for itself" if texts and spec.family else None)
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
