"""Stacks of experts in other tools' files: by their names, with the same change, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import pytest
import torch
from torch import Tensor, nn

import lorakit as lk
from conversion.kits import read
from core.test_expert_verbs import KINDS, all_close, attached, changes, fresh, model_of
from lorakit.conversion import FORMATS, convert
from lorakit.conversion.gguf import ARCHITECTURES, MIXTURES

MLX = {
    "qwen3-moe": "model.layers.{}.mlp.switch_mlp",
    "gpt-oss": "model.layers.{}.mlp.experts",
    "llama4": "model.layers.{}.feed_forward.experts",
}
GGUF = ("qwen3-moe", "gpt-oss")


def written(kind: str, folder: Path) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model, and the changes of an adapter for it in a folder: experts of two ranks and scales, and attention."""
    model = model_of(kind)
    adapter = lk.attach(
        model, lk.LoRA(rank=3, alpha=5.0), name="a", target_modules=[*KINDS[kind][1], "o_proj"],
        rank_pattern={r"down_proj\.1": 2}, alpha_pattern={"o_proj": 4.0},
    )  # fmt: skip
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            nn.init.normal_(parameter, std=0.2)
    adapter.save(folder)
    return model, changes(adapter)


def apart(kind: str, model: nn.Module, stack: str, change: Tensor) -> dict[str, Tensor]:
    """One expert's change by matrix, as a program has it that holds gate and up apart."""
    if stack == "down_proj":
        return {"down_proj": change}
    halves = (change[0::2], change[1::2]) if kind == "gpt-oss" else change.chunk(2)
    return {"gate_proj": halves[0], "up_proj": halves[1]}


@pytest.mark.parametrize("kind", MLX)
def test_mlx(kind: str, tmp_path: Path) -> None:
    model, expected = written(kind, tmp_path / "peft")
    convert(tmp_path / "peft", tmp_path / "mlx", "mlx", base=model)
    tensors, _ = read(tmp_path / "mlx" / "adapters.safetensors")
    config = json.loads((tmp_path / "mlx" / "adapter_config.json").read_text())["lora_parameters"]
    for place, change in expected.items():
        if ".experts." not in place:
            continue
        _, stack, index = place.rsplit(".", 2)
        for name, own in apart(kind, model, stack, change).items():
            key = f"{MLX[kind].format(place.split('.')[2])}.{name}"
            A, B = tensors[f"{key}.lora_a"], tensors[f"{key}.lora_b"]
            assert A.shape[0] == B.shape[0] == 4
            torch.testing.assert_close(
                config["scale"] * (B[int(index)] @ A[int(index)]).double(), own, rtol=1e-4, atol=1e-6
            )
            assert key.split(".", 3)[3] in config["keys"]
    convert(tmp_path / "mlx", tmp_path / "again", "peft", base=model)
    all_close(fresh(kind, tmp_path / "again"), expected)


@pytest.mark.parametrize("kind", GGUF)
def test_gguf(kind: str, tmp_path: Path) -> None:
    model, expected = written(kind, tmp_path / "peft")
    convert(tmp_path / "peft", tmp_path / "a.gguf", "gguf", base=model)
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    found = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    alpha = float(reader.fields["adapter.lora.alpha"].contents())
    for place, change in expected.items():
        if ".experts." not in place:
            continue
        _, stack, index = place.rsplit(".", 2)
        for name, own in apart(kind, model, stack, change).items():
            key = f"blk.{place.split('.')[2]}.ffn_{name.removesuffix('_proj')}_exps.weight"
            A, B = found[f"{key}.lora_a"], found[f"{key}.lora_b"]
            assert A.shape[0] == B.shape[0] == 4
            product = alpha / A.shape[1] * (B[int(index)] @ A[int(index)]).double()
            torch.testing.assert_close(product, own, rtol=1e-4, atol=1e-6)
    convert(tmp_path / "a.gguf", tmp_path / "again", "peft", base=model)
    all_close(fresh(kind, tmp_path / "again"), expected)


def test_llama_cpps_names_are_those_of_its_own_package() -> None:
    for kind in MIXTURES:
        architecture = ARCHITECTURES[kind]
        (number,) = [arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name]
        known = {gguf.TENSOR_NAMES[tensor] for tensor in gguf.MODEL_TENSORS[number]}
        names = [*architecture.block.values(), "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"]
        assert {f"blk.{{bid}}.{name}" for name in names} <= known, kind


@pytest.mark.parametrize("to", ["kohya", "lycoris", "diffusers", "loralib"])
def test_formats_without_names_for_experts_refuse(to: str, tmp_path: Path) -> None:
    model, _ = written("qwen3-moe", tmp_path / "peft")
    suffix = FORMATS[to].suffix
    for base in (None, model):
        with pytest.raises(lk.LorakitError, match="merge"):
            convert(tmp_path / "peft", tmp_path / f"out{suffix}", to, base=base, component="unet")
    assert not (tmp_path / f"out{suffix}").exists()


def test_what_cannot_be_taken_apart_is_refused(tmp_path: Path) -> None:
    written("qwen3-moe", tmp_path / "peft")
    with pytest.raises(lk.LorakitError, match="--base"):
        convert(tmp_path / "peft", tmp_path / "mlx", "mlx")
    for kind in ("jetmoe", "dbrx"):
        model = model_of(kind)
        attached(model, kind, "a").save(tmp_path / kind)
        for to, output in (("mlx", "mlx"), ("gguf", "a.gguf"), ("loralib", "a.safetensors")):
            for base in (None, model):
                with pytest.raises(lk.LorakitError):
                    convert(tmp_path / kind, tmp_path / output, to, base=base)


def test_experts_of_mlx_need_the_base_for_pefts_format(tmp_path: Path) -> None:
    model, _ = written("qwen3-moe", tmp_path / "peft")
    convert(tmp_path / "peft", tmp_path / "mlx", "mlx", base=model)
    with pytest.raises(lk.LorakitError, match="pass --base"):
        convert(tmp_path / "mlx", tmp_path / "again", "peft")
