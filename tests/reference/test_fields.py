"""Fields of PEFT's configurations, both ways beside PEFT: the same logits whoever wrote the file and whoever reads it."""

from __future__ import annotations

import copy
import dataclasses
import functools
import random
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import lorakit as lk
import lorakit.peft as ours
from lorakit.adapter import construction
from lorakit.core.options import options_of
from lorakit.errors import LorakitError
from lorakit.files.bundle import read_tensors
from lorakit.files.formats import FORMATS, format_of, known_entries, spec_from_peft
from lorakit.files.interchange import COMMON
from lorakit.files.table import TABLE
from lorakit.methods.lora import BiasedDelta
from lorakit.methods.options import tucker
from reference.models import MODELS, assert_same, inputs, logits, quiet, scramble


def _small(tied: bool) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    from reference.models import _made

    config = LlamaConfig(
        vocab_size=43, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=tied,
    )  # fmt: skip
    return _made(LlamaForCausalLM, config)


_first = functools.cache(_small)


def base(tied: bool = False) -> nn.Module:
    """A new copy of a model with its own head, or a tied one."""
    return copy.deepcopy(_first(tied))


def peft_model(model: nn.Module, config: Any, seed: int = 3) -> Any:
    """PEFT's adapter on a model, with values as after training."""
    with quiet():
        wrapped: Any = peft.get_peft_model(model, config)
    scramble(((key, one) for key, one in wrapped.named_parameters() if one.requires_grad), seed)
    return wrapped.eval()


def both_ways(
    config: Any, folder: Path, make: Any, name: str = "llama", merges: bool = True, bound: float = 0.0
) -> lk.Adapter:
    """PEFT's file read here, written here, read by PEFT: the same logits each time, and merged; `bound`: by how much they may
    differ where PEFT computes in single precision."""
    assert_same = functools.partial(_assert_same, bound=bound)
    theirs = peft_model(make(), config)
    expected = logits(theirs, name)
    with quiet():
        theirs.save_pretrained(folder / "theirs")
    model = make()
    before = logits(model, name)
    adapter = lk.load(model, folder / "theirs", trainable=True)
    assert_same(logits(model, name), expected)
    assert (expected - before).abs().max() > 1e-6
    adapter.save(folder / "ours")
    with quiet():
        again = peft.PeftModel.from_pretrained(make(), str(folder / "ours")).eval()
    assert_same(logits(again, name), expected)
    second = make()
    lk.load(second, folder / "ours")
    assert_same(logits(second, name), expected)
    if merges:
        lk.merge(second, "ours")
        assert_same(logits(second, name), expected)
    return adapter


def _assert_same(a: Tensor, b: Tensor, bound: float) -> None:
    if bound:
        assert (a - b).abs().max().item() <= bound
    else:
        assert_same(a, b)


# -- rows of a table that train alone --------------------------------------------------------------------------------------

TOKENS: dict[str, tuple[bool, Any]] = {
    "alone": (False, lambda: peft.TrainableTokensConfig(token_indices=[3, 7, 42])),
    "alone, tied": (True, lambda: peft.TrainableTokensConfig(token_indices=[12, 5])),
    "alone, a head": (False, lambda: peft.TrainableTokensConfig(token_indices=[1, 2], target_modules=["lm_head"])),
    "lora": (False, lambda: peft.LoraConfig(r=3, target_modules=["q_proj"], trainable_token_indices=[40, 2])),
    "lora, tied": (True, lambda: peft.LoraConfig(r=3, target_modules=["q_proj"], trainable_token_indices=[40, 2])),
    "lora, two tables": (
        False,
        lambda: peft.LoraConfig(
            r=3, target_modules="all-linear", trainable_token_indices={"embed_tokens": [4, 9], "lm_head": [1, 2, 3]}
        ),
    ),
    "lora, tied, other tokens": (
        True,
        lambda: peft.LoraConfig(
            r=3, target_modules=["v_proj"], trainable_token_indices={"embed_tokens": [4, 9], "lm_head": [1, 2, 3]}
        ),
    ),
    "dora": (
        True,
        lambda: peft.LoraConfig(r=3, target_modules=["v_proj"], use_dora=True, trainable_token_indices=[4, 9]),
    ),
    "saved": (
        False,
        lambda: peft.LoraConfig(
            r=3, target_modules=["v_proj"], modules_to_save=["lm_head"], trainable_token_indices=[4, 9]
        ),
    ),
}


