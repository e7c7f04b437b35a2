"""The laws of routers, over experts of several methods and layers of every kind that has tokens.

constant weights = the blend, one-hot = that adapter alone, weights per token = token by token, gradients, rows, nothing
written; and each law failing on a planted bug.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lorakit as lk
from core import models
from core.models import IDS
from experts.probes import Given, experts, given
from lorakit.core import mixed
from lorakit.core.state import state_of
from lorakit.errors import LorakitError

WEIGHTS = [0.7, -0.4, 1.3, 0.2]


pytestmark = pytest.mark.usefixtures("one_thread")


def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


class One(nn.Module):
    """A model of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def linear() -> tuple[One, Tensor, dict[str, Any]]:
    return One(nn.Linear(6, 5)), torch.randn(3, 4, 6, dtype=torch.float64), {}


def transposed() -> tuple[One, Tensor, dict[str, Any]]:
    return One(Conv1D(5, 6)), torch.randn(3, 4, 6, dtype=torch.float64), {}


def embedding() -> tuple[One, Tensor, dict[str, Any]]:
    return One(nn.Embedding(7, 5)), torch.randint(0, 7, (3, 4)), {"target_modules": ["layer"]}


def parts() -> tuple[One, Tensor, dict[str, Any]]:
    split = {"layer": {"q": (0, 3), "k": [(3, 5), (6, 7)]}}
    return One(nn.Linear(6, 7)), torch.randn(3, 4, 6, dtype=torch.float64), {"parts": split}


LAYERS: list[Callable[[], tuple[One, Tensor, dict[str, Any]]]] = [linear, transposed, embedding, parts]
EVERY_LAYER = pytest.mark.parametrize("make", LAYERS, ids=lambda make: make.__name__)


def layered(make: Callable[[], tuple[One, Tensor, dict[str, Any]]]) -> tuple[One, Tensor, list[str]]:
    model, x, options = make()
    names = experts(model, **{"target_modules": ["layer"], **options})
    return model, x, names


# -- the laws --------------------------------------------------------------------------------------------------------------


def constant_weights_are_the_blend(model: nn.Module, x: Tensor, names: list[str]) -> None:
    given(model, names, WEIGHTS)
    with torch.no_grad():
        routed = model(x)
        with lk.use(model, dict(zip(names, WEIGHTS, strict=True))):
            assert torch.allclose(routed, model(x), atol=1e-12)


def one_hot_weights_are_that_adapter(model: nn.Module, x: Tensor, names: list[str]) -> None:
    router = given(model, names)
    with torch.no_grad():
        for index, name in enumerate(names):
            router.give(torch.eye(len(names))[index])
            routed = model(x)
            with lk.use(model, name):
                assert torch.allclose(routed, model(x), atol=1e-12), name


def weights_per_token_are_token_by_token(model: nn.Module, x: Tensor, names: list[str]) -> None:
    w = torch.randn(*x.shape[:2], len(names))
    given(model, names, w)
    with torch.no_grad():
        routed = model(x)
        for row in range(x.shape[0]):
            for token in range(x.shape[1]):
                with lk.use(model, dict(zip(names, w[row, token].tolist(), strict=True))):
                    alone = model(x[row : row + 1, token : token + 1])
                assert torch.allclose(routed[row, token], alone[0, 0], atol=1e-10), (row, token)


LAWS = (constant_weights_are_the_blend, one_hot_weights_are_that_adapter, weights_per_token_are_token_by_token)


@EVERY_LAYER
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_law(law: Callable[..., None], make: Any) -> None:
    law(*layered(make))


def test_constant_weights_are_the_blend_in_a_whole_model() -> None:
    for make in (models.llama, models.gpt2):
        model = make()
        names = experts(model)
        given(model, names, WEIGHTS)
        routed = logits(model)
        with lk.use(model, dict(zip(names, WEIGHTS, strict=True))):
            assert torch.allclose(routed, logits(model), atol=1e-10)


# -- each law fails on a planted bug ---------------------------------------------------------------------------------------


def _forgets_the_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = mixed.side_by_side
    planted = lambda low: whole([(delta, low[0][1]) for delta, _ in low])  # noqa: E731 - all with the first one's weight
    monkeypatch.setattr(mixed, "side_by_side", planted)


def _last_token_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = mixed.router_weights

    def planted(*args: Any) -> Tensor:
        found = whole(*args)
        return found[:, -1:] if found.ndim > 2 else found

    monkeypatch.setattr(mixed, "router_weights", planted)


