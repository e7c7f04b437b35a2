"""`lorakit.peft` inside the programs that PEFT exists for: beside real PEFT, from the same start, with equal losses."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers

import lorakit as lk
import lorakit.peft as ours
from reference.models import quiet

pytestmark = pytest.mark.slow
WORDS = [f"w{number}" for number in range(40)]
TARGETS = ["q_proj", "v_proj"]


def tokenizer() -> Any:
    vocabulary = {word: place for place, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    made.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    return made


@pytest.fixture(scope="module", params=["CausalLM", "SequenceClassification"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def base(kind: str = "CausalLM") -> Any:
    config = transformers.LlamaConfig(
        vocab_size=43, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, eos_token_id=1, bos_token_id=None,
        num_labels=1 if kind == "Reward" else 2,
    )  # fmt: skip
    torch.manual_seed(0)
    name = "SequenceClassification" if kind == "Reward" else kind
    return getattr(transformers, f"LlamaFor{name}")(config).float()


def options(kind: str = "CausalLM") -> dict[str, Any]:
    task = "CAUSAL_LM" if kind == "CausalLM" else "SEQ_CLS"
    return {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "task_type": task}


def pair(kind: str = "CausalLM") -> tuple[Any, Any]:
    """The same model with the same adapter, under PEFT and here."""
    torch.manual_seed(1)
    with quiet():
        theirs = peft.get_peft_model(base(kind), peft.LoraConfig(**options(kind)))
    own = ours.get_peft_model(base(kind), ours.LoraConfig(**options(kind)))
    values = peft.get_peft_model_state_dict(theirs)
    ours.set_peft_model_state_dict(own, {key: one.clone() for key, one in values.items()})
    return theirs, own


def arguments(cls: Any, folder: Path, **changes: Any) -> Any:
    common = {"use_cpu": True, "report_to": [], "per_device_train_batch_size": 4, "logging_steps": 1, "max_steps": 4,
              "learning_rate": 1e-2, "seed": 1, "bf16": False, "save_strategy": "no"}  # fmt: skip
    return cls(output_dir=str(folder), **{**common, **changes})


def losses(trainer: Any) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def rows(count: int = 24, label: bool = False) -> list[dict[str, Any]]:
    ids = torch.randint(3, 43, (count, 8), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": x, "labels": (x[0] > 20).long() if label else x, "another": 1} for x in ids]


def trained(model: Any) -> dict[str, torch.Tensor]:
    return {name: one.detach().clone() for name, one in model.named_parameters() if one.requires_grad}


def folder_of(path: Path) -> set[str]:
    return {one.name for one in path.iterdir()}


# -- Trainer -----------------------------------------------------------------------------------------------------------------


def test_trainer(kind: str, tmp_path: Path) -> None:
    """Equal losses in training and evaluation; checkpoints hold the adapter alone, and the best is loaded at the end."""
    found: list[list[float]] = []
    for number, model in enumerate(pair(kind)):
        best: dict[int, dict[str, torch.Tensor]] = {}

        class Note(transformers.TrainerCallback):
            def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                best[state.global_step] = trained(model)  # noqa: B023

        data = rows(label=kind != "CausalLM")
        trainer = transformers.Trainer(
            model=model,
            args=arguments(
                transformers.TrainingArguments, tmp_path / str(number), max_steps=8, eval_strategy="steps", eval_steps=2,
                save_strategy="steps", save_steps=2, load_best_model_at_end=True, learning_rate=0.1,
            ),
            train_dataset=data[:16],
            eval_dataset=data[16:],
            callbacks=[Note()],
        )  # fmt: skip
        trainer.train()
        found.append(losses(trainer) + [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row])
        chosen = Path(trainer.state.best_model_checkpoint)
        now = trained(model)
        for name, value in best[int(chosen.name.rpartition("-")[2])].items():
            assert torch.equal(now[name], value), name
        assert {"adapter_config.json", "adapter_model.safetensors"} <= folder_of(chosen)
        assert "model.safetensors" not in folder_of(chosen)
        with quiet():
            read = peft.PeftModel.from_pretrained(base(kind), str(chosen)).eval()
        with torch.no_grad():
            ids = data[0]["input_ids"][None]
            torch.testing.assert_close(read(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
    assert len(found[1]) == 12
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def test_trainer_resumes_to_the_bit(tmp_path: Path) -> None:
    class Stop(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 4:
                control.should_training_stop = control.should_save = True

    def run(folder: Path, resume: bool, callbacks: list[Any]) -> dict[str, torch.Tensor]:
        model = pair()[1]
        settings = arguments(
            transformers.TrainingArguments, folder, max_steps=8, save_strategy="steps", save_steps=4, weight_decay=0.1
        )
        trainer = transformers.Trainer(model=model, args=settings, train_dataset=rows(), callbacks=callbacks)
        trainer.train(resume_from_checkpoint=resume or None)
        assert trainer.state.global_step == (4 if callbacks else 8)
        return trained(model)

    whole = run(tmp_path / "whole", False, [])
    run(tmp_path / "parts", False, [Stop()])
    resumed = run(tmp_path / "parts", True, [])
    assert whole.keys() == resumed.keys()
    for name, value in whole.items():
        assert torch.equal(resumed[name], value), name


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool, tmp_path: Path) -> None:
    found = []
    for number, model in enumerate(pair()):
        settings = arguments(
            transformers.TrainingArguments, tmp_path / str(number), gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": reentrant},
        )  # fmt: skip
        trainer = transformers.Trainer(model=model, args=settings, train_dataset=rows())
        trainer.train()
        found.append(losses(trainer))
    assert found[1][-1] != found[1][0]
    assert found[1] == pytest.approx(found[0], rel=1e-4)


# -- TRL ---------------------------------------------------------------------------------------------------------------------


def _preferences() -> Any:
    from datasets import Dataset

    return Dataset.from_list(
        [{"prompt": f"w{n} w1", "chosen": f"w{n + 2} w3", "rejected": f"w{n + 5} w7 w8"} for n in range(16)]
    )


def _sft(model: Any, folder: Path, **extra: Any) -> Any:
    import trl
    from datasets import Dataset

    data = Dataset.from_list([{"text": f"w{n} w{n + 1} w5 w{n + 2}"} for n in range(16)])
    settings = arguments(trl.SFTConfig, folder, max_length=16)
    return trl.SFTTrainer(model=model, args=settings, train_dataset=data, processing_class=tokenizer(), **extra)


def _dpo(model: Any, folder: Path) -> Any:
    import trl

    settings = arguments(trl.DPOConfig, folder, max_length=16)
    return trl.DPOTrainer(model=model, args=settings, train_dataset=_preferences(), processing_class=tokenizer())


def _kto(model: Any, folder: Path) -> Any:
    try:
        from trl import KTOConfig, KTOTrainer
    except ImportError:
        from trl.experimental.kto import KTOConfig, KTOTrainer
    from datasets import Dataset

    data = Dataset.from_list(
        [{"prompt": f"w{n}", "completion": f" w{n + 3} w4", "label": n % 2 == 0} for n in range(16)]
    )
    settings = arguments(KTOConfig, folder, max_length=16)
    return KTOTrainer(model=model, args=settings, train_dataset=data, processing_class=tokenizer())


def _grpo(model: Any, folder: Path) -> Any:
    import trl
    from datasets import Dataset

    def score(completions: list[str], **_: Any) -> list[float]:
        return [float(len(set(one.split()))) + (len(one) % 3) for one in completions]

    settings = arguments(trl.GRPOConfig, folder, num_generations=2, max_completion_length=6, beta=0.1)
    data = Dataset.from_list([{"prompt": f"w{n} w2"} for n in range(16)])
    return trl.GRPOTrainer(
        model=model, reward_funcs=score, args=settings, train_dataset=data, processing_class=tokenizer()
    )


def _reward(model: Any, folder: Path) -> Any:
    import trl

    settings = arguments(trl.RewardConfig, folder, max_length=16)
    data = _preferences().remove_columns("prompt")
    return trl.RewardTrainer(model=model, args=settings, train_dataset=data, processing_class=tokenizer())


TRL: list[tuple[str, Callable[[Any, Path], Any]]] = [
    ("CausalLM", _sft),
    ("CausalLM", _dpo),
    ("CausalLM", _kto),
    ("CausalLM", _grpo),
    ("Reward", _reward),
]


@pytest.mark.parametrize(("kind", "make"), TRL, ids=[make.__name__[1:] for _, make in TRL])
def test_trl(kind: str, make: Callable[[Any, Path], Any], tmp_path: Path) -> None:
    """Equal losses; no second model is kept for the reference; what is saved is the adapter."""
    found = []
    for number, model in enumerate(pair(kind)):
        trainer = make(model, tmp_path / str(number))
        assert getattr(trainer, "ref_model", None) is None
        trainer.train()
        found.append(losses(trainer))
        trainer.save_model(str(tmp_path / f"saved{number}"))
        assert "adapter_model.safetensors" in folder_of(tmp_path / f"saved{number}")
        assert "model.safetensors" not in folder_of(tmp_path / f"saved{number}")
    assert len(found[1]) == 4
    assert found[1] == pytest.approx(found[0], rel=2e-4, abs=1e-6)


# -- Accelerate, torch ---------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def fresh_accelerator() -> None:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


def by_accelerate(model: Any, precision: str = "no") -> list[float]:
    """The losses of three steps of a loop by Accelerate."""
    from accelerate import Accelerator

    ids = torch.stack([row["input_ids"] for row in rows(8)])
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-2)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    losses = []
    for _ in range(3):
        loss = prepared(input_ids=ids, labels=ids).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert accelerator.unwrap_model(prepared) is model
    return losses


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate(precision: str) -> None:
    found = [by_accelerate(model, precision) for model in pair()]
    assert found[1][-1] < found[1][0]
    assert found[1] == pytest.approx(found[0], rel=1e-4 if precision == "no" else 2e-2)


def test_compile_and_export() -> None:
    """The whole model in one graph, with nothing left to Python, and exported."""
    model = pair()[1].eval()
    for parameter in lk.adapters(model.get_base_model())["default"].parameters():
        parameter.data.normal_(0, 0.1)
    ids = rows(2)[0]["input_ids"][None]
    with torch.no_grad():
        wanted = model(input_ids=ids, use_cache=False).logits
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(input_ids=ids, use_cache=False).logits, wanted)
        program = torch.export.export(model, (), {"input_ids": ids, "use_cache": False})
        torch.testing.assert_close(program.module()(input_ids=ids, use_cache=False).logits, wanted)


# -- programs that import PEFT by themselves -----------------------------------------------------------------------------------

SCRIPTS = {
    "transformers": """
