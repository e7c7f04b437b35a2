"""Blocks of the usual form run as one function, and only where that changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lorakit.serve.model import native
from lorakit.serve.model.batch import Run, assemble
from lorakit.serve.model.blocks import Block
from lorakit.serve.model.cache import Cache
from lorakit.serve.model.serving_model import ServingModel
from serving.small import model, prompt

pytestmark = pytest.mark.skipif(
    native.find("linear", torch.bfloat16) is None,
    reason="no C++ compiler, or a processor that does not multiply bfloat16",
)


def blocks(base: Any) -> list[str]:
    return [path for path, module in base.named_modules() if isinstance(vars(module).get("forward"), Block)]


@pytest.mark.parametrize(
    ("kind", "count"),
    [("llama", 2), ("qwen2", 2), ("gemma2", 0), ("gpt2", 0)],
    ids=["llama", "qwen2", "gemma2", "gpt2"],
)
def test_blocks_of_the_form_are_found_and_given_back(kind: str, count: int) -> None:
    base = model(kind).bfloat16()
    before = base(torch.tensor([prompt(1, 9)])).logits
    served = ServingModel(base)
    assert len(blocks(base)) == count
    assert torch.equal(base(torch.tensor([prompt(1, 9)])).logits, before), "outside of a step the model is what it was"
    served.close()
    assert blocks(base) == []
    assert torch.equal(base(torch.tensor([prompt(1, 9)])).logits, before)


def test_a_step_gives_the_same_bits_with_and_without() -> None:
    base = model().bfloat16()
    served = ServingModel(base)
    runs = [Run(prompt(n, count), 0, [2 * n, 2 * n + 1]) for n, count in enumerate((5, 1, 20))]
    found = []
    for _ in range(2):
        cache = Cache(served.shapes, 6, served.dtype, served.device)
        found.append(served.forward(assemble(runs, served.device, None), cache))
        for path in blocks(base):
            del base.get_submodule(path).forward
    assert torch.equal(*found)
    served.close()


def test_a_block_that_does_something_else_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: the parts have the usual names, and what comes of them is doubled."""
    base = model().bfloat16()
    kind = type(base.model.layers[0])
    usual = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, *args, **kwargs: 2 * usual(self, *args, **kwargs))
    served = ServingModel(base)
    assert blocks(base) == []
    served.close()
