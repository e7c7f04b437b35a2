"""What PEFT 0.21.2 does silently wrong, and that lorakit is right there or raises. Numbers are those of the list of
nineteen in the project's notes on PEFT; those that concern methods or tools that lorakit does not have yet are left out.

Each test shows PEFT's behaviour too, where that is quick: when PEFT is mended, the test says so.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call

import lorakit as lk
from lorakit.errors import LorakitError
from lorakit.files.store import TENSORS
from reference.models import MODELS, assert_same, inputs, logits, plain, quiet, scramble, twin


def attached(name: str, *args: Any, seed: int = 3, **options: Any) -> tuple[nn.Module, lk.Adapter]:
    model = MODELS[name]()
    adapter = lk.attach(model, lk.LoRA(rank=2, alpha=4), *args, **options)
    scramble(adapter.named_parameters(), seed=seed)
    return model.eval(), adapter


def by_peft(model: nn.Module, **options: Any) -> Any:
    with quiet():
        return peft.get_peft_model(model, peft.LoraConfig(**{"r": 2, "lora_alpha": 4, **options})).eval()


def trained(wrapped: Any, seed: int = 3) -> Any:
    scramble(iter([(key, one) for key, one in wrapped.named_parameters() if one.requires_grad]), seed=seed)
    return wrapped


def test_1_attention_output_projection_acts_once(tmp_path: Path) -> None:
    """PEFT adds the change of nn.MultiheadAttention's out_proj twice, in forward and in merge. Here the layer equals the
    one with W + ΔW in place of W, and the base's bits stay what they were."""
    model, adapter = attached("attention", target_modules=["first"])
    bits = {key: one.clone() for key, one in MODELS["attention"]().state_dict().items()}
    changes = {}
    for path, site, delta in adapter.deltas():
        weight = bits[f"{path}.{site.weight}"]
        changes[f"{path}.{site.weight}"] = weight + delta.dense(weight).detach()
    bare = MODELS["attention"]()
    with torch.no_grad():
        right = functional_call(bare, changes, (inputs("attention")["x"],))
    assert_same(logits(model, "attention"), right)
    adapter.save(tmp_path)
    with quiet():
        theirs = peft.PeftModel.from_pretrained(MODELS["attention"](), str(tmp_path)).eval()
    twice = dict(changes)
    twice["first.out_proj.weight"] = 2 * changes["first.out_proj.weight"] - bits["first.out_proj.weight"]
    with torch.no_grad():
        assert_same(logits(theirs, "attention"), functional_call(bare, twice, (inputs("attention")["x"],)))
    assert (logits(theirs, "attention") - right).abs().max() > 1e-3
    for key, one in lk.detach(model).state_dict().items():
        assert torch.equal(one, bits[key]), key


def test_2_a_misspelt_target_among_right_ones_raises() -> None:
    """PEFT adapts those that match and says nothing of the rest."""
    by_peft(MODELS["llama"](), target_modules=["q_proj", "typo"])
    model = MODELS["llama"]()
    with pytest.raises(LorakitError, match=r'attach: no layer matches "typo"\. Layers here end in: q_proj ×3'):
        lk.attach(model, target_modules=["q_proj", "typo"])
    with pytest.raises(
        LorakitError, match=r'modules_to_save names "clasifier", but no module of that name has parameters'
    ):
        lk.attach(model, target_modules=["q_proj"], modules_to_save=["clasifier"])
    assert not lk.adapters(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_2_modules_to_save_ends_at_a_dot() -> None:
    """PEFT's modules_to_save=["ad"] wraps "head"."""
    wrapped = by_peft(MODELS["words"](), target_modules=["words"], modules_to_save=["ad"])
    assert "modules_to_save" in str(wrapped.base_model.model.head)
    with pytest.raises(LorakitError, match=r'modules_to_save names "ad"'):
        lk.attach(MODELS["words"](), target_modules=["words"], modules_to_save=["ad"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda key: "other." + key, r"holds 'other\..*', and this model has no layer of that name"),
        (lambda key: key.replace("layers.2", "layers.7"), r"holds '.*layers\.7.*', and this model has no layer"),
        (lambda key: key.replace("lora_A", "lora_C"), r"lacks '.*lora_A\.weight', which this adapter needs"),
    ],
)
def test_3_wrong_keys_raise(change: Any, message: str, tmp_path: Path) -> None:
    """PEFT's load_adapter says nothing when no key fits: the adapter then does nothing."""
    base = MODELS["llama"]()
    wrapped = trained(by_peft(twin(base), target_modules=["q_proj"]))
    with quiet():
        wrapped.save_pretrained(str(tmp_path))
    tensors = load_file(tmp_path / TENSORS)
    prefix = "base_model.model."
    wrong = {prefix + change(key.removeprefix(prefix)): value for key, value in tensors.items()}
    save_file(wrong, tmp_path / TENSORS)
    state = {key: one.clone() for key, one in base.state_dict().items()}
    flags = {key: one.requires_grad for key, one in base.named_parameters()}
    with pytest.raises(LorakitError, match=message):
        lk.load(base, tmp_path, name="a")
    assert not lk.adapters(base)
    assert all(torch.equal(one, state[key]) for key, one in base.state_dict().items())
    assert {key: one.requires_grad for key, one in base.named_parameters()} == flags
    assert not any("dapted" in type(module).__name__ for module in base.modules())


