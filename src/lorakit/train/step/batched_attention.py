"""Attention over a packed batch by batched products: in plain PyTorch, for every device, dtype, softcap, window and sink.

A batch is cut into blocks. A block is a few runs of tokens (its lanes, padded to one length) that hang on the same path of
ancestors. Scores against the path are one matmul for all lanes together, since its keys are the same for all of them;
scores inside the lanes are a batched matmul; one softmax joins the two. Long runs are cut into pieces that hang on each
other, so that what causality hides is never computed and nothing of size tokens x tokens exists. Query heads that share a
key head are folded into the rows of the matmul. The backward pass forms the probabilities again from the log of their sum;
only q, k, v, the output and that sum are kept, and small probabilities.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorakit.native.elementwise import wide
from lorakit.train.step import fusion
from lorakit.train.step.packing import PackedBatch, Segment

PIECE = 256
"""Longest run computed at once; longer ones are cut. The fastest of 128, 256 and 512 at rows of 1,536."""

LANE_MULTIPLE = 16
"""Lanes are padded to a multiple of this, which keeps the number of distinct matmul shapes small."""

LANE_WASTE = 1.5
"""Lanes of one block may differ in length by this factor at most, or up to 32 tokens; beyond it they go into separate
blocks."""

KEEP = 1 << 22
"""A block keeps its probabilities for the backward pass up to this many numbers; beyond, they are computed again."""

_keep: contextvars.ContextVar[int] = contextvars.ContextVar("lorakit_attention_keep", default=KEEP)


# ---------------------------------------------------------------------------------------------------------------
# The plan: which rows meet which


@dataclass(frozen=True)
class Block:
    """Lanes that share a path. Indices are rows of `[tokens * heads, head_dim]`.

    `query_index` is `[key_heads * lanes * fold * length]`, `key_index` `[key_heads * lanes * length]`, `path`
    `[path tokens]` (rows of tokens) or None. `padding` `[groups, 1, length, 1]` is infinite at padded queries: added to
    the log of the sum, it makes them add nothing to the gradient of the keys they see.
    """

    lanes: int
    length: int
    query_index: Tensor
    key_index: Tensor
    padding: Tensor
    path: Tensor | None


@dataclass(frozen=True)
class Plan:
    """All blocks of a batch for one head layout, and where each token's result lies in the blocks' results."""

    blocks: tuple[Block, ...]
    query_return: Tensor
    key_return: Tensor
    key_heads: int
    head_dim: int
    used: int


def plan_attention(batch: PackedBatch, query_heads: int, key_heads: int, head_dim: int, window: int | None) -> Plan:
    """Work out the blocks of a batch once; the batch keeps them for its other layers."""
    key = (query_heads, key_heads, head_dim, window)
    plan: Plan | None = batch.plans.get(key)
    if plan is None:
        plan = batch.plans[key] = _build_plan(batch, query_heads, key_heads, head_dim, window)
    return plan


def _build_plan(batch: PackedBatch, query_heads: int, key_heads: int, head_dim: int, window: int | None) -> Plan:
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
        if window is not None:
            # The lane's first token still sees the window - 1 tokens before it; what lies further back, nobody does.
            path_rows = path_rows[max(0, path_rows.numel() - (window - 1)) :]
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
                )
            )
    return Plan(
        blocks=tuple(blocks),
        query_return=query_return.view(-1).to(device),
        key_return=key_return.view(-1).to(device),
        key_heads=key_heads,
        head_dim=head_dim,
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
# The softmax over path and lane, and its derivative: elementwise operations, fused by torch.compile.


def _hidden(scores: Tensor, window: int | None, behind: int = 0) -> Tensor:
    """True where a key lies ahead of a query, or out of the window: [queries, keys]. scores: [groups, fold, queries, keys].

    The first query lies `behind` keys behind the first key: 0 within a lane, all of them for the path above it.
    """
    query = torch.arange(scores.shape[2], device=scores.device)[:, None] + behind
    distance = query - torch.arange(scores.shape[3], device=scores.device)[None]
    hidden = distance < 0
    return hidden if window is None else hidden | (distance >= window)


def to_logits(products: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Raw products to the logits of a softmax, in fp32 (fp64 stays)."""
    logits = wide(products)
    if scale != 1.0:
        logits = logits * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


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
    own = to_logits(lane, scale, softcap).masked_fill(_hidden(lane, window), float("-inf"))
    top = own.amax(-1, keepdim=True)
    if path is not None:
        above = to_logits(path, scale, softcap)
        if window is not None:
            above = above.masked_fill(_hidden(path, window, path.shape[3]), float("-inf"))
        top = torch.maximum(top, above.amax(-1, keepdim=True))
    own = torch.exp(own - top)
    total = own.sum(-1, keepdim=True)
    if sink is not None:
        total = total + torch.exp(sink - top)
    if path is not None:
        above = torch.exp(above - top)
        total = total + above.sum(-1, keepdim=True)
    share = torch.where(padding == 0, 1 / total, 0.0)
    of_path = None if path is None else (above * share).to(path.dtype)
    return of_path, (own * share).to(lane.dtype), total.log() + top + padding


