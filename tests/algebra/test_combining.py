"""Several adapters as one: the weighted sum over any methods, cuts, TIES and DARE by their papers, PEFT where it is right."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import lorakit as lk
from laws.cases import KINDS, SPECS, Case, Subject, label, randomise
from lorakit.algebra.recipes import RECIPES
from lorakit.algebra.sources import Live
from lorakit.errors import LorakitError
from lorakit.files.bundle import CONFIG, OWN, TENSORS
from lorakit.files.store import read_config, read_own, read_tensors
from reference.models import MODELS, assert_same, logits, quiet, scramble, tolerance, twin

ALL = [spec for specs in SPECS.values() for spec in specs]
KIND = {kind.name: kind for kind in KINDS}


def changes(adapter: Any) -> dict[str, Tensor]:
    live = Live(adapter, "test")
    return {place: live.change(place).dense() for place in live.places()}


def pair(kind: str, *methods: Any) -> Subject:
    """A model with an adapter of each method, "0", "1", …, none of whose tensors is zero."""
    model = Case(methods[0], KIND[kind]).model()
    made = {}
    torch.manual_seed(1)
    for index, method in enumerate(methods):
        made[str(index)] = Case(method, KIND[kind]).attach(model, str(index))
        randomise(made[str(index)])
    return Subject(model, made, KIND[kind].inputs(3), KIND[kind])


def llamas(*methods: Any, targets: Any = ("q_proj", "down_proj"), **options: Any) -> tuple[Any, list[Any]]:
    model = twin(MODELS["llama"]())
    made = []
    for index, method in enumerate(methods):
        made.append(lk.attach(model, method, name=str(index), target_modules=targets, **options))
        scramble(made[-1].named_parameters(), seed=index, size=0.4)
    return model.eval(), made


def state(model: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# -- the weighted sum -----------------------------------------------------------------------------------------------------


@st.composite
def methods(draw: Callable[..., Any]) -> Any:
    """Any method of the table with a random rank and alpha where it has them."""
    spec: Any = draw(st.sampled_from(ALL))
    fields = {field.name for field in dataclasses.fields(spec)}
    options = {"rank": st.integers(1, 4), "alpha": st.floats(0.25, 8.0)}
    chosen = {name: draw(values) for name, values in options.items() if name in fields}
    try:
        changed = spec.replace(**chosen)
        changed.check(Case(spec, KIND["linear"]).subject("one", fresh=True).layer.sites[""].layout.shape, "layer")
        return changed
    except LorakitError:
        return spec


@settings(max_examples=40, deadline=None, derandomize=True)
@given(methods(), methods(), st.floats(-3, 3), st.floats(-3, 3))
def test_linear_is_the_weighted_sum_of_any_two_methods(one: Any, other: Any, first: float, second: float) -> None:
    assume(abs(first) > 1e-3 or abs(second) > 1e-3)
    subject = pair("linear", one, other)
    adapters = list(subject.adapters.values())
    before = state(subject.model)
    result = lk.combine(adapters, [first, second])
    after = state(subject.model)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    wanted = first * changes(adapters[0])["layer"] + second * changes(adapters[1])["layer"]
    found = changes(result.adapter)["layer"]
    size = max(float(changes(adapter)["layer"].abs().max()) for adapter in adapters)
    assert float((found - wanted).abs().max()) <= 1e-12 * max(1.0, size)
    assert result.error == 0.0
    for call in subject.calls:
        blend = subject.run({"0": first, "1": second}, call)
        torch.testing.assert_close(subject.run("combined", call), blend, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", [kind.name for kind in KINDS if kind.name != "embedding-padded"])
def test_linear_on_every_layer_kind(kind: str) -> None:
    for methods in ((SPECS["lora"][0], SPECS["lora"][1]), (SPECS["lora"][0], SPECS["full"][0])):
        subject = pair(kind, *methods)
        lk.combine(list(subject.adapters.values()), [0.7, -0.4])
        for call in subject.calls:
            wanted = subject.run({"0": 0.7, "1": -0.4}, call)
            torch.testing.assert_close(subject.run("combined", call), wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("method", ALL, ids=label)
def test_one_adapter_with_weight_one_is_itself(method: Any) -> None:
    subject = pair("linear", method, SPECS["lora"][0])
    for how in ("linear", "magnitude-prune", "dare-linear", "ties", "dare-ties"):
        options = {"density": 1.0} if RECIPES[how].sparsify else {}
        lk.combine(list(subject.adapters.values()), [1.0, 0.0], how, name=how, **options)
        for call in subject.calls[:1]:
            torch.testing.assert_close(subject.run(how, call), subject.run("0", call), rtol=1e-9, atol=1e-9)


def test_layers_that_only_one_of_them_changes() -> None:
    model = twin(MODELS["llama"]())
    one = lk.attach(model, lk.LoRA(rank=2), name="one", target_modules=["q_proj", "v_proj"])
    other = lk.attach(model, lk.LoRA(rank=3), name="other", target_modules=["v_proj", "up_proj"])
    for index, adapter in enumerate((one, other)):
        scramble(adapter.named_parameters(), seed=index)
    result = lk.combine([one, other], [2.0, 0.5])
    assert {place.rpartition(".")[2]: rank for place, rank in result.ranks.items()} == {
        "q_proj": 2,
        "v_proj": 5,
        "up_proj": 3,
    }
    with lk.use(model, {"one": 2.0, "other": 0.5}):
        wanted = logits(model, "llama")
    with lk.use(model, "combined"):
        assert_same(logits(model, "llama"), wanted)


def test_weights_per_layer() -> None:
    _, adapters = llamas(lk.LoRA(rank=2), lk.LoRA(rank=2))
    result = lk.combine(
        adapters, [1.0, 1.0], layer_weights={r"layers\.0\.self_attn\.q_proj": [0.0, 2.0], "q_proj": [0.5, 0]}
    )
    ours, theirs = (changes(adapter) for adapter in adapters)
    for place, found in changes(result.adapter).items():
        first, second = (1.0, 1.0) if "down" in place else (0.0, 2.0) if ".0." in place else (0.5, 0.0)
        torch.testing.assert_close(found, first * ours[place] + second * theirs[place])


def test_biases_and_saved_modules_are_combined_as_differences() -> None:
    model = twin(MODELS["gpt2"]())
    one = lk.attach(model, lk.LoRA(rank=2), name="one", target_modules=["c_attn"], bias="all")
    other = lk.attach(model, lk.LoRA(rank=2), name="other", target_modules=["c_fc"], modules_to_save=["ln_f"])
    third = lk.attach(model, lk.BitFit(), name="third", target_modules=["c_proj"])
    for index, adapter in enumerate((one, other, third)):
        scramble(adapter.named_parameters(), seed=index)
    blend = {"one": 0.5, "other": -0.25, "third": 2.0}
    lk.combine([one, other, third], list(blend.values()))
    with lk.use(model, blend):
        wanted = logits(model, "gpt2")
    with lk.use(model, "combined"):
        torch.testing.assert_close(logits(model, "gpt2"), wanted)


def test_a_blend_that_is_merged_just_now_does_not_matter() -> None:
    subject = pair("linear", SPECS["dora"][0], SPECS["ia3"][0], SPECS["lora"][0])
    adapters = [subject.adapters["0"], subject.adapters["1"]]
    wanted = [change.clone() for adapter in adapters for change in changes(adapter).values()]
    with lk.merged(subject.model, "2"):
        found = [change for adapter in adapters for change in changes(adapter).values()]
    for a, b in zip(wanted, found, strict=True):
        torch.testing.assert_close(a, b)


# -- factors and cuts -------------------------------------------------------------------------------------------------------


def test_cat_is_exact_at_the_sum_of_the_ranks() -> None:
    model, adapters = llamas(lk.LoRA(rank=2, alpha=3.0), lk.LoRA(rank=3, alpha=7.0, rslora=True), lk.AdaLoRA(rank=4))
    result = lk.combine(adapters, [0.3, -1.5, 2.0], "cat")
    assert set(result.ranks.values()) == {9}
    with lk.use(model, {"0": 0.3, "1": -1.5, "2": 2.0}):
        wanted = logits(model, "llama")
    with lk.use(model, "combined"):
        assert_same(logits(model, "llama"), wanted)
    third = lk.attach(model, lk.DoRA(inner=lk.LoRA(rank=2)), name="third", target_modules=["q_proj"])
    with pytest.raises(LorakitError, match=r'"cat" lays factors side by side, and third has none for .*q_proj'):
        lk.combine([*adapters, third], how="cat", name="again")


def test_ranks_are_never_more_than_the_matrix_has() -> None:
    model, adapters = llamas(*[lk.LoRA(rank=9)] * 3)
    result = lk.combine(adapters, [1.0, 1.0, 1.0])
    assert set(result.ranks.values()) == {24}
    with lk.use(model, dict.fromkeys("012", 1.0)):
        wanted = logits(model, "llama")
    with lk.use(model, "combined"):
        torch.testing.assert_close(logits(model, "llama"), wanted)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 12), st.floats(0.25, 8))
def test_the_error_of_svd_is_the_tail(first: int, second: int, rank: int, alpha: float) -> None:
    _, adapters = llamas(lk.LoRA(rank=first, alpha=alpha), lk.LoRA(rank=second), targets=("k_proj",))
    weights = [0.6, -0.9]
    result = lk.combine(adapters, weights, "svd", rank=rank)
    ours, theirs = (changes(adapter) for adapter in adapters)
    for place, found in changes(result.adapter).items():
        M = weights[0] * ours[place] + weights[1] * theirs[place]
        S = torch.linalg.svdvals(M)
        assert result.ranks[place] == min(rank, first + second)
        assert float((M - found).norm()) == pytest.approx(float(S[rank:].norm()), abs=1e-7)
        assert result.errors[place] == pytest.approx(float(S[rank:].norm() / S.norm()), abs=1e-7)


def test_energy_and_what_it_costs() -> None:
    _, adapters = llamas(lk.LoRA(rank=4), lk.LoHa(rank=2))
    result = lk.combine(adapters, how="svd", energy=0.8)
    assert all(0 < error**2 <= 0.2 for error in result.errors.values())
    assert 0 < result.error**2 <= 0.2
    assert type(result.adapter.method) is lk.LoRA


def test_nothing_as_large_as_the_layer_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    from lorakit.algebra.changes import Change

    _, adapters = llamas(lk.LoRA(rank=2), lk.LoRA(rank=3))
    monkeypatch.setattr(Change, "dense", lambda self: pytest.fail("ΔW was made"))
    for how, options in (("linear", {}), ("cat", {}), ("svd", {"rank": 2}), ("svd", {"energy": 0.5})):
        lk.combine(adapters, how=how, name=f"{how}{len(options)}{options.get('rank')}", **options)


# -- sparse recipes against their papers ---------------------------------------------------------------------------------------


def ties_of_the_paper(taus: list[Tensor], density: float, scale: float) -> Tensor:
    """Section 3 of the paper: trim, elect, disjoint merge."""
    trimmed = []
    for tau in taus:
        threshold = tau.abs().flatten().sort(descending=True).values[int(density * tau.numel()) - 1]
        trimmed.append(tau * (tau.abs() >= threshold))
    gamma = sum(trimmed).sign()
    kept = torch.stack([tau * ((tau.sign() == gamma) & (gamma != 0)) for tau in trimmed])
    return scale * kept.sum(0) / (kept != 0).sum(0).clamp_min(1)


@pytest.mark.parametrize("density", [0.1, 0.2, 0.7])
def test_ties_is_the_papers(density: float) -> None:
    _, adapters = llamas(lk.LoRA(rank=3), lk.LoHa(rank=2), lk.DoRA(inner=lk.LoRA(rank=2)))
    result = lk.combine(adapters, [1, 1, 1], "ties", density=density, factor=1.3)
    again = lk.combine(adapters, [0.2, 0.2, 0.2], "ties", density=density, factor=1.3, name="again")
    all_changes = [changes(adapter) for adapter in adapters]
    for place, found in changes(result.adapter).items():
        wanted = ties_of_the_paper([one[place] for one in all_changes], density, 1.3)
        torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(changes(again.adapter)[place], wanted)
    assert type(result.adapter.method) is lk.Full


def test_weights_of_ties_count_in_its_mean() -> None:
    """One entry, by hand: 3 and 1 agree and -2 does not; weights 1, 3, 1: (1·3 + 3·1) / 4."""
    from lorakit.algebra.combining import _merged

    taus = [torch.tensor([[3.0, 0.0]]), torch.tensor([[1.0, -1.0]]), torch.tensor([[-2.0, 1.0]])]
    found = _merged(taus, [1.0, 3.0, 1.0], RECIPES["ties"])
    torch.testing.assert_close(found, torch.tensor([[1.5, -1.0]]))


def test_dare_is_the_papers() -> None:
    _, adapters = llamas(lk.LoRA(rank=3), lk.LoRA(rank=2), targets=("q_proj",))
    one, other = (changes(adapter) for adapter in adapters)
    density, runs = 0.3, 60
    place = next(iter(one))
    found = [
        changes(lk.combine(adapters[:1], [1.0], "dare-linear", density=density, seed=seed, name=f"d{seed}").adapter)[
            place
        ]
        for seed in range(runs)
    ]
    stacked = torch.stack(found)
    tau = one[place]
    is_kept = stacked != 0
    torch.testing.assert_close(stacked, torch.where(is_kept, tau / density, 0.0))  # δ̂ = δ / (1 - p), or nothing
    share = is_kept.double().mean()
    assert abs(float(share) - density) < 4 * (density * (1 - density) / stacked.numel()) ** 0.5
    sigma = tau.abs() * ((1 - density) / density / runs) ** 0.5
    assert ((stacked.mean(0) - tau).abs() < 5 * sigma).all()
    assert not torch.equal(found[0], found[1])
    both = changes(lk.combine(adapters, [2.0, -1.0], "dare-linear", density=density, seed=0, name="both").adapter)[
        place
    ]
    alone = changes(lk.combine(adapters[::-1], [0.0, 2.0], "dare-linear", density=density, seed=0, name="x").adapter)[
        place
    ]
    assert set((both != 0).flatten().tolist()) == {True, False}
    # the entries depend on the seed, the layer and the adapter's place in the list, and on nothing else
    again = changes(lk.combine(adapters, [2.0, -1.0], "dare-linear", density=density, seed=0, name="again").adapter)[
        place
    ]
    assert torch.equal(both, again)
    assert not torch.equal((alone != 0), (found[0] != 0))
    assert other[place].shape == tau.shape


def test_dare_ties_and_magnitude_prune() -> None:
    _, adapters = llamas(lk.LoRA(rank=3), lk.LoRA(rank=2), targets=("q_proj",))
    one, other = (changes(adapter) for adapter in adapters)
    result = lk.combine(adapters, [1.0, -0.5], "magnitude-prune", density=0.25)
    for place, found in changes(result.adapter).items():
        wanted = torch.zeros_like(found)
        for weight, tau in ((1.0, one[place]), (-0.5, other[place])):
            smallest = tau.abs().flatten().sort(descending=True).values[int(0.25 * tau.numel()) - 1]
            wanted += weight * tau * (tau.abs() >= smallest)
        torch.testing.assert_close(found, wanted)
    singles = [
        changes(
            lk.combine(adapters, weights, "dare-linear", density=0.5, seed=3, name=f"single-{weights[0]:.0f}").adapter
        )
        for weights in ([1.0, 0.0], [0.0, 1.0])
    ]
    result = lk.combine(adapters, [1.0, 1.0], "dare-ties", density=0.5, seed=3, name="dt")
    for place, found in changes(result.adapter).items():
        taus = torch.stack([single[place] for single in singles])
        agrees = (taus.sign() == taus.sum(0).sign()) & (taus != 0)
        torch.testing.assert_close(found, (taus * agrees).sum(0) / agrees.sum(0).clamp_min(1))


def test_what_the_recipes_have_in_common() -> None:
    _, (one, other) = llamas(lk.LoRA(rank=3), lk.LoHa(rank=2))
    linear = changes(lk.combine([one, other], [0.4, 0.6], name="linear").adapter)
    for how in ("magnitude-prune", "dare-linear"):
        found = changes(lk.combine([one, other], [0.4, 0.6], how, density=1.0, name=how).adapter)
        for place, M in found.items():
            torch.testing.assert_close(M, linear[place])
    for how, recipe in RECIPES.items():  # ΔW against itself gives nothing
        if recipe.measures:
            continue  # a mean, which takes nothing away
        options = {"rank": 3} if how == "svd" else {}
        found = changes(lk.combine([one, one], [1.0, -1.0], how, name=f"{how}-none", **options).adapter)
        if recipe.sparsify == "random":
            continue  # other entries of each
        assert all(float(M.abs().max()) < 1e-12 for M in found.values()), how
    same = changes(lk.combine([one, one, one], [1.0, 1.0, 1.0], "ties", density=1.0, name="mean").adapter)
    for place, M in changes(one).items():
        torch.testing.assert_close(same[place], M)


# -- PEFT --------------------------------------------------------------------------------------------------------------------


@functools.cache
def _pefts(alpha: float, rslora: bool) -> tuple[Any, Any, list[Any]]:
    """The same two adapters in PEFT's model and in ours."""
    with quiet():
        theirs: Any = peft.get_peft_model(
            twin(MODELS["llama"]()),
            peft.LoraConfig(r=4, lora_alpha=alpha, use_rslora=rslora, target_modules=["q_proj", "down_proj"]),
            adapter_name="one",
        )
        theirs.add_adapter(
            "two", peft.LoraConfig(r=4, lora_alpha=alpha, use_rslora=rslora, target_modules=["q_proj", "down_proj"])
        )
    ours, adapters = llamas(*[lk.LoRA(rank=4, alpha=alpha, rslora=rslora)] * 2)
    with torch.no_grad():
        for name, adapter in zip(("one", "two"), adapters, strict=True):
            for path, _, delta in adapter.deltas():
                layer = theirs.base_model.model.get_submodule(path)
                layer.lora_A[name].weight.data = delta.A.detach().clone()
                layer.lora_B[name].weight.data = delta.B.detach().clone()
    return theirs, ours, adapters


