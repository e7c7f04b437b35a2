"""A base model from a folder, a GGUF file or a hub name: right weights, tokens and dtype, or a clear error.

The tiny GGUF files are written here by the `gguf` package in the layout that llama.cpp uses, so that what is
compared with the original model is the whole way through the file.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_utils import validate_quantization_for_training

from lorakit.errors import LorakitError
from lorakit.models import gguf as gguf_files
from lorakit.models import hub
from lorakit.models import loading as models
from lorakit.models.loading import choose_dtype, load_model

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# The 256 bytes as GPT-2 spells them, and two merges that tell whether digits are split from spaces and line
# ends.
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = [("Ċ", "Ċ"), ("Ġ", "Ġ")]
VOCABULARY = [*SPECIAL, *ALPHABET, *("".join(pair) for pair in MERGES)]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Keep what the tests here make out of the real cache."""
    if not request.node.get_closest_marker("model"):
        monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))


def tiny_llama(**changes: Any) -> LlamaForCausalLM:
    """A random Llama with distinct sizes on all axes, each a multiple of GGUF's block of 32."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": len(VOCABULARY),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes})).eval()


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of the rows of q and k: the two halves of each head's rotary pairs side by side."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write_gguf(
    path: Path,
    model: LlamaForCausalLM,
    quantisation: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.Q8_0,
    pre: str = "smollm",
) -> dict[str, torch.Tensor]:
    """Write the model as llama.cpp would, and give the floats that its quantised numbers stand for."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(VOCABULARY)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(VOCABULARY) - 3))
    writer.add_token_merges([" ".join(pair) for pair in MERGES])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    floats = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        theirs = name.replace("model.layers", "blk")
        for ours, written in names.items():
            theirs = theirs.replace(ours, written)
        value = tensor.float().numpy()
        if value.ndim == 1:
            writer.add_tensor(theirs, value)
            floats[name] = tensor.clone()
            continue
        part = theirs.split(".")[-2]
        order = interleave(value, heads[part]) if part in heads else value
        packed = gguf.quants.quantize(np.ascontiguousarray(order), quantisation)
        writer.add_tensor(theirs, packed, raw_dtype=quantisation)
        plain = gguf.quants.quantize(np.ascontiguousarray(value), quantisation)  # row by row, so the order is free
        floats[name] = torch.from_numpy(gguf.quants.dequantize(plain, quantisation).reshape(value.shape).copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return floats


def tiny_tokenizer(**tokens: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer over the same vocabulary."""
    rules = Tokenizer(BPE({token: index for index, token in enumerate(VOCABULARY)}, MERGES))
    rules.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=rules, **tokens)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A local model folder with a tokenizer that has no padding token."""
    path = tmp_path / "tiny"
    tiny_llama().save_pretrained(path)
    tiny_tokenizer(eos_token="<|im_end|>").save_pretrained(path)
    return path


# GGUF
# ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "F32"])
def test_gguf_gives_the_very_floats_of_the_file(tmp_path: Path, kind: str) -> None:
    floats = write_gguf(tmp_path / "tiny.gguf", tiny_llama(), gguf.GGMLQuantizationType[kind])
    model, _ = load_model(tmp_path / "tiny.gguf", dtype="fp32")
    loaded = model.state_dict()
    for name, value in floats.items():
        assert torch.equal(loaded[name], value), name
    assert model.lm_head.weight is model.model.embed_tokens.weight
    expected = tiny_llama()
    expected.load_state_dict(floats, strict=False)
    tokens = torch.arange(3, 40)[None]
    # The norm's epsilon comes back from the file as float32's nearest to 1e-5.
    torch.testing.assert_close(model(tokens).logits, expected(tokens).logits, atol=1e-6, rtol=1e-5)


def test_gguf_is_kept_and_comes_back_the_same(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_gguf(tmp_path / "tiny.gguf", tiny_llama())
    caplog.set_level(logging.INFO, logger="lorakit")
    first, _ = load_model(tmp_path / "tiny.gguf", dtype="bf16")
    assert "cached as" in caplog.text
    caplog.clear()
    second, words = load_model(tmp_path / "tiny.gguf", dtype="bf16")
    assert "cached as" not in caplog.text
    assert "using the cached" in caplog.text
    direct = gguf_files.read_model(tmp_path / "tiny.gguf", torch.bfloat16)
    for name, value in direct.state_dict().items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, first.state_dict()[name]), name
        assert torch.equal(value, second.state_dict()[name]), name
    assert words.chat_template == TEMPLATE
    assert not [entry.name for entry in (tmp_path / "cache" / "gguf").iterdir() if entry.name.startswith(".")]


def test_gguf_cache_follows_content_and_dtype(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, tiny_llama())
    load_model(path, dtype="fp32")
    load_model(path, dtype="bf16")
    kept = tmp_path / "cache" / "gguf"
    assert len(list(kept.iterdir())) == 2  # else float32 would be widened bfloat16
    changed = tiny_llama()
    with torch.no_grad():
        changed.model.layers[1].mlp.up_proj.weight[0, 0] = 3.0
    floats = write_gguf(path, changed)
    model, _ = load_model(path, dtype="fp32")
    assert len(list(kept.iterdir())) == 3
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(model.state_dict()[name], floats[name])


def test_gguf_without_room_for_the_cache_is_still_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write_gguf(tmp_path / "tiny.gguf", tiny_llama())
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "file"))
    model, words = load_model(tmp_path / "tiny.gguf", dtype="fp32")
    assert "slow again" in caplog.text
    assert (type(model).__name__, len(words)) == ("LlamaForCausalLM", len(VOCABULARY))
    with pytest.raises(LorakitError, match="could not be kept"):
        load_model(tmp_path / "tiny.gguf", dtype="fp32", task="seq-cls")


