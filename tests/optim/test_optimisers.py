"""Optimisers by name, Muon with AdamW beside it, parameter groups, and state that follows ranks."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import nn

import lorakit as lk
from lorakit.errors import LorakitError
from lorakit.optim import GaLore, Muon, build_optimizer, parameter_groups
from lorakit.optim.state import check_movable, forget, move_ranks


def groups(lr: float = 0.1) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    return [{"params": [nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(5))], "lr": lr, "names": ["a", "b"]}]


@pytest.mark.parametrize(
    ("name", "kind", "options"),
    [
        ("adamw", torch.optim.AdamW, {"betas": (0.8, 0.9)}),
        ("SGD", torch.optim.SGD, {"momentum": 0.9}),
        ("torch.optim.RAdam", torch.optim.RAdam, {}),
        ("Adafactor", torch.optim.Adafactor, {}),
        ("muon", Muon, {"momentum": 0.9}),
        ("galore", GaLore, {"rank": 2, "interval": 3}),
    ],
)
def test_by_name(name: str, kind: type, options: dict[str, Any]) -> None:
    made = groups()
    optimiser = build_optimizer(name, made, **options)
    assert type(optimiser) is kind
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    before = [p.detach().clone() for p in parameters]
    for p in parameters:
        p.grad = torch.randn_like(p)
    optimiser.step()
    assert all(not torch.equal(p, old) for p, old in zip(parameters, before, strict=True))


def test_what_is_wrong_is_said() -> None:
    with pytest.raises(LorakitError, match='unknown optimizer "galor"; did you mean "galore"'):
        build_optimizer("galor", groups())
    with pytest.raises(LorakitError, match=r'unknown optimizer "torch\.optim\.muonn"'):
        build_optimizer("torch.optim.muonn", groups())
    with pytest.raises(LorakitError, match="optimizer sgd: it refuses its options"):
        build_optimizer("sgd", groups(), beta=1)
    with pytest.raises(LorakitError, match="refuses its options"):
        build_optimizer("adamw", groups(), betas=(1.5, 0.9))


@pytest.mark.parametrize("name", ["galore-8bit", "adamw-8bit"])
def test_eight_bits_without_bitsandbytes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(LorakitError, match=rf"{name}.*bitsandbytes, which is not installed.*use {name[:-5]}"):
        build_optimizer(name, groups())


@pytest.mark.parametrize(("name", "options"), [("adamw-8bit", {}), ("galore-8bit", {"rank": 8, "interval": 2})])
def test_eight_bit_moments_step_like_those_of_32(name: str, options: dict[str, Any]) -> None:
    """Moments of a matrix above bitsandbytes' smallest size take a byte each, and the steps are off by their rounding."""
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    start, gradients = torch.randn(128, 96), [torch.randn(128, 96) * 0.1 for _ in range(4)]
    moved = []
    for chosen in (name, name.removesuffix("-8bit")):
        weight = torch.nn.Parameter(start.clone())
        smallest = {"min_8bit_size": 256} if chosen == name else {}
        optimiser = build_optimizer(chosen, [{"params": [weight], "lr": 0.01}], weight_decay=0.0, **options, **smallest)
        for gradient in gradients:
            weight.grad = gradient.clone()
            optimiser.step()
        moved.append(weight.detach() - start)
        state = next(iter(getattr(optimiser, "_inner", optimiser).state.values()))
        if chosen == name:
            assert state["state1"].dtype is torch.uint8
    assert torch.linalg.matrix_norm(moved[0] - moved[1]) < 0.15 * torch.linalg.matrix_norm(moved[1])


@pytest.mark.parametrize("name", ["paged-adamw", "paged-adamw-8bit"])
def test_pages_need_a_gpu(name: str) -> None:
    instead = name.removeprefix("paged-")
    with pytest.raises(
        LorakitError, match=rf"{name}.*parameters are on cpu, where there is one memory.*Use {instead}\."
    ):
        build_optimizer(name, groups())


