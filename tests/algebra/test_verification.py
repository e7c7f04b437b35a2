"""Merged against unmerged: exact in float32, told for bfloat16, and a model that keeps merged weights from acting is caught."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit.algebra.verification import _likeness
from lorakit.errors import LorakitError
from reference.models import MODELS, inputs, scramble, twin


def adapted(name: str = "llama", size: float = 0.2, method: Any = None, **options: Any) -> tuple[Any, Any]:
    model = twin(MODELS[name]()).float()
    adapter = lk.attach(model, method or lk.LoRA(rank=2), name="a", **options)
    scramble(adapter.named_parameters(), size=size)
    return model.eval(), adapter


@pytest.mark.parametrize(
    "method",
    [lk.LoRA(rank=2), lk.DoRA(inner=lk.LoRA(rank=2)), lk.IA3(feedforward_modules=("down_proj",)), lk.OFT(block_size=4)],
)
def test_float32_agrees(method: Any) -> None:
    model, adapter = adapted(method=method)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    found = lk.verify(adapter, [inputs("llama")])
    assert found.agrees
    assert found.harmless
    assert found.positions == 21
    assert found.layers == {}
    assert "Merging changes nothing: with a merged in float32" in found.words()
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())


def test_bfloat16_is_told_per_layer() -> None:
    """A change far below the steps of bfloat16 is lost in the merged weights, and the words say so."""
    _, large = adapted(size=0.5)
    _, small = adapted(size=0.001)
    first, second = (lk.verify(one, [inputs("llama")], dtype=torch.bfloat16) for one in (large, small))
    assert first.agrees
    assert second.agrees
    assert len(first.kept) == len(first.layers) == len(large.layers)
    assert max(first.kept.values()) < 0.1
    assert min(second.kept.values()) > 0.3
    assert min(second.layers.values()) > max(first.layers.values()) / 10
    assert "Merging in bfloat16 costs" in second.words()
    assert first.record()["dtype"] == "bfloat16"


def test_the_share_that_is_kept_is_that_of_the_weights() -> None:
    model, adapter = adapted(size=0.05, target_modules=["q_proj"])
    found = lk.verify(adapter, [inputs("llama")], dtype=torch.bfloat16)
    for path, _, delta in adapter.deltas():
        W = model.get_submodule(path).base.weight.detach().bfloat16().double()
        change = delta.dense(W).detach().double()
        held = (W + change).bfloat16().double() - W
        assert found.kept[path] == pytest.approx(float((held - change).norm() / change.norm()), rel=0.05)


class Stubborn(nn.Module):
    """A model that calls its layer only while it is adapted, and uses a copy of the base's weight else."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 5)
        self.register_buffer("copied", self.layer.weight.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        state = self._lorakit
        return self.layer(x) if state.routing.names else nn.functional.linear(x, self.copied, self.layer.bias)


def test_a_merge_that_does_not_act_is_caught() -> None:
    torch.manual_seed(0)
    model = Stubborn()
    adapter = lk.attach(model, lk.LoRA(rank=2), name="a", target_modules=["layer"])
    scramble(adapter.named_parameters())
    found = lk.verify(adapter, [{"x": torch.randn(4, 6)}])
    assert not found.agrees
    assert not found.harmless
    assert "Do NOT merge a: merged in float32" in found.words()


def test_padding_does_not_count() -> None:
    _, adapter = adapted()
    ids = inputs("llama")["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    assert lk.verify(adapter, [{"input_ids": ids, "attention_mask": mask}]).positions == 18


def test_the_numbers_of_a_likeness() -> None:
    right, other = torch.tensor([[2.0, 0.0], [0.0, 1.0]]).double(), torch.tensor([[2.0, 0.0], [1.0, 0.0]]).double()
    found = _likeness([right], [other])
    assert found.largest == 1.0
    assert found.relative == pytest.approx((2 / 5) ** 0.5)
    assert found.changed == 0.5
    p = torch.tensor([0.0, 1.0]).softmax(0)
    assert found.divergence == pytest.approx(float((p * (p / p.flip(0)).log()).sum()) / 2)


def test_what_is_wrong_is_said() -> None:
    model, adapter = adapted()
    for prompts in ([], ["text"]):
        with pytest.raises(LorakitError, match="prompts is a list of batches, not empty"):
            lk.verify(adapter, prompts)
    lk.detach(model)
    with pytest.raises(LorakitError, match="has been taken off"):
        lk.verify(adapter, [inputs("llama")])