model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=43, hidden_size=32, intermediate_size=48,
    num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2))
ids = torch.arange(8)[None] + 3
run = lambda: model(input_ids=ids).logits.detach()
wanted = run()
model.add_adapter(peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False), adapter_name="one")
model.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), adapter_name="two")
assert model.active_adapters() == ["two"]
""",
    "diffusers": """
import diffusers
model = diffusers.UNet2DConditionModel(sample_size=8, in_channels=4, out_channels=4, layers_per_block=1,
    block_out_channels=(32, 64), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=32, attention_head_dim=8, norm_num_groups=8)
model.eval().requires_grad_(False)
noise, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 32)
run = lambda: model(noise, torch.tensor([3, 7]), encoder_hidden_states=text).sample.detach()
wanted = run()
names = ["to_k", "to_q", "to_v", "to_out.0"]
model.add_adapter(peft.LoraConfig(r=4, target_modules=names, init_lora_weights=False), adapter_name="one")
model.add_adapter(peft.LoraConfig(r=2, target_modules=names, init_lora_weights=False), adapter_name="two")
""",
}
ENDING = """
two = run()
assert not torch.allclose(two, wanted)
model.set_adapter("one")
one = run()
assert not torch.allclose(one, two)
for switch, expected in (("disable", wanted), ("enable", one)):
    (getattr(model, f"{switch}_adapters", None) or getattr(model, f"{switch}_lora"))()
    assert torch.allclose(run(), expected, atol=1e-6), switch
