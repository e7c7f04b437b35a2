"""Parameter groups for an optimiser: LoRA+'s faster B, and no weight decay where it would pull to the wrong place.

LoRA+ (Hayou et al. 2024, arXiv 2402.12354): the factor that starts at zero learns `ratio` times faster than the random
one. For an embedding the zero factor is A, so the roles swap. Weight decay shrinks ΔW towards 0; one-dimensional tensors
(magnitudes, gates, biases) and whole modules' biases are left out of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from lorakit.core.walking import value_for
from lorakit.errors import LorakitError, unknown


def parameter_groups(
    parameters: Iterable[tuple[str, nn.Parameter]],
    roles: Mapping[str, str],
    learning_rate: float,
    weight_decay: float = 0.0,
    ratio: float = 1.0,
    rates: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """Every trainable parameter in exactly one group, each group with its own `lr` and `weight_decay`.

    Args:
        parameters: (name, parameter), e.g. `adapter.named_parameters()`; frozen ones are left out.
        roles: name -> role, e.g. `adapter.roles()`.
        learning_rate: the rate of every tensor but the zero-started factors.
        weight_decay: for tensors of two or more dimensions.
        ratio: LoRA+'s λ, the rate of the zero-started factor over `learning_rate`; 1 is the plain optimiser.
        rates: other learning rates by pattern, which ends the path of a layer, of a module around it, or the name of a
            tensor: `{"embed_tokens": 1e-5, "layers.0": 1e-4, "B": 1e-3}`. The nearest to the tensor counts, then the first.

    Raises:
        LorakitError: nothing trains, the ratio is below 1, or a pattern matches nothing that trains.
    """
    if ratio < 1.0:
        raise LorakitError(f"optimiser: loraplus ratio was given as {ratio}; it is at least 1 (the paper suggests 16).")
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    parameters, own = list(parameters), dict(rates or {})
    for pattern in own:
        names = [name for name, parameter in parameters if parameter.requires_grad]
        if not any(value_for({pattern: 1}, part) for name in names for part in _around(name)):
            known = dict.fromkeys(part for name in names for part in reversed(name.split(".")) if not part.isdigit())
            raise unknown("pattern", pattern, known, where="rates, since nothing that trains matches it")
    for name, parameter in parameters:
        if not parameter.requires_grad:
            continue
        given = (value_for(own, part) for part in _around(name))
        rate = next((one for one in given if one is not None), learning_rate) * (
            ratio if roles.get(name) == "B" else 1.0
        )
        decay = weight_decay if parameter.ndim > 1 else 0.0
        group = groups.setdefault((rate, decay), {"params": [], "names": [], "lr": rate, "weight_decay": decay})
        group["params"].append(parameter)
        group["names"].append(name)
    if not groups:
        raise LorakitError("optimiser: no parameter of the adapter trains; call adapter.requires_grad_(True).")
    return list(groups.values())


def _around(name: str) -> list[str]:
    """The name of a tensor, the path of its layer, of the module around that, and so on."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(len(parts), 0, -1)]
