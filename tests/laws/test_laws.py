"""Every law, over every method and layer kind.

One test is one law for one method's example, over its layer kinds; a failure names the kind.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from laws import cases, laws
from lorakit.core.delta import Method
from lorakit.errors import LorakitError
from lorakit.methods import METHODS

REFUSED: list[cases.Case] = []
UNREACHABLE: list[cases.Case] = []
FITTING: dict[str, list[cases.Case]] = {}
SLOW: dict[str, list[cases.Case]] = {}
for one in cases.cases():
    if one.refusal() is not None:
        REFUSED.append(one)
    elif one.homeless() and not one.beside():
        UNREACHABLE.append(one)
    else:
        (SLOW if one.slow else FITTING).setdefault(cases.label(one.spec), []).append(one)
GROUPS = [pytest.param(group, id=name) for name, group in FITTING.items()]
GROUPS += [pytest.param(group, id=f"{name}-elsewhere", marks=pytest.mark.slow) for name, group in SLOW.items()]


pytestmark = pytest.mark.usefixtures("one_thread")


def over(group: list[cases.Case], law: Callable[[cases.Case], None]) -> None:
    """The law on every layer kind of one example; what it raises says on which."""
    for case in group:
        try:
            law(case)
        except Exception as problem:
            problem.add_note(f"on the layer kind {case.kind.name!r}, with {case.spec}")
            raise


def test_every_method_has_examples() -> None:
    assert set(cases.SPECS) == set(METHODS)
    for name, specs in cases.SPECS.items():
        assert specs, name
        for spec in specs:
            assert type(spec) is METHODS[name]
            assert spec.name == name


def test_every_example_fits_somewhere() -> None:
    expected: list[Method] = [spec for specs in cases.SPECS.values() for spec in specs]
    assert set(FITTING) == {cases.label(spec) for spec in [*expected, *cases.PROBES]}


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("law", laws.LAWS, ids=lambda law: law.__name__)
def test_law(law: laws.Law, group: list[cases.Case]) -> None:
    over(group, law)


@pytest.mark.parametrize("group", [one for one in GROUPS if one.values[0][0].spec.name in METHODS])
def test_saves_exactly(group: list[cases.Case], tmp_path: Path) -> None:
    def law(case: cases.Case) -> None:
        (tmp_path / case.kind.name).mkdir()
        laws.saves_exactly(case, tmp_path / case.kind.name)

    over(group, law)


def test_refusals_are_told_by_the_card() -> None:
    """A layer kind that a method refuses is a limit of the method, so its card says so; attach refuses it too."""
    for case in REFUSED:
        assert case.spec.card.limits, f"{case.spec.name} refuses {case.kind.name} and its card states no limit"
        model = case.model()
        with pytest.raises(LorakitError):
            case.attach(model, "one")
        assert not hasattr(model, "_lorakit")


def test_a_bias_that_can_neither_be_substituted_nor_added_is_refused() -> None:
    for case in UNREACHABLE:
        subject = case.subject("one")
        with pytest.raises(LorakitError, match="bias"):
            subject.run("one", subject.calls[0])
