"""What must hold for an adapter on any model, and what is said where it does not."""

from __future__ import annotations

import copy
import tempfile
import time
import traceback
import warnings
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit.adapter.coverage import Coverage, coverage, kind_of
from lorakit.core.injection import ties
from lorakit.core.layout import Expert
from lorakit.core.sites import sites_of
from lorakit.core.walking import walk
from sweep.builder import Built, CannotBuildError, Case, build
from sweep.others import LIBRARIES, build_other

TOLERANCE = 2e-4
"""Largest difference in float32, relative to the largest number of the output. A model that is further off is tried again
in float64, where the rounding of a deep stack of random layers is out of the way, and within TOLERANCE / 100."""

Run = Callable[[], list[Tensor]]

OUTCOMES = ("passed", "refused", "cannot be built", "base fails", "WRONG", "CRASH")


@dataclass
class Result:
    """One model's outcome.

    Attributes:
        outcome: one of OUTCOMES.
        reason: what failed, or was said.
        way: how the configuration was shrunk.
        parameters, layers: of the model; adapted by all-linear.
        share: of the matrix numbers, between 0 and 1.
        left: kind of weight that is not reached -> its share; why: reason -> the share of all such kinds.
        unused: layers that this forward does not call, or experts that no token went to.
        inside: the output is choices (codes, indices), so that what the model's parts give is compared.
        peft: begins with "equal" where PEFT loads the file and gives the same output, else what it says.
        back: the same for a file that PEFT has written and lorakit loads, for a share of the models.
        seconds: of computing.
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
    why: dict[str, float] = field(default_factory=dict)
    said: dict[str, str] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    inside: bool = False
    peft: str = ""
    back: str = ""
    seconds: float = 0.0

    def as_data(self) -> dict[str, Any]:
        return asdict(self)


class WrongError(Exception):
    """A law does not hold."""


def check(case: Case) -> Result:
    """Build one model and hold it to everything; nothing is raised but what ends a process."""
    result, begun = Result(case.name, case.model_type, case.head), time.process_time()
    try:
        built = build_other(case) if case.model_type in LIBRARIES else build(case)
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
    result.seconds = round(time.process_time() - begun, 2)
    return result


class UnmovedError(WrongError):
    """Random adapter values leave the output as it was."""


def held(built: Built, result: Result) -> None:
    """Every law on one built model; raises WrongError with the first that does not hold."""
    try:
        _held(built, result)
    except UnmovedError:
        if built.inside:
            raise
        lk.detach(built.model)
        built.inside = result.inside = True
        result.unused.clear()
        _held(built, result)


def _held(built: Built, result: Result) -> None:
    model = built.model.requires_grad_(False)  # torch multiplies otherwise where a weight has a gradient
    fresh = copy.deepcopy(model)
    with torch.no_grad():
        base = built.run()
        if differs(base, built.run(), 0.0) is not None:
            raise CannotBuildError("forward: two runs from one seed differ")
    classes = {path: type(module) for path, module in model.named_modules()}
    adapter = attached(model, result)
    found = coverage(model, adapter.layers)
    result.layers, result.share = len(adapter.layers), round(found.share, 4)
    result.left = {kind: round(count / found.total, 4) for kind, count in found.left.items()}
    for kind, reason in why_left(model, found).items():
        result.why[reason] = round(result.why.get(reason, 0) + found.left[kind] / found.total, 4)
    result.said |= found.reasons
    with torch.no_grad():
        require(base, built.run(), 0.0, "the start differs from the base")
    randomise(adapter)
    gradients(built, adapter, result)
    with torch.no_grad():
        beside = built.run()
        if differs(base, beside, 0.0) is None:
            if built.inside and not set(adapter.layers) - set(result.unused):
                raise CannotBuildError("forward: the call that is found reaches no adapted layer")
            raise UnmovedError("random adapter values change nothing")
        merged_agrees(built, beside)
        files(built, adapter, fresh, beside, result)
        lk.detach(model)
        require(base, built.run(), 0.0, "detach does not give the base back")
    if classes != {path: type(module) for path, module in model.named_modules()}:
        raise WrongError("detach leaves other modules behind")


def why_left(model: nn.Module, found: Coverage) -> dict[str, str]:
    """Kind of weight that an adapter does not reach -> the reason."""
    reasons: dict[str, str] = {}
    for path, module in walk(model):
        name = type(module).__name__
        try:
            sites = sites_of(module)
        except lk.LorakitError:
            sites, name = [], "a weight that is computed at each call"
        for parameter in module._parameters:
            kind = kind_of(f"{path}.{parameter}")
            if kind not in found.left or kind in reasons:
                continue
            if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
                reasons[kind] = "a convolution, to be named"
            elif isinstance(module, nn.modules.conv._ConvTransposeNd):
                reasons[kind] = "a transposed convolution"
            elif isinstance(module, nn.RNNBase | nn.RNNCellBase):
                reasons[kind] = "a recurrent layer of torch"
            elif isinstance(module, torch.nn.utils.parametrize.ParametrizationList) or name.startswith("a weight"):
                reasons[kind] = "a weight that is computed at each call"
            elif not sites:
                verb = "holds" if type(module).__module__.startswith("torch.") else "multiplies by itself"
                reasons[kind] = f"a parameter that `{name}` {verb}"
            elif sites[0].named_only:
                reasons[kind] = f"`{name}` has a forward of its own; to be named"
            else:
                reasons[kind] = f"`{name}`: not said"
    return {kind: reasons.get(kind, "not said") for kind in found.left}


def attached(model: nn.Module, result: Result) -> lk.Adapter:
    """A LoRA on all linear layers; in a model without any, on its convolutions by name."""
    convolutions = [path for path, module in walk(model) if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)]
    try:
        return lk.attach(model, lk.LoRA(rank=2), name="sweep", target_modules="all-linear")
    except lk.LorakitError as problem:
        reasons = "; ".join(f"{ending}: {reason}" for ending, reason in coverage(model, []).reasons.items())
        if "found no such linear layer" not in str(problem) or not convolutions:
            raise lk.LorakitError(f"{reasons} ({problem})" if reasons else str(problem)) from problem
    result.said["all-linear"] = "finds no linear layer; convolutions are adapted by name"
    return lk.attach(model, lk.LoRA(rank=2), name="sweep", target_modules=convolutions)


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


def apart(models: list[nn.Module], known: list[Tensor], first: Run, second: Run) -> float | None:
    """The relative difference of two runs; None where they agree in float32, or in float64 where rounding is amplified or
    changes a choice. `known` is what `first` gives in float32."""
    found = differs(known, second(), TOLERANCE)
    if found is None:
        return None
    try:
        for model in models:
            model.double()
        return differs(first(), second(), max(TOLERANCE / 100, 1e-6))
    except Exception:  # the model computes in float32 somewhere
        return found
    finally:
        for model in models:
            model.float()


def merged_agrees(built: Built, beside: list[Tensor]) -> None:
    """LAW: beside = merged."""

    def merged() -> list[Tensor]:
        with lk.merged(built.model, "sweep"):
            return built.run()

    found = apart([built.model], beside, built.run, merged)
    if found is not None:
        raise WrongError(f"beside and merged differ (relative difference {found:.1e})")


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
            gradient = site.layout.matrix(gradient)
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


def files(built: Built, adapter: lk.Adapter, fresh: nn.Module, beside: list[Tensor], result: Result) -> None:
    """LAW: saved and loaded onto a fresh model, it gives the same output, by lorakit and by PEFT."""
    with tempfile.TemporaryDirectory() as folder:
        path = adapter.save(folder + "/saved")
        lk.load(fresh, path, name="read")
        require(beside, built.run(fresh), 1e-6, "saved and loaded, it gives another output")
        lk.detach(fresh)
        oracle(built, adapter, path, fresh, beside, result)


def peft_otherwise(adapter: lk.Adapter) -> dict[str, tuple[str, list[nn.Module]]]:
    """Where PEFT computes otherwise: the place of its layer -> the reason, and our deltas there."""
    found: dict[str, tuple[str, list[nn.Module]]] = {}
    lists = [held for part in adapter.model.modules() for held in vars(part).values() if type(held) is list]
    listed = {id(one) for held in lists for one in held}
    for path, layer in adapter.layers.items():
        deltas = layer.deltas_of(adapter.name)
        if id(layer) in listed:
            reason = "which the model calls from a plain list: PEFT's layer is not in it"
            found[path] = (reason, list(deltas.values()))
        elif layer.read:
            reason = "whose weights the model reads: PEFT's change does not act there"
            found[path] = (reason, list(deltas.values()))
        elif any(site.named_only for site in layer.sites.values()):
            reason = "whose forward is its own: PEFT adds what a plain layer would make of the change"
            found[path] = (reason, list(deltas.values()))
        elif isinstance(layer.base, nn.MultiheadAttention):
            reason = "whose change PEFT adds twice in an nn.MultiheadAttention"
            ours = [delta for key, delta in deltas.items() if layer.sites[key].name == "out_proj"]
            found[f"{path}.base_layer.out_proj"] = (reason, ours)
    return found


SHARE = 4
"""Of the models whose file PEFT loads, one in so many is tried with a file of PEFT's."""


