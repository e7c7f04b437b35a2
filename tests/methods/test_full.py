"""Full fine-tuning as a delta is full fine-tuning."""

from __future__ import annotations

import copy

import torch
from torch import nn

import lorakit as lk


def test_it_is_full_fine_tuning() -> None:
    """The same steps on the weight itself give the same model, with the bias trained too."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    plain = copy.deepcopy(model)
    adapter = lk.attach(model, lk.Full(), target_modules=["0", "2"], bias="lora_only")
    assert adapter.num_parameters() == sum(p.numel() for p in plain.parameters())
    x, target = torch.randn(8, 6, dtype=torch.float64), torch.randn(8, 3, dtype=torch.float64)
    ours = torch.optim.SGD(adapter.parameters(), lr=0.1)
    theirs = torch.optim.SGD(plain.parameters(), lr=0.1)
    for _ in range(3):
        for net, optimiser in ((model, ours), (plain, theirs)):
            optimiser.zero_grad()
            (net(x) - target).square().mean().backward()
            optimiser.step()
    torch.testing.assert_close(model(x), plain(x))
    lk.merge(model, "default")
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), parameter)


def test_small_steps_are_heard_in_bfloat16() -> None:
    """P is added to W x and not to W, whose rounding would swallow it."""
    model = nn.Sequential(nn.Linear(256, 1, bias=False)).to(torch.bfloat16)
    with torch.no_grad():
        model[0].weight.fill_(0.0)
        model[0].weight[0, 0] = 1.0
    lk.attach(model, lk.Full(), target_modules=["0"])
    with torch.no_grad():
        model[0].deltas_of("default")[""].P[0, 0] = 2**-10
    x = torch.zeros(1, 256, dtype=torch.bfloat16)
    x[0, 0] = 1.0
    x[0, 1] = 0.0
    model[0].base.weight.data[0, 1] = -1.0
    x[0, 1] = 1.0
    assert model(x).item() == 2**-10