def test_3_unexpected_keys_raise(tmp_path: Path) -> None:
    """PEFT reports unexpected keys nowhere."""
    base = MODELS["llama"]()
    wrapped = by_peft(twin(base), target_modules=["q_proj"])
    with quiet():
        wrapped.save_pretrained(str(tmp_path))
    tensors = load_file(tmp_path / TENSORS)
    save_file({**tensors, "base_model.model.model.norm.extra": torch.ones(3)}, tmp_path / TENSORS)
    with pytest.raises(LorakitError, match=r"holds 'model\.norm\.extra' and 0 more tensors that nothing in this model"):
        lk.load(base, tmp_path, name="a")
    lk.load(base, tmp_path, name="a", strict=False)


def test_3_a_missing_saved_module_is_named(tmp_path: Path) -> None:
    """PEFT: a bare KeyError."""
    base = MODELS["bert"]()
    wrapped = by_peft(twin(base), target_modules=["query"], modules_to_save=["classifier"])
    with quiet():
        wrapped.save_pretrained(str(tmp_path))
    tensors = load_file(tmp_path / TENSORS)
    save_file(
        {key: one for key, one in tensors.items() if key != "base_model.model.classifier.bias"}, tmp_path / TENSORS
    )
    with pytest.raises(LorakitError, match=r"lacks 'classifier\.bias', which this adapter needs"):
        lk.load(base, tmp_path, name="a")


def test_3_another_base_model_raises(tmp_path: Path) -> None:
    """PEFT never looks at the base's identity."""
    _, adapter = attached("llama", target_modules=["q_proj"])
    adapter.save(tmp_path)
    other = MODELS["llama"]()
    scramble(other.named_parameters(), seed=9)
    with quiet():
        peft.PeftModel.from_pretrained(twin(other), str(tmp_path))
    with pytest.raises(LorakitError, match=r"made for another base model: \d+% of 5\d\d sampled weights differ"):
        lk.load(other, tmp_path, name="a")
    assert not lk.adapters(other)


def tied() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=43, hidden_size=24, intermediate_size=40, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=32, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).double().eval()


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_4_merging_one_of_two_tied_layers(target: str) -> None:
    """PEFT merges into the shared weight, which changes the other layer as well, with a warning only. Here the merge is
    refused, or unties the two; and what comes out equals the unmerged model."""
    wrapped = trained(by_peft(tied(), target_modules=[target]))
    before = logits(wrapped, "llama")
    with quiet():
        assert (logits(wrapped.merge_and_unload(), "llama") - before).abs().max() > 1e-3
    model = tied()
    adapter = lk.attach(model, lk.LoRA(rank=2), target_modules=[target])
    scramble(adapter.named_parameters())
    model.eval()
    wanted = logits(model, "llama")
    with pytest.raises(LorakitError, match=r"shares its weight with .*untie=True"):
        lk.merge(model, "default")
    assert_same(logits(model, "llama"), wanted)
    with lk.merged(model, "default"):
        assert_same(logits(model, "llama"), wanted)
    lk.merge(model, "default", untie=True)
    assert_same(logits(model, "llama"), wanted)


