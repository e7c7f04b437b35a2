"""Calibration on batches of data, for each of a model's layers: statistics of their inputs, or the gradients of their weights.

Informed starts (`init/`) ask for them, of the base model as it is, without any adapter; and merging by regression
(`algebra/regression.py`), of the model with one adapter. It runs on the batches in evaluation mode; hooks see the layers'
inputs and the gradients of their outputs, and nothing of the model is changed.

Memory: activations are summed up as they pass. Sums that are as large as weights (a gradient, a second moment) are kept
for as many layers at a time as fit in a budget, and the batches run again for the next ones: one layer at a time at the
least. A statistic of inputs is kept once for layers that get the very same tensor (q, k and v; gate and up).
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorakit.core.hooks import hooked
from lorakit.core.layout import Layout, Linear, Rows, Site, Stored
from lorakit.core.routing import BASE, Route, Routing
from lorakit.core.rows import first_tensor
from lorakit.core.state import found_state
from lorakit.core.storage import value_of
from lorakit.core.using import routed
from lorakit.errors import LorakitError
from lorakit.init import CalibrationRequest, Measured

log = logging.getLogger("lorakit")

BUDGET = 2 << 30
"""Bytes that sums may take at a time."""
IGNORED = -100

Batch = Mapping[str, Any]


@dataclass(frozen=True)
class Matrix:
    """One matrix to be measured: where it is, and with what rank and scale its delta will start."""

    layer: nn.Module
    site: Site
    rank: int
    scale: float

    def measured(self, statistic: Any) -> Measured:
        """With what was measured of it."""
        return Measured(self.site.layout.shape, self.rank, self.scale, statistic)

    @property
    def layout(self) -> Layout:
        """How the layer multiplies: a known one with a user's hooks on it multiplies as without them."""
        layout = self.site.layout
        return layout.inner if isinstance(layout, Stored) and not self.site.named_only else layout


class Gradients(dict[int, Tensor]):
    """In the place of batches: dL/dW that somebody has measured, by the `id` of the weight."""

    def of(self, matrices: Mapping[str, Matrix], start: CalibrationRequest) -> Iterator[tuple[str, Tensor]]:
        """`(name, gradient)` of each matrix. LorakitError where one has none."""
        for name, matrix in matrices.items():
            G = self.get(id(value_of(matrix.layer, matrix.site.weight)))
            if G is None:
                raise LorakitError(
                    f"{start.request} measures gradients, and the steps gave {name} none. {start.otherwise}"
                )
            yield name, matrix.site.layout.matrix(G.float())


def calibrate(
    model: nn.Module,
    matrices: Mapping[str, Matrix],
    start: CalibrationRequest,
    batches: Iterable[Batch] | None,
    budget: int = BUDGET,
    route: Route | Routing = BASE,
) -> Iterator[tuple[str, Any]]:
    """Measure what is requested of these matrices, `(name, statistic)` one after another.

    Args:
        model: the model that the matrices' layers are in.
        matrices: by name, in the model's order.
        start: what is requested, such as an initialiser whose `needs` is "inputs" or "gradients".
        batches: arguments for the model, `model(**batch)`; tensors are moved to its device.
        budget: bytes that sums may take at a time.
        route: which adapters act meanwhile; none by default.

    Raises:
        LorakitError: no batches, a layer that cannot be measured or that no batch reaches, no loss where one is needed.
    """
    if isinstance(batches, Gradients):
        yield from batches.of(matrices, start)
        return
    given = _checked(batches, start)
    for name, matrix in matrices.items():
        _check_layer(name, matrix, start)
    with _as_it_is(model, route):
        if start.needs == "inputs":
            yield from _inputs(model, matrices, start, given, budget)
        else:
            yield from _gradients(model, matrices, start, given, budget)


