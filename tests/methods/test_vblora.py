"""VB-LoRA: its formula, the selection, and PEFT's two kinds of file."""

import dataclasses
from pathlib import Path

import peft
import pytest
import torch
from torch import nn

import lorakit as lk
from lorakit.errors import LorakitError
from lorakit.files.formats import format_of
from methods.peft_files import TARGETS, Net, from_peft, inputs

SPEC = lk.VBLoRA(rank=2, num_vectors=7, vector_length=4)


def attached(spec: lk.VBLoRA = SPEC) -> tuple[nn.Module, lk.Adapter]:
    torch.manual_seed(2)
    model = Net().double()
    return model, lk.attach(model, spec, target_modules=TARGETS)


@pytest.mark.parametrize("topk", [1, 2, 7])
def test_formula(topk: int):
    """Every piece is Σ softmax(the topk largest logits) · their vectors; topk = h is a softmax over the whole bank."""
    _, adapter = attached(dataclasses.replace(SPEC, topk=topk))
    bank = adapter.pool.vblora_vector_bank
    for _, site, delta in adapter.deltas():
        nn.init.normal_(delta.logits_A)
        nn.init.normal_(delta.logits_B)
        B, A = torch.empty(site.layout.shape.out, 2).double(), torch.empty(2, site.layout.shape.in_).double()
        for r in range(2):
            for matrix, logits in ((A[r], delta.logits_A[r]), (B[:, r], delta.logits_B[:, r])):
                for piece in range(logits.shape[0]):
                    best = logits[piece].argsort(descending=True)[:topk]
                    weights = logits[piece][best].exp() / logits[piece][best].exp().sum()
                    matrix[piece * 4 : piece * 4 + 4] = (weights[:, None] * bank[best]).sum(0).detach()
        torch.testing.assert_close(delta.dense(torch.empty(0)), B @ A)


def test_counts_and_start():
    model, adapter = attached()
    logits = sum(7 * 2 * (out + in_) // 4 for out, in_ in ((12, 8), (16, 12), (8, 16)))
    assert adapter.num_parameters(trainable=True) == logits + 7 * 4
    y, base = model(inputs().double()), Net().double()(inputs().double())
    assert 0 < (y - base).abs().max() < 1e-2 * base.abs().max()


def test_gradients_reach_the_selected_alone_and_the_bank_from_all_layers():
    model, adapter = attached()
    model(inputs().double()).square().sum().backward()
    for _, _, delta in adapter.deltas():
        for logits in (delta.logits_A, delta.logits_B):
            assert torch.equal((logits.grad != 0).sum(-1), torch.full(logits.shape[:-1], 2))
    assert (adapter.pool.vblora_vector_bank.grad.abs().sum(1) > 0).all()


def test_pefts_selections(tmp_path: Path):
    """A file of the selected vectors and weights acts the same; its logits are gone, so they do not train."""
    config = peft.VBLoRAConfig(
        r=2, num_vectors=7, vector_length=4, topk=3, target_modules=TARGETS, save_only_topk_weights=True
    )
    model, adapter = from_peft(config, tmp_path / "theirs")
    adapter.requires_grad_(True)
    lk.activate(model, "one")
    assert [name for name, p in adapter.named_parameters() if p.requires_grad] == ["pool.vblora_vector_bank"]
    before = model(inputs())
    adapter.save(tmp_path / "again")
    again = Net()
    lk.load(again, tmp_path / "again", name="one")
    with lk.use(again, "one"):
        torch.testing.assert_close(again(inputs()), before)


def test_a_selection_with_a_zero_weight_and_a_bad_one():
    spec = dataclasses.replace(SPEC, topk=2, fixed_selection=True)

    def logits(**tensors: torch.Tensor):
        return format_of("vb-lora").from_file(spec, {f"a.x_{name}": one for name, one in tensors.items()}, {}, ())

    read = logits(topk_indices=torch.tensor([[3, 1]], dtype=torch.uint8), topk_weights=torch.ones(1, 1))
    top, indices = read["a.x"].topk(2)
    assert indices.tolist() == [[3, 1]]
    assert top.softmax(-1).tolist() == [[1.0, 0.0]]
    with pytest.raises(LorakitError, match="selects vector 7"):
        logits(topk_indices=torch.tensor([[7, 1]]), topk_weights=torch.ones(1, 1))
    with pytest.raises(LorakitError, match="sum to 1"):
        logits(topk_indices=torch.tensor([[3, 1]]))


def test_refusals():
    with pytest.raises(
        LorakitError, match=r"vector_length 5 does not divide both sides of first \(12 × 8\).*1, 2, 4 would"
    ):
        attached(lk.VBLoRA(vector_length=5))
    with pytest.raises(LorakitError, match="topk 9 of num_vectors 8"):
        lk.VBLoRA(num_vectors=8, topk=9)
    with pytest.raises(LorakitError, match="bank_bound"):
        lk.VBLoRA(bank_bound=0.0)
