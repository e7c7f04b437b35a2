"""One call of an adapted layer in which all rows have the same adapters, by the same weights.

Changes act beside the layer, in one node of the graph with the base's product where that can be; a layer that never calls
its projections (nn.MultiheadAttention) runs with its weights substituted.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lorakit.core.call import LayerCall
from lorakit.core.contents import LayerContents
from lorakit.core.delta import Delta, LowRank
from lorakit.core.kernel import autocast, product
from lorakit.core.layout import Expert, FlatExpert, Site, Transposed
from lorakit.core.lazy_sum import LazySum, Pairs
from lorakit.core.rows import first_tensor
from lorakit.core.storage import storage_of, value_of
from lorakit.errors import LorakitError

Weighted = list[tuple[str, float]]
"""Adapters with one weight each."""


def run_uniform(layer: LayerContents, blend: Weighted, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The layer's output with the same weighted adapters for the whole batch."""
    tensors = replaced_tensors(layer, blend)
    active = [(name, weight) for name, weight in blend if name in layer.deltas and weight != 0.0]
    if not active:
        return call_base(layer, tensors, args, kwargs)
    if not layer.beside:
        sums = lazy_sums(layer, blend)
        changed = substitutes(layer, blend) if sums is None else {}
        tensors = {name: value.to(value_of(layer.base, name).dtype) for name, value in changed.items()}
        return call_base(layer, {**tensors, **(sums or {})}, args, kwargs)
    x = first_tensor(args, kwargs)
    site = next(iter(layer.sites.values()))
    if len(active) == 1 and len(layer.sites) == 1 and site.layout.flat and is_fusable(layer.base, tensors):
        name, weight = active[0]
        fused = _fused(layer, layer.deltas_of(name)[site.name], weight, site, x, tensors)
        if fused is not None:
            return fused
    y = call_base(layer, tensors, args, kwargs)
    total: Tensor | None = None
    for name, weight in active:
        for key, delta in layer.deltas_of(name).items():
            added = change(layer, delta, layer.sites[key], x, None if tensors else y)
            added = added if weight == 1.0 else added * weight
            total = added if total is None else total + added
    return y if total is None else y + total.to(y.dtype)


