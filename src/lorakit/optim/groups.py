"""Parameter groups for an optimiser: LoRA+'s faster B, and no weight decay where it would pull to the wrong place.

LoRA+ (Hayou et al. 2024, arXiv 2402.12354): the factor that starts at zero learns `ratio` times faster than the random
one. For an embedding the zero factor is A, so the roles swap. Weight decay shrinks ΔW towards 0; one-dimensional tensors
(magnitudes, gates, biases) and whole modules' biases are left out of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from lorakit.errors import LorakitError


def parameter_groups(
    parameters: Iterable[tuple[str, nn.Parameter]],
    roles: Mapping[str, str],
    learning_rate: float,
    weight_decay: float = 0.0,
    ratio: float = 1.0,
) -> list[dict[str, Any]]:
    """Every trainable parameter in exactly one group, each group with its own `lr` and `weight_decay`.

    Args:
        parameters: (name, parameter), e.g. `adapter.named_parameters()`; frozen ones are left out.
        roles: name -> role, e.g. `adapter.roles()`.
        learning_rate: the rate of every tensor but the zero-started factors.
        weight_decay: for tensors of two or more dimensions.
        ratio: LoRA+'s λ, the rate of the zero-started factor over `learning_rate`; 1 is the plain optimiser.

    Raises:
        LorakitError: nothing trains, or the ratio is below 1.
    """
    if ratio < 1.0:
        raise LorakitError(f"optimiser: loraplus ratio was given as {ratio}; it is at least 1 (the paper suggests 16).")
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in parameters:
        if not parameter.requires_grad:
            continue
        rate = learning_rate * (ratio if roles.get(name) == "B" else 1.0)
        decay = weight_decay if parameter.ndim > 1 else 0.0
        group = groups.setdefault((rate, decay), {"params": [], "names": [], "lr": rate, "weight_decay": decay})
        group["params"].append(parameter)
        group["names"].append(name)
    if not groups:
        raise LorakitError("optimiser: no parameter of the adapter trains; call adapter.requires_grad_(True).")
    return list(groups.values())
