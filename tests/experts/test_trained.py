"""X-LoRA and MoLE: gates that train over frozen adapters, against their formulas; in caches, files and a training run."""

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
from lorakit.train.step.loss import causal_loss, padded_loss
from lorakit.train.step.packing import pack
from training import tiny

pytestmark = pytest.mark.usefixtures("one_thread")


def logits(model: nn.Module, ids: Tensor = IDS, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **options).logits


def routed(model: Any, spec: Any, names: list[str], std: float = 0.5) -> Any:
    adapter = lk.route(model, spec, names)
    with torch.no_grad():
        for parameter in adapter.router.parameters():
            parameter.add_(std * torch.randn_like(parameter))
    adapter.router.double()
    return adapter


def pair(model: Any) -> list[str]:
    return experts(model, {"a": lk.LoRA(rank=2), "b": lk.LoRA(rank=3, rslora=True)})


# -- X-LoRA ----------------------------------------------------------------------------------------------------------------


def test_xlora_weights_every_layer_by_the_base_models_hidden_state() -> None:
    model = models.llama()
    names = experts(model)
    adapter = routed(model, lk.XLoRA(temperature=0.8, scale=1.5), names)
    x = torch.randn(3, 4, 8, dtype=torch.float64)
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    handles = [
        module.register_forward_hook(lambda m, args, y: seen.__setitem__(m.path, (args[0], y)))
        for module in model.modules()
        if hasattr(module, "deltas") and hasattr(module, "state")
    ]
    logits(model)
    for handle in handles:
        handle.remove()
    with torch.no_grad(), lk.use(model, None):
        hidden = model.model(IDS).last_hidden_state
        lam = adapter.router.layers(hidden).reshape(3, 4, 14, 4).div(0.8).softmax(-1) * 1.5
        for index, (path, (x, y)) in enumerate(seen.items()):
            layer = model.get_submodule(path)
            place = adapter.router.places[path, ""]
            assert place < 14 > index
            expected = layer.base(x)
            for e, name in enumerate(names):
                change = layer.deltas_of(name)[""].dense(layer.base.weight)
                expected = expected + lam[:, :, place, e, None] * (x @ change.T)
            assert torch.allclose(y, expected, atol=1e-10), path


@pytest.mark.parametrize("options", [{}, {"layerwise": False, "top_k": 2}, {"depth": 3, "width": 5}], ids=str)
def test_a_cache_gives_what_the_whole_text_gives(options: dict[str, Any]) -> None:
    model = models.llama()
    names = experts(model)
    routed(model, lk.XLoRA(**options), names)
    with torch.no_grad():
        whole = model(IDS).logits
        step = model(IDS[:, :2], use_cache=True)
        rest = [step.logits]
        for place in (2, 3):
            step = model(IDS[:, place : place + 1], past_key_values=step.past_key_values, use_cache=True)
            rest.append(step.logits)
    assert torch.allclose(torch.cat(rest, 1), whole, atol=1e-10)
    own = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    own["attention_mask"] = torch.ones_like(IDS)
    for beams in (1, 2):
        cached = model.generate(IDS, num_beams=beams, **own)
        assert torch.equal(cached, model.generate(IDS, num_beams=beams, use_cache=False, **own)), beams


def test_the_classifier_alone_trains_and_by_the_right_gradient() -> None:
    model = models.gpt2()  # all of it in float64; Llama's norms are in float32
    adapter = routed(model, lk.XLoRA(), pair(model))
    model(IDS).logits.square().sum().backward()
    assert sorted(name for name, p in adapter.named_parameters() if p.grad is not None) == [
        "router.layers.0.bias",
        "router.layers.0.weight",
    ]
    bias = adapter.router.layers[0].bias
    slope, step = bias.grad.clone(), 1e-6
    for place in (0, 5):
        with torch.no_grad():
            values = []
            for sign in (1, -1):
                bias[place] += sign * step
                values.append(float(logits(model).square().sum()))
                bias[place] -= sign * step
        assert (values[0] - values[1]) / (2 * step) == pytest.approx(float(slope[place]), rel=1e-5)