def test_an_interrupted_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "tiny.gguf", tiny_llama())

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            load_model(tmp_path / "tiny.gguf", dtype="fp32")
    assert list((tmp_path / "cache" / "gguf").iterdir()) == []
    load_model(tmp_path / "tiny.gguf", dtype="fp32")


def test_gguf_model_is_not_called_quantised(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", tiny_llama())
    for model in (
        load_model(tmp_path / "tiny.gguf", dtype="fp32")[0],
        gguf_files.read_model(tmp_path / "tiny.gguf", torch.float32),
    ):
        assert not getattr(model, "is_quantized", False)
        assert getattr(model, "hf_quantizer", None) is None
        assert not hasattr(model, "quantization_method")
        assert not hasattr(model.config, "quantization_config")
        model.save_pretrained(tmp_path / "saved")
        again = LlamaForCausalLM.from_pretrained(tmp_path / "saved", dtype="auto")
        for name, value in model.state_dict().items():
            assert torch.equal(value, again.state_dict()[name]), name
        rows = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}] * 2
        arguments = TrainingArguments(
            output_dir=str(tmp_path / "run"), max_steps=1, report_to=[], save_strategy="no", use_cpu=True
        )
        before = model.model.layers[0].mlp.up_proj.weight.clone()
        Trainer(
            model,
            arguments,
            train_dataset=rows,
            data_collator=lambda b: {k: torch.tensor([r[k] for r in b]) for k in b[0]},
        ).train()
        assert not torch.equal(before, model.model.layers[0].mlp.up_proj.weight)


def test_quantised_flags_are_what_the_trainer_refuses(tmp_path: Path) -> None:
    """The planted bug: with the flags as transformers sets them, saving and training are refused."""
    from transformers import AutoModelForCausalLM

    write_gguf(tmp_path / "tiny.gguf", tiny_llama())
    flagged = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
    with pytest.raises(ValueError, match="quantized"):
        flagged.save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match="quantized"):
        validate_quantization_for_training(flagged)
    gguf_files.clear_quantised_flags(flagged)
    validate_quantization_for_training(flagged)
    flagged.save_pretrained(tmp_path / "saved")


