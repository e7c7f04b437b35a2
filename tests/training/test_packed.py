"""The flat, prefix-sharing path against each example alone: hidden states, losses, gradients, refusals."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

from lorakit.errors import LorakitError
from lorakit.train.data.tokenise import IGNORED
from lorakit.train.step import attention, batched_attention, support
from lorakit.train.step.attention import is_packed, packed_attention, packed_hidden
from lorakit.train.step.batched_attention import PackedAttention, plan_attention
from lorakit.train.step.loss import PADDED, causal_loss, padded_loss
from lorakit.train.step.packing import pack
from lorakit.train.step.support import packing_support

VOCABULARY = 101


@dataclass(frozen=True)
class Example:
    input_ids: list[int]
    labels: list[int]


SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "attention_dropout": 0.0,
}
WINDOW = 9
MODELS: dict[str, Any] = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL)),
    "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**SMALL)),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**SMALL)),
    "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**SMALL, sliding_window=WINDOW)),
    "granite": lambda: tf.GraniteForCausalLM(tf.GraniteConfig(**SMALL, logits_scaling=4.0, attention_multiplier=0.3)),
    "cohere": lambda: tf.CohereForCausalLM(tf.CohereConfig(**SMALL, logit_scale=0.25)),
    "gpt2": lambda: tf.GPT2LMHeadModel(
        tf.GPT2Config(
            vocab_size=VOCABULARY, n_positions=256, n_embd=48, n_layer=2, n_head=6, attn_pdrop=0.0, resid_pdrop=0.0,
            embd_pdrop=0.0, bos_token_id=0, eos_token_id=0,
        )
    ),
    "gemma2": lambda: tf.Gemma2ForCausalLM(
        tf.Gemma2Config(
            **SMALL, sliding_window=WINDOW, attn_logit_softcapping=3.0, final_logit_softcapping=2.0,
            query_pre_attn_scalar=8, attn_implementation="eager",
        )
    ),
    "gemma3": lambda: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**SMALL, sliding_window=WINDOW, query_pre_attn_scalar=8)),
}  # fmt: skip

# The attention of the other side computes its softmax in fp32 whatever the model's dtype: agreement to fp32 only.
SINGLE = {"gemma2", "cohere"}


def build(name: str, dtype: torch.dtype = torch.float64) -> Any:
    """A tiny model with every weight random (norms and biases too), its norms in the model's own precision."""
    torch.manual_seed(5)
    model = MODELS[name]().to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    if dtype == torch.float64:
        for module in model.modules():
            if "RMSNorm" in type(module).__name__:
                _norm_in_double(module)
    return model.eval()


def _norm_in_double(module: nn.Module) -> None:
    eps = getattr(module, "variance_epsilon", None) or module.eps
    shift = 1.0 if "Gemma" in type(module).__name__ else 0.0

    def forward(x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * (module.weight + shift)  # type: ignore[operator]

    module.forward = forward  # type: ignore[method-assign, assignment]


def make_examples(labels_in_prefix: bool = False) -> list[Example]:
    """Two prefix groups, one nested, one example without company, one equal to another, one the prefix of others."""
    generator = torch.Generator().manual_seed(11)

    def run(length: int) -> list[int]:
        return torch.randint(1, VOCABULARY, (length,), generator=generator).tolist()

    first, second, nested = run(20), run(13), run(10)
    rows = [
        first + run(9),
        first + nested + run(3),
        first + nested + run(24),
        second + run(1),
        second + run(7),
        run(31),
    ]
    rows += [first + nested, list(rows[0]), run(1), run(2)]
    examples = []
    for row in rows:
        start = 0 if labels_in_prefix else min(len(row) - 1, max(1, len(row) - 6))
        examples.append(Example(row, [IGNORED] * start + row[start:]))
    return examples


def oracle(model: Any, examples: list[Example], smoothing: float = 0.0) -> Tensor:
    """The mean loss, each example alone and through nothing of lorakit."""
    total = torch.zeros((), dtype=torch.float64)
    count = 0
    for example in examples:
        logits = model(input_ids=torch.tensor([example.input_ids])).logits[0, :-1].double()
        labels = torch.tensor(example.labels[1:], dtype=torch.long)
        if (labels != IGNORED).any():
            total = total + nn.functional.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)
            count += int((labels != IGNORED).sum())
    return total / count


