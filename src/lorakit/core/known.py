"""Whether a layer computes what its class is known for: by its forward, and where that is another, by trying.

A class that inherits from `nn.Linear` may compute anything: scale its result, standardise its weight, return a
tuple. Beside such a layer a delta would act on a function that it does not have. So a layer is adapted beside its
base only if it is the known function of a weight that is a tensor of its own:

- its forward is torch's own, or gives the same numbers on trial (some classes only write `x @ W.T` otherwise). The
  trial runs on a copy of the layer with small random weights, so that it costs nothing and works for a model
  without weights. Once per class.
- nothing computes its weight: no parametrisation, no property, no hook (`weight_norm`, `spectral_norm`, pruning).
- nothing stands around this one layer: no forward set on the object, no hook that a user has registered.

Another layer is reached by substitution, where its weight is a plain parameter: exact for any forward. Presets leave it
out if its forward is another.

Some models read a layer's weight besides calling it, or instead (Mamba's `dt_proj`, LayoutLMv3's `rel_pos_bias`). The
source of the class that owns the layer tells (`read_by`).
"""

from __future__ import annotations

import ast
import copy
import functools
import inspect
import sys
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

_OWN: dict[type[nn.Module], tuple[Any, ...]] = {
    nn.Linear: (nn.Linear.forward,),
    nn.Embedding: (nn.Embedding.forward,),
    nn.Conv1d: (nn.Conv1d.forward,),
    nn.Conv2d: (nn.Conv2d.forward,),
    nn.Conv3d: (nn.Conv3d.forward,),
}
"""Layer kind -> the forwards that compute it."""

_TRIED: dict[type[nn.Module], bool] = {}


_LIBRARIES = ("torch", "transformers", "accelerate", "lorakit")
"""Whose hooks and forwards on a layer leave what it computes as it is: they move, record, checkpoint, or speed up. The norms of
torch.nn.utils are known apart."""


def _foreign(function: Any) -> bool:
    """Whether a hook or a forward is a user's."""
    function = getattr(function, "func", function)  # inside a partial, such as accelerate's
    module = getattr(function, "__module__", None) or type(function).__module__
    return function is not None and module.partition(".")[0] not in _LIBRARIES


def has_own_forward(module: nn.Module) -> bool:
    """Whether a user has set a forward on this one object."""
    return _foreign(vars(module).get("forward"))


def has_hooks(module: nn.Module) -> bool:
    """Whether a user has registered hooks on the layer, which may change what goes in or comes out."""
    return any(map(_foreign, (*module._forward_pre_hooks.values(), *module._forward_hooks.values())))


def computed_weight(module: nn.Module) -> str:
    """What computes the layer's weight at each call, in words; empty where the weight is a tensor of its own."""
    if parametrize.is_parametrized(module):
        return "its weight is computed at each call (torch.nn.utils.parametrizations)"
    for hook in module._forward_pre_hooks.values():
        if hasattr(hook, "name") and "norm" in type(hook).__name__.lower():
            return f"its weight is computed at each call (torch.nn.utils {type(hook).__name__})"
    held = "weight" in module._parameters or "weight" in module._buffers
    if isinstance(module, tuple(_OWN)) and not held and isinstance(getattr(module, "weight", None), Tensor):
        return "its weight is computed at each call (a hook or a property gives it)"
    return ""


def is_known(module: nn.Module) -> bool:
    """Whether a linear layer, an embedding or a convolution with float weights computes just that. A class that only has the
    sizes of a linear layer is tried as one."""
    kind = next((kind for kind in _OWN if isinstance(module, kind)), nn.Linear)
    if computed_weight(module) or has_own_forward(module):
        return False
    if type(module).forward in _OWN[kind]:
        return True
    if type(module) not in _TRIED:
        _TRIED[type(module)] = _agrees(module, kind)
    return _TRIED[type(module)]


