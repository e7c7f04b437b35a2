"""The last block for the asked rows alone: the same gradients, and every reason to compute the others after all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.training.test_packed import build
from tests.training.tiny import Row, llama
from torch import Tensor, nn

import lorakit as lk
from lorakit.train.step import last_block
from lorakit.train.step.attention import packed_attention
from lorakit.train.step.loss import causal_loss
from lorakit.train.step.memory import recomputing
from lorakit.train.step.packing import PackedBatch, pack


def batch() -> PackedBatch:
    """Five rows behind a shared beginning, each with one label or two, more than one at the same place."""
    beginning = list(range(20))
    rows = [[*beginning, 30 + i, 40 + i, 50] for i in range(4)] + [[*beginning, 9]]
    return pack([Row(ids, [-100] * (len(ids) - 1 - i % 2) + ids[len(ids) - 1 - i % 2 :]) for i, ids in enumerate(rows)])


def adapted(model: Any) -> tuple[Any, lk.Adapter]:
    adapter = lk.attach(model, lk.LoRA(rank=2))
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(std=0.1)
    return model.train(), adapter


def rows_through(model: Any, memory: str = "fast") -> tuple[int, Tensor, dict[str, Tensor]]:
    """How many rows the last gated layer saw, the loss, the gradients of every trainable parameter."""
    seen: list[int] = []
    mlp = model.model.layers[-1].mlp
    plain = type(mlp).forward

    def watched(self: nn.Module, x: Tensor) -> Tensor:
        seen.append(x.shape[1])
        return plain(self, x)  # type: ignore[no-any-return]

    model.zero_grad()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(mlp), "forward", watched)
        with recomputing(model, memory), packed_attention(model):
            loss, _ = causal_loss(model, batch())
            count = seen[-1]
            loss.backward()
    return count, loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("memory", ["fast", "small"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral"])
def test_loss_and_gradients(name: str, memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = adapted(build(name))
    count, loss, found = rows_through(model, memory)
    assert count == last_block.MULTIPLE < batch().tokens
    monkeypatch.setattr(last_block, "SHARE", 0.0)
    whole, expected_loss, expected = rows_through(model, memory)
    assert whole == batch().tokens
    torch.testing.assert_close(loss, expected_loss, rtol=1e-10, atol=0)
    for key, grad in expected.items():
        torch.testing.assert_close(found[key], grad, rtol=1e-8, atol=1e-12, msg=key)


def test_a_block_that_is_more_than_its_parts_computes_every_row() -> None:
    """Granite scales what it adds: trying shows that the short way gives other rows."""
    model, _ = adapted(build("granite"))
    model.model.layers[-1].residual_multiplier = 0.5
    assert rows_through(model)[0] == batch().tokens


def test_other_parts_compute_every_row() -> None:
    assert last_block._block(build("gpt2").transformer) is None
    assert last_block._block(build("gemma2").model) is None


def test_a_hook_sees_every_row() -> None:
    model, _ = adapted(llama(torch.float64))
    seen: list[int] = []
    model.model.layers[-1].mlp.down_proj.register_forward_pre_hook(lambda module, x: seen.append(x[0].shape[1]))
    assert rows_through(model)[0] == batch().tokens
    assert seen == [batch().tokens]


def test_routing_by_rows_needs_every_row() -> None:
    model, adapter = adapted(llama(torch.float64))
    with lk.use(model, [adapter.name]):
        assert rows_through(model)[0] == batch().tokens


def test_evaluation_and_many_labels_compute_every_row() -> None:
    model, _ = adapted(llama(torch.float64))
    model.eval()
    assert rows_through(model)[0] == batch().tokens
    model.train()
    rows = [Row(list(range(18)), list(range(18)))]
    with packed_attention(model):
        packed = pack(rows)
        assert last_block.asked_rows(model.model, packed, lambda *_: pytest.fail("tried")) is packed


def test_everything_is_put_back() -> None:
    model, _ = adapted(llama(torch.float64))
    rows_through(model)
    assert "forward" not in vars(model.model.layers[-1])
