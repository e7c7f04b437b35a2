"""PEFT's names over lorakit: the same script gives the same numbers, and no field of LoraConfig is dropped."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
import subprocess
import sys
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


_DERIVED = {
    ("CPTConfig", field)
    for field in (
        *("num_virtual_tokens", "cpt_token_ids", "cpt_mask"),
        *("cpt_tokens_type_mask", "num_transformer_submodules"),
    )
}
"""What PEFT computes of other fields when a configuration is made, and lorakit when the adapter is."""


@pytest.mark.parametrize("name", ["LoraConfig", *ours.CONFIGS])
def test_every_field_is_accepted(name: str) -> None:
    """The fields and defaults are PEFT's own, so that no configuration fails for a name; isinstance holds for PEFT's class."""
    if name == "CordaConfig":
        from peft.tuners.lora.config import CordaConfig as Theirs
    else:
        Theirs = getattr(peft, name)
    Own = getattr(ours, name)
    needed = {
        "AdaLoraConfig": {"total_step": 9},
        "LoftQConfig": {"loftq_bits": 4},
        "CPTConfig": {"task_type": "CAUSAL_LM"},
    }
    required: dict[str, Any] = needed.get(name, {})
    with quiet():
        theirs = Theirs(**required)
    own = Own(**required)
    defaults = {one.name: getattr(theirs, one.name) for one in dataclasses.fields(Theirs)}
    assert set(defaults) <= {one.name for one in dataclasses.fields(Own)}
    for field, value in defaults.items():
        if field not in ("runtime_config", "peft_version") and (name, field) not in _DERIVED:
            assert getattr(own, field) == value, field
    if hasattr(peft, name):
        assert isinstance(own, Theirs)
        assert type(own) is Own
    assert type(dataclasses.replace(own)) is Own


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("use_qalora", True),
        ("arrow_config", {"top_k": 1}),
        ("kasa_config", {"beta": 1}),
        ("velora_config", {"scale": 1}),
        ("monteclora_config", {"num_samples": 2}),
        ("megatron_config", {"a": 1}),
        ("eva_config", {"rho": 2}),
        ("corda_config", {"verbose": True}),
        ("lora_ga_config", {"scale": "stable"}),
        ("loftq_config", {"loftq_bits": 4}),
        ("init_lora_weights", "gausian"),
        ("runtime_config", peft.LoraRuntimeConfig(ephemeral_gpu_offload=True)),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(option: str, value: Any) -> None:
    model = MODELS["llama"]()
    with pytest.raises(LorakitError, match=option):
        ours.get_peft_model(model, ours.LoraConfig(target_modules=["q_proj"], **{option: value}))
    assert not ours.adapters(model)


STARTS = [False, "orthogonal", "olora", "pissa", "pissa_niter_4", "loftq", "corda", "lora_ga", "eva", "gaussian"]


@pytest.mark.parametrize("start", STARTS)
def test_every_start_is_honoured(start: Any, tmp_path: Path) -> None:
    """The start is lorakit's of that name; False alone is away from the base; the file says what it does."""
    model = MODELS["llama"]()
    wanted, batch = logits(model, "llama"), {"input_ids": inputs("llama")["input_ids"]}
    config = ours.LoraConfig(target_modules=["q_proj", "v_proj"], r=4, init_lora_weights=start)
    if start == "corda":
        ours.preprocess_corda(model, config, lambda: model(**batch))
    if start == "lora_ga":
        ours.preprocess_loraga(model, config, lambda: model(**batch, labels=batch["input_ids"]).loss.backward())
    own = ours.get_peft_model(model, config)
    if start == "eva":
        plain = next(lk.adapters(model)["default"].parameters()).clone()
        ours.initialize_lora_eva_weights(own, [batch])
        assert not torch.equal(next(lk.adapters(model)["default"].parameters()), plain)
    found = logits(own, "llama")
    if start is False:
        assert (found - wanted).abs().max() > 1e-3
    elif start not in ("loftq",):
        assert_same(found, wanted)
    if start in ("pissa", "olora", "corda", "lora_ga"):
        scramble(lk.adapters(model)["default"].named_parameters())
        found = logits(own, "llama")
    own.save_pretrained(tmp_path)
    if start != "loftq":  # whose base is the rounded one
        with quiet():
            read = peft.PeftModel.from_pretrained(MODELS["llama"](), str(tmp_path))
        assert_same(logits(read, "llama"), found)