def test_muon_is_torchs_for_matrices_and_adamw_for_the_rest() -> None:
    ours, theirs = groups(), groups()
    optimiser = build_optimizer("muon", ours, weight_decay=0.1)
    matrix, vector = theirs[0]["params"]
    muon = torch.optim.Muon([matrix], lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW([vector], lr=0.1, weight_decay=0.1, fused=True)
    for step in range(4):
        if step == 2:  # a checkpoint in between changes nothing
            saved = optimiser.state_dict()
            optimiser = build_optimizer("muon", ours, weight_decay=0.1)
            optimiser.load_state_dict(saved)
        for own, other in zip(ours[0]["params"], theirs[0]["params"], strict=True):
            own.grad = torch.randn_like(own)
            other.grad = own.grad.clone()
        for group in optimiser.param_groups:
            group["lr"] = 0.1 / (step + 1)
        muon.param_groups[0]["lr"] = adamw.param_groups[0]["lr"] = 0.1 / (step + 1)
        optimiser.step()
        muon.step()
        adamw.step()
    for own, other in zip(ours[0]["params"], theirs[0]["params"], strict=True):
        assert torch.equal(own, other)


def stepped(ratio: float) -> tuple[dict[str, torch.Tensor], Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4, bias=False))
    adapter = lk.attach(model, lk.LoRA(rank=2), target_modules=["0", "1"])
    made = parameter_groups(adapter.named_parameters(), adapter.roles(), 0.01, ratio=ratio)
    optimiser = build_optimizer("adamw", made, weight_decay=0.0)
    before = {name: p.detach().clone() for name, p in adapter.named_parameters()}
    torch.manual_seed(1)
    model(torch.randn(3, 6)).square().sum().backward()
    optimiser.step()
    return {name: p.detach() - before[name] for name, p in adapter.named_parameters()}, (adapter, made)


def test_loraplus_moves_B_by_the_ratio_and_its_groups_partition_what_trains() -> None:
    plain, _ = stepped(1.0)
    faster, (adapter, made) = stepped(16.0)
    for name, change in plain.items():
        torch.testing.assert_close(faster[name], change * (16.0 if name.endswith("B") else 1.0))
    held = [id(p) for group in made for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in adapter.parameters())


@pytest.mark.parametrize(("name", "options"), [("adamw", {}), ("sgd", {"momentum": 0.9}), ("muon", {})])
def test_moments_follow_ranks(name: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(5, 4))
    optimiser = build_optimizer(name, [{"params": [p], "lr": 0.1}], **options)
    p.grad = torch.randn_like(p)
    optimiser.step()
    before = {key: value.clone() for key, value in optimiser.state[p].items() if isinstance(value, torch.Tensor)}
    check_movable(optimiser, p)
    left = torch.tensor([0, 2, 3])
    shape, p.data = p.shape, torch.randn(5, 5)
    move_ranks(optimiser, p, shape, left, added=2, axis=1)
    seen = 0
    for key, value in before.items():
        now = optimiser.state[p][key]
        if value.shape == (5, 4):
            assert torch.equal(now[:, :3], value[:, left])
            assert not now[:, 3:].any()
            seen += 1
        else:
            assert torch.equal(now, value), key
    assert seen
    p.grad = torch.randn(5, 5)
    optimiser.step()
    forget(optimiser, p)
    assert not optimiser.state[p]


def test_state_that_cannot_follow_is_refused() -> None:
    p = nn.Parameter(torch.randn(5, 4))
    optimiser = build_optimizer("Adafactor", [{"params": [p], "lr": 0.1}])
    p.grad = torch.randn_like(p)
    optimiser.step()
    with pytest.raises(LorakitError, match=r"Adafactor: it keeps row_var .* cannot follow when ranks change"):
        check_movable(optimiser, p)
