"""FourierFT: a few trained numbers at random places of a spectrum, whose inverse transform is the change.

    ΔW = scale · Re(ifft2(F))          F (out, in) is zero but for `n_frequency` trained entries c at fixed random places

The places come from a seed (the same for every layer of a shape) and are in no file. c starts at N(0, 1) as in the paper, so a
new adapter does change the model, by scale · √n / (out · in) per weight; `start_zero` starts at the base model, and trains
as well, since ΔW is linear in c. ΔW is dense and costs a matrix of W's size per call, and one transform.
Gao et al. 2024, arXiv 2405.03003.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from lorakit.core.delta import Card, Delta, Method, Pool, Shape
from lorakit.core.options import option
from lorakit.errors import LorakitError


@dataclass(frozen=True, kw_only=True)
class Frequencies(Method):
    """The options of a few trained coefficients at random places."""

    n_frequency: int
    scale: float
    seed: int = option(777, "what the places of the trained entries are drawn from", peft="random_loc_seed")

    def check(self, shape: Shape, path: str) -> None:
        if self.n_frequency > shape.out * shape.in_:
            raise LorakitError(
                f"attach: n_frequency {self.n_frequency} is above the {shape.out * shape.in_} places in the spectrum of {path} "
                f"({shape.out} × {shape.in_}). Give {shape.out * shape.in_} or less, or leave the layer out."
            )


@dataclass(frozen=True, kw_only=True)
class FourierFT(Frequencies):
    """The options of FourierFT."""

    name = "fourierft"
    card = Card(
        title="FourierFT",
        formula="ΔW = scale · Re(ifft2(F)), F sparse at fixed places",
        parameters=lambda shape, spec: spec.n_frequency,
        paper="arXiv 2405.03003",
        use="When an adapter may hold a thousand numbers per matrix, whatever the matrix's size.",
        limits="n_frequency is at most out · in",
        identity=False,
    )

    n_frequency: int = option(
        1000, "how many entries of the spectrum train", minimum=1, peft="n_frequency", pattern="n_frequency_pattern"
    )
    scale: float = option(
        150.0,
        "factor of the inverse transform; 100 to 300 in the paper",
        allows=bool,
        shown="a finite number other than 0",
        peft="scaling",
    )
    start_zero: bool = option(False, "start at zero instead of N(0, 1)", peft="init_weights")


class Coefficients(Delta):
    """c of one matrix (n_frequency,); its places follow from seed and shape. A member says in `changed` what they stand for."""

    spec: Frequencies

    def __init__(self, spec: Frequencies, shape: Shape, pool: Pool) -> None:
        super().__init__(spec, shape, pool)
        generator = torch.Generator().manual_seed(spec.seed)
        places = torch.randperm(shape.out * shape.in_, generator=generator)[: spec.n_frequency].clone()
        self.register_buffer("places", places, persistent=False)
        self.c = nn.Parameter(torch.zeros(spec.n_frequency))

    @abstractmethod
    def changed(self, F: Tensor) -> Tensor:
        """ΔW / scale (out, in) for the coefficients (out, in), in float32 or better."""

    def dense(self, W: Tensor) -> Tensor:
        size = self.shape.out, self.shape.in_
        c = self.c.to(torch.promote_types(self.c.dtype, torch.float32))  # there is no transform in half precision
        F = c.new_zeros(size[0] * size[1]).index_copy(0, cast(Tensor, self.places), c)
        return self.changed(F.view(size)) * self.spec.scale


class FourierFTDelta(Coefficients, of=FourierFT):
    """c, N(0, 1) at the start unless that is zero."""

    def __init__(self, spec: FourierFT, shape: Shape, pool: Pool) -> None:
        super().__init__(spec, shape, pool)
        if not spec.start_zero:
            nn.init.normal_(self.c)

    def changed(self, F: Tensor) -> Tensor:
        change: Tensor = torch.fft.ifft2(F).real
        return change