@functools.cache
def alone(name: str, labels_in_prefix: bool) -> tuple[float, dict[str, Tensor]]:
    """The loss and the gradients that `oracle` gives, which no way of packing changes."""
    model = build(name)
    value = oracle(model, make_examples(labels_in_prefix))
    return value.item(), gradients(model, value)


def gradients(model: Any, value: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    value.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], bound: float) -> None:
    """Each gradient within `bound` of the largest entry of all: some are zero by symmetry and hold rounding only."""
    assert found.keys() == expected.keys()
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        gap = float((found[name].double() - gradient.double()).abs().max())
        assert gap <= bound * scale, f"{name}: off by {gap:.2e} of {scale:.2e}"


@pytest.fixture(params=[256, 8])
def piece(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Runs whole, and runs cut into pieces."""
    monkeypatch.setattr(batched_attention, "PIECE", request.param)
    return request.param


@pytest.mark.parametrize("labels_in_prefix", [False, True])
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("name", list(MODELS))
def test_loss_and_gradients(name: str, share: bool, labels_in_prefix: bool, piece: int) -> None:
    model, examples = build(name), make_examples(labels_in_prefix)
    packed = pack(examples, share_prefix=share, minimum_shared=8)
    assert (packed.used < sum(map(len, packed.places))) == share
    with packed_attention(model):
        value, stats = causal_loss(model, packed)
        found = gradients(model, value)
    expected_value, expected = alone(name, labels_in_prefix)
    bound = 1e-6 if name in SINGLE else 1e-12
    assert value.item() == pytest.approx(expected_value, rel=bound)
    assert_same(found, expected, 10 * bound)
    assert stats.targets == sum(label != IGNORED for e in examples for label in e.labels[1:])


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "gemma2"])
def test_long_rows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long examples take torch's own attention, where softcap and windows let them."""
    calls = []
    original = attention._attend_long
    monkeypatch.setattr(attention, "LONG", 7)
    monkeypatch.setattr(attention, "_attend_long", lambda *args: calls.append(1) or original(*args))
    model, examples = build(name), make_examples(True)
    with packed_attention(model):
        found = gradients(model, causal_loss(model, pack(examples, share_prefix=False))[0])
    assert len(calls) == {"llama": 2, "gpt2": 2}.get(name, 0)
    assert_same(found, gradients(model, oracle(model, examples)), 1e-5 if name in SINGLE else 1e-11)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "gemma2"])
def test_padded_path_is_the_same(name: str, smoothing: float) -> None:
    # Eager attention in float64 gives NaN at padding that a window hides altogether, so Gemma 2 is compared in fp32.
    model, examples = build(name, torch.float32 if name in SINGLE else torch.float64), make_examples(True)
    flat, flat_stats = causal_loss(model, pack(examples, minimum_shared=8), label_smoothing=smoothing, num_items=17)
    padded, padded_stats = padded_loss(model, examples, label_smoothing=smoothing, num_items=17)
    bound = 1e-5 if name in SINGLE else 1e-10
    assert flat.item() == pytest.approx(padded.item(), rel=bound)
    assert flat.item() == pytest.approx(oracle(model, examples, smoothing).item() * flat_stats.targets / 17, rel=bound)
    assert flat_stats.targets == padded_stats.targets
    assert float(flat_stats.right) == float(padded_stats.right)
    assert float(flat_stats.total.detach()) == pytest.approx(float(padded_stats.total), rel=bound)


def test_every_hidden_state() -> None:
    model, examples = build("llama"), make_examples(True)
    packed = pack(examples, minimum_shared=8)
    with packed_attention(model), torch.no_grad():
        hidden = packed_hidden(model.model, packed)
    rows = [example.input_ids for example in examples]
    for row, place in zip(rows, packed.places, strict=True):
        alone = model.model(input_ids=torch.tensor([row])).last_hidden_state[0]
        torch.testing.assert_close(hidden[place], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool) -> None:
    model, packed = build("llama"), pack(make_examples(), minimum_shared=8)
    model.train()
    with packed_attention(model):
        expected = gradients(model, causal_loss(model, packed)[0])
        model.enable_input_require_grads()
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": reentrant})
        found = gradients(model, causal_loss(model, packed)[0])
    assert_same(found, expected, 1e-13)
    with pytest.raises(LorakitError, match="around forward and backward"):
        causal_loss(model, packed)


