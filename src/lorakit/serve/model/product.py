"""The adapters' product in a step: `y += Σ weight (gain · y + bias + B A x)`, each token with its own adapters.

It is the one gated product of `kernel.py` with the gate "whose token is this", executed in the way that suits the shape: as
compiled loops that read each token's own factors where they lie (no gather, no padding to the largest rank), or, for
long runs of one adapter and where nothing is compiled, as two matmuls per run.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from lorakit.serve.model import native
from lorakit.serve.model.batch import Batch, Mixture
from lorakit.serve.model.packed import Piece


def adapt(batch: Batch, layer: int, x: Tensor, y: Tensor, compiled: bool) -> None:
    """Add to a layer's output `y` (tokens, out), in place, what the adapters of the present step make of `x` (tokens, in)."""
    mixture = batch.mixture
    assert mixture is not None
    function = native.find("adapt", x.dtype) if compiled else None
    if function is None:
        _by_matmuls(batch, mixture, layer, x, y, range(len(batch.spans)))
        return
    if batch.long:
        _by_matmuls(batch, mixture, layer, x, y, batch.long)
    function(
        x.data_ptr(),
        x.stride(0),
        y.data_ptr(),
        y.stride(0),
        x.shape[1],
        y.shape[1],
        mixture.parts[layer].data_ptr(),
        (batch.short if batch.long else batch.row).data_ptr(),
        mixture.starts.data_ptr(),
        mixture.weights.data_ptr(),
        x.shape[0],
    )


def _by_matmuls(batch: Batch, mixture: Mixture, layer: int, x: Tensor, y: Tensor, runs: Collection[int]) -> None:
    """Two matmuls for every entry of these runs."""
    changes: dict[int, Tensor] = {}
    for run, adapter, weight in mixture.entries:
        piece = adapter.pieces.get(layer)
        first, count = batch.spans[run]
        if run in runs and piece is not None and count:
            part = slice(first, first + count)
            change = change_of(piece, x[part], y[part]) * weight
            changes[run] = changes[run] + change if run in changes else change
    for run, change in changes.items():
        first, count = batch.spans[run]
        y[first : first + count] += change.to(y.dtype)


def change_of(piece: Piece, x: Tensor, y: Tensor) -> Tensor:
    """`gain · y + bias + B A x` for tokens x (tokens, in) whose base output is y (tokens, out)."""
    total = torch.zeros((), dtype=y.dtype, device=y.device)
    if piece.B is not None:
        B, A = piece.B.to(x.device), None if piece.A is None else piece.A.to(x.device)
        total = total + (x if A is None else x @ A.T) @ B
    if piece.gain is not None:
        total = total + piece.gain.to(y.device) * y
    if piece.bias is not None:
        total = total + piece.bias.to(y.device)
    return total