def both(how: str, alpha: float = 4.0, rslora: bool = False, **options: Any) -> tuple[dict[str, Tensor], list[Any]]:
    """PEFT's ΔW of a combination, and our two adapters."""
    theirs, _, adapters = _pefts(alpha, rslora)
    theirs = copy.deepcopy(theirs)
    with quiet():
        theirs.add_weighted_adapter(["one", "two"], [0.7, 0.4], "new", combination_type=how, **options)
    found = {path: theirs.base_model.model.get_submodule(path).get_delta_weight("new") for path in changes(adapters[0])}
    return {path: M.detach() for path, M in found.items()}, adapters


def ours(adapters: list[Any], how: str, **options: Any) -> dict[str, Tensor]:
    name = f"{how}-{len(lk.adapters(adapters[0].model))}"
    return changes(lk.combine(adapters, [0.7, 0.4], how, name=name, **options).adapter)


@pytest.mark.parametrize(
    ("theirs", "mine", "options"),
    [
        ("cat", "cat", {}),
        ("svd", "svd", {"rank": 3}),
        ("magnitude_prune_svd", "magnitude-prune", {"rank": 5, "density": 0.3}),
    ],
)
def test_as_peft_has_it_where_peft_is_right(theirs: str, mine: str, options: dict[str, Any]) -> None:
    renamed = {"svd_rank" if key == "rank" else key: value for key, value in options.items()}
    wanted, adapters = both(theirs, alpha=8.0, **renamed)
    for place, M in ours(adapters, mine, **options).items():
        torch.testing.assert_close(M, wanted[place], rtol=1e-6, atol=1e-6)  # PEFT's weights are float32


