"""Models that are loaded for a task that they cannot do are refused before anything is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T

from lorakit.errors import LorakitError
from lorakit.models.loading import load_model
from lorakit.models.tasks import check_causal, check_task

SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip


def bart() -> Any:
    return T.BartConfig(
        vocab_size=64, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=16, decoder_ffn_dim=16,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (bart(), "encoder-decoder"),
        (T.WhisperConfig(), "encoder-decoder"),
        (T.T5Config(), "encoder-decoder"),
        (T.LlavaConfig(), "reads more than text"),
        (T.Qwen2VLConfig(vision_config={}), "reads more than text"),
    ],
)
def test_a_part_of_a_model_is_not_loaded_for_the_whole(config: Any, said: str) -> None:
    with pytest.raises(LorakitError, match=said):
        check_task(config, "causal-lm", "here")
    if said == "encoder-decoder" and config.model_type != "whisper":
        check_task(config, "seq2seq", "here")
    check_task(T.LlamaConfig(), "causal-lm", "here")


def test_loading_asks(tmp_path: Path) -> None:
    T.BartForConditionalGeneration(bart()).save_pretrained(tmp_path)
    with pytest.raises(LorakitError, match=r"encoder-decoder \(bart\).*task seq2seq"):
        load_model(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_sees_the_next_token_is_refused(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    bert = T.BertLMHeadModel(T.BertConfig(**SMALL, initializer_range=0.3)).to(dtype).train()
    with pytest.raises(LorakitError, match="bidirectional: its output at a token depends on later tokens"):
        check_causal(bert, "here")
    assert bert.training
    for fine in (
        T.BertLMHeadModel(T.BertConfig(**SMALL, is_decoder=True, initializer_range=0.3)),
        T.LlamaForCausalLM(T.LlamaConfig(**SMALL)),
        T.GPT2LMHeadModel(T.GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2)),
    ):
        check_causal(fine.to(dtype), "here")  # type: ignore[attr-defined]
