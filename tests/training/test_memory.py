"""What the graph keeps under each `train.memory`, and that gradients are the same."""

from __future__ import annotations

import gc
import logging
import weakref

import pytest
import torch
import transformers as tf
from tests.training.tiny import llama, rows
from torch import Tensor, nn

import lorakit as lk
from lorakit.errors import LorakitError
from lorakit.train.step import fusion
from lorakit.train.step import memory as step_memory
from lorakit.train.step.attention import packed_attention
from lorakit.train.step.fusion import fused
from lorakit.train.step.loss import causal_loss
from lorakit.train.step.memory import offloading, recomputing
from lorakit.train.step.packing import pack


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function=None, **options: function or (lambda one: one))
    for name, empty in (("_compiled", {}), ("_met", set()), ("_plain", {})):
        monkeypatch.setattr(fusion, name, empty)
    monkeypatch.setattr(fusion, "find_obstacle", lambda device: None)


def adapted(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, lk.Adapter]:
    model = llama(dtype)
    adapter = lk.attach(model, lk.LoRA(rank=2))
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(std=0.1)
    return model.train(), adapter


def forward(model: nn.Module) -> Tensor:
    loss, _ = causal_loss(model, pack(rows(5, prefix=20)))
    return loss


def gradients(memory: str) -> dict[str, Tensor]:
    model, adapter = adapted()
    with fused(model), recomputing(model, memory), packed_attention(model):
        forward(model).backward()
    return {name: parameter.grad for name, parameter in adapter.named_parameters()}


@pytest.mark.parametrize("memory", ["balanced", "small"])
def test_gradients_are_the_same(memory: str) -> None:
    expected = gradients("fast")
    assert any(float(grad.abs().max()) > 0 for grad in expected.values())
    for name, found in gradients(memory).items():
        torch.testing.assert_close(found, expected[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("memory", "kept"), [("fast", True), ("balanced", False)])
def test_what_is_kept(memory: str, kept: bool) -> None:
    """After the forward pass the graph holds what norms and gates gave, or does not."""
    model, _ = adapted()
    seen: list[weakref.ref[Tensor]] = []

    def note(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        seen.append(weakref.ref(arguments[0]))

    block = model.model.layers[0]
    with fused(model), recomputing(model, memory), packed_attention(model):
        for part in (block.self_attn.q_proj, block.mlp.gate_proj, block.mlp.down_proj):
            part.register_forward_pre_hook(note)
        loss = forward(model)
        gc.collect()
        # The last three: the last block is tried out first.
        assert [one() is not None for one in seen[-3:]] == [kept] * 3
        loss.backward()


def test_an_input_that_was_written_to() -> None:
    model, _ = adapted()
    inputs: list[Tensor] = []
    with fused(model), recomputing(model, "balanced"), packed_attention(model):
        model.model.layers[0].post_attention_layernorm.register_forward_pre_hook(
            lambda module, arguments: inputs.append(arguments[0])
        )
        loss = forward(model)
        with torch.no_grad():
            inputs[-1].add_(1.0)
        with pytest.raises(LorakitError, match=r"FusedNorm cannot be recomputed .* use train.memory: fast"):
            loss.backward()


def test_a_model_without_such_parts_computes_blocks_again(caplog: pytest.LogCaptureFixture) -> None:
    config = tf.GPT2Config(vocab_size=61, n_positions=64, n_embd=24, n_layer=2, n_head=2)
    model = tf.GPT2LMHeadModel(config)
    with caplog.at_level(logging.INFO, "lorakit"), fused(model), recomputing(model, "balanced"):
        pass
    assert "every second block is recomputed" in caplog.text


def test_the_log_says_what_compiling_took() -> None:
    model, _ = adapted(torch.float32)
    with fused(model) as report, packed_attention(model):
        forward(model).backward()
    assert report.compiled > 0
    assert f"{report.norms} norms, {report.gates} gates; torch.compile made {report.compiled} kernel" in report.line()


def test_what_is_offloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Activations leave, each once however many functions keep it; weights and small tensors stay; gradients are the same."""
    moved: list[tuple[int, ...]] = []

    class Seen(step_memory._Away):
        def __init__(self, tensor: Tensor, device: torch.device) -> None:
            super().__init__(tensor, device)
            moved.append(tuple(tensor.shape))

    monkeypatch.setattr(step_memory, "_Away", Seen)
    expected = gradients("fast")
    model, adapter = adapted()
    with fused(model), offloading(model, 500), packed_attention(model):
        forward(model).backward()
    for name, parameter in adapter.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-9, atol=1e-12)
    assert moved
    assert min(torch.Size(shape).numel() for shape in moved) >= 500
    weights = {tuple(parameter.shape) for parameter in model.parameters()}
    assert not weights.intersection(moved)


def test_offload_is_for_a_gpu() -> None:
    model, _ = adapted()
    with pytest.raises(LorakitError, match="the model is on the host"), recomputing(model, "offload"):
        pass
