"""What holds for every method on every layer. Each law is a function of a case and raises AssertionError where broken.

Tolerance. All is float64. Two ways to one number sum the same products, at most N = 100 here, in other orders; each
sum is off by at most N · eps of the sum of magnitudes, which for these random values stays below 8 times the largest
result. Compared are results of at most two such sums in a row: 2 · 100 · 8 · eps < 2^11 · eps = 4.5e-13, relative to
the largest magnitude (at least 1).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

import lorakit as lk
from laws.cases import Case, Inputs, Subject
from lorakit.adapter.adapter import Adapter
from lorakit.algebra.merging import merge, merged
from lorakit.core.delta import Delta, LowRank
from lorakit.core.layer import Adapted
from lorakit.core.layout import Expert, Rows, Site
from lorakit.core.storage import storage_of
from lorakit.errors import LorakitError
from lorakit.files import store
from lorakit.files.packing import is_pair, views
from lorakit.init import INITIALISERS
from lorakit.methods import LoRA

BOUND = 2**11 * torch.finfo(torch.float64).eps


def assert_close(found: Tensor, expected: Tensor, what: str, bound: float = BOUND) -> None:
    """Within the bound, relative to the largest magnitude expected (at least 1)."""
    assert found.shape == expected.shape, f"{what}: shapes {tuple(found.shape)} and {tuple(expected.shape)}"
    error = (found - expected).abs().max().item() if found.numel() else 0.0
    allowed = bound * max(1.0, expected.abs().max().item() if expected.numel() else 1.0)
    assert error <= allowed, f"{what}: off by {error:.3g}, allowed {allowed:.3g}"


def assert_differs(found: Tensor, other: Tensor, what: str) -> None:
    """Far more apart than rounding."""
    assert (found - other).abs().max().item() > 1e-6, f"{what}: no difference"


def refusal(action: Callable[[], object]) -> str:
    """What lorakit says when it refuses an action; empty where it does not."""
    try:
        action()
    except LorakitError as problem:
        return str(problem)
    return ""


# -- an execution written apart from the library: weights and biases changed by hand ---------------------------------------


def changed_tensors(subject: Subject, blend: Mapping[str, float]) -> tuple[dict[str, Tensor], Tensor | None]:
    """`W + Σ w ΔW` and biases by tensor name; and what must be added to the output where a layer has no bias."""
    layer = subject.layer
    changed: dict[str, Tensor] = {}
    homeless: Tensor | None = None
    for name, weight in blend.items():
        adapter = subject.adapters[name]
        for _, replacement in adapter.replacements():
            for key, own in replacement.tensors().items():
                base = layer.base.get_parameter(key).detach()
                changed[key] = changed.get(key, base) + weight * (own - base)
        for _, site, delta in adapter.deltas():
            stored = storage_of(layer.base, site.weight).read(layer.base, site.weight)
            change = site.layout.weight(delta.dense(site.layout.matrix(stored)), stored)
            changed[site.weight] = changed.get(site.weight, stored) + weight * change
            bias = None if site.bias is None else layer.base.get_parameter(site.bias).detach()
            rows = site.layout.index() if isinstance(site.layout, Rows) else getattr(site.layout, "index", slice(None))
            shift = delta.shift(None if bias is None else bias[rows], lambda s=site, w=stored: s.layout.matrix(w))
            if shift is None:
                continue
            if isinstance(site.layout, Rows):
                shift = shift.new_zeros(site.layout.inner.shape.out).index_copy(0, site.layout.index(), shift)
            if isinstance(site.layout, Expert) and bias is not None:
                whole = torch.zeros_like(bias)
                whole[site.layout.index] = shift
                shift = whole
            if bias is not None:
                assert site.bias is not None
                changed[site.bias] = changed.get(site.bias, bias) + weight * shift
            else:
                homeless = weight * shift if homeless is None else homeless + weight * shift
    return changed, homeless


def substituted(subject: Subject, blend: Mapping[str, float], call: Inputs) -> Tensor:
    """The base layer run with the changed tensors in place of its own."""
    changed, homeless = changed_tensors(subject, blend)
    y = functional_call(subject.layer.base, changed, call[0], call[1])
    y = y[0] if isinstance(y, tuple) else y
    if homeless is None:
        return y
    site = next(iter(subject.layer.sites.values()))
    return y + (homeless if isinstance(site.layout, Rows) else site.layout.features(homeless, y))


# -- the laws --------------------------------------------------------------------------------------------------------------


def identity_at_start(case: Case) -> None:
    """A new adapter changes nothing, unless the method's card says that it does."""
    subject, base = case.subject("one", fresh=True), case.model()
    for call in subject.calls:
        before, after = base(*call[0], **call[1]), subject.run("one", call)
        if case.spec.identity:
            assert_close(after, before, "a new adapter")
        else:
            assert_differs(after, before, "the card says that a new adapter changes the function")