def _checked(batches: Iterable[Batch] | None, start: CalibrationRequest) -> list[Batch]:
    found, verb = "no batches were given", start.request.partition(":")[0]
    if batches is not None:
        if isinstance(batches, Mapping | Tensor | str):
            raise LorakitError(
                f"{verb}: batches was given as {type(batches).__name__}; it is a list of batches, each the arguments of one "
                "call model(**batch)."
            )
        given = list(batches)
        for batch in given:
            if not isinstance(batch, Mapping):
                raise LorakitError(
                    f"{verb}: batches holds a {type(batch).__name__}; each batch is a mapping with the arguments of one call "
                    "model(**batch)."
                )
        if given:
            return given
        found = "batches is empty"
    labels = " with labels" if start.needs == "gradients" else ""
    raise LorakitError(
        f"{start.request} measures the {start.needs} of every layer on data, and {found}; give batches=[…], a "
        f"list of arguments{labels} for model(**batch)."
    )


def _check_layer(name: str, matrix: Matrix, start: CalibrationRequest) -> None:
    layout = matrix.layout
    why = ""
    if not layout.beside:
        why = "is reached by substitution only: its module multiplies by it without calling a layer, so that this is not seen"
    elif layout.shape.lookup and start.needs == "inputs":
        why = "is an embedding: its inputs are one-hot, so that their directions are single vocabulary entries"
    if why:
        raise LorakitError(f"{start.request} measures {start.needs}, and {name} {why}. {start.otherwise}")


@contextlib.contextmanager
def _as_it_is(model: nn.Module, route: Route | Routing) -> Iterator[None]:
    """The model with these adapters alone, in evaluation mode, no parameter of it asking for a gradient."""
    training = [module for module in model.modules() if module.training]
    asking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    state = found_state(model)
    with contextlib.nullcontext() if state is None else routed(state, route):
        model.eval()
        for parameter in asking:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in asking:
                parameter.requires_grad_(True)
            for module in training:
                module.training = True


def _run(model: nn.Module, batch: Batch) -> Any:
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    return model(**{key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()})


def _wide(x: Tensor) -> Tensor:
    return x.detach().to(torch.promote_types(x.dtype, torch.float32)) if x.is_floating_point() else x.detach()


def in_budget(sizes: Mapping[str, int], budget: int) -> list[list[str]]:
    """The names in runs whose sizes in bytes add up to at most the budget, at least one in each."""
    runs: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not runs or size > room:
            runs.append([])
            room = budget
        runs[-1].append(name)
        room -= size
    return runs


# -- inputs ------------------------------------------------------------------------------------------------------------------


def samples_of(
    layout: Layout, layer: nn.Module, x: Tensor, masks: Sequence[Tensor] = (), name: str = ""
) -> list[Tensor]:
    """The inputs of one call as the matrix sees them: for each row of the batch (tokens, in), convolutions as the patches
    of every group. Of layers over tokens, those with a 0 in a mask of their shape (batch, tokens) are left out."""
    x = _wide(x)
    if isinstance(layout, Linear | Rows):
        kept = [mask.to(x.device) for mask in masks if mask.numel() == x.shape[:-1].numel() and _fits(mask, x)]
        if any(not torch.equal(mask, kept[0]) for mask in kept):
            raise LorakitError(
                f"{name}: the batch has different masks of the same shape for encoder and decoder, so that it is unclear "
                "which is for this layer; give batches in which their lengths differ, or without padding."
            )
        samples = list(x.reshape(x.shape[0] if x.ndim > 2 else 1, -1, x.shape[-1]))
        if not kept:
            return samples
        chosen = kept[0].bool().reshape(len(samples), -1)
        return [sample[own] for sample, own in zip(samples, chosen, strict=True)]
    patches = layout.down(layer, x, torch.eye(layout.shape.in_, dtype=x.dtype, device=x.device))
    batched = x.ndim == len(cast(Any, layout).window) + 1
    return list(patches.reshape(x.shape[0] if batched else 1, -1, layout.shape.in_))


def _fits(mask: Tensor, x: Tensor) -> bool:
    """Whether a mask is over the tokens of x: (batch, tokens, in), or all tokens in one axis."""
    return mask.shape == x.shape[:-1] or x.ndim == 2


