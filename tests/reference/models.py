"""Tiny random models of every family that the interchange is tested on, in float64, made from configurations."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=43, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=False,
    )  # fmt: skip
    return _made(LlamaForCausalLM, config)


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=43, n_positions=32, n_embd=24, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    return _made(GPT2LMHeadModel, config)


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=43, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=32, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return _made(BertForSequenceClassification, config)


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=43, d_model=24, d_kv=6, d_ff=40, num_layers=2, num_heads=4, dropout_rate=0.0,
        decoder_start_token_id=0,
    )  # fmt: skip
    return _made(T5ForConditionalGeneration, config)


def _made(kind: Any, config: Any) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = kind(config).double().eval()
    with torch.no_grad():  # transformers starts biases at zero and norms at one, which would hide mistakes
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


class Convolutions(nn.Module):
    """Conv1d, Conv2d and Conv3d with stride and padding, then a linear head."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.one = nn.Conv1d(3, 8, 3, stride=2, padding=1, **options)
        self.two = nn.Conv2d(4, 6, (3, 5), stride=(1, 2), padding=(1, 2), bias=False, **options)
        self.three = nn.Conv3d(2, 4, (1, 3, 2), padding=(0, 1, 1), **options)
        self.point = nn.Conv2d(6, 6, 1)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:  # (batch, 3, 24)
        x = self.one(x)  # (batch, 8, 12)
        x = self.two(x.reshape(x.shape[0], 4, 4, 6))  # (batch, 6, 4, 3)
        x = self.point(x)
        x = self.three(x.reshape(x.shape[0], 2, 3, 4, 3))  # (batch, 4, 3, 4, 4)
        return self.head(x.flatten(1)[:, : 6 * 24].reshape(x.shape[0], 6, -1).mean(-1))


class Attention(nn.Module):
    """Two nn.MultiheadAttention layers around a linear one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.MultiheadAttention(8, 2, batch_first=True)
        self.middle = nn.Linear(8, 8)
        self.second = nn.MultiheadAttention(8, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x, x, x, need_weights=False)[0]
        x = torch.tanh(self.middle(x))
        return x + self.second(x, x, x)[0]


class Words(nn.Module):
    """An embedding, a body with a norm, and two heads whose names end alike."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(43, 12)
        self.norm = nn.LayerNorm(12)
        self.body = nn.Linear(12, 10)
        self.head = nn.Linear(10, 5)
        self.inner = nn.ModuleDict({"body": nn.Linear(5, 7), "norm": nn.LayerNorm(7)})

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.tanh(self.body(self.norm(self.words(ids))))
        return self.inner["norm"](self.inner["body"](self.head(x)))


def plain(kind: Callable[[], nn.Module]) -> nn.Module:
    """A model of plain torch layers, with biases that are not zero."""
    torch.manual_seed(0)
    model = kind().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def _copies(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """A function that gives a new copy of one and the same model."""
    first = functools.cache(make)
    return lambda: copy.deepcopy(first())


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": _copies(llama),
    "gpt2": _copies(gpt2),
    "bert": _copies(bert),
    "t5": _copies(t5),
    "convolutions": _copies(lambda: plain(Convolutions)),
    "attention": _copies(lambda: plain(Attention)),
    "words": _copies(lambda: plain(Words)),
}


def inputs(name: str, rows: int = 3) -> dict[str, Tensor]:
    """Arguments for one forward pass of a model of this name."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 43, (rows, 7), generator=generator)
    if name == "t5":
        return {"input_ids": ids, "decoder_input_ids": torch.randint(1, 43, (rows, 5), generator=generator)}
    if name == "convolutions":
        return {"x": torch.randn(rows, 3, 24, generator=generator, dtype=torch.float64)}
    if name == "attention":
        return {"x": torch.randn(rows, 5, 8, generator=generator, dtype=torch.float64)}
    if name == "words":
        return {"ids": ids}
    return {"input_ids": ids}


def logits(model: Any, name: str, **arguments: Any) -> Tensor:
    """The model's output for the inputs of this name."""
    with torch.no_grad():
        output = model(**inputs(name), **arguments)
    return (output if isinstance(output, Tensor) else output.logits).clone()


def tolerance(y: Tensor, depth: int = 64) -> float:
    """The difference that the order of float64 sums can make in values of this size, through this many operations."""
    return float(torch.finfo(y.dtype).eps * depth * max(1.0, y.abs().max().item()))


def assert_same(a: Tensor, b: Tensor) -> None:
    """Equal but for the order in which sums were taken."""
    difference = (a - b).abs().max().item()
    assert difference <= tolerance(a), f"{difference:.3e} where rounding allows {tolerance(a):.3e}"


def scramble(parameters: Iterator[tuple[str, Tensor]], seed: int = 3, size: float = 0.2) -> None:
    """Random values in every tensor, as after training; each its own."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in parameters:
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * size)


def twin(model: nn.Module) -> nn.Module:
    """An equal model that shares nothing with the first."""
    return copy.deepcopy(model)


@contextmanager
def quiet() -> Iterator[None]:
    """PEFT's warnings left out."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