def test_4_tied_layers_count_once() -> None:
    """PEFT's ensure_weight_tying makes two parameters of one storage; an adapter here never shares a tensor."""
    model = tied()
    adapter = lk.attach(model, lk.LoRA(rank=2), target_modules=["embed_tokens", "lm_head"])
    parameters = list(adapter.parameters())
    assert len({one.data_ptr() for one in parameters}) == len(parameters) == 4


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (lambda: nn.Conv1d(4, 6, 3, dilation=2), (3, 4, 12)),
        (lambda: nn.Conv1d(4, 6, 3, padding=1, padding_mode="circular"), (3, 4, 12)),
        (lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(2, 1), padding_mode="replicate"), (3, 4, 8, 7)),
        (lambda: nn.Conv2d(4, 6, 3, dilation=(2, 1), padding="same"), (3, 4, 8, 7)),
        (lambda: nn.Conv3d(4, 6, (1, 2, 3), dilation=(1, 2, 1), padding=(0, 1, 1)), (2, 4, 3, 6, 5)),
    ],
)
def test_8_convolutions_with_dilation_and_padding_modes(layer: Any, shape: tuple[int, ...]) -> None:
    """PEFT crashes on dilation and pads A's input with zeros whatever the mode: merged differs from unmerged."""
    model = plain(lambda: nn.Sequential(layer()))
    adapter = lk.attach(model, lk.LoRA(rank=2), target_modules=["0"])
    scramble(adapter.named_parameters())
    x = torch.randn(shape, dtype=torch.float64)
    with torch.no_grad():
        apart = model(x)
        with lk.merged(model, "default"):
            assert_same(model(x), apart)
        lk.merge(model, "default")
        assert_same(model(x), apart)


def test_8_grouped_convolutions(tmp_path: Path) -> None:
    """PEFT lets every group see all channels, which is no change of the weight, and so cannot merge it. Here A is of the
    weight's own shape and merges; PEFT's files for grouped layers are refused by name."""
    model = plain(lambda: nn.Sequential(nn.Conv2d(6, 8, 3, groups=2)))
    wrapped = trained(by_peft(twin(model), target_modules=["0"]))
    with quiet():
        wrapped.save_pretrained(str(tmp_path))
    with pytest.raises(
        LorakitError, match=r"A has shape \(2, 6, 3, 3\); this layer needs \(rank, 3, 3, 3\)\. PEFT lets"
    ):
        lk.load(model, tmp_path, name="a")
    adapter = lk.attach(model, lk.LoRA(rank=2), target_modules=["0"])
    scramble(adapter.named_parameters())
    x = torch.randn(3, 6, 8, 7, dtype=torch.float64)
    with torch.no_grad():
        apart = model(x)
        lk.merge(model, "default")
        assert_same(model(x), apart)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "words", "convolutions", "attention"])
def test_11_every_row_its_own_adapter_on_every_layer_kind(name: str) -> None:
    """PEFT ignores adapter_names for most methods, for nn.MultiheadAttention and with DoRA; wrong rows, no error."""
    targets = {
        "llama": "all-linear",
        "gpt2": ["c_attn", "wte"],
        "bert": ["query"],
        "words": ["words", "body"],
        "convolutions": ["one", "two", "three", "point"],
        "attention": ["first", "middle", "second"],
    }[name]
    model = MODELS[name]()
    for index, adapter in enumerate(("a", "b")):
        method: Any = lk.LoRA(rank=2) if index == 0 else lk.DoRA(inner=lk.LoRA(rank=2))
        own = lk.attach(model, method, name=adapter, target_modules=targets)
        scramble(((key, one) for key, one in own.named_parameters() if not key.endswith(".m")), seed=index)
    model.eval()
    alone = []
    for row, route in enumerate(("b", None, "a")):
        with lk.use(model, route):
            alone.append(logits(model, name)[row])
    with lk.use(model, ["b", None, "a"]):
        assert_same(logits(model, name), torch.stack(alone))


def test_13_an_exception_in_a_forward_leaves_nothing_behind() -> None:
    """PEFT leaks the hooks of a mixed batch when the forward raises: the next plain forward uses stale adapter names."""
    model, _ = attached("llama", target_modules=["q_proj"])
    other = lk.attach(model, lk.LoRA(rank=2), name="other", target_modules=["q_proj"])
    scramble(other.named_parameters(), seed=5)
    lk.activate(model, "default")
    model.eval()
    wanted = logits(model, "llama")

    def fail(*args: Any) -> None:
        raise RuntimeError("in the middle")

    last = model.model.layers[2]  # type: ignore[union-attr, index]
    hook = last.register_forward_pre_hook(fail)  # type: ignore[union-attr, operator]
    with pytest.raises(RuntimeError, match="in the middle"), lk.use(model, ["other", None, "default"]):
        logits(model, "llama")
    hook.remove()
    assert torch.equal(logits(model, "llama"), wanted)


