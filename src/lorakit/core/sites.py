"""The matrices of a layer that a delta can change: which layers have any, and whether deltas act beside them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorakit.core.delta import Shape
from lorakit.core.known import computed_weight, has_hooks, has_own_forward, is_known
from lorakit.core.layout import Convolution, Embedding, Layout, Linear, Rows, Site, Stored, Substituted, Transposed
from lorakit.core.stacks import packed_experts, stacked_sites
from lorakit.errors import LorakitError


def _is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D, recognised by its attributes so that transformers need not be imported."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and hasattr(module, "nx")


def _attention_sites(module: nn.MultiheadAttention) -> list[Site]:
    dim = module.embed_dim
    bias = "in_proj_bias" if module.in_proj_bias is not None else None
    sites = []
    if module.in_proj_weight is not None:
        shape = Shape(3 * dim, dim, bias=bias is not None)
        sites.append(Site("in_proj", "in_proj_weight", bias, Substituted(shape)))
    else:
        for letter, width in (("q", dim), ("k", module.kdim or dim), ("v", module.vdim or dim)):
            shape = Shape(dim, width, bias=False)
            sites.append(Site(f"{letter}_proj", f"{letter}_proj_weight", None, Substituted(shape)))
    out_bias = "out_proj.bias" if module.out_proj.bias is not None else None
    shape = Shape(dim, dim, bias=out_bias is not None)
    sites.append(Site("out_proj", "out_proj.weight", out_bias, Substituted(shape)))
    return sites


def has_linear_face(module: nn.Module) -> bool:
    """Whether a module has the two sizes of a linear layer and none inside it: the packed layers of quantisation
    libraries, of which many are no `nn.Linear`."""
    sizes = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    return all(isinstance(size, int) and size > 0 for size in sizes) and not module._modules


_remembered: ContextVar[dict[int, tuple[nn.Module, list[Site] | LorakitError]] | None] = ContextVar(
    "lorakit_sites", default=None
)


@contextmanager
def sites_remembered() -> Iterator[None]:
    """Within, each module is asked for its sites once: for work that asks several times and changes no layer of the base."""
    token = _remembered.set({})
    try:
        yield
    finally:
        _remembered.reset(token)


def sites_of(module: nn.Module) -> list[Site]:
    """The matrices of a layer that a delta can change; empty where there is none.

    A layer whose class inherits from a known one and computes something else has sites too, which are reached by
    substitution and say in `named_only` why presets leave them out.

    Raises:
        LorakitError: the layer has a matrix that nothing can be added to, with the reason.
    """
    remembered = _remembered.get()
    if remembered is None:
        return _sites_of(module)
    if id(module) not in remembered:
        try:
            remembered[id(module)] = module, _sites_of(module)
        except LorakitError as problem:
            remembered[id(module)] = module, problem
    found = remembered[id(module)][1]
    if isinstance(found, LorakitError):
        raise found
    return list(found)


def _sites_of(module: nn.Module) -> list[Site]:
    bias = "bias" if isinstance(getattr(module, "bias", None), Tensor) else None
    if reason := computed_weight(module):
        raise LorakitError(
            f"attach: {reason}, so that a change would be overwritten at the next call. Give it a plain weight first "
            "(torch.nn.utils.parametrize.remove_parametrizations, remove_weight_norm, or prune.remove), or train the layer "
            "whole by modules_to_save."
        )
    if isinstance(module, nn.MultiheadAttention):
        return _attention_sites(module)
    if isinstance(module, nn.Linear) or has_linear_face(module):
        # int: some models compute the sizes of their layers by tensors (Inkling of transformers)
        shape = Shape(int(cast(int, module.out_features)), int(cast(int, module.in_features)), bias=bias is not None)
        return [_site(module, bias, Linear(shape))]
    if _is_conv1d(module):
        width, height = cast(Tensor, module.weight).shape
        return [_site(module, bias, Transposed(Shape(height, width, bias=bias is not None)))]
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        window = tuple(module.weight.shape[1:])
        taps = math.prod(window[1:])
        shape = Shape(module.out_channels, window[0] * taps, taps=taps, bias=bias is not None)
        return [_site(module, bias, Convolution(shape, window, module.groups))]
    if isinstance(module, nn.Embedding):
        if module.max_norm is not None:
            raise LorakitError(
                "attach: this embedding has max_norm set, so that its forward rewrites its own weights; an adapter beside "
                "it would not see the same weights. Set max_norm to None first."
            )
        shape = Shape(module.embedding_dim, module.num_embeddings, lookup=True, bias=False)
        return [_site(module, None, Embedding(shape))]
    reason = packed_experts(module)
    if reason:
        raise LorakitError(
            f"attach: {reason}, so that no adapter can act beside them. Load its experts in floats (transformers "
            "dequantises fp8 and mxfp4 where its quantization config says dequantize=True), or leave them out "
            '(exclude_modules=["experts"]); attention and shared experts can be adapted as they are.'
        )
    return stacked_sites(module)


def sites_or_refusal(module: nn.Module) -> tuple[list[Site], str]:
    """`sites_of` and "", or no sites and why nothing can be added to the layer's matrix."""
    try:
        return sites_of(module), ""
    except LorakitError as problem:
        return [], str(problem).removeprefix("attach: ")


