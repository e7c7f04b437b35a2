"""One call of one matrix of a layer, as its deltas see it (`delta.Call`).

Deltas see `W x` without the bias. Dtypes are cast here and in `layer.py`, and nowhere else: adapter tensors are kept in
float32 or better and computed with in the dtype of the activations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.core.kernel import autocast, gained, product
from lorakit.core.layout import Rows, Site
from lorakit.core.storage import storage_of, value_of


class LayerCall:
    """One call of one site, as its deltas see it (`delta.Call`)."""

    def __init__(
        self, layer: nn.Module, site: Site, x: Tensor, output: Tensor | None, stored: Tensor | None = None
    ) -> None:
        """`output`: what the frozen layer gave; `stored`: its weight, where the layer holds another one just now."""
        self.layer, self.site, self.x, self.output, self.stored = layer, site, autocast(x), output, stored

    def _cast(self, tensor: Tensor) -> Tensor:
        dtype = self.x.dtype if self.x.is_floating_point() else self.dtype
        return tensor.to(dtype)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype to compute in."""
        if self.x.is_floating_point():
            return self.x.dtype
        return self.output.dtype if self.output is not None else self.W.dtype

    @property
    def W(self) -> Tensor:
        stored = self.stored
        if stored is None:
            stored = storage_of(self.layer, self.site.weight).read(self.layer, self.site.weight)
        return self.site.layout.matrix(stored)

    @property
    def y(self) -> Tensor:
        if self.output is None:
            return self.linear(self.W)
        y = self.output
        if self.site.bias is None:
            return y
        bias = cast(Tensor, value_of(self.layer, self.site.bias)).to(y.dtype)
        layout = self.site.layout
        if isinstance(layout, Rows):
            return y - bias
        return y - layout.features(bias, y)

    def linear(self, M: Tensor) -> Tensor:
        return self.site.layout.linear(self.layer, self.x, self._cast(M))

    def through(self, f: Callable[[Tensor], Tensor], M: Callable[[], Tensor]) -> Tensor:
        y = self.site.layout.through(self.x, f)
        return self.linear(M()) if y is None else y

    def some(self, D: Tensor, index: Tensor) -> Tensor:
        return self.site.layout.some(self.layer, self.x, self._cast(D), index)

    def product(
        self,
        B: Tensor,
        A: Tensor,
        gate: Tensor | None = None,
        scale: float = 1.0,
        dropout: float = 0.0,
    ) -> Tensor:
        layout, x = self.site.layout, self.x
        if gate is not None:
            gate = self._cast(gate)
        if layout.flat:
            return product(x, B, A, gate, scale, dropout)
        B, A = self._cast(B), self._cast(A)
        if dropout and x.is_floating_point():
            x = F.dropout(x, dropout)
        h = layout.down(self.layer, x, A) * scale
        return layout.up(self.layer, h if gate is None else h * gate, B)

    @property
    def leading(self) -> torch.Size:
        return self.x.shape[:-1] if self.x.is_floating_point() else self.x.shape

    def down(self, A: Tensor) -> Tensor:
        x = self.x
        precise = torch.promote_types(self.dtype, torch.float32)
        x = x.to(precise) if x.is_floating_point() else x
        return self.site.layout.down(self.layer, x, A.to(precise))

    def whole(
        self,
        B: Tensor,
        A: Tensor,
        gate: Tensor | None = None,
        scale: float = 1.0,
        dropout: float = 0.0,
    ) -> Tensor:
        W = self.site.layout.matrix(cast(Tensor, self.layer.weight))
        return product(
            self.x,
            B,
            A,
            None if gate is None else self._cast(gate),
            scale,
            dropout,
            W=self._cast(W),
        )

    def gain(self, y: Tensor, g: Tensor) -> Tensor:
        if self.site.layout.flat and y.is_floating_point():
            return gained(y, g)
        return y * self.site.layout.features(g.to(y.dtype), y)