def test_ties_as_peft_has_it_for_equal_weights() -> None:
    """PEFT multiplies by the weights after the election and divides by how many agree, so that weights 1 are the paper's."""
    theirs, _, adapters = _pefts(4.0, False)
    theirs = copy.deepcopy(theirs)
    with quiet():
        theirs.add_weighted_adapter(
            ["one", "two"], [1.0, 1.0], "new", combination_type="ties_svd", density=0.3, svd_rank=24
        )
    found = changes(lk.combine(adapters, [1.0, 1.0], "ties", density=0.3, name="ties-1").adapter)
    for place, M in found.items():
        wanted = theirs.base_model.model.get_submodule(place).get_delta_weight("new").detach()
        torch.testing.assert_close(M, wanted, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("how", "alpha", "rslora", "why"),
    [
        ("linear", 4.0, False, "sums of A and of B apart have cross terms B₁ A₂"),
        ("cat", 4.0, True, "the result keeps use_rslora, so that its scale is √rank and not 1"),
    ],
)
def test_where_peft_is_wrong(how: str, alpha: float, rslora: bool, why: str) -> None:
    """PEFT 0.21's result is not the weighted sum of what the adapters add; ours is. If this fails, PEFT has mended it."""
    theirs, adapters = both(how, alpha, rslora)
    mine = ours(adapters, how)
    one, other = (changes(adapter) for adapter in adapters)
    for place, M in mine.items():
        wanted = 0.7 * one[place] + 0.4 * other[place]
        torch.testing.assert_close(M, wanted, rtol=1e-9, atol=1e-9)
        assert float((theirs[place] - wanted).norm() / wanted.norm()) > 0.2, why