def test_packed_weights_keep_their_flags() -> None:
    model = tiny_llama()
    model.model.norm.weight = torch.nn.Parameter(torch.ones(64, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(LorakitError, match=r"still packed \(model.norm.weight"):
        gguf_files.clear_quantised_flags(model)


def test_gguf_tokenizer_has_the_files_tokens(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", tiny_llama())
    _, words = load_model(tmp_path / "tiny.gguf", dtype="fp32")
    assert [words.bos_token_id, words.eos_token_id, words.unk_token_id, words.pad_token_id] == [1, 2, 0, 2]
    assert words.model_max_length == 128
    chat = words.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat == "<|im_start|>user\nhi<|im_end|>\n"
    ids = words(chat).input_ids
    assert words.convert_ids_to_tokens(ids)[0] == "<|im_start|>"
    assert words.decode(ids) == chat


@pytest.mark.parametrize(
    ("pre", "tokens"),
    [("smollm", ["ĊĊ", "1", "x", "ĠĠ", "2", "3"]), ("gpt-2", ["Ċ", "Ċ", "1", "x", "Ġ", "Ġ", "2", "3"])],
)
def test_gguf_tokenizer_splits_digits_as_the_file_says(tmp_path: Path, pre: str, tokens: list[str]) -> None:
    write_gguf(tmp_path / "tiny.gguf", tiny_llama(), pre=pre)
    for _ in range(2):  # from the file, then from the cache
        _, words = load_model(tmp_path / "tiny.gguf", dtype="fp32")
        assert words.convert_ids_to_tokens(words("\n\n1x  23").input_ids) == tokens


def test_gguf_with_another_head(tmp_path: Path) -> None:
    floats = write_gguf(tmp_path / "tiny.gguf", tiny_llama())
    model, _ = load_model(tmp_path / "tiny.gguf", dtype="fp32", task="seq-cls", num_labels=3)
    assert model.score.weight.shape == (3, 64)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(model.state_dict()[name], floats[name])
    assert model.config.pad_token_id == 2


def test_a_folder_with_one_gguf_file_will_do_and_with_two_must_say(tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf", tiny_llama())
    model, _ = load_model(str(tmp_path), dtype="fp32")
    assert model.config._name_or_path == str(tmp_path)
    (tmp_path / "b.gguf").write_bytes(b"GGUF")
    with pytest.raises(LorakitError, match=r"2 GGUF files \(a.gguf, b.gguf\); name one with gguf_file="):
        load_model(tmp_path, dtype="fp32")
    load_model(tmp_path, gguf_file="a.gguf", dtype="fp32")
    with pytest.raises(LorakitError, match=r"c.gguf"):
        load_model(tmp_path, gguf_file="c.gguf")


def test_a_truncated_gguf_file_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "whole.gguf", tiny_llama())
    content = (tmp_path / "whole.gguf").read_bytes()
    for size in (10, 1000, len(content) - 1000):
        (tmp_path / "part.gguf").write_bytes(content[:size])
        with pytest.raises(LorakitError, match=r"cannot read it: .* What works: a whole GGUF file"):
            load_model(tmp_path / "part.gguf", dtype="fp32")
    assert not list((tmp_path / "cache").glob("gguf/*"))


# Folders
# ---------------------------------------------------------------------------------------------------------------


def test_a_folder_gives_its_model_and_a_padding_token(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="lorakit")
    model, words = load_model(folder, dtype=torch.float32)
    assert "padding with" in caplog.text
    assert words.pad_token_id == words.eos_token_id == 2
    for name, value in tiny_llama().state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert not model.training
    assert model.name_or_path == model.config._name_or_path == words.name_or_path == str(folder)


@pytest.mark.parametrize("dtype", ["bf16", "bfloat16", "torch.bfloat16", torch.bfloat16])
def test_dtype_is_what_was_asked(folder: Path, dtype: str | torch.dtype) -> None:
    assert {p.dtype for p in load_model(folder, dtype=dtype)[0].parameters()} == {torch.bfloat16}


def test_each_task_has_its_class(folder: Path, tmp_path: Path) -> None:
    assert type(load_model(folder, task="seq-cls")[0]).__name__ == "LlamaForSequenceClassification"
    assert type(load_model(folder, task="features")[0]).__name__ == "LlamaModel"
    with pytest.raises(LorakitError, match=r'unknown task "causal_lm".*did you mean "causal-lm"'):
        load_model(folder, task="causal_lm")


def test_a_conv1d_model_loads_with_a_tokenizer_from_elsewhere(folder: Path, tmp_path: Path) -> None:
    config = GPT2Config(
        vocab_size=len(VOCABULARY), n_embd=12, n_layer=1, n_head=3, n_positions=16, bos_token_id=1, eos_token_id=2
    )
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(LorakitError, match=r"holds no tokenizer .* name another place with tokenizer="):
        load_model(tmp_path / "gpt2")
    model, words = load_model(tmp_path / "gpt2", tokenizer=folder)
    assert (type(model).__name__, len(words)) == ("GPT2LMHeadModel", len(VOCABULARY))
    assert model.config.pad_token_id == words.pad_token_id


def test_a_tokenizer_that_cannot_pad_is_refused(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "tiny")
    tiny_tokenizer().save_pretrained(tmp_path / "tiny")
    with pytest.raises(LorakitError, match="neither a padding nor an end token"):
        load_model(tmp_path / "tiny")


def test_a_tokenizer_beyond_the_embedding_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny_llama(vocab_size=len(VOCABULARY) - 1).save_pretrained(tmp_path / "tiny")
    tiny_tokenizer(eos_token="<|im_end|>").save_pretrained(tmp_path / "tiny")
    load_model(tmp_path / "tiny")
    assert "one of the last 1 cannot be read" in caplog.text


def test_places_that_hold_no_model_say_what_they_hold(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(LorakitError, match="no such file or folder"):
        load_model("./nowhere")
    with pytest.raises(LorakitError, match=r"no such file: .* as gguf_file"):
        load_model("nowhere.gguf")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(LorakitError, match="a file that is not GGUF"):
        load_model(tmp_path / "notes.txt")
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "notes.txt").write_text("x")
    with pytest.raises(LorakitError, match=r"neither config.json nor a .gguf file; it holds: notes.txt"):
        load_model(tmp_path / "some")
    (tmp_path / "some" / "adapter_config.json").write_text("{}")
    with pytest.raises(LorakitError, match="holds an adapter"):
        load_model(tmp_path / "some")
    (folder / "model.safetensors").unlink()
    with pytest.raises(LorakitError, match=r"transformers says: .*safetensors"):
        load_model(folder)


# The hub
# ---------------------------------------------------------------------------------------------------------------


def answer(error: Exception):
    """A hub that always answers with this error."""

    def model_info(*_: object, **__: object) -> None:
        raise error

    return model_info


def test_offline_uses_the_cached_copy(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = tmp_path / "hub" / "models--someone--tiny"
    (kept / "refs").mkdir(parents=True)
    (kept / "refs" / "main").write_text("0" * 40)
    (kept / "snapshots").mkdir()
    folder.rename(kept / "snapshots" / ("0" * 40))
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", answer(ConnectionError("no network")))
    model, words = load_model("someone/tiny", cache_dir=tmp_path / "hub")
    assert model.config._name_or_path == words.name_or_path == "someone/tiny"
    with pytest.raises(LorakitError) as told:
        load_model("someone/else", cache_dir=tmp_path / "hub")
    message = str(told.value)
    assert f"the cache {tmp_path / 'hub'} does not hold" in message
    assert "In the cache: someone/tiny." in message
    assert "hf download someone/else" in message


def test_what_the_hub_says_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    response: Any = SimpleNamespace(headers={}, request=None, status_code=404)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", answer(GatedRepoError("x", response=response)))
    with pytest.raises(LorakitError, match=r"gated on the hub.*hf auth login"):
        load_model("someone/closed")
    missing = RepositoryNotFoundError("x", response=response)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", answer(missing))
    with pytest.raises(LorakitError, match=r"neither a file or folder here .* nor a model on the hub"):
        load_model("someone/mistyped")
    with pytest.raises(LorakitError, match="nor a model on the hub"):
        load_model("someone/mistyped", gguf_file="a.gguf")


def test_a_name_that_is_no_hub_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LorakitError, match="nor a hub name"):
        hub.reach_hub("a model")


# Number formats
# --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "dtype", "word"),
    [
        ({"avx2", "avx512_bf16"}, torch.bfloat16, "avx512_bf16"),
        ({"amx_bf16"}, torch.bfloat16, "amx_bf16"),
        ({"asimd", "bf16"}, torch.bfloat16, "bf16"),
        ({"avx2", "avx512f"}, torch.float32, "does not list"),
        (set(), torch.float32, "does not list"),
    ],
)
def test_dtype_of_a_processor(monkeypatch: pytest.MonkeyPatch, flags: set[str], dtype: torch.dtype, word: str) -> None:
    monkeypatch.setattr(models, "processor_flags", lambda: frozenset(flags))
    chosen, reason = choose_dtype("cpu")
    assert chosen == dtype
    assert word in reason


@pytest.mark.parametrize(
    ("capability", "dtype"), [((7, 5), torch.float32), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)]
)
def test_dtype_of_a_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: torch.dtype) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _=None: "Test GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: capability)
    for device in ("cuda:0", None):
        chosen, reason = choose_dtype(device)
        assert chosen == dtype
        assert "Test GPU" in reason