def test_14_switching_changes_no_requires_grad(tmp_path: Path) -> None:
    """PEFT's disable_adapter() leaves an adapter trainable that was loaded for inference."""
    model, adapter = attached("llama", target_modules=["q_proj"])
    adapter.save(tmp_path)
    lk.detach(model)
    lk.load(model, tmp_path, name="a")
    lk.load(model, tmp_path, name="b", trainable=True)
    flags = {key: one.requires_grad for key, one in model.named_parameters()}
    assert any(flags.values())
    for route in ("a", None, {"a": 0.5, "b": 0.5}, ["a", None, "b"]):
        with lk.use(model, route):
            assert {key: one.requires_grad for key, one in model.named_parameters()} == flags
        lk.activate(model, route)
    with lk.merged(model, "a"):
        pass
    assert {key: one.requires_grad for key, one in model.named_parameters()} == flags


def test_15_an_adapter_named_like_a_module(tmp_path: Path) -> None:
    """PEFT drops tensors of "default" when another adapter is called "mlp", as a module is."""
    base = MODELS["llama"]()
    wrapped = by_peft(twin(base), target_modules=["up_proj", "q_proj"])
    with quiet():
        wrapped.add_adapter("mlp", peft.LoraConfig(target_modules=["up_proj", "q_proj"]))
        wrapped.save_pretrained(str(tmp_path / "theirs"))
    assert not any(".mlp." in key for key in load_file(tmp_path / "theirs" / TENSORS))
    model, adapter = attached("llama", target_modules=["up_proj", "q_proj"])
    for name in ("mlp", "model", "lora_A", "base", "weight", "base_layer"):
        lk.attach(model, lk.LoRA(rank=2), name=name, target_modules=["up_proj", "q_proj"])
    adapter.save(tmp_path / "ours")
    assert len(load_file(tmp_path / "ours" / TENSORS)) == 12
    lk.activate(model, "default")
    wanted = logits(model.eval(), "llama")
    lk.load(base, tmp_path / "ours", name="mlp")
    with lk.use(base, "mlp"):
        assert_same(logits(base, "llama"), wanted)


def test_an_x_lora_keeps_what_it_has_learned(tmp_path: Path) -> None:
    """PEFT's saved X-LoRA comes back with another classifier: the root's file is empty, and the folder of expert "0" holds
    the base's weights and a part of the classifier under a broken name. A folder saved here is read by both to the same
    logits."""

    def base() -> Any:
        model = MODELS["llama"]().eval()
        model.config.use_cache = False
        return model

    made = base()
    for index, rank in enumerate((2, 3)):
        scramble(lk.attach(made, lk.LoRA(rank=rank), name="ab"[index]).named_parameters(), seed=index, size=0.4)
    folders = {str(index): str(lk.adapters(made)[name].save(tmp_path / name)) for index, name in enumerate("ab")}
    size = int(made.config.hidden_size)

    def theirs(adapters: dict[str, str]) -> Any:
        with quiet():
            spec = peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=size, layerwise_scalings=True, adapters=adapters)
            return peft.get_peft_model(base(), spec).eval()

    wrapped = theirs(folders)
    scramble(wrapped.base_model.internal_xlora_classifier.named_parameters(), seed=5, size=0.6)
    with quiet():
        wrapped.save_pretrained(str(tmp_path / "theirs"))
    assert load_file(tmp_path / "theirs" / TENSORS) == {}
    with pytest.raises(LorakitError, match=r"PEFT 0.21 leaves the trained classifier out"):
        lk.load(base(), tmp_path / "theirs")

    for place, spec in enumerate(
        (lk.XLoRA(), lk.XLoRA(depth=2, width=6, temperature=0.7, scale=1.5, layerwise=False), lk.XLoRA(top_k=1))
    ):
        adapter = lk.route(made, spec, ["a", "b"], name=f"r{place}")
        with torch.no_grad():
            for parameter in adapter.router.parameters():  # type: ignore[union-attr]
                parameter.add_(0.4 * torch.randn_like(parameter))
        adapter.router.double()  # type: ignore[union-attr]
        folder = adapter.save(tmp_path / f"ours-{place}")
        experts = {str(index): str(folder / "experts" / name) for index, name in enumerate("ab")}
        with quiet():
            config = peft.PeftConfig.from_pretrained(str(folder))
            config.adapters = experts  # PEFT looks for relative paths below the present directory
            again = peft.PeftModel.from_pretrained(base(), str(folder), config=config).eval()
        with lk.use(made, f"r{place}"):
            assert_same(logits(again, "llama"), logits(made, "llama"))
        lk.detach(made, f"r{place}")
    beyond = lk.route(made, lk.XLoRA(top_k=1, temperature=0.5), ["a", "b"]).save(tmp_path / "beyond")
    with (
        quiet(),
        pytest.raises(KeyError, match="XLORA_TOPK_TEMPERATURE"),
    ):  # refused there, and not read as something else
        peft.PeftModel.from_pretrained(base(), str(beyond))


