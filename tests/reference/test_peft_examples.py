"""Published examples in our own words, each under `import peft` and under `import lorakit.peft as peft`, with equal losses.

An example is a function of the library. `start` gives both runs one start: the first writes its adapter, the second reads it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft as real
import pytest
import torch
import transformers

import lorakit.peft as ours
from reference.models import quiet
from reference.test_peft_programs import arguments, losses, tokenizer

pytestmark = pytest.mark.slow
Start = Callable[[Any], None]


def llama(**changes: Any) -> Any:
    config = transformers.LlamaConfig(
        **{
            "vocab_size": 43, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None, **changes,
        }
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config)


def steps(model: Any, batches: list[dict[str, Any]], lr: float = 1e-2, optimizer: Any = None) -> list[float]:
    """The plain loop of most examples."""
    optimizer = optimizer or torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=lr)
    found = []
    for batch in batches:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def texts(count: int = 4) -> list[dict[str, Any]]:
    ids = torch.randint(3, 43, (count, 2, 9), generator=torch.Generator().manual_seed(0))
    answers = ids.masked_fill(torch.arange(9) < 3, -100)
    return [
        {"input_ids": one, "attention_mask": torch.ones_like(one), "labels": label}
        for one, label in zip(ids, answers, strict=True)
    ]


def alpaca(peft: Any, start: Start, folder: Path) -> list[float]:
    """Instructions in a template, answers alone in the loss, then the adapter is read again and generates."""
    words = tokenizer()

    def prompt(row: dict[str, str]) -> dict[str, Any]:
        question, answer = words(f"w1 w2 {row['instruction']} w3")["input_ids"], words(row["output"])["input_ids"]
        return {"input_ids": question + answer, "labels": [-100] * len(question) + answer}

    rows = [prompt({"instruction": f"w{n} w{n + 1}", "output": f"w{n + 3} w{n + 4}"}) for n in range(16)]
    config = peft.LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules=["q_proj", "v_proj"],
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(llama(), config)
    start(model)
    model.print_trainable_parameters()
    trainer = transformers.Trainer(
        model=model,
        train_dataset=rows,
        args=arguments(transformers.TrainingArguments, folder),
        data_collator=transformers.DataCollatorForSeq2Seq(words, pad_to_multiple_of=8, return_tensors="pt"),
    )
    model.config.use_cache = False
    trainer.train()
    model.save_pretrained(folder / "adapter")
    read = peft.PeftModel.from_pretrained(llama(), str(folder / "adapter")).eval()
    how = transformers.GenerationConfig(num_beams=2, max_new_tokens=4, pad_token_id=0)
    with torch.no_grad():
        out = read.generate(
            input_ids=torch.tensor([words("w1 w2 w5 w6 w3")["input_ids"]]), generation_config=how,
            return_dict_in_generate=True, output_scores=True,
        )  # fmt: skip
    return [*losses(trainer), *map(float, out.sequences[0])]


def in_8_bits(peft: Any, start: Start, folder: Path) -> list[float]:
    """Instruction tuning of a Qwen2 in 8 bits."""
    pytest.importorskip("bitsandbytes")
    config = transformers.Qwen2Config(
        vocab_size=43,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    transformers.Qwen2ForCausalLM(config).save_pretrained(folder / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "base", quantization_config=transformers.BitsAndBytesConfig(load_in_8bit=True), device_map={"": "cpu"}
    )
    model = peft.prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    model = peft.get_peft_model(
        model, peft.LoraConfig(r=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM")
    )
    start(model)
    return steps(model, texts())


def vit(peft: Any, start: Start, folder: Path) -> list[float]:
    """Image classification; the published script names `query` and `value`, which are `q_proj` and `v_proj` today."""
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=32,
        image_size=16,
        patch_size=8,
        num_labels=3,
    )
    torch.manual_seed(0)
    names = ["q_proj", "v_proj"] if peft is real else ["query", "value"]
    model = peft.get_peft_model(
        transformers.ViTForImageClassification(config),
        peft.LoraConfig(r=16, lora_alpha=16, target_modules=names, lora_dropout=0.0, modules_to_save=["classifier"]),
    )
    start(model)
    pictures = torch.randn(3, 4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return steps(model, [{"pixel_values": one, "labels": torch.tensor([0, 1, 2, 1])} for one in pictures])


def _causal(name: str, heads: int = 2, **options: Any) -> Callable[[Any, Start, Path], list[float]]:
    def example(peft: Any, start: Start, folder: Path) -> list[float]:
        config = getattr(peft, name)(task_type=peft.TaskType.CAUSAL_LM, **options)
        torch.manual_seed(1)
        model = peft.get_peft_model(llama(num_key_value_heads=heads), config)
        start(model)
        return steps(model, texts())

    return example


def galore(peft: Any, start: Start, folder: Path) -> list[float]:
    """GaLore beside an adapter, under the names of galore_torch."""
    torch.manual_seed(0)
    model = llama()
    matrices = [one for name, one in model.named_parameters() if "attn" in name or "mlp" in name]
    others = [one for one in model.parameters() if not any(one is two for two in matrices)]
    groups = [
        {"params": others},
        {"params": matrices, "rank": 8, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"},
    ]
    if peft is real:
        from galore_torch import GaLoreAdamW
    else:
        from lorakit.optim.galore_torch import GaLoreAdamW
    return steps(model, texts(), optimizer=GaLoreAdamW(groups, lr=1e-2))


def whisper(peft: Any, start: Start, folder: Path) -> list[float]:
    """Speech recognition: LoRA on the attention of encoder and decoder."""
    config = transformers.WhisperConfig(
        vocab_size=43, num_mel_bins=8, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_source_positions=16, max_target_positions=12,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, suppress_tokens=[], begin_suppress_tokens=[],
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.WhisperForConditionalGeneration(config)
    model = peft.get_peft_model(
        model, peft.LoraConfig(r=32, lora_alpha=64, target_modules=["q_proj", "v_proj"], lora_dropout=0.0, bias="none")
    )
    start(model)
    sounds = torch.randn(3, 2, 8, 32, generator=torch.Generator().manual_seed(0))
    return steps(model, [{"input_features": one, "labels": torch.tensor([[3, 4, 5], [6, 7, 2]])} for one in sounds])


def unet(peft: Any, start: Start, folder: Path) -> list[float]:
    """Text to image: LoRA on a UNet's attention, trained to foretell the noise."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32, attention_head_dim=8, norm_num_groups=8,
    )  # fmt: skip
    names = ["to_k", "to_q", "to_v", "to_out.0"]
    model = peft.get_peft_model(
        model, peft.LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=names)
    )
    start(model)
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-2)
    made, found = torch.Generator().manual_seed(0), []
    for _ in range(3):
        noise, text = torch.randn(2, 4, 8, 8, generator=made), torch.randn(2, 5, 32, generator=made)
        guess = model(noise, torch.tensor([3, 7]), encoder_hidden_states=text).sample
        loss = torch.nn.functional.mse_loss(guess, noise)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


