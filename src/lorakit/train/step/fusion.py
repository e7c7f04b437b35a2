"""Kernel fusion for training: the elementwise operations of a layer (norms, rotary positions, gated activations, softmax).

A training step of a small model spends more time on elementwise operations than on matmuls. Each is written in plain PyTorch,
forward and backward (`native/elementwise.py`), and inside `fused(model)` runs in C++ or compiled by torch.compile. The autograd
functions around them keep only what the backward pass needs: RMSNorm its input and one number per row, a gated activation its
two inputs, rotary nothing but the angles.

Whole layers are not compiled: an adapter may change them at any time, and every change would compile again.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FunctionType, MethodType
from typing import Any

import torch
import torch.fx.experimental._config
from torch import Tensor, nn

from lorakit.core.kernel import gain_backward, small_functions
from lorakit.errors import LorakitError, plural
from lorakit.native import elementwise
from lorakit.native.choice import Way, fastest
from lorakit.native.elementwise import GATES, norm_rows, norm_rows_backward, rotate, rotate_back, wide
from lorakit.native.replacement import Gated, Norm, Replaced, replace

logger = logging.getLogger(__name__)


@dataclass
class FusionReport:
    """What `fused` did: why it is off (or None), how many modules it patched, how many functions were compiled so far and how
    long that took."""

    reason: str | None = None
    norms: int = 0
    gates: int = 0
    rotaries: int = 0
    compile_seconds: float = 0.0
    compiled: int = 0
    failed: list[str] = field(default_factory=list)

    def line(self) -> str:
        """What compiling took, in words."""
        from torch._inductor.runtime.cache_dir_utils import cache_dir

        if self.reason is not None:
            return f"kernel fusion is off: {self.reason}"
        return (
            f"kernel fusion: {plural(self.norms, 'norm')}, {plural(self.gates, 'gate')}; torch.compile made "
            f"{plural(self.compiled, 'kernel')} in {self.compile_seconds:.1f} s (cache: {cache_dir()})"
        )


_report: FusionReport | None = None
_compiled: dict[Any, Callable[..., Any]] = {}
_plain: dict[Any, Callable[..., Any]] = {}
_met: set[Any] = set()
_ways: dict[Any, str] = {}


def call(function: Callable[..., Any], *tensors: Tensor | None, **constants: Any) -> Any:
    """`function(*tensors, **constants)`, compiled inside `fused`. Constants are built into the compiled code."""
    report = _report
    if report is None or report.reason is not None:
        return function(*tensors, **constants)
    first = tensors[0]
    if first is not None and first.is_cuda:
        if (kernel := elementwise.kernel(function, tensors)) is not None:
            return _on_gpu(report, kernel, function, tensors, constants)
        return _by_compiler(report, function, tensors, constants)
    in_cpp = COMPILED.get(function)
    if in_cpp is not None and elementwise.suit(tensors, function in (rotate, rotate_back), function is gain_backward):
        return in_cpp(*tensors, **constants)
    return _by_compiler(report, function, tensors, constants)


def _on_gpu(
    report: FusionReport,
    kernel: Callable[..., Any],
    function: Callable[..., Any],
    tensors: tuple[Tensor | None, ...],
    constants: dict[str, Any],
) -> Any:
    """By a kernel in Triton, or by torch.compile: whichever is the faster for this width."""
    first = tensors[0]
    assert first is not None
    key = (function, first.shape[-1], first.dtype, first.device)
    way = _ways.get(key)
    if way is None:
        ways: dict[str, Way] = {
            "triton": lambda: [lambda: kernel(*tensors, **constants)],
            "torch.compile": lambda: [lambda: _by_compiler(report, function, tensors, constants)],
        }
        shape = (str(first.dtype).removeprefix("torch."), *first.shape[1:])
        way = _ways[key] = fastest(function.__name__, shape, ways, first.device)
    if way == "triton":
        return kernel(*tensors, **constants)
    return _by_compiler(report, function, tensors, constants)


def _by_compiler(
    report: FusionReport, function: Callable[..., Any], tensors: tuple[Tensor | None, ...], constants: dict[str, Any]
) -> Any:
    key = (function, *constants.items())
    if key in _plain:
        return function(*tensors, **constants)
    # Detached: the same code for a tensor that asks for a gradient and one that does not. The derivatives are ours.
    tensors = tuple(None if tensor is None else tensor.detach() for tensor in tensors)
    compiled = _compiled.get(key)
    if compiled is None:
        compiled = _compiled[key] = torch.compile(_bind(function, constants), dynamic=True)
    # A graph is built for each pattern of types; only those calls are timed.
    shape = (key, *(None if tensor is None else (tensor.dtype, tensor.device.type, tensor.ndim) for tensor in tensors))
    if shape in _met:
        return compiled(*tensors)
    begin = time.perf_counter()
    try:
        # Two sizes that happen to be equal at first are not taken for one size, which would compile again later.
        with torch.fx.experimental._config.patch(use_duck_shape=False):  # type: ignore[attr-defined]
            result = compiled(*tensors)
    except Exception as error:  # whatever a compiler may raise, the plain function is still right
        _plain[key] = function
        report.failed.append(function.__name__)
        logger.warning("kernel fusion: %s does not compile (%s); it runs unfused", function.__name__, error)
        return function(*tensors, **constants)
    _met.add(shape)
    report.compiled += 1
    report.compile_seconds += time.perf_counter() - begin
    return result


def _bind(function: Callable[..., Any], constants: dict[str, Any]) -> Callable[..., Any]:
    """A copy of `function` with its keyword arguments set, and with code of its own: the compiler keeps its results by
    code object and gives up after a few on the same one, which every functools.partial shares."""
    code = function.__code__.replace(co_name=f"{function.__name__}_{len(_compiled)}")
    bound = FunctionType(code, function.__globals__, function.__name__)
    bound.__kwdefaults__ = constants
    return bound


def find_obstacle(device: torch.device) -> str | None:
    """Why nothing can be compiled here, or None."""
    if device.type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except (InvalidCxxCompiler, RuntimeError, OSError):
            return "no C++ compiler was found"
    elif device.type == "cuda":
        import importlib.util

        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
    else:
        return f"it is not supported on {device.type} devices"
    return None


# ---------------------------------------------------------------------------------------------------------------
# RMSNorm


class FusedNorm(torch.autograd.Function):
    """RMSNorm over the last axis; keeps its input and one number per row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, shift: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y, scale = call(norm_rows, rows, weight, eps=eps, shift=shift)
        ctx.save_for_backward(rows, weight, scale)
        ctx.shift = shift
        return y.view(x.shape)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        rows, weight, scale = ctx.saved_tensors
        grad = grads[0].reshape(rows.shape)
        of_weight = None
        if ctx.needs_input_grad[1]:
            of_weight = (wide(grad) * wide(rows) * scale).sum(0).to(weight.dtype)
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = call(norm_rows_backward, grad, rows, weight, scale, shift=ctx.shift).view(grads[0].shape)
        return of_x, of_weight, None, None


