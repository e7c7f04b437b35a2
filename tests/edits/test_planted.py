"""Each law catches the bug it is there for: with the bug planted it raises AssertionError, without it it holds.

A bug is put in by monkeypatch where a careless change would put it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from edits import laws
from edits.laws import Case
from edits.test_laws import FIRST
from lorakit.core import using
from lorakit.edits import attention, bottleneck, hooks, llamaadapter, loreft, prompt, prompt_rows, rows
from lorakit.files.formats import FORMATS
from lorakit.models.attention import Override

Patch = pytest.MonkeyPatch


def start_not_zero(patch: Patch) -> None:
    """U is drawn like D."""
    start = bottleneck.BottleneckEdit.__init__

    def planted(self: Any, *args: Any) -> None:
        start(self, *args)
        torch.nn.init.normal_(self.U)

    patch.setattr(bottleneck.BottleneckEdit, "__init__", planted)


def gate_not_zero(patch: Patch) -> None:
    """A gate that starts open."""
    patch.setattr(llamaadapter.GatedTokens, "gate", lambda self: torch.tanh(self.g + 1))


def random_start_by_default(patch: Patch) -> None:
    """W does not start as R."""
    start = loreft.SubspaceEdit.__init__

    def planted(self: Any, *args: Any) -> None:
        start(self, *args)
        torch.nn.init.normal_(self.W)

    patch.setattr(loreft.SubspaceEdit, "__init__", planted)


def prompt_stays_on(patch: Patch) -> None:
    """Prompt rows enter whatever the routing says."""
    patch.setattr(prompt_rows, "choose", lambda routing, among: rows.RowChoice(tuple(among)[:1]))


def hook_stays(patch: Patch) -> None:
    """`remove` leaves its hooks behind."""

    def planted(self: hooks.EditHooks, names: Any) -> None:
        del self.model._modules[hooks.NAME]

    patch.setattr(hooks.EditHooks, "remove", planted)


def attention_stays_wrapped(patch: Patch) -> None:
    """The configuration keeps the name of the function made for edits."""
    patch.setattr(Override, "take_off", lambda self, model: None)


def first_row_for_all(patch: Patch) -> None:
    """Every row gets the first row's prompt."""
    choose = rows.choose

    def planted(routing: Any, among: Any) -> rows.RowChoice:
        found = choose(routing, among)
        return found if found.index is None else rows.RowChoice(found.names, found.index[:1].expand_as(found.index))

    patch.setattr(prompt_rows, "choose", planted)


def filling_is_seen(patch: Patch) -> None:
    """Rows with a shorter prompt look at what fills it up."""
    real: Any = rows.Columns.real.fget  # type: ignore[attr-defined]

    def planted(self: rows.Columns) -> Tensor | None:
        found = real(self)
        return None if found is None else torch.ones_like(found)

    patch.setattr(rows.Columns, "real", property(planted))


def weights_of_rows_forgotten(patch: Patch) -> None:
    """An edit of a layer acts on all rows."""
    patch.setattr(rows, "per_row", lambda column, y, axis: torch.ones_like(column).reshape(-1, *[1] * (y.ndim - 1)))


def prefix_of_the_other_row(patch: Patch) -> None:
    per_row = rows.Columns.per_row

    def planted(self: rows.Columns, tables: Any, index: Tensor | None, *rest: Any, **more: Any) -> Tensor:
        return per_row(self, tables, None if index is None else index.roll(1), *rest, **more)

    patch.setattr(rows.Columns, "per_row", planted)


def positions_not_moved(patch: Patch) -> None:
    """Given positions are not counted on behind a prompt."""
    patch.setattr(prompt_rows._StackCall, "_set_positions", lambda self: self.given.pop("position_ids", None))


def prompt_enters_again(patch: Patch) -> None:
    """A prompt comes before every chunk."""
    add = prompt_rows._StackCall.add_prompts

    def planted(self: Any) -> Any:
        self.cached = 0
        return add(self)

    patch.setattr(prompt_rows._StackCall, "add_prompts", planted)


def prefix_only_at_first(patch: Patch) -> None:
    """A prefix is left out when a token comes alone."""
    prefixed = attention.AttentionEdits._prefixed

    def planted(
        self: Any, who: Any, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, kwargs: Any
    ) -> Any:
        if query.shape[2] == 1:
            return key, value, mask
        return prefixed(self, who, module, query, key, value, mask, kwargs)

    patch.setattr(attention.AttentionEdits, "_prefixed", planted)


def edits_in_answers(patch: Patch) -> None:
    """Generated tokens count as a prompt's."""
    patch.setattr(
        prompt_rows._StackCall, "prompt_tokens", lambda self: torch.ones(len(self.tokens), self.own, dtype=torch.bool)
    )


def file_without_a_tensor(patch: Patch) -> None:
    kept = bottleneck.BottleneckEdit.kept
    patch.setattr(bottleneck.BottleneckEdit, "kept", lambda self: {k: v for k, v in kept(self).items() if k != "u"})


def keys_and_values_swapped(patch: Patch) -> None:
    """The file's table read in the other order."""
    row: Any = FORMATS["prefix-tuning"]

    def planted(spec: Any, tensors: Any, config: Any, paths: Any) -> dict[str, Tensor]:
        found = row.from_file(spec, tensors, config, paths)
        return {key[:-1] + {"K": "V", "V": "K"}[key[-1]]: value for key, value in found.items()}

    patch.setitem(FORMATS, "prefix-tuning", dataclasses.replace(row, from_file=planted))


