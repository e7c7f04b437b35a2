"""Files written by PEFT or by lorakit, read by the other, give the same logits: every layer kind, every option."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lorakit as lk
from lorakit.errors import LorakitError
from lorakit.files.store import CONFIG, OWN, TENSORS
from reference.models import MODELS, assert_same, logits, plain, quiet, scramble, twin

# Each case: the model, then options by PEFT's names. What differs in lorakit's words is translated by `ours`.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"target_modules": ["q_proj", "v_proj"]}),
    "llama rank alpha": ("llama", {"target_modules": ["q_proj", "o_proj"], "r": 5, "lora_alpha": 13}),
    "llama dropout": ("llama", {"target_modules": ["q_proj"], "lora_dropout": 0.3}),
    "llama rslora": ("llama", {"target_modules": ["q_proj", "down_proj"], "use_rslora": True, "r": 3}),
    "llama all-linear": ("llama", {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}),
    "llama regex": ("llama", {"target_modules": r".*layers\.[12]\..*(q|up)_proj"}),
    "llama exclude": ("llama", {"target_modules": ["q_proj", "up_proj"], "exclude_modules": ["layers.0.mlp.up_proj"]}),
    "llama exclude regex": ("llama", {"target_modules": ["q_proj"], "exclude_modules": r".*\.1\..*"}),
    "llama layers": ("llama", {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0, 2]}),
    "llama one layer": (
        "llama",
        {"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
    ),
    "llama patterns": (
        "llama",
        {
            "target_modules": ["q_proj", "k_proj", "up_proj"],
            "rank_pattern": {"q_proj": 2, r"layers\.1\..*up_proj": 7},
            "alpha_pattern": {"k_proj": 3, "model.layers.2.mlp.up_proj": 21},
        },
    ),
    "llama rslora patterns": (
        "llama",
        {
            "target_modules": ["q_proj", "up_proj"],
            "use_rslora": True,
            "rank_pattern": {"q_proj": 2},
            "alpha_pattern": {"up_proj": 5},
        },
    ),
    "llama gaussian": ("llama", {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"}),
    "llama norm saved": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm", "norm"]}),
    "llama head saved": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "llama embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "llama head": ("llama", {"target_modules": ["lm_head", "q_proj"]}),
    "llama dora": ("llama", {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
    "gpt2": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "gpt2 all-linear": ("gpt2", {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}),
    "gpt2 bias all": ("gpt2", {"target_modules": ["c_attn", "mlp.c_proj"], "bias": "all", "fan_in_fan_out": True}),
    "gpt2 bias lora_only": ("gpt2", {"target_modules": ["c_attn"], "bias": "lora_only", "fan_in_fan_out": True}),
    "gpt2 positions": ("gpt2", {"target_modules": ["wpe"]}),
    "bert": ("bert", {"target_modules": ["query", "value"]}),
    "bert SEQ_CLS": ("bert", {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}),
    "bert SEQ_CLS all-linear": ("bert", {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
    "bert classifier": ("bert", {"target_modules": ["query", "dense"], "modules_to_save": ["classifier"]}),
    "bert norm": ("bert", {"target_modules": ["value"], "modules_to_save": ["LayerNorm", "classifier"]}),
    "bert bias all": ("bert", {"target_modules": ["query"], "bias": "all"}),
    "bert bias lora_only": ("bert", {"target_modules": ["query", "dense"], "bias": "lora_only"}),
    "t5": ("t5", {"target_modules": ["q", "v"], "task_type": "SEQ_2_SEQ_LM"}),
    "t5 rslora": ("t5", {"target_modules": ["q", "wo"], "use_rslora": True, "rank_pattern": {"wo": 3}}),
    "convolutions": ("convolutions", {"target_modules": ["one", "two", "three", "point", "head"]}),
    "convolutions rslora": ("convolutions", {"target_modules": ["one", "two", "three"], "r": 3, "use_rslora": True}),
    "convolutions dora": ("convolutions", {"target_modules": ["one", "two", "point"], "use_dora": True}),
    "convolutions bias": ("convolutions", {"target_modules": ["one", "point"], "bias": "all"}),
    "embedding": ("words", {"target_modules": ["words"]}),
    "embedding dora": ("words", {"target_modules": ["words"], "use_dora": True}),
    "saved norms": ("words", {"target_modules": ["words", "body"], "modules_to_save": ["norm"]}),
    "attention bias": ("attention", {"target_modules": ["first", "second"], "bias": "lora_only"}),
    "attention": ("attention", {"target_modules": ["first", "middle", "second"]}),
}
IDS = list(CASES)


def ours(options: dict[str, Any]) -> dict[str, Any]:
    """PEFT's options as the arguments of lk.attach."""
    left = dict(options)
    spec = lk.LoRA(
        rank=left.pop("r", 8),
        alpha=left.pop("lora_alpha", 8),
        dropout=left.pop("lora_dropout", 0.0),
        rslora=left.pop("use_rslora", False),
    )
    left.pop("fan_in_fan_out", None)
    if left.pop("task_type", None) == "SEQ_CLS":
        left["modules_to_save"] = ["classifier"]
    arguments = {"method": lk.DoRA(inner=spec) if left.pop("use_dora", False) else spec}
    for theirs, own in (("layers_to_transform", "layers"), ("init_lora_weights", "init")):
        if theirs in left:
            arguments[own] = left.pop(theirs)
    return {**arguments, **left}


