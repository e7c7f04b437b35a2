"""Diffusers' layout, with Diffusers itself: its loader reads what lorakit writes, and lorakit what it saves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import lorakit as lk
from conversion.kits import changes, clip, equal, fresh_clip, fresh_unet, random, read, same, trained, unet, write
from lorakit.conversion import convert

LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
SAMPLE = (torch.randn(2, 4, 8, 8), torch.tensor([3, 7]), torch.randn(2, 5, 12))


def output(model: nn.Module) -> torch.Tensor:
    x, t, text = SAMPLE
    with torch.no_grad():
        found: torch.Tensor = model(x, t, encoder_hidden_states=text).sample
    return found


def ours(model: nn.Module, folder: Path) -> torch.Tensor:
    lk.load(model, folder, name="ours")
    with lk.use(model, "ours"):
        found = output(model)
    lk.detach(model)
    return found


def by_diffusers(file: Path) -> torch.Tensor:
    from diffusers import StableDiffusionPipeline

    model = fresh_unet()
    state, alphas, metadata = StableDiffusionPipeline.lora_state_dict(
        str(file.parent), weight_name=file.name, unet_config=model.config, return_lora_metadata=True
    )
    StableDiffusionPipeline.load_lora_into_unet(state, alphas, model, adapter_name="theirs", metadata=metadata)
    return output(model)


PLAIN, ROOT, MAGNITUDES = (
    lk.LoRA(rank=3, alpha=5.0),
    lk.LoRA(rank=3, alpha=5.0, rslora=True),
    lk.DoRA(inner=lk.LoRA(rank=2, alpha=1.0)),
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "to"),
    [(PLAIN, "kohya"), (ROOT, "kohya"), (PLAIN, "diffusers"), (ROOT, "diffusers"), (MAGNITUDES, "diffusers")],
    ids=lambda value: value if isinstance(value, str) else value.name + "-root" * value.rslora,
)
def test_diffusers_gives_the_same_output(method: Any, to: str, tmp_path: Path) -> None:
    """Its own pipeline loader on a UNet: attention, feed-forward, projections and convolutions, ranks and alphas mixed."""
    model = unet()
    folder = trained(
        model,
        method,
        tmp_path / "peft",
        target_modules=["to_q", "to_out.0", "ff.net.0.proj", "proj_in", "conv1", "conv_shortcut"],
        # Diffusers' own reader of kohya's files takes all alphas of attention for the most common one
        rank_pattern={"to_q": 2, "conv1": 4} if to == "diffusers" or not method.rslora else {},
        alpha_pattern={"to_q": 7.0} if to == "diffusers" else {},
    )
    base, expected = output(model), ours(model, folder)
    assert (base - expected).abs().max() > 1e-2
    done = convert(folder, tmp_path / "pytorch_lora_weights.safetensors", to)
    assert done.output is not None
    torch.testing.assert_close(by_diffusers(done.output), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_what_diffusers_saves_is_read(tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline
    from diffusers.loaders.lora_base import _pack_dict_with_prefix
    from peft import LoraConfig, get_peft_model_state_dict

    model = fresh_unet()
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["to_q", "conv1"], rank_pattern={"conv1": 2}, use_rslora=True)
    model.add_adapter(config, adapter_name="theirs")
    with torch.no_grad():
        for seed, (name, parameter) in enumerate(model.named_parameters()):
            if "lora_" in name:
                parameter.copy_(random(seed, *parameter.shape))
    expected = output(model)
    StableDiffusionPipeline.save_lora_weights(
        tmp_path / "pipeline",
        unet_lora_layers=get_peft_model_state_dict(model, adapter_name="theirs"),
        unet_lora_adapter_metadata=model.peft_config["theirs"].to_dict(),
    )
    assert _pack_dict_with_prefix({"r": 1}, "unet") == {"unet.r": 1}
    done = convert(tmp_path / "pipeline", tmp_path / "peft", "peft")
    assert done.source == "diffusers"
    torch.testing.assert_close(ours(unet(), tmp_path / "peft"), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_text_encoder_is_loaded_by_its_own_loader(tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    model = clip()
    ids = torch.tensor([[1, 5, 9, 2]])
    folder = trained(
        model, lk.LoRA(rank=2, alpha=6.0), tmp_path / "peft", target_modules=["q_proj", "fc1"], rank_pattern={"fc1": 3}
    )
    lk.load(model, folder, name="ours")
    with lk.use(model, "ours"), torch.no_grad():
        expected = model(ids).last_hidden_state
    convert(folder, tmp_path / "file.safetensors", "diffusers")
    assert all(key.startswith("text_encoder.text_model.encoder.") for key in read(tmp_path / "file.safetensors")[0])
    state, alphas, metadata = StableDiffusionPipeline.lora_state_dict(
        str(tmp_path), weight_name="file.safetensors", return_lora_metadata=True
    )
    theirs = fresh_clip()
    StableDiffusionPipeline.load_lora_into_text_encoder(
        state, alphas, theirs, prefix="text_encoder", adapter_name="theirs", metadata=metadata
    )
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).last_hidden_state, expected, rtol=1e-4, atol=1e-5)


def test_the_older_spellings_are_the_same_adapter(tmp_path: Path) -> None:
    A, B = random(0, 2, 8), random(1, 8, 2)
    spellings = (
        {f"unet.{LAYER}.to_q.lora_A.weight": A, f"unet.{LAYER}.to_q.lora_B.weight": B},
        {f"unet.{LAYER}.to_q.lora.down.weight": A, f"unet.{LAYER}.to_q.lora.up.weight": B},
        {f"unet.{LAYER}.processor.to_q_lora.down.weight": A, f"unet.{LAYER}.processor.to_q_lora.up.weight": B},
    )
    for number, tensors in enumerate(spellings):
        convert(write(tmp_path / f"{number}.safetensors", tensors), tmp_path / str(number), "peft")
        same(changes(unet(), tmp_path / str(number)), {f"{LAYER}.to_q": B @ A})
    alpha = {f"unet.{LAYER}.to_q.alpha": torch.tensor(6.0)}
    convert(write(tmp_path / "a.safetensors", {**spellings[1], **alpha}), tmp_path / "a", "peft")
    same(changes(unet(), tmp_path / "a"), {f"{LAYER}.to_q": 3.0 * B @ A})
    words = {
        "text_encoder.text_model.encoder.layers.0.self_attn.to_out_lora.down.weight": random(2, 2, 12),
        "text_encoder.text_model.encoder.layers.0.self_attn.to_out_lora.up.weight": random(3, 12, 2),
        "text_encoder.text_model.encoder.layers.0.mlp.fc2.lora_linear_layer.down.weight": random(4, 2, 20),
        "text_encoder.text_model.encoder.layers.0.mlp.fc2.lora_linear_layer.up.weight": random(5, 12, 2),
    }
    convert(write(tmp_path / "b.safetensors", words), tmp_path / "b", "peft", base=clip())
    assert sorted(changes(clip(), tmp_path / "b")) == [
        "encoder.layers.0.mlp.fc2",
        "encoder.layers.0.self_attn.out_proj",
    ]


def test_ranks_alphas_and_rslora_come_back(tmp_path: Path) -> None:
    model = unet()
    folder = trained(
        model,
        lk.LoRA(rank=3, alpha=5.0, rslora=True),
        tmp_path / "peft",
        target_modules=["to_q", "to_k"],
        rank_pattern={"to_k": 2},
        alpha_pattern={"to_k": 0.1},
    )
    convert(folder, tmp_path / "a.safetensors", "diffusers")
    metadata = json.loads(read(tmp_path / "a.safetensors")[1]["lora_adapter_metadata"])
    assert metadata["unet.use_rslora"] is True
    assert set(metadata["unet.rank_pattern"].values()) | {metadata["unet.r"]} == {2, 3}
    convert(tmp_path / "a.safetensors", tmp_path / "again", "peft")
    same(changes(model, tmp_path / "again"), changes(model, folder))
    convert(tmp_path / "again", tmp_path / "b.safetensors", "diffusers")
    equal(read(tmp_path / "b.safetensors")[0], read(tmp_path / "a.safetensors")[0])
    assert read(tmp_path / "b.safetensors")[1] == read(tmp_path / "a.safetensors")[1]


ALONE = "single_transformer_blocks.1.attn.to_k"


@pytest.mark.parametrize(
    ("ends", "extra", "scale"),
    [
        (("lora_A.weight", "lora_B.weight"), {}, 1.0),
        (("lora_A.default.weight", "lora_B.default.weight"), {}, 1.0),
        (("lora.down.weight", "lora.up.weight"), {"alpha": 1.0}, 0.5),
        (("lora_A.weight", "lora_B.weight"), {"metadata": {"r": 2, "lora_alpha": 6}}, 3.0),
    ],
)
def test_a_file_of_one_part_without_its_name(
    ends: tuple[str, str], extra: dict[str, Any], scale: float, tmp_path: Path
) -> None:
    """As `save_lora_adapter` of a model writes it, with its configuration in the metadata, and other tools without one."""
    words = {f"{ALONE}.{ends[0]}": random(0, 2, 8), f"{ALONE}.{ends[1]}": random(1, 6, 2)}
    if "alpha" in extra:
        words[f"{ALONE}.alpha"] = torch.tensor(extra["alpha"])
    file = tmp_path / "a.safetensors"
    told = {"lora_adapter_metadata": json.dumps(extra["metadata"])} if "metadata" in extra else None
    save_file(words, file, metadata=told)
    found = convert(file, tmp_path / "k.safetensors", "kohya")
    ((component, path, layer),) = found.description.layers()
    assert (found.source, component, path, layer.scale) == ("diffusers", "transformer", ALONE, scale)
    back = convert(tmp_path / "k.safetensors", None, "peft")  # its underscores are cut without the model
    ((component, path, again),) = back.description.layers()
    assert (component, path, again.scale) == ("transformer", ALONE, scale)
    assert torch.equal(
        again.tensors["B"] @ again.tensors["A"], words[f"{ALONE}.{ends[1]}"] @ words[f"{ALONE}.{ends[0]}"]
    )
