"""NEFTune: noise on the embeddings while training (Jain et al. 2023, arXiv 2310.05914).

    e <- e + u,    u uniform in ± alpha / √(L d)          L the tokens of the example, d the width of an embedding

L is the example's own length, as in the authors' code, so that padding or packing changes no magnitude; a prefix that several
examples share is computed once, with one noise, and counts for the longest of them. Evaluation is without noise.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.errors import LorakitError

_LENGTHS: weakref.WeakKeyDictionary[nn.Module, Tensor] = weakref.WeakKeyDictionary()
"""Models that have noise just now -> the length of the example that holds each token: `[rows, 1]` or `[1, tokens]`."""


def tell_lengths(model: nn.Module, lengths: Callable[[], Tensor]) -> None:
    """Say how long the examples of the next call are, where the model has noise."""
    if model in _LENGTHS:
        _LENGTHS[model] = lengths()


@contextmanager
def embedding_noise(model: Any, alpha: float | None) -> Iterator[None]:
    """Within the block a model in training mode has noise of this alpha on its embeddings; None: none.

    Raises:
        LorakitError: the model has no input embeddings.
    """
    if alpha is None:
        yield
        return
    try:
        embeddings: nn.Module = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        raise LorakitError(f"train.neftune: {type(model).__name__} has no token embeddings; leave it out") from None

    def add(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        if not module.training:
            return output
        lengths = _LENGTHS[model].to(output.device)
        if lengths.shape[1] < output.shape[1] and lengths.shape[1] > 1:  # rows of a trained prompt stand in front
            lengths = nn.functional.pad(lengths, (output.shape[1] - lengths.shape[1], 0), value=torch.inf)
        size = (alpha / (lengths * output.shape[-1]).sqrt())[..., None].to(output.dtype)
        return output + torch.empty_like(output).uniform_(-1, 1) * size

    _LENGTHS[model] = torch.ones(1, 1)
    handle = embeddings.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()
        del _LENGTHS[model]