def _agrees(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a copy with random weights gives what the kind gives, in training and evaluation."""
    try:
        probe, expected, inputs = _probe(module, kind)
        with torch.no_grad():
            for mode in (False, True):
                probe.train(mode)
                for x in inputs:
                    y = probe(x)
                    if not isinstance(y, Tensor) or not torch.allclose(y, expected(x), rtol=1e-4, atol=1e-5):
                        return False
    except Exception:  # whatever a stranger's forward raises on our inputs: it is not known
        return False
    return True


def _probe(module: nn.Module, kind: type[nn.Module]) -> tuple[nn.Module, Callable[[Tensor], Tensor], list[Tensor]]:
    """A copy of a layer with random weights; what it should give; inputs. The weights stay small where the kind
    allows."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    probe = copy.copy(module)
    probe._parameters = {}
    probe._buffers = {
        key: torch.full_like(value, 2.0, device="cpu") if value is not None and _on_meta(value) else value
        for key, value in module._buffers.items()
    }
    probe._modules = {}
    probe._forward_hooks, probe._forward_pre_hooks = OrderedDict(), OrderedDict()
    probe.__dict__.pop("forward", None)  # both are this object's, and the trial is about its class
    shape = tuple(cast(Tensor, module.weight).shape)
    size = shape if kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d) else (7, 5)
    for name, parameter in module._parameters.items():
        given = None if parameter is None else size if name == "weight" else tuple(parameter.shape)
        if name == "bias" and given is not None:
            given = size[:1]
        probe._parameters[name] = None if given is None else nn.Parameter(random(*given))
    weight, bias = cast(Tensor, probe.weight), cast("Tensor | None", getattr(probe, "bias", None))
    if kind is nn.Linear:
        return probe, lambda x: F.linear(x, weight, bias), [random(3, 5), random(2, 4, 5)]
    if kind is nn.Embedding:
        scale = getattr(probe, "embed_scale", None)  # transformers' scaled word embeddings
        factor = 1.0 if scale is None else float(torch.as_tensor(scale))
        ids = torch.randint(1, 7, (2, 4), generator=generator)
        padding = cast(nn.Embedding, module).padding_idx
        probe.padding_idx = None if padding is None else 0  # type: ignore[assignment]
        return probe, lambda x: weight[x] * factor, [ids]
    convolution = cast(Any, module)
    channels, axes = shape[1] * convolution.groups, len(shape) - 2
    x = random(2, channels, *range(2 * max(shape[2:]) + 9, 2 * max(shape[2:]) + 9 + axes))
    return probe, lambda value: cast(Tensor, kind._conv_forward(probe, value, weight, bias)), [x]  # type: ignore[attr-defined]


def _on_meta(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type == "meta"


# -- weights that are read -------------------------------------------------------------------------------------------------

_NO_NUMBERS = frozenset(
    {"dtype", "device", "shape", "size", "ndim", "dim", "numel", "requires_grad", "is_cuda", "is_meta", "layout"}
)
"""What is asked about a weight and not of its numbers."""


def read_by(kind: type[nn.Module]) -> frozenset[str]:
    """The layers of a class of modules (names of its attributes) of which its methods read the weight or the bias, instead of
    calling them. Empty for torch's own classes, and where there is no source."""
    if kind not in _READ:
        other = ("_init", "__init", "init_", "reset", "tie", "_tie", "get_", "set_", "resize")
        _READ[kind] = frozenset().union(*(_read_in(one) for one in _methods(kind) if not one.name.startswith(other)))
    return _READ[kind]


_READ: dict[type[nn.Module], frozenset[str]] = {}


def _methods(kind: type[nn.Module]) -> list[ast.FunctionDef]:
    """The source of a class's methods and of those that it inherits, but torch's own; empty where there is none."""
    owners = [one for one in kind.__mro__ if one.__module__.partition(".")[0] != "torch" and issubclass(one, nn.Module)]
    trees = [_classes(owner.__module__).get(owner.__qualname__) for owner in owners]
    nodes = (node for tree in trees if tree is not None for node in ast.walk(tree))
    return [node for node in nodes if isinstance(node, ast.FunctionDef)]


@functools.lru_cache(maxsize=8)
def _classes(module: str) -> dict[str, ast.ClassDef]:
    """The classes of a module by their qualified names. A file is parsed once for all of them: `inspect.getsource` of a class
    would parse it again each time."""
    try:
        tree = ast.parse(inspect.getsource(sys.modules[module]))
    except (OSError, TypeError, SyntaxError, KeyError):
        return {}
    found: dict[str, ast.ClassDef] = {}

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef):
                found[prefix + child.name] = child
                visit(child, f"{prefix}{child.name}.")
            elif isinstance(child, ast.stmt):
                visit(child, f"{prefix}{child.name}.<locals>." if isinstance(child, ast.FunctionDef) else prefix)

    visit(tree, "")
    return found


