"""LoRA-FA's corrected gradient: the least-squares identity, any order, any scale, embeddings, and A that never moves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit.optim import build_optimizer, correct_gradients, corrections_of


def adapted(rslora: bool = False, **options: Any) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(8, 6), nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4)).double()
    spec = lk.LoRAFA(rank=3, alpha=5.0, rslora=rslora, **options)
    adapter = lk.attach(model, spec, target_modules=["0", "1", "3"], alpha_pattern={"3": 2.0})
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return model, adapter


def loss(model: nn.Module) -> Tensor:
    result: Tensor = model(torch.arange(8)).square().sum()
    return result


@pytest.mark.parametrize("rslora", [False, True])
def test_the_corrected_step_is_nearest_to_the_whole_weights(rslora: bool) -> None:
    model, adapter = adapted(rslora, corrected=True)
    loss(model).backward()
    plain = {path: (delta.A.grad, delta.B.grad) for path, _, delta in adapter.deltas()}
    plain = {path: tuple(None if g is None else g.clone() for g in pair) for path, pair in plain.items()}
    for pair in corrections_of(adapter):
        pair.apply()
    for path, _, delta in adapter.deltas():
        s, F = delta.scale, (delta.B if delta.shape.lookup else delta.A).detach()
        trained = delta.A if delta.shape.lookup else delta.B
        g = plain[path][0 if delta.shape.lookup else 1]
        # The gradient of W is only known through g = s G Aᵀ (or s Bᵀ G): any G that fits it has the same nearest step.
        inverse = torch.linalg.pinv(F)
        G = inverse.T @ g / s if delta.shape.lookup else g @ inverse.T / s
        G = G + _invisible(G, F, delta.shape.lookup)
        torch.testing.assert_close(s * (F.T @ G if delta.shape.lookup else G @ F.T), g)
        if delta.shape.lookup:
            best = torch.linalg.lstsq(s * F, G).solution
        else:
            best = torch.linalg.lstsq(s * F.T, G.T).solution.T
        assert trained.grad is not None
        torch.testing.assert_close(trained.grad, best, rtol=1e-6, atol=1e-8)  # ε = 1e-8 is in ours


def _invisible(G: Tensor, F: Tensor, lookup: bool) -> Tensor:
    """A random part of G that the low-rank gradient does not see."""
    noise = torch.randn_like(G)
    seen = F @ torch.linalg.pinv(F) if lookup else torch.linalg.pinv(F) @ F
    return noise - (seen @ noise if lookup else noise @ seen)


@pytest.mark.parametrize("reverse", [False, True])
def test_any_optimiser_in_any_order(reverse: bool) -> None:
    model, adapter = adapted(corrected=True)
    trained = [p for p in adapter.parameters() if p.requires_grad]
    optimiser = build_optimizer("sgd", [{"params": trained[::-1] if reverse else trained, "lr": 0.01}])
    correct_gradients(optimiser, corrections_of(adapter)[:: -1 if reverse else 1])
    frozen = {name: p.detach().clone() for name, p in adapter.named_parameters() if not p.requires_grad}
    assert len(frozen) == 3
    for _ in range(3):
        optimiser.zero_grad()
        loss(model).backward()
        start = {id(p): (p.detach().clone(), p.grad.clone() if p.grad is not None else None) for p in trained}
        optimiser.step()
        for pair in corrections_of(adapter):
            before, g = start[id(pair.trained)]
            corrected = pair.inverse() @ g if pair.left else g @ pair.inverse()
            torch.testing.assert_close(pair.trained.detach(), before - 0.01 * corrected)
    for name, p in adapter.named_parameters():
        if name in frozen:
            assert torch.equal(p, frozen[name]), f"{name} is frozen"


def test_only_where_it_is_asked_for() -> None:
    assert not corrections_of(adapted()[1])
    assert len(corrections_of(adapted(corrected=True)[1])) == 3


def test_a_frozen_factor_keeps_no_input_for_the_backward() -> None:
    """Nothing as wide as the input is saved: that is what LoRA-FA is for."""
    layer = nn.Linear(64, 5)
    model = nn.Sequential(layer)
    lk.attach(model, lk.LoRAFA(rank=3), target_modules=["0"])
    saved: list[torch.Size] = []
    weights = {layer.weight.data_ptr()} | {p.data_ptr() for p in model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in weights:
            saved.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(torch.randn(7, 64))
    assert saved
    assert all(64 not in shape for shape in saved), saved
