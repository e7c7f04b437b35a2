"""Mixed-up input is refused by name before anything is written, and a killed write leaves what was there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import lorakit as lk
from conversion.kits import llama, random, trained, unet, write
from lorakit.conversion import FORMATS, convert

NAME = "lora_unet_mid_block_attentions_0_proj_in"
Words = dict[str, Tensor]


def good() -> Words:
    return {
        f"{NAME}.lora_down.weight": random(0, 2, 16, 1, 1),
        f"{NAME}.lora_up.weight": random(1, 16, 2, 1, 1),
        f"{NAME}.alpha": torch.tensor(1.0),
    }


def without(end: str) -> Callable[[Words], Words]:
    return lambda words: {key: value for key, value in words.items() if not key.endswith(end)}


def with_nan(words: Words) -> Words:
    words[f"{NAME}.lora_up.weight"][3, 1] = float("nan")
    return words


MIXED_UP: dict[str, tuple[Callable[[Words], Words], str]] = {
    "half of a pair": (
        without("lora_up.weight"),
        "proj_in has lora_A.weight and lacks lora_B.weight",
    ),
    "the other half": (
        without("lora_down.weight"),
        r"proj_in has lora_B.weight and lacks lora_A.weight",
    ),
    "an unknown key": (
        lambda words: {**words, "global_step": torch.ones(1)},
        "'global_step', which is no tensor of this format",
    ),
    "an unknown word": (
        lambda words: {**words, f"{NAME}.gain": torch.ones(1)},
        "gain', which is no tensor of this format",
    ),
    **{
        end: (
            lambda words, end=end: {**words, f"{NAME}.{end}": torch.ones(1)},
            rf"which is no tensor of this format: {what}",
        )
        for end, what in {
            "a1.weight": "it is GLoRA's",
            "on_input": r"it is LyCORIS' \(IA\)³",
            "oft_blocks": "it is a rotation",
            "w_norm": "it is a change of a norm",
        }.items()
    },
    "a token's embedding": (
        lambda words: {**words, "bundle_emb.word.string_to_param.*": torch.ones(2, 8)},
        r"string_to_param\.\*', which is no tensor of this format: it is a token's embedding",
    ),
    "a model's original names": (
        lambda words: {
            f"lora_unet_double_blocks_0_img_attn_qkv.{key.partition('.')[2]}": one for key, one in words.items()
        },
        "named as in the model's original code. Diffusers turns such names into its own",
    ),
    "ComfyUI's names": (
        lambda words: {f"diffusion_model.blocks.0.q.{key}.weight": torch.ones(2, 2) for key in ("lora_A", "lora_B")},
        "no known format .* named as in the model's original code. Diffusers turns such names into its own",
    ),
    "XLabs' names": (
        lambda words: {"double_blocks.0.processor.qkv_lora1.down.weight": torch.ones(2, 2)},
        "no known format .* named as in the model's original code",
    ),
    "PEFT's tensors alone": (
        lambda words: {f"base_model.model.q.{key}.weight": torch.ones(2, 2) for key in ("lora_A", "lora_B")},
        r"no known format .* whose adapter_config\.json says their scale; name the folder",
    ),
    "a NaN": (with_nan, r"proj_in\.lora_B\.weight holds a NaN or an infinity"),
    "ranks that differ": (
        lambda words: {**words, f"{NAME}.lora_up.weight": random(1, 16, 3, 1, 1)},
        r"lora_B\.weight is \(16, 3\), where \(16, 2\) would fit: lora of rank 2 on a matrix of 16 × 16",
    ),
    "an alpha of zero": (
        lambda words: {**words, f"{NAME}.alpha": torch.tensor(0.0)},
        "alpha is 0, which sd-scripts takes",
    ),
    "alphas of a layer": (
        lambda words: {**words, f"{NAME}.alpha": torch.ones(2)},
        r"alpha is \[1\.0, 1\.0\]; it is one finite",
    ),
    "no known prefix": (
        lambda words: {f"lora_vae_{k}": v for k, v in words.items()},
        "has no known format",
    ),
    "two methods": (
        lambda words: {**words, f"{NAME}.hada_w1_a": random(2, 16, 2)},
        "of more than one method",
    ),
    "magnitudes of inputs": (
        lambda words: {**words, f"{NAME}.dora_scale": torch.ones(1, 16, 1, 1)},
        r"magnitudes of inputs \(wd_on_out=False\)",
    ),
    "a bias": (lambda words: {**words, f"{NAME}.diff_b": torch.ones(16)}, "diff_b changes a bias"),
}


@pytest.mark.parametrize("kind", MIXED_UP)
def test_mixed_up_tensors(kind: str, tmp_path: Path) -> None:
    change, words = MIXED_UP[kind]
    file = write(tmp_path / "a.safetensors", change(good()))
    (tmp_path / "out.gguf").write_bytes(b"what was there")
    with pytest.raises(lk.LorakitError, match=words):
        convert(file, tmp_path / "peft", "peft")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.safetensors", "out.gguf"]


def test_a_wrong_base(tmp_path: Path) -> None:
    file = write(tmp_path / "a.safetensors", good())
    convert(file, None, "peft", base=unet())
    with pytest.raises(
        lk.LorakitError, match="the adapter changes 'unet', and the base that was named has 'text_encoder'"
    ):
        convert(file, tmp_path / "peft", "peft", base={"text_encoder": llama()})
    small = {**good(), f"{NAME}.lora_down.weight": random(0, 2, 12, 1, 1)}
    with pytest.raises(
        lk.LorakitError, match=r"proj_in is 16 × 16 in the base, and the adapter's is 16 × 12: it was made for another"
    ):
        convert(write(tmp_path / "b.safetensors", small), tmp_path / "peft", "peft", base=unet())
    folder = trained(llama(), lk.LoRA(rank=2), tmp_path / "llama", target_modules=["q_proj"])
    with pytest.raises(
        lk.LorakitError, match=r'unknown layer of the base "model\.layers\.1\.self_attn\.q_proj"; did you mean'
    ):
        convert(folder, tmp_path / "mlx", "mlx", base=llama(num_hidden_layers=1))
    assert not (tmp_path / "peft").exists()
    assert not (tmp_path / "mlx").exists()


def test_places_and_formats(tmp_path: Path) -> None:
    file = write(tmp_path / "a.safetensors", good())
    folder = trained(llama(), lk.LoRA(rank=2), tmp_path / "peft", target_modules=["q_proj"])
    (tmp_path / "old.bin").write_bytes(b"pickle")
    (tmp_path / "damaged.safetensors").write_bytes(b"no")
    (tmp_path / "damaged.gguf").write_bytes(b"no")
    (tmp_path / "two").mkdir()
    write(tmp_path / "two" / "a.safetensors", good())
    write(tmp_path / "two" / "b.safetensors", good())
    cases = (
        (file, tmp_path / "b", "koyha", 'unknown format "koyha"; did you mean "kohya"'),
        (file, tmp_path / "b.safetensors", "kohya", "is in kohya's format already"),
        (
            folder,
            tmp_path / "b",
            "lycoris",
            "lycoris is one .safetensors file, and the output is .*; give it that ending",
        ),
        (file, file, "lycoris", "is the source itself"),
        (file, tmp_path / "old.bin", "peft", "peft is a folder: .* is a file"),
        (tmp_path / "none", tmp_path / "b", "peft", "no such file or folder"),
        (tmp_path / "old.bin", tmp_path / "b", "peft", "is a pickle, which can run code when it is read"),
        (tmp_path / "damaged.safetensors", tmp_path / "b", "peft", "is no whole safetensors file"),
        (tmp_path / "damaged.gguf", tmp_path / "b", "peft", "is no whole GGUF file"),
        (tmp_path / "two", tmp_path / "b", "peft", "holds a.safetensors, b.safetensors; name one file"),
        (
            folder,
            tmp_path / "b.safetensors",
            "kohya",
            r"kohya is for parts of a diffusion pipeline .*--component",
        ),
        (
            folder,
            tmp_path / "b.safetensors",
            "diffusers",
            r"diffusers is for parts of a diffusion pipeline .*--component",
        ),
    )
    for source, output, to, words in cases:
        with pytest.raises(lk.LorakitError, match=words):
            convert(source, output, to)
    with pytest.raises(lk.LorakitError, match='unknown component "unett"; did you mean "unet"'):
        convert(folder, tmp_path / "b.safetensors", "kohya", component="unett")
    assert not (tmp_path / "b").exists()
    assert not (tmp_path / "b.safetensors").exists()


def test_methods_without_a_place_say_what_would_work(tmp_path: Path) -> None:
    model = llama()
    for number, method in enumerate((lk.VeRA(rank=2), lk.AdaLoRA(rank=2))):
        folder = trained(model, method, tmp_path / str(number), target_modules=["q_proj"])
        with pytest.raises(lk.LorakitError, match=r"which only PEFT's format and lorakit's own have\. `lorakit resize"):
            convert(folder, tmp_path / "mlx", "mlx")
    whole = trained(model, lk.LoRA(rank=2), tmp_path / "whole", target_modules=["q_proj"], modules_to_save=["lm_head"])
    with pytest.raises(
        lk.LorakitError, match=r"lm_head\.weight': neither a factor nor a magnitude\. Modules trained whole"
    ):
        convert(whole, tmp_path / "mlx", "mlx")


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lorakit.conversion.content as content

    file = write(tmp_path / "a.safetensors", good())
    folder = tmp_path / "peft"
    convert(file, folder, "peft")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    target = tmp_path / "b.safetensors"
    target.write_bytes(b"what was there")

    def broken(*args: object, **kwargs: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(content, "save_file", broken)
    with pytest.raises(lk.LorakitError, match=r"could not be written \(disk full\); what was there is as it was"):
        convert(folder, target, "kohya")
    monkeypatch.setattr(content, "write_bundle", broken)
    with pytest.raises(lk.LorakitError, match="disk full"):
        convert(file, folder, "peft")
    assert target.read_bytes() == b"what was there"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors", "peft"]


def test_the_table_is_what_the_files_say() -> None:
    for name, format in FORMATS.items():
        assert format.name == name
        assert "lora" in format.holds
        assert format.limits.endswith(".")
