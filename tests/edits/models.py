"""Small transformers of every kind, with random weights in float64, the same at every call; and inputs with padding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

VOCABULARY = 61
QUIET: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
"""No token ends an answer, so that all answers are of one length."""


def llama() -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            **QUIET,
        )
    )


def gpt2() -> nn.Module:
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=4, n_positions=64, **QUIET)
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    return GPT2LMHeadModel(config)


def bert() -> nn.Module:
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            num_labels=3,
        )
    )


def t5() -> nn.Module:
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCABULARY,
            d_model=16,
            d_kv=4,
            d_ff=24,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            decoder_start_token_id=0,
            pad_token_id=0,
            eos_token_id=None,
        )
    )


def bart() -> nn.Module:
    return BartForConditionalGeneration(
        BartConfig(
            vocab_size=VOCABULARY,
            d_model=16,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=24,
            decoder_ffn_dim=24,
            max_position_embeddings=64,
            dropout=0.0,
            decoder_start_token_id=1,
            forced_eos_token_id=None,
            **QUIET,
        )
    )


MODELS: dict[str, Callable[[], nn.Module]] = {"llama": llama, "gpt2": gpt2, "bert": bert, "t5": t5, "bart": bart}
CAUSAL = ("llama", "gpt2")
GENERATING = ("llama", "gpt2", "t5", "bart")


def make(kind: str) -> Any:
    """A model in float64, in evaluation mode; the same weights at every call."""
    torch.manual_seed(7)
    return MODELS[kind]().double().eval()


def inputs(kind: str, left: bool = False) -> dict[str, Tensor]:
    """Three texts of 7, 5 and 3 tokens, padded on the right or the left; a causal model is told positions, as generate does."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(1, VOCABULARY, (3, 7), generator=generator)
    step = torch.arange(7)
    mask = torch.stack([step >= 7 - n if left else step < n for n in (7, 5, 3)]).long()
    texts = [row[:n] for row, n in zip(ids, (7, 5, 3), strict=True)]
    given = {"input_ids": torch.zeros_like(ids).masked_scatter(mask.bool(), torch.cat(texts)), "attention_mask": mask}
    if kind in CAUSAL:
        given["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
    if kind in ("t5", "bart"):
        given["decoder_input_ids"] = torch.randint(1, VOCABULARY, (3, 4), generator=generator)
    return given


def run(model: Any, given: dict[str, Tensor]) -> Tensor:
    """The logits of real tokens: (tokens, vocabulary) of a causal model; all of the others'."""
    logits: Tensor = (
        model(**given, use_cache=False).logits if "decoder_input_ids" not in given else model(**given).logits
    )
    return logits[given["attention_mask"].bool()] if "position_ids" in given else logits


def rows_of(given: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """One row of a batch."""
    return {name: value[row : row + 1] for name, value in given.items()}
