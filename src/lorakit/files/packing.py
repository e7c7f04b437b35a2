"""Which tensors of a delta a file holds, under which names, and in which shapes: PEFT's, where PEFT has the method.

A matrix's tensor is packed by the layer that it belongs to, along the axes that it has:

    axes        the delta's tensor      in the file
    in          (rows, in)              of a convolution (rows, in/groups, *kernel)
    out         (out, columns)          of a convolution (out, columns, 1, …)
    taps        (rows, channels · k)    of a convolution (rows, channels, *kernel)
    kernel      (rank, rank, k)         of a convolution (rank, rank, *kernel), with one axis (rank, rank, k, 1)
    features    (out,)                  of a convolution (1, out, 1, …)
    column      (n,)                    (n, 1)
    row         (…)                     (1, …)
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from lorakit.adapter.adapter import Adapter
from lorakit.core.combinator import Combined
from lorakit.core.delta import Delta, Method
from lorakit.core.layout import Convolution, Layout, Stored
from lorakit.core.offset import Offset
from lorakit.core.tied import Tied
from lorakit.core.uniform import is_product
from lorakit.edits.contract import Edit
from lorakit.errors import LorakitError
from lorakit.experts.mixlora import Experts
from lorakit.files.formats import format_of, word_of
from lorakit.methods.adalora import Triplets
from lorakit.methods.ia3 import InputGain
from lorakit.methods.lokr import LoKrDelta
from lorakit.methods.lora import LoRA
from lorakit.methods.relora import ReLoRADelta
from lorakit.methods.tokens import TokenRows


@dataclass(frozen=True)
class View:
    """One tensor of a file: the concatenation of a delta's own tensors along `dim`, packed along its `axes`."""

    tensors: tuple[Tensor, ...]
    axes: str = ""
    dim: int = 0

    def whole(self) -> Tensor:
        """The delta's tensors as one."""
        return self.tensors[0] if len(self.tensors) == 1 else torch.cat(self.tensors, dim=self.dim)

    def pieces(self, value: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The delta's tensors, each with its piece of an unpacked value."""
        sizes = [tensor.shape[self.dim] if tensor.ndim else 1 for tensor in self.tensors]
        if len(sizes) == 1 or sum(sizes) != value.shape[self.dim]:
            return [(self.tensors[0], value)]  # of another size where they do not add up, which the reader reports
        return list(zip(self.tensors, value.split(sizes, dim=self.dim), strict=True))


# -- shapes ----------------------------------------------------------------------------------------------------------------


def pack(layout: Layout | None, tensor: Tensor, axes: str) -> Tensor:
    """A delta's tensor in the shape that files use; `layout` is that of its layer, None where it has none."""
    layout = layout.inner if isinstance(layout, Stored) else layout
    if axes == "column":
        return tensor[:, None]
    if axes == "row":
        return tensor[None]
    if isinstance(layout, Convolution):
        kernel = layout.window[1:]
        if axes == "in":
            return tensor.reshape(tensor.shape[0], *layout.window)
        if axes == "out":
            return tensor.reshape(*tensor.shape, *[1] * len(kernel))
        if axes == "features":
            return tensor.reshape(1, -1, *[1] * len(kernel))
        if axes == "taps":
            return tensor.reshape(tensor.shape[0], -1, *kernel)
        if axes == "kernel":
            return tensor.reshape(*tensor.shape[:2], *kernel, *[1] * (len(kernel) == 1))
    return tensor


def unpack(layout: Layout | None, tensor: Tensor, axes: str) -> Tensor:
    """The inverse of `pack`; refuses a shape that does not fit."""
    layout = layout.inner if isinstance(layout, Stored) else layout
    if axes in ("column", "row"):
        axis = 1 if axes == "column" else 0
        if tensor.ndim < 2 or tensor.shape[axis] != 1:
            raise LorakitError(f"load: a {axes} was expected in the file and a tensor of {tuple(tensor.shape)} found.")
        return tensor.squeeze(axis)
    if not isinstance(layout, Convolution):
        return tensor
    if axes == "in" and tensor.shape[1:] != layout.window:
        reason = ""
        if layout.groups > 1:
            reason = (
                " PEFT lets every group of a grouped convolution see all input channels, which is no change of its "
                "weight; such an adapter cannot be read here."
            )
        raise LorakitError(
            f"load: a convolution's A has shape {tuple(tensor.shape)}; this layer needs (rank, "
            f"{', '.join(map(str, layout.window))}).{reason}"
        )
    if axes == "features":
        return tensor.flatten()
    if axes == "kernel":
        return tensor.flatten(2)
    return tensor.flatten(1) if axes in ("in", "out", "taps") else tensor


# -- names -----------------------------------------------------------------------------------------------------------------


def names_of(module: Delta | Edit, kind: str = "") -> dict[str, tuple[str, str]]:
    """Letter -> (name below the place, axes) of the tensors of a delta on a kind of layer, or of an edit."""
    row = format_of(module.spec.name)
    described = row.kinds.get(kind, row.tensors)
    found = {}
    for letter in module.kept() if isinstance(module, Edit) else module.state_dict():
        own = letter if isinstance(module, Edit) else f"{word_of(module.spec.name)}_{letter}"
        if letter in described or not (described or "." in letter):  # what stands below is another delta's
            name, _, axes = described.get(letter, own).partition(":")
            found[letter] = (name, axes)
    return found


def is_pair(delta: Delta) -> bool:
    """Whether a delta is LoRA's product and is kept as its two factors, so that several can be put side by side in a file."""
    return is_product(delta) and format_of(delta.spec.name).tensors == format_of("lora").tensors


def _own(delta: Delta, kind: str) -> dict[str, View]:
    return {
        name: View((cast(Tensor, getattr(delta, letter)).detach(),), axes)
        for letter, (name, axes) in names_of(delta, kind).items()
    }


@functools.singledispatch
def views(delta: Delta, kind: str) -> dict[str, View]:
    """Name below the layer -> the tensors that make up that entry of the file, for a kind of layer."""
    return _own(delta, kind)


@views.register
def _(delta: Combined, kind: str) -> dict[str, View]:
    return {**views(delta.inner, kind), **_own(delta, kind)}


@views.register
def _(delta: Experts, kind: str) -> dict[str, View]:
    return {
        f"experts.{e}.{name}": view
        for e, expert in enumerate(delta.experts)
        for name, view in views(cast(Delta, expert), kind).items()
    }


@views.register
def _(delta: TokenRows, kind: str) -> dict[str, View]:
    described = format_of(delta.spec.name).tensors["R"]
    return {described: View((delta.rows().detach(),))}


@views.register
def _(delta: Tied, kind: str) -> dict[str, View]:
    (leader,), row = delta.leader, format_of(delta.spec.name)
    given = views(leader, "embedding")
    theirs, own = row.kinds.get("embedding", row.tensors), row.kinds.get(kind, row.tensors)
    result = {}
    for letter, other in (("A", "B"), ("B", "A")):
        view, (name, _, axes) = given[theirs[other].partition(":")[0]], own[letter].partition(":")
        result[name] = View(tuple(tensor.T for tensor in view.tensors), axes, 1 - view.dim)
    return result


@views.register
def _(delta: InputGain, kind: str) -> dict[str, View]:
    return {
        name: View((delta.l.detach(),), "row" if axes == "column" else axes)
        for name, axes in names_of(delta, kind).values()
    }


@views.register
def _(delta: Triplets, kind: str) -> dict[str, View]:
    rows = delta.rows()
    index = slice(None) if len(rows) == len(delta.lam) else rows  # a slice is a view, which a reader can fill
    kept = {"Q": delta.Q.detach()[index], "P": delta.P.detach()[:, index], "lam": delta.lam.detach()[index]}
    return {name: View((kept[letter],), axes) for letter, (name, axes) in names_of(delta, kind).items()}


@views.register
def _(delta: ReLoRADelta, kind: str) -> dict[str, View]:
    B, A = delta.kept()
    found = names_of(delta, kind)
    return {
        found["A"][0]: View((delta.A.detach(), A), "in", dim=0),
        found["B"][0]: View((delta.B.detach(), B), "out", dim=1),
    }


@views.register
def _(delta: Offset, kind: str) -> dict[str, View]:
    A0, minus_B0 = cast(Tensor, delta.A0), cast(Tensor, delta.minus_B0)
    found = {}
    for name, view in views(delta.inner, kind).items():
        if "_A" in name:
            found[name] = View((*view.tensors, A0), view.axes, dim=0)
        elif "_B" in name:
            found[name] = View((*view.tensors, minus_B0), view.axes, dim=1)
        elif delta.inner.gate() is not None and view.tensors[0].ndim == 1:  # a gate, which the start does not have
            found[name] = View((*view.tensors, A0.new_ones(A0.shape[0])), view.axes, dim=0)
        else:
            raise LorakitError(
                f"save: {delta.spec.name} from a shifted start is of twice the rank, and its format has no place for {name} "
                "there. lorakit.resize(adapter, energy=1.0) makes a plain LoRA of it."
            )
    return found


def edit_tensors(adapter: Adapter) -> dict[tuple[str, str], Tensor]:
    """What a file keeps of an adapter's edits: (path, name below it) -> tensor; without a path the name stands alone, as
    PEFT's prompts do."""
    together = format_of(adapter.method.name).to_file
    if together is not None and adapter.edits:
        return together(adapter.edits)
    return {
        (place.path, name): pack(None, edit.kept()[letter], axes)
        for place, edit in adapter.edits.items()
        for letter, (name, axes) in names_of(edit).items()
    }


# -- specs -----------------------------------------------------------------------------------------------------------------


@functools.singledispatch
def spec_in_file(delta: Delta) -> Method:
    """The spec that a file gives for a delta: its own, unless the file holds it in another form."""
    return delta.spec


@spec_in_file.register
def _(delta: Combined) -> Method:
    return delta.spec.replace(inner=spec_in_file(delta.inner))


@spec_in_file.register
def _(delta: LoKrDelta) -> Method:
    """Under PEFT's one rule of scale, with the alpha that gives the same."""
    return delta.spec.replace(alpha=delta.scale * cast(Any, delta.spec).rank, scale_rule="peft")


@spec_in_file.register
def _(delta: Triplets) -> Method:
    rank = len(delta.rows())
    return delta.spec if rank == len(delta.lam) else delta.spec.resized(rank)


@spec_in_file.register
def _(delta: ReLoRADelta) -> Method:
    """A plain LoRA of the whole rank, once something was put aside."""
    spec, kept = cast(Any, delta.spec), delta.kept()[1].shape[0]
    if not kept:
        return cast(Method, spec)
    return LoRA(rank=spec.rank, alpha=spec.alpha, rslora=spec.rslora).resized(spec.rank + kept)


@spec_in_file.register
def _(delta: Offset) -> Method:
    spec = cast(Any, spec_in_file(delta.inner))
    return cast(Method, spec.resized(spec.rank + cast(Tensor, delta.A0).shape[0]))