def test_17_one_layer_kind_does_not_flip_an_option_of_all(tmp_path: Path) -> None:
    """PEFT rewrites fan_in_fan_out for the whole adapter after one transposed layer; here each layer knows its own
    layout, whatever the file says."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            from transformers.pytorch_utils import Conv1D

            self.straight, self.turned = nn.Linear(12, 10), Conv1D(6, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.turned(torch.tanh(self.straight(x)))

    base = plain(Both)
    x = torch.randn(3, 12, dtype=torch.float64)
    for flag in (True, False):
        wrapped = trained(by_peft(twin(base), target_modules=["straight", "turned"], fan_in_fan_out=flag))
        with quiet():
            wrapped.save_pretrained(str(tmp_path))
        lk.load(base, tmp_path, name="a")
        with lk.use(base, "a"), torch.no_grad():
            assert_same(base(x), wrapped(x))
        lk.detach(base)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_unmerging_restores_the_very_bits(dtype: torch.dtype) -> None:
    """PEFT subtracts the recomputed change: in bfloat16 139 of 256 weights were other ones after one round trip."""
    model = MODELS["llama"]().to(dtype)
    wrapped = trained(by_peft(twin(model), target_modules=["q_proj", "up_proj"]))
    names = ["q_proj", "up_proj"]
    if dtype == torch.bfloat16:
        bits = wrapped.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight.clone()
        wrapped.merge_adapter()
        wrapped.unmerge_adapter()
        assert not torch.equal(wrapped.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight, bits)
    before = {key: (one, one.clone()) for key, one in model.named_parameters()}
    adapter = lk.attach(model, lk.LoRA(rank=2), target_modules=names)
    scramble(adapter.named_parameters())
    with lk.merged(model, "default"):
        pass
    lk.detach(model)
    for key, one in model.named_parameters():
        same, value = before[key]
        assert one is same
        assert torch.equal(one, value), key


def test_hira_has_the_ranks_of_its_pattern(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """PEFT 0.21 takes HiRA's rank_pattern and builds every layer with `r`, so that it cannot read a file with two ranks."""
    options = {"r": 4, "target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 3}}
    with quiet():
        theirs = peft.get_peft_model(twin(MODELS["llama"]()), peft.HiraConfig(**options))
    assert {one.shape[0] for name, one in theirs.named_parameters() if "hira_A" in name} == {4}
    model = MODELS["llama"]()
    adapter = lk.attach(model, lk.HiRA(rank=4), target_modules=["q_proj", "v_proj"], patterns={"rank": {"q_proj": 3}})
    assert {delta.spec.rank for path, _, delta in adapter.deltas() if path.endswith("q_proj")} == {3}
    adapter.save(tmp_path)
    assert "different ranks" in caplog.text
    again = lk.load(MODELS["llama"](), tmp_path)
    assert {delta.spec.rank for _, _, delta in again.deltas()} == {3, 4}


def test_a_pattern_that_matches_nothing_in_a_file_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """PEFT passes over it in silence."""
    with quiet():
        theirs = peft.get_peft_model(
            twin(MODELS["llama"]()), peft.LoraConfig(r=2, target_modules=["v_proj"], alpha_pattern={"q_proj": 3})
        )
        theirs.save_pretrained(str(tmp_path))
    lk.load(MODELS["llama"](), tmp_path)
    assert "alpha_pattern has the pattern 'q_proj'" in caplog.text
    with pytest.raises(LorakitError, match="matches none of the"):
        lk.attach(MODELS["llama"](), lk.LoRA(rank=2), target_modules=["v_proj"], patterns={"alpha": {"q_proj": 3}})
