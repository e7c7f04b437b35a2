"""Small models, adapters on disk, and the oracle: `generate` with one request and its adapters alone."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import lorakit as lk
from lorakit.serve.request import Request, Sampling

VOCABULARY = 160


@functools.cache
def _made(kind: str) -> nn.Module:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if kind == "llama":
        model: nn.Module = LlamaForCausalLM(LlamaConfig(**sizes))
    elif kind == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**sizes))
    elif kind == "gemma2":
        own = {"head_dim": 12, "sliding_window": 20, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 12}
        model = Gemma2ForCausalLM(Gemma2Config(**sizes, **own, final_logit_softcapping=10.0))
    else:
        config = GPT2Config(n_embd=48, n_layer=2, n_head=4, vocab_size=VOCABULARY, n_positions=256, eos_token_id=2)
        model = GPT2LMHeadModel(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:  # larger than usual, so that texts differ and no two logits are close
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def model(kind: str = "llama") -> Any:
    """A model of this kind with its own configuration; the same weights each time."""
    return copy.deepcopy(_made(kind))


def write_adapter(
    base: nn.Module, folder: Path, method: Any = None, std: float = 0.15, seed: int = 0, **options: Any
) -> Path:
    """An adapter folder with random numbers in it; `base` is left as it was."""
    torch.manual_seed(seed)
    adapter = lk.attach(base, method or lk.LoRA(rank=4), name="written", **options)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=std)
    adapter.save(folder)
    lk.detach(base)
    return folder


class Oracle:
    """The answers of the model alone."""

    def __init__(self, base: nn.Module, store: Path) -> None:
        self.model: Any = copy.deepcopy(base)
        self.store = store

    def answer(self, prompt: Sequence[int], blend: Mapping[str, float], count: int) -> list[int]:
        """Greedy tokens by `generate`, one request at a time."""
        on = lk.adapters(self.model)
        for name in blend:
            if name not in on:
                lk.load(self.model, self.store / name)
        ids = torch.tensor([list(prompt)])
        options: dict[str, Any] = {"do_sample": False, "max_new_tokens": count, "min_new_tokens": count}
        options |= {"eos_token_id": None, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
        with torch.no_grad():
            if not on and not blend:
                found = self.model.generate(ids, **options)
            else:
                with lk.use(self.model, dict(blend) or None):
                    found = self.model.generate(ids, **options)
        return found[0, len(prompt) :].tolist()  # type: ignore[no-any-return]


def greedy(number: object, prompt: Sequence[int], blend: Mapping[str, float], count: int, **options: Any) -> Request:
    """A request for exactly `count` greedy tokens."""
    sampling = Sampling(max_tokens=count, temperature=0, ignore_eos=True)
    return Request(str(number), tuple(prompt), blend, sampling=sampling, **options)


def prompt(seed: int, length: int) -> list[int]:
    """Random token ids."""
    return torch.randint(3, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()  # type: ignore[no-any-return]
