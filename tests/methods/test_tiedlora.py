"""Tied-LoRA: one pair per shape, vectors per layer."""

import pytest
import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit.errors import LorakitError


class Blocks(nn.Module):
    """Two layers of one shape, one of another, and an embedding of the first one's shape."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.words = nn.Embedding(6, 8)
        self.up = nn.ModuleList([nn.Linear(6, 8), nn.Linear(6, 8)])
        self.down = nn.Linear(8, 6)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.down(self.words(ids))
        return self.up[1](self.down(torch.tanh(self.up[0](x))))


def attached(**options: object) -> tuple[nn.Module, lk.Adapter]:
    model = Blocks().double()
    targets = ["words", "up.0", "up.1", "down"]
    return model, lk.attach(model, lk.TiedLoRA(rank=2, **options), target_modules=targets)


def test_formula_and_ties():
    """ΔW_l = s diag(v_l) B diag(u_l) A; layers of one shape have one A and one B in memory."""
    _, adapter = attached(alpha=3.0)
    deltas = {path: delta for path, _, delta in adapter.deltas()}
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    for delta in deltas.values():
        B, A = delta.tied()
        expected = 3 / 2 * torch.diag(delta.v) @ B @ torch.diag(delta.u) @ A
        torch.testing.assert_close(delta.dense(torch.empty(0)), expected)
    assert [a.data_ptr() for a in deltas["up.0"].tied()] == [a.data_ptr() for a in deltas["up.1"].tied()]
    for other in ("down", "words"):
        assert deltas["up.0"].tied()[0].data_ptr() != deltas[other].tied()[0].data_ptr()
    names = [name for name, _ in adapter.named_parameters() if name.startswith("pool")]
    assert len(names) == 6, "each shared tensor once, for the optimiser"


def test_counts():
    _, adapter = attached()
    pooled, own = 3 * 2 * (6 + 8), (2 + 8) * 3 + (2 + 6)
    assert adapter.num_parameters(trainable=True) == pooled + own
    shapes = [lk.core.delta.Shape(8, 6), lk.core.delta.Shape(8, 6), lk.core.delta.Shape(6, 8)]
    assert lk.TiedLoRA.card.pooled(shapes, lk.TiedLoRA(rank=2, trained="Auv")) == 2 * (6 + 8)


def test_shared_gradient_is_the_sum_over_layers():
    model, adapter = attached()
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=0.3)
    ids = torch.tensor([0, 3, 5])
    model(ids).square().sum().backward()
    shared = adapter.pool.tied_A_8x6.grad.clone()
    total = torch.zeros_like(shared)
    for alone in ("up.0", "up.1"):
        adapter.pool.tied_A_8x6.grad = None
        held = {path: delta.tied for path, _, delta in adapter.deltas()}
        for path, _, delta in adapter.deltas():
            if path != alone:
                delta.tied = lambda tied=held[path]: tuple(t.detach() for t in tied())
        model(ids).square().sum().backward()
        total += adapter.pool.tied_A_8x6.grad
        for _, _, delta in adapter.deltas():
            delta.__dict__.pop("tied", None)
    torch.testing.assert_close(total, shared)


@pytest.mark.parametrize("trained", ["ABuv", "AB", "uv", "v", "Auv", "Bu"])
def test_what_trains(trained: str):
    """Any such choice starts at the base model and has a gradient there; what is not named stays."""
    model, adapter = attached(trained=trained)
    ids = torch.tensor([0, 3, 5])
    torch.testing.assert_close(model(ids), Blocks().double()(ids), rtol=0, atol=1e-14)
    found = {name.rpartition(".")[2] for name, p in adapter.named_parameters() if p.requires_grad}
    assert {name.removeprefix("tied_")[0] for name in found} == set(trained)
    model(ids).square().sum().backward()
    for path, _, delta in adapter.deltas():
        tensors = [delta.u, delta.v, *delta.tied()]
        assert any(t.grad is not None and t.grad.abs().max() > 0 for t in tensors), path


def test_one_layer_with_vectors_at_one_is_lora():
    model = nn.Sequential(nn.Linear(6, 8)).double()
    tied = lk.attach(model, lk.TiedLoRA(rank=2, alpha=5.0, trained="AB"), target_modules=["0"])
    twin = nn.Sequential(nn.Linear(6, 8)).double()
    lora = lk.attach(twin, lk.LoRA(rank=2, alpha=5.0), target_modules=["0"])
    (_, _, one), (_, _, other) = next(tied.deltas()), next(lora.deltas())
    nn.init.normal_(one.tied()[0])
    other.set_factors(*one.tied())
    torch.testing.assert_close(one.dense(torch.empty(0)), other.dense(torch.empty(0)))


@pytest.mark.parametrize(("trained", "says"), [("Au", "without B or v"), ("ABx", "letters"), ("", "letters")])
def test_refusals(trained: str, says: str):
    with pytest.raises(LorakitError, match=says):
        lk.TiedLoRA(trained=trained)
