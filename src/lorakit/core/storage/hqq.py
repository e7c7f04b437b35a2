"""HQQ: groups with a scale and a zero point of their own, in 8, 4, 3, 2 or 1 bits, found without data.

    w = s · (k - z)      s, z floats per group of 64 (by default)

A layer has no `weight`; codes are `W_q`, the rest is in `meta`. Badri and Shaji 2023, mobiusml.github.io/hqq_blog.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from lorakit.core.storage.contract import Snapshot, Storage, comes_from, relative_error


class HQQ(Storage):
    """Layers of the package hqq."""

    name = "hqq"

    def holds(self, layer: nn.Module, tensor: str) -> bool:
        return tensor == "weight" and comes_from(layer, "hqq") and hasattr(layer, "W_q")

    def label(self, layer: nn.Module, tensor: str) -> str:
        return f"hqq {cast(Any, layer).meta['nbits']}-bit"

    def read(self, layer: nn.Module, tensor: str) -> Tensor:
        return cast(Tensor, cast(Any, layer).dequantize()).detach()

    def write(self, layer: nn.Module, tensor: str, values: Tensor, fresh: bool = False) -> float:
        own: Any = layer
        codes, meta = _codes(own, values)
        own.W_q = nn.Parameter(codes, requires_grad=False)
        own.meta = {**own.meta, **meta}
        return relative_error(self.read(layer, tensor), values)

    def snapshot(self, layer: nn.Module, tensor: str) -> Snapshot:
        own: Any = layer
        codes, meta = own.W_q, own.meta

        def restore() -> None:
            own.W_q, own.meta = codes, meta

        return Snapshot(lambda: _floats(codes, meta), restore)

    def rounded(self, layer: nn.Module, tensor: str, values: Tensor) -> Tensor:
        codes, meta = _codes(layer, values)
        return _floats(codes, {**cast(Any, layer).meta, **meta}).float()

    def nbytes(self, layer: nn.Module, tensor: str) -> int:
        own: Any = layer
        held = [own.W_q, *(value for value in own.meta.values() if isinstance(value, Tensor))]
        return sum(one.numel() * one.element_size() for one in held)


def _floats(codes: Any, meta: dict[str, Any]) -> Tensor:
    from hqq.core.quantize import Quantizer

    return cast(Tensor, Quantizer.dequantize(codes, meta)).detach()


def _codes(layer: Any, values: Tensor) -> tuple[Tensor, dict[str, Any]]:
    from hqq.core.quantize import Quantizer

    meta = layer.meta
    codes, found = Quantizer.quantize(
        values.detach().float(),
        nbits=meta["nbits"],
        group_size=meta["group_size"],
        axis=meta["axis"],
        round_zero=meta["nbits"] == 4,
        compute_dtype=layer.compute_dtype,
        device=str(layer.W_q.device),
    )
    dtype = layer.compute_dtype or torch.float32
    for key in ("scale", "zero"):
        found[key] = found[key].to(dtype)
    return codes, found
