"""The laws over quantised bases: every method on every storage that runs here, and each law failing on a planted bug."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lorakit as lk
from laws import laws, storages
from laws.cases import SPECS, Inputs, Subject
from laws.storages import BOUND, FORMAT, Held
from lorakit.algebra.merging import merge, merged
from lorakit.core import mixed, uniform
from lorakit.core.layer import Adapted
from lorakit.core.storage import bitsandbytes as bnb_storage
from lorakit.core.storage import contract, storage_of
from lorakit.methods import METHODS, LoRA

LORA = SPECS["lora"][0]
Law = Callable[[Held], None]


def weight_of(subject: Subject) -> Tensor:
    """The frozen weight as floats."""
    base = subject.layer.base
    return storage_of(base, "weight").read(base, "weight")


def bias_of(subject: Subject) -> Tensor | None:
    bias = getattr(subject.layer.base, "bias", None)
    return None if bias is None else bias.detach()


def close(found: Tensor, expected: Tensor, what: str) -> None:
    laws.assert_close(found, expected, what, BOUND)


def changed(subject: Subject, blend: dict[str, float]) -> tuple[Tensor, Tensor | None]:
    """`W + Σ w ΔW` and the bias, by hand."""
    W, b = weight_of(subject), bias_of(subject)
    frozen, original = W, b
    for name, weight in blend.items():
        for _, _, delta in subject.adapters[name].deltas():
            W = W + weight * delta.dense(frozen)
            shift = delta.shift(original, lambda: frozen)
            if shift is not None:
                b = weight * shift if b is None else b + weight * shift
    return W, b


def linear(call: Inputs, W: Tensor, b: Tensor | None) -> Tensor:
    return F.linear(call[0][0], W, b)


# -- the laws --------------------------------------------------------------------------------------------------------------


def identity_at_start(case: Held) -> None:
    """A new adapter on a quantised base is that base."""
    if case.spec.identity:
        subject, base = case.subject("one", fresh=True), case.model()
        for call in subject.calls:
            close(subject.run("one", call), base(*call[0]), "a new adapter")


def act_is_substitute(case: Held) -> None:
    """What a delta adds beside a packed layer is what it adds to the floats that the layer stands for."""
    subject = case.subject("one", "other")
    for blend in ({"one": 1.0}, {"one": 0.7, "other": -0.4}):
        W, b = changed(subject, blend)
        for call in subject.calls:
            close(subject.run(blend, call), linear(call, W, b), f"act = substitute, {blend}")


def gradients_agree(case: Held) -> None:
    """Gradients of inputs and tensors are those of the float layer with the changed weight."""
    subject = case.subject("one")
    adapter = subject.adapters["one"].requires_grad_(True)
    parameters = [p for p in adapter.parameters() if p.requires_grad]
    for call in subject.calls:
        x = call[0][0].detach().requires_grad_()
        y, other = subject.run("one", ((x,), {})), linear(((x,), {}), *changed(subject, {"one": 1.0}))
        towards = torch.randn_like(y)
        ours = torch.autograd.grad(y, [x, *parameters], towards)
        theirs = torch.autograd.grad(other, [x, *parameters], towards, allow_unused=True)
        for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            close(a, torch.zeros_like(a) if b is None else b, f"gradient {index}")


def rows_are_independent(case: Held) -> None:
    """A batch whose rows are routed apart gives what each row gives alone."""
    subject = case.subject("one", "other", batch=len(laws.ROUTE))
    for call in subject.calls:
        together = subject.run(laws.ROUTE, call)
        alone = [subject.run(route, case.kind.row(call, i, 4)) for i, route in enumerate(laws.ROUTE)]
        close(together, torch.cat(alone), "mixed batch = row by row")


def trains_after_it_was_asked(case: Held) -> None:
    """A base that answered in evaluation mode still gives gradients afterwards, and is the same function."""
    model = case.model()
    call = case.kind.inputs(2)[0]
    before = model(*call[0])
    adapter = case.attach(model, "one")
    with torch.no_grad(), lk.use(model, None):
        model.eval()(*call[0])
    model.train()
    x = call[0][0].clone().requires_grad_()
    with lk.use(model, None):
        y = model(x)
    close(y, before, "the base after evaluation")
    (gradient,) = torch.autograd.grad(y.sum(), [x])
    subject = Subject(model, {"one": adapter}, [call], case.kind)
    close(gradient, weight_of(subject).sum(0).expand_as(gradient), "the inputs' gradient after evaluation")


def merging_errs_as_the_quantiser(case: Held) -> None:
    """Stored is `W + ΔW` up to the quantiser's bound, and the report says how far off it is."""
    subject = case.subject("one")
    W, b = changed(subject, {"one": 1.0})
    if case.homeless():
        return
    model = subject.model
    if case.format.bound is None:
        refused = laws.refusal(lambda: merge(model, "one"))
        assert "float copy" in refused, refused
        return
    report = merge(model, "one")
    assert not isinstance(model.layer, Adapted)
    storage = storage_of(model.layer, "weight")
    assert storage.label(model.layer, "weight") == case.format.label
    stored = storage.read(model.layer, "weight")
    bound = case.format.bound(W.detach()) * (1 + 1e-3) + 1e-6
    excess = ((stored - W).abs() - bound).max().item()
    assert excess <= 0, f"an entry is {excess:.3g} further off than the quantiser's bound"
    measured = float((stored - W).detach().norm() / W.detach().norm())
    assert abs(report.error["layer"] - measured) <= 1e-4 * measured + 1e-7, "the report says another error"
    assert measured > 1e-3 or type(case.spec) is not LoRA, "few bits without an error"
    for call in subject.calls:
        close(model(*call[0]), linear(call, stored, b), "the merged layer computes with what it stores")


