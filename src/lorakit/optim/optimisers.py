"""An optimiser by name over parameter groups: every class of torch.optim, and the few that torch lacks.

adamw, SGD, torch.optim.RAdam, ...     a class of torch.optim, in any case
muon                                   matrices by torch.optim.Muon, the rest by AdamW (`muon.py`)
galore, galore-8bit                    matrices in a projected space (`galore.py`)
adamw-8bit                             bitsandbytes' AdamW with 8-bit moments
paged-adamw, paged-adamw-8bit          the same with moments that a GPU short of memory moves to the host's
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lorakit.errors import LorakitError, unknown
from lorakit.optim.galore import GaLore
from lorakit.optim.muon import Muon

Groups = list[dict[str, Any]]


def build_optimizer(name: str, groups: Groups, **options: Any) -> torch.optim.Optimizer:
    """An optimiser over parameter groups that each have their own `lr`, as `parameter_groups` makes them.

    Args:
        name: see the module's docstring.
        groups: parameter groups.
        options: further arguments of the optimiser; `lr` for groups without one.

    Raises:
        LorakitError: no such optimiser, it refuses the options, or the library that it needs is not there.
    """
    own: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "muon": Muon,
        "galore": GaLore,
        "galore-8bit": _galore_8bit,
        "adamw-8bit": _adamw_8bit,
        "paged-adamw": _paged_adamw,
        "paged-adamw-8bit": _paged_adamw_8bit,
    }
    torchs = {
        key.lower(): value
        for key, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer) and value is not torch.optim.Optimizer
    }
    key = name.lower().removeprefix("torch.optim.")
    if key != name.lower():
        own = {}
    if key not in own and key not in torchs:
        raise unknown("optimizer", name, [*own, *sorted(value.__name__ for value in torchs.values())])
    made = own.get(key) or torchs[key]
    if made in (torch.optim.AdamW, torch.optim.Adam) and not {"fused", "foreach", "capturable"} & set(options):
        # One kernel over all tensors: an adapter has hundreds of small ones, and the loop over them costs more.
        options = {"fused": True, **options}
    try:
        return made(groups, **options)
    except (TypeError, ValueError) as problem:
        if isinstance(problem, LorakitError):
            raise
        raise LorakitError(f"optimizer {name}: it refuses its options {options or ''}: {problem}") from None


def _galore_8bit(groups: Groups, **options: Any) -> torch.optim.Optimizer:
    return GaLore(groups, inner=_bitsandbytes("galore-8bit").optim.AdamW8bit, **options)


def _adamw_8bit(groups: Groups, **options: Any) -> torch.optim.Optimizer:
    made: torch.optim.Optimizer = _bitsandbytes("adamw-8bit").optim.AdamW8bit(groups, **options)
    return made


def _paged_adamw(groups: Groups, **options: Any) -> torch.optim.Optimizer:
    _on_gpu("paged-adamw", groups, "adamw")
    made: torch.optim.Optimizer = _bitsandbytes("paged-adamw").optim.PagedAdamW32bit(groups, **options)
    return made


def _paged_adamw_8bit(groups: Groups, **options: Any) -> torch.optim.Optimizer:
    _on_gpu("paged-adamw-8bit", groups, "adamw-8bit")
    made: torch.optim.Optimizer = _bitsandbytes("paged-adamw-8bit").optim.PagedAdamW8bit(groups, **options)
    return made


def _on_gpu(name: str, groups: Groups, instead: str) -> None:
    """Pages move between a GPU's memory and the host's; on a processor there is one memory, and nothing to move."""
    devices = {parameter.device.type for group in groups for parameter in group["params"]}
    if devices != {"cuda"}:
        raise LorakitError(
            f"optimizer {name}: its moments are pages that move between a GPU's memory and the host's, and the parameters are "
            f"on {', '.join(sorted(devices))}, where there is one memory only. Use {instead}."
        )


def _bitsandbytes(name: str) -> Any:
    try:
        import bitsandbytes  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise LorakitError(
            f"optimizer {name}: its moments are held by bitsandbytes, which is not installed here. "
            f"`pip install bitsandbytes`, or use {name.removesuffix('-8bit').removeprefix('paged-')}."
        ) from None
    return bitsandbytes