def executions_agree(case: Case) -> None:
    """act = substitute = merge, with the bias; and the adapter does something."""
    subject, base = case.subject("one"), case.model()
    acted = [subject.run("one", call) for call in subject.calls]
    for call, y in zip(subject.calls, acted, strict=True):
        assert_differs(y, base(*call[0], **call[1]), "a random adapter")
        assert_close(y, substituted(subject, {"one": 1.0}, call), "act = substitute")
        assert_close(subject.run(None, call), base(*call[0], **call[1]), "route None")
    layer, model = subject.layer, subject.model
    if case.homeless():
        return  # `refuses_what_it_cannot` holds the rest
    for call, y in zip(subject.calls, acted, strict=True):
        result = functional_call(layer.base, layer.substitutes([("one", 1.0)]), call[0], call[1])
        assert_close(y, result[0] if isinstance(result, tuple) else result, "act = layer.substitutes")
    merge(model, "one")
    assert not isinstance(model.layer, Adapted)
    for call, y in zip(subject.calls, acted, strict=True):
        assert_close(model(*call[0], **call[1]), y, "merge = act")


def state_is_the_bases(case: Case) -> None:
    """With adapters on, the state dict has the base's own names and bits, and loads into another such model."""
    subject, base = case.subject("one", "two"), case.model().state_dict()
    state = subject.model.state_dict()
    own = [key for key in state if "lorakit" not in key]
    assert own == list(base), f"{own} instead of {list(base)}"
    for key in own:
        assert torch.equal(state[key], base[key]), f"{key} is not the base's"
    other = case.subject("one", "two", fresh=True)
    found = other.model.load_state_dict(state, strict=False)
    assert not found.missing_keys, found
    assert not found.unexpected_keys, found
    for call in subject.calls:
        for name in ("one", "two"):
            assert torch.equal(other.run(name, call), subject.run(name, call)), f"{name} came back otherwise"


def refuses_what_it_cannot(case: Case) -> None:
    """A changed bias where the layer has none cannot be merged: said aloud, and no weight changes."""
    if not case.homeless():
        return
    subject = case.subject("one")
    before = {name: value.clone() for name, value in subject.layer.base.state_dict().items()}
    for attempt in (lambda: merge(subject.model, "one"), lambda: merged(subject.model, "one").__enter__()):
        assert "bias" in refusal(attempt), "merging a bias into a layer without one went through"
    for name, value in subject.layer.base.state_dict().items():
        assert torch.equal(value, before[name]), f"{name} changed in a refused merge"