# -- folders -----------------------------------------------------------------------------------------------------------------


def saved(tmp_path: Path, *methods: Any, **options: Any) -> tuple[Any, list[Any], list[Path]]:
    model, adapters = llamas(*methods, **options)
    folders = [adapter.save(tmp_path / adapter.name) for adapter in adapters]
    return model, adapters, folders


@pytest.mark.parametrize(
    ("how", "options"),
    [
        ("linear", {}),
        ("svd", {"rank": 3}),
        ("ties", {"rank": 6}),
        ("ties", {}),
        ("dare-linear", {"density": 0.5, "seed": 7}),
    ],
)
def test_folders_give_the_same_without_a_base(how: str, options: dict[str, Any], tmp_path: Path) -> None:
    model, adapters, folders = saved(tmp_path, lk.LoRA(rank=2, alpha=3.0), lk.LoRA(rank=3, alpha=5.0, rslora=True))
    there = lk.combine(adapters, [0.7, -0.3], how, **options)
    here = lk.combine(folders, [0.7, -0.3], how, output=tmp_path / "out", **options)
    assert here.error == pytest.approx(there.error, abs=1e-6)
    assert here.ranks == there.ranks
    with lk.use(model, "combined"):
        wanted = logits(model, "llama")
    again = twin(MODELS["llama"]())
    lk.load(again, tmp_path / "out", name="a")
    with lk.use(again, "a"):
        torch.testing.assert_close(logits(again, "llama"), wanted)
    record = read_own(tmp_path / "out")["record"]["combined"]
    assert record["how"] == how
    assert record["error"] == here.error
    if there.adapter is not None and type(there.adapter.method) is lk.LoRA:
        with quiet():
            theirs: Any = peft.PeftModel.from_pretrained(twin(MODELS["llama"]()), str(tmp_path / "out")).eval()
        torch.testing.assert_close(logits(theirs, "llama"), wanted)


