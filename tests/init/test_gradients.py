"""Starts read off the gradient: how it is measured, and LoRA-GA."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorakit as lk
from init.models import llama, mixed, mixed_batches, start_of, texts
from lorakit.core.delta import Shape
from lorakit.core.sites import sites_of
from lorakit.errors import LorakitError
from lorakit.init import LoRAGA, calibration
from lorakit.init.calibration import Matrix, calibrate
from lorakit.init.initialiser import Start


def measured(model: nn.Module, paths: list[str], batches: Any, **options: Any) -> dict[str, Tensor]:
    matrices = {
        path: Matrix(model.get_submodule(path), sites_of(model.get_submodule(path))[0], 2, 1.0) for path in paths
    }
    return dict(calibrate(model, matrices, LoRAGA(), batches, **options))


def mean_gradients(model: nn.Module, paths: list[str], batches: Any) -> dict[str, Tensor]:
    """Autograd's own, of the weights themselves."""
    model.zero_grad()
    for batch in batches:
        output = model(**batch)
        (getattr(output, "loss", output) / len(batches)).backward()
    return {
        path: sites_of(model.get_submodule(path))[0].layout.matrix(model.get_submodule(path).weight.grad)
        for path in paths
    }


@pytest.mark.parametrize("budget", [calibration.BUDGET, 0])
def test_gradients_are_those_of_the_weights(budget: int) -> None:
    """Linear, Conv1D, grouped convolutions, embedding; all at once, and one layer at a time."""
    paths, batches = ["first", "second", "image", "line"], mixed_batches()
    expected = mean_gradients(mixed(), paths, batches)
    model = mixed()
    for path, G in measured(model, paths, batches, budget=budget).items():
        assert torch.allclose(G, expected[path], atol=1e-11), path
    assert all(parameter.grad is None for parameter in model.parameters())
    paths = ["model.embed_tokens", "model.layers.0.self_attn.v_proj", "model.layers.1.mlp.down_proj", "lm_head"]
    expected = mean_gradients(llama(), paths, texts())
    for path, G in measured(llama(), paths, texts(), budget=budget).items():
        assert torch.allclose(G, expected[path], atol=1e-7), path  # Llama's norms compute in single precision


def test_gradients_of_parts() -> None:
    model = nn.Sequential(nn.Linear(6, 9)).double()
    parts = {"0": {"q": (0, 4), "v": [(5, 6), (7, 9)]}}

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x).pow(3).mean()

    loss, batches = Loss(), [{"x": torch.randn(7, 6, dtype=torch.float64)}]
    G = mean_gradients(loss, ["inner.0"], batches)["inner.0"]
    adapter = lk.attach(
        loss, lk.LoRA(rank=1), target_modules=["0"], parts=parts, init=LoRAGA(iterations=None), batches=batches
    )
    for _, site, delta in adapter.deltas():
        own = site.layout.matrix(G)
        U, _, Vh = torch.linalg.svd(own)
        B, A = (factor.detach() for factor in delta.low_rank().factors())
        assert (A @ Vh[0]).abs() / A.norm() == pytest.approx(1.0)
        assert (U[:, 1] @ B).abs() / B.norm() == pytest.approx(1.0)


def test_one_layer_at_a_time_holds_one_gradient() -> None:
    """With a small budget the sums of earlier layers are gone when the next are made."""
    model, batches = llama(), texts(2)
    paths = [f"model.layers.{block}.mlp.{name}_proj" for block in (0, 1) for name in ("gate", "up", "down")]
    matrices = {
        path: Matrix(model.get_submodule(path), sites_of(model.get_submodule(path))[0], 2, 1.0) for path in paths
    }
    alive: list[weakref.ref[Tensor]] = []
    for _, G in calibrate(model, matrices, LoRAGA(), batches, budget=0):
        gc.collect()
        assert sum(ref() is not None for ref in alive) <= 1
        alive.append(weakref.ref(G))
        del G
    assert len(alive) == 6


def test_reduced_precision_is_summed_in_single() -> None:
    found = measured(llama(torch.bfloat16), ["model.layers.0.self_attn.q_proj"], texts())
    (G,) = found.values()
    assert G.dtype == torch.float32
    (exact,) = measured(llama(), list(found), texts()).values()
    assert (G - exact).norm() < 0.1 * exact.norm()


# -- LoRA-GA -----------------------------------------------------------------------------------------------------------------


def given(G: Tensor, rank: int = 2, scale: float = 1.5) -> Start:
    torch.manual_seed(9)
    W = torch.randn_like(G)
    return Start("layer", Shape(*G.shape), rank, scale, G, lambda: W, G)