def small(options: dict[str, Any], name: str) -> dict[str, Any]:
    """Ranks that fit the smallest layer (lorakit refuses more rank than a layer has)."""
    return {"r": 2 if name in ("convolutions", "t5") else 4, **options}


def silence_out_proj(named: Any) -> None:
    """PEFT applies the change of nn.MultiheadAttention's out_proj twice, so comparisons leave it at zero."""
    with torch.no_grad():
        for key, parameter in named:
            if "out_proj" in key and ("lora_B" in key or key.endswith(".B")):
                parameter.zero_()


def peft_parameters(model: Any) -> list[tuple[str, nn.Parameter]]:
    return [(key, parameter) for key, parameter in model.named_parameters() if parameter.requires_grad]


def trained_by_peft(model: nn.Module, options: dict[str, Any], adapter: str = "default") -> Any:
    """PEFT's adapter on a model, with values as after training."""
    with quiet():
        wrapped: Any = peft.get_peft_model(model, peft.LoraConfig(**options), adapter_name=adapter)
    scramble(iter(peft_parameters(wrapped)))
    silence_out_proj(peft_parameters(wrapped))
    return wrapped.eval()


def saved_by_peft(model: nn.Module, options: dict[str, Any], folder: Path) -> Any:
    wrapped = trained_by_peft(model, options)
    with quiet():
        wrapped.save_pretrained(str(folder))
    return wrapped


def read_by_peft(model: nn.Module, folder: Path) -> Any:
    with quiet():
        return peft.PeftModel.from_pretrained(model, str(folder)).eval()


@pytest.mark.parametrize("case", IDS)
def test_lorakit_reads_what_peft_wrote(case: str, tmp_path: Path) -> None:
    name, options = CASES[case]
    base = MODELS[name]()
    wrapped = saved_by_peft(twin(base), small(options, name), tmp_path)
    wanted, before = logits(wrapped, name), logits(base, name)
    adapter = lk.load(base, tmp_path, name="a")
    assert_same(logits(base, name), wanted)
    with lk.use(base, None):
        assert torch.equal(logits(base, name), before), "an adapter that is not used changes nothing"
    assert (wanted - before).abs().max() > 1e-5, "the adapter must change something for this test to say anything"
    assert adapter.num_parameters() >= sum(p.numel() for _, p in peft_parameters(wrapped))


@pytest.mark.parametrize("case", IDS)
def test_peft_reads_what_lorakit_wrote(case: str, tmp_path: Path) -> None:
    name, options = CASES[case]
    base = MODELS[name]()
    fresh = twin(base)
    before = logits(base, name)
    adapter = lk.attach(base, **ours(small(options, name)))
    scramble(adapter.named_parameters())
    silence_out_proj(adapter.named_parameters())
    base.eval()
    wanted = logits(base, name)
    adapter.save(tmp_path)
    assert_same(logits(read_by_peft(fresh, tmp_path), name), wanted)
    assert (wanted - before).abs().max() > 1e-5


