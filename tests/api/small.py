"""A base model folder and adapter folders small enough to serve in a test, and what they answer one request at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import lorakit as lk
from api.stub import END, bytes_tokenizer


def write_base(folder: Path) -> Path:
    """A random Llama over bytes."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        eos_token_id=END,
        bos_token_id=None,
        pad_token_id=END,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    bytes_tokenizer().save_pretrained(folder)
    return folder


def write_adapters(base: Path, store: Path, ranks: Mapping[str, int]) -> Path:
    """LoRAs that change the answers much."""
    model = AutoModelForCausalLM.from_pretrained(base)
    for seed, (name, rank) in enumerate(ranks.items()):
        adapter = lk.attach(model, lk.LoRA(rank=rank, alpha=4 * rank), name=name)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.3)
        adapter.save(store / name)
        lk.detach(model)
    return store


class Reference:
    """Answers by `generate`, one request at a time, with its adapter alone."""

    def __init__(self, base: Path, store: Path) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        for folder in sorted(store.iterdir()):
            lk.load(self.model, folder)

    def __call__(self, prompt: Sequence[int], route: Any, tokens: int) -> list[int]:
        ids = torch.tensor([list(prompt)])
        with torch.no_grad(), lk.use(self.model, route):
            whole = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                pad_token_id=END,
                suppress_tokens=None,
            )
        return list(whole[0, len(prompt) :].tolist())
