"""Fused small functions: the same values and gradients as the modules they stand for, and everything put back.

Compiling takes seconds, so most tests run the functions uncompiled (they are plain PyTorch); one test compiles.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from tests.training.test_packed import MODELS, build, gradients, make_examples, oracle
from torch import Tensor, nn

from lorakit.native import replacement
from lorakit.train.step import fusion
from lorakit.train.step.fusion import FusedGate, FusedNorm, FusedRotary, fused
from lorakit.train.step.loss import causal_loss
from lorakit.train.step.packing import pack


def draw(*shape: int) -> Tensor:
    return torch.randn(
        *shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64
    ).requires_grad_()


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    # Other libraries use it as a decorator factory when they are imported meanwhile.
    monkeypatch.setattr(torch, "compile", lambda function=None, **options: function or (lambda one: one))
    monkeypatch.setattr(fusion, "_compiled", {})
    monkeypatch.setattr(fusion, "_met", set())
    monkeypatch.setattr(fusion, "_plain", {})


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_norm(shift: float) -> None:
    x, weight = draw(2, 3, 7), draw(7)
    assert torch.autograd.gradcheck(lambda x, w: FusedNorm.apply(x, w, 1e-5, shift), (x, weight))
    expected = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * (weight + shift)
    torch.testing.assert_close(FusedNorm.apply(x, weight, 1e-5, shift), expected)


@pytest.mark.parametrize(
    ("kind", "activation"),
    [("silu", torch.nn.functional.silu), ("gelu_tanh", lambda x: torch.nn.functional.gelu(x, approximate="tanh"))],
)
def test_gate(kind: str, activation: Callable[[Tensor], Tensor]) -> None:
    gate, up = draw(2, 3, 7), draw(2, 3, 7).mul(1.3).detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda g, u: FusedGate.apply(g, u, kind), (gate, up))
    torch.testing.assert_close(FusedGate.apply(gate, up, kind), activation(gate) * up)


def test_rotary() -> None:
    x, cos, sin = draw(5, 3, 8), draw(5, 8).detach(), draw(5, 8).mul(0.7).detach()
    assert torch.autograd.gradcheck(lambda x: FusedRotary.apply(x, cos, sin), (x,))


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "gemma2", "gemma3", "gpt2", "granite"])
def test_models(name: str, uncompiled: None) -> None:
    torch.manual_seed(5)
    model: Any = MODELS[name]()
    expected_value = oracle(model.eval(), make_examples())
    expected = gradients(model, expected_value)
    with fused(model) as report:
        assert report.reason is None
        value, _ = causal_loss(model, pack(make_examples(), minimum_shared=8))
        found = gradients(model, value)
    assert not report.failed
    assert value.item() == pytest.approx(expected_value.item(), rel=1e-5)
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    for key, gradient in expected.items():
        assert float((found[key] - gradient).abs().max()) <= 1e-4 * scale, key
    if name != "gpt2":
        layers = model.config.num_hidden_layers
        assert report.gates == layers
        assert report.norms >= 2 * layers + 1
        assert report.rotaries == 1


def test_everything_is_put_back(uncompiled: None) -> None:
    model: Any = MODELS["llama"]()
    modelling = tf.models.llama.modeling_llama
    before = modelling.apply_rotary_pos_emb
    with fused(model):
        assert modelling.apply_rotary_pos_emb is not before
        assert "forward" in vars(model.model.norm)
    assert modelling.apply_rotary_pos_emb is before
    with pytest.raises(RuntimeError, match="planted"), fused(model):
        raise RuntimeError("planted")
    assert modelling.apply_rotary_pos_emb is before
    assert not any("forward" in vars(module) for module in model.modules())
    assert fusion._report is None


def test_training_and_serving_give_the_rotary_function_back_in_any_order() -> None:
    model: Any = MODELS["llama"]()
    modelling = tf.models.llama.modeling_llama
    before, ids = modelling.apply_rotary_pos_emb, torch.arange(5)[None]
    expected, calls = model(ids).logits, []

    def turn(name: str) -> replacement.Turn:
        def passes_it_on(*tensors: Tensor) -> None:
            calls.append(name)

        return passes_it_on

    first, second = (
        replacement.replace(model, lambda norm: None, lambda gated: None, turn(name)) for name in ("first", "second")
    )
    assert torch.equal(model(ids).logits, expected)
    assert calls[:2] == ["first", "second"]
    first.restore()
    calls.clear()
    assert torch.equal(model(ids).logits, expected)
    assert set(calls) == {"second"}
    second.restore()
    assert modelling.apply_rotary_pos_emb is before


def test_a_module_that_only_looks_like_one_is_left_alone(uncompiled: None) -> None:
    model: Any = MODELS["llama"]()
    kind = type(model.model.norm)

    class OddRMSNorm(kind):  # type: ignore[misc, valid-type]
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 1.5  # type: ignore[no-any-return]

    model.model.norm.__class__ = OddRMSNorm
    with fused(model) as report:
        assert "forward" not in vars(model.model.norm)
        assert report.norms == 2 * model.config.num_hidden_layers


@pytest.mark.parametrize(
    "problem", [KeyError("layer_idx"), AttributeError("config"), None], ids=["key", "attribute", "tuple"]
)
def test_what_raises_when_it_is_tried_is_left_alone(
    problem: Exception | None, uncompiled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trial that fails in any way means "not this way", and the run goes on (gpt-oss)."""
    model: Any = MODELS["llama"]()

    def fails(x: Tensor, *_: Any) -> Any:
        if problem is not None:
            raise problem
        return (x,)

    class AskingRMSNorm(type(model.model.norm)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Any:
            return fails(super().forward(x))

    class Asking(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return fails(x)

    model.model.norm.__class__ = AskingRMSNorm
    model.model.layers[0].mlp.act_fn = Asking()
    monkeypatch.setattr(sys.modules[type(model).__module__], "apply_rotary_pos_emb", fails)
    with fused(model) as report:
        assert "forward" not in vars(model.model.norm)
        assert "forward" not in vars(model.model.layers[0].mlp)
        assert report.norms == 2 * model.config.num_hidden_layers
        assert report.gates == model.config.num_hidden_layers - 1
        assert report.rotaries == 0


def test_no_compiler_means_off(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(fusion, "find_obstacle", lambda device: "no C++ compiler was found")
    model: Any = MODELS["llama"]()
    with caplog.at_level("INFO", logger="lorakit.train.step.fusion"), fused(model) as report:
        assert report.reason == "no C++ compiler was found"
        assert not any("forward" in vars(module) for module in model.modules())
        causal_loss(model, pack(make_examples()))
    assert "no C++ compiler was found" in caplog.text


def test_what_does_not_compile_runs_unfused(
    uncompiled: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(function: Any, **options: Any) -> Any:
        def run(*args: Any) -> Any:
            raise RuntimeError("planted")

        return run

    monkeypatch.setattr(torch, "compile", broken)
    model = build("llama")
    expected = oracle(model, make_examples())
    with fused(model) as report:
        value, _ = causal_loss(model, pack(make_examples(), minimum_shared=8))
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    assert "softmax_joined" in report.failed
    assert "planted" in caplog.text


@pytest.mark.slow
def test_compiled() -> None:
    if fusion.find_obstacle(torch.device("cpu")) is not None:
        pytest.skip("no compiler here")
    torch.manual_seed(5)
    model: Any = MODELS["llama"]()
    expected = gradients(model, oracle(model.eval(), make_examples()))
    with fused(model) as report:
        value, _ = causal_loss(model, pack(make_examples(), minimum_shared=8))
        found = gradients(model, value)
    assert not report.failed
    assert report.compile_seconds > 0
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    for key, gradient in expected.items():
        assert float((found[key] - gradient).abs().max()) <= 1e-4 * scale, key