def restores_the_bits(case: Case) -> None:
    """Within `merged` the weights act; afterwards, also after an exception, bits and objects are those from before."""
    if case.homeless():
        return
    subject = case.subject("one")
    model, base = subject.model, subject.layer.base
    objects = dict(base.named_parameters())
    bits = {name: value.clone() for name, value in model.state_dict().items()}
    acted = [subject.run("one", call) for call in subject.calls]
    for fails in (False, True):
        try:
            with merged(model, "one"):
                for call, y in zip(subject.calls, acted, strict=True):
                    assert_close(model(*call[0], **call[1]), y, "within merged")
                if fails:
                    raise KeyError("anything")
        except KeyError:
            assert fails
        found = dict(base.named_parameters())
        assert list(found) == list(objects)
        for name, parameter in objects.items():
            assert found[name] is parameter, f"{name} is another Parameter after merged"
        state = model.state_dict()
        assert list(state) == list(bits)
        for name, value in bits.items():
            assert torch.equal(state[name], value), f"{name} has other bits after merged"
        for call, y in zip(subject.calls, acted, strict=True):
            assert torch.equal(model(*call[0], **call[1]), y), "acts otherwise after merged"


def all_that_trains_moves(case: Case) -> None:
    """After a pass without gradients and two steps every trainable tensor has moved, and nothing else has."""
    subject = case.subject("one", fresh=True)
    model, adapter = subject.model, subject.adapters["one"]
    trainable = {name: p for name, p in adapter.named_parameters() if p.requires_grad}
    assert trainable, "nothing trains"
    ids = {id(p) for p in trainable.values()}
    assert {id(p) for p in model.parameters() if p.requires_grad} <= ids, "something outside the adapter trains"
    others = [(name, t) for name, t in [*model.named_parameters(), *model.named_buffers()] if id(t) not in ids]
    others += [(f"pool.{name}", t) for name, t in adapter.pool.named_buffers()]
    before = {name: p.detach().clone() for name, p in trainable.items()}
    kept = [(name, t, t.detach().clone()) for name, t in others]
    call = subject.calls[0]
    with torch.no_grad():
        target = torch.randn_like(subject.run("one", call))
    for _ in range(2):
        for parameter in trainable.values():
            parameter.grad = None
        (subject.run("one", call) - target).square().sum().backward()
        with torch.no_grad():
            for name, parameter in trainable.items():
                assert parameter.grad is not None, f"{name} got no gradient"
                parameter -= 0.05 * parameter.grad
    for name, parameter in trainable.items():
        assert not torch.equal(parameter.detach(), before[name]), f"{name} has not moved"
    for name, tensor, value in kept:
        assert torch.equal(tensor, value), f"{name} has moved and does not train"


def saves_exactly(case: Case, folder: Path) -> None:
    """A loaded adapter has the same bits; the file holds the declared tensors and no other."""
    subject = case.subject("one")
    adapter = subject.adapters["one"]
    refused = refusal(lambda: adapter.save(folder / "one"))
    if refused:
        # Only LoRA's parts of a fused layer have a place in the format; others are refused and nothing is written.
        assert case.kind.options.get("parts"), refused
        assert "parts" in refused, refused
        assert not isinstance(case.spec, LoRA), refused
        assert not list(folder.iterdir())
        return
    written = store.read_tensors(folder / "one")
    expected = declared(adapter)
    found = sorted(tensor.numel() for tensor in written.values())
    assert found == sorted(expected), f"{list(written)} hold {found} numbers; declared are {sorted(expected)}"
    model = case.model()
    loaded = lk.load(model, folder / "one")
    ours, theirs = adapter.state_dict(), loaded.state_dict()
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        assert theirs[name].dtype == tensor.dtype, name
        assert torch.equal(theirs[name], tensor), f"{name} came back otherwise"
    for call in subject.calls:
        with lk.use(model, "one"):
            assert_close(model(*call[0], **call[1]), subject.run("one", call), "loaded = saved")