assert all("lora" in name or "deltas" in name for name, p in model.named_parameters() if p.requires_grad)
"""
SAVED = """
folder = tempfile.mkdtemp()
model.save_lora_adapter(folder, adapter_name="one")
model.delete_adapters(["one", "two"])
assert torch.allclose(run(), wanted, atol=1e-6)
model.load_lora_adapter(folder, prefix=None, adapter_name="again", weight_name="pytorch_lora_weights.safetensors")
assert torch.allclose(run(), one, atol=1e-6)
print("ran", folder)
"""


@pytest.mark.parametrize("library", SCRIPTS)
def test_models_with_adapters_of_their_own(library: str) -> None:
    """add_adapter, set_adapter, switching off and on, and diffusers' files, with sys.modules["peft"] = lorakit.peft."""
    start = "import sys, tempfile, torch, lorakit.peft as peft\nsys.modules['peft'] = peft\nimport transformers\n"
    ending = ENDING + (SAVED if library == "diffusers" else "print('ran')")
    script = start + "torch.manual_seed(0)" + SCRIPTS[library] + ending
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("ran"), done.stderr[-3000:]


# -- the hub -------------------------------------------------------------------------------------------------------------------


def test_push_to_hub_uploads_the_adapter_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    seen: dict[str, Any] = {}

    def upload(self: Any, *, repo_id: str, folder_path: str, commit_message: str) -> str:
        seen.update(repo=repo_id, files=folder_of(Path(folder_path)))
        seen["keys"] = set(load_file(Path(folder_path) / "adapter_model.safetensors"))
        return commit_message

    class Made:
        repo_id = "me/adapter"

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda self, repo_id, **_: Made())
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload)
    model = pair()[1]
    assert model.push_to_hub("adapter") == "Upload adapter"
    assert seen["repo"] == "me/adapter"
    assert "model.safetensors" not in seen["files"]
    assert all("lora_" in key for key in seen["keys"])


def test_trl_makes_the_adapter_itself(tmp_path: Path) -> None:
    """`peft_config=` of a trainer: the configuration passes for PEFT's own, field by field as its layers read them."""
    found = []
    for module in (peft, ours):
        torch.manual_seed(1)
        trainer = _sft(base(), tmp_path, peft_config=module.LoraConfig(**options(), use_dora=True))
        trainer.train()
        found.append(losses(trainer))
    assert found[0] == found[1]
