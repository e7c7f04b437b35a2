"""Adapters made smaller: by norm, by the loss that is measured, by first order; and scaled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lorakit as lk
from lorakit.algebra.sources import Live
from lorakit.errors import LorakitError
from reference.models import MODELS, assert_same, inputs, logits, scramble, twin


def adapted(method: Any = None, targets: Any = ("q_proj", "down_proj"), **options: Any) -> tuple[Any, Any]:
    model = twin(MODELS["llama"]())
    adapter = lk.attach(model, method or lk.LoRA(rank=4), name="a", target_modules=targets, **options)
    scramble(adapter.named_parameters(), size=0.3)
    return model.eval(), adapter


def batches(count: int = 2) -> list[dict[str, Any]]:
    ids = inputs("llama", rows=3)["input_ids"]
    return [{"input_ids": ids.roll(k, 0), "labels": ids.roll(k, 0)} for k in range(count)]


def loss(model: Any, route: Any, given: list[dict[str, Any]]) -> float:
    with torch.no_grad(), lk.use(model, route):
        return sum(float(model(**batch).loss) for batch in given) / len(given)


def test_the_smallest_layers_go_by_norm() -> None:
    model, adapter = adapted()
    sizes = {place: float(Live(adapter, "t").change(place).norm()) for place in Live(adapter, "t").places()}
    found = lk.prune(adapter, keep=0.5)
    smallest = sorted(sizes, key=lambda place: sizes[place])[:3]
    assert set(found.dropped) == set(smallest)
    lost = sum(sizes[place] ** 2 for place in smallest) / sum(size**2 for size in sizes.values())
    assert found.made.error == pytest.approx(lost**0.5)
    assert all(found.made.errors[place] == 1.0 for place in smallest)
    for path, _, delta in adapter.deltas():
        if path in smallest:
            with torch.no_grad():
                delta.B.zero_()
    with lk.use(model, "a"):
        wanted = logits(model, "llama")
    with lk.use(model, "a-pruned"):
        assert_same(logits(model, "llama"), wanted)


def test_ranks_compete_over_all_layers() -> None:
    _, adapter = adapted()
    with torch.no_grad():
        for index, (_, _, delta) in enumerate(adapter.deltas()):
            delta.B.mul_(3.0**-index)
    found = lk.prune(adapter, keep=9, what="ranks")
    assert sum(rank for rank in found.made.ranks.values() if rank) == 9
    values = sorted((value for one in found.effects.values() for value in one), reverse=True)
    assert found.made.error == pytest.approx((sum(v**2 for v in values[9:]) / sum(v**2 for v in values)) ** 0.5)
    assert found.dropped


def test_the_rise_of_the_loss_is_measured() -> None:
    model, adapter = adapted()
    given = batches()
    with lk.use(model, "a"):
        before = logits(model, "llama")
    found = lk.prune(adapter, keep=4, by="loss", batches=given)
    with lk.use(model, "a"):
        assert_same(logits(model, "llama"), before)  # deltas taken out for a measurement are back
    whole = loss(model, "a", given)
    for place, (rise,) in found.effects.items():
        other = lk.combine([adapter], [1.0], layer_weights={place.replace(".", r"\."): [0.0]}, name="without")
        assert rise == pytest.approx(loss(model, other.adapter.name, given) - whole, abs=1e-9)
        lk.detach(model, "without")
    assert set(found.dropped) == set(sorted(found.effects, key=lambda place: found.effects[place])[:2])
    assert found.loss == pytest.approx((whole, loss(model, "a-pruned", given)))


def test_the_first_order_is_the_derivative() -> None:
    """|σ ∂L/∂σ| by finite differences of the scale of one rank."""
    model, adapter = adapted(lk.LoRA(rank=2), targets=("q_proj",))
    given = batches(1)
    found = lk.prune(adapter, keep=4, what="ranks", by="loss", batches=given)
    place = next(iter(found.effects))
    spectrum = Live(adapter, "t").change(place).spectrum()
    twin_adapter = lk.resize(adapter, energy=1.0, name="twin").adapter
    delta = next(delta for path, _, delta in twin_adapter.deltas() if path == place)
    ids = given[0]["input_ids"]

    def precise() -> float:
        with torch.no_grad(), lk.use(model, "twin"):
            y = model(ids).logits
        return float(torch.nn.functional.cross_entropy(y[:, :-1].reshape(-1, y.shape[-1]), ids[:, 1:].reshape(-1)))

    for index, effect in enumerate(found.effects[place]):
        step = 1e-2  # Llama's norms are in float32, so that a small one drowns
        column = delta.B[:, index].detach().clone()
        ends = []
        for factor in (1 + step, 1 - step, 1.0):
            with torch.no_grad():
                delta.B[:, index] = column * factor
            ends.append(precise())
        assert effect == pytest.approx(abs(ends[0] - ends[1]) / (2 * step), rel=2e-2)
    assert len(spectrum.values) == 2
    assert "a-exact" not in lk.adapters(model)


def test_a_folder_alone_gives_the_same(tmp_path: Path) -> None:
    model, adapter = adapted(modules_to_save=["norm"])
    adapter.save(tmp_path / "a")
    for what in ("layers", "ranks"):
        there = lk.prune(adapter, keep=0.5, what=what, name=what)
        here = lk.prune(tmp_path / "a", output=tmp_path / what, keep=0.5, what=what)
        assert here.dropped == there.dropped
        assert here.made.error == pytest.approx(there.made.error, rel=1e-5)
        again = twin(MODELS["llama"]())
        lk.load(again, tmp_path / what, name="x")
        with lk.use(again, "x"), lk.use(model, what):
            torch.testing.assert_close(logits(again, "llama"), logits(model, "llama"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "method",
    [lk.LoRA(rank=3, alpha=5.0), lk.DoRA(inner=lk.LoRA(rank=2)), lk.LoHa(rank=2), lk.OFT(block_size=4)],
    ids=lambda method: method.name,
)
def test_scale_is_what_a_weight_does(method: Any, tmp_path: Path) -> None:
    model, adapter = adapted(method, modules_to_save=["norm"])
    assert lk.scale(adapter, 0.5).error == 0.0
    with lk.use(model, {"a": 0.5}):
        wanted = logits(model, "llama")
    with lk.use(model, "a-scaled"):
        torch.testing.assert_close(logits(model, "llama"), wanted)


def test_scale_of_a_folder(tmp_path: Path) -> None:
    model, adapter = adapted(lk.LoRA(rank=3, alpha=5.0, rslora=True))
    adapter.save(tmp_path / "a")
    lk.scale(tmp_path / "a", -1.5, output=tmp_path / "b")
    again = twin(MODELS["llama"]())
    lk.load(again, tmp_path / "b", name="x")
    with lk.use(again, "x"), lk.use(model, {"a": -1.5}):
        torch.testing.assert_close(logits(again, "llama"), logits(model, "llama"))


def test_what_is_wrong_is_said() -> None:
    _, adapter = adapted()
    for options, words in (
        ({"keep": 0}, "keep was given as 0; it is a share"),
        ({"keep": 1.5}, "keep was given as 1.5"),
        ({"keep": 7}, "the adapter has 6 layers"),
        ({"keep": 1, "what": "rows"}, "what was given as 'rows'; it is layers or ranks"),
        ({"keep": 1, "by": "luck"}, "by was given as 'luck'"),
        ({"keep": 1, "by": "loss"}, "give batches="),
        ({"keep": 1, "by": "loss", "batches": []}, "not empty"),
        ({"keep": 1, "by": "loss", "batches": [inputs("llama")]}, "gives no loss for a batch with input_ids"),
    ):
        with pytest.raises(LorakitError, match=words):
            lk.prune(adapter, **options)
    model = twin(MODELS["gpt2"]())
    bitfit = lk.attach(model, lk.BitFit(), name="b", target_modules=["c_attn"])
    with pytest.raises(LorakitError, match="bitfit changes the bias of"):
        lk.prune(bitfit, keep=1)
