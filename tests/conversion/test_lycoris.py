"""LyCORIS's methods: LoHa, LoKr, whole matrices, their Tucker forms, and the three places where a scale is counted wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import lorakit as lk
from conversion.kits import changes, equal, llama, random, read, same, trained, unet, write
from lorakit.conversion import convert
from lorakit.files.store import read_own

LINEAR = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
CONVOLUTION = "down_blocks.1.resnets.0.conv1"


def named(layer: str) -> str:
    return "lora_unet_" + layer.replace(".", "_")


def test_loha_counts_its_scale_once(tmp_path: Path) -> None:
    model = unet()
    tensors: dict[str, Tensor] = {}
    expected = {}
    for seed, layer in enumerate((LINEAR, CONVOLUTION)):
        W = model.get_parameter(f"{layer}.weight")
        out, columns = W.flatten(1).shape
        halves = [
            random(seed, out, 2),
            random(seed + 1, 2, columns),
            random(seed + 2, out, 2),
            random(seed + 3, 2, columns),
        ]
        for word, half in zip(("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), halves, strict=True):
            tensors[f"{named(layer)}.{word}"] = half
        tensors[f"{named(layer)}.alpha"] = torch.tensor(3.0)
        expected[layer] = (1.5 * (halves[0] @ halves[1]) * (halves[2] @ halves[3])).reshape(W.shape)
    file = write(tmp_path / "a.safetensors", tensors)
    done = convert(file, tmp_path / "peft", "peft", base={"unet": model})
    assert done.source == "lycoris"
    same(changes(model, tmp_path / "peft"), expected)
    convert(tmp_path / "peft", tmp_path / "back.safetensors", "lycoris")
    equal(read(tmp_path / "back.safetensors")[0], tensors)


def test_loha_and_lokr_are_loras_where_a_target_has_no_other(tmp_path: Path) -> None:
    """The Khatri-Rao and Kronecker factors, exactly, at rank² and at the sizes' product."""
    model = unet()
    folder = trained(model, lk.LoHa(rank=2, alpha=3.0), tmp_path / "loha", target_modules=["to_q"])
    done = convert(folder, tmp_path / "a.safetensors", "kohya")
    assert (
        done.notes == ("8 layers: loha of rank 2 as lora of rank 4, which is exact",)
        or "as lora of rank 4" in done.notes[0]
    )
    convert(tmp_path / "a.safetensors", tmp_path / "again", "peft")
    same(changes(model, tmp_path / "again"), changes(model, folder))
    folder = trained(
        model, lk.LoKr(rank=1, alpha=2.0, factor=2), tmp_path / "lokr", target_modules=["proj_in", "conv1"]
    )
    with pytest.raises(lk.LorakitError, match=r"has no place for lokr .*resize --rank R"):
        convert(
            trained(model, lk.LoKr(rank=8), tmp_path / "wide", target_modules=["to_q"]),
            tmp_path / "b.safetensors",
            "kohya",
        )
    assert not (tmp_path / "b.safetensors").exists()


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "low-rank"])
def test_lokr_with_two_whole_matrices_has_scale_one(whole: bool, tmp_path: Path) -> None:
    model = unet()
    W = model.get_parameter(f"{LINEAR}.weight")  # 8 × 8
    C = random(0, 2, 2)
    tensors = {f"{named(LINEAR)}.lokr_w1": C, f"{named(LINEAR)}.alpha": torch.tensor(6.0)}
    if whole:
        D = tensors[f"{named(LINEAR)}.lokr_w2"] = random(1, 4, 4)
        expected = torch.kron(C, D)  # alpha counts for nothing
    else:
        a, b = random(2, 4, 1), random(3, 1, 4)
        tensors |= {f"{named(LINEAR)}.lokr_w2_a": a, f"{named(LINEAR)}.lokr_w2_b": b}
        expected = 6.0 * torch.kron(C, a @ b)
    assert expected.shape == W.shape
    convert(write(tmp_path / "a.safetensors", tensors), tmp_path / "peft", "peft")
    same(changes(model, tmp_path / "peft"), {LINEAR: expected})
    convert(tmp_path / "peft", tmp_path / "back.safetensors", "lycoris")
    back, _ = read(tmp_path / "back.safetensors")
    alpha = f"{named(LINEAR)}.alpha"
    equal({k: v for k, v in back.items() if k != alpha}, {k: v for k, v in tensors.items() if k != alpha})
    convert(tmp_path / "back.safetensors", tmp_path / "again", "peft")
    same(changes(model, tmp_path / "again"), {LINEAR: expected})


