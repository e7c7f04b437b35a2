"""Another adapter's numbers in a live one: the same function as that adapter, at any rank, and nothing compiled again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

import lorakit as lk
from lorakit.errors import LorakitError
from reference.models import MODELS, assert_same, logits, scramble, twin

TARGETS = ["q_proj", "down_proj"]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def others(model: Any, targets: list[str] = TARGETS) -> list[Any]:
    made = [
        lk.attach(model, lk.LoRA(rank=2, alpha=7.0), name="two", target_modules=targets),
        lk.attach(model, lk.LoRA(rank=5, alpha=3.0, rslora=True), name="five", target_modules=targets[:1]),
        lk.attach(model, lk.AdaLoRA(rank=3), name="ada", target_modules=targets),
    ]
    for index, adapter in enumerate(made):
        scramble(adapter.named_parameters(), seed=index)
    return made


def compiled_slot() -> tuple[Any, Any, Any, list[Any]]:
    """A small model, the same compiled with a slot in use, the slot, and three adapters."""
    model = twin(MODELS["words"]())
    made = others(model, ["head", "body"])
    slot = lk.attach(model, lk.LoRA(rank=5, alpha=12.0), name="slot", target_modules=["head", "body"])
    compiled = torch.compile(model, backend="eager")
    logits(compiled, "words")
    return model, compiled, slot, made


def test_swapped_is_the_other_adapter_and_nothing_is_compiled_again() -> None:
    model, compiled, slot, made = compiled_slot()
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 0
    wanted = {}
    routing = model._lorakit.routing  # the very object: the compiled code is for this route
    for adapter in made:
        lk.activate(model, adapter.name)
        wanted[adapter.name] = logits(model, "words")
    model._lorakit.routing = routing
    with torch.compiler.set_stance("fail_on_recompile"):
        for adapter in [*made, made[0]]:
            lk.swap(slot, adapter)
            assert_same(logits(compiled, "words"), wanted[adapter.name])
    assert counters["stats"]["unique_graphs"] == graphs


def test_the_check_above_can_fail() -> None:
    """What a swap must not do: a scale of its own is a constant of the compiled code."""
    _, compiled, slot, _ = compiled_slot()
    for _, _, delta in slot.deltas():
        delta.scale = 2.5
    with torch.compiler.set_stance("fail_on_recompile"), pytest.raises(RuntimeError, match="recompile"):
        logits(compiled, "words")


def test_folders_and_whole_tensors(tmp_path: Path) -> None:
    model = twin(MODELS["llama"]())
    (two, *_), options = others(model), {"modules_to_save": ["norm"]}
    whole = lk.attach(model, lk.LoRA(rank=1), name="whole", target_modules=["down_proj"], **options)
    scramble(whole.named_parameters())
    for adapter in (two, whole):
        adapter.save(tmp_path / adapter.name)
    slot = lk.attach(model, lk.LoRA(rank=4), name="slot", target_modules=TARGETS, **options)
    for name in ("whole", "two", "whole"):
        for source in (tmp_path / name, lk.adapters(model)[name]):
            lk.swap(slot, source)
            with lk.use(model, name):
                wanted = logits(model, "llama")
            with lk.use(model, "slot"):
                torch.testing.assert_close(logits(model, "llama"), wanted)


def test_what_does_not_fit_is_refused_and_the_slot_stays(tmp_path: Path) -> None:
    model = twin(MODELS["llama"]())
    two, five, _ = others(model)
    wide = lk.attach(model, lk.LoRA(rank=2), name="wide", target_modules=["up_proj"])
    dora = lk.attach(model, lk.DoRA(inner=lk.LoRA(rank=2)), name="dora", target_modules=["q_proj"])
    norm = lk.attach(model, lk.LoRA(rank=2), name="norm", target_modules=["q_proj"], modules_to_save=["norm"])
    slot = lk.attach(model, lk.LoRA(rank=4), name="slot", target_modules=TARGETS)
    scramble(slot.named_parameters(), seed=9)
    before = {key: tensor.clone() for key, tensor in slot.state_dict().items()}
    norm.save(tmp_path / "norm")
    stranger = twin(MODELS["llama"]())
    with torch.no_grad():
        for parameter in stranger.parameters():
            parameter.mul_(1.5)
    lk.attach(stranger, lk.LoRA(rank=2), target_modules=TARGETS).save(tmp_path / "stranger")
    for adapter, words in (
        (five, "five has rank 5 at .*q_proj, and the slot 'slot' holds at most 4"),
        (wide, "wide changes .*up_proj .3 such., for which the slot 'slot' has no place"),
        (dora, "dora has no factors for .*; lk.resize"),
        (norm, r"norm holds its own model\.norm\.weight, for which the slot"),
        (tmp_path / "norm", r"norm holds its own base_model\.model\.model\.norm\.weight, for which the slot"),
        (tmp_path / "stranger", "was made for another base model"),
    ):
        with pytest.raises(LorakitError, match=words):
            lk.swap(slot, adapter)
    with pytest.raises(LorakitError, match="the slot 'dora' is dora; a plain LoRA"):
        lk.swap(dora, two)
    assert all(torch.equal(before[key], tensor) for key, tensor in slot.state_dict().items())


def test_choosing_among_a_hundred_is_one_assignment() -> None:
    model = twin(MODELS["words"]())
    for index in range(100):
        lk.attach(model, lk.LoRA(rank=1), name=f"a{index}", target_modules=["head"])
    layer = model.head
    before = {key: value for key, value in vars(layer).items() if key != "_modules"}
    lk.activate(model, "a57")
    assert layer.state.routing.names == ("a57",)
    assert {key: value for key, value in vars(layer).items() if key != "_modules"} == before
