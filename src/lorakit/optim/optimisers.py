"""An optimiser by name over parameter groups: every class of torch.optim, those that torch lacks, and any of a package.

adamw, SGD, torch.optim.RAdam, ...     a class of torch.optim, in any case
adamw-schedule-free                    Defazio et al. 2024, arXiv 2405.15682, by its authors' package schedulefree
prodigy                                finds its own rate: Mishchenko and Defazio 2023, arXiv 2306.06101, by prodigyopt
lion, came                             arXiv 2302.06675 and 2307.02047, by pytorch-optimizer
some.module:Class                      an optimiser of any package that is installed
muon                                   matrices by torch.optim.Muon, the rest by AdamW (`muon.py`)
galore, galore-8bit                    matrices in a projected space (`galore.py`)
adamw-8bit                             bitsandbytes' AdamW with 8-bit moments
paged-adamw, paged-adamw-8bit          the same with moments that a GPU short of memory moves to the host's
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

from lorakit.errors import LorakitError, unknown
from lorakit.optim.galore import GaLore
from lorakit.optim.muon import Muon

Groups = list[dict[str, Any]]

LIBRARIES = {
    "adamw-schedule-free": ("schedulefree:AdamWScheduleFree", "schedulefree"),
    "prodigy": ("prodigyopt:Prodigy", "prodigyopt"),
    "lion": ("pytorch_optimizer:Lion", "pytorch-optimizer"),
    "came": ("pytorch_optimizer:CAME", "pytorch-optimizer"),
}
"""Optimisers of other packages by lorakit's names: where the class is, and what pip calls the package."""


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
    torchs = {key.lower(): value for key, value in optimizers_of(torch.optim).items()}
    key = name.lower().removeprefix("torch.optim.")
    if key != name.lower():
        own = {}
    made: Any
    if ":" in name or (own and key in LIBRARIES):
        made = _imported(name, *LIBRARIES.get(key, (name, name.partition(":")[0].partition(".")[0])))
    elif key in own or key in torchs:
        made = own.get(key) or torchs[key]
    else:
        # Without Adam, which is nearest to many a misspelt AdamW and never meant.
        others = sorted(value.__name__ for word, value in torchs.items() if word not in ("adam", "adamw"))
        raise unknown("optimizer", name, ["adamw", *own, *LIBRARIES, *others, "some.module:Class"])
    if isinstance(made, type) and issubclass(made, torch.optim.LBFGS):
        raise LorakitError(
            f"optimizer {name}: LBFGS asks for the loss several times a step, which a run over batches cannot give; use adamw."
        )
    if made in (torch.optim.AdamW, torch.optim.Adam) and not {"fused", "foreach", "capturable"} & set(options):
        # One kernel over all tensors: an adapter has hundreds of small ones, and the loop over them costs more.
        options = {"fused": True, **options}
    try:
        optimizer: torch.optim.Optimizer = made(groups, **options)
        return optimizer
    except (TypeError, ValueError, AssertionError, NotImplementedError) as problem:
        if isinstance(problem, LorakitError):
            raise
        raise LorakitError(f"optimizer {name}: it refuses its options {options or ''}: {problem}") from None


def optimizers_of(module: Any) -> dict[str, type[torch.optim.Optimizer]]:
    """The optimisers that a module offers, by the names of their classes."""
    return {
        key: value
        for key, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer) and value is not torch.optim.Optimizer
    }


def _imported(name: str, place: str, package: str) -> type[torch.optim.Optimizer]:
    """The optimiser at `some.module:Class`."""
    where, _, kind = place.partition(":")
    try:
        module = importlib.import_module(where)
    except (ImportError, ValueError) as problem:
        raise LorakitError(
            f"optimizer {name}: the module {where} cannot be imported ({problem}). `pip install {package}`, or use adamw."
        ) from None
    found = getattr(module, kind, None)
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        raise unknown("optimizer", kind, sorted(optimizers_of(module)), where=f"{where} (optimizer {name})")
    return found


def averages(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimiser trains other weights than those to be used, and changes between them by `train` and `eval`."""
    return callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None))


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