def _read_in(method: ast.FunctionDef) -> set[str]:
    """`x.weight` and `x.bias` of which a method uses the numbers, by `self.x.weight`."""
    asked: set[int] = set()  # nodes that are only asked about, by identity
    for node in ast.walk(method):
        if isinstance(node, ast.Attribute) and node.attr in _NO_NUMBERS:
            asked.add(id(node.value))
        elif (
            isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("isinstance", "hasattr")
        ):
            asked |= {id(argument) for argument in node.args}
        elif isinstance(node, ast.Compare) and any(isinstance(one, ast.Is | ast.IsNot) for one in node.ops):
            asked |= {id(node.left)}
    return {
        f"{node.value.attr}.{node.attr}"
        for node in ast.walk(method)
        if isinstance(node, ast.Attribute)
        and node.attr in ("weight", "bias")
        and isinstance(node.ctx, ast.Load)
        and id(node) not in asked
        and isinstance(node.value, ast.Attribute)
        and isinstance(node.value.value, ast.Name)
        and node.value.value.id == "self"
    }


# -- parameters that are multiplied ----------------------------------------------------------------------------------------

_PRODUCTS = ("linear", "matmul", "mm", "einsum", "conv", "attention_forward")
"""What is in the name of a function that multiplies by a matrix."""
_VIEWS = frozenset(
    {"T", "mT", "t", "transpose", "permute", "view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "expand",
     "to", "float", "type_as", "contiguous"}
)  # fmt: skip
"""Attributes and methods of a tensor that give the same numbers."""


def multiplied_by(kind: type[nn.Module]) -> frozenset[str] | None:
    """The parameters (names of its attributes) that a class multiplies by itself, as matrices: operands of `@`, arguments of
    linear, matmul and their kin. Tables that are looked up or added, and decays such as Mamba's A_log, are not among them.
    None where the source does not tell: torch's own classes, and where there is none."""
    if kind not in _MULTIPLIED:
        methods = _methods(kind)
        _MULTIPLIED[kind] = frozenset().union(*map(_multiplied_in, methods)) if methods else None
    return _MULTIPLIED[kind]


_MULTIPLIED: dict[type[nn.Module], frozenset[str] | None] = {}


def _multiplied_in(method: ast.FunctionDef) -> set[str]:
    named: dict[str, str] = {}  # local variable -> the parameter that it is a view of

    def parameter(node: ast.expr) -> str | None:
        """The parameter of which an expression is a view."""
        if isinstance(node, ast.Name):
            return named.get(node.id)
        if isinstance(node, ast.Attribute):
            own = isinstance(node.value, ast.Name) and node.value.id == "self"
            return node.attr if own else parameter(node.value) if node.attr in _VIEWS else None
        if isinstance(node, ast.Call):
            return parameter(node.func) if isinstance(node.func, ast.Attribute) and node.func.attr in _VIEWS else None
        return parameter(node.value) if isinstance(node, ast.Subscript) else None

    nodes = list(ast.walk(method))
    for node in nodes:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            held = parameter(node.value)
            if held is not None:
                named[node.targets[0].id] = held
    operands: list[ast.expr] = []
    for node in nodes:
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult):
            operands += [node.left, node.right]
        elif isinstance(node, ast.Call):
            function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if any(word in function for word in _PRODUCTS):
                added = function.startswith(("add", "baddb"))  # addmm, baddbmm: the first is a bias
                operands += [*node.args[added:], *(one.value for one in node.keywords)]
                operands += [node.func.value] if isinstance(node.func, ast.Attribute) else []
    return {name for name in map(parameter, operands) if name is not None}
