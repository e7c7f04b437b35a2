"""The laws over every edit: all of them on a Llama, and what depends on the kind of model on each kind."""

from __future__ import annotations

from pathlib import Path

import pytest

from edits import laws
from edits.laws import Case
from lorakit.edits import EDITS, Bottleneck, LLaMAAdapter, LoReFT, PrefixTuning, PromptTuning, PTuning
from lorakit.edits.contract import EditMethod

SPECS: dict[str, tuple[EditMethod, ...]] = {
    "bottleneck": (
        Bottleneck(size=3),
        Bottleneck(size=3, placement="pfeiffer", activation="gelu"),
        Bottleneck(size=3, placement="parallel", scale=4.0),
    ),
    "prompt-tuning": (PromptTuning(tokens=3, start="random"),),
    "p-tuning": (PTuning(tokens=3, width=5), PTuning(tokens=3, encoder="lstm", width=4, depth=1)),
    "prefix-tuning": (PrefixTuning(tokens=3, width=5), PrefixTuning(tokens=3, width=None)),
    "llama-adapter": (LLaMAAdapter(tokens=3, top=2), LLaMAAdapter(tokens=3, top=2, gate="layer")),
    "loreft": (LoReFT(rank=2, first=1, last=2),),
}
FIRST = {name: specs[0] for name, specs in SPECS.items()}
ON_LLAMA = [Case(spec, "llama") for specs in SPECS.values() for spec in specs]
ON_OTHERS = [Case(spec, kind) for kind in ("gpt2", "bert", "t5", "bart") for spec in FIRST.values()]
GENERAL = (
    laws.trains_alone,
    laws.count_is_the_cards,
    laws.acts_beside_a_delta,
    laws.forward_writes_nothing,
    laws.refuses_what_cannot_be,
)
BY_KIND = (
    laws.identity_at_start,
    laws.off_is_the_base,
    laws.rows_are_their_own,
    laws.recomputing_changes_nothing,
    laws.caches_change_nothing,
)


def test_every_edit_is_here() -> None:
    assert set(SPECS) == set(EDITS)


@pytest.mark.parametrize("case", ON_LLAMA, ids=str)
def test_on_a_llama(case: Case) -> None:
    for law in (*GENERAL, *BY_KIND, laws.padding_is_not_seen):
        law(case)


@pytest.mark.parametrize("case", ON_LLAMA, ids=str)
def test_files(case: Case, tmp_path: Path) -> None:
    laws.file_keeps_it(case, tmp_path / "one")


@pytest.mark.parametrize("case", ON_OTHERS, ids=str)
def test_on_other_kinds(case: Case) -> None:
    for law in BY_KIND:
        law(case)