def test_an_unknown_dtype_is_refused(folder: Path) -> None:
    with pytest.raises(LorakitError, match=r'unknown dtype "bf61".*did you mean "bf16"'):
        load_model(folder, dtype="bf61")


# The real model
# --------------------------------------------------------------------------------------------------------


@pytest.mark.model
def test_the_real_model_has_the_published_sizes_and_tokens(model_path: Path) -> None:
    model, words = load_model(model_path, dtype="bf16")
    config = model.config
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (576, 1536, 30)
    assert (config.num_attention_heads, config.num_key_value_heads, config.vocab_size) == (9, 3, 49152)
    assert config.rope_parameters["rope_theta"] == 100000
    assert config.tie_word_embeddings
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 2)
    assert (words.bos_token_id, words.eos_token_id, words.pad_token_id, words.unk_token_id) == (1, 2, 2, 0)
    assert words.convert_ids_to_tokens([0, 1, 2]) == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert model.generation_config.eos_token_id == 2
    assert words.model_max_length == 8192
    # The published tokenizer splits digits off first, so two line ends before a number are one token.
    assert words.convert_ids_to_tokens(words("\n\n12").input_ids) == ["ĊĊ", "1", "2"]
    assert words("x").input_ids == [104]  # no token is put before a text
    chat = words.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True)
    assert chat == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.model
