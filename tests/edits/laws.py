"""What holds for every edit on every kind of model. Each law is a function of a case and raises AssertionError where broken.

All is float64 and random; the numbers compared are sums of a few hundred products in another order, through two layers.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lorakit as lk
from edits.models import CAUSAL, GENERATING, inputs, make, run
from lorakit.edits.anatomy import anatomy_of
from lorakit.edits.contract import EditMethod
from lorakit.errors import LorakitError
from lorakit.files.store import read_tensors

BOUND = 1e-10


@dataclass(frozen=True)
class Case:
    """An edit on a model."""

    spec: EditMethod
    kind: str

    def __str__(self) -> str:
        options = [str(value) for value in vars(self.spec).values() if isinstance(value, str)]
        return "-".join([self.kind, self.spec.name, *options[:1]])

    def model(self) -> Any:
        return make(self.kind)

    def given(self, left: bool = False) -> dict[str, Tensor]:
        return inputs(self.kind, left)

    def attach(self, model: Any, name: str = "one", fresh: bool = False) -> lk.Adapter:
        """An edit of random values (as its paper starts it, with `fresh`), in float64."""
        torch.manual_seed(len(name))
        adapter = lk.attach(model, self.spec, name=name)
        if not fresh:
            model.double()
            with torch.no_grad():
                for parameter in adapter.parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.3)
        return adapter


def assert_close(found: Tensor, expected: Tensor, what: str) -> None:
    assert found.shape == expected.shape, f"{what}: shapes {tuple(found.shape)} and {tuple(expected.shape)}"
    error = (found - expected).abs().max().item()
    assert error <= BOUND * max(1.0, expected.abs().max().item()), f"{what}: off by {error:.3g}"


def assert_differs(found: Tensor, other: Tensor, what: str) -> None:
    assert (found - other).abs().max().item() > 1e-6, f"{what}: no difference"


def identity_at_start(case: Case) -> None:
    """A new edit changes nothing, unless its card says that it does."""
    model, given = case.model(), case.given()
    base = run(model, given)
    case.attach(model, fresh=True)
    found = run(model, given)
    if case.spec.card.identity:
        assert_close(found, base, "a new edit")
    else:
        assert_differs(found, base, "a new edit, which is not the base")


@torch.no_grad()  # torch chooses other kernels for frozen weights, which the base's are only while an edit is on it
def off_is_the_base(case: Case) -> None:
    """Without a route the very base answers, and after `detach` nothing is left of the edit."""
    model, given = case.model(), case.given()
    base, before = run(model, given), _shape_of(model)
    case.attach(model)
    assert_differs(run(model, given), base, "a random edit")
    with lk.use(model, None):
        assert torch.equal(run(model, given), base), "without a route the model is not the very base"
    lk.detach(model)
    assert torch.equal(run(model, given), base), "after detach the model is not the very base"
    assert _shape_of(model) == before, "detach leaves something behind"


def _shape_of(model: Any) -> list[Any]:
    """What of a model an edit might leave something in."""
    return [
        (name, type(module), sorted(module.__dict__), len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in model.named_modules()
    ] + [[parameter.requires_grad for parameter in model.parameters()], model.config._attn_implementation]


def rows_are_their_own(case: Case) -> None:
    """A batch with another edit in each row gives each row what it gets alone."""
    for left in (False, True) if case.kind in CAUSAL else (False,):
        model, given = case.model(), case.given(left)
        case.attach(model, "one")
        second = "another"
        longer = {"tokens": case.spec.tokens + 2} if hasattr(case.spec, "tokens") else {}  # type: ignore[attr-defined]
        Case(case.spec.replace(**longer), case.kind).attach(model, second)
        alone: list[Tensor] = []
        for row, route in enumerate(("one", None, second)):
            with lk.use(model, route):
                alone.append(_row(model(**given).logits, given, row))
        with lk.use(model, ["one", None, second]):
            mixed = model(**given).logits
        for row, expected in enumerate(alone):
            assert_close(_row(mixed, given, row), expected, f"row {row} of a mixed batch")


def _row(logits: Tensor, given: dict[str, Tensor], row: int) -> Tensor:
    return logits[row][given["attention_mask"][row].bool()] if "position_ids" in given else logits[row]


def padding_is_not_seen(case: Case) -> None:
    """Padding on the left or on the right, the same texts get the same answers."""
    model = case.model()
    case.attach(model)
    assert_close(run(model, case.given(left=True)), run(model, case.given()), "padding on the other side")


def acts_beside_a_delta(case: Case) -> None:
    """An edit with a LoRA beside it is the edit on a model with that LoRA merged."""
    model, given = case.model(), case.given()
    lora = lk.attach(model, lk.LoRA(rank=2, alpha=3.0), name="lora")
    case.attach(model)
    with torch.no_grad():
        for parameter in lora.parameters():
            parameter.normal_(std=0.2)
    with lk.use(model, {"lora": 1.0, "one": 1.0}):
        both = run(model, given)
    with lk.merged(model, "lora"), lk.use(model, "one"):
        assert_close(both, run(model, given), "an edit beside a merged LoRA")
    with lk.use(model, "lora"):
        assert_differs(both, run(model, given), "an edit beside a LoRA")
    other = case.model()
    case.attach(other)
    alone = run(other, given)
    later = lk.attach(other, lk.LoRA(rank=2, alpha=3.0), name="lora")
    later.load_state_dict(lora.state_dict())
    with lk.use(other, {"lora": 1.0, "one": 1.0}):
        assert_close(run(other, given), both, "a LoRA put beside an edit")
    lk.detach(other, "lora")
    with lk.use(other, "one"):
        assert_close(run(other, given), alone, "an edit whose LoRA left")


def file_keeps_it(case: Case, folder: Path) -> None:
    """Saved and loaded it gives the very same answers, on any route, and the same tensors."""
    model, given = case.model().float(), case.given()
    adapter = case.attach(model)
    model.float()
    adapter.save(folder)
    loaded = case.model().float()
    again = lk.load(loaded, folder, name="again")
    assert torch.equal(run(loaded, given), run(model, given)), "a loaded edit does not act"
    with lk.use(model, None), lk.use(loaded, None):
        assert torch.equal(run(loaded, given), run(model, given)), "an edit acts that is not used"
    with lk.use(loaded, "again"):
        assert torch.equal(run(loaded, given), run(model, given)), "a loaded edit gives something else"
    again.save(folder.with_name("twice"))
    first, second = read_tensors(folder), read_tensors(folder.with_name("twice"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first), "the file changed"


def trains_alone(case: Case) -> None:
    """After a few steps every number that trains has moved, and nothing else."""
    model, given = case.model(), case.given()
    torch.manual_seed(1)
    adapter = lk.attach(model, case.spec)
    model.double()
    base = {name: p.clone() for name, p in model.named_parameters() if "lorakit_edits" not in name}
    before = {name: p.clone() for name, p in adapter.named_parameters()}
    optimizer = torch.optim.Adam(adapter.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        logits = run(model, given)
        torch.nn.functional.cross_entropy(logits.flatten(0, -2), torch.arange(logits[..., 0].numel()) % 3).backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        if "lorakit_edits" not in name:
            assert torch.equal(parameter, base[name]), f"{name} of the base has moved"
    for name, parameter in adapter.named_parameters():
        if not name.endswith("second.bias") or "K" not in name:
            assert not torch.equal(parameter, before[name]), f"{name} has not moved"


def count_is_the_cards(case: Case) -> None:
    model = case.model()
    adapter = case.attach(model)
    expected = case.spec.card.parameters(anatomy_of(model), case.spec)
    assert adapter.num_parameters(trainable=True) == expected, (
        f"{adapter.num_parameters()} numbers, the card says {expected}"
    )


def caches_change_nothing(case: Case) -> None:
    """Generated with a cache and without it, greedily and by beams, padded on the left: the same tokens."""
    if case.kind not in GENERATING:
        return
    model = case.model()
    case.attach(model)
    case.attach(model, "another")
    given = {key: value for key, value in case.given(left=True).items() if key in ("input_ids", "attention_mask")}
    lengths = given["attention_mask"].sum(1)
    rows = ["one", None, "another"]
    for route, beams in (("one", 1), (rows, 1), ("one", 2), (rows, 2)):
        answers = []
        for cached in (True, False):
            with lk.use(model, route, copies=beams), lk.prompts(model, lengths):
                options = {"max_new_tokens": 4, "num_beams": beams, "do_sample": False, "use_cache": cached}
                more = {"return_dict_in_generate": True, "output_logits": True}
                answers.append(model.generate(**given, **options, **more))
        what = f"with a cache, route {route}, {beams} beams"
        assert torch.equal(answers[0].sequences, answers[1].sequences), f"other tokens {what}"
        assert_close(torch.stack(answers[0].logits), torch.stack(answers[1].logits), what)


def recomputing_changes_nothing(case: Case) -> None:
    """Gradient checkpointing gives the same gradients."""
    model, given = case.model(), case.given()
    adapter = case.attach(model)
    model.train()
    found = []
    for recompute in (False, True):
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        run(model, given).square().mean().backward()
        found.append({name: p.grad.clone() for name, p in adapter.named_parameters() if p.grad is not None})
        model.zero_grad()
    assert found[0].keys() == found[1].keys(), "checkpointing loses a gradient"
    assert any(grad.abs().max() > 1e-8 for grad in found[0].values())
    for name, grad in found[0].items():
        assert_close(found[1][name], grad, f"the gradient of {name} under checkpointing")


def forward_writes_nothing(case: Case) -> None:
    """Twice the same, also by a copy of the model, which is its own."""
    model, given = case.model(), case.given()
    adapter = case.attach(model)
    before = _shape_of(model)
    first = run(model, given)
    assert torch.equal(run(model, given), first), "the second call gives something else"
    assert _shape_of(model) == before, "a call leaves something behind"
    other = copy.deepcopy(model)
    assert torch.equal(run(other, given), first), "a copy of the model gives something else"
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.zero_()
    assert torch.equal(run(other, given), first), "a copy shares its edit with the original"


def refuses_what_cannot_be(case: Case) -> None:
    """Merging, and shares of what acts whole."""
    model, given = case.model(), case.given()
    case.attach(model)
    case.attach(model, "another")
    said = ""
    try:
        lk.merge(model, "one")
    except LorakitError as problem:
        said = str(problem)
    assert case.spec.reason in said, "merging an edit is not refused with the reason"
    blend = {"one": 0.5, "another": 0.5}
    if not case.spec.blends:
        try:
            with lk.use(model, blend):
                raise AssertionError("a blend of prompts was not refused")
        except LorakitError as problem:
            assert "cannot be blended" in str(problem)  # noqa: PT017 - both ways out are looked at
        return
    with lk.use(model, "one"):
        alone = run(model, given)
    with lk.use(model, {"one": 1.0, "another": 0.0}):
        assert_close(run(model, given), alone, "a blend with nothing of the other")
    with lk.use(model, blend):
        assert_differs(run(model, given), alone, "a blend")
