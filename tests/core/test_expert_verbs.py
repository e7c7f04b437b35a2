"""Every verb on experts and bare matrices, by the numbers: a table of models, and what each verb must give on all of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as T
from torch import Tensor, nn

import lorakit as lk
from core.test_experts import IDS, MODELS, SMALL, logits, randomise
from lorakit.algebra.merging import merge
from lorakit.core.lazy_sum import LazySum
from lorakit.core.uniform import lazy_sums
from lorakit.insight.catalogue import matrices
from lorakit.insight.inspection import examine
from lorakit.insight.plan import plan

JET = {**SMALL, "kv_channels": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2}
JET.pop("num_attention_heads")


def dbrx() -> nn.Module:
    config = T.DbrxConfig(
        d_model=32, n_heads=4, n_layers=2, vocab_size=64, max_seq_len=64, pad_token_id=0,
        ffn_config={"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
        attn_config={"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8},
    )  # fmt: skip
    return T.DbrxForCausalLM(config)


KINDS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "qwen3-moe": (MODELS["qwen3-moe"], ["experts"]),
    "gpt-oss": (MODELS["gpt-oss"], ["experts"]),
    "llama4": (MODELS["llama4"], ["experts"]),
    "jetmoe": (lambda: T.JetMoeForCausalLM(T.JetMoeConfig(**JET)), ["input_linear", "output_linear"]),
    "dbrx": (dbrx, ["experts"]),
    "xlnet": (
        lambda: T.XLNetLMHeadModel(T.XLNetConfig(d_model=32, n_layer=2, n_head=4, d_inner=48, vocab_size=64)),
        ["rel_attn"],
    ),
}
"""Kind -> a small model, and the names of its experts or bare matrices."""

kinds = pytest.mark.parametrize("kind", KINDS)


def model_of(kind: str) -> nn.Module:
    torch.manual_seed(0)
    model = KINDS[kind][0]().eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)
    return model


def attached(model: nn.Module, kind: str, name: str, rank: int = 3) -> lk.Adapter:
    adapter = lk.attach(model, lk.LoRA(rank=rank, alpha=5.0), name=name, target_modules=KINDS[kind][1])
    torch.manual_seed(sum(map(ord, name)))
    randomise(adapter)
    return adapter


def changes(adapter: lk.Adapter) -> dict[str, Tensor]:
    """Place -> ΔW (out, in) of every matrix, in float64."""
    result = {}
    for path, site, delta in adapter.deltas():
        W = site.layout.matrix(adapter.layers[path].stored(site))
        result[site.place(path)] = delta.dense(W).detach().double()
    return result


def close(found: Tensor, expected: Tensor, atol: float = 5e-5) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=atol, check_dtype=False)


def all_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for place, change in expected.items():
        close(found[place], change, 1e-5)


def cut(change: Tensor, rank: int) -> Tensor:
    U, S, V = torch.linalg.svd(change, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ V[:rank]


def fresh(kind: str, folder: Path) -> dict[str, Tensor]:
    """What a folder's adapter adds to a model of this kind."""
    return changes(lk.load(model_of(kind), folder, name="loaded"))


@kinds
def test_attach_train_detach(kind: str) -> None:
    model = model_of(kind)
    base = logits(model)
    adapter = lk.attach(model, lk.LoRA(rank=2), name="a", target_modules=KINDS[kind][1])
    assert torch.equal(logits(model), base)
    optimiser = torch.optim.AdamW(adapter.parameters(), lr=0.02)
    losses = []
    for _ in range(4):
        optimiser.zero_grad()
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimiser.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    assert all(parameter.grad is not None for parameter in adapter.parameters())
    assert torch.equal(logits(lk.detach(model)), base)


@kinds
def test_rows(kind: str) -> None:
    model = model_of(kind)
    alone = {}
    for name in ("a", "b"):
        attached(model, kind, name)
        with lk.use(model, name):
            alone[name] = logits(model)
    with lk.use(model, None):
        base = logits(model)
    if kind == "jetmoe":
        with pytest.raises(lk.LorakitError, match="sorted by expert"), lk.use(model, ["a", None, "b"]):
            logits(model)
        return
    with lk.use(model, ["a", None, "b"]):
        close(logits(model), torch.stack([alone["a"][0], base[1], alone["b"][2]]), 1e-4)