@pytest.mark.parametrize("case", IDS)
def test_same_tensors_in_both_files(case: str, tmp_path: Path) -> None:
    """The same options give files with the same names and shapes, but for PEFT's copies of embeddings, and where PEFT
    takes modules_to_save for mere ends of names ("norm" for every "layernorm") or leaves a bias out."""
    name, options = CASES[case]
    if case == "llama norm saved":
        options = {**options, "modules_to_save": ["input_layernorm", "model.norm"]}
    base = MODELS[name]()
    saved_by_peft(twin(base), small(options, name), tmp_path / "theirs")
    lk.attach(base, **ours(small(options, name))).save(tmp_path / "ours")
    theirs, own = (
        {key: tuple(value.shape) for key, value in load_file(tmp_path / who / TENSORS).items()}
        for who in ("theirs", "ours")
    )
    copies = {key for key in theirs if key.endswith(("base_layer.weight", "embed_tokens.weight", "lm_head.weight"))}
    if "head saved" not in case:
        theirs = {key: shape for key, shape in theirs.items() if key not in copies}
    left_out = {key for key in own if key.endswith("in_proj_bias")}
    assert {key: shape for key, shape in own.items() if key not in left_out} == theirs


def test_float32_and_bfloat16_bases(tmp_path: Path) -> None:
    """In float32 the same to a few roundings; on a bfloat16 base the file keeps the float32 masters, as PEFT's does."""
    for dtype in (torch.float32, torch.bfloat16):
        base = MODELS["llama"]().to(dtype)
        wrapped = saved_by_peft(twin(base), {"target_modules": ["q_proj", "down_proj"]}, tmp_path / "theirs")
        tensors = load_file(tmp_path / "theirs" / TENSORS)
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
        adapter = lk.load(base, tmp_path / "theirs", name="a")
        adapter.save(tmp_path / "ours")
        again = load_file(tmp_path / "ours" / TENSORS)
        assert all(torch.equal(again[key], tensor) for key, tensor in tensors.items())
        assert len(again) == len(tensors)
        if dtype == torch.float32:
            with lk.use(base, "a"):
                assert_same(logits(base, "llama"), logits(wrapped, "llama"))


# -- where files come from ---------------------------------------------------------------------------------------------------


def test_a_file_under_another_adapter_name(tmp_path: Path) -> None:
    """PEFT puts an adapter called otherwise than "default" in a sub-folder, and cannot load it from the path that it was
    given (peft.md §7.19). Here the path that holds it works, and the one above says which it holds."""
    base = MODELS["llama"]()
    wrapped = trained_by_peft(twin(base), {"target_modules": ["q_proj"]}, adapter="sql")
    with quiet():
        wrapped.save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="adapter_config"), quiet():
        peft.PeftModel.from_pretrained(twin(base), str(tmp_path))
    with pytest.raises(LorakitError, match=r"has no adapter_config.json. It has adapters below it: sql"):
        lk.load(base, tmp_path)
    adapter = lk.load(base, tmp_path / "sql")
    assert adapter.name == "sql"
    with lk.use(base, "sql"):
        assert_same(logits(base, "llama"), logits(wrapped, "llama"))


def test_keys_without_the_usual_prefix(tmp_path: Path) -> None:
    """transformers' own integration and some tools write names that start at the model."""
    base = MODELS["llama"]()
    wrapped = saved_by_peft(twin(base), {"target_modules": ["q_proj"]}, tmp_path)
    tensors = load_file(tmp_path / TENSORS)
    save_file({key.removeprefix("base_model.model."): value for key, value in tensors.items()}, tmp_path / TENSORS)
    lk.load(base, tmp_path, name="a")
    with lk.use(base, "a"):
        assert_same(logits(base, "llama"), logits(wrapped, "llama"))


def test_a_pickle_is_refused(tmp_path: Path) -> None:
    """adapter_model.bin can run code when it is read."""
    base = MODELS["llama"]()
    wrapped = trained_by_peft(twin(base), {"target_modules": ["q_proj"]})
    with quiet():
        wrapped.save_pretrained(str(tmp_path), safe_serialization=False)
    with pytest.raises(LorakitError, match=r"adapter_model\.bin, a pickle.*safetensors only"):
        lk.load(base, tmp_path)