def _masks(model: nn.Module, batch: Batch, completions: bool) -> list[Tensor]:
    """Which tokens count: one mask; for an encoder and a decoder one each."""
    padding, labels = batch.get("attention_mask"), batch.get("labels")
    padding = padding if isinstance(padding, Tensor) and padding.ndim == 2 else None
    labelled = labels != IGNORED if isinstance(labels, Tensor) and labels.ndim == 2 else None
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        decoder = batch.get("decoder_attention_mask", labelled)
        return [mask.bool() for mask in (padding, decoder) if isinstance(mask, Tensor)]
    if labelled is not None and completions:
        return [labelled if padding is None else labelled & padding.bool()]
    return [] if padding is None else [padding.bool()]


def _sharers(model: nn.Module, matrices: Mapping[str, Matrix], batch: Batch) -> dict[str, str]:
    """Name -> the first of the matrices that get the very same tensor as input (linear layers, called once)."""
    leader: dict[str, str] = {}
    seen: list[tuple[str, weakref.ref[Tensor]]] = []
    calls: dict[nn.Module, int] = {}

    def see(names: list[str], x: Tensor, module: nn.Module) -> None:
        calls[module] = calls.get(module, 0) + 1
        same = next((first for first, other in reversed(seen) if other() is x), names[0])
        for name in names:
            leader[name] = same
        seen.append((same, weakref.ref(x)))

    handles = []
    for module, names in _by_layer(matrices).items():
        if all(isinstance(matrices[name].layout, Linear | Rows) for name in names):
            hook = _seeing(lambda x, names=names, module=module: see(names, x, module))  # type: ignore[misc]
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    with hooked(handles), torch.no_grad():
        _run(model, batch)
    often = {name for name, matrix in matrices.items() if calls.get(matrix.layer, 0) > 1}
    alone = often | {name for name in matrices if leader.get(name, name) in often}
    return {name: name if name in alone else leader.get(name, name) for name in matrices}


def _seeing(take: Callable[[Tensor], None]) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        take(first_tensor(args, kwargs))

    return hook


def _by_layer(matrices: Mapping[str, Matrix]) -> dict[nn.Module, list[str]]:
    layers: dict[nn.Module, list[str]] = {}
    for name, matrix in matrices.items():
        layers.setdefault(matrix.layer, []).append(name)
    return layers


def _inputs(
    model: nn.Module, matrices: Mapping[str, Matrix], start: CalibrationRequest, batches: list[Batch], budget: int
) -> Iterator[tuple[str, Any]]:
    leader = _sharers(model, matrices, batches[0])
    members: dict[str, list[str]] = {}
    for name, first in leader.items():
        members.setdefault(first, []).append(name)
    ranks = {first: max(matrices[name].rank for name in names) for first, names in members.items()}
    sizes = {first: 4 * start.numbers(matrices[first].site.layout.shape, ranks[first]) for first in members}
    for run in in_budget(sizes, budget):
        statistics = {first: start.statistic(matrices[first].site.layout.shape, ranks[first]) for first in run}
        measured = {name: matrices[name].measured(statistics[first]) for first in run for name in members[first]}
        reached: set[str] = set()
        for number, batch in enumerate(batches, 1):
            reached |= _measure(model, matrices, members, statistics, batch, start)
            if start.settled(measured):
                log.info("%s: nothing changes any more after %d of %d batches", start.request, number, len(batches))
                break
        for first in run:
            if first not in reached:
                raise _unreached(start, first, batches, "inputs")
        yield from ((name, one.statistic) for name, one in measured.items())


def _measure(
    model: nn.Module,
    matrices: Mapping[str, Matrix],
    members: Mapping[str, list[str]],
    statistics: Mapping[str, Any],
    batch: Batch,
    start: CalibrationRequest,
) -> set[str]:
    """Feed one batch to the statistics of the leaders, and see that the others still get the same inputs.

    Returns the leaders that got any token."""
    masks = _masks(model, batch, start.completions)
    collected: dict[str, list[Tensor]] = {first: [] for first in statistics}
    latest: dict[str, weakref.ref[Tensor]] = {}

    def lead(first: str, x: Tensor) -> None:
        matrix = matrices[first]
        latest[first] = weakref.ref(x)
        collected[first] += samples_of(matrix.layout, matrix.layer, x, masks, first)

    def follow(first: str, name: str, x: Tensor) -> None:
        if first not in latest or latest[first]() is not x:
            raise LorakitError(
                f"{start.request}: {name} had the same input as {first} in the first batch and another one later; measure on "
                "batches of one kind."
            )

    handles = []
    for first in statistics:
        hook = _seeing(lambda x, first=first: lead(first, x))  # type: ignore[misc]
        handles.append(matrices[first].layer.register_forward_pre_hook(hook, with_kwargs=True))
        for name in members[first]:
            if matrices[name].layer is not matrices[first].layer:
                hook = _seeing(lambda x, first=first, name=name: follow(first, name, x))  # type: ignore[misc]
                handles.append(matrices[name].layer.register_forward_pre_hook(hook, with_kwargs=True))
    with hooked(handles), torch.no_grad():
        _run(model, batch)
    reached = {first for first, samples in collected.items() if any(len(sample) for sample in samples)}
    for first in reached:
        statistics[first].add(collected[first])
    return reached


