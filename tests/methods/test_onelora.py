"""1LoRA: the sum of the inputs times a vector."""

import torch
from torch import nn

import lorakit as lk


def test_formula_and_gradient():
    """y = W x + b + (Σ_j x_j) v; the gradient of v is the upstream one times the sums; only `out` numbers train."""
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(6, 4)).double()
    x = torch.randn(7, 6).double()
    base = model(x)
    adapter = lk.attach(model, lk.OneLoRA(), target_modules=["0"])
    ((_, _, delta),) = adapter.deltas()
    assert torch.equal(model(x), base)
    nn.init.normal_(delta.v)
    torch.testing.assert_close(model(x), base + x.sum(1, keepdim=True) * delta.v)
    towards = torch.randn(7, 4).double()
    model(x).backward(towards)
    torch.testing.assert_close(delta.v.grad, (x.sum(1, keepdim=True) * towards).sum(0))
    assert adapter.num_parameters(trainable=True) == 4
    assert torch.linalg.matrix_rank(delta.dense(torch.empty(0))) == 1


def test_is_lora_of_rank_one_with_ones():
    model = nn.Sequential(nn.Linear(6, 4)).double()
    ((_, _, one),) = lk.attach(model, lk.OneLoRA(), name="one", target_modules=["0"]).deltas()
    ((_, _, lora),) = lk.attach(model, lk.LoRA(rank=1, alpha=1.0), name="lora", target_modules=["0"]).deltas()
    nn.init.normal_(one.v)
    lora.set_factors(one.v[:, None], torch.ones(1, 6))
    torch.testing.assert_close(one.dense(torch.empty(0)), lora.dense(torch.empty(0)))