def oracle(
    built: Built, adapter: lk.Adapter, path: Path, fresh: nn.Module, beside: list[Tensor], result: Result
) -> None:
    """LAW: PEFT gives the same output with the file, and lorakit with a file of PEFT's. `fresh` is a base that PEFT may keep.

    What PEFT refuses, or says that it leaves out, is kept in words."""
    import peft

    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            theirs = peft.PeftModel.from_pretrained(fresh, path).eval()
        left = next((str(one.message) for one in said if "adapter keys" in str(one.message)), "")
    except Exception as problem:  # whatever PEFT does not take
        result.peft = f"{type(problem).__name__}: {' '.join(str(problem).split())}"[:200]
        return
    if left:
        result.peft = f"leaves out: {left}"[:200]
        return
    models = [built.model, fresh]
    try:
        found = apart(models, beside, built.run, lambda: built.run(fresh))
    except Exception as problem:  # PEFT's own forward: a dilated convolution, for example
        result.peft = f"in its forward, {type(problem).__name__}: {' '.join(str(problem).split())}"[:200]
        return
    otherwise = peft_otherwise(adapter)
    if found is not None and otherwise:
        for place, (_, deltas) in otherwise.items():
            theirs_here = [p for name, p in fresh.named_parameters() if name.partition(".lora_")[0] == place]
            for parameter in [*theirs_here, *(p for delta in deltas for p in delta.parameters())]:
                parameter.zero_()
        found = apart(models, built.run(), built.run, lambda: built.run(fresh))
        for reason in sorted({reason for reason, _ in otherwise.values()}):
            names = sorted({f"`{place.rpartition('.')[2]}`" for place, (one, _) in otherwise.items() if one == reason})
            result.peft += f" but for {', '.join(names)}, {reason}"
    if found is not None:
        raise WrongError(f"PEFT gives another output with the file (relative difference {found:.1e})")
    result.peft = "equal" + result.peft
    if zlib.crc32(result.model.encode()) % SHARE:
        return
    generator = torch.Generator().manual_seed(6)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name and parameter.any():  # what was left at zero stays so
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 * parameter.shape[-1] ** -0.5)
    theirs.save_pretrained(str(path.parent / "theirs"), save_embedding_layers=False)
    lk.load(built.model, path.parent / "theirs", name="theirs")
    found = apart(models, built.run(fresh), lambda: built.run(fresh), built.run)
    lk.detach(built.model, "theirs")
    if found is not None:
        raise WrongError(f"a file of PEFT's gives another output (relative difference {found:.1e})")
    result.back = "equal"
