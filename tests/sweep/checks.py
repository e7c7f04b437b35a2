"""What must hold for an adapter on any model, and what is said where it does not."""

from __future__ import annotations

import copy
import tempfile
import time
import traceback
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit.adapter.coverage import coverage
from lorakit.core.injection import ties
from lorakit.core.layout import Bare, Expert
from lorakit.core.walking import walk
from sweep.builder import Built, CannotBuildError, Case, build

TOLERANCE = 2e-4
"""Largest difference in float32, relative to the largest number of the output. A model that is further off is tried again
in float64, where the rounding of a deep stack of random layers is out of the way, and within TOLERANCE / 100."""

OUTCOMES = ("passed", "refused", "cannot be built", "base fails", "files of experts", "WRONG", "CRASH")


@dataclass
class Result:
    """One model's outcome.

    Attributes:
        outcome: one of OUTCOMES.
        reason: what failed, or was said.
        way: how the configuration was shrunk.
        parameters, layers: of the model; adapted by all-linear.
        share: of the matrix numbers, between 0 and 1.
        left: kind of weight that is not reached -> its share.
        unused: layers that this forward does not call, or experts that no token went to.
    """

    model: str
    model_type: str
    head: str
    outcome: str = "passed"
    reason: str = ""
    way: str = ""
    parameters: int = 0
    layers: int = 0
    share: float = 0.0
    left: dict[str, float] = field(default_factory=dict)
    said: dict[str, str] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def as_data(self) -> dict[str, Any]:
        return asdict(self)


class WrongError(Exception):
    """A law does not hold."""


def check(case: Case) -> Result:
    """Build one model and hold it to everything; nothing is raised but what ends a process."""
    result, begun = Result(case.name, case.model_type, case.head), time.perf_counter()
    try:
        built = build(case)
        result.way, result.parameters = built.way, sum(p.numel() for p in built.model.parameters())
        held(built, result)
    except CannotBuildError as problem:
        words = str(problem)
        result.outcome = "base fails" if words.startswith("forward: ") else "cannot be built"
        result.reason = words.removeprefix("forward: ")
    except WrongError as problem:
        result.outcome, result.reason = "WRONG", str(problem)
    except lk.LorakitError as problem:
        result.outcome, result.reason = "refused", str(problem)
    except Exception as problem:
        frames = traceback.extract_tb(problem.__traceback__)
        own = [
            f"{f.filename.rpartition('/')[2]}:{f.lineno}"
            for f in frames
            if "/lorakit/" in f.filename or f is frames[-1]
        ]
        result.outcome = "CRASH"
        result.reason = (
            f"{type(problem).__name__}: {' '.join(str(problem).split())}"[:240] + f" at {' '.join(own[-5:])}"
        )
    result.seconds = round(time.perf_counter() - begun, 2)
    return result


def held(built: Built, result: Result) -> None:
    """Every law on one built model; raises WrongError with the first that does not hold."""
    model = built.model.requires_grad_(False)  # torch multiplies otherwise where a weight has a gradient
    fresh = copy.deepcopy(model)
    with torch.no_grad():
        base = built.run()
        if differs(base, built.run(), 0.0) is not None:
            raise CannotBuildError("forward: two runs from one seed differ")
    classes = {path: type(module) for path, module in model.named_modules()}
    adapter = lk.attach(model, lk.LoRA(rank=2), name="sweep", target_modules="all-linear")
    found = coverage(model, adapter.layers)
    result.layers, result.share = len(adapter.layers), round(found.share, 4)
    result.left = {kind: round(count / found.total, 4) for kind, count in found.left.items()}
    result.said = dict(found.reasons)
    with torch.no_grad():
        require(base, built.run(), 0.0, "the start differs from the base")
    randomise(adapter)
    gradients(built, adapter, result)
    with torch.no_grad():
        beside = built.run()
        if set(adapter.layers) - set(result.unused) and differs(base, beside, 0.0) is None:
            raise WrongError("random adapter values change nothing")
        merged_agrees(built, beside)
        try:
            files(built, adapter, fresh, beside)
        except lk.LorakitError as problem:
            if not any(isinstance(site.layout, Expert | Bare) for _, site, _ in adapter.deltas()):
                raise
            result.outcome, result.reason = "files of experts", str(problem)
        lk.detach(model)
        require(base, built.run(), 0.0, "detach does not give the base back")
    if classes != {path: type(module) for path, module in model.named_modules()}:
        raise WrongError("detach leaves other modules behind")


