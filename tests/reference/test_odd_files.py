"""PEFT's files in which the configuration says more than the tensors, 8-bit floats, and a vocabulary of another size."""

from __future__ import annotations

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
    "a rank above the layer": (llama, peft.LoraConfig(target_modules=["q_proj"], r=64)),
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