@pytest.mark.parametrize("case", TOKENS)
def test_tokens_both_ways(case: str, tmp_path: Path) -> None:
    tied, config = TOKENS[case]
    both_ways(config(), tmp_path, lambda: base(tied), merges="other tokens" not in case)


def test_tokens_of_random_draws(tmp_path: Path) -> None:
    """Which tokens, of which layers, beside what: whatever PEFT is told."""
    for seed in range(6):
        draw = random.Random(seed)
        tokens = draw.sample(range(43), draw.randint(1, 40))
        tied = draw.random() < 0.5
        given: Any = tokens if draw.random() < 0.5 else {"embed_tokens": tokens}
        config = peft.LoraConfig(
            r=draw.randint(1, 4),
            use_rslora=draw.random() < 0.5,
            target_modules=draw.sample(["q_proj", "k_proj", "o_proj", "down_proj"], 2),
            trainable_token_indices=given,
            ensure_weight_tying=tied and draw.random() < 0.5,
        )
        both_ways(config, tmp_path / str(seed), functools.partial(base, tied))


def test_tokens_train_as_pefts_do() -> None:
    """The same gradients, and with a tied head one tensor that gets both."""
    theirs = peft_model(base(True), peft.LoraConfig(r=3, target_modules=["q_proj"], trainable_token_indices=[40, 2]))
    model = base(True)
    adapter = lk.attach(model, lk.LoRA(rank=3, alpha=8), target_modules=["q_proj"], trainable_tokens=[40, 2])
    own = dict(adapter.named_parameters())
    rows = own["model.embed_tokens.R"]
    assert [name for name in own if name.endswith(".R")] == ["model.embed_tokens.R"]
    twins = {key: one for key, one in theirs.named_parameters() if one.requires_grad}
    with torch.no_grad():
        rows.copy_(next(one for key, one in twins.items() if "trainable_tokens" in key))
        for key, one in twins.items():
            if "lora_" in key:
                name = key.removeprefix("base_model.model.").replace(".lora_", ".").removesuffix(".default.weight")
                own[name].copy_(one)
    batch = {**inputs("llama"), "labels": inputs("llama")["input_ids"]}
    batch["input_ids"][:, 2] = 40
    for one in (model, theirs):
        one(**batch).loss.backward()
    expected = next(one.grad for key, one in twins.items() if "trainable_tokens" in key)
    torch.testing.assert_close(rows.grad, expected, rtol=1e-9, atol=1e-12)


def test_tokens_of_each_row_of_a_batch() -> None:
    """Two adapters with rows of their own for the same token, and a blend, in one batch."""
    model = base(True)
    for seed, name in enumerate(("one", "two")):
        adapter = lk.attach(model, lk.TrainableTokens(tokens=[5, 7 + seed]), name=name)
        scramble(adapter.named_parameters(), seed)
    batch = inputs("llama")["input_ids"]
    batch[:, :3] = torch.tensor([5, 7, 8])
    routes: list[Any] = ["one", None, {"one": 0.5, "two": 2.0}]
    with torch.no_grad():
        with lk.use(model, routes):
            together = model(batch).logits
        for row, route in enumerate(routes):
            with lk.use(model, route):
                assert_same(together[row], model(batch[row : row + 1]).logits[0])


