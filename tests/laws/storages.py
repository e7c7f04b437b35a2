"""Layers whose weight is held in few bits, and how far what they store may be from what was to be stored.

All is float32, since no quantiser takes float64. Two ways to one number are held to the tolerance of `laws.py` with
float32's eps (128 inputs here, which is what that tolerance is for). Only writing rounds, and each storage says by how
much at most:

    nf4, fp4    half the widest gap of the code book, times the largest magnitude of the block
    doubled     and half the widest gap of the signed 8-bit code (64 values from 0.1 to 1), times the largest of these
    int8        half a step of the row, 1/254 of its largest magnitude, and the half precision it is rounded to first
    hqq         one step of the group, since its search moves the zero point
    q8_0        half a step of the block, 1/254 of its largest magnitude, and its scale's rounding to half precision
    q4_0        a step of the block, 1/8: one side has eight steps and the other seven; and its scale's rounding
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from laws.cases import SPECS, Case, Inputs, Kind, Model
from lorakit.core.delta import Method
from lorakit.core.storage.blocks import BlockLinear
from lorakit.methods import METHODS

INPUTS, OUTPUTS, BLOCK = 128, 64, 64
BOUND = 2**11 * torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Format:
    """One way to hold a weight.

    Attributes:
        name: for test names.
        pack: a float layer -> the layer that holds it so.
        bound: a weight (out, in) -> the largest error of each entry after storing; None where nothing can be written.
        label: what the storage calls it.
    """

    name: str
    pack: Callable[[nn.Linear], nn.Module]
    bound: Callable[[Tensor], Tensor] | None
    label: str


# -- packing ---------------------------------------------------------------------------------------------------------------


def four_bit(kind: str, doubled: bool) -> Callable[[nn.Linear], nn.Module]:
    """bitsandbytes' 4-bit layer of a float one."""

    def pack(layer: nn.Linear) -> nn.Module:
        import bitsandbytes as bnb

        made = bnb.nn.Linear4bit(INPUTS, OUTPUTS, layer.bias is not None, torch.float32, doubled, kind)
        made.load_state_dict(layer.state_dict())
        return made.to("cpu").requires_grad_(False)

    return pack


def eight_bit(layer: nn.Linear) -> nn.Module:
    """bitsandbytes' 8-bit layer of a float one."""
    import bitsandbytes as bnb

    made = bnb.nn.Linear8bitLt(INPUTS, OUTPUTS, layer.bias is not None, has_fp16_weights=False)
    made.load_state_dict(layer.state_dict())
    return made.to("cpu").requires_grad_(False)


def torchao_int8(layer: nn.Linear) -> nn.Module:
    """The same layer with torchao's 8-bit weight in it."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    holder = nn.Sequential(layer)
    quantize_(holder, Int8WeightOnlyConfig())
    return holder[0].requires_grad_(False)


def hqq(bits: int) -> Callable[[nn.Linear], nn.Module]:
    """HQQ's layer of a float one."""

    def pack(layer: nn.Linear) -> nn.Module:
        from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

        config = BaseQuantizeConfig(nbits=bits, group_size=BLOCK)
        made: nn.Module = HQQLinear(layer, config, compute_dtype=torch.float32, device="cpu")
        return made

    return pack


def blocks(kind: str) -> Callable[[nn.Linear], nn.Module]:
    """The layer with its weight in llama.cpp's blocks."""
    return lambda layer: BlockLinear(layer.weight, layer.bias, kind)


class Foreign(nn.Module):
    """A layer of a library that lorakit does not know, in the form of GPTQ's: codes, zero points and scales of groups, the
    weight unpacked within the call and then gone."""

    def __init__(self, layer: nn.Linear, bits: int = 4, group: int = 32) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bits = layer.in_features, layer.out_features, bits
        W = layer.weight.detach().T.reshape(-1, group, layer.out_features)
        low, high = W.amin(1, keepdim=True), W.amax(1, keepdim=True)
        scales = (high - low) / (2**bits - 1)
        self.register_buffer("scales", scales)
        self.register_buffer("qzeros", (-low / scales).round().to(torch.int8))
        self.register_buffer("qweight", ((W - low) / scales).round().to(torch.uint8))
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().clone())

    def weight_inside(self) -> Tensor:
        W = (self.qweight.to(self.scales.dtype) - self.qzeros) * self.scales
        return W.reshape(self.in_features, self.out_features)

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight_inside().to(x.dtype)
        return y if self.bias is None else y + self.bias