def merging_into_floats_is_exact(case: Held) -> None:
    """With a dtype, merging gives a float layer that computes what the adapter computed."""
    if case.homeless():
        return
    subject = case.subject("one")
    acted = [subject.run("one", call) for call in subject.calls]
    merge(subject.model, "one", dtype=torch.float32)
    assert type(subject.model.layer) is nn.Linear
    for call, y in zip(subject.calls, acted, strict=True):
        close(subject.model(*call[0]), y, "a float copy = act")


def restores_the_bits(case: Held) -> None:
    """Within `merged` the weights act up to the quantiser's error; afterwards everything is as it was, bit by bit."""
    if case.homeless() or case.format.bound is None:
        return
    subject = case.subject("one")
    model, base = subject.model, subject.layer.base
    objects, bits = dict(base.named_parameters()), _bits(base)
    acted = subject.run("one", subject.calls[0])
    W, _ = changed(subject, {"one": 1.0})
    x = subject.calls[0][0][0]
    allowed = x.abs() @ (case.format.bound(W.detach()) * (1 + 1e-3) + 1e-6).T + 1e-3
    try:
        with merged(model, "one"):
            off = (model(x) - acted).abs()
            assert (off <= allowed).all(), "within merged it is further off than the quantiser's bound"
            raise KeyError("anything")
    except KeyError:
        pass
    for name, parameter in base.named_parameters():
        assert parameter is objects[name], f"{name} is another Parameter after merged"
    assert _bits(base) == bits, "other bits after merged"
    assert torch.equal(subject.run("one", subject.calls[0]), acted), "acts otherwise after merged"


def _bits(base: nn.Module) -> dict[str, Any]:
    values = {name: value.clone() for name, value in base.state_dict().items() if isinstance(value, Tensor)}
    values["read"] = storage_of(base, "weight").read(base, "weight")
    return {name: value.detach().numpy().tobytes() for name, value in values.items() if type(value) is Tensor}


LAWS: tuple[Law, ...] = (
    identity_at_start,
    act_is_substitute,
    gradients_agree,
    rows_are_independent,
    trains_after_it_was_asked,
    merging_errs_as_the_quantiser,
    merging_into_floats_is_exact,
    restores_the_bits,
)
THOROUGH = ("nf4",)
"""On these every method runs; on the others those that differ in what they ask of a weight."""
ASKING = ("lora", "dora", "hira", "oft", "ia3", "full", "bitfit")


@pytest.mark.parametrize("name", FORMAT)
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_law(law: Law, name: str) -> None:
    for case in storages.cases(name, methods=METHODS if name in THOROUGH else ASKING):
        try:
            law(case)
        except Exception as problem:
            problem.add_note(f"held as {name}, layer {case.kind.name!r}, with {case.spec}")
            raise


