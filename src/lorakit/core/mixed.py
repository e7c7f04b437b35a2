"""One call of an adapted layer in which rows, or tokens, have adapters of their own.

Low-rank deltas of all adapters run as one product: their factors side by side, and each token's weights as its gate. Other
deltas act on all rows, times their weights. Where nothing acts beside the layer, rows of the same weights are called together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lorakit.core.call import LayerCall
from lorakit.core.contents import LayerContents
from lorakit.core.delta import LowRank
from lorakit.core.layout import Expert, Site
from lorakit.core.routing import Routing
from lorakit.core.rows import check_rows, first_tensor, join, pad, take, take_attention, take_recurrent
from lorakit.core.uniform import change, is_product, run_uniform
from lorakit.errors import LorakitError


def run_mixed(
    layer: LayerContents, routing: Routing, names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """The layer's output with every row's (or token's) own weights; `names` are the adapters at this layer."""
    routed = any(name in layer.state.routers for name in routing.names)
    replacing = [name for name in names if name in layer.replacements]
    if replacing or not layer.beside:
        if routed:
            name = names[0] if not layer.beside else replacing[0]
            raise LorakitError(
                f"use: {layer.path} replaces whole tensors for adapter {name!r} or is reached by substitution, so a router "
                "cannot weigh it token by token; use this adapter without the router."
            )
        return _run_in_groups(layer, routing, names, args, kwargs)
    x = first_tensor(args, kwargs)
    table = None if routing.table is None else routing.table_on(x.device)
    if table is not None:
        if layer.tokens and x.ndim == 2 and routing.axis == 0 and x.shape[0] != routing.rows:
            table = _by_token(table, x, None, layer.path)
        check_rows(x, table.shape[0], routing.axis, layer.path)
    columns = [routing.names.index(name) for name in names] if not routed else []
    y = layer.base(*args, **kwargs)
    total: Tensor | None = None
    for key, site in layer.sites.items():
        held = [layer.deltas_of(name).get(key) for name in names]
        if not any(delta is not None for delta in held):
            continue
        if routed:
            weights = router_weights(layer, routing, table, names, site, x)
        else:
            weights = _on_axes_of(cast(Tensor, table)[:, columns], routing.axis, site, x)
        low: list[tuple[LowRank, Tensor]] = []
        for column, delta in enumerate(held):
            if delta is None:
                continue
            weight = weights[..., column : column + 1]
            if is_product(delta) and not (delta.training and delta.dropout):
                low.append((cast(LowRank, delta), weight))
                continue
            added = change(layer, delta, site, x, y)
            added = added * weight.reshape(*weight.shape[:-1], *[1] * (added.ndim - weight.ndim + 1)).to(added.dtype)
            total = added if total is None else total + added
        if low:
            added = LayerCall(layer.base, site, x, y).product(*side_by_side(low))
            total = added if total is None else total + added
    return y if total is None else y + total.to(y.dtype)


def side_by_side(weighted: Sequence[tuple[LowRank, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Low-rank deltas with their weights (…, 1) as the factors B, A and the gate of one product."""
    pairs = [delta.factors() for delta, _ in weighted]
    ranks = [A.shape[0] for _, A in pairs]
    return torch.cat([B for B, _ in pairs], dim=1), torch.cat([A for _, A in pairs], dim=0), joint_gate(weighted, ranks)


def joint_gate(weighted: Sequence[tuple[LowRank, Tensor]], ranks: Sequence[int]) -> Tensor:
    """The gate (…, Σ ranks) of low-rank deltas of these ranks side by side, with their weights (…, 1) and scales."""
    gates = []
    for (delta, weight), rank in zip(weighted, ranks, strict=True):
        own, weight = delta.gate(), weight * delta.scale
        gates.append(weight.expand(*weight.shape[:-1], rank) if own is None else weight * own)
    leading = torch.broadcast_shapes(*(gate.shape[:-1] for gate in gates))
    return torch.cat([gate.expand(*leading, gate.shape[-1]) for gate in gates], dim=-1)


def router_weights(
    layer: LayerContents, routing: Routing, table: Tensor | None, names: list[str], site: Site, x: Tensor
) -> Tensor:
    """(…, names): what each adapter weighs for each token of this call, over all entries of the routing; `table` are the
    routing's weights by row, on the rows of `x`."""
    stored = layer.stored(site) if site.weight in layer.unmerged else None
    call = LayerCall(layer.base, site, x, None, stored)
    total: dict[str, Tensor] = {}
    for column, entry in enumerate(routing.names):
        if routing.weights is not None:
            share = torch.tensor([routing.weights[column]], device=x.device)
        else:
            share = _on_axes_of(cast(Tensor, table)[:, column : column + 1], routing.axis, site, x)
        router = layer.state.routers.get(entry)
        if router is None:
            own = {entry: share}
        elif set(router.members).isdisjoint(names):
            continue
        else:
            found = router.weights(layer.path, site.name, call, routing.found.get(entry))
            layer.state.notes.add_weights(layer.path, found, call.leading)
            own = {member: share * found[..., i : i + 1] for i, member in enumerate(router.members)}
        for name, weight in own.items():
            total[name] = total[name] + weight if name in total else weight
    return torch.cat(torch.broadcast_tensors(*(total[name] for name in names)), dim=-1)


def _on_axes_of(table: Tensor, axis: int, site: Site, x: Tensor) -> Tensor:
    """(rows, names) on the axes of a site's rank-wide product, which are x's with the features last."""
    window = getattr(site.layout, "window", None)
    axes = x.ndim + (1 if not x.is_floating_point() else 0) + (1 if window is not None else 0)
    shape = [1] * axes
    shape[axis], shape[-1] = table.shape
    return table.reshape(shape)


def _run_in_groups(
    layer: LayerContents, routing: Routing, names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Rows with the same weights together, one call of the layer for each such group."""
    stack = layer.stack
    if routing.axis != 0 and (stack is None or stack.order != "tokens"):
        raise LorakitError(
            f"use: {layer.path} replaces whole tensors or is reached by substitution, so it cannot give every token of one row "
            "its own adapter; route whole rows."
        )
    attention = layer.base if isinstance(layer.base, nn.MultiheadAttention) else None
    recurrent = layer.base if isinstance(layer.base, nn.RNNBase) else None
    _check_recurrent(layer, args, kwargs)
    batch_axis = 0 if getattr(attention or recurrent, "batch_first", True) else 1
    x = first_tensor(args, kwargs)
    table = routing.table_on(x.device)[:, [routing.names.index(name) for name in names]]
    whole = next((site.layout.batch_axis for site in layer.sites.values()), None)
    if whole is not None:
        return _selected(layer, table, names, whole, args, kwargs)
    if stack is not None or (layer.tokens and x.ndim == 2 and x.shape[0] != routing.rows):
        table = _by_token(table, x, stack, layer.path)
    count = table.shape[0]
    if attention is not None and x.ndim == 2:
        raise LorakitError(
            f"use: {layer.path} was called without a batch axis (shape {tuple(x.shape)}), so it has no rows to route."
        )
    check_rows(x, count, batch_axis, layer.path)
    distinct, owner = torch.unique(table, dim=0, return_inverse=True)
    pieces, order = [], []
    for group, weights in enumerate(distinct.tolist()):
        rows = (owner == group).nonzero().flatten()
        order.append(rows)
        if attention is not None:
            given: tuple[Any, Any] = (), take_attention(attention, args, kwargs, rows)
        elif recurrent is not None:
            given = (), take_recurrent(batch_axis, args, kwargs, rows)
        else:
            given = take(args, rows, count), take(kwargs, rows, count)
        blend = [(name, weight) for name, weight in zip(names, weights, strict=True) if weight != 0.0]
        pieces.append(run_uniform(layer, blend, *given))
    back = torch.argsort(torch.cat(order))
    if isinstance(layer.base, nn.RNNBase):
        return _joined_states(layer.base, pieces, back)
    if isinstance(pieces[0], tuple) and any(isinstance(module, nn.RNNBase) for module in layer.base.modules()):
        raise LorakitError(
            f"use: {layer.path} holds a recurrent layer and returns {len(pieces[0])} values, of which it is not known where "
            "they have the batch; route the whole batch to one adapter."
        )
    return join(pieces, back, batch_axis, layer.path, [len(rows) for rows in order])


def _selected(
    layer: LayerContents, table: Tensor, names: list[str], axis: int, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """All rows once for each group with the same weights, and of each call the rows that are the group's: for a module whose
    inputs cannot be taken apart."""
    check_rows(first_tensor(args, kwargs), table.shape[0], axis, layer.path)
    distinct, owner = torch.unique(table, dim=0, return_inverse=True)
    found: Any = None
    for group, weights in enumerate(distinct.tolist()):
        blend = [(name, weight) for name, weight in zip(names, weights, strict=True) if weight != 0.0]
        y = run_uniform(layer, blend, args, kwargs)
        found = y if found is None else tree_map(lambda own, new: _rows_of(owner == group, new, own, axis), found, y)  # noqa: B023
    return found


def _rows_of(mask: Tensor, new: Any, own: Any, axis: int) -> Any:
    """`own` with the rows of `mask` from `new`, where they are tensors."""
    if not isinstance(new, Tensor):
        return own
    if new.ndim <= axis or new.shape[axis] != len(mask):
        raise LorakitError(
            f"use: an output of {tuple(new.shape)} has no batch of {len(mask)} on its axis {axis}, so that rows cannot have "
            "adapters of their own; route the whole batch to one adapter."
        )
    shape = [1] * new.ndim
    shape[axis] = len(mask)
    return torch.where(mask.view(shape), new, own)


def _joined_states(base: nn.RNNBase, pieces: Sequence[Any], back: Tensor) -> Any:
    """(output, state) of a recurrent layer, whose states (layers, batch, hidden) have the batch second."""
    path = type(base).__name__
    output = join([piece[0] for piece in pieces], back, 0 if base.batch_first else 1, path)
    return output, join([piece[1] for piece in pieces], back, 1, path, along_all=True)


def _check_recurrent(layer: LayerContents, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """LorakitError where a recurrent layer is called in a way that hides which row is which."""
    if isinstance(layer.base, nn.RNNBase):
        given = kwargs.get("input", args[0] if args else None)
        if not isinstance(given, Tensor):
            raise LorakitError(
                f"use: {layer.path} was called with a {type(given).__name__}, whose rows cannot be taken apart; route the "
                "whole batch to one adapter, or give it padded tensors."
            )
        if given.ndim == 2:
            raise LorakitError(
                f"use: {layer.path} was called without a batch axis (shape {tuple(given.shape)}), so it has no rows to route."
            )


def _by_token(table: Tensor, x: Tensor, stack: Expert | None, path: str) -> Tensor:
    """A table of weights by row, (rows, names), for each token of `x`, (tokens, hidden), whose rows stand one after the other.

    `stack`: the experts that are called, whose input may lie otherwise.
    """
    if stack is not None and not stack.order:
        raise LorakitError(
            f"use: {path} is given its tokens sorted by expert, which does not tell which row each is of; use one adapter for "
            "the whole batch."
        )
    times = stack.count if stack is not None and stack.order == "experts" else 1
    rows = table.shape[0] * times
    if x.shape[0] % rows:
        raise LorakitError(
            f"use: {path} was called with {x.shape[0]} tokens, which is no multiple of the {table.shape[0]} rows routed; give "
            "one entry per row of the batch."
        )
    return table.repeat_interleave(x.shape[0] // rows, dim=0).repeat(times, 1)


def run_nested(layer: LayerContents, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A call with nested tensors (torch's encoder makes them of padded batches), by way of padding and back."""
    x = first_tensor(args, kwargs)
    lengths = [row.shape[0] for row in x.unbind()]
    args = tuple(pad(value) for value in args)
    kwargs = {key: pad(value) for key, value in kwargs.items()}
    if isinstance(layer.base, nn.MultiheadAttention):
        position = torch.arange(max(lengths), device=x.device)
        kwargs["key_padding_mask"] = position >= torch.tensor(lengths, device=x.device)[:, None]
    y = layer.forward(*args, **kwargs)
    first = y[0] if isinstance(y, tuple) else y
    rows = [row[:length] for row, length in zip(first, lengths, strict=True)]
    nested = torch.nested.as_nested_tensor(rows, layout=x.layout)
    return (nested, *y[1:]) if isinstance(y, tuple) else nested
