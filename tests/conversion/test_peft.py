"""PEFT as oracle: what PEFT saves converts, and PEFT loads what comes back with the same output."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from torch import nn

from conversion.kits import fresh_llama, llama, random
from lorakit.conversion import convert

IDS = torch.tensor([[3, 8, 1, 40], [9, 2, 7, 7]])
CONFIGS = {
    "lora": peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"], rank_pattern={"q_proj": 2}),
    "rslora": peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=["q_proj"], use_rslora=True, alpha_pattern={"q_proj": 2}
    ),
    "dora": peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"], use_dora=True),
    "loha": peft.LoHaConfig(r=2, alpha=3, target_modules=["q_proj", "down_proj"]),
    "lokr": peft.LoKrConfig(r=2, alpha=3, target_modules=["q_proj", "down_proj"]),
}
ROADS = {
    "lora": ["lycoris", "gguf", "mlx", "loralib"],
    "rslora": ["lycoris", "gguf", "mlx", "loralib"],
    "dora": ["lycoris", "mlx"],
    "loha": ["lycoris", "gguf"],
    "lokr": ["lycoris"],
}


def output(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


@pytest.mark.parametrize(("kind", "to"), [(kind, to) for kind, targets in ROADS.items() for to in targets])
def test_peft_loads_what_went_through_another_format(kind: str, to: str, tmp_path: Path) -> None:
    model = peft.get_peft_model(fresh_llama(), CONFIGS[kind])
    with torch.no_grad():
        for seed, parameter in enumerate(model.parameters()):
            if parameter.requires_grad:
                parameter.add_(random(seed, *parameter.shape))
    expected = output(model)
    model.save_pretrained(tmp_path / "theirs")
    suffix = {"lycoris": ".safetensors", "loralib": ".safetensors", "gguf": ".gguf", "mlx": ""}[to]
    convert(tmp_path / "theirs", tmp_path / f"between{suffix}", to, base=llama())
    convert(tmp_path / f"between{suffix}", tmp_path / "ours", "peft", base=llama())
    again = peft.PeftModel.from_pretrained(fresh_llama(), tmp_path / "ours")
    assert (output(llama()) - expected).abs().max() > 1e-3
    torch.testing.assert_close(output(again), expected, rtol=1e-4, atol=1e-5)
