"""PEFT's names over lorakit: the same script gives the same numbers, and no field of LoraConfig is dropped."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

import lorakit as lk
import lorakit.peft as ours
from core.test_experts import model_of
from lorakit.errors import LorakitError
from reference.models import MODELS, assert_same, inputs, logits, quiet, scramble, twin


def both(name: str, options: dict[str, Any]) -> tuple[Any, Any]:
    """The same script with PEFT and with lorakit.peft, the adapters given the same values."""
    base = MODELS[name]()
    made = []
    for library in (peft, ours):
        with quiet():
            wrapped = library.get_peft_model(twin(base), library.LoraConfig(**options))
        made.append(wrapped.eval())
    theirs, own = made
    scramble(iter([(key, one) for key, one in theirs.named_parameters() if one.requires_grad]))
    values = [one for _, one in theirs.named_parameters() if one.requires_grad]
    for one, value in zip(ours.adapters(own.base_model)["default"].parameters(), values, strict=True):
        one.data.copy_(value)
    return theirs, own


OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("gpt2", {"fan_in_fan_out": True, "r": 4}),
    ("bert", {"task_type": "SEQ_CLS"}),
    ("t5", {"task_type": peft.TaskType.SEQ_2_SEQ_LM, "use_rslora": True}),
    ("llama", {"target_modules": "all-linear", "r": 4, "lora_alpha": 3, "lora_dropout": 0.1}),
    ("llama", {"target_modules": {"q_proj", "v_proj"}, "layers_to_transform": [1], "rank_pattern": {"v_proj": 3}}),
]


@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_the_same_script_gives_the_same(
    name: str, options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs, own = both(name, options)
    wanted = logits(theirs, name)
    assert_same(logits(own, name), wanted)
    with theirs.disable_adapter(), own.disable_adapter():
        assert_same(logits(own, name), logits(theirs, name))
    theirs.print_trainable_parameters()
    own.print_trainable_parameters()
    their_line, our_line = capsys.readouterr().out.splitlines()
    assert our_line.split(" ||")[0] == their_line.split(" ||")[0]
    own.save_pretrained(tmp_path / "ours")
    with quiet():
        theirs.save_pretrained(str(tmp_path / "theirs"))
    for folder in ("ours", "theirs"):
        read = ours.PeftModel.from_pretrained(MODELS[name](), tmp_path / folder)
        assert_same(logits(read, name), wanted)
        assert read.active_adapter == "default"
    merged = own.merge_and_unload()
    assert type(merged) is type(MODELS[name]())
    assert not ours.adapters(merged)
    assert_same(logits(merged, name), wanted)


def test_every_field_is_accepted() -> None:
    """The fields and defaults are PEFT's own, so that no configuration fails for a name."""
    theirs = {one.name: getattr(peft.LoraConfig(), one.name) for one in dataclasses.fields(peft.LoraConfig)}
    own = ours.LoraConfig().to_dict()
    assert set(own) == set(theirs)
    for name, value in own.items():
        if name not in ("peft_type", "runtime_config", "peft_version"):
            assert theirs[name] == value, name


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("lora_bias", True),
        ("layer_replication", [(0, 2), (1, 2)]),
        ("trainable_token_indices", [1]),
        ("alora_invocation_tokens", [1, 2]),
        ("use_qalora", True),
        ("use_bdlora", {"nblocks": 2}),
        ("arrow_config", {"top_k": 1}),
        ("kasa_config", {"beta": 1}),
        ("velora_config", {"scale": 1}),
        ("monteclora_config", {"num_samples": 2}),
        ("megatron_config", {"a": 1}),
        ("ensure_weight_tying", True),
        ("eva_config", {"rho": 2}),
        ("corda_config", {"verbose": True}),
        ("lora_ga_config", {"scale": "stable"}),
        ("loftq_config", {"loftq_bits": 4}),
        ("init_lora_weights", False),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "gausian"),
        ("runtime_config", peft.LoraRuntimeConfig(ephemeral_gpu_offload=True)),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(option: str, value: Any) -> None:
    model = MODELS["llama"]()
    with pytest.raises(LorakitError, match=option):
        ours.get_peft_model(model, ours.LoraConfig(target_modules=["q_proj"], **{option: value}))
    assert not ours.adapters(model)


