"""A small model of linear layers, and adapters of one method sent through files from PEFT to lorakit and back.

Everything is float32, which is what PEFT computes these methods in; both sides do the same sums in another order, so that
logits near 1 agree to a few hundred units in the last place.
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lorakit as lk
from lorakit.core.delta import Method

TARGETS = ["first", "second", "third"]
BOUND = 2**9 * torch.finfo(torch.float32).eps


class Net(nn.Module):
    """Three layers of different shapes, the first one transposed on request, one that nobody adapts."""

    def __init__(self, transposed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first: nn.Module = Conv1D(12, 8) if transposed else nn.Linear(8, 12)
        self.second = nn.Linear(12, 16)
        self.third = nn.Linear(16, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.first, self.second, self.third):
            x = torch.tanh(layer(x))
        return self.head(x)


def inputs() -> Tensor:
    return torch.randn(5, 8, generator=torch.Generator().manual_seed(1))


def scramble(parameters: Any) -> None:
    """Random values, none of them zero, large enough to show in the logits."""
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(torch.randn_like(parameter) * 0.5)


def from_peft(config: Any, folder: Path, transposed: bool = False) -> tuple[nn.Module, lk.Adapter]:
    """Train nothing, but scramble, in PEFT; save; load here and compare. Returns the model and the adapter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(Net(transposed), copy.deepcopy(config)).eval()
        scramble(p for p in theirs.parameters() if p.requires_grad)
        theirs.save_pretrained(folder)
    model = Net(transposed).eval()
    adapter = lk.load(model, folder, name="one")
    with torch.no_grad(), lk.use(model, "one"):
        expected, found = theirs(inputs()), model(inputs())
    assert (expected - Net(transposed)(inputs())).abs().max() > 1e-3, "the adapter does nothing"
    assert (found - expected).abs().max() < BOUND
    return model, adapter


def to_peft(spec: Method, folder: Path, transposed: bool = False, **options: Any) -> list[str]:
    """Scramble here, save, load in PEFT and compare; `options` are `attach`'s. Returns what PEFT warned of."""
    model = Net(transposed).eval()
    adapter = lk.attach(model, spec, name="one", target_modules=TARGETS, **options)
    scramble(p for p in adapter.parameters() if p.requires_grad)
    adapter.save(folder)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        theirs = peft.PeftModel.from_pretrained(Net(transposed), str(folder)).eval()
    with torch.no_grad():
        expected, found = model(inputs()), theirs(inputs())
    assert (expected - Net(transposed)(inputs())).abs().max() > 1e-3, "the adapter does nothing"
    assert (found - expected).abs().max() < BOUND
    return [str(warning.message) for warning in caught if "adapter keys" in str(warning.message)]
