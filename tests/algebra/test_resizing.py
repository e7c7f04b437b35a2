"""Adapters at another rank: the best approximation, its error, every layer kind, folders that PEFT reads."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import lorakit as lk
from lorakit.core.spectrum import distance, norm, spectrum
from lorakit.errors import LorakitError
from lorakit.files.bundle import OWN
from lorakit.files.store import read_config, read_own, read_tensors
from reference.models import MODELS, assert_same, logits, quiet, scramble, twin


def dense(adapter: Any) -> dict[str, Tensor]:
    result = {}
    for path, site, delta in adapter.deltas():
        weight = adapter.layers[path].base.get_parameter(site.weight)
        result[f"{path}.{site.name}" if site.name else path] = delta.dense(site.layout.matrix(weight)).detach()
    return result


def adapted(name: str, method: Any, targets: Any, **options: Any) -> tuple[Any, Any]:
    model = twin(MODELS[name]())
    adapter = lk.attach(model, method, target_modules=targets, **options)
    scramble(adapter.named_parameters(), size=0.4)
    return model.eval(), adapter


def test_the_spectrum_of_a_product() -> None:
    torch.manual_seed(0)
    for out, rank, in_ in ((9, 4, 7), (3, 5, 7), (9, 5, 3)):
        B, A = torch.randn(out, rank).double(), torch.randn(rank, in_).double()
        found, M = spectrum(B, A), B @ A
        torch.testing.assert_close(found.values[: min(out, in_)], torch.linalg.svdvals(M)[: len(found.values)])
        whole = found.cut(len(found.values))
        torch.testing.assert_close(whole[0] @ whole[1], M)
        other_B, other_A = torch.randn(out, 2).double(), torch.randn(2, in_).double()
        assert norm(B, A) == pytest.approx(float(M.norm()))
        assert distance(B, A, other_B, other_A) == pytest.approx(float((M - other_B @ other_A).norm()))


def test_energy_is_the_share_of_squares() -> None:
    found = spectrum(torch.diag(torch.tensor([4.0, 2.0, 2.0, 1.0])), torch.eye(4))  # squares 16, 4, 4, 1 of 25
    assert [found.rank_for(share) for share in (0.5, 0.64, 0.65, 0.8, 0.95, 0.96, 0.97, 1.0)] == [
        1,
        1,
        2,
        2,
        3,
        3,
        4,
        4,
    ]
    assert spectrum(torch.zeros(4, 2), torch.ones(2, 3)).rank_for(0.9) == 1


KINDS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "linear": ("llama", ["q_proj", "down_proj"], {"rank_pattern": {"q_proj": 2}}),
    "transposed, parts, biases": (
        "gpt2",
        ["c_attn"],
        {"bias": "lora_only", "parts": {"c_attn": {"q": (0, 24), "v": (48, 72)}}},
    ),
    "convolutions": ("convolutions", ["one", "two", "head"], {}),
    "embedding, saved": ("words", ["words", "body"], {"modules_to_save": ["norm"]}),
    "attention": ("attention", ["first", "middle"], {}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_best_approximation_on_every_layer_kind(kind: str, tmp_path: Path) -> None:
    name, targets, options = KINDS[kind]
    model, adapter = adapted(name, lk.LoRA(rank=3, alpha=5.0), targets, **options)
    wanted = logits(model, name)
    report = lk.resize(adapter, rank=2, name="small")
    lost = size = 0.0
    for where, M in dense(adapter).items():
        S = torch.linalg.svdvals(M)
        found = dense(report.adapter)[where]
        assert float((M - found).norm()) == pytest.approx(float(S[2:].norm()), abs=1e-12)
        assert report.errors[where] == pytest.approx(float(S[2:].norm() / S.norm()), abs=1e-12)
        assert report.ranks[where] == 2
        lost, size = lost + float(S[2:].norm()) ** 2, size + float(S.norm()) ** 2
    assert report.error == pytest.approx(math.sqrt(lost / size))
    assert_same(logits(model, name), wanted)
    exact = lk.resize(adapter, rank=3, name="exact")
    assert exact.error < 1e-7
    with lk.use(model, "exact"):
        torch.testing.assert_close(logits(model, name), wanted)
    exact.adapter.save(tmp_path)
    again = twin(MODELS[name]())
    lk.load(again, tmp_path, name="a")
    with lk.use(again, "a"):
        torch.testing.assert_close(logits(again, name), wanted)


@pytest.mark.parametrize(
    "method",
    [
        lk.AdaLoRA(rank=3, alpha=5.0),
        lk.ReLoRA(rank=3, alpha=5.0),
        lk.LoHa(rank=2, alpha=2.0),
        lk.LoKr(rank=2, alpha=2.0),
        lk.DoRA(inner=lk.LoRA(rank=2)),
        lk.HiRA(rank=2),
    ],
    ids=lambda method: method.name,
)
def test_any_method_becomes_a_lora(method: Any) -> None:
    model, adapter = adapted("llama", method, ["q_proj"])
    wanted = logits(model, "llama")
    report = lk.resize(adapter, rank=24, name="whole")
    assert type(report.adapter.method) is lk.LoRA
    assert report.error < 1e-7
    with lk.use(model, "whole"):
        torch.testing.assert_close(logits(model, "llama"), wanted)


def test_energy_gives_each_layer_its_own_rank(tmp_path: Path) -> None:
    model, adapter = adapted("llama", lk.LoRA(rank=6, alpha=6.0), ["q_proj", "up_proj"])
    with torch.no_grad():
        for index, (_, _, delta) in enumerate(adapter.deltas()):
            delta.A.mul_(torch.tensor([3.0**-k for k in range(6)])[:, None] ** (index % 3))
    report = lk.resize(adapter, energy=0.9)
    assert len(set(report.ranks.values())) > 1
    assert all(error**2 <= 0.1 for error in report.errors.values())
    for where, M in dense(adapter).items():
        S = torch.linalg.svdvals(M).square()
        rank = report.ranks[where]
        assert float(S[:rank].sum()) >= 0.9 * float(S.sum()) > float(S[: rank - 1].sum())
    with lk.use(model, report.adapter.name):
        wanted = logits(model, "llama")
    report.adapter.save(tmp_path)
    with quiet():
        theirs: Any = peft.PeftModel.from_pretrained(twin(MODELS["llama"]()), str(tmp_path)).eval()
    assert_same(logits(theirs, "llama"), wanted)


def test_own_keeps_what_the_method_puts_first() -> None:
    _, adapter = adapted("llama", lk.DyLoRA(rank=4, alpha=6.0), ["q_proj"])
    report = lk.resize(adapter, rank=2, own=True)
    before = {path: delta for path, _, delta in adapter.deltas()}
    for where, M in dense(report.adapter).items():
        delta = before[where]
        torch.testing.assert_close(M, 6.0 / 2 * delta.B[:, :2].detach() @ delta.A[:2].detach())
    _, adapter = adapted("llama", lk.AdaLoRA(rank=4), ["q_proj"])
    with torch.no_grad():
        for _, _, delta in adapter.deltas():
            delta.lam.copy_(torch.tensor([0.0, 50.0, 0.1, -70.0]))
    report = lk.resize(adapter, rank=2, own=True)
    for path, _, delta in adapter.deltas():
        expected = delta.scale * (delta.P * delta.lam)[:, [1, 3]] @ delta.Q[[1, 3]]
        torch.testing.assert_close(dense(report.adapter)[path], expected.detach())


def test_what_is_wrong_is_said() -> None:
    _, adapter = adapted("llama", lk.LoRA(rank=2), ["q_proj"])
    for options, words in (
        ({}, "either a rank or an energy share"),
        ({"rank": 2, "energy": 0.5}, "either a rank or an energy share"),
        ({"rank": 0}, "rank was given as 0"),
        ({"energy": 1.2}, "energy was given as 1.2; it is a share above 0"),
        ({"rank": 1, "own": True}, "lora does not order its ranks; leave own out"),
    ):
        with pytest.raises(LorakitError, match=words):
            lk.resize(adapter, **options)
    _, bitfit = adapted("gpt2", lk.BitFit(), ["c_attn"])
    with pytest.raises(LorakitError, match="bitfit changes the bias of"):
        lk.resize(bitfit, rank=1)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "attention"])
def test_a_folder_alone_gives_the_same(kind: str, tmp_path: Path) -> None:
    name, targets, options = KINDS[kind]
    options = {key: value for key, value in options.items() if key != "parts"}
    model, adapter = adapted(name, lk.LoRA(rank=3, alpha=5.0, rslora=True), targets, **options)
    adapter.save(tmp_path / "a", record={"steps": 7})
    report = lk.resize(tmp_path / "a", output=tmp_path / "b", rank=2)
    there = lk.resize(adapter, rank=2)
    assert report.error == pytest.approx(there.error, abs=1e-7)
    assert report.ranks == there.ranks
    with lk.use(model, there.adapter.name):
        wanted = logits(model, name)
    record = read_own(tmp_path / "b")["record"]
    assert record["steps"] == 7
    assert record["resized"]["error"] == report.error
    for bare in (False, True):
        if bare:
            (tmp_path / "b" / OWN).unlink()
        again = twin(MODELS[name]())
        lk.load(again, tmp_path / "b", name="a")
        with lk.use(again, "a"):
            torch.testing.assert_close(logits(again, name), wanted)
    if name != "convolutions":
        with quiet():
            theirs: Any = peft.PeftModel.from_pretrained(twin(MODELS[name]()), str(tmp_path / "b")).eval()
        torch.testing.assert_close(logits(theirs, name), wanted)


def test_a_folder_of_parts_becomes_one_of_whole_layers(tmp_path: Path) -> None:
    name, targets, options = KINDS["transposed, parts, biases"]
    model, adapter = adapted(name, lk.LoRA(rank=3, alpha=5.0), targets, **options)
    adapter.save(tmp_path / "a")
    assert lk.resize(tmp_path / "a", output=tmp_path / "b", rank=6).error < 1e-7
    again = twin(MODELS[name]())
    lk.load(again, tmp_path / "b", name="a")
    with lk.use(again, "a"):
        torch.testing.assert_close(logits(again, name), logits(model, name))


def test_a_dylora_folder_is_cut_at_a_rank(tmp_path: Path) -> None:
    model, adapter = adapted("llama", lk.DyLoRA(rank=4, alpha=6.0), ["q_proj"])
    adapter.save(tmp_path / "a")
    lk.resize(tmp_path / "a", output=tmp_path / "b", rank=2, own=True)
    with lk.use(model, lk.resize(adapter, rank=2, own=True).adapter.name):
        wanted = logits(model, "llama")
    again = twin(MODELS["llama"]())
    lk.load(again, tmp_path / "b", name="a")
    with lk.use(again, "a"):
        torch.testing.assert_close(logits(again, "llama"), wanted)
    assert read_config(tmp_path / "b")["r"] == 2
    assert {t.shape[0] for key, t in read_tensors(tmp_path / "b").items() if "lora_A" in key} == {2}
    with pytest.raises(LorakitError, match="this folder's method is lora"):
        lk.resize(tmp_path / "b", output=tmp_path / "c", rank=1, own=True)


def test_a_folder_that_needs_its_base_says_so(tmp_path: Path) -> None:
    for method, words in ((lk.DoRA(), "holds DoRA"), (lk.AdaLoRA(rank=2), "holds ADALORA")):
        _, adapter = adapted("llama", method, ["q_proj"])
        adapter.save(tmp_path / method.name)
        with pytest.raises(LorakitError, match=words):
            lk.resize(tmp_path / method.name, output=tmp_path / "out", rank=1)
    assert not (tmp_path / "out").exists()
