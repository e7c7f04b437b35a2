"""The compiled pass over the tree of runs: what batched products in float64 give, for every shape it says it takes."""

from __future__ import annotations

import logging
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

from lorakit.native.choice import FORCED
from lorakit.train.step import attention, tree
from lorakit.train.step.attention import packed_attention
from lorakit.train.step.batched_attention import PackedAttention, plan_attention
from lorakit.train.step.loss import causal_loss, padded_loss
from lorakit.train.step.packing import PackedBatch, pack
from lorakit.train.step.support import packing_support
from lorakit.train.step.tree import TreeAttention

HERE = torch.randn(2, 16)


@dataclass(frozen=True)
class Example:
    input_ids: list[int]
    labels: list[int]


def batch(beginning: int, lengths: list[int]) -> PackedBatch:
    """Examples of so many tokens of their own behind a shared beginning, half of which hangs below a second one."""
    shared, nested = [1] * beginning, [2] * 20
    rows = [[*shared, *(nested if i % 2 else []), *range(100 * i, 100 * i + n)] for i, n in enumerate(lengths, 3)]
    return pack([Example(row, row) for row in rows])


@pytest.fixture(autouse=True)
def compiler() -> None:
    if tree.LIBRARY.obstacle is not None:
        pytest.skip("no C++ compiler here")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "width"), [((6, 2), 32), ((3, 3), 64), ((4, 1), 16), ((2, 2), 128)])
@pytest.mark.parametrize("window", [None, 7, 40])
@pytest.mark.parametrize(("beginning", "lengths"), [(37, [5, 1, 60, 33, 8]), (0, [130, 40]), (20, [3])])
def test_outputs_and_gradients(
    dtype: torch.dtype, heads: tuple[int, int], width: int, window: int | None, beginning: int, lengths: list[int]
) -> None:
    packed = batch(beginning, lengths)
    generator = torch.Generator().manual_seed(3)
    shapes = [(packed.tokens, count, width) for count in (heads[0], heads[1], heads[1])]
    given = [torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    grad = torch.randn(*shapes[0], generator=generator, dtype=torch.float64).to(dtype)
    grad[packed.used :] = 0

    plan = plan_attention(packed, *heads, width, window)
    expected = differentiate(
        lambda q, k, v: PackedAttention.apply(q, k, v, None, plan, 0.2, None, window),  # type: ignore[no-untyped-call]
        [one.double() for one in given],
        grad.double(),
        packed.used,
    )
    assert tree.suits(packed, given[0])
    found = differentiate(
        lambda q, k, v: TreeAttention.apply(q, k, v, packed, 0.2, window),  # type: ignore[no-untyped-call]
        given,
        grad,
        packed.used,
    )
    # Sums are in float32 throughout, and what comes out is rounded once.
    bound = 2e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
    for name, one, other in zip(("output", "q", "k", "v"), found, expected, strict=True):
        assert one.dtype == dtype
        assert float((one.double() - other).norm() / other.norm()) < bound, name


def forget() -> None:
    tree.LIBRARY.forget()
    tree._available.cache_clear()


def differentiate(run: Any, given: list[Tensor], grad: Tensor, used: int) -> list[Tensor]:
    """The output of the real rows, and the gradients of all."""
    leaves = [one.clone().requires_grad_() for one in given]
    out = run(*leaves)
    out.backward(grad)
    return [out.detach()[:used], *(leaf.grad for leaf in leaves)]


def test_rows_behind_the_last_token_give_nothing() -> None:
    packed = batch(37, [5, 9])
    assert packed.used < packed.tokens
    q = torch.randn(packed.tokens, 2, 16, requires_grad=True)
    out: Tensor = TreeAttention.apply(q, q.detach(), q.detach(), packed, 1.0, None)  # type: ignore[no-untyped-call]
    assert out[packed.used :].abs().max() == 0
    out.backward(torch.ones_like(out))
    assert q.grad is not None
    assert q.grad[packed.used :].abs().max() == 0


def test_the_same_threads_give_the_same_bits() -> None:
    packed = batch(30, [40, 10, 25, 33, 7])
    given = [torch.randn(packed.tokens, count, 16) for count in (4, 2, 2)]
    grad = torch.randn(packed.tokens, 4, 16)

    def once() -> list[Tensor]:
        run = lambda q, k, v: TreeAttention.apply(q, k, v, packed, 0.25, None)  # type: ignore[no-untyped-call]  # noqa: E731
        return differentiate(run, given, grad, packed.used)

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        first = once()
        for _ in range(5):
            assert all(torch.equal(a, b) for a, b in zip(first, once(), strict=True))
        torch.set_num_threads(1)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(first, once(), strict=True))
    finally:
        torch.set_num_threads(before)


