"""bitsandbytes: NF4 and FP4 in blocks with optional double quantisation, and 8-bit rows.

    4 bits   w = c · code[k]              c = max |w| of a block of 64     double: c itself in 8 bits, blocks of 256
    8 bits   w = s · k / 127, k signed    s = max |w| of a row

QLoRA: Dettmers et al. 2023, arXiv 2305.14314; LLM.int8(): arXiv 2208.07339.

Two habits of the library matter here. Its 4-bit layer, asked in evaluation mode on a processor with bfloat16
instructions, packs its weight anew for a kernel that has no backward: whatever lies below the layer gets no gradient from
then on, and the double-quantised scales are lost. `settle` undoes and forbids that. Its 8-bit layer multiplies rounded
inputs in evaluation mode (inputs as they are while training, on a processor), so its output then differs from `W x` by up
to 1/254 of the largest input; the adapter's part beside it does not.
"""

from __future__ import annotations

import copy
import logging
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorakit.core.storage.contract import Storage, comes_from, owner, size_of, value_of


class FourBit(Storage):
    """`Params4bit`: the packed codes are the parameter, blocks and scales its `quant_state`."""

    name = "bitsandbytes 4-bit"

    def holds(self, layer: nn.Module, tensor: str) -> bool:
        value = value_of(layer, tensor)
        return comes_from(value, "bitsandbytes") and getattr(value, "quant_state", None) is not None

    def label(self, layer: nn.Module, tensor: str) -> str:
        return str(value_of(layer, tensor).quant_type)

    def floats(self, weight: Any) -> Tensor:
        return _floats(weight)

    def packed(self, like: Any, values: Tensor) -> Any:
        return _packed(like, values)

    def place(self, layer: nn.Module, tensor: str, weight: Any) -> None:
        module, name = owner(layer, tensor)
        setattr(module, name, weight)
        if hasattr(module, "quant_state"):  # the layer keeps a second reference
            weight.module = module
            cast(Any, module).quant_state = weight.quant_state

    def nbytes(self, layer: nn.Module, tensor: str) -> int:
        weight = value_of(layer, tensor)
        state = weight.quant_state
        inner = getattr(state, "state2", None)
        tensors = [weight, state.absmax, state.code]
        tensors += [inner.absmax, inner.code, state.offset] if inner is not None else []
        return size_of(tensors)

    def settle(self, layer: nn.Module) -> None:
        for module in layer.modules():
            weight = module._parameters.get("weight")
            if not self.holds(module, "weight"):
                continue
            packed: Any = weight
            if getattr(packed.quant_state, "packing_format_for_cpu", False):
                packed.data, packed.quant_state = _unpacked(packed.data, packed.quant_state)
                cast(Any, module).quant_state = packed.quant_state
            if getattr(module, "support_avx512bf16_for_cpu", False):
                cast(Any, module).support_avx512bf16_for_cpu = False


def _floats(weight: Any) -> Tensor:
    """The weight that the codes stand for, in the dtype it was quantised from."""
    from bitsandbytes.functional import dequantize_4bit

    data, state = weight.data, weight.quant_state
    if getattr(state, "packing_format_for_cpu", False):
        data, state = _unpacked(data, state)
    floats: Tensor = dequantize_4bit(data, state)
    return floats


def _packed(like: Any, values: Tensor) -> Any:
    """`values` quantised in the very way in which `like` is."""
    state, inner = like.quant_state, getattr(like.quant_state, "state2", None)
    kind: Any = type(like)
    data = values.detach().to(device=like.device, dtype=state.dtype)
    made = kind(
        data.contiguous(),
        requires_grad=False,
        blocksize=state.blocksize,
        compress_statistics=inner is not None,
        quant_type=state.quant_type,
        quant_storage=like.quant_storage,
    )
    return made.to(like.device)  # this is where the library quantises


def _unpacked(data: Tensor, state: Any) -> tuple[Tensor, Any]:
    """Codes and state in the ordinary order from the one of the processor's inference kernel, which has rounded the scales
    to bfloat16 and turned them."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    own = copy.copy(state)
    own.original_nested = False
    codes, own = _convert_weight_packed_for_cpu_inverse(data, own)
    own.absmax = state.absmax.T.reshape(-1).float().contiguous()
    own.nested = False
    return codes, own


class EightBit(Storage):
    """`Int8Params`: codes and scales are the parameter's at first, and the layer's `state` has them after its first call."""

    name = "int8"

    def holds(self, layer: nn.Module, tensor: str) -> bool:
        value = value_of(layer, tensor)
        return comes_from(value, "bitsandbytes") and hasattr(value, "SCB") and value.dtype == torch.int8

    def present(self, layer: nn.Module, tensor: str) -> Any:
        module, name = owner(layer, tensor)
        return getattr(module, name), getattr(module, "state", None)

    def floats(self, weight: Any) -> Tensor:
        codes, state = weight
        scales = codes.SCB if codes.SCB is not None else state.SCB
        return cast(Tensor, codes.data.float() * (scales.float()[:, None] / 127))  # the original dtype is not kept

    def packed(self, like: Any, values: Tensor) -> Any:
        codes, state = like[0], copy.copy(like[1])
        kind: Any = type(codes)
        made = kind(values.detach().float().cpu(), requires_grad=False, has_fp16_weights=False).to(codes.device)
        if state is not None:
            state.CB, state.SCB = made.CB, made.SCB
            made.CB = made.SCB = None
        return made, state

    def place(self, layer: nn.Module, tensor: str, weight: Any) -> None:
        module, name = owner(layer, tensor)
        setattr(module, name, weight[0])
        module.state = weight[1]

    def nbytes(self, layer: nn.Module, tensor: str) -> int:
        codes = value_of(layer, tensor)
        return int(codes.numel() + 4 * codes.shape[0])

    def settle(self, layer: nn.Module) -> None:
        log = logging.getLogger("bitsandbytes.autograd._functions")
        if not any(isinstance(one, Once) for one in log.filters):
            log.addFilter(Once())


class Once(logging.Filter):
    """Lets a message through the first time: the 8-bit product warns of its half precision at every call."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        first = str(record.msg) not in self.seen
        self.seen.add(str(record.msg))
        return first
