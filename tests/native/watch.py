"""A make-believe GPU: tensors on "meta", without content, and a list of every read of one by the host.

Each such read makes a program wait until a GPU has done all that it was asked so far. Host tensors stay real, so that code that
decides on the host runs as it does. (torch's own fake tensors say "cuda", but can take no backward pass in a build without it.)
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental import _config as config
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

aten = torch.ops.aten

GPU = torch.device("meta")

COPIES = {aten._to_copy, aten.copy_}
INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
SIZED_BY_NUMBERS = {
    aten.nonzero, aten.masked_select, aten._unique2, aten.unique_dim, aten.unique_consecutive, aten.bincount,
    aten.repeat_interleave,
}  # fmt: skip
"""Operations whose result has a size that depends on numbers, so that the host must know these."""

Reads = Counter[tuple[str, str, str]]
"""(file below src/lorakit, function, operation) -> how often the host read a tensor of the GPU there."""


class HostReads(TorchDispatchMode):
    """Counts reads within it: in `found`."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Reads = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [one for one in tree_flatten((args, kwargs))[0] if isinstance(one, Tensor)]
        if not any(one.is_meta for one in tensors):
            return func(*args, **kwargs)
        packet, first = func.overloadpacket, args[0]
        if packet is aten._local_scalar_dense:
            self._note("item")
            return True if first.dtype == torch.bool else 1.0 if first.is_floating_point() else 1
        if packet is aten.equal:
            self._note("equal")
            return True
        if packet is aten._to_copy and kwargs.get("device", GPU).type == "cpu":
            self._note("copy")
            return torch.ones(first.shape, dtype=kwargs.get("dtype") or first.dtype)
        if packet is aten.copy_ and not first.is_meta:
            self._note("copy")
            return first.fill_(1)
        masks = packet in INDEXED and any(isinstance(one, Tensor) and one.dtype == torch.bool for one in args[1])
        if masks or packet in SIZED_BY_NUMBERS:
            self._note(str(packet).removeprefix("aten."))
        if packet is aten._unique2:
            long = torch.empty(first.shape, dtype=torch.long, device=GPU)
            return first.flatten(), long, long.flatten()
        if packet not in COPIES | INDEXED and any(one.ndim for one in tensors if not one.is_meta):
            raise RuntimeError(f"{func} was given tensors of the GPU and of the host")

        def lower(one: Any) -> Any:
            return one.to(GPU) if isinstance(one, Tensor) else one

        with config.patch(meta_nonzero_assume_all_nonzero=True):  # as many as there may be
            return func(*tree_map(lower, args), **tree_map(lower, kwargs))

    def _note(self, what: str) -> None:
        frames = [
            one for one in traceback.extract_stack() if "/torch/" not in one.filename and one.filename != __file__
        ]
        at = next((one for one in reversed(frames) if "/site-packages/" not in one.filename), frames[-1])
        if (through := frames[-1]).filename != at.filename:
            what = f"{what} in {Path(through.filename).stem}.{through.name}"
        self.found[at.filename.partition("/lorakit/")[2] or at.filename, at.name, what] += 1


def move(modules: Iterable[nn.Module]) -> dict[int, Tensor]:
    """Move the parameters and buffers of modules to the GPU; returns old identity -> new tensor."""
    moved: dict[int, Tensor] = {}
    for module in modules:
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None:
                    held[name] = moved.setdefault(id(tensor), onto(tensor))  # type: ignore[assignment]
    return moved


def onto(tensor: Tensor) -> Tensor:
    """A tensor like this one on the GPU."""
    made = torch.empty_like(tensor, device=GPU)
    return nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made