@pytest.mark.parametrize("name", FORMAT)
def test_saved_and_loaded_on_the_same_base_it_is_the_same(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    case = Held(LORA, storages.kind("biased", True), FORMAT[name])
    subject = case.subject("one")
    subject.adapters["one"].save(tmp_path / "one")
    model = case.model()
    with caplog.at_level(logging.WARNING, logger="lorakit"):
        lk.load(model, tmp_path / "one")
    assert not [one for one in caplog.records if one.name == "lorakit" and one.levelno >= logging.WARNING]
    call = subject.calls[0]
    with lk.use(model, "one"):
        assert torch.equal(model(*call[0]), subject.run("one", call))


# -- planted bugs ----------------------------------------------------------------------------------------------------------

Plant = Callable[[pytest.MonkeyPatch], None]


def not_settled(patch: pytest.MonkeyPatch) -> None:
    """The layer goes on packing its weight for inference in evaluation mode."""
    patch.setattr(bnb_storage.FourBit, "settle", lambda self, layer: None)


def read_without_scales(patch: pytest.MonkeyPatch) -> None:
    """Scales are taken for 10% too large."""
    floats = bnb_storage._floats
    patch.setattr(bnb_storage, "_floats", lambda weight: floats(weight) * 1.1)


def base_halved(patch: pytest.MonkeyPatch) -> None:
    """The packed layer's own product is counted half."""
    call_base = uniform.call_base
    patch.setattr(uniform, "call_base", lambda *call: call_base(*call) * 0.5)


def gradient_cut(patch: pytest.MonkeyPatch) -> None:
    """The base's product is taken for a constant."""
    call_base = uniform.call_base
    patch.setattr(uniform, "call_base", lambda *call: call_base(*call).detach())


def stored_twice(patch: pytest.MonkeyPatch) -> None:
    """What is stored has been rounded before, to five values."""
    packed = bnb_storage._packed

    def planted(like: Any, values: Tensor) -> Any:
        step = values.abs().max() / 2
        return packed(like, (values / step).round() * step)

    patch.setattr(bnb_storage, "_packed", planted)


def error_untold(patch: pytest.MonkeyPatch) -> None:
    """Every merge says that it made no error."""
    patch.setattr(contract, "relative_error", lambda stored, values: 0.0)


def not_put_back(patch: pytest.MonkeyPatch) -> None:
    """After `merged` the parameter is the old one and the layer's own reference to its scales the new one."""
    hold = bnb_storage.FourBit.snapshot

    def planted(self: Any, layer: nn.Module, tensor: str) -> Any:
        before = layer.weight
        held = hold(self, layer, tensor)
        return dataclasses.replace(held, restore=lambda: setattr(layer, "weight", nn.Parameter(before, False)))

    patch.setattr(bnb_storage.FourBit, "snapshot", planted)


def start_moved(patch: pytest.MonkeyPatch) -> None:
    """Magnitudes start at the floats' norms, which the base no longer has."""
    from lorakit.methods.dora import DoRADelta

    begin = DoRADelta.begin
    patch.setattr(DoRADelta, "begin", lambda self, W: begin(self, W * 1.05))


def first_row_for_all(patch: pytest.MonkeyPatch) -> None:
    """Every row of a mixed batch gets the first row's gate."""
    side_by_side = mixed.side_by_side
    planted = lambda low: side_by_side([(delta, weight[:1].expand_as(weight)) for delta, weight in low])  # noqa: E731
    patch.setattr(mixed, "side_by_side", planted)


def float_copy_of_the_codes(patch: pytest.MonkeyPatch) -> None:
    """The float copy forgets the bias."""
    from lorakit.algebra import merging

    made = merging.float_layer

    def planted(*args: Any, **kwargs: Any) -> nn.Linear:
        layer = made(*args, **kwargs)
        with torch.no_grad():
            layer.bias.zero_()
        return layer

    patch.setattr(merging, "float_layer", planted)


@pytest.mark.parametrize(
    ("law", "plant", "method"),
    [
        (identity_at_start, start_moved, "dora"),
        (act_is_substitute, read_without_scales, "dora"),
        (act_is_substitute, base_halved, "lora"),
        (gradients_agree, gradient_cut, "lora"),
        (rows_are_independent, first_row_for_all, "lora"),
        (trains_after_it_was_asked, not_settled, "lora"),
        (merging_errs_as_the_quantiser, stored_twice, "lora"),
        (merging_errs_as_the_quantiser, error_untold, "lora"),
        (merging_into_floats_is_exact, float_copy_of_the_codes, "lora"),
        (restores_the_bits, not_put_back, "lora"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_the_law_catches(law: Law, plant: Plant, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Held(SPECS[method][0], storages.kind("biased", True), FORMAT["nf4"])
    law(case)
    plant(monkeypatch)
    with pytest.raises((AssertionError, RuntimeError)):
        law(case)