EXAMPLES: dict[str, Callable[[Any, Start, Path], list[float]]] = {
    "alpaca": alpaca,
    "8 bits": in_8_bits,
    "vit": vit,
    "dora": _causal("LoraConfig", r=8, use_dora=True, target_modules=["q_proj", "v_proj"]),
    "rslora": _causal("LoraConfig", r=64, lora_alpha=64, use_rslora=True, target_modules="all-linear"),
    "prefix": _causal(
        "PrefixTuningConfig", heads=4, num_virtual_tokens=4, prefix_projection=True, encoder_hidden_size=16
    ),
    "llama-adapter": _causal("AdaptionPromptConfig", adapter_len=4, adapter_layers=2),
    "ia3": _causal("IA3Config", target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "prompt": _causal("PromptTuningConfig", num_virtual_tokens=4),
    "galore": galore,
    "whisper": whisper,
    "unet": unet,
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples(name: str, tmp_path: Path) -> None:
    written: list[Any] = []

    def write(model: Any) -> None:
        with quiet():
            model.save_pretrained(str(tmp_path / "start"))
        if getattr(model, "prompt_encoder", None):
            written.extend(one.detach().clone() for one in model.prompt_encoder.parameters())

    def read(model: Any) -> None:
        if len(written) > 1:  # the file holds what a projection gives, and not the projection
            E, first, first_bias, second, second_bias = written
            places = list(ours.adapters(model.base_model.model)["default"].edits.values())
            for edit, matrix, bias in zip(places, second.chunk(2), second_bias.chunk(2), strict=True):
                pairs = (
                    (edit._shared[0].E, E),
                    (edit._shared[0].first.weight, first),
                    (edit._shared[0].first.bias, first_bias),
                )
                for own, value in (*pairs, (edit.second.weight, matrix), (edit.second.bias, bias)):
                    own.data.copy_(value)
        else:
            model.load_adapter(tmp_path / "start", "default", is_trainable=True)

    found = []
    for library, start in ((real, write), (ours, read)):
        torch.manual_seed(2)
        with quiet():
            found.append(EXAMPLES[name](library, start, tmp_path / library.__name__))
    theirs, own = found
    assert len(set(own)) > 1
    assert own == pytest.approx(theirs, rel=2e-4, abs=1e-6)