@pytest.fixture
def G() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(11, 8, dtype=torch.float64)


@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr", "random"])
def test_directions_are_disjoint_and_stable(direction: Any, G: Tensor) -> None:
    """A Aᵀ = Bᵀ B = (√out / γ) I; together A and B use each of the first 2r directions once."""
    B, A, _ = LoRAGA(direction=direction, iterations=None, gamma=16.0).factors(given(G))
    eye = torch.eye(2, dtype=G.dtype) * 11**0.5 / 16
    assert torch.allclose(A @ A.T, eye, atol=1e-12)
    assert torch.allclose(B.T @ B, eye, atol=1e-12)
    U, _, Vh = torch.linalg.svd(G)
    of_A = {int((row @ Vh.T).abs().argmax()) for row in A}
    of_B = {int((column @ U).abs().argmax()) for column in B.T}
    assert of_A | of_B == {0, 1, 2, 3}
    expected = {"ArB2r": {0, 1}, "A2rBr": {2, 3}, "ArBr": {0, 2}}
    if direction != "random":
        assert of_A == expected[direction]
    if direction == "ArB2r":
        assert (U[:, :2].T @ B).abs().max() < 1e-12


def test_the_first_step_is_that_of_the_full_weight(G: Tensor) -> None:
    """B Bᵀ G + G Aᵀ A is proportional to G's best approximation of rank 2r; PEFT's start (B times the singular values,
    A unscaled) is not, which is why it is not compared."""
    B, A, _ = LoRAGA(iterations=None).factors(given(G))
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    best = (U[:, :4] * S[:4]) @ Vh[:4]

    def cosine(step: Tensor) -> float:
        return float((step * best).sum() / step.norm() / best.norm())

    assert cosine(B @ B.T @ G + G @ A.T @ A) == pytest.approx(1.0, abs=1e-12)
    peft_B, peft_A = U[:, 2:4] * S[2:4], Vh[:2]
    assert cosine(peft_B @ peft_B.T @ G + G @ peft_A.T @ peft_A) < 0.98


def test_a_real_first_step_follows_it() -> None:
    """One small step of gradient descent on the adapter changes W along the gradient's rank-2r part."""
    batches = mixed_batches(1)
    model = mixed()
    (G,) = mean_gradients(mixed(), ["first"], batches).values()
    method = lk.LoRA(rank=2, alpha=3.0)
    adapter = lk.attach(model, method, target_modules=["first"], init=LoRAGA(iterations=None), batches=batches)
    model(**batches[0]).backward()
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter -= 1e-7 * parameter.grad
    (delta,) = [delta for _, _, delta in adapter.deltas()]
    change = delta.dense(torch.zeros(12, 10, dtype=torch.float64)).detach()
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    best = (U[:, :4] * S[:4]) @ Vh[:4]
    assert float((-change * best).sum() / change.norm() / best.norm()) == pytest.approx(1.0, abs=1e-5)


def test_sizes(G: Tensor) -> None:
    start = given(G)
    lengths = {
        size: float(LoRAGA(size=size, iterations=None).factors(start).A.norm(dim=1)[0])  # type: ignore[arg-type]
        for size in ("stable", "gd", "unit", "weight")
    }
    S = torch.linalg.svdvals(start.W)
    weight = float((S[:2] / 1.5).sqrt().mean())
    assert lengths == pytest.approx({"stable": 11**0.25 / 4, "gd": 1 / 1.5, "unit": 1.0, "weight": weight})
    fast = LoRAGA(iterations=4).factors(start)
    exact = LoRAGA(iterations=None).factors(start)
    assert torch.allclose((fast.A @ exact.A.T).abs(), exact.A @ exact.A.T, atol=1e-8)


def test_a_zero_gradient_is_said() -> None:
    with pytest.raises(LorakitError, match="gradient of zero for layer"):
        LoRAGA().factors(given(torch.zeros(6, 6)))
    with pytest.raises(LorakitError, match="direction was given as"):
        LoRAGA(direction="BrA")  # type: ignore[arg-type]


def test_loraga_factors_stand_for_whole_layers() -> None:
    adapter = lk.attach(llama(), lk.LoRA(rank=2), target_modules="all-linear", init="lora-ga", batches=texts())
    for path, (B, A, _) in start_of(adapter).items():
        size = B.shape[0] ** 0.5 / 16
        assert torch.allclose(A @ A.T, size * torch.eye(2, dtype=A.dtype), atol=1e-10), path
