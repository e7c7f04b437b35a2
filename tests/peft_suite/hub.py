"""Stand-ins for the hub's models that PEFT's tests name: small ones of the same class, with random weights.

They lie in a folder laid out as the cache of huggingface_hub is, so that everything that asks the hub finds them there.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

COMMIT = "0" * 40
WORDS = 400
SIZES = {
    "vocab_size": WORDS, "hidden_size": 16, "d_model": 16, "n_embd": 16, "word_embed_proj_dim": 16, "intermediate_size": 32,
    "ffn_dim": 32, "d_ff": 32, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "num_hidden_layers": 2, "n_layer": 2,
    "num_layers": 2, "encoder_layers": 2, "decoder_layers": 2, "num_attention_heads": 4, "n_head": 4, "num_heads": 4,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "d_kv": 4,
    "max_position_embeddings": 128, "n_positions": 128, "pad_token_id": 1, "eos_token_id": 2, "bos_token_id": 0,
    "rotary_dim": 4, "num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "intermediate_size_mlp": 32, "projection_dim": 16,
}  # fmt: skip

# id -> (class of the model, options of its configuration beside SIZES)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    **dict.fromkeys(
        (
            "peft-internal-testing/opt-125m",
            "peft-internal-testing/tiny-random-OPTForCausalLM",
            "facebook/opt-125m",
            "facebook/opt-350m",
            "hf-internal-testing/tiny-random-OPTForCausalLM",
            "peft-internal-testing/tiny-opt-lora-revision-base",
        ),
        ("OPTForCausalLM", {"num_hidden_layers": 5}),
    ),
    "peft-internal-testing/tiny-random-OPTForCausalLM-extended-vocab": ("OPTForCausalLM", {"vocab_size": WORDS + 10}),
    **dict.fromkeys(
        (
            "trl-internal-testing/tiny-random-LlamaForCausalLM",
            "peft-internal-testing/tiny-random-LlamaForCausalLM",
            "hf-internal-testing/tiny-random-LlamaForCausalLM",
            "peft-internal-testing/zephyr-smol_llama-100m-sft-full",
            "HuggingFaceM4/tiny-random-LlamaForCausalLM",
        ),
        ("LlamaForCausalLM", {}),
    ),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": ("LlamaForSequenceClassification", {}),
    "trl-internal-testing/tiny-Llama4ForCausalLM": ("Llama4ForCausalLM", {"attention_chunk_size": 16}),
    **dict.fromkeys(
        (
            "gpt2",
            "openai-community/gpt2",
            "peft-internal-testing/tiny-random-gpt2",
            "hf-internal-testing/tiny-random-gpt2",
            "peft-internal-testing/tiny-random-GPT2LMHeadModel",
        ),
        ("GPT2LMHeadModel", {"n_layer": 5}),
    ),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": ("Gemma3ForCausalLM", {"sliding_window": 8}),
    "trl-internal-testing/tiny-GptOssForCausalLM": ("GptOssForCausalLM", {"hidden_size": 32, "head_dim": 8}),
    "trl-internal-testing/tiny-Qwen3MoeForCausalLM": ("Qwen3MoeForCausalLM", {}),
    "hf-internal-testing/tiny-qwen3-moe": ("Qwen3MoeForCausalLM", {}),
    "trl-internal-testing/tiny-Qwen3ForCausalLM": ("Qwen3ForCausalLM", {}),
    **dict.fromkeys(
        ("peft-internal-testing/tiny-dummy-qwen2", "trl-internal-testing/tiny-Qwen2ForCausalLM-2.5", "Qwen/Qwen2-0.5B"),
        ("Qwen2ForCausalLM", {"num_hidden_layers": 4}),
    ),
    **dict.fromkeys(
        ("peft-internal-testing/tiny-random-BertModel", "hf-internal-testing/tiny-random-BertModel"), ("BertModel", {})
    ),
    "bert-base-uncased": ("BertForSequenceClassification", {}),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": ("BertForSequenceClassification", {}),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": ("RobertaForSequenceClassification", {}),
    "peft-internal-testing/tiny-random-RobertaModel": ("RobertaModel", {}),
    "peft-internal-testing/tiny-random-DebertaModel": ("DebertaModel", {}),
    "peft-internal-testing/tiny-random-DebertaV2Model": ("DebertaV2Model", {}),
    **dict.fromkeys(
        (
            "peft-internal-testing/tiny-random-t5",
            "peft-internal-testing/tiny-random-T5ForConditionalGeneration",
            "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated",
            "google/flan-t5-base",
            "google/flan-t5-small",
        ),
        ("T5ForConditionalGeneration", {"pad_token_id": 0, "decoder_start_token_id": 0, "num_layers": 5}),
    ),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": ("BartForConditionalGeneration", {}),
    "peft-internal-testing/tiny-random-BloomForCausalLM": ("BloomForCausalLM", {}),
    "bigscience/bloomz-560m": ("BloomForCausalLM", {}),
    "hf-internal-testing/Mixtral-tiny": ("MixtralForCausalLM", {}),
    "hf-internal-testing/tiny-random-MistralForCausalLM": ("MistralForCausalLM", {}),
    "peft-internal-testing/tiny-random-GPTNeoXForCausalLM": ("GPTNeoXForCausalLM", {}),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": ("GPTJForCausalLM", {}),
    "tiiuae/falcon-mamba-tiny-dev": ("FalconMambaForCausalLM", {}),
    "peft-internal-testing/tiny-clip-text-2": ("CLIPTextModelWithProjection", {}),
    "peft-internal-testing/tiny-random-ResNetForImageClassification": (
        "ResNetForImageClassification",
        {"embedding_size": 10, "hidden_sizes": [10, 20], "depths": [1, 1]},
    ),
}

# id of an adapter -> (id of its base, class of the base, task)
ADAPTERS = {
    f"peft-internal-testing/{name}": (f"peft-internal-testing/{base}", f"AutoModel{auto}", task)
    for name, base, auto, task in (
        ("tiny-OPTForCausalLM-lora", "tiny-random-OPTForCausalLM", "ForCausalLM", "CAUSAL_LM"),
        ("opt-125m-dummy-lora", "opt-125m", "ForCausalLM", "CAUSAL_LM"),
        ("tiny_OPTForSequenceClassification-lora", "opt-125m", "ForSequenceClassification", "SEQ_CLS"),
        ("tiny_OPTForQuestionAnswering-lora", "opt-125m", "ForQuestionAnswering", "QUESTION_ANS"),
        ("tiny_OPTForFeatureExtraction-lora", "opt-125m", "", "FEATURE_EXTRACTION"),
        ("tiny_GPT2ForTokenClassification-lora", "tiny-random-gpt2", "ForTokenClassification", "TOKEN_CLS"),
        ("tiny_T5ForSeq2SeqLM-lora", "tiny-random-t5", "ForSeq2SeqLM", "SEQ_2_SEQ_LM"),
        ("tiny-random-BertModel-lora", "tiny-random-BertModel", "", "FEATURE_EXTRACTION"),
        ("gpt2-lora-random", "tiny-random-gpt2", "ForCausalLM", "CAUSAL_LM"),
    )
} | {"ybelkada/test-st-lora": ("peft-internal-testing/opt-125m", "AutoModelForCausalLM", "CAUSAL_LM")}


def tokenizer() -> Any:
    """Bytes, and the special tokens that the configurations name."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<s>", "<pad>", "</s>", "<unk>", *letters]
    core = Tokenizer(models.BPE(vocab={name: place for place, name in enumerate(names)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def model(name: str, own: dict[str, Any]) -> Any:
    """A small model of a class."""
    cls = getattr(transformers, name)
    config_class = cls.config_class
    known = set(config_class().to_dict()) | set(getattr(config_class, "attribute_map", {}))
    options = {key: value for key, value in SIZES.items() if key in known}
    torch.manual_seed(0)
    return cls(config_class(**{**options, **own})).eval()


def _put(hub: Path, name: str, write: Callable[[Path], None]) -> None:
    folder = hub / f"models--{name.replace('/', '--')}"
    if (folder / "refs" / "main").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    place = folder / "snapshots" / COMMIT
    place.mkdir(parents=True)
    write(place)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)


def build(hub: Path) -> list[str]:
    """Write every stand-in that is not there; returns what could not be built, with the reason."""
    words, failed = tokenizer(), []

    def base(place: Path, name: str, own: dict[str, Any]) -> None:
        model(name, own).save_pretrained(place)
        words.save_pretrained(place)

    def adapter(place: Path, name: str, auto: str, task: str) -> None:
        import peft

        loaded = getattr(transformers, auto).from_pretrained(name, cache_dir=hub)
        config = peft.LoraConfig(task_type=task, init_lora_weights=False)
        peft.get_peft_model(loaded, config).save_pretrained(str(place))
        words.save_pretrained(place)

    for name, (cls, own) in MODELS.items():
        try:
            _put(hub, name, lambda place, cls=cls, own=own: base(place, cls, own))  # type: ignore[misc]
        except Exception as error:
            failed.append(f"{name}: {type(error).__name__}: {error}")
    for name, made in ADAPTERS.items():
        try:
            _put(hub, name, lambda place, made=made: adapter(place, *made))  # type: ignore[misc]
        except Exception as error:
            failed.append(f"{name}: {type(error).__name__}: {error}")
    return failed
