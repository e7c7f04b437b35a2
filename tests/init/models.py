"""Small float64 models with every layer kind that starts are tried on, and batches for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from lorakit.adapter.adapter import Adapter

VOCABULARY = 31


class Mixed(nn.Module):
    """A linear layer, a Conv1D, two grouped convolutions; the loss is a square."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(10, 12)
        self.second = Conv1D(8, 12)
        self.image = nn.Conv2d(4, 6, (2, 3), stride=(1, 2), padding=(1, 1), groups=2)
        self.line = nn.Conv1d(6, 8, 3, padding=1, padding_mode="circular")

    def forward(self, x: Tensor) -> Tensor:  # (batch, 6, 10)
        h = torch.tanh(self.second(torch.tanh(self.first(x))))  # (batch, 6, 8)
        h = self.image(h.reshape(h.shape[0], 4, 3, 4))
        return self.line(h.flatten(2)).square().sum((1, 2)).mean()


def mixed() -> Mixed:
    torch.manual_seed(3)
    model = Mixed().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.4)
    return model


def mixed_batches(count: int = 3) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(5)
    return [{"x": torch.randn(4, 6, 10, dtype=torch.float64, generator=generator)} for _ in range(count)]


def llama(dtype: torch.dtype = torch.float64) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval()


def texts(count: int = 3, rows: int = 4, length: int = 12, seed: int = 7) -> list[dict[str, Tensor]]:
    """Right-padded batches whose first two tokens carry no label."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        ids = torch.randint(VOCABULARY, (rows, length), generator=generator)
        lengths = torch.randint(length // 2, length + 1, (rows, 1), generator=generator)
        mask = (torch.arange(length) < lengths).long()
        labels = torch.where(mask.bool() & (torch.arange(length) >= 2), ids, -100)
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return batches


def start_of(adapter: Adapter) -> dict[str, tuple[Tensor, Tensor, float]]:
    """Layer -> the factors (B, A) that its adapter starts from, and the scale."""
    found = {}
    for path, _, delta in adapter.deltas():
        low = delta.low_rank()
        assert low is not None
        B, A = low.factors()
        found[path] = (B.detach(), A.detach(), low.scale)
    return found


def train(adapter: Adapter, seed: int = 0) -> None:
    """Move every trainable tensor a little, as training would."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)


def matrix(model: nn.Module, path: str) -> Tensor:
    """A layer's frozen weight as (out, in)."""
    layer = model.get_submodule(path)
    from lorakit.core.sites import sites_of

    base = getattr(layer, "base", layer)
    return sites_of(base)[0].layout.matrix(base.weight.detach())
