"""Small functions of a layer, fused by torch.compile where that pays: norms, rotary, gated activations, softmax.

A training step of a small model spends more time on functions of one pass over memory than on matmuls. Each function
here is written once in plain PyTorch, forward and backward, and runs compiled inside `fused(model)` and as it is
outside. The autograd functions around them keep only what the backward pass needs: RMSNorm its input and one number
per row, a gated activation its two inputs, rotary nothing but the angles.

Whole layers are not compiled: an adapter may change them at any time, and every change would compile again.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FunctionType, MethodType
from typing import Any

import torch
import torch.fx.experimental._config
from torch import Tensor, nn

from lorakit.core.kernel import gain_backward, small_functions
from lorakit.errors import LorakitError
from lorakit.train.step import elementwise as passes

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
            return f"small functions are not fused: {self.reason}"
        return (
            f"fused: {self.norms} norms, {self.gates} gates; {self.compiled} small functions compiled or read from the cache "
            f"in {self.compile_seconds:.1f} s ({cache_dir()})"
        )


_report: FusionReport | None = None
_compiled: dict[Any, Callable[..., Any]] = {}
_plain: dict[Any, Callable[..., Any]] = {}
_met: set[Any] = set()


def call(function: Callable[..., Any], *tensors: Tensor | None, **constants: Any) -> Any:
    """`function(*tensors, **constants)`, compiled inside `fused`. Constants are built into the compiled code."""
    report = _report
    if report is None or report.reason is not None:
        return function(*tensors, **constants)
    ahead = AHEAD.get(function)
    if ahead is not None and passes.suit(tensors, function in (rotate, rotate_back), function is gain_backward):
        return ahead(*tensors, **constants)
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
        logger.warning("fusion: %s does not compile (%s); it runs unfused", function.__name__, error)
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
        from torch._inductor import config, exc

        names = config.cpp.cxx if isinstance(config.cpp.cxx, (tuple, list)) else (config.cpp.cxx,)
        if not any(name and shutil.which(name) for name in names):
            try:
                from torch._inductor.cpp_builder import get_cpp_compiler

                get_cpp_compiler()
            except (exc.InvalidCxxCompiler, RuntimeError, OSError):
                return "no C++ compiler was found"
    elif device.type == "cuda":
        import importlib.util

        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
    else:
        return f"not tried on {device.type} devices"
    return None


# ---------------------------------------------------------------------------------------------------------------
# RMSNorm


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def norm_rows(x: Tensor, weight: Tensor, *, eps: float, shift: float) -> tuple[Tensor, Tensor]:
    """x [tokens, hidden] -> (normalised rows, 1 / root mean square [tokens, 1]). `shift` is 1 for Gemma, else 0."""
    wide = _wide(x)
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if shift:
        return (wide * scale * (_wide(weight) + shift)).to(x.dtype), scale
    return (wide * scale).to(x.dtype) * weight, scale


def norm_rows_backward(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor, *, shift: float) -> Tensor:
    """The gradient of x."""
    unit = _wide(x) * scale
    inner = _wide(grad) * (_wide(weight) + shift)
    return (scale * (inner - unit * (inner * unit).mean(-1, keepdim=True))).to(x.dtype)


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
            of_weight = (_wide(grad) * _wide(rows) * scale).sum(0).to(weight.dtype)
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = call(norm_rows_backward, grad, rows, weight, scale, shift=ctx.shift).view(grads[0].shape)
        return of_x, of_weight, None, None


# ---------------------------------------------------------------------------------------------------------------
# Gated activations: act(gate) * up


def gate_silu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    return (nn.functional.silu(_wide(gate)) * _wide(up)).to(gate.dtype)


def gate_silu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up."""
    g, x = _wide(grad), _wide(gate)
    sigmoid = torch.sigmoid(x)
    of_gate = g * _wide(up) * sigmoid * (1 + x * (1 - sigmoid))
    return of_gate.to(gate.dtype), (g * x * sigmoid).to(gate.dtype)


def gate_gelu(gate: Tensor, up: Tensor) -> Tensor:
    """gelu(gate) * up, in the tanh form of Gemma."""
    return (nn.functional.gelu(_wide(gate), approximate="tanh") * _wide(up)).to(gate.dtype)


def gate_gelu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up."""
    g, x = _wide(grad), _wide(gate)
    slope = (2 / torch.pi) ** 0.5
    tanh = torch.tanh(slope * (x + 0.044715 * x**3))
    of_gelu = 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh**2) * slope * (1 + 3 * 0.044715 * x**2)
    return (g * _wide(up) * of_gelu).to(gate.dtype), (g * 0.5 * x * (1 + tanh)).to(gate.dtype)


GATES: dict[str, tuple[Callable[..., Tensor], Callable[..., tuple[Tensor, Tensor]]]] = {
    "silu": (gate_silu, gate_silu_backward),
    "gelu_tanh": (gate_gelu, gate_gelu_backward),
}


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


# ---------------------------------------------------------------------------------------------------------------
# Rotary positions


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [tokens, heads, d] turned by the angles [tokens, d]."""
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return (_wide(x) * _wide(cos[:, None]) + _wide(turned) * _wide(sin[:, None])).to(x.dtype)


