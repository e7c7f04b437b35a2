"""LoHa: the paper's formula, its rank, its two ways of acting, its gradients, PEFT's files."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lorakit as lk
from lorakit.core.delta import Pool, Shape
from lorakit.errors import LorakitError
from lorakit.methods.loha import LoHaDelta, WideLoHaDelta


def filled(spec: lk.LoHa, shape: Shape) -> LoHaDelta:
    torch.manual_seed(0)
    delta = spec.build(shape, Pool()).double()
    for parameter in delta.parameters():
        nn.init.normal_(parameter)
    assert isinstance(delta, LoHaDelta)
    return delta


def test_formula() -> None:
    delta = filled(lk.LoHa(rank=3, alpha=2.0), Shape(14, 11))
    B1, A1, B2, A2 = delta.B1, delta.A1, delta.B2, delta.A2
    expected = torch.einsum("op,pi,oq,qi->oi", B1, A1, B2, A2) * (2.0 / 3)
    torch.testing.assert_close(delta.dense(torch.zeros(14, 11)), expected)
    B, A = delta.factors()
    torch.testing.assert_close(delta.scale * B @ A, expected)
    assert B.shape == (14, 9)


def test_rank_is_the_square() -> None:
    assert torch.linalg.matrix_rank(filled(lk.LoHa(rank=3), Shape(14, 11)).dense(torch.zeros(14, 11))) == 9


def test_with_a_second_factor_of_ones_it_is_lora() -> None:
    delta = filled(lk.LoHa(rank=4, alpha=2.0), Shape(14, 11))
    with torch.no_grad():
        delta.B2.fill_(1 / 4)
        delta.A2.fill_(1.0)
    torch.testing.assert_close(delta.dense(torch.zeros(14, 11)), 0.5 * delta.B1 @ delta.A1)


@pytest.mark.parametrize(("rank", "kind"), [(2, LoHaDelta), (6, WideLoHaDelta)])
def test_acts_by_the_cheaper_way(rank: int, kind: type[LoHaDelta]) -> None:
    """rank² (out + in) against out · in decides; the results are those of the dense change."""
    layer = nn.Sequential(nn.Linear(32, 20)).double()
    lk.attach(layer, lk.LoHa(rank=rank), target_modules=["0"])
    delta = layer[0].deltas_of("default")[""]
    assert type(delta) is kind
    for parameter in delta.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(5, 32, dtype=torch.float64)
    expected = x @ (layer[0].base.weight + delta.dense(layer[0].base.weight)).T + layer[0].base.bias
    torch.testing.assert_close(layer(x), expected)


def test_gradients_and_what_is_kept() -> None:
    """The hand-written backward of the dense change is autograd's, and it keeps the factors alone."""
    delta = filled(lk.LoHa(rank=3), Shape(14, 11))
    kept: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        dense = delta.dense(torch.zeros(14, 11))
    assert max(kept) <= 14 * 3, "a matrix as large as W is kept"
    towards = torch.randn_like(dense)
    parameters = list(delta.parameters())
    ours = torch.autograd.grad(dense, parameters, towards)
    plain = (delta.B1 @ delta.A1) * (delta.B2 @ delta.A2) * delta.scale
    for own, expected in zip(ours, torch.autograd.grad(plain, parameters, towards), strict=True):
        torch.testing.assert_close(own, expected)


def test_parameters() -> None:
    model = nn.Sequential(nn.Linear(32, 20))
    assert lk.attach(model, lk.LoHa(rank=4), target_modules=["0"]).num_parameters() == 2 * 4 * (32 + 20)


def test_refusals() -> None:
    model = nn.Sequential(nn.Linear(32, 20))
    with pytest.raises(LorakitError, match=r"rank 21 is above the size of 0 \(20 × 32\). Rank 5 makes ΔW of full rank"):
        lk.attach(model, lk.LoHa(rank=21), target_modules=["0"])
    with pytest.raises(LorakitError, match="loha: rank was given as 0"):
        lk.LoHa(rank=0)
    with pytest.raises(LorakitError, match="loha: alpha was given as nan"):
        lk.LoHa(alpha=float("nan"))
    with pytest.raises(LorakitError, match="factors"):
        lk.attach(model, lk.LoHa(rank=2), target_modules=["0"], init="gaussian")