def test_folders_of_other_layers_and_of_other_programs(tmp_path: Path) -> None:
    model, (one,) = llamas(lk.LoRA(rank=2))
    other = lk.attach(model, lk.LoRA(rank=3), name="other", target_modules=["v_proj", "down_proj"])
    third = lk.attach(model, lk.Full(), name="third", target_modules=["up_proj"])
    for index, adapter in enumerate((one, other, third)):
        scramble(adapter.named_parameters(), seed=index, size=0.3)
    folders = [adapter.save(tmp_path / adapter.name) for adapter in (one, other, third)]
    (folders[1] / OWN).unlink()
    lk.combine(folders, [1.0, 2.0, 0.5], output=tmp_path / "out")
    with lk.use(model, {"0": 1.0, "other": 2.0, "third": 0.5}):
        wanted = logits(model, "llama")
    again = twin(MODELS["llama"]())
    lk.load(again, tmp_path / "out", name="a")
    with lk.use(again, "a"):
        torch.testing.assert_close(logits(again, "llama"), wanted)
    lk.combine(folders[:2], [1.0, 2.0], output=tmp_path / "pair")
    with lk.use(model, {"0": 1.0, "other": 2.0}):
        wanted = logits(model, "llama")
    with quiet():
        theirs: Any = peft.PeftModel.from_pretrained(twin(MODELS["llama"]()), str(tmp_path / "pair")).eval()
    torch.testing.assert_close(logits(theirs, "llama"), wanted)