def test_tokens_are_refused_by_name() -> None:
    model = base()
    for asked, message in (
        ({"trainable_tokens": [43]}, "43 rows, and none for token 43"),
        ({"trainable_tokens": [3, 3]}, "token 3 is named twice"),
        ({"trainable_tokens": {"nothing": [3]}}, 'names "nothing"'),
        ({"trainable_tokens": [3], "target_modules": ["embed_tokens"]}, "a table has one or the other"),
        ({"trainable_tokens": [3], "modules_to_save": ["embed_tokens"]}, "a table has one or the other"),
    ):
        with pytest.raises(LorakitError, match=message):
            lk.attach(model, lk.LoRA(rank=2), **asked)
        assert not lk.adapters(model)


def test_a_head_that_does_not_follow_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison with PEFT fails where a tied head does not follow."""
    monkeypatch.setattr(construction, "ties", lambda modules: {})
    with pytest.raises(AssertionError, match="rounding allows"):
        both_ways(TOKENS["lora, tied"][1](), tmp_path, lambda: base(True))


# -- a bias beside B -------------------------------------------------------------------------------------------------------

BIASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "use_rslora": True}),
    "bert": ("bert", {"target_modules": ["query", "dense"], "bias": "lora_only", "alpha_pattern": {"query": 5}}),
    "convolutions": ("convolutions", {"target_modules": ["one", "three", "head"]}),
    "llama": ("llama", {"target_modules": ["q_proj"]}),
}


@pytest.mark.parametrize("case", BIASES)
def test_lora_bias_both_ways(case: str, tmp_path: Path) -> None:
    name, options = BIASES[case]
    config = peft.LoraConfig(r=2, lora_alpha=7, lora_bias=True, **options)
    both_ways(config, tmp_path, MODELS[name], name, merges=name != "llama")  # whose layers have no bias to merge into


def test_lora_bias_that_is_forgotten_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BiasedDelta, "shift", lambda self, b, W: self.b)
    with pytest.raises(AssertionError, match="rounding allows"):
        both_ways(
            peft.LoraConfig(r=2, lora_alpha=7, lora_bias=True, target_modules=["query"]),
            tmp_path,
            MODELS["bert"],
            "bert",
        )


# -- weights that are tied -------------------------------------------------------------------------------------------------

TIES: dict[str, dict[str, Any]] = {
    "both targets": {"target_modules": ["embed_tokens", "lm_head", "q_proj"], "ensure_weight_tying": True},
    "the head": {"target_modules": ["lm_head", "v_proj"], "ensure_weight_tying": True, "use_rslora": True},
    "the embedding": {"target_modules": ["embed_tokens"], "ensure_weight_tying": True, "lora_dropout": 0.1},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "the head saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "ensure_weight_tying": True},
    "both saved": {
        "target_modules": ["q_proj"],
        "modules_to_save": ["lm_head", "embed_tokens"],
        "ensure_weight_tying": True,
    },
    "nothing tied is meant": {"target_modules": ["q_proj"], "ensure_weight_tying": True},
    "saved, untied": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "the head saved, untied": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "target, untied": {"target_modules": ["lm_head"]},
}


@pytest.mark.parametrize("case", TIES)
def test_tied_weights_both_ways(case: str, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=3, lora_alpha=5, **TIES[case])
    adapter = both_ways(config, tmp_path, lambda: base(True), merges="untied" not in case)
    model = lk.attach(base(True), lk.LoRA(rank=3), name="fresh", **_here(TIES[case]))
    assert model.num_parameters() == adapter.num_parameters()


def _here(options: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key not in ("use_rslora", "lora_dropout")}


def test_a_tied_pair_trains_as_one() -> None:
    """The gradients of an embedding's factors are the sum of both layers', as a dense change of the shared weight has them."""
    model = base(True)
    adapter = lk.attach(model, lk.LoRA(rank=3), target_modules=["lm_head"], ensure_weight_tying=True)
    scramble(adapter.named_parameters())
    own = dict(adapter.named_parameters())
    assert sorted(own) == ["model.embed_tokens.A", "model.embed_tokens.B"]
    batch = {**inputs("llama"), "labels": inputs("llama")["input_ids"]}
    model(**batch).loss.backward()
    plain = base(True)
    W, A, B = plain.model.embed_tokens.weight, *(own[f"model.embed_tokens.{letter}"] for letter in "AB")
    scale = 16 / 3
    with torch.no_grad():
        W += scale * (B @ A).T
    plain(**batch).loss.backward()
    torch.testing.assert_close(B.grad, scale * W.grad.T @ A.T, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(A.grad, scale * B.T @ W.grad.T, rtol=1e-8, atol=1e-12)


def test_the_same_configurations_under_pefts_names() -> None:
    """`lorakit.peft` makes the adapter that PEFT makes: as many numbers, in tensors of the same names and shapes."""
    options: list[tuple[str, dict[str, Any]]] = [("TrainableTokensConfig", {"token_indices": [3, 4]})]
    options += [("LoraConfig", {"r": 3, **own}) for own in TIES.values()]
    options += [("LoraConfig", {"r": 3, "target_modules": ["q_proj"], "trainable_token_indices": [3, 4]})]
    options += [("LoraConfig", {"r": 3, "target_modules": ["q_proj"], "lora_bias": True})]
    blocks = {"target_modules_bd_a": ["q_proj"], "nblocks": 2}
    options += [("LoraConfig", {"r": 4, "target_modules": ["q_proj"], "use_bdlora": blocks})]
    for kind, own in options:
        with quiet():
            theirs: Any = peft.get_peft_model(base(True), getattr(peft, kind)(**copy.deepcopy(own)))
            expected = peft.get_peft_model_state_dict(theirs, save_embedding_layers=False)
        found = ours.get_peft_model_state_dict(ours.get_peft_model(base(True), getattr(ours, kind)(**own)))
        assert {key: one.shape for key, one in found.items()} == {key: one.shape for key, one in expected.items()}, own


# -- convolutions whose kernel is factored too -------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_tucker_both_ways(seed: int, tmp_path: Path) -> None:
    """LoHa and LoKr with use_effective_conv2d on Conv1d, Conv2d and a linear layer."""
    draw = random.Random(seed)
    kind = peft.LoHaConfig if seed % 2 else peft.LoKrConfig
    # PEFT keeps alpha / r of LoHa in single precision
    options: dict[str, Any] = {"r": draw.choice([1, 2, 4]), "alpha": draw.randint(1, 9), "use_effective_conv2d": True}
    if kind is peft.LoKrConfig:
        options |= {"decompose_both": draw.random() < 0.5, "decompose_factor": draw.choice([-1, 1, 2]), "r": 1}
    names = draw.sample(["two", "head", "point"], 2) if kind is peft.LoKrConfig else ["one", "two", "head"]
    both_ways(kind(target_modules=names, **options), tmp_path, MODELS["convolutions"], "convolutions")


# -- block-diagonal factors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strict", [True, False])
def test_blocks_both_ways(strict: bool, tmp_path: Path) -> None:
    blocks = peft.tuners.lora.BdLoraConfig(
        target_modules_bd_a=["o_proj", "down"], target_modules_bd_b=["q_proj"], nblocks=2, match_strict=strict
    )
    names = ["q_proj", "o_proj", "down_proj"] + ["v_proj"] * (not strict)
    config = peft.LoraConfig(r=4, lora_alpha=7, target_modules=names, use_bdlora=blocks, rank_pattern={"q_proj": 2})
    adapter = both_ways(config, tmp_path, base)
    assert adapter.num_parameters() == sum(one.numel() for one in read_tensors(tmp_path / "theirs").values())


def test_a_core_read_the_wrong_way_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorakit.methods.loha.tucker", lambda core, U, V: tucker(core.transpose(0, 1), U, V))
    with pytest.raises(AssertionError, match="rounding allows"):
        both_ways(
            peft.LoHaConfig(r=2, use_effective_conv2d=True, target_modules=["two"]),
            tmp_path,
            MODELS["convolutions"],
            "convolutions",
        )


# -- an adapter that acts from certain tokens on -----------------------------------------------------------------------------


def alora(**options: Any) -> Any:
    return peft.LoraConfig(
        r=3,
        lora_alpha=7,
        task_type="CAUSAL_LM",
        alora_invocation_tokens=[5, 6],
        **{"target_modules": ["q_proj", "v_proj"], **options},
    )


def texts() -> Tensor:
    """Rows with the invocation at the start, twice, at the very end, in part, and nowhere."""
    ids = torch.randint(7, 43, (5, 9), generator=torch.Generator().manual_seed(2))
    for row, places in enumerate(([0], [2, 6], [7], [], [])):
        for place in places:
            ids[row, place : place + 2] = torch.tensor([5, 6])
    ids[3, -1] = 5
    return ids


def test_alora_both_ways(tmp_path: Path) -> None:
    """Logits, greedy text with a cache and without, and files: as PEFT's."""
    config, ids = alora(use_rslora=True), texts()
    theirs = peft_model(base(), config)
    with quiet(), torch.no_grad():
        theirs.save_pretrained(tmp_path / "theirs")
        expected = theirs(input_ids=ids).logits
        mask = torch.ones_like(ids)
        written = theirs.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
    model: Any = base()
    lk.load(model, tmp_path / "theirs").save(tmp_path / "ours")
    with quiet():
        again: Any = peft.PeftModel.from_pretrained(base(), str(tmp_path / "ours")).eval()
    with torch.no_grad():
        assert_same(model(input_ids=ids).logits, expected)
        assert_same(again(input_ids=ids).logits, expected)
        options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(model.generate(input_ids=ids, **options), written)
        with lk.use(model, None):
            plain = model(input_ids=ids).logits
        assert torch.equal(plain[4], model(input_ids=ids).logits[4]), "a row without the invocation is the base's"
    with pytest.raises(LorakitError, match="no one change to write into the weights; use it unmerged"):
        lk.merge(model, "theirs")


