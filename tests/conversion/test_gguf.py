"""llama.cpp's adapters: names, turned rows, one alpha; and llama.cpp itself where it is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFWriter

import lorakit as lk
from conversion.kits import changes, fresh_llama, llama, random, same, trained
from lorakit.conversion import convert
from lorakit.files.store import read_config


def tensors_of(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    return {tensor.name: tensor.data for tensor in GGUFReader(path).tensors}


def value(path: Path, name: str) -> Any:
    return GGUFReader(path).fields[name].contents()


def turned(B: torch.Tensor, heads: int) -> torch.Tensor:
    """Row j of the first half of a head goes to 2 j, of the second to 2 j + 1, one by one."""
    result, size = torch.empty_like(B), B.shape[0] // heads
    for head in range(heads):
        for j in range(size // 2):
            for half in range(2):
                result[head * size + 2 * j + half] = B[head * size + half * (size // 2) + j]
    return result


def test_what_is_written(tmp_path: Path) -> None:
    model = llama()
    folder = trained(model, lk.LoRA(rank=3, alpha=6.0), tmp_path / "peft", rank_pattern={"k_proj": 2})
    done = convert(folder, tmp_path / "a.gguf", "gguf", base=model)
    assert done.notes == ()  # one alpha, so ranks that differ need no folding
    found = tensors_of(tmp_path / "a.gguf")
    assert len(found) == 2 * 2 * 7
    assert value(tmp_path / "a.gguf", "general.type") == "adapter"
    assert value(tmp_path / "a.gguf", "adapter.type") == "lora"
    assert value(tmp_path / "a.gguf", "general.architecture") == "llama"
    assert value(tmp_path / "a.gguf", "adapter.lora.alpha") == 6.0
    layer = done.description.components[""]["model.layers.1.self_attn.k_proj"]
    assert np.array_equal(found["blk.1.attn_k.weight.lora_a"], layer.tensors["A"].numpy())
    assert np.array_equal(found["blk.1.attn_k.weight.lora_b"], turned(layer.tensors["B"], heads=2).numpy())
    layer = done.description.components[""]["model.layers.0.mlp.gate_proj"]
    assert np.array_equal(found["blk.0.ffn_gate.weight.lora_b"], layer.tensors["B"].numpy())
    convert(tmp_path / "a.gguf", tmp_path / "back", "peft", base=model)
    same(changes(model, tmp_path / "back"), changes(model, folder))


def test_other_scales_are_multiplied_into_b(tmp_path: Path) -> None:
    model = llama()
    folder = trained(
        model,
        lk.LoRA(rank=3, alpha=6.0, rslora=True),
        tmp_path / "peft",
        rank_pattern={"up_proj": 2},
        alpha_pattern={"q_proj": 1.0},
    )
    done = convert(folder, tmp_path / "a.gguf", "gguf", base=model)
    assert done.notes == (f"GGUF has one alpha: {6 * 3**0.5:g}; in 4 layers of another scale B is multiplied by it",)
    convert(tmp_path / "a.gguf", tmp_path / "back", "peft", base=model)
    same(changes(model, tmp_path / "back"), changes(model, folder))
    assert read_config(tmp_path / "back")["alpha_pattern"] == {}


def test_a_file_of_llama_cpps_own_converter_is_read(tmp_path: Path) -> None:
    """Written by gguf's writer line by line; a folder with config.json alone is the base."""
    model = llama()
    writer = GGUFWriter(tmp_path / "theirs.gguf", "llama")
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 8.0)
    A, B = random(0, 2, 32), random(1, 32, 2)
    E, F = random(2, 2, 50), random(3, 32, 2)
    for name, tensor in {
        "blk.0.attn_q.weight.lora_a": A,
        "blk.0.attn_q.weight.lora_b": turned(B, heads=4),
        "token_embd.weight.lora_a": E.T.contiguous(),
        "token_embd.weight.lora_b": F,
    }.items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model.config.save_pretrained(tmp_path / "base")
    convert(tmp_path / "theirs.gguf", tmp_path / "peft", "peft", base=tmp_path / "base")
    same(
        changes(model, tmp_path / "peft"),
        {"model.layers.0.self_attn.q_proj": 4.0 * B @ A, "model.embed_tokens": 4.0 * (F @ E).T},
    )
    convert(tmp_path / "peft", tmp_path / "again.gguf", "gguf", base=tmp_path / "base")
    again, theirs = tensors_of(tmp_path / "again.gguf"), tensors_of(tmp_path / "theirs.gguf")
    assert sorted(again) == sorted(theirs)
    assert all(np.array_equal(again[name], theirs[name]) for name in theirs)
    with pytest.raises(lk.LorakitError, match="a GGUF adapter, needs the number of attention heads: pass --base"):
        convert(tmp_path / "theirs.gguf", tmp_path / "none", "peft")


def test_an_architecture_without_turned_rows(tmp_path: Path) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=50,
            hidden_size=32,
            intermediate_size=44,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )
    folder = trained(model, lk.LoRA(rank=2), tmp_path / "peft", target_modules=["q_proj"])
    done = convert(folder, tmp_path / "a.gguf", "gguf", base=model)
    B = done.description.components[""]["model.layers.0.self_attn.q_proj"].tensors["B"]
    assert np.array_equal(tensors_of(tmp_path / "a.gguf")["blk.0.attn_q.weight.lora_b"], B.numpy())
    assert value(tmp_path / "a.gguf", "general.architecture") == "qwen2"


