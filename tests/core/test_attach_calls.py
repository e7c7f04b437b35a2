"""What attaching costs, counted in calls: times on a shared machine say nothing."""

from __future__ import annotations

import cProfile
import pstats
from collections import Counter
from typing import Any

from transformers import LlamaConfig, LlamaForCausalLM

import lorakit as lk


def calls(layers: int) -> tuple[int, Counter[str], int]:
    """All calls of one attach but the first, those of each function of lorakit, and how many layers it reached."""
    config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=layers, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=32,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config)
    lk.attach(model, lk.LoRA(rank=2))
    lk.detach(model)
    profile = cProfile.Profile()
    adapter = profile.runcall(lk.attach, model, lk.LoRA(rank=2))
    stats: Any = pstats.Stats(profile)
    own: Counter[str] = Counter()
    for (file, _, name), (_, count, *_) in stats.stats.items():
        if "/lorakit/" in file:
            own[name] += count
    return stats.total_calls, own, len(adapter.layers)


def test_a_layer_costs_a_bounded_number_of_calls() -> None:
    few, _, seven = calls(1)
    many, own, layers = calls(9)
    each = (many - few) / (layers - seven)
    assert each < 900, f"{each:.0f} calls for a layer; it was 1,176, then 860"
    modules = 9 * 14 + 5  # of the model: a block has 14
    assert own["_sites_of"] <= modules, "each module is asked for its matrices once"
    assert own["_delta"] == layers