def test_alora_uses_the_cache_of_the_base() -> None:
    """A text run by the base, then the invocation on its cache: what the whole text gives; and so on with every token."""
    model: Any = base()
    adapter = lk.attach(model, lk.ALoRA(rank=3, invocation=(5, 6)), target_modules=["q_proj", "k_proj", "v_proj"])
    scramble(adapter.named_parameters())
    model.eval()
    ids = torch.randint(7, 43, (2, 10))
    ids[:, 6:8] = torch.tensor([5, 6])
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        with lk.use(model, None):
            cache = model(input_ids=ids[:, :6], use_cache=True).past_key_values
        pieces = [model(input_ids=ids[:, 6:8], past_key_values=cache, use_cache=True)]
        pieces += [model(input_ids=ids[:, i : i + 1], past_key_values=cache, use_cache=True) for i in (8, 9)]
        assert_same(torch.cat([piece.logits for piece in pieces], 1), whole[:, 6:])


def test_alora_trains_as_pefts_does() -> None:
    theirs, ids = peft_model(base(), alora()), texts()
    model = base()
    adapter = lk.attach(model, lk.ALoRA(rank=3, alpha=7, invocation=(5, 6)), target_modules=["q_proj", "v_proj"])
    own = dict(adapter.named_parameters())
    twins = {
        key.removeprefix("base_model.model.").replace(".lora_", ".").removesuffix(".default.weight"): one
        for key, one in theirs.named_parameters()
        if one.requires_grad
    }
    with torch.no_grad():
        for name, one in twins.items():
            own[name].copy_(one)
    for one in (model, theirs):
        one(input_ids=ids, labels=ids).loss.backward()
    for name, one in twins.items():
        torch.testing.assert_close(own[name].grad, one.grad, rtol=1e-9, atol=1e-13)