def declared(adapter: Adapter) -> list[int]:
    """How many numbers each tensor of the file holds, by what the deltas, replacements and the pool declare."""
    result: list[int] = []
    parts = [(site.layout, delta) for _, site, delta in adapter.deltas() if isinstance(site.layout, Rows)]
    if parts:  # all parts of a fused layer make one pair of factors
        ranks = [delta.factors()[1].shape[0] for _, delta in parts if isinstance(delta, LowRank)]
        inner = parts[0][0].inner.shape
        result += [sum(ranks) * inner.in_, sum(ranks) * inner.out]
    stacked: dict[
        tuple[str, str], int
    ] = {}  # all experts of a stack make one pair of factors, where the method is LoRA
    for _, site, delta in adapter.deltas():
        if isinstance(site.layout, Expert) and is_pair(delta):
            for name, tensor in delta.named_parameters():
                stacked[site.weight, name] = stacked.get((site.weight, name), 0) + tensor.numel()
        elif not isinstance(site.layout, Rows):
            held = views(delta, site.layout.kind).values()
            result += [sum(tensor.numel() for tensor in view.tensors) for view in held]
    for _, replacement in adapter.replacements():
        result += [tensor.numel() for tensor in replacement.tensors().values()]
    result += stacked.values()
    return result + [tensor.numel() for tensor in adapter.pool.state_dict().values()]


ROUTE: list[Any] = ["one", None, "other", {"one": 0.7, "other": -0.4}]


def rows_are_independent(case: Case) -> None:
    """A batch whose rows are routed apart gives what each row gives alone, and the same gradients."""
    subject = case.subject("one", "other", batch=len(ROUTE))
    for adapter in subject.adapters.values():
        adapter.requires_grad_(True)
    parameters = [p for adapter in subject.adapters.values() for p in adapter.parameters() if p.requires_grad]
    for call in subject.calls[: case.kind.batched]:
        together = subject.run(ROUTE, call)
        alone = [subject.run(route, case.kind.row(call, i, len(ROUTE))) for i, route in enumerate(ROUTE)]
        apart = torch.cat(alone, dim=case.kind.join)
        assert_close(together, apart, "mixed batch = row by row")
        towards = torch.randn_like(together)
        _same_gradients(together, apart, towards, parameters, "of a mixed batch")


def _same_gradients(y: Tensor, other: Tensor, towards: Tensor, wanted: list[Tensor], what: str) -> None:
    ours = torch.autograd.grad(y, wanted, towards, allow_unused=True)
    theirs = torch.autograd.grad(other, wanted, towards, allow_unused=True)
    for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        zero = torch.zeros_like(wanted[index])
        assert_close(zero if a is None else a, zero if b is None else b, f"gradient {index} {what}")


def form_is_the_delta(case: Case) -> None:
    """`gain · y + bias + B A x` is what the layer gives, for methods that have such a form."""
    subject = case.subject("one")
    layer = subject.layer
    if not case.beside():
        return
    own = {key: value for _, r in subject.adapters["one"].replacements() for key, value in r.tensors().items()}
    for call in subject.calls:
        x = call[0][0]
        total = functional_call(layer.base, own, call[0], call[1])
        for _, site, delta in subject.adapters["one"].deltas():
            if type(delta).form is Delta.form:
                assert not isinstance(delta, LowRank)
                continue
            total = total + _form_change(subject, site, delta, x)
        if all(type(delta).form is not Delta.form for _, _, delta in subject.adapters["one"].deltas()):
            assert_close(subject.run("one", call), total, "form = act")


def _form_change(subject: Subject, site: Site, delta: Delta, x: Tensor) -> Tensor:
    """`y' - y` by the form of one delta, with the frozen bias."""
    base, layout = subject.layer.base, site.layout
    W = layout.matrix(storage_of(base, site.weight).read(base, site.weight))
    b = None if site.bias is None else base.get_parameter(site.bias).detach()
    y = layout.linear(base, x, W)
    if isinstance(layout, Rows):
        b = None if b is None else layout.part(b)
    if b is not None:
        y = y + layout.features(b, y)
    form = delta.form(W, b)
    change = torch.zeros_like(y)
    if form.gain is not None:
        change = change + y * layout.features(form.gain - 1, y)
    if form.bias is not None:
        change = change + layout.features(form.bias, y)
    if form.B is not None:
        assert form.A is not None
        change = change + layout.up(base, layout.down(base, x, form.A), form.B)
    return change


