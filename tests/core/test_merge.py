"""Writing adapters into the weights, for good and for a while; tied weights; what is refused, before anything changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

import lorakit as lk
from core import models
from core.models import IDS, randomise
from lorakit.core.delta import Method
from lorakit.core.layer import Adapted
from lorakit.errors import LorakitError
from lorakit.methods import DoRA

pytestmark = pytest.mark.usefixtures("one_thread")


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def adapted(model: Any, *names: str, **options: Any) -> Any:
    model = model.double()
    for name in names:
        randomise(lk.attach(model, lk.LoRA(rank=2), name=name, **options))
    return model


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(model: nn.Module, before: dict[str, Tensor]) -> bool:
    after = model.state_dict()
    return list(after) == list(before) and all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("make", [models.llama, models.gpt2, models.bert], ids=lambda make: make.__name__)
def test_merge_is_the_adapter_without_it(make: Any) -> None:
    model = adapted(make(), "one", bias="all" if make is models.bert else "none")
    acted = logits(model)
    report = lk.merge(model, "one")
    assert not any(isinstance(module, Adapted) for module in model.modules())
    assert lk.adapters(model) == {}
    assert torch.allclose(logits(model), acted, atol=1e-12)
    assert len(report.layers) == len(set(report.layers)) > 0
    assert set(report.error.values()) == {0.0}


def test_merge_of_whole_modules_and_a_blend() -> None:
    model = adapted(models.bert(), "one", "two", modules_to_save=["classifier"], bias="lora_only")
    blend = {"one": 0.75, "two": -0.5}
    lk.activate(model, blend)
    acted = logits(model)
    lk.merge(model, blend)
    assert torch.allclose(logits(model), acted, atol=1e-12)


def test_merging_one_leaves_the_other() -> None:
    model = adapted(models.llama(), "one", "two")
    with lk.use(model, {"one": 1.0, "two": 1.0}):
        both = logits(model)
    lk.merge(model, "one")
    assert list(lk.adapters(model)) == ["two"]
    with lk.use(model, "two"):
        assert torch.allclose(logits(model), both, atol=1e-12)


def test_merge_in_half_precision_rounds_once() -> None:
    """bfloat16 weights take W + ΔW as computed in float32, rounded once: to the nearest bfloat16."""
    model = nn.ModuleDict({"q": nn.Linear(16, 12)}).bfloat16()
    adapter = lk.attach(model, lk.LoRA(rank=2), target_modules=["q"])
    randomise(adapter)
    own = adapter.state_dict()
    expected = (model["q"].base.weight.float() + 8.0 * own["q.B"] @ own["q.A"]).bfloat16()
    lk.merge(model, "default")
    assert torch.equal(model["q"].weight, expected)


# -- for a while -----------------------------------------------------------------------------------------------------------


def test_merged_nests_and_restores_in_any_order_of_failure() -> None:
    model = adapted(models.llama(), "one", "two")
    before, objects = bits(model), dict(model.named_parameters())
    with lk.use(model, "one"):
        one = logits(model)
    with lk.use(model, {"one": 1.0, "two": 1.0}):
        both = logits(model)
    lk.activate(model, "two")

    def fails() -> None:
        with lk.merged(model, "one"):
            assert torch.allclose(logits(model), both, atol=1e-12)  # "two" stays active beside it
            with pytest.raises(LorakitError, match="merged into the weights"), lk.use(model, None):
                pass  # this is not the base
            with lk.merged(model, "two"):
                assert torch.allclose(logits(model), both, atol=1e-12)
                raise KeyError("anything")

    with pytest.raises(KeyError):
        fails()
    assert same(model, before)
    assert all(parameter is objects[name] for name, parameter in model.named_parameters())
    with lk.merged(model, "one"), lk.merged(model, "two"):
        assert torch.allclose(logits(model), both, atol=1e-12)
    with lk.use(model, None), lk.merged(model, "one"):  # switched off before, "two" does not act beside it
        assert torch.allclose(logits(model), one, atol=1e-12)
    assert same(model, before)
    assert all(parameter is objects[name] for name, parameter in model.named_parameters())


@pytest.mark.parametrize("method", [lk.LoRA(rank=2), DoRA(inner=lk.LoRA(rank=2))], ids=["lora", "dora"])
@pytest.mark.parametrize("make", [models.bert, models.gpt2], ids=lambda make: make.__name__)
def test_others_add_to_what_is_merged(make: Any, method: Method) -> None:
    """Active or merged inside, an adapter adds what it adds to the frozen base: biases, modules and magnitudes too."""
    model = make().double()
    whole = ["classifier"] if make is models.bert else ["ln_f"]
    for name in ("one", "two"):
        randomise(
            lk.attach(
                model, method, name=name, modules_to_save=whole, bias="all" if whole == ["classifier"] else "none"
            )
        )
    before = bits(model)
    with lk.use(model, {"one": 1.0, "two": 0.5}):
        both = logits(model)
    with lk.merged(model, "one"), lk.use(model, {"two": 0.5}):
        assert torch.allclose(logits(model), both, atol=1e-12)
    with lk.merged(model, "one"), lk.merged(model, {"two": 0.5}):
        assert torch.allclose(logits(model), both, atol=1e-12)
    with lk.merged(model, "one"), lk.use(model, [{"two": 0.5}] * 3):
        assert torch.allclose(logits(model), both, atol=1e-12)
    assert same(model, before)
    assert not any(module.unmerged for module in model.modules() if isinstance(module, Adapted))


def test_what_is_merged_cannot_be_routed_detached_or_merged_again() -> None:
    model = adapted(models.llama(), "one", "two")
    before = bits(model)
    with lk.merged(model, "one"):
        for attempt in (
            lambda: lk.activate(model, "one"),
            lambda: lk.activate(model, ["two", "one", None]),
            lambda: lk.detach(model, "one"),
            lambda: lk.detach(model),
            lambda: lk.merged(model, "one").__enter__(),
            lambda: lk.merge(model, "one"),
            lambda: lk.merge(model, "two"),
        ):
            with pytest.raises(LorakitError, match="merged"):
                attempt()
    assert same(model, before)
    assert list(lk.adapters(model)) == ["one", "two"]


def test_merged_rows_keep_the_rows_of_others() -> None:
    model = adapted(models.llama(), "one", "two")
    lk.activate(model, ["two", None, {"two": 0.5, "one": 1.0}])
    with lk.use(model, [{"two": 1.0, "one": 1.0}, "one", {"two": 0.5, "one": 1.0}]):
        expected = logits(model)
    with lk.merged(model, "one"):
        assert torch.allclose(logits(model), expected, atol=1e-12)


# -- refusals --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_adapter_is_not_merged(value: float) -> None:
    model = adapted(models.llama(), "one")
    last = list(lk.adapters(model)["one"].parameters())[-1]
    with torch.no_grad():
        last[0, 0] = value
    before = bits(model)
    for attempt in (lambda: lk.merge(model, "one"), lambda: lk.merged(model, "one").__enter__()):
        with pytest.raises(LorakitError, match="NaN or an infinity"):
            attempt()
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items() if v.isfinite().all())
    assert list(lk.adapters(model)) == ["one"]


def test_an_overflow_in_half_precision_is_refused_and_nothing_written() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)}).half()
    adapter = lk.attach(model, lk.LoRA(rank=2), target_modules=["a", "b"])
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            parameter.fill_(300.0 if name.startswith("b") else 0.5)
    before = bits(model)
    for attempt in (lambda: lk.merge(model, "default"), lambda: lk.merged(model, "default").__enter__()):
        with pytest.raises(LorakitError, match=r"b\.weight would hold"):
            attempt()
        assert same(model, before)


@pytest.mark.parametrize(
    ("route", "said"),
    [
        (["one", None], "per row"),
        (None, "no adapter was named"),
        ("eno", 'adapter "eno"'),
        ({}, "no adapter was named"),
    ],
)
def test_routes_that_are_no_weight(route: Any, said: str) -> None:
    model = adapted(models.llama(), "one")
    for attempt in (lambda: lk.merge(model, route), lambda: lk.merged(model, route).__enter__()):
        with pytest.raises(LorakitError, match=said):
            attempt()


# -- tied weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_a_tied_weight_needs_untie(target: str, tmp_path: Path) -> None:
    """The adapter acts in one place; merging must not change the other, and files must keep both."""
    model = adapted(models.llama(tied=True), "one", target_modules=[target])
    assert model.lm_head is not None
    acted, before = logits(model), bits(model)
    with pytest.raises(LorakitError, match="untie=True"):
        lk.merge(model, "one")
    assert same(model, before)
    lk.merge(model, "one", untie=True)
    assert torch.allclose(logits(model), acted, atol=1e-12)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    again = tf.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_merged_unties_for_a_while(target: str) -> None:
    model = adapted(models.llama(tied=True), "one", target_modules=[target])
    acted, before = logits(model), bits(model)
    with lk.merged(model, "one"):
        assert torch.allclose(logits(model), acted, atol=1e-12)
    assert same(model, before)
    lk.detach(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings


def test_a_merged_model_saves_and_loads_as_any_other(tmp_path: Path) -> None:
    model = adapted(models.gpt2(), "one")
    lk.merge(model, "one")
    model.save_pretrained(tmp_path)
    again = tf.GPT2LMHeadModel.from_pretrained(tmp_path, dtype=torch.float64)
    assert torch.equal(logits(again), logits(model))