def test_alora_that_acts_on_all_tokens_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorakit.experts.alora.starts", lambda ids, tokens: ids.new_zeros(len(ids)))
    with pytest.raises(AssertionError):
        test_alora_both_ways(tmp_path)


# -- A that reads means of groups --------------------------------------------------------------------------------------------


def test_qalora_is_read_as_the_lora_that_it_is(tmp_path: Path) -> None:
    """PEFT has it for bases of GPTQ alone; here its own code for these runs on float layers."""
    from peft.tuners.lora.variants import QALoraLinearVariant

    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"], use_qalora=True, qalora_group_size=4
    )
    with quiet():
        theirs: Any = peft.get_peft_model(base(), config)
        for module in theirs.modules():
            if isinstance(module, peft.tuners.lora.Linear):
                QALoraLinearVariant.init(module, "default", config)
                module.lora_variant["default"] = QALoraLinearVariant()
    scramble((key, one) for key, one in theirs.named_parameters() if one.requires_grad)
    expected = logits(theirs.eval(), "llama")
    with quiet():
        theirs.save_pretrained(tmp_path / "theirs")
    model = base()
    lk.load(model, tmp_path / "theirs").save(tmp_path / "ours")
    assert_same(logits(model, "llama"), expected)
    with quiet():
        assert_same(logits(peft.PeftModel.from_pretrained(base(), str(tmp_path / "ours")), "llama"), expected)