def test_dora_is_honoured() -> None:
    own = ours.get_peft_model(MODELS["llama"](), ours.LoraConfig(target_modules=["q_proj"], use_dora=True, r=4))
    assert ours.adapters(own.base_model)["default"].method == lk.DoRA(inner=lk.LoRA(rank=4, alpha=8))


def test_unknown_names_are_refused() -> None:
    with pytest.raises(TypeError, match="lora_alfa"):
        ours.LoraConfig(lora_alfa=3)  # type: ignore[call-arg]
    with pytest.raises(LorakitError, match="no default for model_type None"):
        ours.get_peft_model(MODELS["words"](), ours.LoraConfig())
    with pytest.raises(LorakitError, match='no layer matches "q_porj"'):
        ours.get_peft_model(MODELS["llama"](), ours.LoraConfig(target_modules=["q_porj"]))


def test_default_targets_are_those_of_peft() -> None:
    for kind, names in ours.DEFAULT_TARGETS.items():
        assert TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING[kind] == names, kind


def test_several_adapters(tmp_path: Path) -> None:
    """add, set, delete, save under PEFT's folder names, and rows with adapters of their own."""
    model = MODELS["llama"]()
    own = ours.get_peft_model(model, ours.LoraConfig(target_modules=["q_proj"], r=4))
    own.add_adapter("other", ours.LoraConfig(target_modules=["up_proj"], r=2))
    assert own.active_adapters == ["default"]
    for index, adapter in enumerate(ours.adapters(model).values()):
        scramble(adapter.named_parameters(), seed=index)
    own.eval()
    alone = {}
    for name in ("default", "other"):
        own.set_adapter(name)
        alone[name] = logits(own, "llama")
    own.set_adapter(["default", "other"])
    assert own.active_adapters == ["default", "other"]
    with pytest.raises(LorakitError, match="2 adapters are active"):
        _ = own.active_adapter
    with own.disable_adapter():
        base = logits(own, "llama")
    mixed = logits(own, "llama", adapter_names=["other", "__base__", "default"])
    assert_same(mixed, torch.stack([alone["other"][0], base[1], alone["default"][2]]))
    tokens = own.generate(
        inputs("llama")["input_ids"], adapter_names=["other", "__base__", "default"], max_new_tokens=3, do_sample=False
    )
    own.set_adapter("other")
    assert torch.equal(tokens[0], own.generate(inputs("llama")["input_ids"], max_new_tokens=3, do_sample=False)[0])
    own.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_config.json").exists()
    assert (tmp_path / "other" / "adapter_config.json").exists()
    own.delete_adapter("other")
    assert list(own.peft_config) == ["default"]
    own.load_adapter(tmp_path / "other", "again")
    own.set_adapter("again")
    assert_same(logits(own, "llama"), alone["other"])
    assert own.unload() is model
    assert_same(logits(model, "llama"), base)
    with pytest.raises(LorakitError, match="asks for a pickle"):
        own.save_pretrained(tmp_path, safe_serialization=False)


def test_trainers_see_the_models_signature() -> None:
    """The Trainer keeps the data columns that forward's signature names."""
    model = MODELS["llama"]()
    own = ours.get_peft_model(model, ours.LoraConfig())
    assert list(inspect.signature(own.forward).parameters) == list(inspect.signature(model.forward).parameters)
    assert own.config is model.config


def test_parameters_are_targets_too() -> None:
    """PEFT's target_parameters, alone and beside modules; one that is not there is an error."""
    model = model_of("qwen3-moe")
    wrapped = ours.get_peft_model(model, ours.LoraConfig(r=2, target_parameters=["experts.down_proj"]))
    assert {site.weight for _, site, _ in lk.adapters(model)["default"].deltas()} == {"down_proj"}
    assert wrapped is not None
    model = model_of("qwen3-moe")
    ours.get_peft_model(model, ours.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["experts.down_proj"]))
    assert {site.weight for _, site, _ in lk.adapters(model)["default"].deltas()} == {"down_proj", "weight"}
    with pytest.raises(LorakitError, match=r"no layer matches .*experts\.nothing"):
        ours.get_peft_model(model_of("qwen3-moe"), ours.LoraConfig(r=2, target_parameters=["experts.nothing"]))