def test_xlora_refuses_what_it_cannot_do() -> None:
    model = models.llama()
    names = pair(model)
    for options, said in (({"depth": 0}, "depth was given as 0"), ({"top_k": 0}, "top_k was given as 0")):
        with pytest.raises(LorakitError, match=said):
            lk.XLoRA(**options)
    with pytest.raises(LorakitError, match="top_k=3 for 2 adapters"):
        lk.route(model, lk.XLoRA(top_k=3), names)
    routed(model, lk.XLoRA(), names)
    with pytest.raises(LorakitError, match="outside a call of the model's decoder"):
        model.model.layers[0](torch.randn(1, 2, 8, dtype=torch.float64), position_embeddings=(torch.ones(1, 2, 4),) * 2)


# -- MoLE ------------------------------------------------------------------------------------------------------------------


def test_mole_against_the_formula() -> None:
    model = nn.Sequential(nn.Linear(7, 5)).double()
    names = experts(model, {"a": lk.LoRA(rank=2), "b": lk.LoRA(rank=3, rslora=True), "c": lk.AdaLoRA(rank=2)})
    adapter = routed(model, lk.MoLE(temperature=0.5), names)
    x = torch.randn(2, 3, 7, dtype=torch.float64)
    e, tau = adapter.router.e0, adapter.router.t0.exp()
    with torch.no_grad():
        found = model(x)
        W = model[0].base.weight
        changes = [delta.dense(W) for name in names for _, _, delta in lk.adapters(model)[name].deltas()]
        E = torch.stack([x @ change.T for change in changes], dim=-2)
        flat = E.flatten(-2) / E.flatten(-2).norm(dim=-1, keepdim=True)
        w = ((flat @ e.flatten(1).T) / tau).softmax(-1)
        expected = model[0].base(x) + (w[..., None] * E).sum(-2)
    assert torch.allclose(found, expected, atol=1e-10)


def test_mole_starts_with_equal_weights_and_refuses_what_has_no_factors() -> None:
    model = models.llama()
    names = pair(model)
    lk.route(model, lk.MoLE(), names)
    equal = logits(model)
    with lk.use(model, {"a": 0.5, "b": 0.5}):
        assert torch.allclose(equal, logits(model), atol=1e-6)
    other = models.llama()
    with pytest.raises(LorakitError, match=r"'dora' \(dora\) is more than a product"):
        lk.route(other, lk.MoLE(), experts(other))


@pytest.mark.parametrize("spec", [lk.XLoRA(), lk.MoLE(balance=0.3)], ids=lambda spec: spec.name)
def test_flat_rows_and_padded_ones_train_alike(spec: Any) -> None:
    rows = tiny.rows(4, prefix=18)
    results = []
    for flat in (False, True):
        model = tiny.llama(torch.float64)
        torch.manual_seed(2)
        adapter = routed(model, spec, pair(model))
        with lk.noted(model) as extra:
            loss = (causal_loss(model, pack(rows)) if flat else padded_loss(model, rows))[0]
        added = sum(own() for own in extra)
        (loss + (0 if spec.name == "mole" and not flat else added * 0)).backward()
        results.append((loss.item(), [p.grad for p in adapter.parameters()]))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    for one, other in zip(results[0][1], results[1][1], strict=True):
        assert torch.allclose(one, other, atol=1e-6 * float(one.abs().max() + 1))


# -- files and runs --------------------------------------------------------------------------------------------------------

