"""`lorakit train` of mixtures of experts, through their experts alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from torch import Tensor
from typer.testing import Result

import lorakit as lk
from cli.conftest import SPECIAL, WORDS, words_tokenizer

Run = Callable[..., Result]
SIZES: dict[str, Any] = {
    "vocab_size": len(SPECIAL) + len(WORDS), "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "max_position_embeddings": 128, "eos_token_id": 1, "bos_token_id": None, "pad_token_id": 0,
    "tie_word_embeddings": False, "output_router_logits": True,
}  # fmt: skip
SMALL = {"hidden_size": 32, "num_experts_per_tok": 2, "initializer_range": 0.2}
LARGE = {"hidden_size": 128, "num_experts_per_tok": 4}
IDS = torch.arange(5, 5 + 3 * 6).reshape(3, 6) % len(WORDS)


def qwen3_moe(experts: int, between: int, **sizes: Any) -> Any:
    own = {"moe_intermediate_size": between, "intermediate_size": between, "num_experts": experts}
    return T.Qwen3MoeForCausalLM(T.Qwen3MoeConfig(**SIZES, **sizes, **own))


def gpt_oss(experts: int, between: int, **sizes: Any) -> Any:
    return T.GptOssForCausalLM(T.GptOssConfig(**SIZES, **sizes, intermediate_size=between, num_local_experts=experts))


CASES: dict[str, tuple[Callable[[], Any], int]] = {
    "qwen3-moe": (lambda: qwen3_moe(4, 16, **SMALL), 40),
    "gpt-oss": (lambda: gpt_oss(4, 16, **SMALL), 40),
    "larger qwen3-moe": (lambda: qwen3_moe(32, 64, **LARGE), 60),
    "larger gpt-oss": (lambda: gpt_oss(32, 64, **LARGE), 60),
}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits
    return found


@pytest.mark.parametrize(
    "name", [name if "larger" not in name else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_experts_alone_learn(name: str, rows: Path, lorakit: Run, tmp_path: Path) -> None:
    build, steps = CASES[name]
    torch.manual_seed(0)
    build().save_pretrained(tmp_path / "base")
    words_tokenizer().save_pretrained(tmp_path / "base")
    for seed in (1, 2):
        result = lorakit(
            "train", "--model", str(tmp_path / "base"), "--data.train", str(rows), "--target-modules", r".*\.experts",
            "--rank", "8", "--alpha", "32", "--train.max-steps", str(steps), "--train.batch-size", "4",
            "--train.learning-rate", "2e-2", "--train.precision", "fp32", "--train.compile", "off",
            "--train.logging-steps", "5", "--train.seed", str(seed), "--data.evaluation-size", "10",
            "--train.output", str(tmp_path / str(seed)),
        )  # fmt: skip
        assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "1" / "lorakit.json").read_text())["record"]
    assert record["after"]["loss"] < 0.5 * record["before"]["loss"]

    model = T.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    base = logits(model)
    alone = {}
    for own in ("1", "2"):
        adapter = lk.load(model, tmp_path / own, name=own)
        assert all(path.endswith("mlp.experts") for path in adapter.layers)
        with lk.use(model, own):
            alone[own] = logits(model)
        with lk.merged(model, own):
            torch.testing.assert_close(logits(model), alone[own], rtol=1e-4, atol=1e-4)
        assert (alone[own] - base).abs().max() > 0.1
    with lk.use(model, ["2", None, "1"]):
        mixed = logits(model)
    torch.testing.assert_close(mixed, torch.stack([alone["2"][0], base[1], alone["1"][2]]), rtol=1e-4, atol=1e-4)
