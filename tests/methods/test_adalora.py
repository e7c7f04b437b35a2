"""AdaLoRA and ElaLoRA as deltas: the paper's formula, what is kept, and PEFT's files, budgeted ones too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit.core.delta import Pool, Shape
from lorakit.errors import LorakitError
from lorakit.files.bundle import OWN
from lorakit.files.store import read_config, read_tensors
from lorakit.methods.adalora import Triplets
from methods.both_ways import both_ways, trained_by_peft
from reference.models import MODELS, assert_same, logits, quiet, scramble, twin


def random_triplets(spec: Any = None, out: int = 14, in_: int = 11) -> Triplets:
    torch.manual_seed(0)
    delta = (spec or lk.AdaLoRA(rank=5, alpha=7.0)).build(Shape(out, in_), Pool()).double()
    for parameter in delta.parameters():
        nn.init.normal_(parameter)
    return delta


@pytest.mark.parametrize("kind", [lk.AdaLoRA, lk.ElaLoRA])
def test_formula(kind: Any) -> None:
    delta = random_triplets(kind(rank=5, alpha=7.0))
    expected = sum(7.0 / 5 * delta.lam[k] * torch.outer(delta.P[:, k], delta.Q[k]) for k in range(5))
    torch.testing.assert_close(delta.dense(torch.zeros(14, 11)), expected)
    assert sum(p.numel() for p in delta.parameters()) == 5 * (14 + 11 + 1)


def test_starts_as_the_paper_says() -> None:
    torch.manual_seed(0)
    delta = lk.AdaLoRA(rank=8).build(Shape(400, 300), Pool())
    assert not delta.lam.any()
    for factor in (delta.P, delta.Q):
        assert float(factor.detach().std()) == pytest.approx(0.02, rel=0.05)


def test_all_kept_is_a_lora_with_lambda_in_B() -> None:
    delta = random_triplets()
    lora = lk.LoRA(rank=5, alpha=7.0).build(Shape(14, 11), Pool()).double()
    lora.set_factors(delta.P * delta.lam, delta.Q)
    W = torch.zeros(14, 11, dtype=torch.float64)
    torch.testing.assert_close(delta.dense(W), lora.dense(W))


def test_a_masked_triplet_adds_exactly_nothing() -> None:
    delta = random_triplets()
    with torch.no_grad():
        delta.lam[2] = 0.0
    before = delta.dense(torch.zeros(14, 11))
    with torch.no_grad():
        delta.P[:, 2] = 1e6
    assert torch.equal(delta.dense(torch.zeros(14, 11)), before)


def test_set_factors_puts_the_lengths_into_lambda() -> None:
    delta = random_triplets()
    B, A = torch.randn(14, 5).double(), torch.randn(5, 11).double()
    B[:, 3] = 0
    delta.set_factors(B, A)
    torch.testing.assert_close(delta.dense(torch.zeros(14, 11)), delta.scale * B @ A)
    torch.testing.assert_close(delta.Q.square().sum(1), torch.ones(5).double())
    assert delta.lam[3] == 0
    assert delta.P[:, 3].any(), "a column of zeros would have no direction to start from"


def test_moving_ranks_changes_the_sum_by_the_removed_term_alone() -> None:
    delta = random_triplets(lk.ElaLoRA(rank=5, alpha=7.0))
    W = torch.zeros(14, 11, dtype=torch.float64)
    before, parameters = delta.dense(W).detach(), dict(delta.named_parameters())
    gone = (delta.scale * delta.lam[3] * torch.outer(delta.P[:, 3], delta.Q[3])).detach()
    delta.move(torch.tensor([0, 1, 2, 4]), torch.randn(14, 2), torch.randn(2, 11))
    torch.testing.assert_close(delta.dense(W), before - gone)
    assert all(parameter is parameters[name] for name, parameter in delta.named_parameters())
    assert (delta.P.shape, delta.lam.shape, delta.Q.shape) == ((14, 6), (6,), (6, 11))
    assert delta.spec.scale == pytest.approx(7.0 / 5), "the scale stays when ranks change"
    assert delta.spec.card.parameters(delta.shape, delta.spec) == sum(p.numel() for p in delta.parameters())


def config(**options: Any) -> Any:
    with quiet():
        return peft.AdaLoraConfig(total_step=10, **options)


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("llama", {"target_modules": ["q_proj", "down_proj"], "init_r": 3, "lora_alpha": 5}),
        ("gpt2", {"target_modules": ["c_attn"], "init_r": 3, "lora_alpha": 8, "fan_in_fan_out": True}),
        ("convolutions", {"target_modules": ["two", "head"], "init_r": 2, "lora_alpha": 3}),
    ],
)
def test_files_both_ways(model: str, options: dict[str, Any], tmp_path: Path) -> None:
    """PEFT divides lora_alpha by init_r + 1e-5 and not by r (peft.md 7.18): the file's lora_alpha makes up for it."""
    spec = lk.AdaLoRA(rank=options["init_r"], alpha=2.5)
    theirs = config(**options)
    assert both_ways(model, theirs, spec, tmp_path, size=0.4) < 1e-12
    wrong = 1e-5 / options["init_r"]
    written = read_config(tmp_path / "ours")
    assert written["lora_alpha"] / (written["init_r"] + 1e-5) == pytest.approx(2.5 / spec.rank, rel=wrong / 1e3)


