"""Further programs around `lorakit.peft`, and around a model with `lorakit.attach`, beside real PEFT with equal losses."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

import lorakit as lk
import lorakit.peft as ours
from reference.models import quiet
from reference.test_peft_programs import (
    TRL,
    arguments,
    base,
    by_accelerate,
    fresh_accelerator,
    losses,
    options,
    pair,
    rows,
    tokenizer,
    trained,
)

pytestmark = pytest.mark.slow
__all__ = ["fresh_accelerator"]


def attached(kind: str = "CausalLM") -> Any:
    """The model of `pair` with lorakit's own adapter, of the same start."""
    theirs, _ = pair(kind)
    model = base(kind)
    asked = options(kind)
    saved = ["score"] if kind != "CausalLM" else None
    adapter = lk.attach(model, lk.LoRA(rank=4, alpha=8), target_modules=asked["target_modules"], modules_to_save=saved)
    found = iter([one for name, one in theirs.named_parameters() if "lora_" in name])
    for name, parameter in adapter.named_parameters():
        if "deltas" in name or name.endswith((".A", ".B")):
            parameter.data.copy_(next(found))
    return model


def three(kind: str = "CausalLM") -> tuple[Any, Any, Any]:
    """PEFT's, the shim's and the attached model."""
    return (*pair(kind), attached(kind))


# -- attached models in the same programs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["CausalLM", "SequenceClassification"])
def test_trainer_on_an_attached_model(kind: str, tmp_path: Path) -> None:
    found = []
    for number, model in enumerate((pair(kind)[0], attached(kind))):
        data = rows(label=kind != "CausalLM")
        settings = arguments(transformers.TrainingArguments, tmp_path / str(number))
        trainer = transformers.Trainer(model=model, args=settings, train_dataset=data)
        trainer.train()
        found.append(losses(trainer))
    assert found[1] == pytest.approx(found[0], rel=1e-4)


@pytest.mark.parametrize(("kind", "make"), TRL[:1], ids=["sft"])
def test_trl_on_an_attached_model(kind: str, make: Callable[[Any, Path], Any], tmp_path: Path) -> None:
    found = []
    for number, model in enumerate((pair(kind)[0], attached(kind))):
        trainer = make(model, tmp_path / str(number))
        trainer.train()
        found.append(losses(trainer))
    assert found[1] == pytest.approx(found[0], rel=2e-4)


def test_accelerate_on_an_attached_model() -> None:
    found = [by_accelerate(model) for model in (pair()[0], attached())]
    assert found[1] == pytest.approx(found[0], rel=1e-4)


# -- Lightning ------------------------------------------------------------------------------------------------------------