def test_bfloat16_gradients() -> None:
    """Forward and backward round each layer's activations some 20 times, at random, by up to half an eps each: the
    relative error of the whole gradient is of the order sqrt(20 * layers * 2) * eps, and both sides are off by it."""
    model, examples = build("llama", torch.bfloat16), make_examples()
    wide = build("llama", torch.float64)
    wide.load_state_dict({name: value.double() for name, value in model.state_dict().items()})
    found = gradients(model, causal_loss(model, pack(examples, minimum_shared=8))[0])
    expected = gradients(wide, oracle(wide, examples))
    gap = sum(float((found[name].double() - expected[name]).square().sum()) for name in expected) ** 0.5
    size = sum(float(expected[name].square().sum()) for name in expected) ** 0.5
    bound = (20 * model.config.num_hidden_layers * 2) ** 0.5 * torch.finfo(torch.bfloat16).eps
    assert gap <= bound * size
    planted = pack(examples, minimum_shared=8)
    planted = replace(planted, position_ids=planted.position_ids // 2)
    wrong = gradients(model, causal_loss(model, planted)[0])
    gap = sum(float((wrong[name].double() - expected[name]).square().sum()) for name in expected) ** 0.5
    assert gap > bound * size, "the bound must be able to fail"


# ---------------------------------------------------------------------------------------------------------------
# Attention by itself, in float64, against one dense masked softmax


def dense(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    fold = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(fold, 1), v.repeat_interleave(fold, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks[:, None, None].expand(-1, scores.shape[1], 1)], -1)
    p = scores.softmax(-1)[..., : k.shape[0]]
    return torch.einsum("hqk,khd->qhd", p, v)


@functools.cache
def visibility(window: int | None) -> Tensor:
    """Which token of the examples sees which, straight from the definition: one's own segment and those above, back to the
    window."""
    packed = pack(make_examples(), minimum_shared=8)
    segment_of = [node for node, segment in enumerate(packed.segments) for _ in range(segment.length)]
    position = packed.position_ids[0].tolist()
    visible = torch.zeros(packed.tokens, packed.tokens, dtype=torch.bool)
    for token in range(packed.used):
        node, line = segment_of[token], set()
        while node >= 0:
            line.add(node)
            node = packed.segments[node].parent
        for other in range(packed.used):
            distance = position[token] - position[other]
            visible[token, other] = (
                segment_of[other] in line and distance >= 0 and (window is None or distance < window)
            )
    visible[packed.used :, -1] = True
    return visible


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 1, 6, 25])
@pytest.mark.parametrize("heads", [(6, 2), (3, 3), (4, 1)])
def test_attention(heads: tuple[int, int], window: int | None, softcap: float | None, sinks: bool, piece: int) -> None:
    packed = pack(make_examples(), minimum_shared=8)
    generator = torch.Generator().manual_seed(2)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    q, k, v = draw(packed.tokens, heads[0], 5), draw(packed.tokens, heads[1], 5), draw(packed.tokens, heads[1], 5)
    sink = draw(heads[0]) if sinks else None
    weight = draw(packed.tokens, heads[0], 5).detach()
    weight[packed.used :] = 0
    plan = plan_attention(packed, *heads, 5, window)
    found = PackedAttention.apply(q, k, v, sink, plan, 0.4, softcap, window)
    expected = dense(q, k, v, visibility(window), 0.4, softcap, sink)
    torch.testing.assert_close(found[: packed.used], expected[: packed.used], rtol=1e-12, atol=1e-13)
    wanted = [q, k, v] + ([sink] if sink is not None else [])
    for one, other in zip(
        torch.autograd.grad((found * weight).sum(), wanted),
        torch.autograd.grad((expected * weight).sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


# ---------------------------------------------------------------------------------------------------------------
# Packing


def test_a_shared_run_lies_there_once() -> None:
    prefix = list(range(1, 21))
    rows = [[*prefix, 30 + i, 40 + i] for i in range(5)]
    packed = pack([Example(row, row) for row in rows], minimum_shared=16, row_multiple=1)
    assert packed.tokens == packed.used == 20 + 5 * 2
    assert sum(map(len, packed.places)) == 5 * 22
    # 19 targets inside the run, each wanted by all five; its last token predicts the five first own tokens.
    assert packed.weights.tolist().count(5.0) == 19
    assert (packed.hidden_index == 19).sum() == 5
    assert packed.num_targets == 5 * 21 == int(packed.weights.sum())


def test_short_runs_are_not_worth_it_unless_more_hangs_below() -> None:
    rows = [[1, 2, 3, 9], [1, 2, 3, *range(10, 30), 50], [1, 2, 3, *range(10, 30), 60]]
    packed = pack([Example(row, row) for row in rows], minimum_shared=16)
    assert [segment.length for segment in packed.segments] == [4, 23, 1, 1]
    assert pack([Example(row, row) for row in rows], share_prefix=False).used == sum(map(len, rows))


def test_what_cannot_be_packed() -> None:
    with pytest.raises(ValueError, match="no example has a token"):
        pack([Example([], [])])
    with pytest.raises(ValueError, match="3 tokens and 2 labels"):
        pack([Example([1, 2, 3], [1, 2])])


def test_no_labels_at_all_is_a_loss_of_zero() -> None:
    value, stats = causal_loss(build("llama"), pack([Example([1, 2, 3], [IGNORED] * 3)]))
    assert value.item() == 0.0
    assert stats.targets == 0


# ---------------------------------------------------------------------------------------------------------------
# Who may, who may not, and everything put back


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", list(MODELS))
def test_supported(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(5)
    model = MODELS[name]().to(dtype)
    assert packing_support(model) is None
    assert model.training
    assert not is_packed(model)


def hide_the_window() -> Any:
    """A model whose attention forgets to say that its layers slide; short examples cannot notice."""
    model = tf.MistralForCausalLM(tf.MistralConfig(**SMALL, sliding_window=100))
    model.config.sliding_window = None
    for layer in model.model.layers:
        layer.self_attn.config = copy.deepcopy(model.config)
    model.config.sliding_window = 100
    return model


REFUSED: dict[str, tuple[Any, str]] = {
    "falcon": (
        lambda: tf.FalconForCausalLM(
            tf.FalconConfig(vocab_size=VOCABULARY, hidden_size=48, num_hidden_layers=2, num_attention_heads=6)
        ),
        "",
    ),
    "bloom": (lambda: tf.BloomForCausalLM(tf.BloomConfig(vocab_size=VOCABULARY, hidden_size=48, n_layer=2, n_head=6)), ""),
    "bert": (
        lambda: tf.BertForMaskedLM(
            tf.BertConfig(vocab_size=VOCABULARY, hidden_size=48, num_hidden_layers=2, num_attention_heads=6,
                          intermediate_size=56)
        ),
        "",
    ),
    "t5": (
        lambda: tf.T5ForConditionalGeneration(
            tf.T5Config(vocab_size=VOCABULARY, d_model=48, d_ff=56, d_kv=8, num_layers=2, num_heads=6)
        ),
        "encoder-decoder",
    ),
    "mamba": (lambda: tf.MambaForCausalLM(tf.MambaConfig(vocab_size=VOCABULARY, hidden_size=48, num_hidden_layers=2)), ""),
    "dropout": (lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**{**SMALL, "attention_dropout": 0.1})), "set it to 0"),
    "window": (hide_the_window, "sliding windows"),
    "linear": (lambda: nn.Linear(3, 4), "not a transformers model"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(REFUSED))
def test_refused(name: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    make, words = REFUSED[name]
    torch.manual_seed(5)
    model = make()
    reason = packing_support(model)
    assert reason
    assert words in reason
    monkeypatch.setattr(support, "_find_reason", None)  # tried once
    with caplog.at_level("INFO", logger="lorakit.train"):
        assert support.choose_path(model) is PADDED
    assert f"padded batches ({reason})" in caplog.text


def test_other_calls_go_on_as_before() -> None:
    model, row = build("mistral"), torch.randint(1, VOCABULARY, (3, 30))
    mask = torch.ones_like(row)
    mask[1, 20:] = 0
    before = model.config._attn_implementation
    expected = model(input_ids=row, attention_mask=mask).logits
    with packed_attention(model):
        assert is_packed(model)
        assert torch.equal(model(input_ids=row, attention_mask=mask).logits, expected)
        causal_loss(model, pack(make_examples()))
        assert model.generate(row[:1], max_new_tokens=3, do_sample=False).shape == (1, 33)
    assert model.config._attn_implementation == before
    assert not is_packed(model)
    assert torch.equal(model(input_ids=row, attention_mask=mask).logits, expected)
    with pytest.raises(RuntimeError, match="planted"), packed_attention(model):
        raise RuntimeError("planted")
    assert model.config._attn_implementation == before
