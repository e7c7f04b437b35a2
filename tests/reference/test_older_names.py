"""Adapters and checkpoints with names of other times: modules that transformers has renamed, fused or cut."""

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
from transformers.core_model_loading import Chunk, Concatenate, WeightConverter, WeightRenaming

import lorakit as lk
from lorakit.errors import LorakitError

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
TEXT = {**SMALL, "vocab_size": 200, "num_key_value_heads": 2}
VISION = {**SMALL, "image_size": 32, "patch_size": 8, "projection_dim": 32}
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}

KINDS: dict[str, Callable[[], Any]] = {
    "vit": lambda: transformers.ViTForImageClassification(
        transformers.ViTConfig(**SMALL, image_size=16, patch_size=4, num_labels=3)
    ),
    "llava": lambda: transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            text_config=transformers.LlamaConfig(**TEXT),
            vision_config=transformers.CLIPVisionConfig(**VISION),
            image_token_index=199,
        )
    ),
    "qwen2.5-vl": lambda: transformers.Qwen2_5_VLForConditionalGeneration(
        transformers.Qwen2_5_VLConfig(
            text_config={**TEXT, "rope_parameters": ROPE},
            vision_config={
                "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "out_hidden_size": 32,
                "fullatt_block_indexes": [1],
            },
        )
    ),
    "mixtral": lambda: transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**TEXT, num_local_experts=12, num_experts_per_tok=2)
    ),
}  # fmt: skip


def made(kind: str) -> Any:
    torch.manual_seed(0)
    return KINDS[kind]().eval()