def test_every_name_of_pefts_is_here_or_raises_by_name() -> None:
    offered = {name for name in peft.__all__ if name in ours.__all__}
    assert all(getattr(ours, name) is not None for name in offered)
    for name in set(peft.__all__) - offered:
        with pytest.raises(ImportError, match=name):
            getattr(ours, name)
    with pytest.raises(
        ImportError, match=r"no PolyConfig: PEFT type POLY is not supported because each call must be told"
    ):
        from lorakit.peft import PolyConfig  # noqa: F401
    with pytest.raises(ImportError, match=r"create_arrow_model; in lorakit it is lorakit\.route"):
        from lorakit.peft import create_arrow_model  # noqa: F401
    assert not hasattr(ours, "nothing_of_peft")


def test_what_the_wrapper_lacks_does_not_reach_the_model() -> None:
    own = ours.get_peft_model(MODELS["llama"](), ours.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(AttributeError, match=r"get_prompt is not offered; in lorakit it is"):
        _ = own.get_prompt
    known = {name for name in dir(peft.PeftModel) if not name.startswith("_")} - set(dir(torch.nn.Module))
    for name in known - set(dir(own)):
        with pytest.raises(AttributeError, match="is not offered"):
            getattr(own, name)


def test_modules_that_import_peft_get_this_one() -> None:
    """In a process of its own: sys.modules["peft"] = lorakit.peft, also for names below peft."""
    script = """
import sys, lorakit.peft
sys.modules["peft"] = lorakit.peft
import peft.utils.other
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
import torch, transformers
from transformers.trainer_utils import _is_peft_model
model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=20))
wrapped = peft.get_peft_model(model, LoraConfig(r=2))
assert _is_peft_model(wrapped) and type(wrapped).__module__ == "lorakit.peft.model"
assert any(isinstance(one, BaseTunerLayer) for one in model.modules())
assert get_peft_model_state_dict(wrapped)
print("ran")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "ran", done.stderr


METHODS: list[tuple[str, dict[str, Any]]] = [
    ("AdaptionPromptConfig", {"adapter_len": 3, "adapter_layers": 1}),
    ("LNTuningConfig", {}),
    ("GloraConfig", {"r": 2}),
    ("BOFTConfig", {"boft_block_size": 4}),
    ("DeloraConfig", {"r": 2}),
    ("GraloraConfig", {"r": 4}),
    ("HRAConfig", {"r": 2}),
    ("MissConfig", {"r": 8, "init_weights": "mini", "mini_r": 2}),
    ("RoadConfig", {"group_size": 4}),
    ("DeftConfig", {"r": 2}),
    ("OSFConfig", {"effective_rank": 4}),
    ("PeanutConfig", {"r": 3, "depth": 1}),
    ("PsoftConfig", {"r": 3}),
    ("PveraConfig", {"r": 4}),
    ("TinyLoraConfig", {"u": 4, "weight_tying": 1.0}),
    ("UniLoraConfig", {"theta_d_length": 30, "init_theta_d_bound": 0.5}),
    ("WaveFTConfig", {"n_frequency": 20}),
    ("SupertuningConfig", {"sparsity": 0.9}),
    ("C3AConfig", {"block_size": 4}),
    ("FourierFTConfig", {"n_frequency": 20}),
    ("HiraConfig", {"r": 3}),
    ("IA3Config", {}),
    ("LoHaConfig", {"r": 2}),
    ("LoKrConfig", {"r": 2}),
    ("OFTConfig", {"oft_block_size": 4}),
    ("PrefixTuningConfig", {"num_virtual_tokens": 3}),
    ("PrefixTuningConfig", {"num_virtual_tokens": 3, "prefix_projection": True, "encoder_hidden_size": 5}),
    ("PromptEncoderConfig", {"num_virtual_tokens": 3, "encoder_hidden_size": 6}),
    ("PromptTuningConfig", {"num_virtual_tokens": 3}),
    ("RandLoraConfig", {"r": 4}),
    ("ShiraConfig", {"r": 2}),
    ("VBLoRAConfig", {"num_vectors": 8, "vector_length": 4}),
    ("VeraConfig", {"r": 4}),
]


@pytest.mark.parametrize(("name", "options"), METHODS, ids=[f"{name}{len(own)}" for name, own in METHODS])
def test_every_method_trains_and_is_read_by_peft(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    """As many trained numbers as PEFT's; a step changes the loss; what is saved is the same function in PEFT."""
    options = {**options, "task_type": "CAUSAL_LM"}
    torch.manual_seed(0)
    in_floats = name in ("AdaptionPromptConfig", "C3AConfig", "FourierFTConfig", "DeftConfig", "PsoftConfig")
    dtype = torch.float32 if in_floats else torch.float64  # PEFT computes these in float32
    with quiet():
        theirs = peft.get_peft_model(MODELS["llama"]().to(dtype), getattr(peft, name)(**options))
    own = ours.get_peft_model(MODELS["llama"]().to(dtype), getattr(ours, name)(**options))
    assert isinstance(own, peft.PeftModel)
    if name != "PromptEncoderConfig" and not options.get("prefix_projection"):
        assert own.get_nb_trainable_parameters()[0] == theirs.get_nb_trainable_parameters()[0]
    ids = inputs("llama")["input_ids"]
    optimizer = torch.optim.SGD([one for one in own.parameters() if one.requires_grad], lr=0.5)
    before = own(input_ids=ids, labels=ids).loss
    before.backward()
    optimizer.step()
    assert own(input_ids=ids, labels=ids).loss != before
    own.eval().save_pretrained(tmp_path)
    with quiet():
        read = peft.PeftModel.from_pretrained(MODELS["llama"]().to(dtype), str(tmp_path))
    ours_now, theirs_now = (model(input_ids=ids).logits[:, -ids.shape[1] :] for model in (own, read.eval()))
    if in_floats:
        torch.testing.assert_close(ours_now, theirs_now, rtol=1e-5, atol=1e-6)
    else:
        assert_same(ours_now, theirs_now)


def test_adalora_has_the_penalty_of_peft() -> None:
    options = {"init_r": 3, "target_r": 2, "total_step": 10, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    with quiet():
        theirs = peft.get_peft_model(MODELS["llama"](), peft.AdaLoraConfig(**options))
    own = ours.get_peft_model(MODELS["llama"](), ours.AdaLoraConfig(**options))
    trained = [(key, one) for key, one in theirs.named_parameters() if one.requires_grad and "ranknum" not in key]
    scramble(iter(trained))
    values = {key: one.clone() for key, one in peft.get_peft_model_state_dict(theirs).items()}
    ours.set_peft_model_state_dict(own, values)
    ids = inputs("llama")["input_ids"]
    found, wanted = (model.eval()(input_ids=ids, labels=ids).loss for model in (own, theirs))
    torch.testing.assert_close(found, wanted, check_dtype=False, rtol=1e-5, atol=1e-6)
    assert (own.get_base_model()(input_ids=ids, labels=ids).loss - found).abs() > 0.1


def test_merging_for_a_while_and_the_base() -> None:
    own = ours.get_peft_model(MODELS["llama"](), ours.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    base, adapted = logits(MODELS["llama"](), "llama"), logits(own, "llama")
    own.merge_adapter()
    assert ours.get_model_status(own).merged_adapters == ["default"]
    assert_same(logits(own, "llama"), adapted)
    with own.disable_adapter():
        assert_same(logits(own, "llama"), base)
    assert_same(logits(own, "llama"), adapted)
    own.unmerge_adapter()
    assert_same(logits(own, "llama"), adapted)
    status = ours.get_model_status(own)
    assert (status.enabled, status.active_adapters, status.merged_adapters) == (True, ["default"], [])
    with lk.merged(own.get_base_model(), "default"), pytest.raises(LorakitError, match="leave that block first"):
        own.disable_adapter().__enter__()


def test_a_weighted_sum_adds_what_adapters_do() -> None:
    """Also with rsLoRA and ranks that differ, where PEFT's is another sum."""
    model = MODELS["llama"]()
    own = ours.get_peft_model(model, ours.LoraConfig(target_modules=["lm_head"], r=4, use_rslora=True))
    own.add_adapter("other", ours.LoraConfig(target_modules=["lm_head"], r=2, lora_alpha=3))
    for index, adapter in enumerate(ours.adapters(model).values()):
        scramble(adapter.named_parameters(), seed=index)
    alone = []
    for name in (None, "default", "other"):
        with lk.use(model, name):
            alone.append(logits(model, "llama"))
    own.add_weighted_adapter(["default", "other"], [0.5, 2.0], "sum", combination_type="linear")
    own.set_adapter("sum")
    assert_same(logits(own, "llama"), alone[0] + 0.5 * (alone[1] - alone[0]) + 2.0 * (alone[2] - alone[0]))


def test_deleting_the_active_adapter_says_which_acts(caplog: pytest.LogCaptureFixture) -> None:
    own = ours.get_peft_model(MODELS["llama"](), ours.LoraConfig(target_modules=["q_proj"]))
    own.add_adapter("two", ours.LoraConfig(target_modules=["q_proj"]))
    own.delete_adapter("default")
    assert own.active_adapters == ["two"]
    assert "default acted; two acts now" in caplog.text


def test_reading_puts_the_model_into_evaluation_mode(tmp_path: Path) -> None:
    config = ours.LoraConfig(target_modules=["q_proj"], lora_dropout=0.5, init_lora_weights=False)
    ours.get_peft_model(MODELS["llama"](), config).save_pretrained(tmp_path)
    read = ours.PeftModel.from_pretrained(MODELS["llama"]().train(), tmp_path)
    assert not any(one.training for one in read.modules())
    assert not any(one.requires_grad for one in read.parameters())
    assert ours.PeftModel.from_pretrained(MODELS["llama"]().train(), tmp_path, is_trainable=True).training


def test_pickled_and_copied() -> None:
    own = ours.get_peft_model(MODELS["llama"](), ours.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    wanted = logits(own.eval(), "llama")
    for twin_of in (copy.deepcopy(own), pickle.loads(pickle.dumps(own))):
        assert type(twin_of) is type(own)
        assert_same(logits(twin_of, "llama"), wanted)


def test_loraplus_gives_b_its_own_rate() -> None:
    own = ours.get_peft_model(MODELS["llama"](), ours.LoraConfig(target_modules=["q_proj"], r=2))
    optimizer = ours.create_loraplus_optimizer(own, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)
    rates = {id(one): group["lr"] for group in optimizer.param_groups for one in group["params"]}
    adapter = lk.adapters(own.get_base_model())["default"]
    found = {adapter.roles()[name]: rates[id(one)] for name, one in adapter.named_parameters()}
    assert found == {"A": 1e-3, "B": pytest.approx(16e-3)}


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
    assert own.active_adapter == ["default", "other"]
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


def test_some_random_draws_both_ways() -> None:
    """A share of `make peft-draws`: random options of every type, read by PEFT and by lorakit."""
    from reference.draws import draw

    base = MODELS["llama"]()
    found = [draw(seed, base) for seed in range(100, 112)]
    assert not [one for one in found if one.startswith("WRONG")]
    assert found.count("same") >= 8


@pytest.mark.parametrize(
    "options", [{}, {"layerwise_scalings": True, "xlora_depth": 2, "xlora_size": 6}], ids=["one", "deep"]
)
def test_xlora_by_its_configuration(options: dict[str, Any], tmp_path: Path) -> None:
    """As many trained numbers as PEFT's, the same function with the same classifier, and a step of training."""
    made = MODELS["llama"]().eval()
    made.config.use_cache = False
    for index, rank in enumerate((2, 3)):
        scramble(lk.attach(made, lk.LoRA(rank=rank), name="ab"[index]).named_parameters(), seed=index, size=0.4)
    folders = {str(index): str(lk.adapters(made)[name].save(tmp_path / name)) for index, name in enumerate("ab")}
    given = {"task_type": "CAUSAL_LM", "hidden_size": made.config.hidden_size, "adapters": folders, **options}

    def base() -> Any:
        model = MODELS["llama"]().eval()
        model.config.use_cache = False
        return model

    with quiet():
        theirs = peft.get_peft_model(base(), peft.XLoraConfig(**given)).eval()
    own = ours.get_peft_model(base(), ours.XLoraConfig(**given)).eval()
    assert own.get_nb_trainable_parameters()[0] == theirs.get_nb_trainable_parameters()[0]
    classifier = theirs.base_model.internal_xlora_classifier
    scramble(classifier.named_parameters(), seed=5, size=0.6)
    trained = [one for one in own.parameters() if one.requires_grad]
    for mine, other in zip(trained, classifier.parameters(), strict=True):
        mine.data = other.detach().clone()
    assert_same(logits(own, "llama"), logits(theirs, "llama"))
    ids = inputs("llama")["input_ids"]
    own(input_ids=ids, labels=ids).loss.backward()
    assert all(one.grad is not None and one.grad.abs().sum() > 0 for one in trained if one.ndim > 1)
    for wrong in ({"adapters": {}}, {"scaling_pass_value": 1.0}, {"top_k_lora": 1}):
        with pytest.raises(LorakitError, match="XLoraConfig"):
            ours.get_peft_model(base(), ours.XLoraConfig(**{**given, **wrong}))
