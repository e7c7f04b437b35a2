"""GaLore under the names of the package galore_torch: `from lorakit.optim.galore_torch import GaLoreAdamW`.

A parameter group with a rank is projected, one without is not; the groups' own names of options are galore_torch's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch

from lorakit.optim.galore import GaLore

_NAMES = {"update_proj_gap": "interval", "proj_type": "side"}
_WHOLE = 2**31
"""A rank above every side: nothing is projected."""


def _galore(inner: Callable[..., torch.optim.Optimizer], params: Iterable[Any], lr: float, **options: Any) -> GaLore:
    given = list(params)
    groups = [dict(one) if isinstance(one, dict) else {"params": [one]} for one in given]
    named = [{_NAMES.get(key, key): value for key, value in {"rank": _WHOLE, **one}.items()} for one in groups]
    return GaLore(named, lr=lr, inner=inner, **options)


def GaLoreAdamW(
    params: Iterable[Any],
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    no_deprecation_warning: bool = True,
) -> GaLore:
    """AdamW whose state is in a projected space for groups with a rank."""
    return _galore(torch.optim.AdamW, params, lr, betas=betas, eps=eps, weight_decay=weight_decay)


def GaLoreAdamW8bit(params: Iterable[Any], lr: float = 1e-3, weight_decay: float = 0.01, **options: Any) -> GaLore:
    """The same with bitsandbytes' 8-bit moments."""
    import bitsandbytes

    inner: Any = bitsandbytes.optim

    return _galore(inner.AdamW8bit, params, lr, weight_decay=weight_decay, **options)


def GaLoreAdafactor(params: Iterable[Any], lr: float | None = None, **options: Any) -> GaLore:
    """The same with transformers' Adafactor at a fixed rate."""
    from transformers.optimization import Adafactor

    fixed = partial(Adafactor, relative_step=False, scale_parameter=False)
    return _galore(fixed, params, 1e-3 if lr is None else lr, **options)