# -- which layers, and what each of them gets --------------------------------------------------------------------------------


def _drawn_targets(draw: random.Random) -> dict[str, Any]:
    names = draw.sample(["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"], draw.randint(2, 4))
    first = names[0]
    patterns = [
        first,
        f"self_attn.{first}",
        rf"layers\.1\..*{first}",
        f"^model.layers.0.self_attn.{first}",
        r".*\.0\..*_proj",
        "proj",
    ]
    options: dict[str, Any] = {"target_modules": names, "r": draw.randint(1, 4), "lora_alpha": draw.randint(1, 9)}
    if draw.random() < 0.3:
        options["target_modules"] = rf".*({'|'.join(names)})"
    elif draw.random() < 0.4:
        options |= {
            "layers_to_transform": draw.choice([0, [1], [0, 1]]),
            "layers_pattern": draw.choice([None, "layers", ["layers", "h"]]),
        }
    if draw.random() < 0.4:
        options["exclude_modules"] = draw.choice([["layers.0.self_attn.q_proj"], rf".*layers\.0\..*{first}"])
    for entry in ("rank_pattern", "alpha_pattern"):
        # sorted, as PEFT's file has them, whatever their order was when it made the adapter: the first that matches counts
        options[entry] = {pattern: draw.randint(1, 5) for pattern in sorted(draw.sample(patterns, draw.randint(0, 3)))}
    with quiet():
        layers = peft.get_peft_model(base(), peft.LoraConfig(**options)).base_model.targeted_module_names
    for entry in ("rank_pattern", "alpha_pattern"):  # one that matches nothing is refused here
        options[entry] = {
            key: value
            for key, value in options[entry].items()
            if any(re.match(rf"(.*\.)?({key})$", one) for one in layers)
        }
    return options | {"use_rslora": draw.random() < 0.3, "use_dora": draw.random() < 0.2}


@pytest.mark.parametrize("seed", range(12))
def test_patterns_of_random_draws(seed: int, tmp_path: Path) -> None:
    """target_modules, exclude_modules, layers_to_transform, layers_pattern, rank_pattern and alpha_pattern together."""
    options = _drawn_targets(random.Random(seed))
    both_ways(peft.LoraConfig(**options), tmp_path, base, merges=seed % 3 == 0)


@pytest.mark.parametrize("seed", range(3))
def test_frequencies_by_pattern(seed: int, tmp_path: Path) -> None:
    draw = random.Random(seed)
    patterns = {
        key: draw.randint(5, 60) for key in draw.sample(["q_proj", "down_proj", "layers.1.self_attn.o_proj"], 2)
    }
    config = peft.FourierFTConfig(
        n_frequency=draw.randint(9, 40),
        scaling=float(draw.randint(9, 90)),
        target_modules=["q_proj", "o_proj", "down_proj"],
        n_frequency_pattern=patterns,
    )
    both_ways(config, tmp_path, base, bound=1e-6)


