"""Whether a layer computes what its class is known for: by its forward, and where that is another, by trying.

A class that inherits from `nn.Linear` may compute anything: scale its result, standardise its weight, return a
tuple. Beside such a layer a delta would act on a function that it does not have. So a layer is adapted beside its
base only if it is the known function of a weight that is a tensor of its own:

- its forward is torch's own, or gives the same numbers on trial (some classes only write `x @ W.T` otherwise). The
  trial runs on a copy of the layer with small random weights, so that it costs nothing and works for a model
  without weights. Once per class.
- nothing computes its weight: no parametrisation, no hook of `weight_norm` or `spectral_norm`.

Another layer is reached by substitution, where its weight is a plain parameter: exact for any forward, and only by
name.
"""

from __future__ import annotations

import copy
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


def computed_weight(module: nn.Module) -> str:
    """What computes the layer's weight at each call, in words; empty where the weight is a tensor of its own."""
    if parametrize.is_parametrized(module):
        return "its weight is computed at each call (torch.nn.utils.parametrizations)"
    for hook in module._forward_pre_hooks.values():
        if hasattr(hook, "name") and "norm" in type(hook).__name__.lower():
            return f"its weight is computed at each call (torch.nn.utils {type(hook).__name__})"
    return ""


def is_known(module: nn.Module) -> bool:
    """Whether a linear layer, an embedding or a convolution with float weights computes just that."""
    kind = next((kind for kind in _OWN if isinstance(module, kind)), None)
    if kind is None or computed_weight(module):
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
