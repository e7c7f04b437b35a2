"""How an adapter's parameters are optimised. Knows parameters and their roles, never methods.

`parameter_groups` splits by role (LoRA+), `build_optimizer` makes any optimiser by name, `correct_gradients` is LoRA-FA's
correction; `state.py` lets moments follow ranks that change.
"""

from __future__ import annotations

from lorakit.optim.correction import correct_gradients, corrections_of
from lorakit.optim.galore import GaLore
from lorakit.optim.groups import parameter_groups
from lorakit.optim.muon import Muon
from lorakit.optim.optimisers import build_optimizer

__all__ = ["GaLore", "Muon", "build_optimizer", "correct_gradients", "corrections_of", "parameter_groups"]
