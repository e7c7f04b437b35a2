"""HiRA: the paper's formula, its rank, PEFT's files."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from torch import nn

import lorakit as lk
from lorakit.core.delta import Pool, Shape
from lorakit.errors import LorakitError
from methods.both_ways import trained_by_peft
from reference.models import MODELS, assert_same, logits, scramble, twin


def test_formula_and_rank() -> None:
    torch.manual_seed(0)
    delta = lk.HiRA(rank=2).build(Shape(14, 11), Pool()).double()
    nn.init.normal_(delta.B)
    W = torch.randn(14, 3, dtype=torch.float64) @ torch.randn(3, 11, dtype=torch.float64)
    expected = W * torch.einsum("or,ri->oi", delta.B, delta.A)
    torch.testing.assert_close(delta.dense(W), expected)
    assert torch.linalg.matrix_rank(expected) == 6, "rank(W) · rank(B A)"


def test_parameters() -> None:
    model = nn.Sequential(nn.Linear(32, 20))
    assert lk.attach(model, lk.HiRA(rank=4), target_modules=["0"]).num_parameters() == 4 * (32 + 20)


def test_rank_pattern(tmp_path: Path) -> None:
    """PEFT's HiRA looks its rank_pattern up and then makes every layer with r (dispatch_default), so its file contradicts
    its configuration: the tensors decide. Here the pattern holds."""
    base = MODELS["llama"]()
    config = peft.HiraConfig(target_modules=["q_proj", "v_proj"], r=3, rank_pattern={"v_proj": 6})
    wrapped = trained_by_peft(twin(base), config)
    wrapped.save_pretrained(str(tmp_path / "theirs"))
    found = lk.load(base, tmp_path / "theirs", name="theirs")
    assert {delta.spec.rank for _, _, delta in found.deltas()} == {3}
    with torch.no_grad():
        assert_same(logits(base, "llama"), logits(wrapped, "llama"))
    lk.detach(base)
    adapter = lk.attach(base, lk.HiRA(rank=3), target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 6})
    assert adapter.num_parameters() == 3 * (3 * (24 + 24) + 6 * (24 + 12))
    scramble(adapter.named_parameters())
    y = logits(base, "llama")
    adapter.save(tmp_path / "ours")
    lk.detach(base)
    lk.load(base, tmp_path / "ours", name="a")
    with lk.use(base, "a"):
        assert_same(logits(base, "llama"), y)


def test_refusals() -> None:
    model = nn.Sequential(nn.Linear(32, 20))
    with pytest.raises(
        LorakitError, match=r"rank 21 exceeds .* rank of 0 \(20 × 32\), 20. Give it less by rank_pattern"
    ):
        lk.attach(model, lk.HiRA(rank=21), target_modules=["0"])
    with pytest.raises(LorakitError, match="alpha_pattern was given, but hira has no alpha"):
        lk.attach(model, lk.HiRA(rank=2), target_modules=["0"], alpha_pattern={"0": 2.0})
