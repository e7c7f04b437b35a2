"""Every law, over every method and layer kind."""

from pathlib import Path

import pytest
import torch

from laws import cases, laws
from lorakit.errors import LorakitError
from lorakit.methods import METHODS

REFUSED, UNREACHABLE, FITTING = [], [], []
for one in cases.cases():
    if one.refusal() is not None:
        REFUSED.append(one)
    elif one.homeless() and not one.beside():
        UNREACHABLE.append(one)
    else:
        FITTING.append(one)


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_every_method_has_examples():
    assert set(cases.SPECS) == set(METHODS)
    for name, specs in cases.SPECS.items():
        assert specs, name
        for spec in specs:
            assert type(spec) is METHODS[name]
            assert spec.name == name


def test_every_method_fits_somewhere():
    assert {case.spec.name for case in FITTING} >= set(METHODS)


@pytest.mark.parametrize("case", FITTING, ids=cases.label)
@pytest.mark.parametrize("law", laws.LAWS, ids=lambda law: law.__name__)
def test_law(law: laws.Law, case: cases.Case):
    law(case)


@pytest.mark.parametrize("case", [case for case in FITTING if case.spec.name in METHODS], ids=cases.label)
def test_saves_exactly(case: cases.Case, tmp_path: Path):
    laws.saves_exactly(case, tmp_path)


def test_refusals_are_told_by_the_card():
    """A layer kind that a method refuses is a limit of the method, so its card says so; attach refuses it too."""
    for case in REFUSED:
        assert case.spec.card.limits, f"{cases.label(case)} is refused and the card states no limit"
        model = case.model()
        with pytest.raises(LorakitError):
            case.attach(model, "one")
        assert not hasattr(model, "_lorakit")


@pytest.mark.parametrize("case", UNREACHABLE, ids=cases.label)
def test_a_bias_that_can_neither_be_substituted_nor_added_is_refused(case: cases.Case):
    subject = case.subject("one")
    with pytest.raises(LorakitError, match="bias"):
        subject.run("one", subject.calls[0])
