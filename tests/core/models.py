"""Tiny models of the kinds that people adapt, with random weights; nothing is fetched."""

from __future__ import annotations

import torch
import transformers as tf
from torch import Tensor, nn

VOCABULARY = 23


def llama(tied: bool = False, layers: int = 2) -> tf.LlamaForCausalLM:
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        tie_word_embeddings=tied,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return tf.LlamaForCausalLM(config).eval()


def gpt2() -> tf.GPT2LMHeadModel:
    torch.manual_seed(0)
    config = tf.GPT2Config(
        vocab_size=VOCABULARY, n_embd=8, n_layer=2, n_head=2, n_positions=16, bos_token_id=1, eos_token_id=2
    )
    return tf.GPT2LMHeadModel(config).eval()


def bert() -> tf.BertForSequenceClassification:
    torch.manual_seed(0)
    config = tf.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=12,
        max_position_embeddings=16,
    )
    return tf.BertForSequenceClassification(config).eval()


def t5() -> tf.T5ForConditionalGeneration:
    torch.manual_seed(0)
    config = tf.T5Config(
        vocab_size=VOCABULARY, d_model=8, d_kv=4, d_ff=12, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    return tf.T5ForConditionalGeneration(config).eval()


def vit() -> tf.ViTForImageClassification:
    torch.manual_seed(0)
    config = tf.ViTConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12, image_size=8, patch_size=4
    )
    return tf.ViTForImageClassification(config).eval()


class Convolutional(nn.Module):
    """Blocks of convolutions with a linear mix, as image models have them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"depthwise": nn.Conv2d(8, 8, 3, padding=1, groups=8), "mix": nn.Linear(8, 8)})
            for _ in range(2)
        )
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block["mix"](block["depthwise"](x).movedim(1, -1)).movedim(-1, 1)
        return self.head(x.mean((-2, -1)))


def randomise(adapter: object) -> None:
    """Random values in every tensor of an adapter."""
    with torch.no_grad():
        for parameter in adapter.parameters():  # type: ignore[attr-defined]
            parameter.normal_(std=0.5)


IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12], [13, 14, 15, 16]])
