"""Which layers are chosen: presets by exact count, suffixes, expressions, exclusions, ranges; what matches nothing raises."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

import lorakit as lk
from core import models
from lorakit.adapter import construction, targets
from lorakit.adapter.targets import Targets, select
from lorakit.core.layer import Adapted
from lorakit.core.walking import block_of, has_suffix, value_for
from lorakit.errors import LorakitError


def chosen(model: nn.Module, **options: Any) -> list[str]:
    return select(model, Targets(**options))


PRESETS = [
    (models.llama, "all-linear", 14),
    (models.llama, "attention", 8),
    (models.llama, "mlp", 6),
    (models.gpt2, "all-linear", 8),
    (models.gpt2, "attention", 4),
    (models.gpt2, "mlp", 4),
    (models.bert, "all-linear", 13),  # six per layer, and the pooler
    (models.bert, "attention", 8),
    (models.bert, "mlp", 5),
    (models.t5, "all-linear", 32),
    (models.t5, "attention", 24),
    (models.t5, "mlp", 8),
    (models.vit, "all-linear", 12),
    (models.vit, "attention", 8),
    (models.vit, "mlp", 4),
    (models.Convolutional, "all-linear", 3),
]


@pytest.mark.parametrize(("make", "preset", "count"), PRESETS, ids=lambda v: getattr(v, "__name__", str(v)))
def test_presets_by_count(make: Any, preset: str, count: int) -> None:
    paths = chosen(make(), target_modules=preset)
    assert len(paths) == len(set(paths)) == count, paths


@pytest.mark.parametrize("make", [models.llama, models.gpt2, models.bert, models.t5, models.vit])
def test_all_linear_is_never_the_head(make: Any) -> None:
    model = make()
    head = model.get_output_embeddings()
    paths = chosen(model, target_modules="all-linear")
    assert not [path for path in paths if path.endswith(("lm_head", "classifier"))]
    assert all(model.get_submodule(path) is not head for path in paths)


def test_attention_and_mlp_are_all_linear() -> None:
    for make in (models.llama, models.gpt2, models.bert, models.t5, models.vit):
        model = make()
        halves = chosen(model, target_modules="attention") + chosen(model, target_modules="mlp")
        assert sorted(halves) == sorted(chosen(model, target_modules="all-linear"))


def test_presets_see_through_adapters_that_are_there() -> None:
    model = models.llama()
    before = chosen(model, target_modules="all-linear")
    lk.attach(model, lk.LoRA(rank=2), name="one")
    assert chosen(model, target_modules="all-linear") == before
    assert len(lk.attach(model, lk.LoRA(rank=2), name="two").layers) == 14


def test_suffixes_expressions_and_order() -> None:
    model = models.llama()
    q = [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    v = [f"model.layers.{i}.self_attn.v_proj" for i in range(2)]
    assert chosen(model, target_modules=("v_proj", "q_proj")) == [q[0], v[0], q[1], v[1]]
    assert chosen(model, target_modules=("0.self_attn.q_proj",)) == q[:1]
    assert chosen(model, target_modules=r".*\.1\.self_attn\.(q|v)_proj") == [q[1], v[1]]
    assert chosen(model, target_modules=("lm_head",)) == ["lm_head"]
    assert chosen(model, target_modules=("embed_tokens",)) == ["model.embed_tokens"]


def test_a_suffix_ends_at_a_dot() -> None:
    assert has_suffix("a.q_proj", "q_proj")
    assert has_suffix("q_proj", "q_proj")
    assert not has_suffix("a.xq_proj", "q_proj")
    with pytest.raises(LorakitError, match='no layer matches "proj"'):
        chosen(models.llama(), target_modules=("proj",))


def test_exclusion_wins() -> None:
    model = models.llama()
    paths = chosen(model, target_modules="attention", exclude_modules=("q_proj", "0.self_attn.v_proj"))
    assert len(paths) == 8 - 2 - 1
    assert not [path for path in paths if path.endswith("q_proj")]
    assert len(chosen(model, target_modules="attention", exclude_modules=r".*\.0\..*")) == 4


def test_layer_ranges() -> None:
    model = models.llama(layers=4)
    assert len(chosen(model, target_modules=("q_proj",), layers=(1, 3))) == 2
    adapter = lk.attach(model, lk.LoRA(rank=2), layers=range(2, 4))
    assert {block_of(path) for path in adapter.layers} == {2, 3}
    lk.detach(model)
    assert {block_of(path) for path in lk.attach(model, lk.LoRA(rank=2), layers=1).layers} == {1}


def test_layer_ranges_of_a_named_list() -> None:
    assert block_of("decoder.block.1.layer.0.q") == 1
    assert block_of("decoder.block.1.layer.0.q", ["layer"]) == 0
    assert block_of("decoder.block.1.layer.0.q", ["block"]) == 1
    assert block_of("lm_head") is None
    paths = chosen(models.t5(), target_modules=("q",), layers=(1,), layers_pattern=("block",))
    assert paths
    assert all(".block.1." in path for path in paths)


def test_patterns_by_layer() -> None:
    model = models.llama()
    adapter = lk.attach(
        model,
        lk.LoRA(rank=2, alpha=4.0),
        target_modules=["q_proj", "v_proj"],
        rank_pattern={"v_proj": 1, r"layers\.1\..*q_proj": 3},
        alpha_pattern={"0.self_attn.v_proj": 8.0},
    )
    found = {path.split("layers.")[1]: (delta.spec.rank, delta.spec.alpha) for path, _, delta in adapter.deltas()}
    assert found == {
        "0.self_attn.q_proj": (2, 4.0),
        "0.self_attn.v_proj": (1, 8.0),
        "1.self_attn.q_proj": (3, 4.0),
        "1.self_attn.v_proj": (1, 4.0),
    }
    assert adapter.method == lk.LoRA(rank=2, alpha=4.0)


def test_first_pattern_counts() -> None:
    assert value_for({"q": 1, "a.q": 2}, "a.q") == 1
    assert value_for({"a.q": 2, "q": 1}, "a.q") == 2
    assert value_for({"q": 1}, "a.xq") is None


UNMATCHED: list[tuple[dict[str, Any], str]] = [
    ({"target_modules": ["q_porj"]}, 'no layer matches "q_porj"'),
    ({"target_modules": ["q_proj", "q_porj"]}, 'no layer matches "q_porj"'),
    ({"target_modules": ["input_layernorm"]}, '"input_layernorm" matches'),
    ({"target_modules": "q_proj"}, '"q_proj" matches no layer'),
    ({"target_modules": "(q_proj"}, "regular expression"),
    ({"exclude_modules": ["nothing"]}, '"nothing"'),
    ({"exclude_modules": ".*nothing"}, ".*nothing"),
    ({"exclude_modules": "(x"}, "exclude_modules"),
    ({"exclude_modules": ".*"}, "leaves no layer"),
    ({"layers": [0, 7]}, "block 7"),
    ({"layers": 2}, "block 2"),
    ({"layers": []}, "layers"),
    ({"layers": 0, "layers_pattern": "blocks"}, "block 0"),
    ({"rank_pattern": {"q_porj": 2}}, "q_porj"),
    ({"alpha_pattern": {"(": 2}}, "alpha_pattern"),
    ({"modules_to_save": ["lm_haed"]}, '"lm_haed"'),
    ({"bias": "some"}, "'some'"),
    ({"parts": {"c_attn": {"q": (0, 2)}}}, "'c_attn'"),
    ({"parts": {"q_proj": {"a": (0, 9)}}}, "(0, 9)"),
    ({"parts": {"q_proj": {"a": (4, 2)}}}, "(4, 2)"),
    ({"parts": {"q_proj": {"a": (0, 4), "b": (3, 5)}}}, "'b'"),
    ({"init": "kaimng"}, "kaiming"),
    ({"init": 3}, "init"),
    ({"name": "a.b"}, "'a.b'"),
    ({"name": ""}, "name"),
    ({"target_modules": 3}, "target_modules"),
    ({"target_modules": [3]}, "target_modules"),
    ({"method": lk.LoRA(rank=9), "target_modules": ["q_proj"]}, "rank 9"),
]


@pytest.mark.parametrize(("options", "said"), UNMATCHED, ids=[said for _, said in UNMATCHED])
def test_what_matches_nothing_is_named_and_changes_nothing(options: dict[str, Any], said: str) -> None:
    model = models.llama()
    modules, flags = dict(model.named_modules()), {k: p.requires_grad for k, p in model.named_parameters()}
    options = {"method": lk.LoRA(rank=2), **options}
    with pytest.raises(LorakitError, match=re.escape(said)):
        lk.attach(model, options.pop("method"), **options)
    assert dict(model.named_modules()) == modules
    assert {k: p.requires_grad for k, p in model.named_parameters()} == flags
    assert lk.adapters(model) == {}


def test_nothing_linear_is_said() -> None:
    with pytest.raises(LorakitError, match="all-linear"):
        lk.attach(nn.Sequential(nn.Conv1d(2, 2, 1)), lk.LoRA(rank=1))


def test_an_unknown_kind_in_a_container_is_refused_by_suffix() -> None:
    model = nn.ModuleDict({"gru": nn.GRU(4, 4), "fc": nn.Linear(4, 4)})
    with pytest.raises(LorakitError, match="GRU"):
        lk.attach(model, lk.LoRA(rank=1), target_modules=["gru"])


def test_modules_to_save_are_not_adapted_too() -> None:
    model = models.bert()
    adapter = lk.attach(model, lk.LoRA(rank=2), modules_to_save=["pooler", "classifier"])
    assert len([path for path, _, _ in adapter.deltas()]) == 12
    assert sorted(adapter.saved) == ["bert.pooler", "classifier"]


# -- shared modules --------------------------------------------------------------------------------------------------------


class Sharing(nn.Module):
    """Two blocks that refer to one linear layer, as ALBERT's layers and T5's embeddings do."""

    def __init__(self) -> None:
        super().__init__()
        proj = nn.Linear(4, 4)
        self.blocks = nn.ModuleList([nn.ModuleDict({"proj": proj}), nn.ModuleDict({"proj": proj})])


def a_shared_layer_is_adapted_once() -> None:
    """A module under two names is one layer, by its first name, with one delta; other names reach the same adapted layer."""
    model = Sharing()
    assert chosen(model, target_modules=("proj",)) == ["blocks.0.proj"], (
        "a shared module is chosen under each of its names"
    )
    adapter = lk.attach(model, lk.LoRA(rank=2), target_modules=["proj"])
    assert list(adapter.layers) == ["blocks.0.proj"]
    assert model.blocks[0]["proj"] is model.blocks[1]["proj"] is adapter.layers["blocks.0.proj"]
    assert adapter.num_parameters() == 2 * (4 + 4)


def _walks_every_name(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """`walk` without its check for modules that it has seen."""
    for path, module in model.named_modules(remove_duplicate=False):
        base = module.base if isinstance(module, Adapted) else module
        yield path, base


def test_a_shared_layer_is_adapted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    a_shared_layer_is_adapted_once()
    for module in (targets, construction):
        monkeypatch.setattr(module, "walk", _walks_every_name)
    with pytest.raises(AssertionError, match="under each of its names"):
        a_shared_layer_is_adapted_once()


def test_presets_of_parts_divide_a_model() -> None:
    """A vision-language model is tower, projector and language, and nothing else; cross-attention is part of attention."""
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    llava = tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**size, image_size=8, patch_size=4),
        text_config=tf.LlamaConfig(**size, vocab_size=16),
    )
    bart = tf.BartConfig(
        vocab_size=16, d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=8, decoder_ffn_dim=8,
    )  # fmt: skip
    with torch.device("meta"):
        seeing, writing = tf.LlavaForConditionalGeneration(llava), tf.BartForConditionalGeneration(bart)

    def named(model: Any, preset: str) -> set[str]:
        return set(select(model, Targets(preset)))

    parts = [named(seeing, preset) for preset in ("vision", "projector", "language")]
    assert set.union(*parts) == named(seeing, "all-linear")
    assert sum(map(len, parts)) == len(set.union(*parts))
    assert all("vision" in path for path in parts[0])
    assert {path.rpartition(".")[2] for path in parts[1]} == {"linear_1", "linear_2"}
    across = named(writing, "cross-attention")
    assert len(across) == 4
    assert across < named(writing, "attention")
    assert named(writing, "attention") | named(writing, "mlp") == named(writing, "all-linear")
    with pytest.raises(LorakitError, match='"projector" found no such linear layer'):
        named(writing, "projector")
