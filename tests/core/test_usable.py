"""With adapters on, a model stays what everybody expects of it: its own names, its own files, Trainer's checkpoints."""

from __future__ import annotations

import copy
import io
import logging
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn

import lorakit as lk
from lorakit.adapter.adapter import Adapter
from lorakit.errors import LorakitError

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = torch.arange(3, 11)[None]


def llama(tied: bool = False, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, pad_token_id=0, tie_word_embeddings=tied,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def noisy(adapter: Adapter, seed: int = 1) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return adapter


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(ids).logits  # type: ignore[no-any-return]


WAYS: dict[str, tuple[Any, dict[str, Any]]] = {
    "lora": (lk.LoRA(rank=2), {}),
    "biases": (lk.LoRA(rank=2), {"bias": "all"}),
    "saved": (lk.LoRA(rank=2), {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "head": (lk.LoRA(rank=2), {"target_modules": ["lm_head", "embed_tokens", "q_proj"]}),
    "vblora": (lk.VBLoRA(vector_length=4, num_vectors=16, topk=2), {}),
    "vera": (lk.VeRA(rank=2), {}),
    "prefix": (lk.PrefixTuning(tokens=2), {}),
}


@pytest.mark.parametrize("way", WAYS)
def test_state_dict_has_the_bases_own_names(way: str) -> None:
    method, options = WAYS[way]
    model = llama()
    base = model.state_dict()
    noisy(lk.attach(model, method, name="one", **options))
    state = model.state_dict()
    assert [key for key in state if "lorakit" not in key] == list(base)
    assert all(torch.equal(state[key], base[key]) for key in base)
    assert state._metadata.keys() >= base._metadata.keys()

    other = llama(seed=5)
    lk.attach(other, method, name="one", **options)
    assert other.load_state_dict(state).missing_keys == []
    assert torch.equal(logits(other), logits(model))
    again = other.state_dict()
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], state[key]) for key in state)


def test_every_tensor_of_an_adapter_is_in_the_models_state() -> None:
    for method, options in WAYS.values():
        model = llama()
        adapter = lk.attach(model, method, **options)
        held = {id(parameter) for parameter in model.parameters()}
        assert all(id(parameter) in held for parameter in adapter.parameters())
        lk.detach(model)
        assert list(model.state_dict()) == list(llama().state_dict())


def test_load_state_dict_takes_the_names_of_the_modules_too() -> None:
    model, other = llama(), llama(seed=3)
    for each in (model, other):
        noisy(lk.attach(each, lk.LoRA(rank=2)))
    state = OrderedDict((key, tensor.detach()) for key, tensor in model.named_parameters())
    assert any(".base." in key for key in state)
    other.load_state_dict(state, strict=False)
    assert torch.equal(logits(other), logits(model))
    missing = other.load_state_dict({}, strict=False).missing_keys
    assert "model.layers.0.self_attn.q_proj.weight" in missing
    assert not [key for key in missing if ".base." in key]


def test_the_base_loads_under_its_adapters() -> None:
    model, other = llama(), llama(seed=3)
    lk.attach(other, lk.LoRA(rank=2))
    found = other.load_state_dict(model.state_dict(), strict=False)
    assert found.unexpected_keys == []
    assert all("lorakit." in key for key in found.missing_keys)
    assert torch.equal(logits(other), logits(model))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("checkpoint", [False, True], ids=["by hand", "by a Trainer"])
def test_save_pretrained_is_the_base_and_the_adapter_beside_it(
    way: str, tied: bool, trained: bool, checkpoint: bool, tmp_path: Path
) -> None:
    method, options = WAYS[way]
    model = llama(tied)
    base = logits(model)
    adapter = noisy(lk.attach(model, method, name="one", **options)).requires_grad_(trained)
    acting = logits(model)
    model.save_pretrained(tmp_path, **({"state_dict": None} if checkpoint else {}))
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        keys = set(file.keys())
    assert any("lorakit" in key for key in keys) == (trained and checkpoint)
    opened, about = transformers.LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not about["missing_keys"]
    assert not about["mismatched_keys"]
    assert torch.equal(logits(opened.eval()), base)
    lk.load(opened, tmp_path / "one")
    assert torch.equal(logits(opened), acting)
    assert torch.equal(logits(model), acting)
    assert adapter.model is model
    lk.detach(model)
    assert "save_pretrained" not in vars(model)


def test_peft_and_transformers_read_what_lies_beside(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = llama()
    noisy(lk.attach(model, lk.LoRA(rank=2), name="one"))
    acting = logits(model)
    model.save_pretrained(tmp_path)
    opened = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(peft.PeftModel.from_pretrained(opened, tmp_path / "one").eval()), acting)
    opened = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    opened.load_adapter(str(tmp_path / "one"))
    torch.testing.assert_close(logits(opened.eval()), acting)


def test_save_pretrained_while_merged_is_refused(tmp_path: Path) -> None:
    model = llama()
    lk.attach(model, lk.LoRA(rank=2), name="one")
    with lk.merged(model, "one"), pytest.raises(LorakitError, match="merged into the weights just now"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize("way", WAYS)
def test_copies_and_pickles_act_for_themselves(way: str, tmp_path: Path) -> None:
    method, options = WAYS[way]
    model = llama()
    noisy(lk.attach(model, method, name="one", **options))
    acting = logits(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)]
    with torch.no_grad():
        for parameter in lk.adapters(model)["one"].parameters():
            parameter.add_(1.0)
    for index, each in enumerate(copies):
        assert torch.equal(logits(each), acting)
        assert lk.adapters(each)["one"].model is each
        each.save_pretrained(tmp_path / str(index))
        opened = transformers.LlamaForCausalLM.from_pretrained(tmp_path / str(index)).eval()
        lk.load(opened, tmp_path / str(index) / "one")
        assert torch.equal(logits(opened), acting)