# -- bounds ----------------------------------------------------------------------------------------------------------------

_NF4_GAP, _FP4_GAP = 1 - 0.6961928009986877, 1 - 2 / 3
_DYNAMIC_GAP = 0.9 / 64


def _blocks(W: Tensor) -> Tensor:
    """The largest magnitude of its block, for every entry."""
    return W.reshape(-1, BLOCK).abs().amax(1, keepdim=True).expand(-1, BLOCK).reshape(W.shape)


def of_blocks(gap: float, doubled: bool) -> Callable[[Tensor], Tensor]:
    """Half the widest gap times the block's scale; doubled, the scale itself may be off."""

    def bound(W: Tensor) -> Tensor:
        scale = _blocks(W)
        return gap / 2 * scale + (_DYNAMIC_GAP / 2 * scale.max() if doubled else 0.0)

    return bound


def of_rows(W: Tensor) -> Tensor:
    """Half a step of the row, and half precision's rounding."""
    return W.abs().amax(1, keepdim=True) * (1 / 254 + 2**-10) + 0 * W


def of_32(step: float) -> Callable[[Tensor], Tensor]:
    """This share of the largest magnitude of a block of 32, and its scale's rounding to half precision: 2^-11 of it, or 2^-25
    where it is below the normal numbers."""

    def bound(W: Tensor) -> Tensor:
        return (step + 2**-11) * W.unflatten(1, (-1, 32)).abs().amax(2).repeat_interleave(32, dim=1) + 127 * 2**-25

    return bound


def of_groups(W: Tensor) -> Tensor:
    """One step of the group in 4 bits."""
    groups = W.reshape(-1, BLOCK)
    step = (groups.amax(1, keepdim=True) - groups.amin(1, keepdim=True)) / 15
    return step.expand(-1, BLOCK).reshape(W.shape)


FORMATS: tuple[Format, ...] = (
    Format("nf4", four_bit("nf4", False), of_blocks(_NF4_GAP, False), "nf4"),
    Format("nf4-doubled", four_bit("nf4", True), of_blocks(_NF4_GAP, True), "nf4"),
    Format("fp4", four_bit("fp4", False), of_blocks(_FP4_GAP, False), "fp4"),
    Format("int8", eight_bit, of_rows, "int8"),
    Format("torchao-int8", torchao_int8, of_rows, "torchao int8"),
    Format("hqq-4", hqq(4), of_groups, "hqq 4-bit"),
    Format("q8_0", blocks("q8_0"), of_32(1 / 254), "q8_0"),
    Format("q4_0", blocks("q4_0"), of_32(1 / 8), "q4_0"),
    Format("foreign", Foreign, None, "laws Foreign 4-bit"),
)
FORMAT = {one.name: one for one in FORMATS}


# -- cases -----------------------------------------------------------------------------------------------------------------


def _inputs(batch: int) -> list[Inputs]:
    return [((torch.randn(batch, INPUTS),), {}), ((torch.randn(batch, 3, INPUTS),), {})]


def kind(name: str, bias: bool) -> Kind:
    """The one layer of this file, as the laws know kinds."""
    return Kind(name, lambda: nn.Linear(INPUTS, OUTPUTS, bias=bias), _inputs)


@dataclass(frozen=True)
class Held(Case):
    """A method's spec on a layer that holds its weight in few bits."""

    format: Format = field(default=FORMATS[0])

    def model(self) -> Model:
        """The base model, the same at each call; in training mode, where no library rounds the inputs."""
        torch.default_generator.manual_seed(zlib.crc32(self.kind.name.encode()))
        layer = self.kind.make()
        assert isinstance(layer, nn.Linear)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.5)
        model = Model(self.format.pack(layer))
        return model.train()


def cases(*formats: str, methods: Any = METHODS) -> Iterator[Held]:
    """The first example of every method on each format; LoRA on a layer without bias as well."""
    for name in formats:
        for method in methods:
            spec: Method = SPECS[method][0]
            yield Held(spec, kind("biased", True), FORMAT[name])
        yield Held(SPECS["lora"][0], kind("plain", False), FORMAT[name])
