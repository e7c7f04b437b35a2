"""Any other packed linear layer: its weight is recovered by passing unit vectors through it.

GPTQ, AWQ, AQLM, EETQ and eight-bit floats with scales each pack a weight for a kernel of their own. All of them are
called like a linear layer and have its sizes, which is enough: `f(x) = W x + b`, so the columns of W are `f(e) - f(0)`.
What comes out is what the kernel computes with, rounding included. Whether the layer is linear, and whether it gives its
inputs a gradient (some kernels are for inference alone), is tried and not believed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorakit.core.sites import has_linear_face
from lorakit.core.storage.contract import FLOATS, Storage, size_of
from lorakit.errors import LorakitError

COLUMNS = 512
"""Unit vectors pushed through a layer at once."""


class Frozen(Storage):
    """Packed layers of libraries whose format is not known here."""

    name = "packed"

    def holds(self, layer: nn.Module, tensor: str) -> bool:
        plain = (
            type(layer).forward is nn.Linear.forward
        )  # then the weight itself is something that lorakit does not know
        return tensor == "weight" and has_linear_face(layer) and not plain

    def label(self, layer: nn.Module, tensor: str) -> str:
        """The library and class, and the bits where the layer names them."""
        bits = getattr(layer, "bits", getattr(layer, "w_bit", getattr(layer, "nbits_per_codebook", None)))
        name = f"{type(layer).__module__.partition('.')[0]} {type(layer).__name__}"
        return f"{name} {bits}-bit" if isinstance(bits, int) else name

    def floats(self, weight: Any) -> Tensor:
        layer: nn.Module = weight
        dtype, device = _dtype(layer), _device(layer)
        width = cast(int, layer.in_features)
        with torch.no_grad():
            zero = _called(layer, torch.zeros(1, width, dtype=dtype, device=device))
            columns = []
            for start in range(0, width, COLUMNS):
                unit = torch.zeros(min(COLUMNS, width - start), width, dtype=dtype, device=device)
                unit[torch.arange(unit.shape[0]), start + torch.arange(unit.shape[0])] = 1
                columns.append((_called(layer, unit) - zero).T)
        W = torch.cat(columns, dim=1)
        _check(layer, W, zero)
        return W

    def present(self, layer: nn.Module, tensor: str) -> Any:
        return layer

    def packed(self, like: Any, values: Tensor) -> Any:
        raise LorakitError(
            f"init: {self.label(like, 'weight')} quantises by data or a search of its own, so that a start cannot try what a "
            "weight becomes; use a start that leaves the base as it is."
        )

    def write(self, layer: nn.Module, tensor: str, values: Tensor, fresh: bool = False) -> float:
        raise LorakitError(f"write: {self.refusal(layer, tensor)}")

    def place(self, layer: nn.Module, tensor: str, weight: Any) -> None:
        """Nothing was written, so nothing is put back."""

    def refusal(self, layer: nn.Module, tensor: str) -> str:
        return f"{self.label(layer, tensor)} can be read but not written: lorakit does not know how its library packs weights"

    def nbytes(self, layer: nn.Module, tensor: str) -> int:
        bias = getattr(layer, "bias", None)
        return size_of(one for one in _tensors(layer) if one is not bias)


def _tensors(layer: nn.Module) -> Iterator[Tensor]:
    yield from layer.parameters()
    yield from layer.buffers()


def _dtype(layer: nn.Module) -> torch.dtype:
    """The dtype to call it in: the one that it computes in if it names one, else that of its scales, else float32."""
    for name in ("compute_dtype", "torch_dtype", "dtype"):
        if getattr(layer, name, None) in FLOATS:
            return cast(torch.dtype, getattr(layer, name))
    return next((tensor.dtype for tensor in _tensors(layer) if tensor.dtype in FLOATS), torch.float32)


def _device(layer: nn.Module) -> torch.device:
    return next((tensor.device for tensor in _tensors(layer)), torch.device("cpu"))


def _called(layer: nn.Module, x: Tensor) -> Tensor:
    try:
        y = cast(Any, layer)(x)
    except Exception as problem:
        raise LorakitError(
            f"read: {type(layer).__name__} of {type(layer).__module__.partition('.')[0]} cannot be called on {x.device.type} "
            f"in {x.dtype}, so that its weight cannot be read: {type(problem).__name__}: {problem}"
        ) from problem
    if not isinstance(y, Tensor) or y.shape[-1] != layer.out_features:
        found = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise LorakitError(
            f"read: {type(layer).__name__} has out_features {layer.out_features} and returns {found}; it is no linear "
            "layer that lorakit knows."
        )
    return y


def _check(layer: nn.Module, W: Tensor, bias: Tensor) -> None:
    """`f(x)` must be `W x + b`, and must be differentiable by x."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    x = torch.rand(2, W.shape[1], generator=generator).to(W.device, W.dtype).requires_grad_()
    with torch.enable_grad():
        y = _called(layer, x)
    expected = (x.detach().double() @ W.double().T) + bias.double()
    scale = float(x.detach().double().abs().amax() * W.double().abs().sum(1).amax()) + 1e-30
    error = float((y.detach().double() - expected).abs().max()) / scale
    if error > 0.05:
        raise LorakitError(
            f"read: {type(layer).__name__} looks like a linear layer and is none: its output is off `W x + b` by "
            f"{error:.0%} of the largest possible. It cannot be adapted; leave it out of target_modules."
        )
    if not y.requires_grad:
        raise LorakitError(
            f"attach: the kernel of {type(layer).__name__} ({type(layer).__module__.partition('.')[0]}) gives its inputs no "
            "gradient, so that nothing before it could be trained. Load the model with a kernel of that library that trains "
            "(GPTQModel: backend torch), or quantise the float model otherwise: --quantize nf4."
        )