def ranks_of(adapter: Any) -> dict[str, int]:
    return {path: delta.factors()[1].shape[0] for path, _, delta in adapter.deltas()}


TARGETS = ["q_proj", "k_proj", "up_proj"]


def test_a_budgeted_file_of_ours_is_pruned_and_read_by_peft(tmp_path: Path) -> None:
    base = MODELS["llama"]()
    model = twin(base)
    adapter = lk.attach(model, lk.AdaLoRA(rank=4, alpha=6.0), target_modules=TARGETS)
    scramble(adapter.named_parameters(), size=0.4)
    with torch.no_grad():
        for index, (_, _, delta) in enumerate(adapter.deltas()):
            keep = torch.arange(4) >= index % 5  # from all to none
            delta.kept.copy_(keep)
            delta.lam.mul_(keep)
    model.eval()
    wanted = logits(model, "llama")
    adapter.save(tmp_path / "ours")
    sizes = {key: tensor.shape[0] for key, tensor in read_tensors(tmp_path / "ours").items() if key.endswith("lora_E")}
    assert sorted(set(sizes.values())) == [1, 2, 3, 4], "pruned rows are not in the file; one stands for none"
    flags = read_config(tmp_path / "ours")["rank_pattern"]
    assert all(len(row) == 4 for row in flags.values())
    with quiet():
        theirs: Any = peft.PeftModel.from_pretrained(twin(base), str(tmp_path / "ours")).eval()
    assert_same(logits(theirs, "llama"), wanted)
    for bare in (False, True):
        if bare:
            (tmp_path / "ours" / OWN).unlink()
        again = twin(base)
        loaded = lk.load(again, tmp_path / "ours", name="a")
        with lk.use(again, "a"):
            assert_same(logits(again, "llama"), wanted)
        assert {f"base_model.model.{path}.lora_E": rank for path, rank in ranks_of(loaded).items()} == sizes


def test_a_budgeted_file_of_peft_is_read(tmp_path: Path) -> None:
    base = MODELS["llama"]()
    wrapped = trained_by_peft(twin(base), config(target_modules=TARGETS, init_r=4, target_r=2, lora_alpha=9), size=0.4)
    pattern: dict[str, list[bool]] = {}
    with torch.no_grad():
        for index, (name, parameter) in enumerate((n, p) for n, p in wrapped.named_parameters() if "lora_E" in n):
            keep = torch.tensor([(index >> bit) & 1 == 1 for bit in range(4)])
            parameter.mul_(keep[:, None])
            pattern[name.removeprefix("base_model.model.")] = keep.tolist()
    wrapped.peft_config["default"].rank_pattern = pattern
    wanted = logits(wrapped, "llama")
    with quiet():
        wrapped.save_pretrained(str(tmp_path))
    assert any(
        not any(row) for row in json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"].values()
    )
    model = twin(base)
    loaded = lk.load(model, tmp_path, name="a")
    with lk.use(model, "a"):
        assert_same(logits(model, "llama"), wanted)
    assert sorted(set(ranks_of(loaded).values())) == [1, 2, 3]


