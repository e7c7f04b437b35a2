"""BitFit: only biases move; its relation to bias="all"; layers without a bias."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import lorakit as lk
from lorakit.errors import LorakitError
from reference.models import MODELS, assert_same, logits, scramble


def test_formula() -> None:
    """A shift that does not depend on the input, and merges into the bias alone."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4)).double()
    x = torch.randn(5, 6, dtype=torch.float64)
    before, W = model(x), model[0].weight.detach().clone()
    adapter = lk.attach(model, lk.BitFit(), target_modules=["0"])
    assert adapter.num_parameters() == 4
    assert set(adapter.roles().values()) == {"bias"}
    scramble(adapter.named_parameters())
    (c,) = adapter.parameters()
    torch.testing.assert_close(model(x) - before, c.expand(5, 4))
    y = model(x)
    lk.merge(model, "default")
    torch.testing.assert_close(model(x), y)
    assert torch.equal(model[0].weight, W)


def test_all_biases_of_the_model(tmp_path: Path) -> None:
    """The paper's BitFit, layer norms included: the count is that of all biases, and nothing else trains or moves."""
    model = MODELS["bert"]()
    biases = sum(p.numel() for name, p in model.named_parameters() if name.endswith("bias"))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    start = logits(model, "bert")
    adapter = lk.attach(model, lk.BitFit(), name="a", target_modules=[], bias="all")
    assert adapter.num_parameters(trainable=True) == biases
    assert_same(logits(model, "bert"), start)
    scramble(adapter.named_parameters())
    y = logits(model, "bert")
    adapter.save(tmp_path)
    lk.merge(model, "a")
    assert_same(logits(model, "bert"), y)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != name.endswith("bias"), name
    fresh = MODELS["bert"]()
    lk.load(fresh, tmp_path, name="a")
    with lk.use(fresh, "a"):
        assert_same(logits(fresh, "bert"), y)


def test_a_layer_without_a_bias_is_refused() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 6, bias=False))
    with pytest.raises(LorakitError, match=r"bitfit trains biases, and 1 has none.*exclude_modules"):
        lk.attach(model, lk.BitFit(), target_modules=["0", "1"])
    assert not hasattr(model, "_lorakit")
    lk.attach(model, lk.BitFit(), target_modules=["0"])
