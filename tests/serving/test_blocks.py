"""Blocks of the usual form run as one function, and only where that changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lorakit as lk
from lorakit.native.choice import FORCED
from lorakit.serve.model import native
from lorakit.serve.model.batch import Run, assemble, mix
from lorakit.serve.model.blocks import Block
from lorakit.serve.model.cache import Cache
from lorakit.serve.model.packed import AdapterReader, PackedAdapter
from lorakit.serve.model.serving_model import ServingModel
from serving.small import model, prompt, write_adapter

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


@pytest.mark.parametrize("adapted", [False, True])
def test_a_step_gives_the_same_bits_with_and_without(
    adapted: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """All blocks in one call, block by block, and module by module; for few tokens, and for many."""
    monkeypatch.setenv(FORCED, "linear=panels")
    base = model().bfloat16()
    blends: list[list[tuple[PackedAdapter, float]]] = [[], [], [], []]
    if adapted:
        one = AdapterReader(base).read("one", write_adapter(base, tmp_path / "one", lk.LoRA(rank=3)))
        blends = [[(one, 1.0)], [], [(one, 0.5)], [(one, 1.0)]]
    served = ServingModel(base)
    own = [vars(base.get_submodule(path))["forward"] for path in blocks(base)]
    assert len({id(block.stack) for block in own}) == 1
    assert own[0].stack is not None
    stack, calls = own[0].stack, []
    compute = stack.compute
    monkeypatch.setattr(stack, "compute", lambda *args: (calls.append(1), compute(*args))[1])
    for counts in ((5, 1, 20, 9), (70, 30, 1, 2)):
        runs = [
            Run(prompt(n, count), 0, list(range(5 * n, 5 * n + 5)), blend, wanted=1)
            for n, (count, blend) in enumerate(zip(counts, blends, strict=True))
        ]
        found = []
        for way in range(3):
            cache = Cache(served.shapes, 20, served.dtype, served.device)
            for path, block in zip(blocks(base), own, strict=False):
                block.stack = None if way else stack
                if way == 2:
                    del base.get_submodule(path).forward
            found.append(served.forward(assemble(runs, served.device, mix(blends)), cache))
        for block, module in zip(own, base.model.layers, strict=True):
            module.forward = block
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])
    assert len(calls) == 2
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