def count_is_the_cards(case: Case) -> None:
    """The method's card says how many numbers train."""
    adapter = case.subject("one", fresh=True).adapters["one"]
    card = case.spec.card
    deltas = list(adapter.deltas())
    found = sum(p.numel() for _, _, delta in deltas for p in delta.parameters() if p.requires_grad)
    said = sum(card.parameters(site.layout.shape, delta.spec) for _, site, delta in deltas)
    assert found == said, f"{found} numbers train in the layers, the card says {said}"
    pooled = sum(p.numel() for p in adapter.pool.parameters() if p.requires_grad)
    shared = card.pooled([site.layout.shape for _, site, _ in deltas], case.spec) if card.pooled else 0
    assert pooled == shared, f"{pooled} numbers train in the pool, the card says {shared}"
    biases = sum(t.numel() for _, r in adapter.replacements() for t in r.tensors().values())
    assert adapter.num_parameters(trainable=True) == said + shared + biases


def forward_writes_nothing(case: Case) -> None:
    """A second pass gives the same bits, and neither pass changes a tensor or an attribute of any module."""
    for training in (True, False):
        subject = case.subject("one", "other", batch=len(ROUTE))
        subject.model.train(training)
        routes: list[Any] = ["one", {"one": 0.7, "other": -0.4}, None, ROUTE]
        before = snapshot(subject)
        for call in subject.calls[: case.kind.batched if training else 1]:
            for route in routes:
                first = subject.run(route, call)
                assert_same(before, snapshot(subject))
                assert torch.equal(first, subject.run(route, call)), "a second pass gives another result"
        assert_same(before, snapshot(subject))


def snapshot(subject: Subject) -> dict[str, Any]:
    """Every attribute of every module by identity, containers by content, tensors by bits."""
    seen: dict[str, Any] = {}
    modules = list(subject.model.named_modules())
    modules += [(f"pool {name}", adapter.pool) for name, adapter in subject.adapters.items()]
    for path, module in modules:
        for key, value in vars(module).items():
            where = f"{path}.{key}"
            if isinstance(value, dict):
                seen[where] = {k: _frozen(v) for k, v in value.items()}
            elif isinstance(value, list | set | tuple):
                seen[where] = [_frozen(v) for v in value]
            else:
                seen[where] = _frozen(value)
    seen["state"] = {key: _frozen(value) for key, value in vars(subject.layer.state).items()}
    return seen


