"""The linear layers of the serving model: each token's product with the weight, and with its own adapters.

In bfloat16, weights are kept a second time in the order in which they are read, and layers that read the same input (q, k and
v; gate and up) are computed by one call: the first of them that the model calls computes all, the others hand out what is
there. There are two ways: loops of our own (`linear.cpp`), which add the adapters in the same pass, and oneDNN over weights
that it has ordered for itself, after which the adapters come. Which one a group takes is measured (`native/choice.py`). Where
neither is to be had, the layer is computed by its own forward.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from lorakit.core.storage.blocks import BLOCK, BlockLinear
from lorakit.native.choice import fastest
from lorakit.serve.model import native
from lorakit.serve.model.attention import ForwardContext
from lorakit.serve.model.batch import Batch
from lorakit.serve.model.product import adapt

ROWS = (1, 8, 32, 128)
"""Tokens of a step for which ways are compared: from one stream to a prompt."""

TYPICAL = 32
"""Tokens of a step that oneDNN orders weights for."""

PANEL = 48
"""Outputs that lie together in a packed weight; `linear.cpp` is written for this number."""


class WeightBuffer:
    """Memory for packed weights, in blocks of at least 64 MB, since Linux gives pages of 2 MB to large blocks only.

    What is left at the end of a block is never written, so that the system never gives memory for it.
    """

    BLOCK = 1 << 25

    def __init__(self) -> None:
        self.rest = torch.empty(0, dtype=torch.bfloat16)

    def take(self, *shape: int) -> Tensor:
        """An uninitialised tensor, which begins at a whole cache line."""
        count = math.prod(shape)
        room = native.padded(count)
        if room > self.rest.numel():
            self.rest = torch.empty(max(room, self.BLOCK), dtype=torch.bfloat16)
            native.large_pages(self.rest)
        found, self.rest = self.rest[:count].view(shape), self.rest[room:]
        return found


def pack_weight(weight: Tensor, buffer: WeightBuffer) -> Tensor:
    """A bfloat16 weight (out, in) in panels: (panels, in / 2, PANEL, 2), what is missing in the last one being zero."""
    out, width = weight.shape
    panels = -(-out // PANEL)
    result = buffer.take(panels, width // 2, PANEL, 2)
    whole = out // PANEL
    parts = weight.view(out, width // 2, 2)
    result[:whole] = parts[: whole * PANEL].view(whole, PANEL, width // 2, 2).transpose(1, 2)
    if whole < panels:
        result[whole] = 0
        result[whole, :, : out - whole * PANEL] = parts[whole * PANEL :].transpose(0, 1)
    return result


def pack_blocks(layer: BlockLinear) -> Tensor:
    """A weight in blocks in the panels of `blocked.h`, as bytes (panels, blocks, 3, 32 + 64 · 8 or 4); what is missing in the
    last panel being zero."""
    out, blocks = layer.out_features, layer.in_features // BLOCK
    panels = -(-out // PANEL)
    codes = layer.codes.view(torch.uint8)
    if layer.kind == "q8_0":
        codes = codes ^ 128  # q + 128
    rows = torch.zeros(panels * PANEL, codes.shape[1], dtype=torch.uint8)
    rows[:out] = codes
    scales = torch.zeros(panels * PANEL, blocks, dtype=torch.int16)
    scales[:out] = layer.scales
    inner = rows.view(panels, 3, 16, blocks, -1, 4).permute(0, 3, 1, 4, 2, 5).flatten(3)
    outer = scales.view(panels, 3, 16, blocks).permute(0, 3, 1, 2).contiguous().view(torch.uint8)
    result = torch.empty(panels, blocks, 3, outer.shape[3] + inner.shape[3], dtype=torch.uint8)
    native.large_pages(result)
    result[..., : outer.shape[3]] = outer
    result[..., outer.shape[3] :] = inner
    return result


class LinearForward:
    """The forward of one linear layer of the serving model.

    Attributes:
        number: the layer's place in `linear_layers` of the model.
        tokens: how many tokens it saw in the last forward.
        input: what it was given in the last forward outside of a step.
        weight: its bfloat16 weight where that is to be ordered for the processor, or None.
        blocks: the layer itself where its weight lies in blocks that are multiplied as they are, or None.
        group: the layers that are computed together with it.
    """

    def __init__(self, module: nn.Module, number: int, context: ForwardContext, pack: bool) -> None:
        self.number, self.context, self.tokens = number, context, 0
        self.original: Callable[[Tensor], Tensor] = module.forward
        self.input: Tensor | None = None
        self.bias = cast("Tensor | None", getattr(module, "bias", None))
        self.weight: Tensor | None = None
        self.group: Group | None = None
        self.blocks: BlockLinear | None = None
        if isinstance(module, BlockLinear):
            if pack and native.find("linear", torch.bfloat16) is not None:
                self.blocks = module
            return
        weight = cast(Tensor, module.weight)
        plain = type(module).forward is nn.Linear.forward and type(weight) is nn.Parameter
        if pack and plain and weight.dtype == torch.bfloat16 and ways(weight.shape[1]):
            self.weight = weight.detach()

    def __call__(self, x: Tensor) -> Tensor:
        context = self.context
        batch = context.batch
        if batch is None:
            self.input = x
            return self.original(x)
        self.tokens = x.numel() // x.shape[-1]
        # The output layer sees only the tokens whose logits are wanted.
        own = batch if batch.mixture is None or self.tokens == batch.row.shape[0] else batch.head
        if self.group is not None and x.dtype == torch.bfloat16 and not (context.trial and self.blocks is not None):
            return self.group.output(self.number, x, own)
        y = self.original(x)
        if own.mixture is not None and own.mixture.touched[self.number]:
            adapt(own, self.number, x.view(-1, x.shape[-1]), y.view(-1, y.shape[-1]), context.compiled)
        return y


def ways(width: int) -> list[str]:
    """How layers with this many inputs can be computed over weights that were ordered before."""
    panels = native.find("linear", torch.bfloat16) is not None and width % 2 == 0
    ordered = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return [name for name, there in (("panels", panels), ("ordered", ordered)) if there]


class Group:
    """Layers that read the same input, computed by the first that is asked for; all in floats, or all in one kind of blocks."""

    def __init__(self, layers: list[LinearForward], buffer: WeightBuffer) -> None:
        self.numbers = [layer.number for layer in layers]
        self.biases = [layer.bias for layer in layers]
        self.input: Tensor | None = None
        self.outputs: dict[int, Tensor] = {}
        self.product: Product
        blocks = [layer.blocks for layer in layers if layer.blocks is not None]
        if blocks:
            self.weights: list[Tensor] = []
            self.outs, inputs = [one.out_features for one in blocks], blocks[0].in_features
            packed = [(pack_blocks(one), bias) for one, bias in zip(blocks, self.biases, strict=True)]
            self.width = sum(self.outs)
            self.product = Panels(self, inputs, packed, blocks[0].kind)
            return
        self.weights = [cast(Tensor, layer.weight) for layer in layers]
        self.outs = [weight.shape[0] for weight in self.weights]
        self.width = sum(self.outs)
        self.product = self.order(self.fastest(), buffer)

    def order(self, way: str, buffer: WeightBuffer) -> Product:
        """A way to compute this group, with its weights in that way's order."""
        if way == "ordered":
            return Ordered(self)
        packed = [(pack_weight(weight, buffer), bias) for weight, bias in zip(self.weights, self.biases, strict=True)]
        return Panels(self, self.weights[0].shape[1], packed)

    def fastest(self) -> str:
        """The way that is the fastest here."""
        inputs = self.weights[0].shape[1]

        def cases(way: str) -> list[Callable[[], object]]:
            product, most = self.order(way, WeightBuffer()), (1 << 30) // (self.width * inputs)
            xs = [torch.ones(rows, inputs, dtype=torch.bfloat16) for rows in ROWS if rows == 1 or rows <= most]
            return [functools.partial(product, x, None) for x in xs]

        return fastest("linear", (inputs, *self.outs), {way: functools.partial(cases, way) for way in ways(inputs)})

    def output(self, number: int, x: Tensor, batch: Batch) -> Tensor:
        """One layer's output for x (..., tokens, in)."""
        if self.input is not x or number not in self.outputs:
            self._compute(x, batch)
        y = self.outputs.pop(number)
        if not self.outputs:
            self.input = None
        return y

    def _compute(self, x: Tensor, batch: Batch) -> None:
        block = self.compute(x.reshape(-1, x.shape[-1]), batch)
        parts = block.split([block.numel() // self.width * out for out in self.outs])
        self.input = x
        self.outputs = {
            number: part.view(*x.shape[:-1], out)
            for number, part, out in zip(self.numbers, parts, self.outs, strict=True)
        }

    def compute(self, x: Tensor, batch: Batch) -> Tensor:
        """All layers' outputs for x (tokens, in), one after the other, each (tokens, out)."""
        mixture = batch.mixture
        touched = mixture is not None and any(mixture.touched[number] for number in self.numbers)
        return self.product(x, batch if touched else None)


class Product(Protocol):
    """The outputs of a group's layers for x (tokens, in), one after the other, with what the adapters of a batch add."""

    def __call__(self, x: Tensor, batch: Batch | None) -> Tensor: ...


KIND = {"bfloat16": 0, "ready": 1, "q8_0": 8, "q4_0": 4}
"""What a weight lies in, as `blocked.h` numbers it; "ready": its product is there already."""


class _Layer(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("weight", "bias", "width", "out", "number", "kind")]


class Loops:
    """The loops of `linear.cpp` over a group's layers.

    Args:
        inputs: numbers of a token.
        packed: each layer's weight in panels, and its bias; None of "ready".
        kind: one of `KIND`.
    """

    def __init__(
        self, group: Group, inputs: int, packed: Sequence[tuple[Tensor | None, Tensor | None]], kind: str
    ) -> None:
        self.tensors = packed  # must live as long as their addresses
        addresses = ([0 if tensor is None else tensor.data_ptr() for tensor in pair] for pair in packed)
        about = zip(addresses, group.outs, group.numbers, strict=True)
        self.layers = (_Layer * len(packed))(
            *(_Layer(*own, inputs, out, number, KIND[kind]) for own, out, number in about)
        )
        self.address = ctypes.addressof(self.layers)
        function = native.find("linear", torch.bfloat16)
        assert function is not None
        self.function = function

    def run(self, x: Tensor, y: Tensor, adapters: tuple[int, ...]) -> None:
        """Fill y, all layers' outputs one after the other, for x (tokens, in); `adapters` is one of a `Batch`, or zeros."""
        self.function(self.address, len(self.layers), x.data_ptr(), x.stride(0), x.shape[0], y.data_ptr(), *adapters)


class Panels(Loops):
    """By our own loops, adapters in the same pass."""

    def __init__(
        self, group: Group, inputs: int, packed: Sequence[tuple[Tensor, Tensor | None]], kind: str = "bfloat16"
    ) -> None:
        super().__init__(group, inputs, packed, kind)
        self.width = group.width

    def __call__(self, x: Tensor, batch: Batch | None) -> Tensor:
        x = x if x.stride(1) == 1 else x.contiguous()
        block = x.new_empty(x.shape[0] * self.width)
        self.run(x, block, (0,) * 8 if batch is None else batch.adapters)
        return block


class Ordered:
    """By oneDNN, all layers as one product over weights that it has ordered for itself; adapters after, in one pass of our own
    loops where these can be had, and those of long runs by matmuls."""

    def __init__(self, group: Group) -> None:
        self.numbers, self.outs, weights = group.numbers, group.outs, group.weights
        whole = torch.cat(weights) if len(weights) > 1 else weights[0]
        self.weight = torch.ops.mkldnn._reorder_linear_weight(whole, TYPICAL)
        self.bias: Tensor | None = None
        if any(bias is not None for bias in group.biases):
            pairs = zip(weights, group.biases, strict=True)
            self.bias = torch.cat([weight.new_zeros(len(weight)) if bias is None else bias for weight, bias in pairs])
        self.loops: Loops | None = None
        if native.find("linear", torch.bfloat16) is not None:
            self.loops = Loops(group, whole.shape[1], [(None, None)] * len(self.outs), "ready")

    def __call__(self, x: Tensor, batch: Batch | None) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        parts = y.split(self.outs, dim=1)
        block = y.flatten() if len(parts) == 1 else torch.cat([part.flatten() for part in parts])
        if batch is None or batch.mixture is None:
            return block
        x = x if x.stride(1) == 1 else x.contiguous()
        if self.loops is None or batch.long:
            first = 0
            for number, out in zip(self.numbers, self.outs, strict=True):
                own = block[first : (first := first + x.shape[0] * out)].view(-1, out)
                if batch.mixture.touched[number]:
                    adapt(batch, number, x, own, compiled=True, only_long=self.loops is not None)
        if self.loops is not None and (adapters := batch.short_adapters)[-1]:
            self.loops.run(x, block, adapters)
        return block


def join(layers: Iterable[LinearForward]) -> None:
    """Make groups of the layers to be ordered that were given the very same input in the last forward outside of a step."""
    groups: dict[tuple[str, int], list[LinearForward]] = {}
    for forward in layers:
        if forward.weight is not None or forward.blocks is not None:
            alone = forward.input is None  # an expert that saw nothing
            kind = "" if forward.blocks is None else forward.blocks.kind
            groups.setdefault((kind, -forward.number - 1 if alone else id(forward.input)), []).append(forward)
    buffer = WeightBuffer()
    for members in groups.values():
        group = Group(members, buffer)
        for forward in members:
            forward.group = group
    for forward in layers:
        forward.input = None
