"""WaveFT: a few trained numbers at random places among the wavelet coefficients of the change.

    ΔW = scale · IDWT(F)          F is zero but for `n_frequency` trained entries c at fixed random places

F holds the four quarters of one level of a two-dimensional wavelet transform. The places come from a seed, as FourierFT's; c
starts at zero. A wavelet is local: each number changes a small patch of the weight, where FourierFT's change all of it. Without
the transform ΔW = scale · F is a sparse change. The wavelets are Daubechies', db1 (Haar's) to db10; for a longer one F is
larger than W and c stands in its middle. Bilican et al. 2025, arXiv 2505.12532.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lorakit.core.delta import Card
from lorakit.core.options import option
from lorakit.methods.fourierft import Coefficients, Frequencies

LONGEST = 10


@functools.cache
def daubechies(order: int) -> tuple[float, ...]:
    """The low-pass filter of Daubechies' wavelet of this order, 2 · order numbers, by spectral factorisation: of each pair of
    roots z, 1 / z of the half-band filter the one within the unit circle."""
    h = np.ones(1, dtype=complex)
    for y in np.roots([math.comb(order - 1 + k, k) for k in reversed(range(order))]):
        middle = 1 - 2 * y
        root = np.sqrt(middle * middle - 1 + 0j)
        h = np.convolve(h, [1, -min(middle + root, middle - root, key=abs)])
    for _ in range(order):
        h = np.convolve(h, [1, 1])
    return tuple(math.sqrt(2) * h.real / h.real.sum())


def _order(wavelet: str) -> int:
    """The order of a wavelet of Daubechies; 0 for any other. The least asymmetric ones of orders 2 and 3 are the same."""
    known = {f"db{order}" for order in range(1, LONGEST + 1)} | {"sym2", "sym3"}
    return int(wavelet.removeprefix("db").removeprefix("sym")) if wavelet in known else 0


@dataclass(frozen=True, kw_only=True)
class WaveFT(Frequencies):
    """The options of WaveFT."""

    name = "waveft"
    card = Card(
        title="WaveFT",
        formula="ΔW = scale · IDWT(F), F sparse at fixed places",
        parameters=lambda shape, spec: spec.n_frequency,
        paper="arXiv 2505.12532",
        use="As FourierFT, where changes should be local.",
        limits="n_frequency is at most out · in",
    )

    n_frequency: int = option(
        2592, "how many coefficients train", minimum=1, peft="n_frequency", pattern="n_frequency_pattern"
    )
    scale: float = option(
        25.0, "factor of the transform", allows=bool, shown="a finite number other than 0", peft="scaling"
    )
    wavelet: str = option(
        "db1", f"which wavelet of Daubechies, db1 to db{LONGEST} (sym2 and sym3 are db2 and db3)",
        allows=lambda name: _order(name) > 0,
        shown=f"db1 to db{LONGEST}, sym2 or sym3; the filters of other wavelets are tables of numbers", peft="wavelet_family",
    )  # fmt: skip
    transform: bool = option(True, "transform the coefficients; else they are entries of ΔW", peft="use_idwt")


class WaveFTDelta(Coefficients, of=WaveFT):
    """c of one matrix (n_frequency,); its places follow from seed and shape."""

    spec: WaveFT

    def changed(self, spectrum: Tensor) -> Tensor:
        if not self.spec.transform:
            return spectrum
        order = _order(self.spec.wavelet)
        size = [length + 2 * (order - 1) for length in spectrum.shape]
        size = [length + length % 2 for length in size]
        before = [(whole - own) // 2 for whole, own in zip(size, spectrum.shape, strict=True)]
        after = [whole - own - start for whole, own, start in zip(size, spectrum.shape, before, strict=True)]
        whole = F.pad(spectrum, (before[1], after[1], before[0], after[0]))
        quarters = [half.chunk(2, dim=1) for half in whole.chunk(2)]
        low = whole.new_tensor(daubechies(order))
        high = low.flip(0) * low.new_tensor([1.0, -1.0]).repeat(order)
        # PEFT's horizontal details, the upper right quarter, are high along the rows' axis
        filters = [torch.outer(*pair) for pair in ((low, low), (high, low), (low, high), (high, high))]
        coefficients = torch.stack([quarter for half in quarters for quarter in half])
        image = F.conv_transpose2d(coefficients[None], torch.stack(filters)[:, None], stride=2)[0, 0]
        begin = [(have - want) // 2 for have, want in zip(image.shape, spectrum.shape, strict=True)]
        return image[begin[0] : begin[0] + spectrum.shape[0], begin[1] : begin[1] + spectrum.shape[1]]