def test_peft_rewrites_a_folder_of_lorakits(tmp_path: Path) -> None:
    """PEFT trains on and saves over lorakit's folder: lorakit.json then speaks of an adapter that is no longer there."""
    base = MODELS["llama"]()
    adapter = lk.attach(base, lk.LoRA(rank=4, alpha=4), target_modules=["q_proj"])
    adapter.save(tmp_path)
    fresh = twin(lk.detach(base))
    wrapped = saved_by_peft(fresh, {"target_modules": ["q_proj"], "r": 4, "lora_alpha": 40}, tmp_path)
    assert (tmp_path / OWN).exists()
    with pytest.raises(LorakitError, match=r"changed after lorakit wrote lorakit\.json"):
        lk.load(base, tmp_path, name="a")
    lk.load(base, tmp_path, name="a", strict=False)
    with lk.use(base, "a"):
        assert_same(logits(base, "llama"), logits(wrapped, "llama"))
    lk.detach(base)
    (tmp_path / OWN).unlink()
    lk.load(base, tmp_path, name="a")


def test_hand_edited_labels_are_no_change(tmp_path: Path) -> None:
    """The base's name in adapter_config.json is often edited by hand; the adapter is the same."""
    base = MODELS["llama"]()
    lk.attach(base, lk.LoRA(rank=4), target_modules=["q_proj"]).save(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    config["base_model_name_or_path"] = "/elsewhere/model"
    (tmp_path / CONFIG).write_text(json.dumps(config))
    lk.load(lk.detach(base), tmp_path, name="a")


# -- names -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "written"),
    [
        (["inner.body"], ["inner.body"]),  # the suffix "body" would select two layers
        (r"body", r"body"),  # and so would the whole name of the outer one: an expression says exactly it
        (["body"], ["body"]),
        (["head"], ["head"]),
    ],
)
def test_ambiguous_names_are_written_so_that_peft_selects_the_same(targets: Any, written: Any, tmp_path: Path) -> None:
    base = plain_words()
    fresh = twin(base)
    adapter = lk.attach(base, lk.LoRA(rank=3), target_modules=targets)
    scramble(adapter.named_parameters())
    adapter.save(tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["target_modules"] == written
    wrapped = read_by_peft(fresh, tmp_path)
    assert_same(logits(wrapped, "words"), logits(base.eval(), "words"))
    layers = {key.split(".lora_A")[0] for key, _ in wrapped.named_modules() if key.endswith("lora_A")}
    assert layers == {f"base_model.model.{path}" for path in adapter.layers}


def plain_words() -> nn.Module:
    return MODELS["words"]()


def test_ambiguous_patterns_are_anchored(tmp_path: Path) -> None:
    """ "body" as a rank pattern also ends "inner.body"; the file says "^body"."""
    base = plain_words()
    fresh = twin(base)
    adapter = lk.attach(
        base, lk.LoRA(rank=2), target_modules=["body", "head", "words"], rank_pattern={"^body": 3, "inner.body": 2}
    )
    scramble(adapter.named_parameters())
    adapter.save(tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["rank_pattern"] == {"^body": 3}
    assert_same(logits(read_by_peft(fresh, tmp_path), "words"), logits(base.eval(), "words"))
    lk.load(lk.detach(base), tmp_path, name="a")


def test_fused_parts_become_one_pair_for_peft(tmp_path: Path) -> None:
    """Deltas on the q and v rows of GPT-2's fused qkv, with other ranks and scales, are one low-rank pair in the file."""
    base = MODELS["gpt2"]()
    fresh = twin(base)
    parts = {"c_attn": {"q": (0, 24), "v": (48, 72)}}
    adapter = lk.attach(
        base,
        lk.LoRA(rank=3, alpha=6),
        target_modules=["c_attn"],
        parts=parts,
        rank_pattern={"c_attn.v": 5},
        bias="lora_only",
    )
    scramble(adapter.named_parameters())
    wanted = logits(base.eval(), "gpt2")
    adapter.save(tmp_path)
    assert load_file(tmp_path / TENSORS)["base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"].shape == (8, 24)
    assert_same(logits(read_by_peft(fresh, tmp_path), "gpt2"), wanted)
    lk.load(lk.detach(base), tmp_path, name="a")
    with lk.use(base, "a"):
        assert_same(logits(base, "gpt2"), wanted)


@pytest.mark.parametrize("wrap", ["compile", "parallel", "block"])
def test_wrapped_models_have_the_names_of_bare_ones(wrap: str, tmp_path: Path) -> None:
    """torch.compile and DistributedDataParallel put a step of their own into every name; files do not hold it."""
    base = MODELS["llama"]()
    fresh = [twin(base) for _ in range(3)]

    def wrapped(model: Any) -> Any:
        if wrap == "compile":
            return torch.compile(model, backend="eager")
        if wrap == "parallel":
            return nn.DataParallel(model)
        model.model.layers[1] = torch.compile(model.model.layers[1], backend="eager")
        return model

    options: dict[str, Any] = {
        "target_modules": ["q_proj", "up_proj"],
        "modules_to_save": ["norm"],
        "alpha_pattern": {"layers.1.*.up_proj": 5},
    }
    bare = lk.attach(base, lk.LoRA(rank=4), **options)
    scramble(bare.named_parameters())
    wanted = logits(base.eval(), "llama")
    bare.save(tmp_path / "bare")
    adapter = lk.load(wrapped(fresh[0]), tmp_path / "bare", name="a")
    adapter.save(tmp_path / "wrapped")
    for name in (TENSORS, CONFIG):
        assert (tmp_path / "wrapped" / name).read_bytes() == (tmp_path / "bare" / name).read_bytes(), name
    with lk.use(adapter.model, "a"):
        assert_same(logits(fresh[0], "llama"), wanted)
    assert_same(logits(read_by_peft(fresh[1], tmp_path / "wrapped"), "llama"), wanted)
    tensors = load_file(tmp_path / "bare" / TENSORS)
    shutil.copytree(tmp_path / "bare", tmp_path / "named")
    (tmp_path / "named" / OWN).unlink()
    step = {"compile": "_orig_mod.", "parallel": "module.", "block": "_orig_mod."}[wrap]
    save_file(
        {key.replace("base_model.model.", f"base_model.model.{step}"): value for key, value in tensors.items()},
        tmp_path / "named" / TENSORS,
    )
    lk.load(fresh[2], tmp_path / "named", name="a")
    with lk.use(fresh[2], "a"):
        assert_same(logits(fresh[2], "llama"), wanted)


def test_embedding_copies_in_the_file(tmp_path: Path) -> None:
    """PEFT writes the whole base weight of adapted embeddings; another base weight is noticed by it."""
    base = MODELS["llama"]()
    saved_by_peft(twin(base), {"target_modules": ["embed_tokens", "q_proj"]}, tmp_path)
    assert any(key.endswith("embed_tokens.base_layer.weight") for key in load_file(tmp_path / TENSORS))
    lk.load(base, tmp_path, name="a")
    lk.detach(base)
    with torch.no_grad():
        base.get_input_embeddings().weight.add_(1.0)  # type: ignore[operator]
    with pytest.raises(LorakitError, match=r"its own copy of model\.embed_tokens\.weight, which is not the weight"):
        lk.load(base, tmp_path, name="a")
    assert not lk.adapters(base)


def logits_of(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


def test_convolutions_that_peft_gets_wrong(tmp_path: Path) -> None:
    """PEFT's convolutions ignore dilation and padding mode in A (peft.md §7.8): it crashes, or merged differs from
    unmerged. Here the adapter equals the layer with W + ΔW, and PEFT's merged model equals it too: the file is right."""
    torch.manual_seed(0)
    x = torch.randn(3, 3, 24, dtype=torch.float64)
    for options in ({"padding_mode": "circular"}, {"padding_mode": "reflect"}):
        base = plain(lambda options=options: nn.Sequential(nn.Conv1d(3, 8, 5, padding=2, **options)))
        fresh = twin(base)
        adapter = lk.attach(base, lk.LoRA(rank=2), target_modules=["0"])
        scramble(adapter.named_parameters())
        base.eval()
        wanted = logits_of(base, x)
        adapter.save(tmp_path)
        wrapped = read_by_peft(fresh, tmp_path)
        assert (logits_of(wrapped, x) - wanted).abs().max() > 0.01, "PEFT is right now: drop this exception"
        assert_same(logits_of(wrapped.merge_and_unload(), x), wanted)
        lk.merge(base, "default")
        assert_same(logits_of(base, x), wanted)
    base = plain(lambda: nn.Sequential(nn.Conv1d(3, 8, 3, dilation=2)))
    fresh = twin(base)
    adapter = lk.attach(base, lk.LoRA(rank=2), target_modules=["0"])
    scramble(adapter.named_parameters())
    wanted = logits_of(base.eval(), x)
    adapter.save(tmp_path)
    wrapped = read_by_peft(fresh, tmp_path)
    with pytest.raises(RuntimeError):
        logits_of(wrapped, x)
    assert_same(logits_of(wrapped.merge_and_unload(), x), wanted)
