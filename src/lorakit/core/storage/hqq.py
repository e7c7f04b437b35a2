"""HQQ: groups with a scale and a zero point of their own, in 8, 4, 3, 2 or 1 bits, found without data.

    w = s · (k - z)      s, z floats per group of 64 (by default)

A layer has no `weight`; codes are `W_q`, the rest is in `meta`. Badri and Shaji 2023, mobiusml.github.io/hqq_blog.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from lorakit.core.storage.contract import Storage, comes_from, size_of


class HQQ(Storage):
    """Layers of the package hqq."""

    name = "hqq"

    def holds(self, layer: nn.Module, tensor: str) -> bool:
        return tensor == "weight" and comes_from(layer, "hqq") and hasattr(layer, "W_q")

    def label(self, layer: nn.Module, tensor: str) -> str:
        return f"hqq {cast(Any, layer).meta['nbits']}-bit"

    def present(self, layer: nn.Module, tensor: str) -> Any:
        own: Any = layer
        return own.W_q, own.meta, own.compute_dtype

    def floats(self, weight: Any) -> Tensor:
        from hqq.core.quantize import Quantizer

        return cast(Tensor, Quantizer.dequantize(*weight[:2])).detach()

    def read(self, layer: nn.Module, tensor: str) -> Tensor:
        return cast(Tensor, cast(Any, layer).dequantize()).detach()

    def packed(self, like: Any, values: Tensor) -> Any:
        from hqq.core.quantize import Quantizer

        old, meta, dtype = like
        codes, found = Quantizer.quantize(
            values.detach().float(),
            nbits=meta["nbits"],
            group_size=meta["group_size"],
            axis=meta["axis"],
            round_zero=meta["nbits"] == 4,
            compute_dtype=dtype,
            device=str(old.device),
        )
        for key in ("scale", "zero"):
            found[key] = found[key].to(dtype or torch.float32)
        return nn.Parameter(codes, requires_grad=False), {**meta, **found}, dtype

    def place(self, layer: nn.Module, tensor: str, weight: Any) -> None:
        own: Any = layer
        own.W_q, own.meta, _ = weight

    def nbytes(self, layer: nn.Module, tensor: str) -> int:
        own: Any = layer
        return size_of([own.W_q, *(value for value in own.meta.values() if isinstance(value, Tensor))])
