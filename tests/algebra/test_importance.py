"""RegMean against its least squares, Fisher averaging against its formula; what they measure, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lorakit as lk
from laws.cases import randomise
from lorakit.algebra.changes import Change
from lorakit.algebra.importance import Findings, Fisher, RegMean, divided
from lorakit.algebra.sources import Live
from lorakit.errors import LorakitError
from reference.models import MODELS, scramble, twin


def changes(adapter: Any) -> dict[str, Tensor]:
    live = Live(adapter, "test")
    return {place: live.change(place).dense() for place in live.places()}


def one_layer(*methods: Any) -> tuple[nn.Module, list[Any]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5)).double()
    made = []
    for index, method in enumerate(methods):
        made.append(lk.attach(model, method, name=str(index), target_modules=["0"]))
        randomise(made[-1])
    return model, made


def llamas(*methods: Any, targets: Any = ("q_proj", "v_proj", "down_proj")) -> tuple[Any, list[Any]]:
    model = twin(MODELS["llama"]()).eval()
    made = []
    for index, method in enumerate(methods):
        made.append(lk.attach(model, method, name=str(index), target_modules=targets))
        scramble(made[-1].named_parameters(), seed=index, size=0.4)
    return model, made


def texts(model: Any, seed: int, count: int = 2, rows: int = 1) -> list[dict[str, Tensor]]:
    torch.manual_seed(seed)
    made = []
    for length in range(5, 5 + count):
        ids = torch.randint(0, model.config.vocab_size, (rows, length))
        made.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids})
    return made


# -- regression ------------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.integers(1, 3), st.integers(1, 3), st.integers(2, 30), st.integers(2, 30), st.floats(0.1, 3), st.floats(0.1, 3)
)
def test_no_other_change_is_nearer_to_what_each_gives(
    first: int, second: int, tokens: int, others: int, one: float, other: float
) -> None:
    """Σ wᵢ mean ‖(ΔW - ΔWᵢ) x‖² is least, whether or not the tokens reach every direction; by an independent solver."""
    _, adapters = one_layer(lk.LoRA(rank=first, alpha=3.0), lk.LoRA(rank=second, rslora=True))
    torch.manual_seed(tokens)
    inputs = [torch.randn(count, 6, dtype=torch.float64) for count in (tokens, others)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RegMean, "off_diagonal", 1.0)
        batches = [[{"input": x}] for x in inputs]
        result = lk.combine(adapters, [one, other], "regmean", batches=batches, name="m")
    assert result.ranks["0"] == min(first + second, 5)
    found = changes(result.adapter)["0"]
    taus = [changes(adapter)["0"] for adapter in adapters]
    roots = [(weight / len(x)) ** 0.5 for weight, x in zip((one, other), inputs, strict=True)]
    X = torch.cat([root * x for root, x in zip(roots, inputs, strict=True)])
    Y = torch.cat([root * x @ tau.T for root, x, tau in zip(roots, inputs, taus, strict=True)])
    wanted = torch.linalg.lstsq(X, Y, driver="gelsd").solution.T
    reach = float((X @ found.T - Y).square().sum())
    assert reach <= float((X @ wanted.T - Y).square().sum()) * (1 + 1e-4) + 1e-6
    assert torch.allclose(X @ found.T, X @ wanted.T, atol=1e-3 * float(Y.abs().max()))


def test_off_the_diagonal_a_tenth_is_taken_off_and_any_methods_mix() -> None:
    _, adapters = one_layer(lk.LoRA(rank=2), lk.DoRA(inner=lk.LoRA(rank=1)), lk.LoHa(rank=2))
    inputs = [torch.randn(9, 6, dtype=torch.float64) for _ in adapters]
    result = lk.combine(
        adapters, [0.5, 0.2, 0.0], "regmean", factor=1.5, batches=[[{"input": x}] for x in inputs], name="m"
    )
    M = changes(result.adapter)["0"] / 1.5
    assert result.ranks == {"0": None}
    rest = torch.zeros(5, 6, dtype=torch.float64)
    for weight, x, adapter in zip((0.5, 0.2), inputs, adapters, strict=False):
        G = x.T @ x / 9
        G = 0.9 * G + 0.1 * torch.diag(G.diagonal())
        rest += weight * (M - changes(adapter)["0"]) @ G
    assert float(rest.abs().max()) < 1e-5 * float(M.abs().max())  # the gradient of a convex objective is zero


def test_what_reaches_a_layer_is_measured_while_the_adapter_acts() -> None:
    """On a model, later layers see what the adapter has made of their inputs; padding counts for nothing."""
    model, adapters = llamas(lk.LoRA(rank=2), lk.LoRA(rank=3))
    data = [texts(model, seed) for seed in (1, 2)]
    seen: dict[str, list[Tensor]] = {}
    for index, batches in enumerate(data):
        with torch.no_grad(), lk.use(model, str(index)):
            for batch in batches:
                inputs: dict[str, Tensor] = {}
                handles = [
                    model.get_submodule(place).register_forward_pre_hook(
                        lambda m, args, place=place, inputs=inputs: inputs.__setitem__(place, args[0][0].clone())
                    )
                    for place in changes(adapters[0])
                ]
                model(**batch)
                for handle in handles:
                    handle.remove()
                for place, x in inputs.items():
                    seen.setdefault(f"{index}/{place}", []).append(x)
    padded = []
    for batches in data:  # the same tokens in one padded batch
        ids, mask = torch.zeros(2, 6, dtype=torch.long), torch.zeros(2, 6, dtype=torch.long)
        for row, batch in enumerate(batches):
            own = batch["input_ids"][0]
            ids[row, : len(own)], mask[row, : len(own)] = own, 1
        padded.append([{"input_ids": ids, "attention_mask": mask}])
    for name, given_batches in (("rows", data), ("padded", padded)):
        result = lk.combine(adapters, how="regmean", batches=given_batches, name=name)
        for place, found in changes(result.adapter).items():
            moments, taus = [], [changes(adapter)[place] for adapter in adapters]
            for index in range(2):
                X = torch.cat(seen[f"{index}/{place}"]).double()
                G = X.T @ X / len(X)
                moments.append(0.9 * G + 0.1 * torch.diag(G.diagonal()))
            wanted = sum(tau @ G for tau, G in zip(taus, moments, strict=True)) @ torch.linalg.inv(sum(moments))
            assert torch.allclose(found, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max())), place
    small = Findings(RegMean("regmean"), [Live(adapter, "test") for adapter in adapters], data, budget=0)
    for place in changes(adapters[0]):  # one matrix at a time gives the same
        for index, gram in enumerate(small.at(place)):
            X = torch.cat(seen[f"{index}/{place}"]).double()
            assert torch.allclose(gram.mean(), X.T @ X / len(X), rtol=1e-4, atol=1e-6)


def test_an_adapter_that_leaves_a_layer_alone_wants_it_as_it_is() -> None:
    model, (one,) = llamas(lk.LoRA(rank=2), targets=("q_proj",))
    other = lk.attach(model, lk.LoRA(rank=2), name="1", target_modules=("v_proj",))
    scramble(other.named_parameters(), seed=5, size=0.4)
    data = [texts(model, 1, 4), texts(model, 2, 4)]
    found = changes(lk.combine([one, other], how="regmean", batches=data, name="m").adapter)
    assert set(found) == set(changes(one)) | set(changes(other))
    for place, tau in changes(one).items():
        assert 0 < float(found[place].norm()) < float(tau.norm()) * 3
        assert not torch.allclose(found[place], tau, rtol=1e-2)


def test_a_moment_without_an_inverse() -> None:
    X = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64)
    G = torch.diag(torch.tensor([2.0, 4.0, 0.0], dtype=torch.float64))
    torch.testing.assert_close(divided(X, G), torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64))


# -- Fisher ----------------------------------------------------------------------------------------------------------------


def test_fisher_is_the_mean_weighed_by_squared_gradients() -> None:
    """Against autograd on a model in whose weights the adapter has been merged: the gradient of W itself."""
    model, adapters = llamas(lk.LoRA(rank=2), lk.LoHa(rank=2))
    data = [texts(model, seed, 3) for seed in (1, 2)]
    fishers: list[dict[str, Tensor]] = []
    for index, (method, batches) in enumerate(zip((lk.LoRA(rank=2), lk.LoHa(rank=2)), data, strict=True)):
        plain, _ = llamas()
        own = lk.attach(plain, method, name="own", target_modules=("q_proj", "v_proj", "down_proj"))
        scramble(own.named_parameters(), seed=index, size=0.4)
        lk.merge(plain, "own")
        sums: dict[str, Tensor] = {}
        for batch in batches:
            plain.zero_grad()
            for place in changes(adapters[0]):
                plain.get_submodule(place).weight.requires_grad_(True)
            plain(**batch).loss.backward()
            for place in changes(adapters[0]):
                sums[place] = sums.get(place, 0) + plain.get_submodule(place).weight.grad.double() ** 2 / len(batches)
        fishers.append(sums)
    result = lk.combine(adapters, [1.0, 0.5], "fisher", batches=data, name="m")
    for place, found in changes(result.adapter).items():
        first, second = (changes(adapter)[place] for adapter in adapters)
        F, G = fishers[0][place], 0.5 * fishers[1][place]
        wanted = torch.where(F + G > 0, (F * first + G * second) / (F + G), (first + 0.5 * second) / 1.5)
        assert torch.allclose(found, wanted, rtol=1e-2, atol=1e-3 * float(wanted.abs().max())), place
    assert type(result.adapter.method) is lk.Full


def test_a_layer_that_is_called_twice_has_one_gradient() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Any:
            return self.layer(self.layer(x).relu()).square().sum()

    torch.manual_seed(0)
    model = Twice()
    adapter = lk.attach(model, lk.LoRA(rank=2), name="a", target_modules=["layer"])
    x = torch.randn(3, 4)
    found = Findings(Fisher("fisher"), [Live(adapter, "test")], [[{"x": x}]]).at("layer")[0]
    W = model.layer.weight.detach().clone().requires_grad_(True)
    bias = model.layer.bias.detach()
    inner = nn.functional.linear(x, W, bias).relu()
    nn.functional.linear(inner, W, bias).square().sum().backward()
    assert W.grad is not None
    torch.testing.assert_close(found, W.grad.square(), rtol=1e-4, atol=1e-6)


def test_where_nothing_has_a_say_the_mean_stands() -> None:
    taus = [Change(torch.tensor([[1.0, 4.0]]).double()), Change(torch.tensor([[3.0, 8.0]]).double())]
    F = [torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0, 3.0]])]
    found = Fisher("fisher").merged(taus, F, [3.0, 1.0]).dense()
    torch.testing.assert_close(found, torch.tensor([[1.5, 6.0]]).double())


# -- what is refused -------------------------------------------------------------------------------------------------------


def test_what_makes_no_sense_is_refused_by_name(tmp_path: Any) -> None:
    model, adapters = llamas(lk.LoRA(rank=2), lk.LoRA(rank=2))
    data = [texts(model, 1), texts(model, 2)]
    before = set(lk.adapters(model))
    without = [[{"input_ids": batch["input_ids"]} for batch in own] for own in data]
    asks = r"'regmean' measures each adapter on its own data: give batches=\[\[…\], \[…\]\], for each of the 2"
    for options, said in (
        ({"how": "regmean"}, asks),
        ({"how": "regmean", "batches": data[:1]}, "given: 1 of them"),
        ({"how": "regmean", "batches": data[0][0]}, "given: dict"),
        ({"how": "regmean", "batches": [data[0], []]}, "batches is empty"),
        ({"how": "regmean", "batches": [data[0], data[1][0]]}, "combine: batches was given as dict"),
        (
            {"how": "ties", "batches": data},
            "data were given, and ties measures nothing. Those that do: regmean, fisher",
        ),
        ({"how": "fisher", "weights": [1, -1], "batches": data}, "fisher is a mean, and the weights .* a negative one"),
        ({"how": "fisher", "batches": without}, "'fisher' needs gradients, so model"),
    ):
        with pytest.raises(LorakitError, match=said):
            lk.combine(adapters, **options)
    folders = [adapter.save(tmp_path / adapter.name) for adapter in adapters]
    with pytest.raises(LorakitError, match="regmean measures data through the base model, and folders were given"):
        lk.combine(folders, how="regmean", batches=data, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert set(lk.adapters(model)) == before


def test_an_embedding_has_no_moments_and_says_so() -> None:
    model, adapters = llamas(lk.LoRA(rank=2), targets=("embed_tokens",))
    with pytest.raises(
        LorakitError, match=r"'regmean' measures inputs, and .*embed_tokens is an embedding.*measure nothing"
    ):
        lk.combine(adapters, how="regmean", batches=[texts(model, 1)])