def adaptable_sites(module: nn.Module) -> list[Site]:
    """`sites_of`, empty too where nothing can be added to the layer's matrix."""
    return sites_or_refusal(module)[0]


def refusal(module: nn.Module) -> str:
    """Why nothing can be added to a layer's matrix; empty where something can, or where it has none."""
    return sites_or_refusal(module)[1]


def _site(module: nn.Module, bias: str | None, layout: Layout) -> Site:
    """The one matrix of a layer: beside it where its forward is known or a quantisation library's, else by
    substitution."""
    weight: Any = getattr(module, "weight", None)
    plain = (
        type(weight) is nn.Parameter
        and type(weight.data) is Tensor
        and weight.is_floating_point()
        and weight.itemsize > 1
    )
    known = not has_own_forward(module) if _is_conv1d(module) else is_known(module)
    if not plain or (known and not has_hooks(module)):
        return Site("", "weight", bias, layout)
    if known:
        return Site("", "weight", bias, Stored(layout.shape, layout))
    reason = f"{type(module).__name__} has a forward of its own, which is not {layout.kind}'s"
    return Site("", "weight", bias, Stored(layout.shape, layout), named_only=reason)


def split(
    site: Site,
    parts: Mapping[str, Sequence[int] | Sequence[Sequence[int]]],
    path: str,
) -> list[Site]:
    """A fused layer's site as one site per named part; a part is (start, stop) or several such ranges of rows."""
    layout = site.layout
    if type(layout) not in (Linear, Transposed):
        raise LorakitError(f"attach: {path} is a {layout.kind} layer; only linear layers have row parts.")
    rows = layout.shape.out
    taken = torch.zeros(rows, dtype=torch.bool)
    result = []
    for name, given in parts.items():
        first: Any = given[0] if len(given) else None
        ranges = [tuple(given)] if isinstance(first, int) else [tuple(cast(Any, r)) for r in given]
        for pair in cast("list[tuple[int, int]]", ranges):
            if len(pair) != 2 or not 0 <= pair[0] < pair[1] <= rows:
                raise LorakitError(
                    f"attach: part {name!r} of {path} was given rows {pair}; the layer has {rows} output rows, so a range "
                    f"(start, stop) needs 0 <= start < stop <= {rows}."
                )
            if taken[pair[0] : pair[1]].any():
                raise LorakitError(f"attach: part {name!r} of {path} overlaps another part in rows {pair}.")
            taken[pair[0] : pair[1]] = True
        rows_layout = Rows(cast(Linear, layout), cast(Any, tuple(ranges)))
        result.append(Site(name, site.weight, site.bias, rows_layout))
    return result
