"""Parameters that a module multiplies by itself, as matrices: stacks of experts, and the few bare matrices that models
have.

transformers holds the experts of a layer as two parameters of three axes, (experts, out, in) or (experts, in, out),
which the module slices, gathers or hands to a grouped product. No layer is called, so a delta is put into the place
of the parameter (`lazy_sum.py`).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lorakit.core.delta import Shape
from lorakit.core.layout import Bare, Expert, FlatExpert, Linear, Site, Transposed

_FLAT: dict[str, tuple[tuple[str, bool], ...]] = {
    "DbrxExperts": (("mlp.w1", False), ("mlp.v1", False), ("mlp.w2", True)),
}
"""Class -> its stacks that lie in two axes, (experts · rows, columns), and whether each expert's matrix is the
transpose. The class is the one whose forward reads them."""

_EXPERT_MAJOR = frozenset({"Llama4TextExperts"})
"""Classes whose input has every token once for each expert."""

_BARE: dict[str, dict[str, bool]] = {
    "XLNetRelativeAttention": {"q": True, "k": True, "v": True, "o": False, "r": True},
}
"""Class -> its parameters that are multiplied as a matrix of the first axis against the others, and whether (in, out)."""

_BATCH_SECOND = frozenset({"XLNetRelativeAttention"})
"""Classes that are called with (tokens, batch, hidden)."""


def stacked_sites(module: nn.Module) -> list[Site]:
    """The matrices that a module multiplies by itself; empty where it has none that is known."""
    kind = type(module).__name__
    if kind in _BARE:
        return [_bare(module, name, turned) for name, turned in _BARE[kind].items()]
    if kind in _FLAT:
        return [site for name, turned in _FLAT[kind] for site in _flat(module, name, turned)]
    if is_router(module):
        out, in_ = module._parameters["weight"].shape  # type: ignore[union-attr]
        layout = Bare(Shape(out, in_, bias=False))
        return [Site("", "weight", None, layout, named_only=f"{kind} is a router, which learns where it is named")]
    stacks = {
        name: parameter
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.ndim == 3 and not _is_packed(parameter)
    }
    if not stacks or not _holds_experts(module, stacks) or packed_experts(module):
        return []
    turned = _turned(module, list(stacks.values()))
    return [site for name, stack in stacks.items() for site in _stack(module, name, stack, turned)]


def is_router(module: nn.Module) -> bool:
    """Whether a module is a router of transformers that multiplies by its own (experts, hidden) weight."""
    weight = module._parameters.get("weight")
    return (
        "router" in type(module).__name__.lower()
        and not isinstance(module, nn.Linear)
        and not module._modules
        and weight is not None
        and weight.ndim == 2
        and weight.is_floating_point()
    )


def _is_packed(tensor: Tensor) -> bool:
    """Whether a tensor's entries are codes that stand for numbers only together with scales."""
    return not tensor.is_floating_point() or tensor.itemsize == 1


def packed_experts(module: nn.Module) -> str:
    """Why nothing can be added to a module's experts: a quantisation library packs them for a kernel of its own that also
    chooses and sums; empty where none does."""
    held = {name: one for name, one in (*module._parameters.items(), *module._buffers.items()) if one is not None}
    packed = {name: one for name, one in held.items() if one.ndim >= 3 and _is_packed(one)}
    if not packed or not _holds_experts(module, packed):
        return ""
    name, tensor = next(iter(packed.items()))
    return (
        f"{type(module).__name__} holds its experts quantised ({name} as {str(tensor.dtype).removeprefix('torch.')}) and "
        "multiplies them by itself"
    )


def _holds_experts(module: nn.Module, stacks: Mapping[str, Tensor]) -> bool:
    """Whether parameters of three axes are experts: the class says so, or counts as many."""
    counts = {stack.shape[0] for stack in stacks.values()}
    config = getattr(module, "config", None)
    named = {
        getattr(owner, name, None)
        for owner in (module, config)
        for name in ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    }
    return bool(counts & named) or "expert" in type(module).__name__.lower()


def _turned(module: nn.Module, stacks: list[nn.Parameter]) -> bool:
    """Whether an expert's matrix lies (in, out): the class says so, or the sizes of what comes in and what comes
    between do."""
    said: Any = getattr(module, "is_transposed", None)
    if isinstance(said, bool):
        return said
    if len(stacks) < 2:
        return False
    first, last = stacks[0], stacks[-1]  # hidden -> between, between -> hidden
    straight = first.shape[2] == last.shape[1]  # (…, between, hidden), (…, hidden, between)
    turned = first.shape[1] == last.shape[2]
    return turned and not straight


def _order(module: nn.Module) -> str:
    """How the input of experts lies, by what they are called with."""
    if type(module).__name__ in _EXPERT_MAJOR:
        return "experts"
    if type(module).__name__ in _FLAT:
        return ""
    arguments = list(inspect.signature(type(module).forward).parameters)[1:]
    if hasattr(module, "has_gate") or (
        len(arguments) > 1 and "index" in arguments[1]
    ):  # transformers' experts interface
        return "tokens"
    return ""


def _bias(module: nn.Module, name: str) -> str | None:
    bias = module._parameters.get(f"{name}_bias")
    return None if bias is None else f"{name}_bias"


def _stack(module: nn.Module, name: str, stack: Tensor, turned: bool) -> list[Site]:
    out, in_ = (stack.shape[2], stack.shape[1]) if turned else (stack.shape[1], stack.shape[2])
    bias = _bias(module, name)
    inner = (Transposed if turned else Linear)(Shape(out, in_, bias=bias is not None))
    order = _order(module)
    return [
        Site(f"{name}.{index}", name, bias, Expert(inner, index, stack.shape[0], order))
        for index in range(stack.shape[0])
    ]


def _flat(module: nn.Module, name: str, turned: bool) -> list[Site]:
    held = module.get_parameter(name)
    owner = module.get_submodule(name.rpartition(".")[0])
    count = int(getattr(owner, "moe_num_experts", 1))
    rows, columns = held.shape[0] // count, held.shape[1]
    inner = (Transposed if turned else Linear)(Shape(*((columns, rows) if turned else (rows, columns)), bias=False))
    return [Site(f"{name}.{index}", name, None, FlatExpert(inner, index, count)) for index in range(count)]


def _bare(module: nn.Module, name: str, turned: bool) -> Site:
    first, rest = (held := module.get_parameter(name)).shape[0], held[0].numel()
    axis = 1 if type(module).__name__ in _BATCH_SECOND else None
    return Site(name, name, None, Bare(Shape(*((rest, first) if turned else (first, rest)), bias=False), turned, axis))