def softmax_kept_backward(p: Tensor, grad: Tensor, delta: Tensor, *, scale: float) -> Tensor:
    """The gradient of the raw scores from kept probabilities (zero at padded queries)."""
    return (wide(p) * (wide(grad) - delta) * scale).to(p.dtype)


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
    logits = to_logits(scores, scale, softcap)
    p = torch.exp(logits - log_sum)
    if not in_path or window is not None:
        p = p.masked_fill(_hidden(scores, window, scores.shape[3] if in_path else 0), 0.0)
    inner = p * (grad - delta) * scale
    if softcap is not None:
        inner = inner * (1 - (logits / softcap) ** 2)
    return p.to(scores.dtype), inner.to(scores.dtype)


class PackedAttention(torch.autograd.Function):
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
        shape = {"scale": scale, "softcap": softcap, "window": window}
        for block in plan.blocks:
            queries, keys, values, path_keys, path_values = gathered = _gather(plan, block, q, k, v)
            path, lane = _scores(plan, block, queries, keys, path_keys)
            sink = _sink(plan, block, sinks)
            path, lane, log_sum = fusion.call(softmax_joined, path, lane, sink, block.padding, **shape)
            small = softcap is None and lane.numel() + (0 if path is None else path.numel()) <= _keep.get()
            kept += [*gathered, path, lane] if small else [None] * 7
            out = torch.bmm(lane.view(-1, queries.shape[1], block.length), values)
            if path is not None and path_values is not None:
                out = out.view(plan.key_heads, -1, plan.head_dim)
                out.baddbmm_(path.view(plan.key_heads, -1, path.shape[-1]), path_values)
            rows.append(out.view(-1, plan.head_dim))
            log_sums.append(log_sum)
        out = _join(rows).index_select(0, plan.query_return).view_as(q)
        ctx.save_for_backward(q, k, v, sinks, out, *log_sums, *kept)
        ctx.plan, ctx.shape = plan, shape
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        q, k, v, sinks, out, *rest = ctx.saved_tensors
        plan = ctx.plan
        log_sums, kept = rest[: len(plan.blocks)], rest[len(plan.blocks) :]
        grad = grad.contiguous().view(-1, plan.head_dim)
        delta_rows = fusion.call(_row_products, grad, out.view(-1, plan.head_dim))
        query_rows, key_rows, value_rows = [], [], []
        path_grads: list[tuple[Tensor, Tensor, Tensor]] = []
        sink_grad = None if sinks is None else torch.zeros_like(sinks, dtype=delta_rows.dtype)

        def differentiate(
            scores: Tensor, grad: Tensor, log_sum: Tensor, delta: Tensor, remembers: bool, *, in_path: bool
        ) -> tuple[Tensor, Tensor]:
            """Probabilities, which `scores` are already where they were kept, and the gradient of the raw scores."""
            if remembers:
                return scores, fusion.call(softmax_kept_backward, scores, grad, delta, scale=ctx.shape["scale"])
            given = (scores, grad, log_sum, delta)
            found: tuple[Tensor, Tensor] = fusion.call(softmax_joined_backward, *given, **ctx.shape, in_path=in_path)
            return found

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
            p, inner = differentiate(lane, grad_lane, log_sum, delta, remembers, in_path=False)
            p, inner = p.view(-1, rows, block.length), inner.view(-1, rows, block.length)
            value_rows.append(torch.bmm(p.transpose(1, 2), grads_out).view(-1, plan.head_dim))
            key_rows.append(torch.bmm(inner.transpose(1, 2), queries).view(-1, plan.head_dim))
            grad_queries = torch.bmm(inner, keys)
            if path is not None and path_keys is not None and path_values is not None and block.path is not None:
                all_grads = grads_out.view(plan.key_heads, -1, plan.head_dim)
                all_queries = queries.view(plan.key_heads, -1, plan.head_dim)
                grad_path = torch.bmm(all_grads, path_values.transpose(1, 2)).view_as(path)
                found = differentiate(path, grad_path, log_sum, delta, remembers, in_path=True)
                p, inner = (one.view(plan.key_heads, -1, path.shape[-1]) for one in found)
                of_keys = torch.bmm(inner.transpose(1, 2), all_queries)
                path_grads.append((block.path, of_keys, torch.bmm(p.transpose(1, 2), all_grads)))
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
        of_sinks = None if sink_grad is None or sinks is None else sink_grad.to(sinks.dtype)
        return grad_q, grad_k, grad_v, of_sinks, None, None, None, None


@contextlib.contextmanager
def keeping(numbers: int) -> Iterator[None]:
    """Within, a block keeps its probabilities up to this many numbers."""
    token = _keep.set(numbers)
    try:
        yield
    finally:
        _keep.reset(token)


def _row_products(grad: Tensor, out: Tensor) -> Tensor:
    return (wide(grad) * wide(out)).sum(-1)


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
    return path.view(groups, -1, block.length, path.shape[-1]), lane


def _sink(plan: Plan, block: Block, sinks: Tensor | None) -> Tensor | None:
    """The sinks of each group's heads: `[groups, fold, 1, 1]`."""
    if sinks is None:
        return None
    of_heads = wide(sinks).view(plan.key_heads, 1, -1)
    return of_heads.expand(-1, block.lanes, -1).reshape(plan.key_heads * block.lanes, -1, 1, 1)


def _join(rows: list[Tensor]) -> Tensor:
    return rows[0] if len(rows) == 1 else torch.cat(rows)
