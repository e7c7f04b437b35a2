"""The linear layers of the serving model: each token's product with the weight, and with its own adapters.

In bfloat16, weights are kept a second time in the order in which the loops read them (`linear.cpp`), and layers that read the
same input (q, k and v; gate and up) are computed by one call: the first of them that the model calls computes all, the
others hand out what is there. Where that is not to be had, the layer is computed by oneDNN over a weight that it has ordered
for itself, or by the layer's own forward, and the adapters come after.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterable
from typing import cast

import torch
from torch import Tensor, nn

from lorakit.serve.model import native
from lorakit.serve.model.attention import ForwardContext
from lorakit.serve.model.batch import Batch
from lorakit.serve.model.product import adapt

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


class LinearForward:
    """The forward of one linear layer of the serving model.

    Attributes:
        number: the layer's place in `linear_layers` of the model.
        tokens: how many tokens it saw in the last forward.
        input: what it was given in the last forward outside of a step.
        panels: its weight as `linear.cpp` reads it, or None.
        group: the layers that are computed together with it.
    """

    def __init__(self, module: nn.Module, number: int, context: ForwardContext, buffer: WeightBuffer | None) -> None:
        self.number, self.context, self.tokens = number, context, 0
        self.original: Callable[[Tensor], Tensor] = module.forward
        self.input: Tensor | None = None
        self.bias = cast("Tensor | None", getattr(module, "bias", None))
        self.panels: Tensor | None = None
        self.ordered: Tensor | None = None
        self.group: Group | None = None
        weight = cast(Tensor, module.weight)
        if not (
            buffer is not None
            and type(module).forward is nn.Linear.forward
            and type(weight) is nn.Parameter
            and weight.dtype == torch.bfloat16
        ):
            return
        self.out, self.width = weight.shape
        if native.find("linear", weight.dtype) is not None and self.width % 2 == 0:
            self.panels = pack_weight(weight.detach(), buffer)
        elif torch.ops.mkldnn._is_mkldnn_bf16_supported():
            self.ordered = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)

    def __call__(self, x: Tensor) -> Tensor:
        context = self.context
        batch = context.batch
        if batch is None:
            self.input = x
            return self.original(x)
        self.tokens = x.numel() // x.shape[-1]
        # The output layer sees only the tokens whose logits are wanted.
        own = batch if batch.mixture is None or self.tokens == batch.row.shape[0] else batch.head
        if self.group is not None and x.dtype == torch.bfloat16:
            return self.group.output(self.number, x, own)
        y: Tensor
        if self.ordered is not None:
            y = torch.ops.mkldnn._linear_pointwise(x, self.ordered, self.bias, "none", [], "")
        else:
            y = self.original(x)
        if own.mixture is not None and own.mixture.touched[self.number]:
            adapt(own, self.number, x.view(-1, x.shape[-1]), y.view(-1, y.shape[-1]), context.compiled)
        return y


class _Layer(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("weight", "bias", "width", "out", "number")]


class Group:
    """Packed layers that read the same input, computed by the first that is asked for."""

    def __init__(self, layers: list[LinearForward]) -> None:
        self.numbers, self.outs = [layer.number for layer in layers], [layer.out for layer in layers]
        self.width = sum(self.outs)
        self.tensors = [(layer.panels, layer.bias) for layer in layers]  # must live as long as their addresses
        addresses = ([0 if tensor is None else tensor.data_ptr() for tensor in pair] for pair in self.tensors)
        self.layers = (_Layer * len(layers))(
            *(_Layer(*own, one.width, one.out, one.number) for own, one in zip(addresses, layers, strict=True))
        )
        self.address = ctypes.addressof(self.layers)
        function = native.find("linear", torch.bfloat16)
        assert function is not None
        self.function = function
        self.input: Tensor | None = None
        self.outputs: dict[int, Tensor] = {}

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
        x = x if x.stride(1) == 1 else x.contiguous()
        tokens = x.shape[0]
        block = x.new_empty(tokens * self.width)
        mixture = batch.mixture
        if mixture is not None and any(mixture.touched[number] for number in self.numbers):
            order, begins = batch.tiles_of_adapters
            # fmt: off
            adapters = (
                mixture.parts.data_ptr(), mixture.parts.shape[1], batch.row.data_ptr(), mixture.starts.data_ptr(),
                mixture.weights.data_ptr(), order.data_ptr(), begins.data_ptr(), begins.shape[0] - 1,
            )
            # fmt: on
        else:
            adapters = (0, 0, 0, 0, 0, 0, 0, 0)
        self.function(self.address, len(self.outs), x.data_ptr(), x.stride(0), tokens, block.data_ptr(), *adapters)
        return block


def join(layers: Iterable[LinearForward]) -> None:
    """Make groups of the packed layers that were given the very same input in the last forward outside of a step."""
    groups: dict[int, list[LinearForward]] = {}
    for forward in layers:
        if forward.panels is not None:
            alone = forward.input is None  # an expert that saw nothing
            groups.setdefault(-forward.number - 1 if alone else id(forward.input), []).append(forward)
    for members in groups.values():
        group = Group(members)
        for forward in members:
            forward.group = group
    for forward in layers:
        forward.input = None