def test_moved_ranks_save_as_they_are(tmp_path: Path) -> None:
    """ElaLoRA's ranks differ from what was attached; the file says so, for lorakit and, as AdaLoRA, for PEFT."""
    base = MODELS["llama"]()
    model = twin(base)
    adapter = lk.attach(model, lk.ElaLoRA(rank=3, alpha=6.0), target_modules=["q_proj", "v_proj"])
    scramble(adapter.named_parameters(), size=0.4)
    for index, (_, _, delta) in enumerate(adapter.deltas()):
        delta.move(torch.arange(1 + index % 3), torch.randn(delta.shape.out, index % 2), torch.randn(index % 2, 24))
        nn.init.normal_(delta.lam, std=0.4)
    model.eval()
    wanted = logits(model, "llama")
    adapter.save(tmp_path / "a")
    again = twin(base)
    loaded = lk.load(again, tmp_path / "a", trainable=True)
    assert_same(logits(again, "llama"), wanted)
    assert ranks_of(loaded) == ranks_of(adapter)
    assert isinstance(loaded.method, lk.ElaLoRA)
    loaded.save(tmp_path / "b")
    for key, tensor in read_tensors(tmp_path / "a").items():
        assert torch.equal(read_tensors(tmp_path / "b")[key], tensor), key
    with quiet():
        theirs: Any = peft.PeftModel.from_pretrained(twin(base), str(tmp_path / "a")).eval()
    assert_same(logits(theirs, "llama"), wanted)


def test_scales_that_differ_per_layer_are_not_passed_off_as_pefts(tmp_path: Path) -> None:
    model = MODELS["llama"]()
    adapter = lk.attach(model, lk.AdaLoRA(rank=3), target_modules=["q_proj", "v_proj"], alpha_pattern={"q_proj": 2.0})
    scramble(adapter.named_parameters())
    adapter.save(tmp_path)
    assert read_config(tmp_path)["peft_type"] != "ADALORA"
    again = MODELS["llama"]()
    lk.load(again, tmp_path, name="a")
    with lk.use(again, "a"):
        assert_same(logits(again, "llama"), logits(model.eval(), "llama"))


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        (lk.AdaLoRA, {"rank": 0}, "rank was given as 0"),
        (lk.AdaLoRA, {"target_rank": -1}, "rank was given as -1"),
        (lk.AdaLoRA, {"warmup": 1.5}, "warmup was given as 1.5; it is a count of steps, or a share"),
        (lk.AdaLoRA, {"interval": 0}, "interval was given as 0; it is an integer of at least 1"),
        (lk.AdaLoRA, {"beta1": 1.0}, "beta1"),
        (lk.AdaLoRA, {"orthogonality": -0.1}, "orthogonality"),
        (lk.ElaLoRA, {"moves": 0}, "moves was given as 0"),
    ],
)
def test_a_bad_option_says_what_is_wrong(kind: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(LorakitError, match=words):
        kind(**options)


def test_a_rank_above_the_size_is_refused() -> None:
    with pytest.raises(LorakitError, match="rank 12 exceeds the maximum useful rank of 0"):
        lk.attach(nn.Sequential(nn.Linear(6, 9)), lk.AdaLoRA(), target_modules=["0"])


def test_dora_over_adalora_trains_and_merges() -> None:
    model = nn.Sequential(nn.Linear(6, 9)).double()
    lk.attach(model, lk.DoRA(inner=lk.AdaLoRA(rank=2)), target_modules=["0"])
    x: Tensor = torch.randn(4, 6).double()
    before = model(x)
    lk.merge(model, "default")
    torch.testing.assert_close(model(x), before)


@pytest.mark.parametrize("kind", [lk.AdaLoRA, lk.ElaLoRA])
def test_a_masked_triplet_that_trains_again_is_saved(kind: Any, tmp_path: Path) -> None:
    """Between two prunings λ of a masked triplet moves again and acts: what acts must be in the file.

    Counting only the kept ones (`rows()` without λ ≠ 0) gives a file that is another adapter than the one in memory.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(11, 14))
    adapter = lk.attach(model, kind(rank=5, alpha=7.0), name="a", target_modules=["0"])
    (delta,) = (one for _, _, one in adapter.deltas())
    with torch.no_grad():
        for parameter in delta.parameters():
            nn.init.normal_(parameter)
        delta.kept = torch.tensor([True, False, True, False, True])
        delta.lam[3] = 0.0  # masked and still; the one at 1 is masked and acts
    assert delta.rows().tolist() == [0, 1, 2, 4]
    x = torch.randn(3, 11)
    adapter.save(tmp_path)
    again = nn.Sequential(nn.Linear(11, 14))
    again.load_state_dict({key: value for key, value in model.state_dict().items() if key in again.state_dict()})
    loaded = lk.load(again, tmp_path, name="a")
    with lk.use(again, loaded.name):
        torch.testing.assert_close(again(x), model(x))