def _frozen(value: Any) -> Any:
    if isinstance(value, Tensor):
        grad = None if value.grad is None else id(value.grad)
        return (id(value), value._version, value.detach().clone().numpy().tobytes(), value.requires_grad, grad)
    return value if isinstance(value, int | float | str | bool | None) else id(value)


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Name what changed."""
    changed = sorted(key for key in before.keys() | after.keys() if before.get(key, "∅") != after.get(key, "∅"))
    assert not changed, f"a forward pass changed {changed}"


def any_start_preserves(case: Case) -> None:
    """Every initialiser leaves the function as it was, or says that it cannot set this method."""
    base = case.model()
    parts = [delta.low_rank() for _, _, delta in case.subject("one", fresh=True).adapters["one"].deltas()]
    if not any(parts) and not case.kind.core:
        return  # nothing that an initialiser could set, which the core kinds show
    for name in INITIALISERS:
        refused = refusal(lambda name=name: case.subject("one", fresh=True, init=name))
        if refused:
            assert "init" in refused or "factors" in refused, refused
            settable = [low for low in parts if low is not None and type(low).set_factors is not LowRank.set_factors]
            assert not settable or name not in ("default", "kaiming", "gaussian", "normal"), refused
            continue
        subject = case.subject("one", fresh=True, init=name)
        if not case.spec.identity or INITIALISERS[name].rewrites:  # a start that replaces the base has another function
            continue
        for call in subject.calls:
            assert_close(subject.run("one", call), base(*call[0], **call[1]), f"init={name}")


def blend_is_the_sum(case: Case) -> None:
    """Under {one: p, other: q} the weights are W + p ΔW₁ + q ΔW₂, whichever is named first; a zero weight is absence."""
    subject = case.subject("one", "other")
    blend = {"one": 0.7, "other": -0.4}
    for call in subject.calls:
        expected = substituted(subject, blend, call)
        assert_close(subject.run(blend, call), expected, "blend = sum")
        assert_close(subject.run(dict(reversed(blend.items())), call), expected, "blend in the other order")
        assert_close(subject.run({"one": 1.0, "other": 0.0}, call), subject.run("one", call), "zero weight")
        assert_close(subject.run({"one": 2.5}, call), substituted(subject, {"one": 2.5}, call), "one weight")
    if not case.homeless():
        acted = [subject.run(blend, call) for call in subject.calls]
        with merged(subject.model, blend):
            for call, y in zip(subject.calls, acted, strict=True):
                assert_close(subject.model(*call[0], **call[1]), y, "a blend, merged")


def gradients_agree(case: Case) -> None:
    """The gradients of act for the input and every tensor are autograd's of the substitution path."""
    subject = case.subject("one", "other")
    for adapter in subject.adapters.values():
        adapter.requires_grad_(True)
    for blend in ({"one": 1.0}, {"one": 0.7, "other": -0.4}):
        parameters = [p for name in blend for p in subject.adapters[name].parameters() if p.requires_grad]
        for call in subject.calls if case.kind.differentiable else ():
            inputs = [x.detach().requires_grad_(x.is_floating_point()) for x in call[0]]
            wanted = [x for x in inputs if x.requires_grad] + parameters
            own: Inputs = (tuple(inputs), call[1])
            y, other = subject.run(blend, own), substituted(subject, blend, own)
            _same_gradients(y, other, torch.randn_like(y), wanted, f"of {blend}")


def unfrozen_base_gets_its_gradient(case: Case) -> None:
    """A base weight that the user unfreezes gets its gradient beside the adapter, the same as by substitution.

    Compared where ΔW does not depend on W; elsewhere (a gain, a rotation) only that there is a gradient.
    """
    subject = case.subject("one")
    base, weights, plain = subject.layer.base, {}, True
    for _, site, delta in subject.adapters["one"].deltas():
        weights[site.weight] = base.get_parameter(site.weight).requires_grad_(True)
        W = site.layout.matrix(weights[site.weight].detach())
        plain = plain and torch.equal(delta.dense(W), delta.dense(2 * W))
    for call in subject.calls if case.kind.differentiable else ():
        y = subject.run("one", call)
        if not plain:
            y.sum().backward()
            assert all(W.grad is not None for W in weights.values()), "an unfrozen base weight has no gradient"
            continue
        changed, homeless = changed_tensors(subject, {"one": 1.0})
        for name, W in weights.items():
            changed[name] = W + (changed[name] - W).detach()
        other = functional_call(base, changed, call[0], call[1])
        other = other[0] if isinstance(other, tuple) else other
        if homeless is not None:
            other = other + next(iter(subject.layer.sites.values())).layout.features(homeless, other)
        _same_gradients(y, other, torch.randn_like(y), list(weights.values()), "of an unfrozen base")


Law = Callable[[Case], None]

LAWS: tuple[Law, ...] = (
    identity_at_start,
    executions_agree,
    state_is_the_bases,
    refuses_what_it_cannot,
    restores_the_bits,
    all_that_trains_moves,
    rows_are_independent,
    form_is_the_delta,
    count_is_the_cards,
    forward_writes_nothing,
    any_start_preserves,
    blend_is_the_sum,
    gradients_agree,
    unfrozen_base_gets_its_gradient,
)
"""The laws that need nothing but a case; `saves_exactly` needs a folder too."""