# -- Trainer ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["lora", "saved", "vblora", "prefix"])
def test_a_trainer_resumes_to_the_bit(way: str, tmp_path: Path) -> None:
    method, options = WAYS[way]
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(3, 60, (12, 6), generator=torch.Generator())]

    started: list[Tensor] = []

    def run(resume: bool) -> dict[str, Tensor]:
        model = llama()
        torch.manual_seed(7)
        adapter = lk.attach(model, method, **options)
        started[:] = [tensor.clone() for tensor in adapter.state_dict().values()]
        arguments = transformers.TrainingArguments(
            str(tmp_path / way), max_steps=6, save_steps=3, per_device_train_batch_size=2, report_to=[], use_cpu=True,
            learning_rate=0.01, disable_tqdm=True, save_total_limit=4, logging_strategy="no",
        )  # fmt: skip
        transformers.Trainer(model, arguments, train_dataset=rows).train(  # type: ignore[arg-type]
            resume_from_checkpoint=str(tmp_path / way / "checkpoint-3") if resume else None
        )
        return {key: tensor.clone() for key, tensor in adapter.state_dict().items()}

    whole = run(resume=False)
    assert any(not torch.equal(tensor, fresh) for tensor, fresh in zip(whole.values(), started, strict=True))
    again = run(resume=True)
    assert all(torch.equal(again[key], whole[key]) for key in whole)


# -- the vocabulary --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_resize_token_embeddings_beside_an_adapter(tied: bool) -> None:
    model, plain = llama(tied), llama(tied)
    noisy(lk.attach(model, lk.LoRA(rank=2)))
    acting = logits(model)
    for each in (model, plain):
        torch.manual_seed(3)
        each.resize_token_embeddings(70)
    assert model.config.vocab_size == 70
    assert model.get_input_embeddings().weight.shape[0] == 70
    assert torch.equal(logits(model)[..., :64], acting)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    with lk.use(model, None):
        assert torch.equal(logits(model), logits(plain))
    lk.detach(model)
    assert torch.equal(logits(model), logits(plain))


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["lm_head"]},
        {"target_modules": ["embed_tokens"]},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["model"], "target_modules": ["lm_head"]},
    ],
)
def test_resizing_an_adapted_vocabulary_is_refused_in_words(options: dict[str, Any]) -> None:
    model = llama()
    lk.attach(model, lk.LoRA(rank=2), name="one", **options)
    before = logits(model)
    with pytest.raises(LorakitError, match=r"resize_token_embeddings: adapter 'one' .*attach afterwards"):
        model.resize_token_embeddings(70)
    assert torch.equal(logits(model), before)
    assert model.resize_token_embeddings() is model.get_input_embeddings()


def test_tied_weights_go_to_the_base() -> None:
    model = llama(tied=True)
    noisy(lk.attach(model, lk.LoRA(rank=2), target_modules=["lm_head", "q_proj"]))
    before = logits(model)
    model.tie_weights()
    assert torch.equal(logits(model), before)
    assert not model.lm_head._parameters
    assert model.lm_head.base.weight is model.model.embed_tokens.weight


# -- who acts --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = llama()
    noisy(lk.attach(model, lk.LoRA(rank=2))).save(tmp_path / "one")
    return tmp_path / "one"


def test_what_is_loaded_acts(folder: Path) -> None:
    model = llama()
    base = logits(model)
    adapter = lk.load(model, folder)
    assert not torch.equal(logits(model), base)
    assert adapter.num_parameters(trainable=True) == 0
    lk.load(model, folder, name="idle", active=False)
    acting = logits(model)
    with lk.use(model, "one"):
        assert torch.equal(logits(model), acting)


def test_a_model_whose_adapters_are_all_idle_says_so_once(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = llama()
    base = logits(model)
    lk.load(model, folder, name="a", active=False)
    lk.load(model, folder, name="b")
    with caplog.at_level(logging.WARNING, "lorakit"):
        lk.detach(model, "b")
        assert "detach: b acted on this model; none of the others (a) acts now" in caplog.text
        caplog.clear()
        assert torch.equal(logits(model), base)
        logits(model)
    assert caplog.text.count("none acts") == 1


@pytest.mark.parametrize(
    "said", [lambda model: lk.activate(model, None), lambda model: lk.use(model, None).__enter__()]
)
def test_who_asks_for_the_base_is_not_told(said: Any, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = llama()
    lk.load(model, folder)
    said(model)
    logits(model)
    assert not caplog.text
    silent = llama()
    lk.load(silent, folder, active=False)
    logits(silent)
    assert not caplog.text


def test_modules_beside_are_no_part_of_the_base() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x)  # type: ignore[no-any-return]

    model = nn.Sequential(Named(), nn.Linear(4, 4))
    names = list(model.state_dict())
    lk.attach(model, lk.LoRA(rank=1), target_modules=["1"], modules_to_save=["0"])
    state = model.state_dict()
    assert [key for key in state if "lorakit" not in key] == names
    model.load_state_dict(state)