def changed(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter of a model with its adapter merged."""
    lk.merge(model, next(iter(lk.adapters(model))))
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def write(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    folder.mkdir()
    held = {f"base_model.model.{name}": tensor.contiguous() for name, tensor in tensors.items()}
    save_file(held, folder / "adapter_model.safetensors")
    told = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **config}
    (folder / "adapter_config.json").write_text(json.dumps(told))
    return folder


OLD = {
    "vit": ("vit.encoder.layer.{}.attention.attention.query", "vit.layers.{}.attention.q_proj"),
    "llava": ("language_model.model.layers.{}.self_attn.q_proj",
              "model.language_model.layers.{}.self_attn.q_proj"),
    "qwen2.5-vl": ("model.layers.{}.self_attn.q_proj", "model.language_model.layers.{}.self_attn.q_proj"),
}  # fmt: skip


@pytest.mark.parametrize("kind", OLD)
def test_a_file_with_older_names_changes_the_same_weights(kind: str, tmp_path: Path) -> None:
    """Two ranks and two scales, told by patterns under the older names."""
    old, new = OLD[kind]
    torch.manual_seed(1)
    pairs = {i: (torch.randn(2 + i, 32), torch.randn(32, 2 + i)) for i in (0, 1)}
    files = {}
    for which, name in (("old", old), ("new", new)):
        tensors = {}
        for i, (A, B) in pairs.items():
            tensors[f"{name.format(i)}.lora_A.weight"] = A
            tensors[f"{name.format(i)}.lora_B.weight"] = B
        files[which] = write(
            tmp_path / which,
            tensors,
            target_modules=[name.format(i) for i in (0, 1)],
            rank_pattern={name.format(1): 3},
            alpha_pattern={name.format(1): 5},
        )
    found = {}
    for which, folder in files.items():
        model = made(kind)
        lk.load(model, folder)
        found[which] = changed(model)
    base = dict(made(kind).named_parameters())
    moved = [name for name in base if not torch.equal(found["old"][name], base[name])]
    assert moved == [f"{new.format(i)}.weight" for i in (0, 1)]
    for name in base:
        assert torch.equal(found["old"][name], found["new"][name])
    A, B = pairs[1]
    torch.testing.assert_close(found["old"][moved[1]] - base[moved[1]], 5 / 3 * B @ A)


def test_where_no_name_fits_the_nearest_are_told(tmp_path: Path) -> None:
    name = "model.layers.1.self_attn.q_proj"
    tensors = {f"{name}.lora_A.weight": torch.ones(2, 32), f"{name}.lora_B.weight": torch.ones(32, 2)}
    with pytest.raises(LorakitError, match=r"nearest .*model\.language_model\.layers\.1\.self_attn\.q_proj"):
        lk.load(made("llava"), write(tmp_path / "a", tensors, target_modules=["q_proj"]))


class Three(transformers.PreTrainedModel):
    """One layer that was three, and two that were one."""

    config_class = transformers.LlamaConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.qkv = nn.Linear(8, 20, bias=False)
        self.gate_proj = nn.Linear(8, 6, bias=False)
        self.up_proj = nn.Linear(8, 6, bias=False)


CONVERTERS = [
    WeightConverter(["q.weight", "k.weight", "v.weight"], "qkv.weight", [Concatenate(dim=0)]),
    WeightConverter("gate_up.weight", ["gate_proj.weight", "up_proj.weight"], [Chunk(dim=0)]),
    WeightRenaming("nothing", "nothing"),
]


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("lacking", ["", "k"])
def test_fused_and_cut_layers_are_followed(
    lacking: str, rslora: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorakit.models.renaming.get_model_conversion_mapping", lambda model: CONVERTERS)
    torch.manual_seed(2)
    model = Three(transformers.LlamaConfig())
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    outs = {"q": 12, "k": 4, "v": 4, "gate_up": 12}
    ranks = {"q": 2, "k": 2, "v": 3, "gate_up": 2}
    tensors, deltas = {}, {}
    for name, out in outs.items():
        A, B = torch.randn(ranks[name], 8), torch.randn(out, ranks[name])
        scale = 4 / (ranks[name] ** 0.5 if rslora else ranks[name])
        deltas[name] = torch.zeros(out, 8) if name == lacking else scale * B @ A
        if name != lacking:
            tensors |= {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B}
    lk.load(model, write(tmp_path / "a", tensors, target_modules=list(outs), rank_pattern={"v": 3}, use_rslora=rslora))
    after = changed(model)
    expected = {
        "qkv.weight": torch.cat([deltas[one] for one in "qkv"]),
        "gate_proj.weight": deltas["gate_up"][:6],
        "up_proj.weight": deltas["gate_up"][6:],
    }
    for name, delta in expected.items():
        torch.testing.assert_close(after[name] - before[name], delta, atol=1e-5, rtol=1e-5)


def test_what_cannot_be_placed_in_a_fused_layer_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorakit.models.renaming.get_model_conversion_mapping", lambda model: CONVERTERS)
    model = Three(transformers.LlamaConfig())
    alone = {"v.lora_A.weight": torch.ones(2, 8), "v.lora_B.weight": torch.ones(4, 2)}
    with pytest.raises(LorakitError, match="cannot be told where"):
        lk.load(model, write(tmp_path / "a", alone, target_modules=["v"]))
    magnitude = {**alone, "v.lora_magnitude_vector": torch.ones(4)}
    with pytest.raises(LorakitError, match="only a plain LoRA can follow"):
        lk.load(model, write(tmp_path / "b", magnitude, target_modules=["v"], use_dora=True))


@pytest.mark.parametrize("kind", ["vit", "llava", "mixtral"])
def test_extraction_compares_what_the_model_holds(kind: str, tmp_path: Path) -> None:
    """Matrices and norms differ; the folders have older names (and experts one by one)."""
    model = made(kind)
    model.save_pretrained(tmp_path / "base")
    held = set(load_file(tmp_path / "base" / "model.safetensors"))
    assert held != set(model.state_dict())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(tmp_path / "tuned")
    found = lk.extract(tmp_path / "base", tmp_path / "tuned", energy=1.0, output=tmp_path / "out")
    assert found.made.error < 1e-6
    assert not found.left
    base = type(model).from_pretrained(tmp_path / "base")
    lk.load(base, tmp_path / "out")
    after = changed(base)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(after[name], parameter.detach(), atol=1e-5, rtol=1e-5)


TIED: dict[str, Callable[[], Any]] = {
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    ),
    "whisper": lambda: transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(
            vocab_size=40, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, num_mel_bins=4, max_source_positions=8,
            max_target_positions=8, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        )
    ),
    "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2)),
}  # fmt: skip


@pytest.mark.parametrize("kind", TIED)
def test_a_changed_vocabulary_that_is_tied_is_extracted_and_stays_tied(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(4)
    model = TIED[kind]().eval()
    ids = torch.arange(3, 9)[None]
    given: dict[str, Any] = {"decoder_input_ids": ids} if kind != "gpt2" else {"input_ids": ids}
    given |= {"t5": {"input_ids": ids}, "whisper": {"input_features": torch.randn(1, 4, 16)}}.get(kind, {})
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path / "tuned")
    expected = model(**given).logits
    lk.extract(tmp_path / "base", tmp_path / "tuned", energy=1.0, output=tmp_path / "out")
    base = type(model).from_pretrained(tmp_path / "base").eval()
    assert (base(**given).logits - expected).abs().max() > 1e-2
    lk.load(base, tmp_path / "out", name="tuned")
    torch.testing.assert_close(base(**given).logits, expected, atol=1e-4, rtol=1e-4)
    lk.merge(base, "tuned")
    torch.testing.assert_close(base(**given).logits, expected, atol=1e-4, rtol=1e-4)
    assert base.get_output_embeddings().weight is base.get_input_embeddings().weight
    theirs = peft.PeftModel.from_pretrained(
        type(model).from_pretrained(tmp_path / "base"), str(tmp_path / "out")
    ).eval()
    torch.testing.assert_close(theirs(**given).logits, expected, atol=1e-4, rtol=1e-4)


def test_tied_weights_that_would_differ_are_not_merged_as_one() -> None:
    torch.manual_seed(4)
    model = TIED["gpt2"]().eval()
    adapter = lk.attach(model, lk.LoRA(rank=2), name="a", target_modules=["c_attn"], modules_to_save=["wte", "lm_head"])
    lk.merge(model, "a")  # both still hold the base's own weight
    adapter = lk.attach(model, lk.LoRA(rank=2), name="a", target_modules=["c_attn"], modules_to_save=["wte", "lm_head"])
    with torch.no_grad():
        next(one for key, one in adapter.named_parameters() if one.shape[0] == 40)[3, 5] += 1
    with pytest.raises(LorakitError, match="untie=True"):
        lk.merge(model, "a")


def test_extraction_says_a_tensor_that_the_model_does_not_know(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = made("vit")
    for where in ("base", "tuned"):
        with torch.no_grad():
            model.vit.layers[0].attention.q_proj.weight.add_(0.1)
        model.save_pretrained(tmp_path / where)
        file = tmp_path / where / "model.safetensors"
        save_file({**load_file(file), "foreign": torch.rand(2)}, file, metadata={"format": "pt"})
    found = lk.extract(tmp_path / "base", tmp_path / "tuned", rank=1, output=tmp_path / "out")
    assert found.left == {"foreign": 1.0}
    assert "foreign" in caplog.text
    with pytest.raises(LorakitError, match="foreign"):
        lk.extract(tmp_path / "base", tmp_path / "tuned", rank=1, rest="refuse", output=tmp_path / "no")


def test_the_adapters_name_within_a_tensors_name_is_taken_off(tmp_path: Path) -> None:
    name = "model.language_model.layers.1.self_attn.q_proj"
    tensors = {f"{name}.lora_A.default.weight": torch.ones(2, 32), f"{name}.lora_B.default.weight": torch.ones(32, 2)}
    assert list(lk.load(made("llava"), write(tmp_path / "a", tensors, target_modules=[name])).layers) == [name]
