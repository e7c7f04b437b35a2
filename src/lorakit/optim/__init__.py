"""How an adapter's parameters are optimised. Knows parameters and their roles, never methods.

`parameter_groups` splits by role (LoRA+) and pattern, `build_optimizer` makes any optimiser by name and `build_scheduler` any
schedule of its rates, `correct_gradients` is LoRA-FA's correction, `average.py` the weights that are used where they are not
those that are stepped; `state.py` lets moments follow ranks that change.
"""

from __future__ import annotations

from lorakit.optim.correction import correct_gradients, corrections_of
from lorakit.optim.galore import GaLore
from lorakit.optim.groups import parameter_groups
from lorakit.optim.muon import Muon
from lorakit.optim.optimisers import build_optimizer
from lorakit.optim.scheduler import build_scheduler

__all__ = [
    "GaLore",
    "Muon",
    "build_optimizer",
    "build_scheduler",
    "correct_gradients",
    "corrections_of",
    "parameter_groups",
]