def test_saved_modules_in_folders_need_weights_that_add_up_to_one(tmp_path: Path) -> None:
    model, adapters, folders = saved(tmp_path, lk.LoRA(rank=2), lk.LoRA(rank=2), modules_to_save=["norm"])
    lk.combine(folders, [0.3, 0.7], output=tmp_path / "out")
    again = twin(MODELS["llama"]())
    lk.load(again, tmp_path / "out", name="a")
    with lk.use(again, "a"), lk.use(model, {"0": 0.3, "1": 0.7}):
        torch.testing.assert_close(logits(again, "llama"), logits(model, "llama"))
    with pytest.raises(
        LorakitError, match=r"norm\.weight is trained whole in .*0, and the weights add up to 1\.5, so that"
    ):
        lk.combine(folders, [0.5, 1.0], output=tmp_path / "no")
    assert not (tmp_path / "no").exists()
    assert adapters


# -- refusals ----------------------------------------------------------------------------------------------------------------


def test_requests_that_make_no_sense() -> None:
    model, adapters = llamas(lk.LoRA(rank=2), lk.LoRA(rank=2), targets=("q_proj",))
    for arguments, options, words in (
        ((adapters, [1.0]), {}, r"the weights are \[1\.0\]; one finite number for each of 2"),
        ((adapters, [1.0, float("nan")]), {}, "one finite number"),
        ((adapters, None, "tise"), {}, 'unknown way to combine "tise"; did you mean "ties"'),
        ((adapters, None, "svd"), {}, "combine: give either a rank or an energy share"),
        ((adapters, None, "linear"), {"rank": 2, "energy": 0.5}, "either a rank or an energy share"),
        ((adapters, None, "cat"), {"rank": 2}, '"cat" keeps all ranks'),
        ((adapters, None, "linear"), {"density": 0.5}, "linear keeps all entries. Those that use it: ties"),
        ((adapters, None, "ties"), {"density": 1.5}, "density was given as 1.5"),
        ((adapters, None), {"factor": float("inf")}, "factor was given as inf"),
        (
            (adapters, None),
            {"layer_weights": {"k_proj": [1, 1]}},
            "'k_proj', which ends no adapted layer; they end in: q_proj",
        ),
        ((adapters, None), {"layer_weights": {"q_proj": [1]}}, "weights for 'q_proj'"),
        ((adapters, [0, 0]), {}, "every weight is zero"),
        (([], None), {}, "a list of adapters"),
        (([adapters[0], "there"], None), {}, "do not mix"),
        ((adapters, None), {"output": "x"}, "leave output out"),
        ((adapters, None), {"name": "0"}, "an adapter '0' is on this model already"),
    ):
        with pytest.raises(LorakitError, match=words):
            lk.combine(*arguments, **options)
    _, foreign = llamas(lk.LoRA(rank=2))
    with pytest.raises(LorakitError, match="is on another model"):
        lk.combine([adapters[0], foreign[0]])
    with torch.no_grad():
        next(adapters[1].parameters())[0, 0] = float("nan")
    with pytest.raises(LorakitError, match=r"\.A of adapter '1' holds a NaN"):
        lk.combine(adapters)
    lk.detach(model, "1")
    with pytest.raises(LorakitError, match="'1' has been taken off"):
        lk.combine(adapters)
    assert list(lk.adapters(model)) == ["0"]


