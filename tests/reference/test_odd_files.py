"""PEFT's files in which the configuration says more than the tensors, 8-bit floats, and a vocabulary of another size."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lorakit as lk
from lorakit.errors import LorakitError

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip


def llama(vocabulary: int = 64) -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=vocabulary, **SMALL)).eval()


def bert() -> Any:
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=64, **SMALL)).eval()


def gpt2() -> Any:
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4)).eval()


def qwen2_moe() -> Any:
    """Experts and a shared expert, whose layers have the names of the experts' parameters."""
    torch.manual_seed(0)
    config = transformers.Qwen2MoeConfig(
        vocab_size=64, **SMALL, moe_intermediate_size=16, shared_expert_intermediate_size=24, num_experts=4,
        num_experts_per_tok=2, num_key_value_heads=2,
    )  # fmt: skip
    return transformers.Qwen2MoeForCausalLM(config).eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(torch.arange(5, 15)[None]).logits  # type: ignore[no-any-return]


def written(model: nn.Module, config: Any, folder: Path) -> Tensor:
    """An adapter of PEFT's with random values in a folder; the logits of its model."""
    wrapped = peft.get_peft_model(model, config)  # type: ignore[arg-type]
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    wrapped.eval().save_pretrained(str(folder))
    return logits(wrapped)


CONFIGS: dict[str, tuple[Callable[[], Any], Any]] = {
    "bias with a head": (bert, peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"], bias="all")),
    "an exclusion of nothing": (llama, peft.LoraConfig(target_modules=["q_proj"], exclude_modules=["none"])),
    "a pattern of nothing": (llama, peft.LoraConfig(target_modules=["q_proj"], rank_pattern={"v_proj": 3})),
    "patterns of what is excluded": (
        llama,
        peft.LoraConfig(
            target_modules=["q_proj", "k_proj"],
            exclude_modules=["q_proj"],
            rank_pattern={"q_proj": 3},
            alpha_pattern={"q_proj": 5},
        ),
    ),
    "a rank above the layer": (llama, peft.LoraConfig(target_modules=["q_proj"], r=64)),
    "a pattern that does not act": (gpt2, peft.HiraConfig(target_modules=["c_attn"], r=2, rank_pattern={"c_attn": 3})),
    "layers called as parameters are": (qwen2_moe, peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=4)),
    "parameters called as layers are": (
        qwen2_moe,
        peft.LoraConfig(target_modules=["q_proj"], target_parameters=["gate_up_proj", "down_proj"], r=4),
    ),
    "boft": (llama, peft.BOFTConfig(target_modules=["q_proj"], boft_block_size=4, boft_n_butterfly_factor=2)),
    "loha": (llama, peft.LoHaConfig(target_modules=["q_proj"], use_effective_conv2d=True)),
    "lokr": (llama, peft.LoKrConfig(target_modules=["q_proj"], use_effective_conv2d=True)),
}


@pytest.mark.parametrize("which", CONFIGS)
def test_on_loading_tensors_decide(which: str, tmp_path: Path) -> None:
    make, config = CONFIGS[which]
    expected = written(make(), config, tmp_path)
    model = make()
    assert (logits(model) - expected).abs().max() > 1e-4
    lk.load(model, tmp_path)
    torch.testing.assert_close(logits(model), expected)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_floats_of_8_bits_are_read(dtype: torch.dtype, tmp_path: Path) -> None:
    written(llama(), peft.LoraConfig(target_modules=["q_proj"]), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    few = {key: tensor.to(dtype) for key, tensor in load_file(file).items()}
    found = {}
    for kept in (few, {key: tensor.float() for key, tensor in few.items()}):
        save_file(kept, file)
        model = llama()
        lk.load(model, tmp_path)
        found[next(iter(kept.values())).dtype] = logits(model)
    assert torch.equal(found[dtype], found[torch.float32])


@pytest.mark.parametrize("options", [{"target_modules": ["lm_head"]}, {"modules_to_save": ["embed_tokens"]}])
def test_a_resized_vocabulary_is_named(options: dict[str, Any], tmp_path: Path) -> None:
    expected = written(llama(), peft.LoraConfig(**{"target_modules": ["q_proj"], **options}), tmp_path)
    model = llama(70)
    with pytest.raises(
        LorakitError, match=r"made for 64 tokens, and this model has 70; model.resize_token_embeddings\(64\)"
    ):
        lk.load(model, tmp_path)
    fitting = llama()
    fitting.resize_token_embeddings(70)
    fitting.resize_token_embeddings(64)
    lk.load(fitting, tmp_path)
    torch.testing.assert_close(logits(fitting), expected)


def rewritten(folder: Path, rename: Callable[[str], str] = str, **config: Any) -> None:
    """The folder's tensors under other names, and other entries in its configuration."""
    file, told = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    save_file({rename(key): tensor for key, tensor in load_file(file).items()}, file)
    told.write_text(json.dumps({**json.loads(told.read_text()), **config}))


PREFIX = "base_model.model."
ODD: dict[str, tuple[Callable[[str], str], dict[str, Any]]] = {
    "wrapped twice": (lambda key: PREFIX + key, {}),
    "wrapped three times": (lambda key: 2 * PREFIX + key, {}),
    "ranks as floats": (str, {"r": 4.0, "lora_alpha": 8.0, "rank_pattern": {"v_proj": 2.0}}),
    "of the first PEFT": (str, {"merge_weights": True, "enable_lora": None}),
}


@pytest.mark.parametrize("which", ODD)
def test_another_tools_names_and_entries_are_read(which: str, tmp_path: Path) -> None:
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4, lora_alpha=8, rank_pattern={"v_proj": 2})
    expected = written(llama(), config, tmp_path)
    rename, entries = ODD[which]
    rewritten(tmp_path, rename, **entries)
    model = llama()
    lk.load(model, tmp_path)
    torch.testing.assert_close(logits(model), expected)


@pytest.mark.parametrize("entries", [{"r": 8}, {"rank_pattern": {"layers.1.self_attn.q_proj": 8}}])
@pytest.mark.parametrize("method", ["lora", "dora", "loha"])
def test_a_rank_that_the_tensors_do_not_have_is_named(method: str, entries: dict[str, Any], tmp_path: Path) -> None:
    configs = {
        "lora": peft.LoraConfig(target_modules=["q_proj"], r=2),
        "dora": peft.LoraConfig(target_modules=["q_proj"], r=2, use_dora=True),
        "loha": peft.LoHaConfig(target_modules=["q_proj"], r=2),
    }
    written(llama(), configs[method], tmp_path)
    rewritten(tmp_path, **entries)
    with pytest.raises(
        LorakitError, match=r"has rank 2, and adapter_config\.json says 8 for this layer \(r, rank_pattern\)"
    ):
        lk.load(llama(), tmp_path)


def test_tensors_that_were_not_gathered_are_named(tmp_path: Path) -> None:
    written(llama(), peft.LoraConfig(target_modules=["q_proj"]), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({key: torch.empty(0) for key in load_file(file)}, file)
    with pytest.raises(LorakitError, match="empty: the model was spread over processes"):
        lk.load(llama(), tmp_path)
