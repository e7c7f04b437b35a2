"""Functions over a model's attention stack, and come off in any order."""

from __future__ import annotations

from typing import Any

import torch
from tests.training.tiny import llama

from lorakit.models.attention import Override


def override(name: str, calls: list[str]) -> Override:
    def attention(inner: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return inner(*args, **kwargs)

    return Override(name, attention)


def test_overrides_stack_and_come_off_in_any_order() -> None:
    calls: list[str] = []
    model: Any = llama(torch.float32)
    config, ids = model.config, torch.arange(5)[None]
    before, expected = config._attn_implementation_internal, model(ids).logits
    first, second = override("first", calls), override("second", calls)
    assert first.put_on(model)
    assert second.put_on(model)
    assert not first.put_on(model), "it has it already"
    assert torch.equal(model(ids).logits, expected)
    assert calls[:2] == ["second", "first"]
    first.take_off(model)
    calls.clear()
    assert torch.equal(model(ids).logits, expected)
    assert set(calls) == {"second"}
    assert second.is_on(model)
    assert not first.is_on(model)
    second.take_off(model)
    assert config._attn_implementation_internal == before