def test_what_is_no_change_of_a_matrix() -> None:
    model, (one, other) = llamas(lk.LoRA(rank=2), lk.LoRA(rank=2))
    prompts = lk.attach(model, lk.PromptTuning(tokens=2), name="prompts")
    with pytest.raises(LorakitError, match=r"adapter 'prompts' is edits \(prompt-tuning\), and no change of a matrix"):
        lk.combine([one, prompts])
    other.router = torch.nn.Module()  # as a mixture of experts has
    with pytest.raises(LorakitError, match="adapter '1' is a router, whose change differs"):
        lk.combine([one, other])


def test_folders_that_are_mixed_up(tmp_path: Path) -> None:
    _, adapters, folders = saved(tmp_path, lk.LoRA(rank=2), lk.LoRA(rank=2), targets=("q_proj",))
    good = folders[0]

    def changed(name: str, change: Callable[[dict[str, Tensor]], object], **config: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        tensors = load_file(good / TENSORS)
        change(tensors)
        save_file(tensors, folder / TENSORS)
        (folder / CONFIG).write_text(json.dumps({**read_config(good), **config}))
        return folder

    key = next(key for key in read_tensors(good) if "lora_A" in key)
    partner = key.replace("lora_A", "lora_B")
    for folder, words in (
        (changed("half", lambda t: t.pop(partner)), r"lacks its other half 'base_model\.model\..*lora_B\.weight'"),
        (changed("nan", lambda t: t[key].mul_(float("nan"))), "lora_A.weight in .* holds a NaN"),
        (changed("more", lambda t: t.update(extra=torch.ones(2))), "'extra', which is no factor"),
        (changed("ranks", lambda t: t.update({key: torch.ones(3, 24)})), "ranks of a pair do not match"),
        (changed("said", lambda t: None, r=5), "says rank 5 for .* has 2 rows"),
        (
            changed("shape", lambda t: t.update({key: torch.ones(2, 25)})),
            "24 × 24 in .* and 24 × 25 in ",
        ),
        (
            changed("name", lambda t: None, base_model_name_or_path="x/other"),
            "made for different base models: their names are",
        ),
        (changed("method", lambda t: None, peft_type="VERA"), "holds VERA, whose ΔW is not in the file"),
    ):
        with pytest.raises(LorakitError, match=words):
            lk.combine([good, folder], output=tmp_path / "out")
    stranger = twin(MODELS["llama"]())
    with torch.no_grad():
        for parameter in stranger.parameters():
            parameter.mul_(1.5)
    lk.attach(stranger, lk.LoRA(rank=2), target_modules=["q_proj"]).save(tmp_path / "stranger")
    with pytest.raises(LorakitError, match=r"different base models: \d+% of \d+ sampled weights differ"):
        lk.combine([good, tmp_path / "stranger"], output=tmp_path / "out")
    with pytest.raises(LorakitError, match="output= names the folder"):
        lk.combine(folders)
    with pytest.raises(LorakitError, match="is one of the adapters itself"):
        lk.combine(folders, output=good)
    assert not (tmp_path / "out").exists()
    assert adapters
    assert tolerance(torch.ones(1).double()) > 0
