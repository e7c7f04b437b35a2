"""llama.cpp's blocks: 32 neighbouring numbers of a row share a scale d in half precision.

    q8_0    w = d · q          q from -127 to 127, d = max |w| / 127
    q4_0    w = d · (q - 8)    q from 0 to 15, d = the number of the largest magnitude / -8

8.5 and 4.5 bits a number, in the very order of a GGUF file. Sources: ggml's `quantize_row_q8_0_ref` and `_q4_0_ref`.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from lorakit.core.storage.contract import Storage, size_of
from lorakit.errors import LorakitError

BLOCK = 32
"""Numbers that share a scale."""

KINDS = ("q8_0", "q4_0")


class BlockLinear(nn.Module):
    """A linear layer whose weight lies in blocks.

    Attributes:
        kind: "q8_0" or "q4_0".
        codes: q8_0: int8 (out, in); q4_0: uint8 (out, in / 2), of each block 16 bytes, number i in the low half of byte i,
            number 16 + i in the high one.
        scales: the bits of half-precision numbers as int16 (out, in / 32): `.to(dtype)` of a model leaves integers alone.
        dtype: of the floats that it is read as.
    """

    codes: Tensor
    scales: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None, kind: str) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.kind, self.dtype = kind, weight.dtype
        codes, scales = pack(weight, kind)
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        y = cast(Tensor, _Product.apply(x, self.codes, self.scales, self.kind))  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.kind}"


class _Product(torch.autograd.Function):
    """`x Wᵀ`; the floats of W are made again on the way back, and never kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scales: Tensor, kind: str) -> Tensor:
        ctx.save_for_backward(codes, scales)
        ctx.kind = kind
        return functional.linear(x, unpack(codes, scales, kind, x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = gradients
        codes, scales = ctx.saved_tensors
        return gradient @ unpack(codes, scales, ctx.kind, gradient.dtype), None, None, None


def fits(width: int) -> bool:
    """Whether rows of this many numbers can be laid in blocks."""
    return width % BLOCK == 0


def pack(weight: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Codes and scales (see `BlockLinear`) of a weight (out, in).

    Raises:
        LorakitError: its rows are no multiple of 32.
    """
    if not fits(weight.shape[1]):
        raise LorakitError(f"quantize: {kind} needs rows of a multiple of {BLOCK} numbers, found {weight.shape[1]}.")
    parts = weight.detach().float().unflatten(1, (-1, BLOCK))
    largest = parts.gather(2, parts.abs().argmax(2, keepdim=True))
    scale = largest.abs() / 127 if kind == "q8_0" else largest / -8
    # The codes are found with the scale as it is before rounding, as llama.cpp finds them.
    steps = parts * torch.where(scale == 0, 0.0, 1 / scale)
    scales = scale.squeeze(2).to(torch.float16).view(torch.int16)
    if kind == "q8_0":
        return steps.round().to(torch.int8).flatten(1), scales
    codes = (steps + 8.5).clamp(0, 15).to(torch.uint8)
    low, high = codes.chunk(2, dim=2)
    return (low | high << 4).flatten(1), scales


def unpack(codes: Tensor, scales: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    """The floats (out, in) of codes and scales."""
    scale = scales.view(torch.float16).to(torch.float32).unsqueeze(2)
    if kind == "q8_0":
        steps = codes.unflatten(1, (-1, BLOCK))
    else:
        bytes_ = codes.unflatten(1, (-1, BLOCK // 2))
        steps = torch.cat([bytes_ & 15, bytes_ >> 4], dim=2).to(torch.int8) - 8
    values: Tensor = steps * scale
    return values.flatten(1).to(dtype)


class Blocks(Storage):
    """Weights in llama.cpp's blocks."""

    name = "blocks"

    def holds(self, layer: nn.Module, tensor: str) -> bool:
        return tensor == "weight" and isinstance(layer, BlockLinear)

    def label(self, layer: nn.Module, tensor: str) -> str:
        return cast(BlockLinear, layer).kind

    def present(self, layer: nn.Module, tensor: str) -> Any:
        own = cast(BlockLinear, layer)
        return own.codes, own.scales, own.kind, own.dtype

    def floats(self, weight: Any) -> Tensor:
        return unpack(*weight)

    def packed(self, like: Any, values: Tensor) -> Any:
        *_, kind, dtype = like
        return *pack(values, kind), kind, dtype

    def place(self, layer: nn.Module, tensor: str, weight: Any) -> None:
        own = cast(BlockLinear, layer)
        own.codes, own.scales, own.kind, own.dtype = weight

    def nbytes(self, layer: nn.Module, tensor: str) -> int:
        own = cast(BlockLinear, layer)
        return size_of([own.codes, own.scales])