class FusedGate(torch.autograd.Function):
    """act(gate) * up; keeps the two inputs only."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, kind: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.kind = kind
        return call(GATES[kind][0], _flat(gate), _flat(up)).view(gate.shape)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        of_gate, of_up = call(GATES[ctx.kind][1], _flat(grads[0]), _flat(gate), _flat(up))
        return of_gate.view(gate.shape), of_up.view(up.shape), None


def _flat(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


class FusedRotary(torch.autograd.Function):
    """`rotate`; keeps the angles only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return call(rotate, x, cos, sin)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        return call(rotate_back, grads[0].contiguous(), *ctx.saved_tensors), None, None


COMPILED: dict[Callable[..., Any], Callable[..., Any]] = {
    **elementwise.COMPILED,
    gain_backward: elementwise.gain_backward,
}
"""Functions that processors have in C++, where their inputs suit; torch.compile takes the others."""


# ---------------------------------------------------------------------------------------------------------------
# Recomputation: what a tensor knows of how it is computed once more

_recording = False


@contextlib.contextmanager
def recording() -> Iterator[None]:
    """Within, the outputs of norms and gates inside `fused` carry their recomputation."""
    global _recording
    before, _recording = _recording, True
    try:
        yield
    finally:
        _recording = before


def recomputation(tensor: Tensor) -> Callable[[], Tensor] | None:
    """The call that gives a tensor once more, if it carries one, from tensors which the graph keeps anyway."""
    return getattr(tensor, "lorakit_recompute", None)


def recomputable_parts() -> int:
    """How many norms and gates of the model in `fused` can be recomputed one by one."""
    return 0 if _report is None else _report.norms + _report.gates


def _recorded(function: type[torch.autograd.Function], *arguments: Any) -> Tensor:
    y: Tensor = function.apply(*arguments)
    if not (_recording and torch.is_grad_enabled()):
        return y
    # Detached: a tensor that leads back to its own graph would keep it alive.
    kept = [one.detach() if isinstance(one, Tensor) else one for one in arguments]
    versions = [(one, one._version) for one in kept if isinstance(one, Tensor)]

    def again() -> Tensor:
        if any(one._version != version for one, version in versions):
            raise LorakitError(
                f"backward: {function.__name__} cannot be recomputed (train.memory: balanced): its input was written to "
                "since the forward pass; use train.memory: fast"
            )
        with torch.no_grad():
            return function.apply(*kept)  # type: ignore[no-any-return]

    y.lorakit_recompute = again  # type: ignore[attr-defined]
    return y


# ---------------------------------------------------------------------------------------------------------------
# Into a model and out again


@contextlib.contextmanager
def fused(model: nn.Module) -> Iterator[FusionReport]:
    """Inside, the elementwise operations of `model` run fused; on leaving, everything is as it was.

    A module is patched only if the fused function gives what the module itself gives on a small random input. Where
    nothing can be compiled nothing is patched, and one line of the log says why.
    """
    global _report
    device = next(model.parameters()).device
    report = FusionReport(reason=find_obstacle(device))
    before, replaced = _report, Replaced()
    if report.reason is not None:
        logger.info("kernel fusion is off: %s", report.reason)
    else:
        replaced = replace(model, _norm_forward, _gate_forward, _turn)
        report.norms, report.gates, report.rotaries = replaced.norms, replaced.gates, replaced.rotaries
    _report = report
    try:
        with small_functions(call):
            yield report
    finally:
        _report = before
        replaced.restore()


def _norm_forward(found: Norm) -> Callable[[Tensor], Tensor]:
    def forward(self: Any, x: Tensor) -> Tensor:
        return _recorded(FusedNorm, x, self.weight, found.eps, found.shift)

    return MethodType(forward, found.module)


def _gate_forward(found: Gated) -> Callable[[Tensor], Tensor]:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.down_proj(_recorded(FusedGate, self.gate_proj(x), self.up_proj(x), found.kind))  # type: ignore[no-any-return]

    return MethodType(forward, found.module)


def _turn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    turn: Any = FusedRotary.apply
    q, k = (turn(x[0].transpose(0, 1), cos, sin).transpose(0, 1)[None] for x in (q, k))
    return q, k
