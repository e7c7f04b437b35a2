"""The adapters' product in a step: `y += Σ weight (gain · y + bias + B A x)`, each token with its own adapters.

It is the gated product of `core/kernel.py`, whose gate is 1 for a token's own adapters and 0 for all others. Compiled loops
read each token's factors where they lie (no gather, no padding to the largest rank); long runs of one adapter, and all
runs where nothing is compiled, are two matmuls each.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from lorakit.serve.model import native
from lorakit.serve.model.batch import Batch, Mixture
from lorakit.serve.model.packed import LayerTensors


def adapt(batch: Batch, layer: int, x: Tensor, y: Tensor, compiled: bool, only_long: bool = False) -> None:
    """Add to a layer's output `y` (tokens, out), in place, what the adapters of the present step make of `x` (tokens, in);
    with `only_long`, those of long runs."""
    mixture = batch.mixture
    assert mixture is not None
    if batch.kernels:
        from lorakit.native.triton import adapters

        on = batch.on_gpu
        assert on.parts is not None
        assert on.weights is not None
        given = (on.parts[layer], on.starts, on.weights, on.row, on.order, on.begins)
        adapters.adapt(x, y, *given, mixture.slots, mixture.rank)
        return
    function = native.find("adapt", x.dtype) if compiled else None
    if function is None:
        _by_matmuls(batch, mixture, layer, x, y, range(len(batch.spans)))
        return
    if batch.long:
        _by_matmuls(batch, mixture, layer, x, y, batch.long)
    if only_long:
        return
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
        tensors = adapter.layers.get(layer)
        first, count = batch.spans[run]
        if run in runs and tensors is not None and count:
            part = slice(first, first + count)
            change = change_of(tensors, x[part], y[part]) * weight
            changes[run] = changes[run] + change if run in changes else change
    for run, change in changes.items():
        first, count = batch.spans[run]
        y[first : first + count] += change.to(y.dtype)


def change_of(tensors: LayerTensors, x: Tensor, y: Tensor) -> Tensor:
    """`gain · y + bias + B A x` for tokens x (tokens, in) whose base output is y (tokens, out)."""
    A, B, gain, bias = tensors
    total = torch.zeros((), dtype=y.dtype, device=y.device)
    if B is not None:
        total = total + (x if A is None else x @ A.T) @ B
    if gain is not None:
        total = total + gain * y
    return total if bias is None else total + bias
