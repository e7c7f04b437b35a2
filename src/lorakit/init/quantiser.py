"""A quantiser that only rounds: what a weight would be if it were stored in few bits, as floats.

    w = c · codebook[k]      c = max |w| of the block      k = the nearest code

Blocks are runs of `block` numbers in row-major order. NF4's sixteen values are QLoRA's (arXiv 2305.14314), given as
constants: the paper's own formula does not reproduce them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@dataclass(frozen=True)
class SimulatedQuantiser:
    """Rounds a matrix to a code book with one scale per block.

    Attributes:
        codebook: the values, ascending, within -1 to 1.
        block: how many numbers share a scale.
    """

    codebook: tuple[float, ...] = NF4
    block: int = 64

    def scales(self, W: Tensor) -> Tensor:
        """The largest magnitude of each block, (blocks,)."""
        return self._blocks(W).abs().amax(1)

    def __call__(self, W: Tensor, scales: Tensor | None = None) -> Tensor:
        """`W` (out, in) rounded, in its dtype; `scales` keeps the scales of an earlier matrix."""
        blocks = self._blocks(W)
        c = (self.scales(W) if scales is None else scales)[:, None]
        codes = torch.tensor(self.codebook, device=W.device, dtype=W.dtype)
        borders = (codes[1:] + codes[:-1]) / 2
        unit = blocks / torch.where(c > 0, c, 1.0)  # a block of zeros has no scale
        rounded = codes[torch.bucketize(unit, borders)] * c
        return rounded.flatten()[: W.numel()].reshape(W.shape)

    def _blocks(self, W: Tensor) -> Tensor:
        flat = W.flatten()
        return torch.nn.functional.pad(flat, (0, -flat.numel() % self.block)).reshape(-1, self.block)


QUANTISERS = {"nf4": SimulatedQuantiser(NF4)}
"""Quantisers by name."""
