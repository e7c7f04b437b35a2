"""LoRAHub: the search finds known minima, and on a planted task the weights that made it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorakit as lk
from core import models
from core.models import IDS
from experts.probes import experts
from lorakit.errors import LorakitError
from lorakit.experts.lorahub import Blended, search

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_search_finds_minima_within_its_bound() -> None:
    target = torch.tensor([0.7, -0.3, 1.1, 0.0, -1.2], dtype=torch.float64)
    scale = torch.tensor([1.0, 3.0, 2.0, 9.0, 5.0], dtype=torch.float64)
    asked: list[Tensor] = []

    def bowl(w: Tensor) -> float:
        asked.append(w)
        return float((scale * (w - target).square()).sum())

    best = search(bowl, 5, evaluations=600, bound=1.5, seed=3)
    assert float((best - target).abs().max()) < 1e-3
    assert len(asked) == 600
    assert all(float(w.abs().max()) <= 1.5 for w in asked)
    assert torch.equal(asked[0], torch.zeros(5, dtype=torch.float64))
    assert torch.equal(best, search(bowl, 5, evaluations=600, bound=1.5, seed=3))
    beyond = search(lambda w: float((w - 9).square().sum()), 2, evaluations=200, bound=1.5)
    assert beyond.tolist() == pytest.approx([1.5, 1.5], abs=1e-6)
    lone = search(lambda w: float((w - 0.4).square().sum()), 1, evaluations=150, bound=1.5)
    assert lone.tolist() == pytest.approx([0.4], abs=1e-3)


class Regression(nn.Module):
    """A layer whose loss is the distance to given outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(9, 8)

    def forward(self, x: Tensor, labels: Tensor) -> Any:
        return type("Output", (), {"loss": (self.layer(x) - labels).square().mean()})()


def test_planted_weights_are_found() -> None:
    model = Regression().double()
    names = experts(model, target_modules=["layer"])
    planted = dict(zip(names, [0.8, 0.0, -0.6, 0.3], strict=True))
    x = torch.randn(12, 9, dtype=torch.float64)
    with torch.no_grad(), lk.use(model, planted):
        y = model.layer(x)
    model.train()
    adapter = lk.route(
        model,
        lk.LoRAHub(evaluations=800, penalty=0.0),
        names,
        batches=[{"x": x[:6], "labels": y[:6]}, {"x": x[6:], "labels": y[6:]}],
    )
    router = adapter.router
    assert isinstance(router, Blended)
    assert router.blend() == pytest.approx(planted, abs=1e-2)
    assert len(router.losses) == 800
    assert model.training
    with torch.no_grad():
        routed = model.layer(x)
        with lk.use(model, router.blend()):
            assert torch.allclose(routed, model.layer(x), atol=1e-12)


def test_the_penalty_draws_weights_to_zero() -> None:
    def size(penalty: float) -> float:
        model = Regression().double()
        names = experts(model, target_modules=["layer"])
        x = torch.randn(8, 9, dtype=torch.float64)
        with torch.no_grad(), lk.use(model, names[0]):
            batches = [{"x": x, "labels": model.layer(x)}]
        spec = lk.LoRAHub(evaluations=150, penalty=penalty)
        router = lk.route(model, spec, names, batches=batches).router
        assert isinstance(router, Blended)
        return sum(map(abs, router.blend().values()))

    assert size(100.0) < 0.1 * size(0.0)


def test_examples_are_asked_for_and_a_failed_search_leaves_nothing() -> None:
    model = models.llama()
    names = experts(model)
    for batches in (None, [], [{"input_ids": IDS}], {"a": 1}):
        with pytest.raises(LorakitError, match="a few examples"):
            lk.route(model, lk.LoRAHub(), names, batches=batches)
        assert set(lk.adapters(model)) == set(names)
    with pytest.raises(LorakitError, match="evaluations was given as 0"):
        lk.LoRAHub(evaluations=0)
