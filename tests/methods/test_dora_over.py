"""DoRA over methods other than LoRA: the formula, all laws, saving."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch

import lorakit as lk
from laws import cases, laws
from lorakit.core.delta import Delta, Form, Method
from lorakit.errors import LorakitError

INNER: tuple[Method, ...] = (
    lk.LoHa(rank=1, alpha=0.7),
    lk.LoHa(rank=2, alpha=0.7),
    lk.LoKr(rank=1, alpha=1.5),
    lk.HiRA(rank=2),
    lk.OFT(block_size=2),
    lk.IA3(feedforward_modules=()),
    lk.IA3(feedforward_modules=("layer",)),
    lk.BitFit(),
    lk.Full(),
    lk.LoRAFA(rank=2),
)
KINDS = {kind.name: kind for kind in cases.KINDS if kind.name in ("linear", "conv2d-groups-circular", "embedding")}
LAWS = [law for law in laws.LAWS if law.__name__ not in ("forward_writes_nothing", "restores_the_bits")]


def _cases() -> list[cases.Case]:
    made = [cases.Case(lk.DoRA(inner=spec), kind) for spec in INNER for kind in KINDS.values()]
    return [case for case in made if case.refusal() is None]


def has_form(case: cases.Case) -> bool:
    """Whether the inner method has a form, and so DoRA over it."""
    delta = case.subject("one").layer.deltas_of("one")[""]
    return type(delta.inner).form is not Delta.form


@pytest.mark.parametrize("case", _cases(), ids=lambda case: f"{case.spec.inner.name}-{case.kind.name}")
def test_laws(case: cases.Case) -> None:
    for law in LAWS:
        if law is laws.form_is_the_delta and not has_form(case):
            continue
        law(case)


@pytest.mark.parametrize("spec", INNER, ids=lambda spec: spec.name)
def test_formula_and_file(spec: Method, tmp_path: Path) -> None:
    """W' = diag(m / ‖W + ΔW‖) (W + ΔW), b' = the inner method's; and its file is lorakit's own."""
    case = cases.Case(lk.DoRA(inner=spec), KINDS["linear"])
    subject = case.subject("one")
    delta = subject.layer.deltas_of("one")[""]
    W, b = (parameter.detach() for parameter in subject.layer.base.parameters())
    V = W + delta.inner.dense(W)
    changed = delta.m[:, None] * V / V.norm(dim=1, keepdim=True)
    shift = delta.inner.shift(b, lambda: W)
    x = subject.calls[0][0][0]
    y = x @ changed.T + (b if shift is None else b + shift)
    torch.testing.assert_close(subject.run("one", subject.calls[0]), y)
    subject.adapters["one"].save(tmp_path / "one")
    fresh = case.model()
    again = lk.load(fresh, tmp_path / "one")
    assert again.method == case.spec
    with lk.use(fresh, "one"):
        torch.testing.assert_close(fresh(x), y)


def test_forms() -> None:
    """Gain, bias and low-rank parts of the inner form all survive; where there is none that is said."""
    W, b = torch.randn(6, 8, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    kinds = {}
    for spec in INNER:
        case = cases.Case(lk.DoRA(inner=spec), KINDS["linear"])
        delta = case.subject("one").layer.deltas_of("one")[""]
        if not has_form(case):
            with pytest.raises(LorakitError, match=f"{spec.name} has no form"):
                delta.form(W, b)
            continue
        form: Form = delta.form(W, b)
        kinds[spec.name] = (form.gain is not None, form.bias is not None, form.B is not None)
    low, scaled = (True, True, True), (True, True, False)
    assert kinds == {"loha": low, "lokr": low, "lora-fa": low, "ia3": scaled, "bitfit": scaled}


def test_what_differs_per_layer_is_the_inner_methods() -> None:
    assert lk.DoRA(inner=lk.HiRA(rank=2)).pattern_fields == {"rank": "rank_pattern"}
    assert lk.DoRA(inner=lk.LoRA(rank=2)).pattern_fields == lk.LoRA().pattern_fields
    model = torch.nn.Sequential(torch.nn.Linear(8, 6))
    with pytest.raises(LorakitError, match="rank_pattern was given, but dora has no rank per layer"):
        lk.attach(model, lk.DoRA(inner=lk.Full()), target_modules=["0"], rank_pattern={"0": 2})


def test_a_pattern_of_the_inner_method_reaches_it(tmp_path: Path) -> None:
    """Any of them, and through the file; what the inner method has is read as the combinator's own."""
    spec = lk.DoRA(inner=lk.FourierFT(n_frequency=5))
    assert spec.n_frequency == 5
    assert spec.replace(n_frequency=6) == lk.DoRA(inner=lk.FourierFT(n_frequency=6))
    assert copy.deepcopy(spec) == pickle.loads(pickle.dumps(spec)) == spec
    with pytest.raises(AttributeError):
        _ = spec.rank
    with pytest.raises(LorakitError, match='unknown option of fourierft "rank"'):
        spec.replace(rank=3)

    def model() -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Linear(6, 4))

    adapter = lk.attach(model(), spec, target_modules=["0", "1"], patterns={"n_frequency": {"1": 3}})
    adapter.save(tmp_path / "a")
    loaded = lk.load(model(), tmp_path / "a", name="a")
    for one in (adapter, loaded):
        assert [delta.inner.c.numel() for _, _, delta in one.deltas()] == [5, 3]
    with pytest.raises(LorakitError, match=r"rank_pattern and patterns\['rank'\] were both given"):
        lk.attach(model(), lk.LoRA(rank=2), rank_pattern={"0": 1}, patterns={"rank": {"1": 1}})


def test_a_frozen_inner_tensor_stays_frozen() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 6))
    adapter = lk.attach(model, lk.DoRA(inner=lk.LoRAFA(rank=2)), target_modules=["0"])
    assert adapter.num_parameters(trainable=True) == 6 * 2 + 6