@pytest.mark.parametrize("kind", ["qwen3-moe", "gpt-oss", "dbrx", "xlnet"])
def test_adapters_on_different_matrices_of_one_module(kind: str) -> None:
    """One expert, one parameter, one bare matrix: named alone, beside an adapter on all of them."""
    one = {
        "qwen3-moe": "experts.down_proj.1",
        "gpt-oss": "experts.gate_up_proj",
        "dbrx": "mlp.w1.2",
        "xlnet": "rel_attn.v",
    }
    model = model_of(kind)
    attached(model, kind, "all")
    few = lk.attach(model, lk.LoRA(rank=2), name="few", target_modules=[one[kind]])
    assert all(one[kind] in place for place in changes(few))
    randomise(few)
    with lk.use(model, {"all": 0.5, "few": 2.0}):
        blended = logits(model)
    with lk.merged(model, {"all": 0.5, "few": 2.0}):
        close(logits(model), blended, 1e-4)
    alone = {}
    for name in ("all", "few"):
        with lk.use(model, name):
            alone[name] = logits(model)
    with lk.use(model, ["few", "all", "few"]):
        close(logits(model), torch.stack([alone["few"][0], alone["all"][1], alone["few"][2]]), 1e-4)
    lk.detach(model, "all")
    with lk.use(model, "few"):
        close(logits(model), alone["few"], 1e-6)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "xlnet"])
