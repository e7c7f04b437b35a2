"""torchao: the layer stays an `nn.Linear`, and its weight is a tensor subclass that multiplies itself.

    w = s · k, k signed 8 bits       s = max |w| / 127 of a row or a group

Every subclass reads by its own `dequantize`. 8-bit weights are written too; 4-bit ones are packed for one kernel each by
functions of other libraries, and are merged into a float copy.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from lorakit.core.storage.contract import Storage, comes_from, size_of, value_of


class TorchAO(Storage):
    """Weights of the package torchao."""

    name = "torchao"

    def holds(self, layer: nn.Module, tensor: str) -> bool:
        value = value_of(layer, tensor)
        return comes_from(value, "torchao") and hasattr(value, "dequantize")

    def label(self, layer: nn.Module, tensor: str) -> str:
        return f"torchao {type(value_of(layer, tensor)).__name__.removesuffix('Tensor').lower()}"

    def floats(self, weight: Any) -> Tensor:
        return cast(Tensor, weight.dequantize()).detach()

    def packed(self, like: Any, values: Tensor) -> Any:
        return nn.Parameter(_made(like, values), requires_grad=False)

    def refusal(self, layer: nn.Module, tensor: str) -> str:
        kind = type(value_of(layer, tensor)).__name__
        return (
            ""
            if kind == "Int8Tensor"
            else f"torchao's {kind} is packed for one kernel, and can be read but not written"
        )

    def nbytes(self, layer: nn.Module, tensor: str) -> int:
        value = value_of(layer, tensor)
        inner, _ = value.__tensor_flatten__()
        return size_of(getattr(value, name) for name in inner)


def _made(like: Any, values: Tensor) -> Any:
    from torchao.quantization.granularity import PerGroup, PerRow

    rows = like.block_size[-1] == like.shape[-1]
    granularity = PerRow() if rows else PerGroup(like.block_size[-1])
    return type(like).from_hp(values.detach().to(like.dtype).contiguous(), granularity)