def test_what_llama_cpp_has_not_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    model = llama(tie_word_embeddings=True)
    cases = (
        (lk.DoRA(inner=lk.LoRA(rank=2)), {}, r"llama\.cpp has no place for dora .*resize --energy 1\.0"),
        (
            lk.LoRA(rank=2),
            {"target_modules": ["embed_tokens"]},
            "embed_tokens shares its weight with lm_head in this base",
        ),
        (lk.Full(), {"target_modules": ["q_proj"]}, "no place for full"),
    )
    for number, (method, options, words) in enumerate(cases):
        folder = trained(model, method, tmp_path / str(number), **options)
        with pytest.raises(lk.LorakitError, match=words):
            convert(folder, tmp_path / "a.gguf", "gguf", base=model)
    folder = trained(model, lk.LoRA(rank=2), tmp_path / "good", target_modules=["q_proj"])
    with pytest.raises(
        lk.LorakitError, match="writing a GGUF adapter needs the number of attention heads: pass --base"
    ):
        convert(
            folder,
            tmp_path / "a.gguf",
            "gguf",
            base=["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"],
        )
    other = llama(hidden_size=24, num_attention_heads=2)
    with pytest.raises(lk.LorakitError, match=r"q_proj is 24 × 24 in the base, and the adapter's is 32 × 32"):
        convert(folder, tmp_path / "a.gguf", "gguf", base=other)
    odd = fresh_llama()
    odd.config.num_attention_heads = 3
    with pytest.raises(lk.LorakitError, match="32 rows of q or k are no 3 heads of an even size"):
        convert(folder, tmp_path / "a.gguf", "gguf", base=odd)
    assert not (tmp_path / "a.gguf").exists()


@pytest.mark.model
def test_the_rows_are_those_of_a_real_file(model_path: Path) -> None:
    """The demo's model as GGUF, and as transformers reads it: q and k in the order that an adapter's rows get, v as it is."""
    from gguf import dequantize

    from lorakit.conversion.gguf import turned as ours
    from lorakit.models.loading import load_model

    model, _ = load_model(model_path, dtype=torch.float32)
    stored = {tensor.name: tensor for tensor in GGUFReader(model_path).tensors if tensor.name.startswith("blk.0.attn_")}
    attention = model.model.layers[0].self_attn
    for name, layer, heads in (
        ("attn_q", attention.q_proj, model.config.num_attention_heads),
        ("attn_k", attention.k_proj, model.config.num_key_value_heads),
        ("attn_v", attention.v_proj, None),
    ):
        tensor = stored[f"blk.0.{name}.weight"]
        W = layer.weight.detach()
        found = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        torch.testing.assert_close(ours(W, heads) if heads else W, found)
        if heads:
            torch.testing.assert_close(ours(found, heads, back=True), W)


@pytest.mark.slow
@pytest.mark.model
def test_llama_cpp_writes_the_same_text(model_path: Path, tmp_path: Path) -> None:
    """The base as F32 GGUF, the adapter as GGUF, both by greedy decoding, beside lorakit on the same floats."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    from lorakit.models.loading import load_model

    model, tokenizer = load_model(model_path, dtype=torch.float32)
    base = f32_copy(model_path, tmp_path / "base.gguf")
    adapter = lk.attach(model, lk.LoRA(rank=4, alpha=8.0), name="a", rank_pattern={"k_proj": 2})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    adapter.save(tmp_path / "peft")
    convert(tmp_path / "peft", tmp_path / "a.gguf", "gguf", base=base)
    prompt = "The weather today is"
    ids = tokenizer(prompt, return_tensors="pt")

    def ours() -> str:
        found = model.generate(**ids, max_new_tokens=24, do_sample=False)
        return str(tokenizer.decode(found[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))

    def theirs(**options: Any) -> str:
        engine = llama_cpp.Llama(str(base), n_ctx=128, verbose=False, n_threads=1, **options)
        found = engine(list(map(int, ids["input_ids"][0])), max_tokens=24, temperature=0.0)
        return str(found["choices"][0]["text"])

    with lk.use(model, None):
        plain = ours()
    adapted = ours()
    assert plain != adapted
    assert theirs() == plain
    assert theirs(lora_path=str(tmp_path / "a.gguf")) == adapted


def f32_copy(source: Path, target: Path) -> Path:
    """A GGUF model with every tensor in float32, all else as it is."""
    from gguf import GGUFValueType, dequantize

    reader = GGUFReader(source)
    writer = GGUFWriter(target, reader.fields["general.architecture"].contents())
    for name, entry in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        kind, sub = entry.types[0], entry.types[-1] if entry.types[0] == GGUFValueType.ARRAY else None
        content = 0 if name == "general.file_type" else entry.contents()  # 0: all in float32
        writer.add_key_value(name, content, kind, sub)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, dequantize(tensor.data, tensor.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target
