"""MixLoRA against the paper's formula, in training on either path, in rows and caches, in files, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lorakit as lk
from core import models
from core.models import IDS, randomise
from lorakit.errors import LorakitError
from lorakit.experts import mixlora
from lorakit.experts.gates import balance, z_loss
from lorakit.train.step.loss import causal_loss, padded_loss
from lorakit.train.step.packing import pack
from training import tiny

E, K = 4, 2


pytestmark = pytest.mark.usefixtures("one_thread")


def mixed(model: Any, name: str = "mix", inner: Any = None, **options: Any) -> Any:
    spec = lk.MixLoRA(experts=E, top_k=K, inner=inner or lk.LoRA(rank=2, alpha=3.0), **options)
    adapter = lk.attach(model, spec, name=name)
    randomise(adapter)
    model.double()
    adapter.router.double()
    return adapter


def logits(model: nn.Module, ids: Tensor = IDS, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **options).logits


def by_hand(layer: Any, G: Tensor, name: str, x: Tensor, mix: str = "block") -> Tensor:
    """A Llama feed-forward as the paper has it, one token at a time; x (tokens, hidden)."""

    def apply(module: Any, h: Tensor, weights: dict[int, float]) -> Tensor:
        W, delta = module.base.weight, module.deltas_of(name)[""]
        return h @ (W + sum(w * delta.experts[e].dense(W) for e, w in weights.items())).T

    def feedforward(h: Tensor, weights: dict[int, float]) -> Tensor:
        inside = F.silu(apply(layer.gate_proj, h, weights)) * apply(layer.up_proj, h, weights)
        return apply(layer.down_proj, inside, weights)

    rows = []
    for token in x:
        p = (G.to(token) @ token).softmax(0)
        best = sorted(range(E), key=lambda e: -float(p[e]))[:K]
        weights = {e: float(p[e] / sum(p[b] for b in best)) for e in best}
        if mix == "layer":
            rows.append(feedforward(token, weights))
        else:
            rows.append(sum(w * feedforward(token, {e: 1.0}) for e, w in weights.items()))
    return torch.stack(rows)


INNER = {"lora": lk.LoRA(rank=2, alpha=3.0), "dora": lk.DoRA(inner=lk.LoRA(rank=2)), "loha": lk.LoHa(rank=2)}


@pytest.mark.parametrize("mix", ["block", "layer"])
@pytest.mark.parametrize("inner", INNER)
def test_a_feedforward_against_the_formula(inner: str, mix: str) -> None:
    model = models.llama()
    adapter = mixed(model, inner=INNER[inner], mix=mix)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    for index, block in enumerate(model.model.layers):
        with torch.no_grad():
            found = block.mlp(x)
            expected = by_hand(block.mlp, getattr(adapter.router, f"G{index}"), "mix", x.flatten(0, 1), mix)
        assert torch.allclose(found.flatten(0, 1), expected, atol=1e-10)
    assert "mix" in model.model.layers[0].self_attn.q_proj.deltas
    assert adapter.router.blocks[1] == "model.layers.1.mlp"
    kinds = {type(delta).__name__ for path, _, delta in adapter.deltas() if "mlp" in path}
    assert kinds == {"Blend" if inner == "dora" else "Mixture"}


def test_a_planted_bug_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixlora, "top_mask", lambda scores, k: torch.ones_like(scores, dtype=torch.bool))
    with pytest.raises(AssertionError):
        test_a_feedforward_against_the_formula("lora", "layer")


def test_it_starts_as_the_base() -> None:
    model = models.llama()
    before = logits(model)
    lk.attach(model, lk.MixLoRA(experts=E, top_k=K, inner=lk.LoRA(rank=2)))
    assert torch.allclose(logits(model), before, atol=1e-6)
    assert model.get_submodule("model.layers.0.mlp")._forward_hooks
    lk.detach(model)
    assert torch.equal(logits(model), before)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_equal_experts_are_one_and_order_does_not_matter() -> None:
    model = models.llama()
    adapter = mixed(model)
    shuffled = [2, 0, 3, 1]
    before = logits(model)
    with torch.no_grad():
        for _, _, delta in adapter.deltas():
            if isinstance(delta, mixlora.Experts):
                states = [expert.state_dict() for expert in delta.experts]
                states = [{key: value.clone() for key, value in state.items()} for state in states]
                for place, old in enumerate(shuffled):
                    delta.experts[place].load_state_dict(states[old])
        for parameter in adapter.router.parameters():
            parameter.copy_(parameter[shuffled].clone())
    assert torch.allclose(logits(model), before, atol=1e-10)
    plain = models.llama()
    lone = lk.attach(plain, lk.LoRA(rank=2, alpha=3.0), name="mix")
    plain.double()
    own = dict(lone.named_parameters())
    with torch.no_grad():
        for path, _, delta in adapter.deltas():
            first = delta.experts[0] if isinstance(delta, mixlora.Experts) else delta
            for expert in delta.experts if isinstance(delta, mixlora.Experts) else ():
                expert.load_state_dict(first.state_dict())
            for letter in "AB":
                own[f"{path}.{letter}"].copy_(getattr(first, letter))
    assert torch.allclose(logits(model), logits(plain), atol=1e-10)


def test_gradients_reach_everything_and_the_gate_is_right() -> None:
    model = models.llama()
    adapter = mixed(model)
    model(input_ids=IDS).logits.square().sum().backward()
    missing = [name for name, parameter in adapter.named_parameters() if parameter.grad is None]
    assert not missing
    block, router = model.model.layers[0].mlp, adapter.router
    x = torch.randn(1, 2, 8, dtype=torch.float64)

    def run(G: Tensor) -> Tensor:
        held = router._parameters.pop("G0")
        router.G0 = G
        try:
            return block(x)
        finally:
            del router.G0
            router._parameters["G0"] = held

    assert torch.autograd.gradcheck(run, (router.G0.detach().clone().requires_grad_(True),))


def test_each_row_its_own() -> None:
    model = models.llama()
    mixed(model)
    randomise(lk.attach(model, lk.LoRA(rank=2), name="sql"))
    model.double()
    route: list[Any] = ["mix", {"sql": 0.5, "mix": 0.5}, None]
    with lk.use(model, route):
        together = logits(model)
    for row, own in enumerate(route):
        with lk.use(model, own):
            assert torch.allclose(together[row : row + 1], logits(model, IDS[row : row + 1]), atol=1e-10), own


def test_a_cache_gives_what_the_whole_text_gives() -> None:
    model = models.llama()
    mixed(model)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    options["attention_mask"] = torch.ones_like(IDS)
    assert torch.equal(model.generate(IDS, **options), model.generate(IDS, use_cache=False, **options))


# -- in training -----------------------------------------------------------------------------------------------------------


def added(model: Any, run: Any) -> tuple[Tensor, Tensor]:
    """The loss of a call and what the mixture adds to it."""
    with lk.noted(model) as extra:
        loss = run()
    return loss, torch.stack([own() for own in extra]).sum()


def test_what_is_added_against_the_formula() -> None:
    model = models.llama()
    adapter = mixed(model, balance=0.3, z=0.2)
    mask = torch.ones_like(IDS)
    mask[1, 2:] = mask[2, 3:] = 0
    seen: list[Tensor] = []
    handles = [
        block.mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()), prepend=True)
        for block in model.model.layers
    ]
    _, extra = added(model, lambda: model(input_ids=IDS, attention_mask=mask).logits)
    expected = 0.0
    for index, x in enumerate(seen):
        z = x[mask.bool()] @ getattr(adapter.router, f"G{index}").T
        kept = torch.zeros_like(z, dtype=torch.bool).scatter(1, z.topk(K).indices, True)
        expected += float(0.3 * balance(z.softmax(-1), kept) + 0.2 * z_loss(z)) / 2
    assert float(extra) == pytest.approx(expected, rel=1e-9)
    for handle in handles:
        handle.remove()
    with lk.noted(model) as notes, lk.use(model, None):
        model(input_ids=IDS)
    assert notes == []


def test_flat_rows_and_padded_ones_train_alike() -> None:
    """Shared beginnings lie once in a flat row and count for every example that has them; the fill counts for none."""
    rows = tiny.rows(5, prefix=18)
    results = []
    for flat in (False, True):
        model = tiny.llama(torch.float64)
        torch.manual_seed(3)
        adapter = mixed(model, balance=0.5, z=0.1)
        model.train()

        def run(model: Any = model, flat: bool = flat) -> Tensor:
            return (causal_loss(model, pack(rows)) if flat else padded_loss(model, rows))[0]

        loss, extra = added(model, run)
        (loss + extra).backward()
        results.append((loss.item(), extra.item(), [p.grad for p in adapter.parameters()]))
    (padded, padded_extra, padded_grads), (flat_loss, flat_extra, flat_grads) = results
    assert pack(rows).tokens < sum(len(row.input_ids) for row in rows)
    assert flat_loss == pytest.approx(padded, rel=1e-6)
    assert flat_extra == pytest.approx(padded_extra, rel=1e-6)
    for one, other in zip(padded_grads, flat_grads, strict=True):
        assert torch.allclose(one, other, atol=1e-6 * float(one.abs().max() + 1))


def test_gradient_checkpointing_changes_nothing() -> None:
    grads = []
    for checkpointing in (False, True):
        model = models.llama()
        torch.manual_seed(3)
        adapter = mixed(model, balance=0.5)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        mask = torch.ones_like(IDS)
        mask[0, 3:] = 0
        loss, extra = added(model, lambda m=model, a=mask: m(input_ids=IDS, labels=IDS, attention_mask=a).loss)
        (loss + extra).backward()
        grads.append([parameter.grad for parameter in adapter.parameters()])
    assert all(torch.allclose(one, other, atol=1e-12) for one, other in zip(*grads, strict=True))


def test_balancing_balances() -> None:
    """Trained on the added loss alone, a router that sent everything to two experts sends it to all."""
    model = models.llama()
    adapter = mixed(model, balance=1.0)
    with torch.no_grad():
        model.model.embed_tokens.weight += 1.0  # a direction that all tokens share
        for G in adapter.router.parameters():
            G.mul_(0.1)[:2] += 0.5
    ids = torch.randint(3, 23, (8, 16))
    optimizer = torch.optim.Adam(adapter.router.parameters(), lr=0.05)
    values = []
    for _ in range(60):
        _, extra = added(model, lambda: model(input_ids=ids).logits)
        optimizer.zero_grad()
        extra.backward()
        optimizer.step()
        values.append(float(extra))
    assert values[-1] < 1.03 < values[0]


# -- files -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", ["lora", "dora"])
def test_saved_and_loaded_to_the_bit(inner: str, tmp_path: Path) -> None:
    model = models.llama()
    adapter = lk.attach(model, lk.MixLoRA(experts=E, top_k=K, inner=INNER[inner], mix="layer"), name="mix")
    randomise(adapter)
    before = logits(model)
    adapter.save(tmp_path / "mix")
    other = models.llama()
    again = lk.load(other, tmp_path / "mix")
    assert again.method == adapter.method
    own, found = adapter.state_dict(), again.state_dict()
    assert own.keys() == found.keys()
    assert all(torch.equal(own[key], found[key]) for key in own)
    assert {"router.G0", "router.G1"} <= own.keys()
    with lk.use(other, "mix"):
        assert torch.equal(logits(other), before)


# -- what is refused -------------------------------------------------------------------------------------------------------


def test_what_is_refused() -> None:
    wrong: list[tuple[Any, str]] = [
        (lambda: lk.MixLoRA(experts=0), "experts was given as 0"),
        (lambda: lk.MixLoRA(experts=2, top_k=3), "at most the 2 experts"),
        (lambda: lk.MixLoRA(mix="token"), "mix was given as 'token'"),
        (lambda: lk.MixLoRA(inner="lora"), "method's spec"),
        (
            lambda: lk.attach(models.llama(), lk.MixLoRA(), target_modules="attention"),
            "only attention layers were chosen",
        ),
        (lambda: lk.attach(models.llama(), lk.MixLoRA(inner=lk.LoRA(rank=2)), target_modules=["up_proj"]), "no second"),
        (lambda: lk.attach(models.bert(), lk.MixLoRA(inner=lk.LoRA(rank=2))), "modules of their own"),
        (lambda: lk.attach(models.llama(), lk.MixLoRA(inner=lk.LoRA(rank=2)), init="pissa"), "cannot be set|no"),
    ]
    for attempt, said in wrong:
        with pytest.raises(LorakitError, match=said):
            attempt()
    model = models.llama()
    mixed(model)
    with pytest.raises(LorakitError, match="weighs its experts for each token"):
        lk.merge(model, "mix")
    with pytest.raises(LorakitError, match="called by itself"):
        model.model.layers[0].mlp.up_proj(torch.zeros(1, 2, 8, dtype=torch.float64))
    with pytest.raises(LorakitError, match="router of its own"):
        lk.route(model, lk.Arrow(), ["mix"])
    logits(model)