# -- soft prompts of classifiers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PromptEncoderConfig", "PrefixTuningConfig"])
def test_a_prompt_of_a_classifier_is_read(kind: str, tmp_path: Path) -> None:
    """PEFT's file of a prompt with the head that it trains beside it, read here, written again, and read by PEFT."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    sizes = {"vocab_size": 43, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_labels": 3}
    torch.manual_seed(0)
    first = LlamaForSequenceClassification(LlamaConfig(**sizes, num_attention_heads=2, pad_token_id=0)).double().eval()
    ids = torch.arange(2, 9)[None]
    own = {"encoder_hidden_size": 16} if kind == "PromptEncoderConfig" else {}
    theirs = peft_model(copy.deepcopy(first), getattr(peft, kind)(task_type="SEQ_CLS", num_virtual_tokens=3, **own))
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with quiet(), torch.no_grad():
        theirs.save_pretrained(tmp_path / "theirs")
        again: Any = peft.PeftModel.from_pretrained(copy.deepcopy(first), tmp_path / "theirs").eval()
        expected = again(**given).logits
        model: Any = copy.deepcopy(first)
        lk.load(model, tmp_path / "theirs").save(tmp_path / "ours")
        assert_same(model(**given).logits, expected)
        back: Any = peft.PeftModel.from_pretrained(copy.deepcopy(first), tmp_path / "ours").eval()
        assert_same(back(**given).logits, expected)


# -- layers that are repeated --------------------------------------------------------------------------------------------------


def test_replicated_layers_both_ways(tmp_path: Path) -> None:
    """Each repetition has an adapter of its own over the same weights; its own merge takes weights of its own."""
    spans = [(0, 2), (1, 2), (0, 1)]

    def deeper() -> nn.Module:
        return lk.replicate_layers(base(), spans)

    theirs = peft_model(base(), peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], layer_replication=spans))
    expected = logits(theirs, "llama")
    with quiet():
        theirs.save_pretrained(tmp_path / "theirs")
    with pytest.raises(LorakitError, match=r"lk\.replicate_layers\(model"):
        lk.load(base(), tmp_path / "theirs")
    model = deeper()
    adapter = lk.load(model, tmp_path / "theirs")
    assert len(adapter.layers) == 8
    assert_same(logits(model, "llama"), expected)
    adapter.save(tmp_path / "ours")
    with quiet():
        again = peft.PeftModel.from_pretrained(base(), str(tmp_path / "ours")).eval()
    assert_same(logits(again, "llama"), expected)
    with pytest.raises(LorakitError, match="untie=True"):
        lk.merge(model, "theirs")
    lk.merge(model, "theirs", untie=True)
    assert_same(logits(model, "llama"), expected)
    shim = ours.get_peft_model(
        base(), ours.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], layer_replication=spans)
    )
    assert ours.get_peft_model_state_dict(shim).keys() == peft.get_peft_model_state_dict(theirs).keys()
    for wrong, message in (([(0, 3)], "none of 2 blocks"), ([(0, 2), (1, 2)], "already")):
        with pytest.raises(LorakitError, match=message):
            lk.replicate_layers(base() if wrong == [(0, 3)] else deeper(), wrong)


# -- every field of every configuration --------------------------------------------------------------------------------------

IGNORED = {
    "how the tensors started, which says nothing of what they are": (
        "init_weights init_ia3_weights eva_config corda_config lora_ga_config loftq_config tokenizer_kwargs init_scale "
        "target_svd_config proportional_parameters"
    ),
    "what a soft prompt was made of, or its loss in training; the file holds the rows": (
        "num_frozen_tokens cpt_token_ids cpt_mask cpt_tokens_type_mask opt_weighted_loss_type opt_loss_decay_factor "
        "opt_projection_epsilon opt_projection_format_epsilon prompt_tuning_init_task prompt_tuning_init_state_dict_path "
        "num_ranks num_tasks"
    ),
    "found in the model itself": (
        "fan_in_fan_out num_layers num_attention_heads num_transformer_submodules num_virtual_tokens token_dim"
    ),
    "acts in training alone": "rank_dropout module_dropout rank_dropout_scale hira_dropout encoder_dropout generator_seed",
    "says where tensors lie while they load": "runtime_config",
    "belongs to a field that is refused, and does nothing by itself": "megatron_core",
    "how A is stored for bases of GPTQ; it is read as the LoRA that it is": "use_qalora qalora_group_size",
    "PEFT's layers of this type do not read it": "lora_bias use_bdlora",
}
"""Why a field of PEFT's is passed over -> which; each row of the formats says for which methods."""

