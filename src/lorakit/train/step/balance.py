"""The balance of a model's own routers, where its configuration asks for it in the loss (`output_router_logits`).

transformers adds it to the loss that it computes from labels. lorakit computes the loss from hidden states, so the
balance is noted beside it, by the model's own function and coefficient, and the trainer adds it as it adds what adapters
note (`core.using.noted`). It is no part of an evaluation's loss.
"""

from __future__ import annotations

import functools
import sys
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.core.state import found_state


def is_balanced(model: Any) -> bool:
    """Whether the model's configuration asks for the balance of its routers, and a loss is being noted just now."""
    state = found_state(model)
    asked = getattr(_text(model), "output_router_logits", False)
    return bool(asked) and state is not None and state.notes.losses is not None


def note_balance(model: nn.Module, outputs: Any, counts: Tensor | None = None) -> None:
    """Note the balance of one call, times the configuration's coefficient.

    Args:
        model: a causal model with adapters.
        outputs: what it gave, or, with `counts`, what its decoder gave for a packed batch.
        counts: `[1, tokens]`, how often each token of the packed batch counts. Rows before them (a trained prompt) do not.
    """
    state = found_state(model)
    if state is None or state.notes.losses is None or not is_balanced(model):
        return
    coefficient, of_logits = _own(model, "router_aux_loss_coef", "aux_loss_coef"), _function(model)
    logits: tuple[Tensor, ...] = getattr(outputs, "router_logits", None) or ()
    if counts is None:
        balance = getattr(outputs, "aux_loss", None)
    elif not logits or of_logits is None:  # a model that shows its routers' logits and adds nothing for them
        return
    else:
        flat = counts.reshape(1, -1)
        mask = F.pad(flat, (logits[0].shape[0] - flat.shape[1], 0))
        balance = of_logits(logits, _own(model, "num_experts"), _own(model, "num_experts_per_tok"), mask)
    if coefficient is None:
        return
    if isinstance(balance, Tensor):
        state.notes.losses.append(functools.partial(balance.mul, float(coefficient)))


def _text(model: Any) -> Any:
    config = getattr(model, "config", None)
    return None if config is None else config.get_text_config()


def _own(model: Any, *names: str) -> Any:
    """What the model says under one of these names, else its configuration."""
    held = (getattr(owner, name, None) for owner in (model, _text(model)) for name in names)
    return next((value for value in held if value is not None), None)


def _function(model: nn.Module) -> Any:
    """The function that the model's own forward calls: that of the module that its class is written in."""
    return cast(Any, getattr(sys.modules[type(model).__module__], "load_balancing_loss_func", None))
