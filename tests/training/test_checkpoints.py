"""A checkpoint is an adapter: it loads as one, resumes to the bit, and holds every weight once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lorakit as lk
from lorakit.adapter.adapter import Adapter
from lorakit.errors import LorakitError
from lorakit.experts import MEMBERS
from lorakit.files.bundle import TENSORS, locate
from lorakit.train import run_checkpoint as checkpoint
from training.tiny import llama

Attach = Callable[[nn.Module], Adapter]


def fused(model: Any) -> Adapter:
    parts = {"q_proj": {"a": (0, 8), "b": [(8, 12), (20, 24)]}}
    return lk.attach(model, lk.LoRA(rank=2), target_modules=["q_proj"], parts=parts)


KINDS: dict[str, tuple[Attach, float]] = {
    "lora": (lambda model: lk.attach(model, lk.LoRA(rank=2)), 0),
    "dora, whole modules": (
        lambda model: lk.attach(
            model, lk.DoRA(inner=lk.LoRA(rank=2)), modules_to_save=["norm", "lm_head"], rank_pattern={"q_proj": 1}
        ),
        0,
    ),
    "embeddings": (lambda model: lk.attach(model, lk.LoRA(rank=2), target_modules=["embed_tokens", "q_proj"]), 0),
    "pissa": (lambda model: lk.attach(model, lk.LoRA(rank=2), init="pissa"), 0),
    "vera": (lambda model: lk.attach(model, lk.VeRA(rank=2)), 0),
    "adalora": (lambda model: lk.attach(model, lk.AdaLoRA(rank=2)), 1),
    "relora": (lambda model: lk.attach(model, lk.ReLoRA(rank=2)), 0),
    "ia3": (lambda model: lk.attach(model, lk.IA3(feedforward_modules=("down_proj",))), 0),
    "mixlora": (lambda model: lk.attach(model, lk.MixLoRA(experts=2, top_k=1, inner=lk.LoRA(rank=2))), 0),
    "parts": (fused, 1),
    "prompt": (lambda model: lk.attach(model, lk.PromptTuning(tokens=3)), 0),
    "bottleneck": (lambda model: lk.attach(model, lk.Bottleneck(size=3)), 0),
}
"""How an adapter is made, and the share of its bytes that may be written beside its file."""


def write(folder: Path, adapter: Adapter) -> Path:
    folder.mkdir(parents=True)
    checkpoint.write_adapter(folder, adapter, "tiny", {"steps": 3})
    return folder


def moved(attach: Attach) -> tuple[Any, Adapter]:
    model = llama()
    adapter = attach(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model, adapter


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_is_an_adapter_and_its_state_to_the_bit(kind: str, tmp_path: Path) -> None:
    attach, share = KINDS[kind]
    model, adapter = moved(attach)
    folder = write(tmp_path / "checkpoints" / "checkpoint-3", adapter)
    own, read = adapter.state_dict(), checkpoint.read_state(folder)
    assert own.keys() == read.keys()
    assert all(torch.equal(own[name], read[name]) and own[name].dtype == read[name].dtype for name in own)
    beside = sum(tensor.nbytes for tensor in load_file(folder / checkpoint.ADAPTER).values())
    assert beside <= share * sum(tensor.nbytes for tensor in own.values())

    other, ids = llama(), torch.arange(12).view(2, 6)
    lk.load(other, folder)
    with torch.no_grad():
        torch.testing.assert_close(other(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-5)


def test_every_expert_is_written_once(tmp_path: Path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 40}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 3}
    adapter = lk.attach(
        MixtralForCausalLM(MixtralConfig(**sizes, **heads)), lk.LoRA(rank=2), target_modules=["experts"]
    )
    folder = write(tmp_path / "checkpoints" / "checkpoint-3", adapter)
    assert not load_file(folder / checkpoint.ADAPTER)
    own, read = adapter.state_dict(), checkpoint.read_state(folder)
    assert len(own) > 6
    assert all(torch.equal(own[name], read[name]) for name in own)


def test_peft_loads_a_checkpoint(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, adapter = moved(KINDS["lora"][0])
    folder = write(tmp_path / "checkpoints" / "checkpoint-3", adapter)
    theirs = peft.PeftModel.from_pretrained(llama(), str(folder))
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        torch.testing.assert_close(theirs(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-5)


def test_what_the_file_holds_otherwise_is_not_taken_from_it(tmp_path: Path) -> None:
    """The planted bug: a file that is not the state's own numbers must not be read as such."""
    _, adapter = moved(KINDS["lora"][0])
    folder = write(tmp_path / "checkpoints" / "checkpoint-3", adapter)
    tensors = load_file(folder / TENSORS)
    save_file({name: tensor * 2 for name, tensor in tensors.items()}, folder / TENSORS)
    own, read = adapter.state_dict(), checkpoint.read_state(folder)
    assert not any(torch.equal(own[name], read[name]) for name in own)


def test_a_checkpoint_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    _, adapter = moved(KINDS["lora"][0])
    save_file(adapter.state_dict(), tmp_path / checkpoint.ADAPTER)
    read = checkpoint.read_state(tmp_path)
    assert all(torch.equal(tensor, read[name]) for name, tensor in adapter.state_dict().items())


def test_the_members_of_a_router_are_written_once(tmp_path: Path) -> None:
    model = llama()
    for name in ("a", "b"):
        lk.attach(model, lk.LoRA(rank=2), name=name)
    router = lk.route(model, lk.XLoRA(), ["a", "b"], name="router")
    folders = [write(tmp_path / "checkpoints" / f"checkpoint-{step}", router) for step in (3, 6)]
    files = [folder / MEMBERS / "a" / TENSORS for folder in folders]
    assert files[0].stat().st_ino == files[1].stat().st_ino
    assert json.loads((folders[1] / "lorakit.json").read_text())["members"]
    other = llama()
    lk.load(other, folders[1])
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        torch.testing.assert_close(other(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-5)


def test_an_unfinished_run_names_its_newest_checkpoint(tmp_path: Path) -> None:
    _, adapter = moved(KINDS["lora"][0])
    for step in (9, 10):
        write(tmp_path / "checkpoints" / f"checkpoint-{step}", adapter)
    with pytest.raises(LorakitError, match=r"unfinished run; its newest checkpoint .*checkpoint-10"):
        locate(tmp_path)
