"""Gradient checkpointing: how many activations are kept for the backward pass (`train.memory`), and which are recomputed.

    fast      everything is kept
    balanced  the outputs of norms, gated activations and attention's softmax are recomputed: cheap elementwise operations on
              tensors that are kept anyway. No matmul of a layer runs twice.
    small     only the input of every block is kept; its forward runs again (full gradient checkpointing)
    offload   everything is kept, in the host's memory; what `balanced` recomputes is recomputed. For a GPU

`balanced` needs the norms and gates that `fusion.fused` has put into the model: the tensors they give carry their
recomputation, which the graph keeps in their place. Where nothing is fused, every second block runs again instead.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.errors import LorakitError
from lorakit.train.step import batched_attention, fusion

log = logging.getLogger("lorakit.train")


@contextlib.contextmanager
def recomputing(model: nn.Module, memory: str) -> Iterator[None]:
    """Keep the activations that `memory` says, around forward and backward.

    Raises LorakitError for a model that does not support gradient checkpointing, where that is needed.
    """
    if memory == "fast":
        yield
    elif memory == "offload":
        device = next(model.parameters()).device
        if device.type == "cpu":
            raise LorakitError(
                "train.memory: offload moves activations from a GPU to the host, and the model is on the host. Use small"
            )
        log.info("activations are kept in the host's memory (train.memory: offload)")
        with batched_attention.keeping(0), fusion.recording(), offloading(model):
            yield
    elif memory == "balanced" and fusion.recomputable_parts():
        log.info("gradient checkpointing: norms, gated activations and softmax are recomputed (train.memory: balanced)")
        with batched_attention.keeping(0), fusion.recording(), torch.autograd.graph.saved_tensors_hooks(_pack, _unpack):
            yield
    else:
        with _blocks(model, memory):
            yield


LEAST = 1 << 16
"""Tensors of fewer numbers stay where they are: copying them takes longer than they are worth."""


@dataclass(frozen=True)
class _Away:
    """A tensor in the host's memory, and the device that it came from."""

    tensor: Tensor
    device: torch.device


@contextlib.contextmanager
def offloading(model: nn.Module, least: int = LEAST) -> Iterator[None]:
    """Within, what the graph keeps lies in the host's memory, copied back when the backward pass asks for it. Weights, what is
    recomputed and small tensors stay. Copies are queued behind the work that they belong to, so that none waits."""
    weights = {one.untyped_storage().data_ptr() for one in (*model.parameters(), *model.buffers())}
    away: dict[int, tuple[weakref.ref[Tensor], int, _Away]] = {}  # a tensor that several functions keep is copied once

    def pack(tensor: Tensor) -> Any:
        storage = tensor.untyped_storage()
        stays = tensor.numel() < least or storage.nbytes() < tensor.nbytes or storage.data_ptr() in weights
        if (again := fusion.recomputation(tensor)) is not None or stays:
            return again or tensor
        key = id(tensor)
        known = away.get(key)
        if known is not None and known[0]() is tensor and known[1] == tensor._version:
            return known[2]
        host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda).copy_(tensor, non_blocking=True)
        kept = _Away(host, tensor.device)
        away[key] = weakref.ref(tensor, lambda _: away.pop(key, None)), tensor._version, kept
        return kept

    def unpack(kept: Any) -> Tensor:
        return kept.tensor.to(kept.device, non_blocking=True) if isinstance(kept, _Away) else _unpack(kept)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def _pack(tensor: Tensor) -> Any:
    return fusion.recomputation(tensor) or tensor


def _unpack(kept: Any) -> Tensor:
    tensor: Tensor = kept if isinstance(kept, Tensor) else kept()
    return tensor


@contextlib.contextmanager
def _blocks(model: nn.Module, memory: str) -> Iterator[None]:
    """Whole blocks run again: each, or every second one."""
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise LorakitError(
            f"train.memory: {memory} needs gradient checkpointing, which {type(model).__name__} does not support. "
            "Use memory: fast with a smaller batch_size and more gradient_accumulation"
        )
    # Not re-entrant: a re-entrant one looks for a gradient at the block's input, and a frozen embedding gives none.
    how = {"use_reentrant": False}
    enable: Any = getattr(model, "activation_checkpointing_enable", None)
    if enable is not None:
        enable(how, every_n_layers=2 if memory == "balanced" else 1)
        disable: Any = model.activation_checkpointing_disable
    else:  # an older transformers: every block or none
        enable, disable = model.gradient_checkpointing_enable, model.gradient_checkpointing_disable
        enable(how)
    which = "every second block" if memory == "balanced" else "every block"
    log.info("gradient checkpointing: %s is recomputed in the backward pass (train.memory: %s)", which, memory)
    try:
        yield
    finally:
        disable()