def test_what_it_does_not_take() -> None:
    packed = batch(20, [3])
    assert tree.suits(packed, HERE)
    assert not tree.suits(packed, HERE.double())
    assert not tree.suits(packed, HERE.half())
    assert not tree.suits(packed, HERE[:, :8])
    assert not tree.suits(packed, HERE.to("meta"))


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_a_model_goes_that_way(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole model: the compiled pass is taken in every layer, and gradients are those of padded rows."""
    sizes: dict[str, Any] = {
        "vocab_size": 101, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "attention_dropout": 0.0,
        "pad_token_id": 0,
    }  # fmt: skip
    torch.manual_seed(1)
    if kind == "llama":
        model: Any = tf.LlamaForCausalLM(tf.LlamaConfig(**sizes))
    else:
        model = tf.MistralForCausalLM(tf.MistralConfig(**sizes, sliding_window=9))
    calls: list[str] = []
    call = tree.LIBRARY.call
    monkeypatch.setattr(tree.LIBRARY, "call", lambda name, *rest: calls.append(name) or call(name, *rest))
    assert packing_support(model) is None  # the trainer takes the flat path
    assert "attend" in calls
    rows = [[*range(1, 31), *range(40, 40 + n)] for n in (3, 30, 11)]
    examples = [Example(row, [-100] * 30 + row[30:]) for row in rows]
    with packed_attention(model):
        loss, _ = causal_loss(model, pack(examples))
        loss.backward()
    assert calls[-4:] == ["attend"] * 2 + ["attend_backward"] * 2
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    other, _ = padded_loss(model, examples)
    other.backward()
    assert float(loss.detach()) == pytest.approx(float(other.detach()), rel=1e-6)
    for name, parameter in model.named_parameters():
        assert torch.allclose(found[name], parameter.grad, rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("slow", ["tree", "torch"])
def test_long_rows_go_the_way_that_was_measured_to_be_the_faster(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, slow: str
) -> None:
    """Rows that share nothing have two ways; a planted slow one is avoided, and either can be forced."""
    calls: list[int] = []
    original = attention._attend_long
    monkeypatch.setattr(attention, "LONG", 7)
    monkeypatch.setattr(attention, "_attend_long", lambda *rest: calls.append(1) or original(*rest))
    packed = batch(0, [40])
    q = torch.randn(1, 2, packed.tokens, 16)
    layer: Any = torch.nn.Module()
    monkeypatch.setattr(attention, "_ways", {})
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path))

    def attend() -> Tensor:
        calls.clear()
        attention._ways.clear()
        return attention.packed_attention_forward(layer, q, q, q, None, packed_batch=packed)[0][:, : packed.used]

    found = []
    for way in ("torch", "tree"):
        monkeypatch.setenv(FORCED, f"attention={way}")
        found.append(attend())
        assert len(calls) == (way == "torch")
    assert torch.allclose(found[0], found[1], atol=1e-5)
    monkeypatch.delenv(FORCED)
    where = (attention, "_attend_long") if slow == "torch" else (tree.TreeAttention, "apply")
    usual = getattr(*where)
    monkeypatch.setattr(*where, lambda *rest: time.sleep(5e-2) or usual(*rest))
    attend()
    assert set(attention._ways.values()) == {"tree" if slow == "torch" else "torch"}


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Batched products take its place, and the log says why, once."""
    monkeypatch.setattr(shutil, "which", lambda name: None)
    forget()
    try:
        with caplog.at_level(logging.INFO, logger="lorakit.train"):
            assert not tree.suits(batch(20, [3]), HERE)
            assert not tree.suits(batch(20, [3]), HERE)
        assert [record.getMessage() for record in caplog.records] == [
            "attention runs in PyTorch, not in C++: no C++ compiler was found (g++, clang++)"
        ]
    finally:
        forget()
