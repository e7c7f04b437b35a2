"""kohya's layout: a file as sd-scripts writes it, read into PEFT's, loaded, and written back to the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lorakit as lk
from conversion.kits import changes, clip, equal, random, read, same, trained, unet, write
from lorakit.conversion import convert


def pair(tensors: dict[str, Tensor], name: str, weight: Tensor, rank: int, alpha: float, seed: int) -> Tensor:
    """Puts one layer's LoRA into a file as sd-scripts does; returns its ΔW."""
    out, into, *kernel = weight.shape
    up, down = random(seed, out, rank), random(seed + 1, rank, into, *kernel)
    tensors[f"{name}.lora_up.weight"] = up.reshape(out, rank, *[1] * len(kernel))
    tensors[f"{name}.lora_down.weight"] = down
    tensors[f"{name}.alpha"] = torch.tensor(alpha)
    return alpha / rank * torch.einsum("or,ri...->oi...", up, down)


UNET = {
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": (4, 2.0),
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0": (3, 1.5),
    "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj": (4, 4.0),
    "down_blocks.0.attentions.0.proj_in": (2, 2.0),
    "down_blocks.0.resnets.0.conv1": (2, 1.0),
    "down_blocks.0.resnets.0.time_emb_proj": (2, 1.0),
    "down_blocks.0.downsamplers.0.conv": (3, 1.0),
    "up_blocks.1.resnets.0.conv_shortcut": (2, 8.0),
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_v": (4, 2.0),
}


def a_unet_file(model: nn.Module, path: Path) -> tuple[Path, dict[str, Tensor]]:
    tensors: dict[str, Tensor] = {}
    expected = {}
    for seed, (layer, (rank, alpha)) in enumerate(UNET.items()):
        name = "lora_unet_" + layer.replace(".", "_")
        expected[layer] = pair(tensors, name, model.get_parameter(f"{layer}.weight"), rank, alpha, 10 * seed)
    return write(path, tensors, {"ss_network_module": "networks.lora"}), expected


def test_a_unet_file_is_the_same_change_in_lorakit_and_comes_back_to_the_bit(tmp_path: Path) -> None:
    model = unet()
    file, expected = a_unet_file(model, tmp_path / "style.safetensors")
    done = convert(file, tmp_path / "peft", "peft")
    assert (done.source, done.target) == ("kohya", "peft")
    same(changes(model, tmp_path / "peft"), expected)
    convert(tmp_path / "peft", tmp_path / "back.safetensors", "kohya")
    equal(read(tmp_path / "back.safetensors")[0], read(file)[0])


def test_two_components_become_two_folders_and_one_file_again(tmp_path: Path) -> None:
    tensors: dict[str, Tensor] = {}
    image, text = unet(), clip()
    layer, words = "mid_block.resnets.1.conv2", "encoder.layers.1.mlp.fc1"
    ours = pair(tensors, "lora_unet_mid_block_resnets_1_conv2", image.get_parameter(f"{layer}.weight"), 2, 1.0, 0)
    theirs = pair(
        tensors, "lora_te_text_model_encoder_layers_1_mlp_fc1", text.get_parameter(f"{words}.weight"), 3, 6.0, 5
    )
    file = write(tmp_path / "a.safetensors", tensors)
    done = convert(file, tmp_path / "peft", "peft", base={"unet": image, "text_encoder": text})
    assert sorted(done.description.components) == ["text_encoder", "unet"]
    same(changes(image, tmp_path / "peft" / "unet"), {layer: ours})
    same(changes(text, tmp_path / "peft" / "text_encoder"), {words: theirs})
    convert(tmp_path / "peft", tmp_path / "back.safetensors", "kohya")
    equal(read(tmp_path / "back.safetensors")[0], tensors)


def test_dora_magnitudes_go_both_ways(tmp_path: Path) -> None:
    """W' = m / ‖W + ΔW‖ (W + ΔW) per output row, for a linear layer and a convolution."""
    model = unet()
    tensors: dict[str, Tensor] = {}
    expected = {}
    layers = ("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k", "down_blocks.1.resnets.0.conv2")
    for seed, layer in enumerate(layers):
        W = model.get_parameter(f"{layer}.weight").detach()
        name = "lora_unet_" + layer.replace(".", "_")
        V = W + pair(tensors, name, W, 2, 3.0, 10 * seed)
        m = (1 + random(seed + 50, W.shape[0]).abs()).reshape(-1, *[1] * (W.ndim - 1))
        tensors[f"{name}.dora_scale"] = m
        norm = V.flatten(1).norm(dim=1).reshape(m.shape)
        expected[layer] = m / norm * V - W
    file = write(tmp_path / "a.safetensors", tensors)
    convert(file, tmp_path / "peft", "peft")
    same(changes(model, tmp_path / "peft"), expected)
    convert(tmp_path / "peft", tmp_path / "back.safetensors", "kohya")
    equal(read(tmp_path / "back.safetensors")[0], tensors)


