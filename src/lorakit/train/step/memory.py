"""How much of the forward pass is kept for the backward pass: `train.memory`.

    fast      everything that the backward pass reads
    balanced  no outcome of a norm, of a gated activation or of attention's softmax: each is one cheap pass over tensors that
              are kept anyway. No matmul of a layer runs twice.
    small     the input of every block; its forward runs again

`balanced` needs the norms and gates that `fusion.fused` has put into the model: the tensors they give say themselves how
they come again, and the graph keeps that in their place. Where nothing is fused, every second block runs again instead.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.errors import LorakitError
from lorakit.train.step import blocks, fusion

log = logging.getLogger("lorakit.train")


@contextlib.contextmanager
def recomputing(model: nn.Module, memory: str) -> Iterator[None]:
    """Keep as much as `memory` says, around forward and backward.

    Raises LorakitError for a model that has no blocks that can be computed again, where blocks are asked for.
    """
    if memory == "fast":
        yield
    elif memory == "balanced" and fusion.recomputable_parts():
        log.info("memory: balanced, so norms, gated activations and softmax are computed again in the backward pass")
        with blocks.keeping(0), fusion.recording(), torch.autograd.graph.saved_tensors_hooks(_pack, _unpack):
            yield
    else:
        with _blocks(model, memory):
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
            f"train.memory is {memory}, which recomputes blocks; {type(model).__name__} has none that can "
            "be. Use memory: fast with a smaller batch_size and more gradient_accumulation"
        )
    # Not re-entrant: a re-entrant one looks for a gradient at the block's input, and a frozen embedding gives
    # none.
    how = {"use_reentrant": False}
    enable: Any = getattr(model, "activation_checkpointing_enable", None)
    if enable is not None:
        enable(how, every_n_layers=2 if memory == "balanced" else 1)
        disable: Any = model.activation_checkpointing_disable
    else:  # an older transformers: every block or none
        enable, disable = model.gradient_checkpointing_enable, model.gradient_checkpointing_disable
        enable(how)
    which = "every second block" if memory == "balanced" else "every block"
    log.info("memory: %s, so %s is computed again in the backward pass", memory, which)
    try:
        yield
    finally:
        disable()