def test_lightning(tmp_path: Path) -> None:
    """A LightningModule around each model; its checkpoint holds what is trained and is resumed from."""
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model, self.found = model, []

        def training_step(self, batch: Any, index: int) -> Any:
            loss = self.model(input_ids=batch, labels=batch).loss
            self.found.append(loss.item())
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW([one for one in self.parameters() if one.requires_grad], lr=1e-2)

    data = torch.utils.data.DataLoader([row["input_ids"] for row in rows(12)], batch_size=4)
    found = []
    for number, model in enumerate(three()):
        module = Module(model)
        trainer = lightning.Trainer(
            max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
            enable_checkpointing=False, default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(module, data)
        found.append(module.found)
        if number:
            trainer.save_checkpoint(tmp_path / "last.ckpt")
            after = trained(model)
            for one in model.parameters():
                one.data.add_(one.requires_grad)
            module.load_state_dict(torch.load(tmp_path / "last.ckpt", weights_only=False)["state_dict"])
            assert all(torch.equal(one, after[name]) for name, one in trained(model).items())
    assert len(found[0]) == 3
    for own in found[1:]:
        assert own == pytest.approx(found[0], rel=1e-4)


# -- sentence-transformers -----------------------------------------------------------------------------------------------------


def test_sentence_transformers(tmp_path: Path) -> None:
    """The same sentences have the same embeddings, and a training step on them the same loss."""
    library = pytest.importorskip("sentence_transformers")
    from sentence_transformers.models import Pooling, Transformer

    config = transformers.BertConfig(
        vocab_size=43, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    sentences, start, found = ["w1 w2 w3", "w4 w5"], None, []
    for module in (peft, ours):
        words = Transformer(str(tmp_path))
        asked = {"r": 4, "target_modules": ["query", "value"], "task_type": "FEATURE_EXTRACTION"}
        with quiet():
            model = module.get_peft_model(words.auto_model, module.LoraConfig(**asked, init_lora_weights=False))
        start = start or peft.get_peft_model_state_dict(model)
        if module is ours:
            ours.set_peft_model_state_dict(model, {key: one.clone() for key, one in start.items()})
        else:
            start = {key: one.clone() for key, one in start.items()}
        words.auto_model = model
        whole = library.SentenceTransformer(modules=[words, Pooling(32)], device="cpu")
        optimizer = torch.optim.AdamW([one for one in whole.parameters() if one.requires_grad], lr=1e-2)
        own = []
        for _ in range(3):
            inputs = whole.tokenize(sentences) if hasattr(whole, "tokenize") else whole.preprocess(sentences)
            one, two = whole(inputs)["sentence_embedding"]
            loss = torch.cosine_similarity(one, two, dim=0)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            own.append(loss.item())
        found.append([*own, *whole.encode(sentences).flatten().tolist()])
    assert len(set(found[1])) > 3
    assert found[1] == pytest.approx(found[0], rel=1e-4, abs=1e-5)


# -- FSDP, compiling, ONNX ------------------------------------------------------------------------------------------------


@pytest.fixture
def one_process() -> Iterator[None]:
    """A process group of this process alone."""
    import torch.distributed as dist

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_fsdp2(one_process: None, tmp_path: Path) -> None:
    """Every block spread by `fully_shard`, over one process here: equal losses, and the adapter is saved whole."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (1,))
    ids = torch.stack([row["input_ids"] for row in rows(4)])
    found = []
    for model in three():
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        for block in inner.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-2)
        own = []
        for _ in range(3):
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            own.append(loss.item())
        found.append(own)
    lk.adapters(inner)["default"].save(tmp_path)
    with quiet():
        read = peft.PeftModel.from_pretrained(base(), str(tmp_path))
    assert read(input_ids=ids, labels=ids).loss.item() < found[0][-1]
    for own in found[1:]:
        assert own == pytest.approx(found[0], rel=1e-4)


def test_fsdp1_wraps_blocks_and_trained_leaves() -> None:
    """The policy that Trainer takes for FSDP1: the model's blocks, and leaves that are trained, apart from frozen ones."""
    _, own = pair()
    policy = ours.fsdp_auto_wrap_policy(own)
    chosen = {type(one).__name__ for one in own.modules() if policy(module=one, recurse=False, nonwrapped_numel=0)}
    assert chosen == {"LlamaDecoderLayer", "LoRADelta"}


def test_a_routed_layer_compiles_whole() -> None:
    """Rows with adapters of their own, in one graph with no break."""
    model = pair()[1]
    model.add_adapter("two", ours.LoraConfig(**options()))
    for adapter in lk.adapters(model.get_base_model()).values():
        for parameter in adapter.parameters():
            parameter.data.normal_(0, 0.1)
    inner = model.eval().get_base_model()
    ids = torch.stack([row["input_ids"] for row in rows(3)])
    with torch.no_grad(), lk.use(inner, ["default", None, "two"]):
        wanted = inner(input_ids=ids, use_cache=False).logits
        torch._dynamo.reset()
        explained = torch._dynamo.explain(inner)(input_ids=ids, use_cache=False)
        assert explained.graph_break_count == 0, explained.break_reasons
        compiled = torch.compile(inner, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(input_ids=ids, use_cache=False).logits, wanted)


def test_onnx(tmp_path: Path) -> None:
    """Exported with the adapter in it, and evaluated as the model is."""
    pytest.importorskip("onnxscript")
    evaluator = pytest.importorskip("onnx.reference")
    model = pair("SequenceClassification")[1].eval()
    for parameter in lk.adapters(model.get_base_model())["default"].parameters():
        parameter.data.normal_(0, 0.1)
    ids = rows(1)[0]["input_ids"][None]
    program = torch.onnx.export(model, (), kwargs={"input_ids": ids, "use_cache": False}, dynamo=True)
    program.save(tmp_path / "model.onnx")
    (found, *_) = evaluator.ReferenceEvaluator(str(tmp_path / "model.onnx")).run(None, {"input_ids": ids.numpy()})
    torch.testing.assert_close(torch.as_tensor(found), model(input_ids=ids).logits.detach(), rtol=1e-4, atol=1e-5)


# -- without PEFT ---------------------------------------------------------------------------------------------------------


def test_all_of_it_without_peft() -> None:
    """Where PEFT is not installed: isinstance holds of our own classes, and a Trainer takes the adapter's path."""
    script = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name == "peft" or name.startswith("peft."):
            raise ModuleNotFoundError("no PEFT here", name="peft")
sys.meta_path.insert(0, Absent())
import lorakit.peft as peft
config = peft.LoraConfig(r=2, target_modules=["c_attn"])
assert isinstance(config, peft.PeftConfig) and isinstance(config, peft.LoraConfig)
import transformers
model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=20))
wrapped = peft.get_peft_model(model, config)
assert isinstance(wrapped, peft.PeftModel) and type(config).__mro__[-1] is object
try:
    import peft as real
except ModuleNotFoundError:
    print("ran")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "ran", done.stderr[-2000:]


@pytest.mark.slow
def test_deepspeed(tmp_path: Path) -> None:
    """ZeRO's stages 0 to 3 over one process on a processor, in a process of its own, since DeepSpeed changes torch's state.

    It is no part of the tests' environment (its installation compiles): pip install --no-build-isolation deepspeed.
    """
    pytest.importorskip("deepspeed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = f"""
import os, sys, json
import torch
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="{port}", RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", DS_ACCELERATOR="cpu")
sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
import deepspeed, peft
import lorakit.peft as ours
from reference.models import MODELS, inputs, quiet
deepspeed.init_distributed("gloo")
ids = inputs("llama")["input_ids"]

def losses(library, stage):
    options = library.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    with quiet():
        model = library.get_peft_model(MODELS["llama"]().float(), options)
    draw = torch.Generator().manual_seed(1)
    state = sorted(library.get_peft_model_state_dict(model).items())
    start = {{key: 0.1 * torch.randn(value.shape, generator=draw) for key, value in state}}
    library.set_peft_model_state_dict(model, start)
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-2)
    config = {{"train_micro_batch_size_per_gpu": 2, "zero_optimization": {{"stage": stage}}}}
    config |= {{"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    found = []
    for _ in range(4):
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        found.append(float(loss.detach()))
    return found

print("found", json.dumps([[losses(library, stage) for library in (peft, ours)] for stage in range(4)]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=tmp_path)
    lines = [line for line in done.stdout.splitlines() if line.startswith("found ")]
    assert lines, done.stderr[-2000:]
    for theirs, own in json.loads(lines[0].removeprefix("found ")):
        assert own == theirs
        assert own[-1] < own[0]
