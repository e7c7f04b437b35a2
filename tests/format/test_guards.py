"""The thresholds of the base's fingerprint, each with what it must refuse, what it must let pass, and both sides planted wrong.

A threshold that nothing holds can be moved by anybody: with `DIFFERING` at 0.5, a base of which a third of the layers was tuned
further would have passed as the one that the adapter was made for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from torch import nn

import lorakit as lk
from lorakit.errors import LorakitError
from lorakit.files import fingerprint


def base(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(*(nn.Linear(12, 12) for _ in range(12)))


def layers_tuned(count: int) -> Callable[[nn.Sequential], None]:
    """The last `count` of twelve layers moved by some percent, as further fine-tuning does."""

    def change(model: nn.Sequential) -> None:
        for layer in list(model)[len(model) - count :]:
            layer.weight.mul_(1 + 0.05 * torch.randn_like(layer.weight))

    return change


def rounded(model: nn.Sequential) -> None:
    for layer in model:
        layer.weight.copy_(layer.weight.half().to(torch.bfloat16))


def few_numbers(model: nn.Sequential) -> None:
    """Three sampled numbers of some five hundred are others, as a tool that rewrites a few entries leaves them."""
    for layer in list(model)[:3]:
        layer.weight.view(-1)[0] += 0.1


def accepted(change: Callable[[nn.Sequential], None], folder: Path) -> bool:
    """Whether an adapter made for the base is let onto the changed one."""
    adapter = lk.attach(base(), lk.LoRA(rank=2), name="a", target_modules=r"\d+")
    adapter.save(folder)
    other = base()
    with torch.no_grad():
        change(other)
    try:
        lk.load(other, folder)
    except LorakitError as refused:
        if "made for another base model" not in str(refused):
            raise
        return False
    return True


@contextmanager
def planted(name: str, value: float) -> Iterator[None]:
    before = getattr(fingerprint, name)
    setattr(fingerprint, name, value)
    try:
        yield
    finally:
        setattr(fingerprint, name, before)


REFUSED = {"a third of the layers tuned": layers_tuned(4), "one layer of twelve tuned": layers_tuned(1)}
PASSED = {"rounded": rounded, "the same": layers_tuned(0), "three numbers": few_numbers}


@pytest.mark.parametrize("change", REFUSED.values(), ids=REFUSED)
def test_a_tuned_base_is_refused(change: Callable[[nn.Sequential], None], tmp_path: Path) -> None:
    assert not accepted(change, tmp_path)


@pytest.mark.parametrize("change", PASSED.values(), ids=PASSED)
def test_the_same_base_passes(change: Callable[[nn.Sequential], None], tmp_path: Path) -> None:
    assert accepted(change, tmp_path)


def test_a_looser_threshold_would_be_seen(tmp_path: Path) -> None:
    with planted("DIFFERING", 0.5):
        assert accepted(REFUSED["a third of the layers tuned"], tmp_path)
    with planted("DIFFERING", 0.1):
        assert accepted(REFUSED["one layer of twelve tuned"], tmp_path)


def test_a_tighter_threshold_would_be_seen(tmp_path: Path) -> None:
    with planted("DIFFERING", -1.0):
        assert not accepted(PASSED["the same"], tmp_path)
    with planted("DIFFERING", 0.0):
        assert not accepted(PASSED["three numbers"], tmp_path)


def test_a_smaller_sample_would_be_seen(tmp_path: Path) -> None:
    """The sample has numbers of every layer, so that one tuned layer shows."""
    model = base()
    adapter = lk.attach(model, lk.LoRA(rank=2), target_modules=r"\d+")
    assert len(fingerprint.fingerprint(adapter)["sample"]) >= fingerprint.SAMPLES - 12
    assert fingerprint.SAMPLES >= 256


def quantised(bits: int, of: nn.Sequential) -> dict[str, object]:
    """The fingerprint of a copy whose weights have so many bits, said to be held that way."""
    with torch.no_grad():
        for layer in of:
            step = layer.weight.abs().max() / 2 ** (bits - 1)
            layer.weight.copy_((layer.weight / step).round() * step)
    return {**_print(of), "storage": [f"{bits} bits"]}


def _print(model: nn.Sequential) -> dict[str, object]:
    adapter = lk.attach(model, lk.LoRA(rank=2), target_modules=r"\d+")
    return fingerprint.fingerprint(adapter)


def test_likeness_tells_a_quantised_copy_from_another_model() -> None:
    floats = _print(base())
    for bits in (3, 4, 8):
        assert fingerprint.disagreement(floats, quantised(bits, base())) == ""
    other = quantised(4, base(seed=1))
    assert "agree to" in (fingerprint.disagreement(floats, other) or "")
    half = base(seed=1)
    half.load_state_dict(
        {key: value for key, value in base().state_dict().items() if int(key.partition(".")[0]) % 2}, strict=False
    )
    mixed = quantised(4, half)
    assert "agree to" in (fingerprint.disagreement(floats, mixed) or "")
    with planted("LIKENESS", 0.3):
        assert fingerprint.disagreement(floats, mixed) == ""
    with planted("LIKENESS", 0.9999):
        assert fingerprint.disagreement(floats, quantised(4, base())) != ""


# -- settings that the weights do not show ---------------------------------------------------------------------------------

_SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
    "vocab_size": 64, "head_dim": 8,
}  # fmt: skip
_MIXTURE = {**_SIZES, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
SETTINGS: dict[str, tuple[type, type, dict[str, Any], dict[str, Any], str]] = {
    "scaled rotary positions": (
        T.LlamaConfig, T.LlamaForCausalLM, _SIZES,
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}, "rope_parameters.rope_type 'linear'",
    ),
    "another factor": (
        T.LlamaConfig, T.LlamaForCausalLM,
        {**_SIZES, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}, "rope_parameters.factor 4.0",
    ),
    "a narrower window": (T.MistralConfig, T.MistralForCausalLM, _SIZES, {"sliding_window": 4}, "sliding_window 4"),
    "another activation": (T.LlamaConfig, T.LlamaForCausalLM, _SIZES, {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    "fewer experts of a token": (
        T.Qwen3MoeConfig, T.Qwen3MoeForCausalLM, _MIXTURE, {"num_experts_per_tok": 1}, "num_experts_per_tok 1",
    ),
    "dropout": (T.LlamaConfig, T.LlamaForCausalLM, _SIZES, {"attention_dropout": 0.5}, ""),
    "rounded": (T.LlamaConfig, T.LlamaForCausalLM, _SIZES, {"rms_norm_eps": 9.999999974752427e-07}, ""),
    "what does not act": (T.LlamaConfig, T.LlamaForCausalLM, _SIZES, {"use_cache": False, "bos_token_id": 3}, ""),
}  # fmt: skip
"""Configuration, model, settings here; those of the training beside them; what is said."""


@pytest.mark.parametrize("case", SETTINGS.values(), ids=SETTINGS)
def test_the_same_weights_under_other_settings(
    case: tuple[type, type, dict[str, Any], dict[str, Any], str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config, kind, here, there, words = case
    models = []
    for settings in ({**here, **there}, here):
        torch.manual_seed(0)
        models.append(kind(config(**settings)).eval())
    lk.attach(models[0], lk.LoRA(rank=2), target_modules=["q_proj"]).save(tmp_path)
    lk.load(models[1], tmp_path)
    assert ("was trained on a base with" in caplog.text) == bool(words)
    assert f"{words} (here " in caplog.text if words else True