def randomise(adapter: lk.Adapter, seed: int = 5) -> None:
    """Numbers that change each layer by some percent."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            scale = 0.3 * parameter.shape[-1] ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


def differs(first: list[Tensor], second: list[Tensor], tolerance: float) -> float | None:
    """The largest difference relative to the largest number, where it is above the tolerance; None where they agree."""
    if len(first) != len(second):
        return float("inf")
    worst = 0.0
    for a, b in zip(first, second, strict=True):
        if a.shape != b.shape:
            return float("inf")
        a, b = a.detach().double(), b.detach().double()
        same = (a == b) | (a.isnan() & b.isnan())
        if same.all():
            continue
        if not (a.isfinite() == b.isfinite()).all():
            return float("inf")
        gap = torch.where(same, 0.0, (a - b).abs()).max() / a[a.isfinite()].abs().max().clamp_min(1e-30)
        worst = max(worst, float(gap))
    return worst if worst > tolerance else None


def require(first: list[Tensor], second: list[Tensor], tolerance: float, words: str) -> None:
    """LAW: the two are the same."""
    found = differs(first, second, tolerance)
    if found is not None:
        raise WrongError(f"{words} (relative difference {found:.1e})")


def merged_agrees(built: Built, beside: list[Tensor]) -> None:
    """LAW: beside = merged, in float32, or in float64 where rounding is amplified or changes a choice."""
    with lk.merged(built.model, "sweep"):
        merged = built.run()
    found = differs(beside, merged, TOLERANCE)
    if found is None:
        return
    model = built.model.double()
    try:
        try:
            exact = built.run()
            with lk.merged(model, "sweep"):
                merged = built.run()
        except Exception:  # the model computes in float32 somewhere
            raise WrongError(
                f"beside and merged differ (relative difference {found:.1e}; float64 does not run)"
            ) from None
        require(exact, merged, max(TOLERANCE / 100, 1e-6), "beside and merged differ")
    finally:
        built.model.float()


def gradients(built: Built, adapter: lk.Adapter, result: Result) -> None:
    """LAW: every adapter parameter gets a gradient, unless its layer's own weight gets none in this forward either."""
    if not backward(built.run()) and hasattr(built.model, "enable_input_require_grads"):
        built.model.enable_input_require_grads()  # reversible layers, as reentrant checkpointing, start at the input
        backward(built.run())
        built.model.disable_input_require_grads()
    missing = [
        (path, site) for path, site, delta in adapter.deltas() if any(not _has_gradient(p) for p in delta.parameters())
    ]
    for parameter in adapter.parameters():
        parameter.grad = None
    if not missing:
        return
    weights, tied = {}, ties(dict(walk(built.model)))
    for path, site in missing:
        layer = adapter.layers[path].base
        owner, _, last = site.weight.rpartition(".")
        weights[path, site.weight] = getattr(layer.get_submodule(owner), last).requires_grad_(True)
    backward(built.run())
    read: list[str] = []
    for path, site in missing:
        gradient = weights[path, site.weight].grad
        if gradient is not None and isinstance(site.layout, Expert):
            gradient = gradient[site.layout.index] if gradient.shape[0] == site.layout.count else gradient
        if path in tied:  # said by `attach`: the adapter acts beside this use alone
            result.unused.append(path)
        elif gradient is not None and gradient.abs().max() > 0:
            read.append(path)
        else:
            result.unused.append(path if not isinstance(site.layout, Expert) else f"{path} {site.name}")
    for weight in weights.values():
        weight.requires_grad_(False).grad = None
    for parameter in adapter.parameters():
        parameter.grad = None
    if read:
        raise WrongError(
            f"no gradient reaches the adapter of {', '.join(read[:4])} ({len(read)}), whose weight gets one"
        )


def backward(outputs: list[Tensor]) -> bool:
    """A backward of random directions through all outputs; whether any has a gradient."""
    generator = torch.Generator().manual_seed(4)
    outputs = [tensor for tensor in outputs if tensor.requires_grad]
    terms = [
        (tensor.nan_to_num(0, 0, 0) * torch.randn(tensor.shape, generator=generator).to(tensor.dtype)).sum()
        for tensor in outputs
    ]
    if terms:
        torch.stack([term.float() for term in terms]).sum().backward()
    return bool(terms)


def _has_gradient(parameter: Tensor) -> bool:
    return parameter.grad is not None and bool(parameter.grad.abs().max() > 0)


def files(built: Built, adapter: lk.Adapter, fresh: nn.Module, beside: list[Tensor]) -> None:
    """LAW: saved and loaded onto a fresh model, it gives the same output."""
    with tempfile.TemporaryDirectory() as folder:
        path = adapter.save(folder + "/saved")
        lk.load(fresh, path, name="read")
        lk.activate(fresh, "read")
        require(beside, built.run(fresh), 1e-6, "saved and loaded, it gives another output")
        lk.detach(fresh)
