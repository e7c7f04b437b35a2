"""LoRA-XS: frozen singular directions, a trained square between them."""

from pathlib import Path

import pytest
import torch

import lorakit as lk
from lorakit.errors import LorakitError
from methods.peft_files import TARGETS, Net, inputs


def attached(**options: object) -> tuple[torch.nn.Module, lk.Adapter]:
    torch.manual_seed(3)
    model = Net().double()
    return model, lk.attach(model, lk.LoRAXS(rank=3, **{"alpha": 3.0, **options}), target_modules=TARGETS)


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {path: model.get_submodule(path).base.weight.detach() for path in TARGETS}


@pytest.mark.parametrize("iterations", [None, 10])
def test_identity_between_the_factors_is_the_best_approximation(iterations: int | None):
    """R = 1 and s = 1 give the rank-3 truncation of W (Eckart-Young): what is left has its other singular values."""
    model, adapter = attached(iterations=iterations)
    for path, _, delta in adapter.deltas():
        W = weights(model)[path]
        with torch.no_grad():
            delta.R.copy_(torch.eye(3))
        left = torch.linalg.svdvals(W)[3:].square().sum()
        assert abs((W - delta.dense(W)).square().sum() - left) < 1e-9 * left


def test_the_change_stays_between_the_directions():
    model, adapter = attached(alpha=5.0)
    for path, _, delta in adapter.deltas():
        W = weights(model)[path]
        torch.nn.init.normal_(delta.R)
        U, S, Vh = torch.linalg.svd(W)
        expected = 5 / 3 * delta.B @ delta.R @ torch.diag(S[:3]) @ (delta.B.T @ W / S[:3, None])
        torch.testing.assert_close(delta.dense(W), expected)
        assert (U[:, 3:].T @ delta.dense(W)).abs().max() < 1e-12
        assert (delta.dense(W) @ Vh[3:].T).abs().max() < 1e-12


def test_start_and_counts():
    model, adapter = attached()
    assert adapter.num_parameters(trainable=True) == 3 * 9
    change = (model(inputs().double()) - Net().double()(inputs().double())).abs().max()
    assert 0 < change < 1e-4
    model, adapter = attached(start=0)
    assert torch.equal(model(inputs().double()), Net().double()(inputs().double()))
    model(inputs().double()).square().sum().backward()
    assert all(delta.R.grad.abs().max() > 0 for _, _, delta in adapter.deltas())
    assert 7 * 32 * lk.LoRAXS.card.parameters(lk.core.delta.Shape(4096, 4096), lk.LoRAXS(rank=64)) == 917_504


def test_the_directions_are_in_the_file(tmp_path: Path):
    """Loaded on another base they are those of the first: nothing is decomposed again."""
    _, adapter = attached(iterations=2)
    adapter.save(tmp_path)
    model = Net().double()
    loaded = lk.load(model, tmp_path, name="one")
    for (_, _, one), (_, _, two) in zip(adapter.deltas(), loaded.deltas(), strict=True):
        for name in ("A", "B", "R"):
            assert torch.equal(getattr(one, name), getattr(two, name))


def test_refusals():
    with pytest.raises(LorakitError, match=r"rank 9 exceeds the maximum useful rank of first \(12 × 8\), 8"):
        lk.attach(Net(), lk.LoRAXS(rank=9), target_modules=TARGETS)
    with pytest.raises(LorakitError, match="start"):
        lk.LoRAXS(start=-1.0)