def test_lokr_of_peft_with_whole_matrices_keeps_its_scale(tmp_path: Path) -> None:
    """PEFT divides by the rank also there; LyCORIS does not, so the scale goes into C."""
    model = unet()
    folder = trained(model, lk.LoKr(rank=8, alpha=2.0), tmp_path / "peft", target_modules=["to_q", "conv2"])
    convert(folder, tmp_path / "a.safetensors", "lycoris")
    convert(tmp_path / "a.safetensors", tmp_path / "again", "peft", base={"unet": model})
    same(changes(model, tmp_path / "again"), changes(model, folder))


def test_lokr_factors_are_found_for_all_layers_at_once(tmp_path: Path) -> None:
    """A layer of 8 × 8 has the sizes of factor 2 and of others; one of 64 × 8 says which it was."""
    model = unet()
    feed = LINEAR.replace("attn1.to_q", "ff.net.0.proj")
    tensors: dict[str, Tensor] = {}
    expected = {}
    for seed, layer in enumerate((LINEAR, feed)):
        out, into = model.get_parameter(f"{layer}.weight").shape
        C, a, b = random(seed, 2, 2), random(seed + 1, out // 2, 1), random(seed + 2, 1, into // 2)
        tensors |= {f"{named(layer)}.lokr_w1": C, f"{named(layer)}.lokr_w2_a": a, f"{named(layer)}.lokr_w2_b": b}
        expected[layer] = torch.kron(C, a @ b)
    convert(write(tmp_path / "a.safetensors", tensors), tmp_path / "peft", "peft")
    same(changes(model, tmp_path / "peft"), expected)


def test_tucker_forms_are_the_two_part_ones(tmp_path: Path) -> None:
    model = unet()
    W = model.get_parameter(f"{CONVOLUTION}.weight")
    out, into, *kernel = W.shape
    r = 2
    parts = [(random(3 * i, r, r, *kernel), random(3 * i + 1, r, out), random(3 * i + 2, r, into)) for i in range(2)]
    tensors = {f"{named(CONVOLUTION)}.alpha": torch.tensor(1.0)}
    for side, (core, first, second) in zip("12", parts, strict=True):
        tensors |= {
            f"{named(CONVOLUTION)}.hada_t{side}": core,
            f"{named(CONVOLUTION)}.hada_w{side}_a": first,
            f"{named(CONVOLUTION)}.hada_w{side}_b": second,
        }
    first, second = (torch.einsum("pqkl,po,qi->oikl", core, a, b) for core, a, b in parts)
    convert(write(tmp_path / "a.safetensors", tensors), tmp_path / "peft", "peft", base={"unet": model})
    same(changes(model, tmp_path / "peft"), {CONVOLUTION: 0.5 * first * second})

    core, a, b = random(20, 1, 1, *kernel), random(21, 1, 4), random(22, 1, 4)
    C = random(23, out // 4, into // 4)
    tensors = {
        f"{named(CONVOLUTION)}.lokr_w1": C,
        f"{named(CONVOLUTION)}.lokr_t2": core,
        f"{named(CONVOLUTION)}.lokr_w2_a": a,
        f"{named(CONVOLUTION)}.lokr_w2_b": b,
        f"{named(CONVOLUTION)}.alpha": torch.tensor(1.0),
    }
    D = torch.einsum("pqkl,po,qi->oikl", core, a, b)
    convert(write(tmp_path / "b.safetensors", tensors), tmp_path / "lokr", "peft", base={"unet": model})
    expected = torch.einsum("ab,cdkl->acbdkl", C, D).reshape(W.shape)
    same(changes(model, tmp_path / "lokr"), {CONVOLUTION: expected})


def test_whole_matrices_are_full_deltas_in_lorakits_own_file(tmp_path: Path) -> None:
    model = unet()
    tensors = {
        f"{named(layer)}.diff": random(seed, *model.get_parameter(f"{layer}.weight").shape)
        for seed, layer in enumerate((LINEAR, CONVOLUTION))
    }
    file = write(tmp_path / "a.safetensors", {**tensors, f"{named(CONVOLUTION)}.diff_b": torch.zeros(16)})
    convert(file, tmp_path / "peft", "peft")
    assert read_own(tmp_path / "peft")["method"]["name"] == "full"
    same(
        changes(model, tmp_path / "peft"),
        {LINEAR: tensors[f"{named(LINEAR)}.diff"], CONVOLUTION: tensors[f"{named(CONVOLUTION)}.diff"]},
    )
    with pytest.raises(
        lk.LorakitError, match="is a whole matrix, which LyCORIS keeps in the shape of the layer's weight"
    ):
        convert(tmp_path / "peft", tmp_path / "back.safetensors", "lycoris")
    convert(tmp_path / "peft", tmp_path / "back.safetensors", "lycoris", base=model)
    equal(read(tmp_path / "back.safetensors")[0], tensors)


def test_dora_over_loha(tmp_path: Path) -> None:
    model = unet()
    folder = trained(model, lk.DoRA(inner=lk.LoHa(rank=2)), tmp_path / "own", target_modules=["to_q", "conv1"])
    convert(folder, tmp_path / "a.safetensors", "lycoris")
    assert read(tmp_path / "a.safetensors")[0][f"{named(CONVOLUTION)}.dora_scale"].shape == (16, 1, 1, 1)
    convert(tmp_path / "a.safetensors", tmp_path / "again", "peft", base={"unet": model})
    same(changes(model, tmp_path / "again"), changes(model, folder))
    with pytest.raises(lk.LorakitError, match="no place for dora over loha"):
        convert(folder, tmp_path / "b.safetensors", "kohya")


def test_a_language_model_has_the_prefix_of_the_wrapper(tmp_path: Path) -> None:
    model = llama()
    folder = trained(model, lk.LoHa(rank=2), tmp_path / "own", target_modules=["q_proj", "down_proj"])
    convert(folder, tmp_path / "a.safetensors", "lycoris")
    keys = read(tmp_path / "a.safetensors")[0]
    assert "lycoris_model_layers_1_self_attn_q_proj.hada_w2_b" in keys
    convert(tmp_path / "a.safetensors", tmp_path / "again", "peft")  # known words: no base needed
    same(changes(model, tmp_path / "again"), changes(model, folder))


def test_mixed_methods_become_one_where_that_is_exact(tmp_path: Path) -> None:
    model = unet()
    W = model.get_parameter(f"{LINEAR}.weight")
    halves = [random(0, 8, 2), random(1, 2, 8), random(2, 8, 2), random(3, 2, 8)]
    words = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    tensors = {f"{named(LINEAR)}.{word}": half for word, half in zip(words, halves, strict=True)}
    up, down = random(4, 16, 2), random(5, 2, 8, 3, 3)
    tensors |= {
        f"{named(CONVOLUTION)}.lora_up.weight": up[:, :, None, None],
        f"{named(CONVOLUTION)}.lora_down.weight": down,
    }
    done = convert(write(tmp_path / "a.safetensors", tensors), tmp_path / "peft", "peft")
    assert done.notes == ("1 layer: loha of rank 2 as lora of rank 4, which is exact",)
    loha = ((halves[0] @ halves[1]) * (halves[2] @ halves[3])).reshape(W.shape)
    same(changes(model, tmp_path / "peft"), {LINEAR: loha, CONVOLUTION: torch.einsum("or,rikl->oikl", up, down)})
    tensors |= {f"{named('mid_block.resnets.0.conv1')}.diff": random(6, 16, 16, 3, 3)}
    with pytest.raises(lk.LorakitError, match=r"PEFT's folder has one method, and this adapter has .*1 × full"):
        convert(write(tmp_path / "b.safetensors", tensors), tmp_path / "none", "peft")
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
@pytest.mark.parametrize("algo", ["lora", "loha", "lokr"])
@pytest.mark.parametrize("options", [{}, {"weight_decompose": True}, {"rs_lora": True}, {"use_tucker": True}], ids=str)
def test_lycoris_itself_agrees(algo: str, options: dict[str, bool], tmp_path: Path) -> None:
    """Its own modules compute the output, its own state dict makes the file."""
    modules = pytest.importorskip("lycoris.modules", reason="LyCORIS is not installed")
    kinds = {"lora": modules.locon.LoConModule, "loha": modules.loha.LohaModule, "lokr": modules.lokr.LokrModule}
    model = unet()
    layers = {LINEAR: torch.randn(3, 8), CONVOLUTION: torch.randn(2, 8, 5, 5)}
    if (
        algo == "lokr" and "rs_lora" in options
    ):  # of these sizes both matrices are whole, where LyCORIS trains and reads two scales
        layers = {LINEAR.replace("attn1.to_q", "ff.net.0.proj"): torch.randn(3, 8)}
    tensors: dict[str, Tensor] = {}
    outputs = {}
    for layer, x in layers.items():
        base = model.get_submodule(layer)
        module = kinds[algo](named(layer), base, 1.0, 2, 3.0, **options)
        with torch.no_grad():
            for seed, parameter in enumerate(module.parameters()):
                parameter.add_(random(seed, *parameter.shape))
            outputs[layer] = module(x)
        tensors |= {f"{named(layer)}.{word}": value.detach() for word, value in module.custom_state_dict().items()}
    convert(write(tmp_path / "a.safetensors", tensors), tmp_path / "peft", "peft", base={"unet": model})
    lk.load(model, tmp_path / "peft", name="converted")
    with lk.use(model, "converted"), torch.no_grad():
        for layer, x in layers.items():
            torch.testing.assert_close(model.get_submodule(layer)(x), outputs[layer], rtol=1e-4, atol=1e-5)
    lk.detach(model)