def test_the_real_model_answers_and_stops(chat_model: tuple[Any, Any]) -> None:
    model, words = chat_model
    question = [{"role": "user", "content": "What is the capital of France?"}]
    asked = words.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.inference_mode():
        told = model.generate(**asked, max_new_tokens=24, do_sample=False)[0, asked["input_ids"].shape[1] :]
    assert "Paris" in words.decode(told)
    assert told[-1] == words.eos_token_id


@pytest.mark.model
def test_the_review_rows_are_apart_and_the_same_every_time(reviews: tuple[Path, Path], tmp_path: Path) -> None:
    import json

    import material

    train, held_out = ([json.loads(line) for line in path.read_text().splitlines()] for path in reviews)
    assert (len(train), len(held_out)) == (2000, 500)
    assert {row["completion"] for row in train} == {"positive", "negative"}
    seen = {row["prompt"].casefold() for row in train}
    assert len(seen) == 2000
    assert not any(row["prompt"].casefold() in seen for row in held_out)
    assert all(row["prompt"].startswith(material.QUESTION) for row in train)
    fewer = material.write_reviews(tmp_path / "fewer", train=100, instruction="after")
    assert [json.loads(line)["completion"] for line in fewer[1].read_text().splitlines()] == [
        row["completion"] for row in held_out
    ]
    assert json.loads(fewer[0].read_text().splitlines()[0])["prompt"].endswith(material.QUESTION)
    again = material.write_reviews(tmp_path / "again")
    assert again[0].read_bytes() == reviews[0].read_bytes()


@pytest.mark.model
def test_the_four_texts_are_whole(model_path: Path) -> None:
    import material

    counts = {name: len(material.read_texts(name)) for name in material.TEXTS}
    assert counts == {"movies": 10605, "amazon": 3708, "nyt": 5190, "tweets": 4200}
    assert all(-4 <= row.rating <= 4 and row.text for name in material.TEXTS for row in material.read_texts(name))
    assert any("é" in row.text for row in material.read_texts("movies"))  # read as UTF-8
    assert len(material.articles("nyt")) == 498
    with pytest.raises(ValueError, match="names no article"):
        material.articles("tweets")