def call_base(layer: LayerContents, tensors: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The base layer, with these tensors in place of its own."""
    if not tensors:
        return layer.base(*args, **kwargs)
    return functional_call(layer.base, tensors, args, kwargs)


def replaced_tensors(layer: LayerContents, blend: Weighted) -> dict[str, Tensor]:
    """The values of replaced tensors under a blend: base + Σ weight (own - base)."""
    result: dict[str, Tensor] = {}
    alone = len(blend) == 1 and blend[0][1] == 1.0
    for name, weight in blend:
        if name not in layer.replacements or weight == 0.0:
            continue
        for key, own in layer.replaced_by(name).items():
            if (alone and key not in layer.unmerged) or not own.is_floating_point():
                result[key] = own
            else:
                present = result.get(key, value_of(layer.base, key).detach())
                result[key] = present + weight * (own - layer.frozen(key))
    return {key: value.to(value_of(layer.base, key).dtype) for key, value in result.items()}


def change(layer: LayerContents, delta: Delta, site: Site, x: Tensor, y: Tensor | None) -> Tensor:
    """What one delta adds to the layer's output: ΔW x, and Δb where it has one.

    A delta is about the frozen W x; `y` is None where the base ran with replaced tensors, and is of no use to it where
    others are merged.
    """
    stored = layer.stored(site) if site.weight in layer.unmerged else None
    added = delta.act(LayerCall(layer.base, site, x, None if layer.unmerged else y, stored))
    shift = layer.shift_of(site, delta)
    return added if shift is None else added + site.layout.features(shift.to(added.dtype), added)


def substitutes(layer: LayerContents, blend: Weighted) -> dict[str, Tensor]:
    """The layer's tensors under a blend, `W + Σ weight ΔW` and the biases: the layer's other execution.

    Returns a value for every tensor that the blend changes, in the dtype of the computation (base's or better). A base
    tensor that the user has unfrozen gets its gradient through it.
    """
    result = replaced_tensors(layer, blend)

    def add(name: str, base: Tensor, added: Tensor, weight: float) -> None:
        own = value_of(layer.base, name)
        before = result.get(name, own if isinstance(own, nn.Parameter) and own.requires_grad else base)
        result[name] = before + weight * added.to(torch.promote_types(before.dtype, added.dtype))

    for name, weight in blend:
        stacks: dict[str, tuple[Expert, Tensor, dict[int, Tensor]]] = {}
        for key, delta in layer.deltas_of(name).items():
            site = layer.sites[key]
            stored = storage_of(layer.base, site.weight, layer.path).read(layer.base, site.weight)
            about = layer.stored(site) if site.weight in layer.unmerged else stored
            dense = delta.dense(site.layout.matrix(about))
            if isinstance(site.layout, Expert):  # all experts of a stack in one sum below
                stacks.setdefault(site.weight, (site.layout, stored, {}))[2][site.layout.index] = dense
            else:
                add(site.weight, stored, site.layout.weight(dense, stored), weight)
            shift = layer.shift_of(site, delta)
            if shift is None:
                continue
            if site.bias is None:
                raise LorakitError(
                    f"{layer.path}: {delta.spec.name} adds a bias, and this layer has none to put it in. It works unmerged; to "
                    "merge, give the layer a zero bias first."
                )
            bias = value_of(layer.base, site.bias).detach()
            add(site.bias, bias, site.layout.placed_bias(shift, bias), weight)
        for stack, (layout, stored, changes) in stacks.items():
            add(stack, stored, layout.stacked(changes, stored), weight)
    return result


# -- base and delta in one node --------------------------------------------------------------------------------------------


def is_product(delta: Delta | None) -> bool:
    """Whether a delta is its low-rank product and nothing besides, so that the kernel may run it."""
    return isinstance(delta, LowRank) and type(delta).act is LowRank.act and type(delta).shift is Delta.shift


def lazy_sums(layer: LayerContents, blend: Weighted) -> dict[str, LazySum] | None:
    """Stacks of experts under low-rank deltas as sums that are never built; None where something else is in the blend."""
    if layer.unmerged or any(name in layer.replacements for name, _ in blend):
        return None
    stacks: dict[str, list[tuple[float, Expert, LowRank]]] = {}
    for name, weight in blend:
        for key, delta in layer.deltas_of(name).items():
            site = layer.sites[key]
            if not is_product(delta) or not isinstance(site.layout, Expert):
                return None
            stacks.setdefault(site.weight, []).append((weight, site.layout, cast(LowRank, delta)))
    return {name: _lazy_sum(value_of(layer.base, name), parts) for name, parts in stacks.items()}


def _lazy_sum(W: Tensor, parts: list[tuple[float, Expert, LowRank]]) -> LazySum:
    """A stack of experts and its changes, each expert's factors of all adapters side by side."""
    layout, first = parts[0][1], parts[0][2]
    if isinstance(layout, FlatExpert):  # its module views it in three axes before anything else
        W = W.unflatten(0, (layout.count, -1))
    held: list[list[tuple[float, LowRank]]] = [[] for _ in range(layout.count)]
    for weight, own, delta in parts:
        held[own.index].append((weight, delta))
    shape = layout.shape
    none = (W.new_zeros(shape.out, 0), W.new_zeros(0, shape.in_)), 1.0
    pairs, scales = zip(*(_pair(own) if own else none for own in held), strict=True)
    turned = isinstance(layout.inner, Transposed)
    return LazySum(W, Pairs(pairs, scales, turned), first.dropout if first.training else 0.0)


def _pair(weighted: list[tuple[float, LowRank]]) -> tuple[tuple[Tensor, Tensor], float]:
    """Deltas of one matrix as the factors B and A of one product, and its scale."""
    if len(weighted) == 1:
        ((weight, delta),) = weighted
        return delta.gated(), delta.scale * weight
    pairs = [(delta.gated(), delta.scale * weight) for weight, delta in weighted]
    return (torch.cat([B * scale for (B, _), scale in pairs], 1), torch.cat([A for (_, A), _ in pairs])), 1.0


def is_fusable(base: nn.Module, tensors: dict[str, Tensor]) -> bool:
    """Whether the base is `x Wᵀ + b` with frozen float tensors and nothing hooked to it, so that its product can be fused.

    The fused product gives W no gradient, so a base weight that the user has unfrozen must run by itself.
    """
    weight = getattr(base, "weight", None)
    return (
        type(base).forward in (nn.Linear.forward, _conv1d_forward(base))
        and type(weight) is nn.Parameter
        and weight.is_floating_point()
        and not weight.requires_grad
        and set(tensors) <= {"bias"}
        and not base._forward_hooks
        and not base._forward_pre_hooks
        and not base._backward_hooks
        and "forward" not in base.__dict__
    )


def _conv1d_forward(base: nn.Module) -> Any:
    """transformers' Conv1D forward where the base is one (it is `x W + b`)."""
    return type(base).forward if type(base).__name__ == "Conv1D" and hasattr(base, "nf") else None


def _fused(
    layer: LayerContents, delta: Delta, weight: float, site: Site, x: Tensor, tensors: dict[str, Tensor]
) -> Tensor | None:
    """Base and delta in one node of the graph, where the method can; else None."""
    x = autocast(x)
    bias = tensors.get("bias", cast(Any, layer.base).bias)
    bias = None if bias is None else bias.to(x.dtype)
    if type(delta).output is LowRank.output and is_product(delta):
        low_rank = cast(LowRank, delta)
        B, A = low_rank.factors()
        gate = low_rank.gate()
        return product(
            x,
            B,
            A,
            None if gate is None else gate.to(x.dtype),
            low_rank.scale * weight,
            delta.dropout if delta.training else 0.0,
            W=site.layout.matrix(cast(Tensor, layer.base.weight)).to(x.dtype),
            b=bias,
        )
    y = delta.output(LayerCall(layer.base, site, x, None)) if weight == 1.0 and not layer.unmerged else None
    if y is None:
        return None
    shift = layer.shift_of(site, delta)
    if shift is not None:
        bias = shift.to(y.dtype) if bias is None else bias + shift.to(y.dtype)
    return y if bias is None else y + bias
