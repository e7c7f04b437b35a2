"""GaLore against a few independent lines of the paper, its projections, its state."""

from __future__ import annotations

import math
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from lorakit.errors import LorakitError
from lorakit.optim import GaLore
from lorakit.optim.galore import back, basis, project, side_of

SHAPES = [(9, 5), (5, 9), (6, 6)]


def independent(W: Tensor, gradients: list[Tensor], rank: int, gap: int, lr: float, scale: float, wd: float) -> Tensor:
    """Adam in the projected space, written from the paper: W (out, in), one gradient per step."""
    W, tall = W.clone(), W.shape[0] >= W.shape[1]
    m = v = P = None
    for t, G in enumerate(gradients, start=1):
        if (t - 1) % gap == 0:
            U, _, Vt = torch.linalg.svd(G)
            old, P = P, Vt[:rank].T if tall else U[:, :rank]
            if old is not None:  # the same subspace may come with other signs; ours keeps the nearest
                P = P * torch.sign((P * old).sum(0))
        R = G @ P if tall else P.T @ G
        m = 0.1 * R if m is None else 0.9 * m + 0.1 * R
        v = 0.001 * R**2 if v is None else 0.999 * v + 0.001 * R**2
        N = (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        W = W * (1 - lr * wd) - lr * scale * (N @ P.T if tall else P @ N)
    return W


@pytest.mark.parametrize("shape", SHAPES)
def test_against_the_paper(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    W = nn.Parameter(torch.randn(shape, dtype=torch.float64))
    gradients = [torch.randn(shape, dtype=torch.float64) for _ in range(7)]
    expected = independent(W.detach(), gradients, rank=3, gap=3, lr=0.02, scale=0.25, wd=0.1)
    optimiser = GaLore([W], lr=0.02, rank=3, interval=3, scale=0.25, weight_decay=0.1)
    for gradient in gradients:
        W.grad = gradient.clone()
        optimiser.step()
    torch.testing.assert_close(W.detach(), expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("side", ["std", "reverse", "left", "right"])
def test_projections(shape: tuple[int, int], side: Any) -> None:
    torch.manual_seed(0)
    G = torch.randn(shape, dtype=torch.float64)
    where = side_of(G.shape, side)
    assert side != "std" or (where == "right") == (shape[0] >= shape[1]), "the basis stands on the smaller side"
    P = basis(G, 3, where)
    gram = P.T @ P if where == "left" else P @ P.T
    torch.testing.assert_close(gram, torch.eye(3, dtype=torch.float64))
    R = project(G, P, where)
    once = back(R, P, where)
    torch.testing.assert_close(back(project(once, P, where), P, where), once)
    assert R.norm() <= G.norm()
    torch.testing.assert_close(R.norm(), torch.linalg.svdvals(G)[:3].norm())
    assert torch.equal(basis(G, 3, where, before=-P), -P), "signs follow the old basis"


@pytest.mark.parametrize("shape", [(9, 5), (5, 9)])
def test_sgd_at_almost_full_rank_is_sgd_of_the_projected_gradient(shape: tuple[int, int]) -> None:
    """At the full rank nothing would be projected; one below, the step is -lr · scale · the projected gradient."""
    torch.manual_seed(0)
    W = nn.Parameter(torch.randn(shape, dtype=torch.float64))
    start, G = W.detach().clone(), torch.randn(shape, dtype=torch.float64)
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    nearest = (U[:, :4] * S[:4]) @ Vh[:4]
    W.grad = G.clone()
    GaLore([W], lr=0.5, rank=4, scale=1.0, inner=torch.optim.SGD).step()
    torch.testing.assert_close(W.detach(), start - 0.5 * nearest)
    full = nn.Parameter(start.clone())
    full.grad = G.clone()
    GaLore([full], lr=0.5, rank=5, scale=1.0, inner=torch.optim.SGD).step()
    torch.testing.assert_close(full.detach(), start - 0.5 * G)


def test_state_is_of_low_rank_and_others_are_optimised_as_they_are() -> None:
    torch.manual_seed(0)
    W, b, small = (nn.Parameter(torch.randn(*s)) for s in ((40, 30), (40,), (4, 30)))
    plain = nn.Parameter(b.detach().clone())
    groups = [{"params": [W], "lr": 0.1}, {"params": [b, small], "lr": 0.01, "weight_decay": 0.1}]
    optimiser = GaLore(groups, rank=4)
    reference = torch.optim.AdamW([plain], lr=0.01, weight_decay=0.1)
    for _ in range(3):
        for p in (W, b, small):
            p.grad = torch.randn_like(p)
        plain.grad = b.grad.clone() if b.grad is not None else None
        optimiser.step()
        reference.step()
    torch.testing.assert_close(b, plain)
    held = [v for state in optimiser.state_dict()["inner"]["state"].values() for v in state.values() if v.numel() > 1]
    assert sum(v.numel() for v in held) == 2 * (4 * 40 + 40 + 4 * 30)
    assert optimiser.state[W]["P"].numel() == 4 * 30
    assert sum(p.numel() for p in optimiser._proxies.values()) == 0, "nothing is held between steps"


def test_learning_rates_and_a_restored_state_are_followed() -> None:
    def run(cut: int | None) -> Tensor:
        torch.manual_seed(0)
        W, b = nn.Parameter(torch.randn(8, 6)), nn.Parameter(torch.randn(8))
        gradients = [(torch.randn(8, 6), torch.randn(8)) for _ in range(6)]

        def fresh() -> tuple[Any, Any]:
            optimiser = GaLore([W, b], lr=0.1, rank=2, interval=4)
            return optimiser, torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 / (1 + step))

        optimiser, schedule = fresh()
        for step, (G, g) in enumerate(gradients):
            if step == cut:
                saved = optimiser.state_dict(), schedule.state_dict()
                optimiser, schedule = fresh()
                optimiser.load_state_dict(saved[0])
                schedule.load_state_dict(saved[1])
            W.grad, b.grad = G.clone(), g.clone()
            optimiser.step()
            schedule.step()
        return torch.cat([W.detach().flatten(), b.detach()])

    assert torch.equal(run(None), run(3))
    assert math.isfinite(float(run(None).sum()))


def test_a_bad_option_says_what_is_wrong() -> None:
    W = nn.Parameter(torch.randn(8, 6))
    with pytest.raises(LorakitError, match="rank is 0"):
        GaLore([W], rank=0)
    with pytest.raises(LorakitError, match="side was given as 'up'; it is one of std, reverse, left, right"):
        GaLore([W], side="up")  # type: ignore[arg-type]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_basis_keeps_nothing_else_alive(side: Literal["left", "right"]) -> None:
    """Not a view of all singular vectors, which would hold min(out, in)² numbers for `rank` rows of them."""
    G = torch.randn(12, 9)
    P = basis(G, 3, side)
    assert P.untyped_storage().nbytes() == P.numel() * 4
    assert P.is_contiguous()