@pytest.mark.parametrize(
    ("plant", "law"),
    [
        (_forgets_the_scale, constant_weights_are_the_blend),
        (_forgets_the_scale, one_hot_weights_are_that_adapter),
        (_last_token_for_all, weights_per_token_are_token_by_token),
    ],
)
def test_a_planted_bug_is_caught(plant: Any, law: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        law(*layered(linear))


# -- gradients -------------------------------------------------------------------------------------------------------------


@EVERY_LAYER
def test_gradient_of_the_weights(make: Any) -> None:
    model, x, names = layered(make)
    router = given(model, names, torch.randn(*x.shape[:2], len(names)))
    if x.is_floating_point():
        x.requires_grad_(True)

    def run(w: Tensor) -> Tensor:
        return _with(router, w, lambda: model(x))

    assert torch.autograd.gradcheck(run, (router.w.detach().clone().requires_grad_(True),))


def _with(router: Any, w: Tensor, run: Callable[[], Tensor]) -> Tensor:
    held = router._parameters.pop("w")
    router.w = w
    try:
        return run()
    finally:
        del router.w
        router._parameters["w"] = held


def test_only_the_router_trains() -> None:
    model = models.llama()
    names = experts(model)
    given(model, names, WEIGHTS)
    model(input_ids=IDS).logits.square().sum().backward()
    adapters = lk.adapters(model)
    assert [name for name, adapter in adapters.items() if adapter.num_parameters(trainable=True)] == ["given"]
    assert all(parameter.grad is None for name in names for parameter in adapters[name].parameters())
    assert adapters["given"].router is not None
    grad = adapters["given"].router.w.grad
    assert isinstance(grad, Tensor)
    assert bool((grad != 0).all())


# -- beside other routes ---------------------------------------------------------------------------------------------------


def test_a_router_in_a_row_of_its_own_and_in_a_blend() -> None:
    model = models.llama()
    names = experts(model)
    router = given(model, names)
    router.give(torch.randn(3, 4, 4))
    whole = router.w.detach().clone()
    route: list[Any] = ["given", None, {"given": 0.5, "dora": 2.0}]
    with lk.use(model, route):
        together = logits(model)
    for row, own in enumerate(route):
        router.give(whole[row : row + 1])
        with lk.use(model, own):
            assert torch.allclose(together[row : row + 1], logits(model, IDS[row : row + 1]), atol=1e-10), own


def test_forward_writes_nothing_and_detach_leaves_no_trace() -> None:
    model = models.llama().double()
    plain = logits(model)
    names = experts(model)
    given(model, names, WEIGHTS)
    state = state_of(model)
    routing, before = state.routing, copy.deepcopy({k: v.state_dict() for k, v in lk.adapters(model).items()})
    first, second = logits(model), logits(model)
    assert torch.equal(first, second)
    assert state.routing is routing
    after = {k: v.state_dict() for k, v in lk.adapters(model).items()}
    assert all(torch.equal(before[k][name], tensor) for k in after for name, tensor in after[k].items())
    lk.detach(model, "given")
    assert state.routers == {}
    assert state.routing.names == ()
    lk.detach(model)
    assert torch.equal(logits(model), plain)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


# -- what is refused -------------------------------------------------------------------------------------------------------


def test_what_is_refused() -> None:
    model = models.llama()
    names = experts(model)
    lk.attach(model, lk.LoRA(rank=1), name="whole", modules_to_save=["norm"])
    cases: list[tuple[Any, str]] = [
        (lambda: lk.route(model, Given(), ["lroa"]), 'did you mean "lora"'),
        (lambda: lk.route(model, Given(), []), "different adapters"),
        (lambda: lk.route(model, Given(), ["lora", "lora"]), "different adapters"),
        (lambda: lk.route(model, lk.LoRA(), names), "no router's spec"),
        (lambda: lk.route(model, Given(), names, name="lora"), "an adapter 'lora' is on this model already"),
        (lambda: lk.route(model, Given(), names, batches=[1]), "measures nothing"),
        (lambda: lk.route(model, Given(), ["whole"]), "replaces tensors of model.norm"),
        (lambda: lk.attach(model, lk.Arrow(), name="arrow"), "lk.route"),
    ]
    before = set(lk.adapters(model))
    for attempt, said in cases:
        with pytest.raises(LorakitError, match=said):
            attempt()
        assert set(lk.adapters(model)) == before
    given(model, names, WEIGHTS)
    after: list[tuple[Any, str]] = [
        (lambda: lk.route(model, Given(), ["given"], name="again"), "not nested"),
        (lambda: lk.detach(model, "lora"), "routed by 'given'"),
        (lambda: lk.merge(model, "given"), "weighs its experts for each token"),
        (lambda: lk.activate(model, {"given": 1.0, "whole": 1.0}) or logits(model), "replaces whole tensors"),
    ]
    for attempt, said in after:
        with pytest.raises(LorakitError, match=said):
            attempt()
    with lk.merged(model, "lora"), pytest.raises(LorakitError, match="merged into the weights"):
        lk.activate(model, "given")


def test_a_convolution_has_no_tokens() -> None:
    model = nn.Sequential(nn.Conv1d(4, 6, 3))
    lk.attach(model, lk.LoRA(rank=2), name="a", target_modules=["0"])
    with pytest.raises(LorakitError, match="convolution layer, which has no tokens"):
        lk.route(model, Given(), ["a"])
