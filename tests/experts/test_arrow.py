"""Arrow: its directions are the SVD's, its choice is the paper's formula, and PEFT's is the same where PEFT is right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorakit as lk
from core import models
from core.models import IDS, randomise
from experts.probes import experts
from lorakit.errors import LorakitError
from lorakit.experts.arrow import ArrowRouter
from lorakit.experts.gates import softmax_over, top_mask

pytestmark = pytest.mark.usefixtures("one_thread")


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def arrow(model: nn.Module, names: list[str], **options: Any) -> ArrowRouter:
    router = lk.route(model, lk.Arrow(**options), names).router
    assert isinstance(router, ArrowRouter)
    return router


def test_the_directions_are_those_of_the_svd() -> None:
    model = models.llama()
    names = experts(model)
    router = arrow(model, names)
    seen = 0
    for index, name in enumerate(names):
        for path, site, delta in lk.adapters(model)[name].deltas():
            W = model.get_submodule(path).base.weight
            change = delta.dense(site.layout.matrix(W)).detach()
            v = router.directions(path)[index]
            assert abs(float(v @ torch.linalg.svd(change).Vh[0])) == pytest.approx(1.0, abs=1e-9), (name, path)
            assert float((change @ v).norm()) == pytest.approx(float(torch.linalg.matrix_norm(change, 2)), rel=1e-9)
            seen += 1
    assert seen == 4 * 14


def test_one_layer_against_the_formula() -> None:
    model = nn.Sequential(nn.Linear(6, 5)).double()
    names = experts(model, target_modules=["0"])
    arrow(model, names, top_k=2, temperature=0.7)
    x = torch.randn(4, 3, 6, dtype=torch.float64)
    W = model[0].base.weight
    changes = [delta.dense(W) for name in names for _, _, delta in lk.adapters(model)[name].deltas()]
    with torch.no_grad():
        found = model(x)
        for row in x.flatten(0, 1).unsqueeze(1):
            scores = [abs(float(row[0] @ torch.linalg.svd(change).Vh[0])) / 0.7 for change in changes]
            best = sorted(range(4), key=lambda e: -scores[e])[:2]
            total = sum(torch.tensor(scores[e]).double().exp() for e in best)
            y = model[0].base(row)
            for e in best:
                y = y + torch.tensor(scores[e]).double().exp() / total * (row @ changes[e].T)
            place = (x.flatten(0, 1) == row).all(1).nonzero()[0, 0]
            assert torch.allclose(found.flatten(0, 1)[place], y[0], atol=1e-6)


def test_top_k_of_all_is_dense_and_the_sign_does_not_matter() -> None:
    model = models.llama()
    names = experts(model)
    router = arrow(model, names, top_k=4)
    every = logits(model)
    with torch.no_grad():
        for buffer in router.buffers():
            buffer.mul_(-1)
    assert torch.equal(logits(model), every)
    lk.detach(model, "arrow")
    arrow(model, names)
    assert torch.equal(logits(model), every)
    lk.detach(model, "arrow")
    arrow(model, names, top_k=1)
    assert not torch.allclose(logits(model), every)


def test_one_expert_is_that_adapter() -> None:
    model = models.llama()
    experts(model)
    arrow(model, ["loha"])
    routed = logits(model)
    with lk.use(model, "loha"):
        assert torch.allclose(routed, logits(model), atol=1e-10)


def test_an_expert_that_is_not_in_a_layer_takes_no_weight_there() -> None:
    model = models.llama().double()
    randomise(lk.attach(model, lk.LoRA(rank=2), name="all"))
    randomise(lk.attach(model, lk.LoRA(rank=2), name="some", target_modules=["q_proj"]))
    arrow(model, ["all", "some"])
    routed = logits(model)
    mixed = {path for path, *_ in lk.adapters(model)["some"].deltas()}
    lk.detach(model, "arrow")
    # in the other layers the one expert that is there has all the weight: the same as without the second one's layers
    other = models.llama().double()
    randomise(lk.attach(other, lk.LoRA(rank=2), name="all"))
    lk.adapters(other)["all"].load_state_dict(lk.adapters(model)["all"].state_dict())
    arrow(other, ["all"])
    assert not torch.allclose(routed, logits(other))
    for path, _, delta in lk.adapters(model)["some"].deltas():
        assert path in mixed
        torch.nn.init.zeros_(delta.B)
    arrow(model, ["all", "some"])  # a change that is zero has no direction either
    assert torch.allclose(logits(model), logits(other), atol=1e-12)


def test_ties_go_to_the_first() -> None:
    scores = torch.tensor([[1.0, 2.0, 2.0, 2.0], [3.0, 3.0, 3.0, 3.0]])
    assert top_mask(scores, 2).tolist() == [[False, True, True, False], [True, True, False, False]]
    assert top_mask(scores, None).all()
    assert top_mask(scores, 9).all()
    weights = softmax_over(scores, top_mask(scores, 2))
    assert weights.tolist() == [[0.0, 0.5, 0.5, 0.0], [0.5, 0.5, 0.0, 0.0]]
    assert softmax_over(scores, torch.zeros(2, 4, dtype=torch.bool)).tolist() == [[0.0] * 4] * 2


def test_gates_are_computed_in_float32() -> None:
    model = nn.Sequential(nn.Linear(64, 5, bias=False)).bfloat16()
    for name in "ab":
        randomise(lk.attach(model, lk.LoRA(rank=2), name=name, target_modules=["0"]))
    router = arrow(model, ["a", "b"])
    x = 8 * torch.randn(50, 64).bfloat16()
    seen: list[Tensor] = []
    whole = router.weights
    router.weights = lambda *args: seen.append(whole(*args)) or seen[-1]  # type: ignore[method-assign, func-returns-value]
    model(x)
    exact = softmax_over((x.double() @ router.directions("0").double().T).abs(), torch.ones(50, 2, dtype=torch.bool))
    assert seen[0].dtype == torch.float32
    assert float((seen[0] - exact).abs().max()) < 1e-5


def test_what_is_refused() -> None:
    model = models.llama()
    names = experts(model)
    with pytest.raises(LorakitError, match="top_k=5 for 4 adapters"):
        arrow(model, names, top_k=5)
    for options, said in (({"top_k": 0}, "top_k was given as 0"), ({"temperature": 0}, "above 0")):
        with pytest.raises(LorakitError, match=said):
            lk.Arrow(**options)


def test_peft_agrees_where_its_power_iteration_has_converged(tmp_path: Path) -> None:
    """PEFT 0.21 finds the directions by fifteen steps of power iteration from a random start. With singular values far
    apart that is enough, and the two agree; with near ones its directions are off, and so is its choice."""
    peft = pytest.importorskip("peft")
    from peft.tuners.lora.arrow import create_arrow_model

    def adapters(model: nn.Module, ratio: float) -> None:
        for index, name in enumerate("abc"):
            adapter = lk.attach(model, lk.LoRA(rank=2, alpha=4.0), name=name)
            generator = torch.Generator().manual_seed(index)
            for _, _, delta in adapter.deltas():
                out, in_ = delta.shape.out, delta.shape.in_
                Q = torch.linalg.qr(torch.randn(out, 2, generator=generator)).Q
                P = torch.linalg.qr(torch.randn(in_, 2, generator=generator)).Q
                delta.set_factors(Q * torch.tensor([1.0, ratio]), P.T)

    gaps = {}
    for ratio in (0.1, 0.97):
        ours = models.llama()
        adapters(ours, ratio)
        folders = [str(lk.adapters(ours)[name].save(tmp_path / f"{ratio}-{name}")) for name in "abc"]
        arrow(ours, list("abc"), top_k=2)
        config = peft.ArrowConfig(top_k=2, router_temperature=1.0, rng_seed=0)
        theirs = create_arrow_model(models.llama(), folders, config).eval()
        gaps[ratio] = float((logits(theirs) - logits(ours)).abs().max())
        layer = theirs.base_model.model.model.layers[0].mlp.up_proj
        found = next(module for module in layer.modules() if hasattr(module, "prototypes")).prototypes
        exact = lk.adapters(ours)["arrow"].router.directions("model.layers.0.mlp.up_proj")  # type: ignore[union-attr]
        gaps[f"cos {ratio}"] = float((found * exact).sum(1).abs().min())
    assert gaps[0.1] < 1e-4, gaps
    assert gaps["cos 0.1"] > 1 - 1e-5, gaps
    assert gaps["cos 0.97"] < 0.99, gaps
    assert gaps[0.97] > 100 * gaps[0.1], gaps