SPECS = [lk.Arrow(top_k=1), lk.XLoRA(depth=2, width=6), lk.MoLE()]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_saved_with_its_experts_and_loaded_to_the_bit(spec: Any, tmp_path: Path) -> None:
    model = models.llama()
    for name in "ab":
        randomise(lk.attach(model, lk.LoRA(rank=2), name=name))
    adapter = lk.route(model, spec, ["b", "a"])
    with torch.no_grad():
        for parameter in adapter.router.parameters():  # type: ignore[union-attr]
            parameter.add_(0.3 * torch.randn_like(parameter))
    before = logits(model)
    adapter.save(tmp_path / "routed")
    adapter.save(tmp_path / "routed")  # over itself
    assert sorted(path.name for path in (tmp_path / "routed" / "experts").iterdir()) == ["a", "b"]

    other = models.llama()
    again = lk.load(other, tmp_path / "routed")
    assert again.method == spec
    assert again.router is not None
    assert tuple(again.router.members) == ("b", "a")  # type: ignore[arg-type]
    with lk.use(other, "routed"):
        assert torch.equal(logits(other), before)

    shared = models.llama()
    lk.load(shared, tmp_path / "routed" / "experts" / "a")
    lk.load(shared, tmp_path / "routed", name="r")  # the one that is there is the same
    with lk.use(shared, "r"):
        assert torch.equal(logits(shared), before)

    wrong = models.llama()
    torch.manual_seed(9)
    randomise(lk.attach(wrong, lk.LoRA(rank=2), name="a"))
    with pytest.raises(LorakitError, match="another one of that name"):
        lk.load(wrong, tmp_path / "routed")
    assert set(lk.adapters(wrong)) == {"a"}
    lk.adapters(model)["a"].save(tmp_path / "routed" / "experts" / "b")
    fresh = models.llama()
    with pytest.raises(LorakitError, match="is not the adapter that the router"):
        lk.load(fresh, tmp_path / "routed")
    assert lk.adapters(fresh) == {}


@pytest.mark.parametrize("method", ["mixlora", "xlora", "mole"])
def test_a_training_run(method: str, tmp_path: Path) -> None:
    """The Trainer over a mixture and over routers: the loss falls, the experts behind a router stay, a resumed run agrees."""
    from lorakit.train.config.run import load_config
    from lorakit.train.step.support import choose_path
    from lorakit.train.trainer import LoraTrainer

    model = tiny.llama()
    flags = ["model=x", "data.train=x", f"train.output={tmp_path}/out", "train.max_steps=12", "train.batch_size=4"]
    flags += ["train.learning_rate=0.02", "train.logging_steps=1", "train.report_to=[]"]
    if method == "mixlora":
        config = load_config(
            None, [*flags, "method={name: mixlora, experts: 3, top_k: 2, inner: {name: lora, rank: 2}}"]
        )
        adapter = lk.attach(model, config.method)
    else:
        config = load_config(None, [*flags, f"method={method}", "adapters=[a, b]"])
        for name in "ab":
            randomise(lk.attach(model, lk.LoRA(rank=2), name=name))
        adapter = lk.route(model, config.method, ["a", "b"])
    frozen = {
        n: p.clone() for name in "ab" if method != "mixlora" for n, p in lk.adapters(model)[name].named_parameters()
    }
    start = {name: value.clone() for name, value in adapter.state_dict().items()}
    trainer = LoraTrainer(model, adapter, config, tiny.rows(16), path=choose_path(model))
    assert trainer.path.name.startswith("no padding")
    trainer.train_from()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-3:]) < sum(losses[:3])
    moved = [name for name, value in adapter.state_dict().items() if not torch.equal(value, start[name])]
    assert any(name.startswith("router.") for name in moved)
    if method != "mixlora":
        after = {n: p for name in "ab" for n, p in lk.adapters(model)[name].named_parameters()}
        assert all(torch.equal(frozen[name], after[name]) for name in frozen)


def test_what_a_run_refuses(tmp_path: Path) -> None:
    from lorakit.train.config.run import load_config

    for flags, said in (
        (["method=xlora"], "name their folders in adapters"),
        (["method=lora", "adapters=[a]"], "adapters are for routers"),
    ):
        with pytest.raises(LorakitError, match=said):
            load_config(None, ["model=x", "data.train=x", *flags])
