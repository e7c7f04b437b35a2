"""`attach` and `detach`: an adapter comes onto a model, and off it.

`attach` replaces the chosen layers by `Adapted` ones in place, and hooks edits around their calls. The model stays the
object and the class that it was, so a Trainer, a plain loop and `generate` need not know; `detach` puts the very module
objects back.
"""

from __future__ import annotations

import dataclasses
import gc
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor, nn

from lorakit.adapter.adapter import Adapter, adapters_of
from lorakit.adapter.construction import build, build_edits
from lorakit.adapter.coverage import report
from lorakit.adapter.pretrained import give_back, unshare
from lorakit.adapter.targets import Targets, input_embedding
from lorakit.core.delta import Method
from lorakit.core.injection import parents_of, replace_module
from lorakit.core.routing import BASE
from lorakit.core.sites import sites_remembered
from lorakit.core.state import close_state, state_of
from lorakit.core.using import activate
from lorakit.edits.contract import EditMethod
from lorakit.errors import LorakitError, unknown
from lorakit.init import Default, Initialiser, initialiser
from lorakit.init.calibration import Batch
from lorakit.methods import LoRA, TrainableTokens

log = logging.getLogger("lorakit")


@sites_remembered()
def attach(
    model: nn.Module,
    method: Method | EditMethod | None = None,
    *,
    name: str = "default",
    target_modules: str | Iterable[str] = "all-linear",
    exclude_modules: str | Iterable[str] | None = None,
    layers: int | Sequence[int] | range | None = None,
    layers_pattern: str | Iterable[str] | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    patterns: Mapping[str, Mapping[str, Any]] | None = None,
    modules_to_save: Iterable[str] | None = None,
    bias: str = "none",
    init: str | Initialiser = "default",
    batches: Iterable[Batch] | None = None,
    parts: Mapping[str, Mapping[str, Any]] | None = None,
    originals: Mapping[str, Tensor] | None = None,
    trainable_tokens: Sequence[int] | Mapping[str, Sequence[int]] | None = None,
    ensure_weight_tying: bool = False,
) -> Adapter:
    """Put a new adapter on a model, freeze the base, and make the adapter trainable and active.

    Args:
        model: any torch model (for edits a transformers model); it stays the object that it is.
        method: the spec, of deltas or of an edit; `LoRA()` by default.
        name: the adapter's name on this model.
        target_modules: suffixes of layer names; or one regular expression over whole names; or "all-linear" (every linear
            layer but the output head), "attention", "mlp".
        exclude_modules: suffixes or one regular expression; wins over target_modules.
        layers: only inside these numbered blocks; an edit knows its places by itself otherwise.
        layers_pattern: the name(s) of the list that `layers` counts in.
        rank_pattern, alpha_pattern: {pattern: value} for layers whose name the pattern ends.
        patterns: the same for every option that may differ per layer: {"n_frequency": {pattern: value}}.
        modules_to_save: modules trained whole, beside their frozen original.
        bias: "none", "lora_only" or "all".
        init: initial values, a name or an Initialiser; "default" is the method's own.
        batches: data for starts that measure the model (eva, corda, lora-ga): each the arguments of one `model(**batch)`.
        parts: {layer suffix: {part: (start, stop) or [(start, stop), …]}}: each part of a fused layer its own delta.
        originals: the float model's parameters by name, for starts that answer a quantised base's error (loftq).
        trainable_tokens: rows of the input embedding (and of a head tied to it) that train alone, beside the method; for
            other layers {layer suffix: rows}.
        ensure_weight_tying: what the adapter does to an embedding it does to a head that shares its weight, by the same
            tensors: in target_modules (LoRA and its kin) and modules_to_save.

    Raises:
        LorakitError: a name matches nothing, an option does not fit; the model is unchanged then.
    """
    if isinstance(method, TrainableTokens) and target_modules == "all-linear":
        target_modules = [input_embedding(model)]
    lists = (layers_pattern,) if isinstance(layers_pattern, str) else layers_pattern
    targets = Targets(
        target_modules=_tuple(target_modules, "target_modules"),
        exclude_modules=_tuple(exclude_modules, "exclude_modules"),
        layers=_blocks(layers),
        layers_pattern=None if lists is None else tuple(lists),
        patterns=_patterns({"rank": rank_pattern, "alpha": alpha_pattern}, patterns or {}),
        modules_to_save=tuple(modules_to_save or ()),
        bias=bias,
        parts={layer: dict(own) for layer, own in (parts or {}).items()},
        trainable_tokens=_tokens(model, trainable_tokens),
        ensure_weight_tying=ensure_weight_tying,
    )
    if isinstance(method, EditMethod):
        _check_edit_options(method, targets, initialiser(init), batches)
        adapter = build_edits(model, method, targets, name)
    else:
        with _uncollected():
            adapter = build(
                model,
                method or LoRA(),
                targets,
                name,
                checked=True,
                start=initialiser(init),
                batches=batches,
                originals=originals,
            )
    adapter.requires_grad_(True)
    activate(model, name)
    if method is None or isinstance(method, EditMethod) or not method.whole:
        report(adapter)
    return adapter