def test_the_sum_is_never_built(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def built(self: LazySum) -> Tensor:
        raise AssertionError("W + ΔW was built")

    model = model_of(kind)
    adapter = attached(model, kind, "a")
    monkeypatch.setattr(LazySum, "whole", built)
    assert all(lazy_sums(layer, [("a", 1.0)]) for layer in adapter.layers.values())
    model(IDS, labels=IDS).loss.backward()
    assert all(parameter.grad is not None for parameter in adapter.parameters())


@kinds
def test_blend_and_merge(kind: str) -> None:
    model = model_of(kind)
    attached(model, kind, "a")
    attached(model, kind, "b", rank=2)
    with lk.use(model, {"a": 0.5, "b": -2.0}):
        blended = logits(model)
    with lk.merged(model, {"a": 0.5, "b": -2.0}):
        close(logits(model), blended, 1e-4)
    with lk.use(model, "a"):
        beside = logits(model)
    merge(model, "a")
    with lk.use(model, None):
        close(logits(model), beside, 1e-4)


@kinds
def test_save_load_inspect(kind: str, tmp_path: Path) -> None:
    model = model_of(kind)
    adapter = attached(model, kind, "a")
    expected = changes(adapter)
    adapter.save(tmp_path / "a")
    all_close(fresh(kind, tmp_path / "a"), expected)
    report = examine(tmp_path / "a")
    found = {layer.name: layer for layer in report.layers}
    assert set(found) == set(expected)
    for place, change in expected.items():
        S = torch.linalg.svdvals(change)
        assert found[place].rank == 3
        assert found[place].norm == pytest.approx(float(change.norm()), rel=1e-4)
        assert found[place].singular_values[:3] == pytest.approx(S[:3].tolist(), rel=1e-4)
    assert report.parameters == sum(parameter.numel() for parameter in adapter.parameters())


Operation = Callable[[list[Any], Any], Any]
"""Adapters or folders, and where the result goes -> the result."""

OPERATIONS: dict[str, tuple[Operation, Callable[[list[dict[str, Tensor]]], dict[str, Tensor]]]] = {
    "resize": (
        lambda given, output: lk.resize(given[0], rank=2, **output),
        lambda own: {place: cut(change, 2) for place, change in own[0].items()},
    ),
    "prune": (
        lambda given, output: lk.prune(given[0], keep=0.5, **output).made,
        lambda own: {
            place: own[0][place]
            for place in sorted(own[0], key=lambda place: -float(own[0][place].norm()))[: len(own[0]) // 2]
        },
    ),
    "combine": (
        lambda given, output: lk.combine(given, [0.5, 2.0], **output),
        lambda own: {place: 0.5 * own[0][place] + 2.0 * own[1][place] for place in own[0]},
    ),
    "scale": (
        lambda given, output: lk.scale(given[0], -0.5, **output),
        lambda own: {place: -0.5 * change for place, change in own[0].items()},
    ),
}


@kinds
@pytest.mark.parametrize("operation", OPERATIONS)
def test_algebra_on_a_model_and_in_folders(kind: str, operation: str, tmp_path: Path) -> None:
    run, right = OPERATIONS[operation]
    model = model_of(kind)
    given = [attached(model, kind, "a"), attached(model, kind, "b", rank=2)]
    expected = right([changes(adapter) for adapter in given])
    made = run(given, {})
    own = changes(made.adapter)
    all_close({place: own[place] for place in expected}, expected)
    assert all(not change.any() for place, change in own.items() if place not in expected)
    made.adapter.save(tmp_path / "live")
    found = fresh(kind, tmp_path / "live")
    all_close({place: found[place] for place in expected}, expected)
    for adapter in given:
        adapter.save(tmp_path / adapter.name)
    folder = tmp_path / "made"
    run([tmp_path / adapter.name for adapter in given], {"output": folder})
    found = fresh(kind, folder)
    all_close({place: found[place] for place in expected}, expected)
    assert all(not change.any() for place, change in found.items() if place not in expected)


@pytest.mark.parametrize("whole", [True, False], ids=["both parameters", "one is gone"])
@pytest.mark.parametrize("kind", ["qwen3-moe", "gpt-oss"])
def test_peft_reads_what_becomes_of_a_folder(kind: str, whole: bool, tmp_path: Path) -> None:
    adapter = attached(model_of(kind), kind, "a")
    if not whole:  # the smaller ones, which are pruned
        with torch.no_grad():
            for _, site, delta in adapter.deltas():
                if site.weight == "down_proj":
                    for parameter in delta.parameters():
                        parameter.mul_(1e-3)
    adapter.save(tmp_path / "a")
    lk.prune(tmp_path / "a", keep=1.0 if whole else 0.5, output=tmp_path / "b")
    lk.resize(tmp_path / "b", rank=2, output=tmp_path / "c")
    model = model_of(kind)
    lk.load(model, tmp_path / "c", name="c")
    theirs = peft.PeftModel.from_pretrained(model_of(kind), tmp_path / "c").eval()
    close(logits(theirs), logits(model), 1e-4)
    assert (logits(theirs) - logits(model_of(kind))).abs().max() > 0.05


@kinds
def test_extract(kind: str) -> None:
    base, tuned = model_of(kind), model_of(kind)
    adapter = attached(tuned, kind, "a")
    expected = changes(adapter)
    merge(tuned, "a")
    made = lk.extract(base, tuned, rank=3, target_modules=KINDS[kind][1]).made
    all_close(changes(made.adapter), expected)
    with lk.use(base, made.adapter.name):
        close(logits(base), logits(tuned), 1e-3)


@kinds
def test_plan_counts(kind: str) -> None:
    model = model_of(kind)
    adapter = lk.attach(copy.deepcopy(model), lk.LoRA(rank=2), name="a")
    count = sum(parameter.numel() for parameter in adapter.parameters())
    shapes = matrices(model)
    assert len(shapes) == sum(1 for _ in adapter.deltas())
    if kind in ("jetmoe", "dbrx", "xlnet"):
        with pytest.raises(lk.LorakitError, match="cannot be counted from shapes"):
            plan(model.config, "lora", length=8)
        return
    found = plan(model.config, "lora", method=lk.LoRA(rank=2), length=8)
    assert found.trained == count
    assert found.numbers == sum(parameter.numel() for parameter in model.parameters())