def _unreached(start: CalibrationRequest, name: str, batches: list[Batch], what: str) -> LorakitError:
    return LorakitError(
        f"{start.request} measures {what}, and none of the {len(batches)} batches gave {name} any; give batches that use it "
        f"(padding and positions without a label may not count). {start.otherwise}"
    )


# -- gradients ---------------------------------------------------------------------------------------------------------------


def _gradients(
    model: nn.Module, matrices: Mapping[str, Matrix], start: CalibrationRequest, batches: list[Batch], budget: int
) -> Iterator[tuple[str, Tensor]]:
    sizes = {name: 4 * m.site.layout.shape.out * m.site.layout.shape.in_ for name, m in matrices.items()}
    for run in in_budget(sizes, budget):
        sums: dict[str, Tensor] = {}
        passed: dict[str, Tensor] = {} if start.squares else sums
        handles = []
        for module, names in _by_layer({name: matrices[name] for name in run}).items():
            hook = _watching({name: matrices[name].layout for name in names}, passed)
            handles.append(module.register_forward_hook(hook, with_kwargs=True, prepend=True))  # before a user's
        with hooked(handles), torch.enable_grad():
            for batch in batches:
                torch.autograd.backward(_loss(_run(model, batch), start))
                # a layer may be called twice: its gradient is the sum
                for name in list(passed) if start.squares else ():
                    G = passed.pop(name).square_()
                    sums[name] = sums[name].add_(G) if name in sums else G
        for name in run:
            if name not in sums:
                raise _unreached(start, name, batches, "gradients")
            yield name, sums.pop(name) / len(batches)


def _watching(layouts: Mapping[str, Layout], sums: dict[str, Tensor]) -> Callable[..., Tensor]:
    """A forward hook that adds dL/dW of these matrices of a layer to `sums` when the backward passes."""

    def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor:
        x = _wide(first_tensor(args, kwargs))
        if not y.requires_grad:  # nothing before this layer is differentiated: the graph begins here
            y = y + torch.zeros((), dtype=y.dtype, device=y.device, requires_grad=True)

        def take(g: Tensor) -> None:
            for name, layout in layouts.items():
                G = weight_gradient(layout, layer, x, _wide(g))
                sums[name] = sums[name].add_(G) if name in sums else G

        y.register_hook(take)
        return y

    return hook


def weight_gradient(layout: Layout, layer: nn.Module, x: Tensor, g: Tensor) -> Tensor:
    """dL/dW as an (out, in) matrix, from a layer's input and the gradient of its output."""
    if isinstance(layout, Linear | Rows):
        own = layout.part(g) if isinstance(layout, Rows) else g
        return own.reshape(-1, own.shape[-1]).mT @ x.reshape(-1, x.shape[-1])
    with torch.enable_grad():
        M = torch.zeros(layout.shape.out, layout.shape.in_, dtype=g.dtype, device=g.device, requires_grad=True)
        (G,) = torch.autograd.grad(layout.linear(layer, x, M), M, g)
    return G


def _loss(output: Any, start: CalibrationRequest) -> Tensor:
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", output)
    if isinstance(loss, Tensor) and loss.numel() == 1 and loss.requires_grad:
        return loss.sum()
    raise LorakitError(
        f"{start.request} needs gradients, so model(**batch) must give a loss: an output with `loss`, or a single "
        f"number. It gave {type(output).__name__} without one; put labels in the batches."
    )