def rows_are_detached(patch: Patch) -> None:
    patch.setattr(prompt.PromptRows, "rows", lambda self: self.P.detach() + 0 * self.P)


def count_without_bias(patch: Patch) -> None:
    import dataclasses

    card = dataclasses.replace(
        bottleneck.Bottleneck.card,
        parameters=lambda anatomy, spec: len(spec.places(anatomy, None)) * 2 * anatomy.hidden * spec.size,
    )
    patch.setattr(bottleneck.Bottleneck, "card", card)


def hooks_not_moved(patch: Patch) -> None:
    """Hooks stay on the layer that a delta has wrapped, and see what is not the whole of it."""
    rehook = hooks.EditHooks.rehook

    def planted(self: hooks.EditHooks) -> None:
        if not (self.handles and self.changes):
            rehook(self)

    patch.setattr(hooks.EditHooks, "rehook", planted)


def call_leaves_something(patch: Patch) -> None:
    """A hook that keeps the last input on the layer."""
    enter = hooks.ChangeHooks._enter

    def planted(self: Any, module: Any, args: Any, kwargs: Any) -> Any:
        module.last = args[0]
        return enter(self, module, args, kwargs)

    patch.setattr(hooks.ChangeHooks, "_enter", planted)


def encoder_with_rows_repeated(patch: Patch) -> None:
    """The encoder is asked for the rows of all beams."""
    patch.setattr(using, "_encoder", lambda model: None)


def shares_allowed(patch: Patch) -> None:
    patch.setattr(hooks.EditHooks, "check", lambda self, routing: None)


def gradient_lost_on_the_way(patch: Patch) -> None:
    """What stands in front of the input keeps its gradient only while nothing is computed again."""
    rows = prompt.PromptRows.rows

    def planted(self: Any) -> Tensor:
        return rows(self).detach() + 0 * self.P

    patch.setattr(prompt.PromptRows, "rows", planted)


def padding_moves_positions(patch: Patch) -> None:
    """The first tokens of the row are taken for the prompt's first, padding or not."""

    def planted(self: Any, prompt_tokens: Tensor) -> Tensor:
        chosen = torch.zeros_like(prompt_tokens)
        chosen[:, : self.first] = True
        return chosen

    patch.setattr(loreft.SubspaceEdit, "select", planted)


PLANTED: list[tuple[Callable[..., None], str, str, Callable[[Patch], None]]] = [
    (laws.identity_at_start, "bottleneck", "llama", start_not_zero),
    (laws.identity_at_start, "llama-adapter", "llama", gate_not_zero),
    (laws.identity_at_start, "loreft", "llama", random_start_by_default),
    (laws.off_is_the_base, "prompt-tuning", "llama", prompt_stays_on),
    (laws.off_is_the_base, "bottleneck", "llama", hook_stays),
    (laws.off_is_the_base, "prefix-tuning", "llama", attention_stays_wrapped),
    (laws.rows_are_their_own, "prompt-tuning", "llama", first_row_for_all),
    (laws.rows_are_their_own, "prompt-tuning", "bert", filling_is_seen),
    (laws.rows_are_their_own, "bottleneck", "llama", weights_of_rows_forgotten),
    (laws.rows_are_their_own, "prefix-tuning", "llama", prefix_of_the_other_row),
    (laws.padding_is_not_seen, "prompt-tuning", "llama", positions_not_moved),
    (laws.padding_is_not_seen, "loreft", "llama", padding_moves_positions),
    (laws.caches_change_nothing, "prompt-tuning", "llama", prompt_enters_again),
    (laws.caches_change_nothing, "prefix-tuning", "llama", prefix_only_at_first),
    (laws.caches_change_nothing, "loreft", "llama", edits_in_answers),
    (laws.caches_change_nothing, "prompt-tuning", "t5", encoder_with_rows_repeated),
    (laws.file_keeps_it, "bottleneck", "llama", file_without_a_tensor),
    (laws.file_keeps_it, "prefix-tuning", "llama", keys_and_values_swapped),
    (laws.trains_alone, "prompt-tuning", "llama", rows_are_detached),
    (laws.count_is_the_cards, "bottleneck", "llama", count_without_bias),
    (laws.acts_beside_a_delta, "bottleneck", "llama", hooks_not_moved),
    (laws.forward_writes_nothing, "bottleneck", "llama", call_leaves_something),
    (laws.refuses_what_cannot_be, "prompt-tuning", "llama", shares_allowed),
    (laws.recomputing_changes_nothing, "prompt-tuning", "llama", gradient_lost_on_the_way),
]


@pytest.mark.parametrize(("law", "name", "kind", "plant"), PLANTED, ids=lambda one: getattr(one, "__name__", one))
def test_the_law_catches_the_bug(
    law: Callable[..., None], name: str, kind: str, plant: Callable[[Patch], None], tmp_path: Path
) -> None:
    case = Case(FIRST[name], kind)
    more = (tmp_path / "one",) if law is laws.file_keeps_it else ()
    with pytest.MonkeyPatch.context() as patch:
        plant(patch)
        with pytest.raises(Exception) as caught:
            law(case, *more)
    assert isinstance(caught.value, AssertionError | laws.LorakitError | RuntimeError), caught.value


def test_every_law_has_a_bug() -> None:
    from edits.test_laws import BY_KIND, GENERAL

    assert {law for law, *_ in PLANTED} == {*GENERAL, *BY_KIND, laws.padding_is_not_seen, laws.file_keeps_it}