NOT_READ = {
    *("ADAMSS", "BEFT", "CARTRIDGE", "CPT", "DEFT", "DELORA", "FROD", "GLORA", "GRALORA", "HRA", "LILY", "LN_TUNING"),
    *("MISS", "MULTITASK_PROMPT_TUNING", "OSF", "PEANUT", "POLY", "PSOFT", "PVERA", "ROAD", "SHADOW", "SUPERTUNING"),
    *("TINYLORA", "UNILORA", "WAVEFT"),
}
"""PEFT's types of which some may not be here; a type that stands neither here nor among the formats is new in PEFT."""

NEEDED = {"ADAPTION_PROMPT": {"adapter_len": 3, "adapter_layers": 1}, "ADALORA": {"total_step": 9}, "IA3": {}}
KINDS = [kind for kind in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING if kind.value != "XLORA"]  # no router in its files


@pytest.mark.parametrize("kind", KINDS, ids=[kind.value for kind in KINDS])
def test_every_field_is_accounted_for(kind: Any) -> None:
    """Honoured, passed over for a reason, or refused for a reason: a field that is new in PEFT is none of them."""
    known = {kind for row in FORMATS.values() for kind in (row.peft, *row.also)}
    if kind.value not in known:
        assert kind.value in NOT_READ, f"{kind.value} is new in PEFT {peft.__version__}"
        with pytest.raises(LorakitError, match="PEFT type"):
            spec_from_peft({"peft_type": kind.value})
        return
    given = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    config = {one.name: _default(one) for one in dataclasses.fields(given)} | {
        "peft_type": kind.value,
        "peft_version": "0.21.2",
    }
    config |= {"num_virtual_tokens": 3} if "num_virtual_tokens" in config else {}
    spec: Any = spec_from_peft(config | NEEDED.get(kind.value, {}))
    row = format_of(spec.name)
    variants = {key for name, one in FORMATS.items() if one.peft == kind.value for key in _entries(name)}
    passed_over = set(row.ignored) | {"fan_in_fan_out", "init_weights", "runtime_config"}
    assert passed_over & set(config) <= {name for names in IGNORED.values() for name in names.split()}
    assert all(row.refused.values())
    unknown = set(config) - COMMON - known_entries(spec) - variants - set(row.refused)
    assert not unknown, f"{sorted(unknown)} of {given.__name__} are new in PEFT {peft.__version__}"
    for name in set(row.refused) & set(config):
        with pytest.raises(LorakitError, match=f"sets {name}="):
            spec_from_peft({**config, **NEEDED.get(kind.value, {}), name: {"some": 1}})


def _default(one: Any) -> Any:
    value = one.default if one.default is not dataclasses.MISSING else None
    value = one.default_factory() if one.default_factory is not dataclasses.MISSING else value
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value


def _entries(name: str) -> set[str]:
    """The entries by which a row of the formats is told from others of the same PEFT type, and its options."""
    own = {declared.option.peft for declared in options_of(TABLE[name]).values() if declared.option.peft}
    return own | ({"use_bdlora"} if name == "bd-lora" else set())
