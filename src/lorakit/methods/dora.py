"""DoRA: any additive change, with the length of every output row trained apart from its direction.

    V = W + ΔW      c = ‖V‖ per row      y = (m / c) ⊙ V x + b          m starts at ‖W + ΔW₀‖, so nothing changes

The axis: the paper says "column-wise", its code and PEFT keep one magnitude per output row of W (out × in); so here.
The norm c is treated as a constant by the backward (section 4.3 of the paper). It needs no identity product and no pass
over V: with ΔW = B A, ‖V_j‖² = ‖W_j‖² + 2 B_j · (A Wᵀ)_j + B_j (A Aᵀ) B_jᵀ. Liu et al. 2024, arXiv 2402.09353.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorakit.core.combinator import Combinator, Combined, inner_option
from lorakit.core.delta import Call, Card, Form, LowRank, Method, Pool, Shape
from lorakit.methods.lora import LoRA


@dataclass(frozen=True, kw_only=True)
class DoRA(Combinator):
    """The options of DoRA."""

    name = "dora"
    card = Card(
        title="DoRA",
        formula="W' = diag(m / ‖W + ΔW‖) (W + ΔW), ΔW of another method",
        parameters=lambda shape, spec: spec.inner.card.parameters(shape, spec.inner) + shape.out,
        paper="arXiv 2402.09353",
        use="When LoRA at small rank falls short of full fine-tuning; half of LoRA's rank often does.",
        limits="Those of the inner method.",
        pooled=lambda shapes, spec: spec.inner.card.pooled(shapes, spec.inner) if spec.inner.card.pooled else 0,
    )

    inner: Method = inner_option(LoRA, "method whose change gets trained magnitudes; LoRA in the paper")


class DoRADelta(Combined, of=DoRA):
    """An inner delta and the magnitudes `m` (out,), which are set when the weight is known."""

    def __init__(self, spec: DoRA, shape: Shape, pool: Pool) -> None:
        super().__init__(spec, shape, pool)
        self.inner = spec.inner.build(shape, pool)
        self.m = nn.Parameter(torch.ones(shape.out))
        self._known: Known | None = None

    def begin(self, W: Tensor) -> None:
        super().begin(W)
        self._known = Known(W)
        with torch.no_grad():
            self.m.copy_(self.norm(W))

    def norm(self, W: Tensor) -> Tensor:
        """c: the length of every row of W + ΔW, (out,), in float32 or better."""
        precise = torch.promote_types(W.dtype, torch.float32)
        with torch.no_grad():
            if not isinstance(self.inner, LowRank):
                dense = W.to(precise) + self.inner.dense(W)
                length: Tensor = torch.linalg.vector_norm(dense, dim=1)
                return length
            B, A = self.inner.gated()
            B = (B * self.inner.scale).to(precise)
            # W meets A in W's own dtype: ΔW is small beside W, so the rounding of this term is far below that of W's.
            cross = (B * (W @ A.to(W.dtype).T)).sum(1)
            A = A.to(precise)
            squares = self._known.squares if self._known is not None and self._known.holds(W) else _squares(W)
            norm: Tensor = (squares + 2 * cross + ((B @ (A @ A.T)) * B).sum(1)).clamp_min(0).sqrt()
            return norm

    def _gain(self, W: Tensor) -> Tensor:
        return self.m / self.norm(W)

    def dense(self, W: Tensor) -> Tensor:
        W = W.to(torch.promote_types(W.dtype, self.m.dtype))
        return self._gain(W)[:, None] * (W + self.inner.dense(W)) - W

    def act(self, call: Call) -> Tensor:
        # With dropout the base part of the paper's code sees dropped inputs too; here the base always sees all of them.
        gain = self._gain(call.W)
        return call.gain(call.y, gain - 1) + call.gain(self.inner.act(call), gain)

    def output(self, call: Call) -> Tensor | None:
        y = self.inner.output(call)
        return None if y is None else call.gain(y, self._gain(call.W))

    def shift(self, b: Tensor | None, W: Callable[[], Tensor]) -> Tensor | None:
        return self.inner.shift(b, W)  # a magnitude is a row of W's, not the bias's

    def form(self, W: Tensor, b: Tensor | None) -> Form:
        inner, gain = self.inner.form(W, b), self._gain(W)
        B = None if inner.B is None else gain[:, None] * inner.B
        if inner.gain is not None:
            gain = gain * inner.gain
        # A form's gain meets `W x + b`; the magnitudes meet `W x` alone, so what they do to b is taken back.
        bias = self.shift(b, lambda: W)
        if b is not None:
            bias = b - gain * b if bias is None else bias + (b - gain * b)
        return Form(gain=gain, bias=bias, B=B, A=inner.A)


def _squares(W: Tensor) -> Tensor:
    """‖W_j‖² of every row, (out,), in float32 or better."""
    precise = torch.promote_types(W.dtype, torch.float32)
    length: Tensor = torch.linalg.vector_norm(W, dim=1, dtype=precise)
    return length.square()


class Known:
    """The squared row lengths of a frozen weight, and what tells that they are still its own.

    Address and version change with an ordinary write; the few numbers kept catch another tensor at a reused address and
    most writes that leave no trace (through `.data`).
    """

    def __init__(self, W: Tensor) -> None:
        self.squares = _squares(W)
        self.address, self.version, self.probe = W.data_ptr(), W._version, self._few(W).clone()

    @staticmethod
    def _few(W: Tensor) -> Tensor:
        return W[:: max(1, W.shape[0] // 4), :: max(1, W.shape[1] // 4)]

    def holds(self, W: Tensor) -> bool:
        """Whether `W` is that weight. Only on a CPU is asking cheaper than computing anew."""
        same = W.device.type == "cpu" and (W.data_ptr(), W._version) == (self.address, self.version)
        return same and torch.equal(self._few(W), self.probe)
