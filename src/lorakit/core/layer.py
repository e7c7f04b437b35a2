"""The one adapted layer: a frozen base layer, the deltas of any number of adapters beside it, and their routing.

There is one such class for every method, layer kind and storage. Its forward writes nothing. It knows who acts and how
often; what a delta sees of a call is `call.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lorakit.core.call import LayerCall
from lorakit.core.delta import Delta, LowRank
from lorakit.core.kernel import autocast, product
from lorakit.core.layout import Rows, Site
from lorakit.core.replacement import Replacement
from lorakit.core.routing import Routing
from lorakit.core.rows import check_rows, first_tensor, join, pad, take, take_attention
from lorakit.core.state import ModelState
from lorakit.core.storage import Held, storage_of, value_of
from lorakit.errors import LorakitError

Weighted = list[tuple[str, float]]


class ByName(nn.ModuleDict):
    """Modules by names that users choose. torch refuses those that are also attributes of a module ("half", "type")."""

    def add_module(self, name: str, module: nn.Module | None) -> None:
        self._modules[name] = module  # type: ignore[assignment]


class Adapted(nn.Module):
    """A base layer with deltas and replacements of any number of adapters; calls go by the state's routing.

    Attributes that this class lacks are those of the base layer, so that models which read `layer.weight.dtype` and the
    like keep working.
    """

    def __init__(self, base: nn.Module, sites: list[Site], state: ModelState, path: str) -> None:
        super().__init__()
        self.base = base
        self.sites = {site.name: site for site in sites}
        self.path = path
        self.deltas = ByName()
        """adapter -> site -> Delta; the site's empty name is written "self"."""
        self.replacements = ByName()
        self.state = state
        self.kept: dict[str, Held] = {}
        """Within `merged`: tensors as they were before it wrote into them. What adapters add is about these."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    # -- what belongs to an adapter -----------------------------------------------------------------------------------
    def deltas_of(self, adapter: str) -> dict[str, Delta]:
        """This layer's deltas of one adapter, by site name."""
        if adapter not in self.deltas:
            return {}
        held = cast(nn.ModuleDict, self.deltas[adapter])
        return {"" if name == "self" else name: cast(Delta, delta) for name, delta in held.items()}

    def add(self, adapter: str, deltas: dict[str, Delta], replacement: Replacement | None) -> None:
        """Give this layer an adapter's deltas (by site name) and replaced tensors."""
        if deltas:
            self.deltas[adapter] = ByName({name or "self": delta for name, delta in deltas.items()})
        if replacement is not None:
            self.replacements[adapter] = replacement

    def remove(self, adapter: str) -> bool:
        """Forget an adapter; True where none is left and the base can go back in its place."""
        if adapter in self.deltas:
            del self.deltas[adapter]
        if adapter in self.replacements:
            del self.replacements[adapter]
        return not len(self.deltas) and not len(self.replacements)

    # -- calls --------------------------------------------------------------------------------------------------------
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        routing = self.state.routing
        here = [name for name in self.state.members(routing) if name in self.deltas or name in self.replacements]
        if not here:
            return self.base(*args, **kwargs)
        if first_tensor(args, kwargs).is_nested:
            return self._padded(args, kwargs)
        if not self.state.routers.keys().isdisjoint(routing.names):
            return self._by_routers(routing, here, args, kwargs)
        if routing.weights is not None:
            weights = dict(zip(routing.names, routing.weights, strict=True))
            return self._uniform([(name, weights[name]) for name in here], args, kwargs)
        table = routing.table_on(first_tensor(args, kwargs).device)
        columns = [routing.names.index(name) for name in here]
        return self._by_rows(here, table[:, columns], routing.axis, args, kwargs)

    def _padded(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call with nested tensors (torch's encoder makes them of padded batches), by way of padding and back."""
        x = first_tensor(args, kwargs)
        lengths = [row.shape[0] for row in x.unbind()]
        args = tuple(pad(value) for value in args)
        kwargs = {key: pad(value) for key, value in kwargs.items()}
        if isinstance(self.base, nn.MultiheadAttention):
            position = torch.arange(max(lengths), device=x.device)
            kwargs["key_padding_mask"] = position >= torch.tensor(lengths, device=x.device)[:, None]
        y = self.forward(*args, **kwargs)
        first = y[0] if isinstance(y, tuple) else y
        rows = [row[:length] for row, length in zip(first, lengths, strict=True)]
        nested = torch.nested.as_nested_tensor(rows, layout=x.layout)
        return (nested, *y[1:]) if isinstance(y, tuple) else nested

    def _uniform(self, blend: Weighted, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The same weighted adapters for the whole batch."""
        tensors = self._blended(blend)
        active = [(name, weight) for name, weight in blend if name in self.deltas and weight != 0.0]
        if not active:
            return self._call_base(tensors, args, kwargs)
        if any(not site.layout.beside for site in self.sites.values()):
            return self._substituted(blend, args, kwargs)
        x = first_tensor(args, kwargs)
        site = next(iter(self.sites.values()))
        if len(active) == 1 and len(self.sites) == 1 and site.layout.flat and self._plain(site, tensors):
            name, weight = active[0]
            fused = self._fused(self.deltas_of(name)[site.name], weight, site, x, tensors)
            if fused is not None:
                return fused
        y = self._call_base(tensors, args, kwargs)
        total: Tensor | None = None
        for name, weight in active:
            for key, delta in self.deltas_of(name).items():
                site = self.sites[key]
                change = self._change(delta, site, x, None if tensors else y)
                change = change if weight == 1.0 else change * weight
                total = change if total is None else total + change
        return y if total is None else y + total.to(y.dtype)

    def _plain(self, site: Site, tensors: dict[str, Tensor]) -> bool:
        """Whether the base is `x Wᵀ + b` with float tensors and nothing hooked to it, so that its product can be fused."""
        base = self.base
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

    def _fused(self, delta: Delta, weight: float, site: Site, x: Tensor, tensors: dict[str, Tensor]) -> Tensor | None:
        """Base and delta in one node of the graph, where the method can; else None."""
        x = autocast(x)
        bias = tensors.get("bias", cast(Any, self.base).bias)
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
                W=site.layout.matrix(cast(Tensor, self.base.weight)).to(x.dtype),
                b=bias,
            )
        y = delta.output(LayerCall(self.base, site, x, None)) if weight == 1.0 and not self.kept else None
        if y is None:
            return None
        shift = delta.shift(self._bias(site))
        if shift is not None:
            bias = shift.to(y.dtype) if bias is None else bias + shift.to(y.dtype)
        return y if bias is None else y + bias

    def _change(self, delta: Delta, site: Site, x: Tensor, y: Tensor | None) -> Tensor:
        """What one delta adds to the layer's output: ΔW x, and Δb where it has one.

        A delta is about the frozen W x; `y` is None where the base ran with replaced tensors, and is of no use to it
        where others are merged.
        """
        stored = self.stored(site) if site.weight in self.kept else None
        call = LayerCall(self.base, site, x, None if self.kept else y, stored)
        change = delta.act(call)
        shift = delta.shift(self._bias(site))
        if shift is None:
            return change
        return change + site.layout.features(shift.to(change.dtype), change)

    def _bias(self, site: Site) -> Tensor | None:
        """The frozen bias of a site's rows."""
        if site.bias is None:
            return None
        bias = self._frozen(site.bias)
        return site.layout.part(bias) if isinstance(site.layout, Rows) else bias

    def _frozen(self, name: str) -> Tensor:
        """One of the base's own tensors, whatever is merged into it just now."""
        return self.kept[name].read() if name in self.kept else value_of(self.base, name).detach()

    def stored(self, site: Site) -> Tensor:
        """The frozen weight of a site as floats in its stored shape, whatever is merged into it just now."""
        if site.weight in self.kept:
            return self.kept[site.weight].read()
        return storage_of(self.base, site.weight, self.path).read(self.base, site.weight)

    def _blended(self, blend: Weighted) -> dict[str, Tensor]:
        """The values of replaced tensors under a blend: base + Σ weight (own - base)."""
        result: dict[str, Tensor] = {}
        alone = len(blend) == 1 and blend[0][1] == 1.0
        for name, weight in blend:
            if name not in self.replacements or weight == 0.0:
                continue
            for key, own in cast(Replacement, self.replacements[name]).tensors().items():
                if (alone and key not in self.kept) or not own.is_floating_point():
                    result[key] = own
                else:
                    present = result.get(key, value_of(self.base, key).detach())
                    result[key] = present + weight * (own - self._frozen(key))
        return {key: value.to(value_of(self.base, key).dtype) for key, value in result.items()}

    def _call_base(self, tensors: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not tensors:
            return self.base(*args, **kwargs)
        return functional_call(self.base, tensors, args, kwargs)

    def substitutes(self, blend: Weighted) -> dict[str, Tensor]:
        """The layer's tensors under a blend, `W + Σ weight ΔW` and the biases: the layer's other execution.

        Returns a value for every tensor that the blend changes, in the dtype of the computation (base's or better).
        """
        result = self._blended(blend)
        for name, weight in blend:
            for key, delta in self.deltas_of(name).items():
                site = self.sites[key]
                stored = storage_of(self.base, site.weight, self.path).read(self.base, site.weight)
                change = delta.dense(site.layout.matrix(self.stored(site) if site.weight in self.kept else stored))
                change = site.layout.weight(change, stored)
                before = result.get(site.weight, stored)
                result[site.weight] = before + weight * change.to(torch.promote_types(before.dtype, change.dtype))
                shift = delta.shift(self._bias(site))
                if shift is None:
                    continue
                if site.bias is None:
                    raise LorakitError(
                        f"{self.path}: {delta.spec.name} adds a bias, and this layer has none to put it in. It works "
                        "unmerged; to merge, give the layer a zero bias first."
                    )
                bias = result.get(site.bias, value_of(self.base, site.bias).detach())
                whole = shift if not isinstance(site.layout, Rows) else site.layout.features(shift, shift)
                result[site.bias] = bias + weight * whole.to(torch.promote_types(bias.dtype, whole.dtype))
        return result

    def _substituted(self, blend: Weighted, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        changed = {name: value.to(value_of(self.base, name).dtype) for name, value in self.substitutes(blend).items()}
        return functional_call(self.base, changed, args, kwargs)

    # -- one adapter per row ------------------------------------------------------------------------------------------
    def _by_rows(
        self, names: list[str], table: Tensor, axis: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Every row of the batch its own weights; `table` is (rows, names)."""
        together = not any(name in self.replacements for name in names) and all(
            site.layout.beside for site in self.sites.values()
        )
        if not together:
            return self._grouped(names, table, axis, args, kwargs)
        x = first_tensor(args, kwargs)
        check_rows(x, table.shape[0], axis, self.path)
        y = self.base(*args, **kwargs)
        return self._beside(names, lambda site: _spread(table, axis, site, x), x, y)

    def _by_routers(self, routing: Routing, names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Every token the weights that routers give it (and routes beside them); `names` are the adapters at this layer."""
        for name in names:
            if name in self.replacements or not all(site.layout.beside for site in self.sites.values()):
                raise LorakitError(
                    f"use: {self.path} replaces whole tensors for adapter {name!r} or is reached by substitution, so it cannot "
                    "weigh it token by token beside a router; route them apart."
                )
        x = first_tensor(args, kwargs)
        if routing.table is not None:
            check_rows(x, routing.rows, routing.axis, self.path)
        y = self.base(*args, **kwargs)
        return self._beside(names, lambda site: self._found(routing, names, site, x), x, y)

    def _found(self, routing: Routing, names: list[str], site: Site, x: Tensor) -> Tensor:
        """(…, names): what each adapter weighs for each token of this call, over all entries of the routing."""
        call = LayerCall(self.base, site, x, None, self.stored(site) if site.weight in self.kept else None)
        total: dict[str, Tensor] = {}
        for column, entry in enumerate(routing.names):
            if routing.weights is not None:
                share = torch.tensor([routing.weights[column]], device=x.device)
            else:
                share = _spread(routing.table_on(x.device)[:, column : column + 1], routing.axis, site, x)
            router = self.state.routers.get(entry)
            if router is None:
                own = {entry: share}
            elif set(router.members).isdisjoint(names):
                continue
            else:
                found = router.weights(self.path, site.name, call, routing.found.get(entry))
                if self.state.seen is not None:
                    self.state.seen.append((self.path, found.detach().expand(*call.leading, -1)))
                own = {member: share * found[..., i : i + 1] for i, member in enumerate(router.members)}
            for name, weight in own.items():
                total[name] = total[name] + weight if name in total else weight
        return torch.cat(torch.broadcast_tensors(*(total[name] for name in names)), dim=-1)

    def _beside(self, names: list[str], weigh: Callable[[Site], Tensor], x: Tensor, y: Tensor) -> Tensor:
        """The layer's output with every adapter's change times its weights; `weigh(site)` is (…, names), on the axes that
        the site's rank-wide product has (or one that stretch to them)."""
        total: Tensor | None = None
        for key, site in self.sites.items():
            here = [
                (column, self.deltas_of(name)[key]) for column, name in enumerate(names) if key in self.deltas_of(name)
            ]
            if not here:
                continue
            weights = weigh(site)
            low: list[tuple[int, LowRank]] = []
            for column, delta in here:
                if is_product(delta) and not (delta.training and delta.dropout):
                    low.append((column, cast(LowRank, delta)))
                    continue
                change = self._change(delta, site, x, y)
                weight = weights[..., column]
                change = change * weight.reshape(*weight.shape, *[1] * (change.ndim - weight.ndim)).to(change.dtype)
                total = change if total is None else total + change
            if low:
                change = self._gated(low, weights, site, x, y)
                total = change if total is None else total + change
        return y if total is None else y + total.to(y.dtype)

    def _gated(self, low: list[tuple[int, LowRank]], weights: Tensor, site: Site, x: Tensor, y: Tensor) -> Tensor:
        """All low-rank deltas as one product: factors side by side, a gate with each one's weight for each token."""
        Bs, As, gates = [], [], []
        for column, delta in low:
            B, A = delta.factors()
            own = delta.gate()
            weight = weights[..., column : column + 1] * delta.scale
            gates.append(weight.expand(*weight.shape[:-1], A.shape[0]) if own is None else weight * own)
            Bs.append(B)
            As.append(A)
        leading = torch.broadcast_shapes(*(gate.shape[:-1] for gate in gates))
        gate = torch.cat([gate.expand(*leading, gate.shape[-1]) for gate in gates], dim=-1)
        return LayerCall(self.base, site, x, y).product(torch.cat(Bs, dim=1), torch.cat(As, dim=0), gate)

    def _grouped(
        self, names: list[str], table: Tensor, axis: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Rows with the same weights together, one call of the layer for each such group."""
        if axis != 0:
            raise LorakitError(
                f"use: {self.path} replaces whole tensors or is reached by substitution, so it cannot give every token of "
                "one row its own adapter; route whole rows."
            )
        attention = self.base if isinstance(self.base, nn.MultiheadAttention) else None
        batch_axis = 0 if attention is None or attention.batch_first else 1
        x, count = first_tensor(args, kwargs), table.shape[0]
        if attention is not None and x.ndim == 2:
            raise LorakitError(
                f"use: {self.path} was called without a batch axis (shape {tuple(x.shape)}), so it has no rows to route."
            )
        check_rows(x, count, batch_axis, self.path)
        distinct, owner = torch.unique(table, dim=0, return_inverse=True)
        pieces, order = [], []
        for group in range(distinct.shape[0]):
            rows = (owner == group).nonzero().flatten()
            order.append(rows)
            if attention is not None:
                own_args: tuple[Any, ...] = ()
                own_kwargs = take_attention(attention, args, kwargs, rows)
            else:
                own_args, own_kwargs = take(args, rows, count), take(kwargs, rows, count)
            weights = distinct[group].tolist()
            blend = [(name, weight) for name, weight in zip(names, weights, strict=True) if weight != 0.0]
            if blend:
                pieces.append(self._uniform(blend, own_args, own_kwargs))
            else:
                pieces.append(self.base(*own_args, **own_kwargs))
        back = torch.argsort(torch.cat(order))
        return join(pieces, back, batch_axis, self.path)


def _conv1d_forward(base: nn.Module) -> Any:
    """transformers' Conv1D forward where the base is one (it is `x W + b`)."""
    return type(base).forward if type(base).__name__ == "Conv1D" and hasattr(base, "nf") else None


def is_product(delta: Delta | None) -> bool:
    """Whether a delta is its low-rank product and nothing besides, so that the kernel may run it."""
    return isinstance(delta, LowRank) and type(delta).act is LowRank.act and type(delta).shift is Delta.shift


def _spread(table: Tensor, axis: int, site: Site, x: Tensor) -> Tensor:
    """(rows, names) on the axes of a site's rank-wide product, which are x's with the features last."""
    window = getattr(site.layout, "window", None)
    axes = x.ndim + (1 if not x.is_floating_point() else 0) + (1 if window is not None else 0)
    shape = [1] * axes
    shape[axis], shape[-1] = table.shape
    return table.reshape(shape)