def rotate_back(grad: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The transpose of `rotate`, for any angles (the two halves of cos and sin need not agree)."""
    half = grad.shape[-1] // 2
    wide = _wide(grad)
    weighted = wide * _wide(sin[:, None])
    turned = torch.cat((weighted[..., half:], -weighted[..., :half]), dim=-1)
    return (wide * _wide(cos[:, None]) + turned).to(grad.dtype)


class FusedRotary(torch.autograd.Function):
    """`rotate`; keeps the angles only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return call(rotate, x, cos, sin)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        return call(rotate_back, grads[0].contiguous(), *ctx.saved_tensors), None, None


AHEAD: dict[Callable[..., Any], Callable[..., Any]] = {
    norm_rows: passes.norm,
    norm_rows_backward: passes.norm_backward,
    gate_silu: functools.partial(passes.gate, False),
    gate_silu_backward: functools.partial(passes.gate_backward, False),
    gate_gelu: functools.partial(passes.gate, True),
    gate_gelu_backward: functools.partial(passes.gate_backward, True),
    rotate: functools.partial(passes.turn, False),
    rotate_back: functools.partial(passes.turn, True),
    gain_backward: passes.gain_backward,
}
"""Functions that processors have compiled ahead, where their inputs suit; torch.compile takes the others."""


# ---------------------------------------------------------------------------------------------------------------
# What a tensor says about how it comes again

_telling = False


class Again:
    """A call that gives a tensor once more, from tensors which the graph keeps anyway."""

    def __init__(self, function: type[torch.autograd.Function], arguments: tuple[Any, ...]) -> None:
        self.function = function
        # Detached: a tensor that leads back to its own graph would keep it alive.
        self.arguments = [one.detach() if isinstance(one, Tensor) else one for one in arguments]
        self.versions = self._versions()

    def _versions(self) -> list[int]:
        return [one._version for one in self.arguments if isinstance(one, Tensor)]

    def __call__(self) -> Tensor:
        if self._versions() != self.versions:
            raise LorakitError(
                f"backward: {self.function.__name__} is to run again (train.memory: balanced), but its input was written to "
                "since the forward pass; use train.memory: fast"
            )
        with torch.no_grad():
            return self.function.apply(*self.arguments)  # type: ignore[no-any-return]


@contextlib.contextmanager
def telling() -> Iterator[None]:
    """Within, norms and gates inside `fused` say with their output how it comes again (`again`)."""
    global _telling
    before, _telling = _telling, True
    try:
        yield
    finally:
        _telling = before


def again(tensor: Tensor) -> Again | None:
    """How a tensor comes again, if it says so."""
    return getattr(tensor, "lorakit_again", None)


def cheap_parts() -> int:
    """How many norms and gates of the model in `fused` can say so."""
    return 0 if _report is None else _report.norms + _report.gates


def _told(function: type[torch.autograd.Function], *arguments: Any) -> Tensor:
    y: Tensor = function.apply(*arguments)
    if _telling and torch.is_grad_enabled():
        y.lorakit_again = Again(function, arguments)  # type: ignore[attr-defined]
    return y


# ---------------------------------------------------------------------------------------------------------------
# Into a model and out again


@contextlib.contextmanager
def fused(model: nn.Module) -> Iterator[FusionReport]:
    """Inside, the small functions of `model` run fused; on leaving, everything is as it was.

    A module is patched only if the fused function gives what the module itself gives on a small random input. Where
    nothing can be compiled nothing is patched, and one line of the log says why.
    """
    global _report
    device = next(model.parameters()).device
    report = FusionReport(reason=find_obstacle(device))
    undo: list[Callable[[], None]] = []
    before = _report
    if report.reason is not None:
        logger.info("fusion: off, %s", report.reason)
    else:
        _patch(model, report, undo)
    _report = report
    try:
        with small_functions(call):
            yield report
    finally:
        _report = before
        for restore in undo:
            restore()


def _patch(model: nn.Module, report: FusionReport, undo: list[Callable[[], None]]) -> None:
    modelling: dict[str, bool] = {}
    for module in model.modules():
        if "forward" in vars(module):
            continue
        forward = _norm_of(module)
        if forward is not None:
            report.norms += 1
        else:
            forward = _gate_of(module)
            if forward is not None:
                report.gates += 1
        if forward is not None:
            module.forward = MethodType(forward, module)
            undo.append(functools.partial(delattr, module, "forward"))
        name = type(module).__module__
        if name.startswith("transformers.") and name not in modelling:
            modelling[name] = _patch_rotary(name, undo)
            report.rotaries += modelling[name]


def _norm_of(module: nn.Module) -> Callable[..., Tensor] | None:
    """A fused forward for a module that is an RMSNorm, with its weight as it is or shifted by one."""
    weight = getattr(module, "weight", None)
    if "RMSNorm" not in type(module).__name__ or not isinstance(weight, Tensor) or weight.dim() != 1:
        return None
    eps = getattr(module, "variance_epsilon", None)
    eps = getattr(module, "eps", None) if eps is None else eps
    if eps is None or len(list(module.parameters())) != 1:
        return None
    eps = float(eps)
    for shift in (0.0, 1.0):

        def forward(self: nn.Module, x: Tensor, *, shift: float = shift) -> Tensor:
            return _told(FusedNorm, x, self.weight, eps, shift)

        if _agrees(module, forward, (3, weight.shape[0]), weight):
            return forward
    return None


def _gate_of(module: nn.Module) -> Callable[..., Tensor] | None:
    """A fused forward for a module that is down(act(gate(x)) * up(x))."""
    parts = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")]
    if not all(isinstance(part, nn.Module) or callable(part) for part in parts) or None in parts:
        return None
    first = next(iter(module.parameters()), None)
    width = getattr(parts[0], "in_features", None) or getattr(getattr(parts[0], "base", None), "in_features", None)
    if first is None or set(dict(module.named_children())) - {"gate_proj", "up_proj", "down_proj", "act_fn"}:
        return None
    act: Any = parts[3]
    probe = torch.linspace(-4, 4, 33, device=first.device)
    with torch.no_grad():
        if torch.allclose(act(probe), nn.functional.silu(probe), atol=1e-6):
            kind = "silu"
        elif torch.allclose(act(probe), nn.functional.gelu(probe, approximate="tanh"), atol=1e-6):
            kind = "gelu_tanh"
        else:
            return None

    def forward(self: Any, x: Tensor) -> Tensor:
        gated = _told(FusedGate, self.gate_proj(x), self.up_proj(x), kind)
        return self.down_proj(gated)  # type: ignore[no-any-return]

    if width is None:
        embedding = getattr(module, "hidden_size", None)
        width = embedding if isinstance(embedding, int) else None
    if width is None or not _agrees(module, forward, (1, 3, width), first):
        return None
    return forward


def _agrees(module: nn.Module, forward: Callable[..., Tensor], shape: tuple[int, ...], like: Tensor) -> bool:
    """Does `forward` give what the module gives, to a few roundings of its dtype?"""
    dtype = next((p.dtype for p in module.parameters() if p.dtype != torch.float32), like.dtype)
    x = torch.linspace(-2, 2, torch.Size(shape).numel(), device=like.device).view(shape).sin().to(dtype)
    training = module.training
    try:
        module.eval()  # an adapter's dropout would tell the two apart
        with torch.no_grad():
            expected, found = module(x), forward(module, x)
    except (RuntimeError, TypeError):
        return False
    finally:
        module.train(training)
    bound = 8 * torch.finfo(dtype).eps if dtype != torch.float64 else 1e-5
    gap = (expected.double() - found.double()).abs().max()
    return bool(gap <= bound * expected.double().abs().max().clamp_min(1e-30))


def _patch_rotary(name: str, undo: list[Callable[[], None]]) -> bool:
    """Replace `apply_rotary_pos_emb` of a modelling file, if it is the usual one."""
    modelling = sys.modules[name]
    original = getattr(modelling, "apply_rotary_pos_emb", None)
    if original is None or getattr(original, "fused", False):
        return False

    def apply_rotary(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if args or kwargs or q.dim() != 4 or q.shape[0] != 1 or cos.shape != (1, q.shape[2], q.shape[3]):
            return original(q, k, cos, sin, *args, **kwargs)  # type: ignore[no-any-return]
        turn: Any = FusedRotary.apply
        return tuple(turn(x[0].transpose(0, 1), cos[0], sin[0]).transpose(0, 1)[None] for x in (q, k))

    apply_rotary.fused = True  # type: ignore[attr-defined]
    q, k = torch.randn(1, 3, 5, 8), torch.randn(1, 2, 5, 8)
    cos, sin = torch.randn(1, 5, 8), torch.randn(1, 5, 8)
    try:
        pairs = zip(original(q, k, cos, sin), apply_rotary(q, k, cos, sin), strict=True)
        if not all(torch.allclose(a, b, atol=1e-5) for a, b in pairs):
            return False
    except (RuntimeError, TypeError, ValueError):
        return False
    vars(modelling)["apply_rotary_pos_emb"] = apply_rotary
    undo.append(functools.partial(setattr, modelling, "apply_rotary_pos_emb", original))
    return True