def test_rslora_and_patterns_become_alphas(tmp_path: Path) -> None:
    """√rank goes into alpha, in float64 where float32 would round it: the scale is the very one."""
    model = unet()
    folder = trained(
        model,
        lk.LoRA(rank=3, alpha=5.0, rslora=True),
        tmp_path / "peft",
        target_modules=["to_q", "to_k"],
        rank_pattern={"to_k": 2},
        alpha_pattern={"to_k": 0.1},
    )
    convert(folder, tmp_path / "a.safetensors", "kohya")
    tensors, _ = read(tmp_path / "a.safetensors")
    scales = {
        (
            tensors[key.replace("alpha", "lora_down.weight")].shape[0],
            round(float(value) / tensors[key.replace("alpha", "lora_down.weight")].shape[0], 12),
        )
        for key, value in tensors.items()
        if key.endswith(".alpha")
    }
    assert scales == {(3, round(5.0 / 3**0.5, 12)), (2, round(0.1 / 2**0.5, 12))}
    convert(tmp_path / "a.safetensors", tmp_path / "again", "peft")
    same(changes(model, tmp_path / "again"), changes(model, folder))


def test_sdxl_has_the_names_of_stability_both_ways(tmp_path: Path) -> None:
    names = {
        "input_blocks_4_1_transformer_blocks_0_attn1_to_q": "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
        "input_blocks_8_1_proj_in": "down_blocks.2.attentions.1.proj_in",
        "input_blocks_3_0_op": "down_blocks.0.downsamplers.0.conv",
        "input_blocks_1_0_in_layers_2": "down_blocks.0.resnets.0.conv1",
        "input_blocks_7_0_skip_connection": "down_blocks.2.resnets.0.conv_shortcut",
        "middle_block_1_transformer_blocks_3_ff_net_0_proj": "mid_block.attentions.0.transformer_blocks.3.ff.net.0.proj",
        "middle_block_2_out_layers_3": "mid_block.resnets.1.conv2",
        "output_blocks_0_0_emb_layers_1": "up_blocks.0.resnets.0.time_emb_proj",
        "output_blocks_2_2_conv": "up_blocks.0.upsamplers.0.conv",
        "output_blocks_2_1_transformer_blocks_1_attn2_to_out_0": "up_blocks.0.attentions.2.transformer_blocks.1.attn2.to_out.0",
        "time_embed_0": "time_embedding.linear_1",
        "label_emb_0_2": "add_embedding.linear_2",
        "input_blocks_0_0": "conv_in",
        "out_2": "conv_out",
    }
    tensors: dict[str, Tensor] = {}
    for seed, name in enumerate(names):
        pair(tensors, f"lora_unet_{name}", torch.empty(6, 5), 2, 1.0, seed)
    pair(tensors, "lora_te1_text_model_encoder_layers_0_self_attn_q_proj", torch.empty(6, 5), 2, 1.0, 90)
    pair(tensors, "lora_te2_text_model_encoder_layers_0_mlp_fc2", torch.empty(6, 5), 2, 1.0, 91)
    file = write(tmp_path / "a.safetensors", tensors)
    done = convert(file, tmp_path / "peft", "peft")
    assert sorted(done.description.components["unet"]) == sorted(names.values())
    convert(tmp_path / "peft", tmp_path / "back.safetensors", "kohya")
    equal(read(tmp_path / "back.safetensors")[0], tensors)


def test_three_part_convolutions_are_the_same_lora_in_two(tmp_path: Path) -> None:
    model = unet()
    layer = "down_blocks.0.resnets.0.conv2"
    name = "lora_unet_" + layer.replace(".", "_")
    W = model.get_parameter(f"{layer}.weight")
    up, mid, down = random(0, W.shape[0], 3), random(1, 3, 3, 3, 3), random(2, 3, W.shape[1])
    tensors = {
        f"{name}.lora_up.weight": up[:, :, None, None],
        f"{name}.lora_mid.weight": mid,
        f"{name}.lora_down.weight": down[:, :, None, None],
        f"{name}.alpha": torch.tensor(6.0),
    }
    done = convert(write(tmp_path / "a.safetensors", tensors), tmp_path / "peft", "peft")
    same(changes(model, tmp_path / "peft"), {layer: 2.0 * torch.einsum("or,rskl,si->oikl", up, mid, down)})
    assert any("Tucker" in note for note in done.notes)


def test_names_that_words_cannot_cut_need_the_base(tmp_path: Path) -> None:
    tensors: dict[str, Tensor] = {}
    pair(tensors, "lora_unet_head_block_to_x", torch.empty(6, 5), 2, 1.0, 0)
    file = write(tmp_path / "a.safetensors", tensors)
    with pytest.raises(lk.LorakitError, match="cannot be cut into layer names without the model"):
        convert(file, tmp_path / "peft", "peft")
    done = convert(file, None, "peft", base=["head.block_to_x", "other"])
    assert list(done.description.components["unet"]) == ["head.block_to_x"]
    with pytest.raises(lk.LorakitError, match=r"can be head\.block_to_x or head_block\.to_x\. Two layers"):
        convert(file, tmp_path / "peft", "peft", base=["head.block_to_x", "head_block.to_x"])
    with pytest.raises(lk.LorakitError, match="has no layer whose name with underscores is 'head_block_to_x'"):
        convert(file, tmp_path / "peft", "peft", base=["other"])
    assert not (tmp_path / "peft").exists()
