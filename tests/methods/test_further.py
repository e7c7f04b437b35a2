"""The further methods of PEFT: each formula against a few independent lines, and what each refuses.

PEFT's files, both ways, are in test_peft_files.py, the laws in tests/laws.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit.core.delta import Delta, Method, Pool, Shape
from lorakit.errors import LorakitError

OUT, IN = 8, 12
Formula = Callable[[Any, Tensor], Tensor]


def _sums(delta: Any, W: Tensor) -> Tensor:
    """ΔW[o, j] = D[j mod rank, o mod columns]"""
    D = delta.D
    return torch.stack([torch.stack([D[j % len(D), o % D.shape[1]] for j in range(IN)]) for o in range(OUT)])


def _bat(delta: Any, W: Tensor) -> Tensor:
    change = torch.zeros_like(W)
    for p, D in enumerate(delta.D):
        rows = slice(4 * p, 4 * p + 4)
        for q in range(IN // 4):
            columns = slice(4 * q, 4 * q + 4)
            change[rows, columns] = W[rows, columns] @ D + D
    return change


def _delora(delta: Any, W: Tensor) -> Tensor:
    pieces = [torch.outer(b / b.norm(), a / a.norm()) for b, a in zip(delta.B.T, delta.A, strict=True)]
    return delta.lam * torch.stack(pieces).mean(0) * W.norm(dim=0)


def _gralora(delta: Any, W: Tensor) -> Tensor:
    change, (A, B) = torch.zeros_like(W), (delta.A, delta.B)
    for j in range(2):
        for n in range(2):
            block = (A[n][:, 2 * j : 2 * j + 2] @ B[j][2 * n : 2 * n + 2]).T
            change[4 * j : 4 * j + 4, 6 * n : 6 * n + 6] = block
    return (change + delta.whole_B @ delta.whole_A) * 3.0 / (4 + 1)


def _hra(delta: Any, W: Tensor) -> Tensor:
    turned = W
    for u in delta.u.T:
        turned = turned - 2 * torch.outer(turned @ u, u) / (u @ u)
    return turned - W


def _hra_orthogonal(delta: Any, W: Tensor) -> Tensor:
    return -2 * W @ delta.u @ torch.linalg.pinv(delta.u)


def _road(delta: Any, W: Tensor) -> Tensor:
    """road_1: output i is turned with output i + 2 of its group of four."""
    R = torch.zeros(OUT, OUT, dtype=W.dtype)
    pairs = [(0, 2), (1, 3), (4, 6), (5, 7)]
    for (i, j), theta, alpha in zip(pairs, delta.theta, delta.alpha, strict=True):
        R[i, i] = R[j, j] = alpha * theta.cos()
        R[j, i] = alpha * theta.sin()
        R[i, j] = -R[j, i]
    return R @ W - W


def _supertuning(delta: Any, W: Tensor) -> Tensor:
    change = torch.zeros_like(W)
    largest = W.abs().flatten().argsort(descending=True)[:9]
    for place, value in zip(largest.tolist(), delta.values, strict=True):
        change[place // IN, place % IN] = value
    return change + 2.0 * delta.B @ delta.A


CASES: dict[str, tuple[Method, Formula]] = {
    "miss": (lk.MiSS(rank=5), _sums),
    "miss-mini": (lk.MiSS(rank=5, kind="mini", mini=4), _sums),
    "miss-bat": (lk.MiSS(rank=4, kind="bat"), _bat),
    "delora": (lk.DeLoRA(rank=3), _delora),
    "gralora": (lk.GraLoRA(rank=4, hybrid=1, alpha=3.0), _gralora),
    "hra": (lk.HRA(rank=3), _hra),
    "hra-orthogonal": (lk.HRA(rank=3, orthogonal=True), _hra_orthogonal),
    "road": (lk.RoAd(group=4), _road),
    "supertuning": (lk.SuperTuning(sparsity=0.9, rank=2), _supertuning),
}


def filled(spec: Method, W: Tensor) -> Delta:
    """A delta on this weight with random tensors."""
    torch.manual_seed(0)
    shape = Shape(*W.shape)
    pool = Pool([shape])
    delta = spec.build(shape, pool).double()
    pool.double()
    delta.begin(W)
    for parameter in (*delta.parameters(), *pool.parameters()):
        nn.init.normal_(parameter)
    return delta


@pytest.mark.parametrize("name", CASES)
def test_formula(name: str) -> None:
    spec, formula = CASES[name]
    W = torch.randn(OUT, IN, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    delta = filled(spec, W)
    torch.testing.assert_close(delta.dense(W), formula(delta, W))


def test_reflections_are_orthogonal_and_an_even_number_starts_as_the_base() -> None:
    W = torch.randn(OUT, IN, dtype=torch.float64)
    turned = W + filled(lk.HRA(rank=5), W).dense(W)
    torch.testing.assert_close(turned @ turned.T, W @ W.T)
    specs = (lk.HRA(rank=4), lk.HRA(rank=3), lk.HRA(rank=4, orthogonal=True))
    assert [spec.identity for spec in specs] == [True, False, False]
    for spec in specs:
        change = spec.build(Shape(OUT, IN), Pool()).double().dense(W)
        assert (change.abs().max() < 1e-12) == spec.identity


def test_super_tuning_without_indices_finds_its_places_in_the_base(tmp_path: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 8))
    adapter = lk.attach(model, lk.SuperTuning(sparsity=0.9, save_indices=False), target_modules=["0"])
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, 12)
    wanted = model(x)
    adapter.save(tmp_path)
    assert not [key for key in lk.files.store.read_tensors(tmp_path) if "indices" in key]
    lk.detach(model)
    lk.load(model, tmp_path, name="again")
    assert torch.equal(model(x), wanted)


REFUSALS: list[tuple[Callable[[], Method], str]] = [
    (lambda: lk.MiSS(rank=5, kind="bat"), r"rank 5 does not divide both sides of 0 \(8 × 12\)"),
    (lambda: lk.MiSS(rank=5, kind="mini", mini=3), "mini 3 does not divide the 8 outputs of 0"),
    (lambda: lk.MiSS(rank=13), "rank 13 is above the 12 inputs of 0"),
    (lambda: lk.GraLoRA(rank=6, blocks=3), "blocks 3 does not divide both sides of 0"),
    (lambda: lk.GraLoRA(rank=5, blocks=2), "blocks=2 does not divide rank=5"),
    (lambda: lk.HRA(rank=13), "more directions than the 12 features"),
    (lambda: lk.RoAd(group=6), "group 6 does not divide the 8 outputs of 0; 2, 4, 8 would"),
    (lambda: lk.RoAd(group=3), "an even number"),
    (lambda: lk.SuperTuning(sparsity=0.999), "leaves none of the 96 entries"),
    (lambda: lk.SuperTuning(alpha=2.0), "there is none without rank"),
]


@pytest.mark.parametrize(("make", "said"), REFUSALS, ids=[said[:30] for _, said in REFUSALS])
def test_refusals(make: Callable[[], Method], said: str) -> None:
    with pytest.raises(LorakitError, match=said):
        lk.attach(nn.Sequential(nn.Linear(12, 8)), make(), target_modules=["0"])
