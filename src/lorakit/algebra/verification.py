"""Whether an adapter computes the same merged as unmerged: per layer and on the logits, in the base's format and float32.

Merging adds a small change to large weights and rounds the sum to the weights' format. In float32 nothing is lost; in bfloat16,
whose steps are 1/256 of a weight, half of a change may be. What that does to a model's answers is measured here and not
assumed: on real prompts, against the unmerged adapter in float32, beside what the format does to the unmerged one.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorakit.adapter.adapter import Adapter, adapters
from lorakit.algebra.merging import merged
from lorakit.algebra.sources import checked_batches
from lorakit.core.layer import Adapted
from lorakit.core.storage import value_of
from lorakit.core.using import use
from lorakit.errors import LorakitError
from lorakit.init.calibration import Batch


@dataclass(frozen=True)
class Likeness:
    """How far a model's logits are from those of the unmerged adapter in float32.

    Attributes:
        largest: the largest difference of two logits.
        relative: ‖difference‖ / ‖logits‖.
        divergence: the mean Kullback-Leibler divergence of the next token's distribution, in nats.
        changed: the share of positions whose likeliest token is another.
    """

    largest: float
    relative: float
    divergence: float
    changed: float


@dataclass(frozen=True)
class Verdict:
    """What `verify` found.

    Attributes:
        adapter: its name.
        dtype: the base's own format.
        positions: how many tokens' logits were compared.
        effect: what the adapter does: ‖its logits - the base's‖ / ‖logits‖, in float32.
        exact: merged in float32.
        beside: not merged, in the base's format: what the format does by itself.
        merged: merged in the base's format.
        layers: place -> ‖what the merged layer puts out - what it puts out unmerged‖ / ‖what the adapter adds there‖, in the
            base's format, on the layer's own inputs.
        kept: place -> ‖W' - W‖ against ‖ΔW‖: the relative error of the change that the rounded weights hold.
        agrees: whether merging in float32 changes less than a hundredth of what the adapter does, or nothing but rounding.
    """

    adapter: str
    dtype: str
    positions: int
    effect: float
    exact: Likeness
    beside: Likeness
    merged: Likeness
    layers: dict[str, float]
    kept: dict[str, float]
    agrees: bool

    @property
    def harmless(self) -> bool:
        """Whether merging in the base's format changes no more than twice what the format changes by itself."""
        return self.agrees and self.merged.divergence <= 2 * self.beside.divergence + 1e-6

    def words(self, name: str = "") -> str:
        """What was found, for a person; `name` is what to call the adapter."""
        exact, rounded, alone, name = self.exact, self.merged, self.beside, name or self.adapter
        if not self.agrees:
            return (
                f"Do NOT merge {name}: merged in float32, logits differ by {exact.relative:.1e} (relative) and the most likely "
                f"token differs at {exact.changed:.1%} of {self.positions:,} positions. Something in this model keeps merged "
                "weights from acting as the adapter does."
            )
        found = (
            f"Merging changes nothing: with {name} merged in float32, logits differ by {exact.relative:.0e} (relative); the "
            f"adapter itself changes them by {self.effect:.2g} ({self.positions:,} positions)."
        )
        if not self.kept:
            return found
        worst = max(self.kept, key=lambda place: self.kept[place])
        middle = sorted(self.kept.values())[len(self.kept) // 2]
        advice = (
            f"costs no more than {self.dtype} itself"
            if self.harmless
            else f"costs more than {self.dtype} itself: keep the adapter unmerged, or merge in float32"
        )
        return (
            f"{found} Merging in {self.dtype} {advice}: rounding loses {middle:.1%} of a layer's change (median; at most "
            f"{self.kept[worst]:.1%}, {worst}); the most likely token differs at {rounded.changed:.2%} of positions (unmerged "
            f"{self.dtype}: {alone.changed:.2%}), KL divergence {rounded.divergence:.1e} nats (unmerged: "
            f"{alone.divergence:.1e})."
        )

    def record(self) -> dict[str, Any]:
        """As plain data, for lorakit.json and the model card."""
        return {
            "words": self.words(),
            "agrees": self.agrees,
            "harmless": self.harmless,
            "dtype": self.dtype,
            "positions": self.positions,
            "effect": self.effect,
            **{name: vars(getattr(self, name)) for name in ("exact", "beside", "merged")},
        }


def verify(
    adapter: Adapter,
    prompts: Iterable[Batch],
    dtype: torch.dtype | None = None,
) -> Verdict:
    """Compare an adapter merged with the same unmerged.

    The model is copied once in float32 and once in `dtype`; the model itself stays as it is.

    Args:
        adapter: on its model.
        prompts: each the arguments of one `model(**batch)` that returns logits; with an "attention_mask", padding does not
            count.
        dtype: the format to try besides float32; the model's own by default.

    Raises:
        LorakitError: no prompts, no logits, or the adapter cannot be merged.
    """
    model, name = adapter.model, adapter.name
    if adapters(model).get(name) is not adapter:
        raise LorakitError(f"verify: adapter {name!r} has been taken off its model.")
    given = checked_batches("verify: prompts", prompts)
    wanted = dtype or next(
        (parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()), torch.float32
    )
    wide = copy.deepcopy(model).float().eval()
    truth, exact, _, _ = _both(wide, name, given)
    with torch.no_grad(), use(wide, None):
        effect = _likeness(truth, [_logits(wide, batch) for batch in given]).relative
    found = _likeness(truth, exact)
    del wide
    layers: dict[str, float] = {}
    kept: dict[str, float] = {}
    beside, rounded = truth, exact
    if wanted != torch.float32:
        narrow = _narrow(copy.deepcopy(model), wanted).eval()
        beside, rounded, layers, kept = _both(narrow, name, given, per_layer=True)
    return Verdict(
        adapter=name,
        dtype=str(wanted).removeprefix("torch."),
        positions=sum(len(logits) for logits in truth),
        effect=effect,
        exact=found,
        beside=_likeness(truth, beside),
        merged=_likeness(truth, rounded),
        layers=layers,
        kept=kept,
        # what float32 rounds is amplified by a model's depth, but far from what an adapter that acts or does not does
        agrees=found.relative <= max(0.01 * effect, 64 * torch.finfo(torch.float32).eps),
    )


def _narrow(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The base in `dtype`; the adapters keep their masters."""
    own = [module for one in adapters(model).values() for _, module in one.modules()]
    kept = {id(parameter) for one in adapters(model).values() for parameter in one.parameters()}
    kept |= {id(buffer) for module in own for buffer in module.buffers()}
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None and id(tensor) not in kept and tensor.is_floating_point():
                tensor.data = tensor.data.to(dtype)
    return model


def _both(
    model: nn.Module, name: str, prompts: list[Batch], per_layer: bool = False
) -> tuple[list[Tensor], list[Tensor], dict[str, float], dict[str, float]]:
    """Logits unmerged and merged, one tensor (tokens, vocabulary) a batch; and what became of each layer."""
    adapter = adapters(model)[name]
    watched = adapter.layers if per_layer else {}
    inputs: dict[str, tuple[Any, Any, Tensor]] = {}
    layers: dict[str, float] = {}
    kept: dict[str, float] = {}

    def first_call(path: str) -> Callable[..., None]:
        """A hook that keeps a layer's first call: its arguments and what came out."""

        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> None:
            inputs.setdefault(path, (args, kwargs, _first(y)))

        return keep

    with torch.no_grad(), use(model, name):
        handles = [layer.register_forward_hook(first_call(path), with_kwargs=True) for path, layer in watched.items()]
        try:
            apart = [_logits(model, batch) for batch in prompts]
        finally:
            for handle in handles:
                handle.remove()
        with use(model, None):
            without = {path: _first(watched[path](*args, **kwargs)) for path, (args, kwargs, _) in inputs.items()}
        before = {
            path: {site.weight: _weight(layer, site.weight) for site in layer.sites.values()}
            for path, layer in watched.items()
        }
        changes = {path: _changes(adapter, path) for path in watched}
        with merged(model, name):
            together = [_logits(model, batch) for batch in prompts]
            for path, (args, kwargs, y) in inputs.items():
                added = (y.double() - without[path].double()).norm()
                error = (_first(watched[path](*args, **kwargs)).double() - y.double()).norm()
                layers[path] = float(error / added) if added else 0.0
            for path, layer in watched.items():
                for key, change in changes[path].items():
                    held, size = _weight(layer, key) - before[path][key], change.norm()
                    kept[path] = max(kept.get(path, 0.0), float((held - change).norm() / size) if size else 0.0)
    return apart, together, layers, kept


def _weight(layer: Adapted, key: str) -> Tensor:
    """A copy of one of the base's tensors in float64."""
    return cast(Tensor, value_of(layer.base, key)).detach().double().clone()


def _changes(adapter: Adapter, path: str) -> dict[str, Tensor]:
    """ΔW of each weight of a layer in its stored shape, in float64."""
    layer = adapter.layers[path]
    result: dict[str, Tensor] = {}
    for key, delta in layer.deltas_of(adapter.name).items():
        site = layer.sites[key]
        stored = _weight(layer, site.weight)
        change = site.layout.weight(delta.dense(site.layout.matrix(stored)).double(), stored)
        result[site.weight] = result.get(site.weight, torch.zeros_like(stored)) + change
    return result


def _first(y: Any) -> Tensor:
    found = y[0] if isinstance(y, tuple) else y
    if not isinstance(found, Tensor):
        raise LorakitError(f"verify: a layer put out a {type(found).__name__}, which cannot be compared.")
    return found


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    """(tokens, vocabulary) of the tokens that are no padding, in float64."""
    output = model(**batch)
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if logits is None and isinstance(getattr(output, "start_logits", None), Tensor):
        logits = torch.stack([output.start_logits, output.end_logits], -1)  # where an answer begins and ends
    if logits is None:  # of a model without a head
        logits = getattr(output, "last_hidden_state", None)
    if not isinstance(logits, Tensor):
        raise LorakitError(f"verify: {type(model).__name__} gives no logits for a batch with {', '.join(batch)}.")
    flat = logits.double().reshape(-1, logits.shape[-1])
    mask = batch.get("attention_mask")
    if isinstance(mask, Tensor) and mask.numel() == flat.shape[0]:
        flat = flat[mask.reshape(-1).bool()]
    return flat


def _likeness(truth: list[Tensor], found: list[Tensor]) -> Likeness:
    largest, square, size, divergence, changed, count = 0.0, 0.0, 0.0, 0.0, 0, 0
    for right, other in zip(truth, found, strict=True):
        difference = other - right
        largest = max(largest, float(difference.abs().max()))
        square, size = square + float(difference.square().sum()), size + float(right.square().sum())
        p, q = right.log_softmax(-1), other.log_softmax(-1)
        divergence += float((p.exp() * (p - q)).sum())
        changed += int((right.argmax(-1) != other.argmax(-1)).sum())
        count += len(right)
    return Likeness(largest, math.sqrt(square / size) if size else 0.0, max(0.0, divergence / count), changed / count)