def _tuple(value: Any, option: str) -> Any:
    """Lists as tuples, so that targets are frozen; anything else is refused."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, Iterable):
        names = tuple(value)
        if all(isinstance(name, str) for name in names):
            return names
    raise LorakitError(f"attach: {option} was given as {value!r}; it is a list of names or one string.")


def _tokens(model: nn.Module, given: Any) -> dict[str, tuple[int, ...]]:
    """Layer suffix -> rows that train alone."""
    if not given:
        return {}
    asked = given if isinstance(given, Mapping) else {input_embedding(model): given}
    return {layer: TrainableTokens(tokens=tokens).tokens for layer, tokens in asked.items()}


def _patterns(
    named: Mapping[str, Mapping[str, Any] | None], patterns: Mapping[str, Mapping[str, Any]]
) -> dict[str, Mapping[str, Any]]:
    """Option -> {pattern: value}, from the keywords and `patterns`; LorakitError where both have one."""
    given = {option: values for option, values in named.items() if values}
    for option in sorted(set(given) & set(patterns)):
        raise LorakitError(f"attach: {option}_pattern and patterns[{option!r}] were both given; keep one.")
    return {**given, **patterns}


def _blocks(layers: int | Sequence[int] | range | None) -> tuple[int, ...] | None:
    if layers is None:
        return None
    numbers = (layers,) if isinstance(layers, int) else tuple(layers)
    if not numbers or not all(isinstance(number, int) for number in numbers):
        raise LorakitError(f"attach: layers was given as {layers!r}; it is a block number, or a list or range of them.")
    return numbers


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without the garbage collector: thousands of small objects are made and kept, and a collection among them can take longer
    than all the rest (0.3 s against 0.05)."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _check_edit_options(method: EditMethod, targets: Targets, start: Initialiser, batches: Any) -> None:
    """Options about matrices mean nothing to an edit, and are refused."""
    asked = {
        "target_modules": targets.target_modules != "all-linear",
        "exclude_modules": targets.exclude_modules is not None,
        "layers_pattern": targets.layers_pattern is not None,
        **{f"{option}_pattern": True for option in targets.patterns},
        "bias": targets.bias == "lora_only",
        "parts": bool(targets.parts),
        "trainable_tokens": bool(targets.trainable_tokens),
        "init": not isinstance(start, Default),
        "batches": batches is not None,
    }
    own = [one.name for one in dataclasses.fields(cast(Any, method))]
    for option, given in asked.items():
        if given:
            raise LorakitError(
                f"attach: {option} was given, which is about weight matrices, and {method.name} changes none; it takes "
                f"layers, modules_to_save and its own options: {', '.join(own)}."
            )


def detach(model: nn.Module, name: str | None = None) -> nn.Module:
    """Take one adapter off (all, without a name); the layers it leaves bare are again the very module objects they were.

    With the last adapter the base's `requires_grad` flags come back too. Where the adapter acted and others stay, none acts
    afterwards, and the log says so. Returns the model.

    Args:
        model: a model with adapters.
        name: the adapter to take off; its tensors stay with the Adapter object.

    Raises:
        LorakitError: there is no such adapter; it is merged just now; a router needs it; or its start replaced the weights
            that others are about. Nothing has been taken off then.
    """
    state = state_of(model)
    if name is not None and name not in adapters_of(state):
        raise unknown("adapter", name, adapters_of(state))
    gone = [name] if name is not None else list(adapters_of(state))
    for merged in state.merged.intersection(gone):
        raise LorakitError(f"detach: adapter {merged!r} is merged into the weights just now; leave `merged` first.")
    for one in gone:
        if adapters_of(state)[one].originals and name is not None and len(adapters_of(state)) > 1:
            raise LorakitError(
                f"detach: the start of adapter {one!r} replaced the base's weights, and other adapters were made for these: "
                f"{', '.join(other for other in adapters_of(state) if other != one)}. Detach these first, or all at once."
            )
    for one, router in state.routers.items():
        for member in set(router.members).intersection(gone) if one not in gone else ():
            raise LorakitError(f"detach: adapter {member!r} is routed by {one!r}; lk.detach(model, {one!r}) first.")
    parents = parents_of(model)
    for one in gone:
        adapter = adapters_of(state).pop(one)
        state.routers.pop(one, None)
        for handle in adapter.handles:
            handle.remove()
        unshare(model, one)
        for path, layer in adapter.layers.items():
            for held in adapter.originals.get(path, {}).values():
                held.restore()
            if layer.remove(one):
                replace_module(layer.base, layer, parents)
    if state.edits is not None:
        state.edits.remove(gone)
    if adapters_of(state) and set(state.routing.names) - set(adapters_of(state)):
        state.routing, state.decided = BASE, False
        log.warning(
            "detach: %s acted on this model; none of the others (%s) acts now. lk.activate(model, name) lets one.",
            ", ".join(gone),
            ", ".join(adapters_of(state)),
        )
    if not adapters_of(state):
        give_back(model)
        close_state(model)
    return model
