"""An adapter is a named set of deltas, or of edits, over a model: put on, routed, taken off.

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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lorakit.anatomy import anatomy_of
from lorakit.board import Board, activate, board_of, found_board
from lorakit.calibration import Batch
from lorakit.delta import Delta, Method, Pool
from lorakit.edit import Anatomy, Edit, EditMethod, Place
from lorakit.errors import LorakitError, unknown
from lorakit.init import Default, Initialiser, initialiser
from lorakit.layer import Adapted, Replacement
from lorakit.layout import Rows, Site, sites_of, split
from lorakit.methods import LoRA
from lorakit.routing import BASE
from lorakit.seam import seams_of
from lorakit.starts import Plan, Planned, begin, rewrite
from lorakit.storage import FLOAT, Held, settle, storage_of
from lorakit.targets import Targets, has_suffix, select, select_saved, value_for, walk

log = logging.getLogger("lorakit")


@dataclass
class Adapter:
    """One adapter on one model.

    Attributes:
        name: its name on this model.
        model: the model it is on.
        method: the spec all its deltas share, but for rank and alpha patterns; or that of its edits.
        targets: what it changes, as asked.
        pool: tensors shared by its deltas.
        layers: path -> adapted layer, for the layers that carry one of its deltas or replacements.
        saved: paths of the modules it replaces whole.
        originals: path -> the base's own weights, where the adapter's start has put others in their place (LoftQ).
        router: what weighs experts by token, where the adapter is a mixture or a router over others.
        handles: hooks on the model, which go with the adapter.
        edits: where each of its edits stands -> the edit; empty for an adapter of deltas.
        anatomy: what the model is made of, for an adapter of edits.
    """

    name: str
    model: nn.Module
    method: Any
    targets: Targets
    pool: Pool
    layers: dict[str, Adapted] = field(default_factory=dict, repr=False)
    saved: tuple[str, ...] = ()
    originals: dict[str, dict[str, Held]] = field(default_factory=dict, repr=False)
    router: nn.Module | None = field(default=None, repr=False)
    handles: list[RemovableHandle] = field(default_factory=list, repr=False)
    edits: dict[Place, Edit] = field(default_factory=dict, repr=False)
    anatomy: Anatomy | None = field(default=None, repr=False)

    def deltas(self) -> Iterator[tuple[str, Site, Delta]]:
        """`(path, site, delta)` of every matrix it changes."""
        for path, layer in self.layers.items():
            for key, delta in layer.deltas_of(self.name).items():
                yield path, layer.sites[key], delta

    def replacements(self) -> Iterator[tuple[str, Replacement]]:
        """`(path, replacement)` of every layer in which it replaces tensors (biases, modules_to_save)."""
        for path, layer in self.layers.items():
            if self.name in layer.replacements:
                yield path, cast(Replacement, layer.replacements[self.name])

    def modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Everything that holds its tensors, by a name that is stable for this adapter."""
        for path, site, delta in self.deltas():
            yield f"{path}.{site.name}" if site.name else path, delta
        for place, edit in self.edits.items():
            yield place.path or self.method.family, edit
        yield "pool", self.pool
        if self.router is not None:
            yield "router", self.router

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Its parameters, in the model's order."""
        for prefix, module in self.modules():
            for name, parameter in module.named_parameters():
                yield f"{prefix}.{name}", parameter
        for path, replacement in self.replacements():
            for name, tensor in replacement.tensors().items():
                if isinstance(tensor, nn.Parameter):
                    yield f"{path}.{name}", tensor

    def parameters(self) -> Iterator[nn.Parameter]:
        """Its parameters, in the model's order."""
        return (parameter for _, parameter in self.named_parameters())

    def roles(self) -> dict[str, str]:
        """Parameter name -> what it is: the paper's letter ("A", "B"), "bias", "saved", "pool", "router"."""
        roles: dict[str, str] = {}
        for path, site, delta in self.deltas():
            prefix = f"{path}.{site.name}" if site.name else path
            own = delta.roles()
            for name, _ in delta.named_parameters():
                letter = name.rpartition(".")[2]
                roles[f"{prefix}.{name}"] = own.get(letter, letter)
        for place, edit in self.edits.items():
            for name, _ in edit.named_parameters():
                roles[f"{place.path or self.method.family}.{name}"] = name.rpartition(".")[2]
        for name, _ in self.pool.named_parameters():
            roles[f"pool.{name}"] = "pool"
        for name, _ in self.router.named_parameters() if self.router is not None else ():
            roles[f"router.{name}"] = "router"
        whole = set(self.saved)
        for path, replacement in self.replacements():
            for name in replacement.names:
                roles[f"{path}.{name}"] = "saved" if path in whole else "bias"
        return roles

    def num_parameters(self, trainable: bool = False) -> int:
        """How many numbers it holds in parameters; with `trainable`, how many of them train now."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not trainable)

    def requires_grad_(self, flag: bool = True) -> Self:
        """Make its floating parameters trainable or not."""
        for parameter in self.parameters():
            parameter.requires_grad_(flag)
        for _, _, delta in self.deltas():
            for frozen in delta.frozen():
                frozen.requires_grad_(False)
        return self

    def state_dict(self) -> dict[str, Tensor]:
        """All its tensors, buffers too, under lorakit's own names; the very tensors, detached."""
        state = {
            f"{prefix}.{name}": tensor.detach()
            for prefix, module in self.modules()
            for name, tensor in module.state_dict().items()
        }
        for path, replacement in self.replacements():
            for name, tensor in replacement.tensors().items():
                state[f"{path}.{name}"] = tensor.detach()
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy tensors in place; every name and shape must agree, otherwise nothing is changed."""
        own = self.state_dict()
        for kind, names in (("has no", set(own) - set(state)), ("has an unexpected", set(state) - set(own))):
            if names:
                raise LorakitError(
                    f"load_state_dict: the state {kind} tensor {sorted(names)[0]!r} (and {len(names) - 1} more); adapter "
                    f"{self.name!r} holds {len(own)} tensors."
                )
        for name, tensor in own.items():
            if tensor.shape != state[name].shape:
                raise LorakitError(
                    f"load_state_dict: {name} has shape {tuple(state[name].shape)}; this adapter needs {tuple(tensor.shape)}."
                )
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(state[name])

    def save(self, folder: str | Path, base: str | None = None, record: Mapping[str, Any] | None = None) -> Path:
        """Write it as a folder that PEFT, vLLM and lorakit read; see `lorakit.store.save`."""
        from lorakit import store  # the one import against the arrow: saving reads best as a method

        return store.save(self, folder, base=base, record=record)


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """The adapters on a model, by name."""
    board = found_board(model)
    return {} if board is None else dict(board.adapters)


# -- attach and detach --------------------------------------------------------------------------------------------------


def _tuple(value: Any, option: str) -> Any:
    """Lists as tuples, so that targets are frozen; anything else is refused."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, Iterable):
        names = tuple(value)
        if all(isinstance(name, str) for name in names):
            return names
    raise LorakitError(f"attach: {option} was given as {value!r}; it is a list of names or one string.")


def _blocks(layers: int | Sequence[int] | range | None) -> tuple[int, ...] | None:
    if layers is None:
        return None
    numbers = (layers,) if isinstance(layers, int) else tuple(layers)
    if not numbers or not all(isinstance(number, int) for number in numbers):
        raise LorakitError(f"attach: layers was given as {layers!r}; it is a block number, or a list or range of them.")
    return numbers


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
    modules_to_save: Iterable[str] | None = None,
    bias: str = "none",
    init: str | Initialiser = "default",
    batches: Iterable[Batch] | None = None,
    parts: Mapping[str, Mapping[str, Any]] | None = None,
    originals: Mapping[str, Tensor] | None = None,
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
        modules_to_save: modules trained whole, beside their frozen original.
        bias: "none", "lora_only" or "all".
        init: initial values, a name or an Initialiser; "default" is the method's own.
        batches: data for starts that measure the model (eva, corda, lora-ga): each the arguments of one `model(**batch)`.
        parts: {layer suffix: {part: (start, stop) or [(start, stop), …]}}: each part of a fused layer its own delta.
        originals: the float model's parameters by name, for starts that answer a quantised base's error (loftq).

    Raises:
        LorakitError: a name matches nothing, an option does not fit; the model is unchanged then.
    """
    lists = (layers_pattern,) if isinstance(layers_pattern, str) else layers_pattern
    targets = Targets(
        target_modules=_tuple(target_modules, "target_modules"),
        exclude_modules=_tuple(exclude_modules, "exclude_modules"),
        layers=_blocks(layers),
        layers_pattern=None if lists is None else tuple(lists),
        rank_pattern=dict(rank_pattern or {}),
        alpha_pattern=dict(alpha_pattern or {}),
        modules_to_save=tuple(modules_to_save or ()),
        bias=bias,
        parts={layer: dict(own) for layer, own in (parts or {}).items()},
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
    return adapter


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without the garbage collector: thousands of small objects come and stay, and looking through all that the process
    holds, as it would every so many of them, takes longer now and then than all the rest (0.3 s against 0.05)."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _check_edit_options(method: EditMethod, targets: Targets, start: Initialiser, batches: Any) -> None:
    """Options that are about matrices say nothing to an edit, and what says nothing is refused."""
    asked = {
        "target_modules": targets.target_modules != "all-linear",
        "exclude_modules": targets.exclude_modules is not None,
        "layers_pattern": targets.layers_pattern is not None,
        "rank_pattern": bool(targets.rank_pattern),
        "alpha_pattern": bool(targets.alpha_pattern),
        "bias": targets.bias == "lora_only",
        "parts": bool(targets.parts),
        "init": not isinstance(start, Default),
        "batches": batches is not None,
    }
    own = [one.name for one in dataclasses.fields(cast(Any, method))]
    for option, given in asked.items():
        if given:
            raise LorakitError(
                f"attach: {option} was given, which is about weight matrices, and {method.name} stands around calls; it takes "
                f"layers, modules_to_save and its own options: {', '.join(own)}."
            )


class _Reader:
    """The model's tokenizer, read when it is first needed (a prompt that starts as a text)."""

    def __init__(self, source: str | None) -> None:
        self.source = source

    def __call__(self, text: str, **options: Any) -> Any:
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(str(self.source))
        except (OSError, ValueError) as problem:
            raise LorakitError(
                f"attach: the text that the prompt starts from needs a tokenizer, and {self.source!r} gives none ({problem}); "
                "give tokenizer=, a hub name or folder, or ids=."
            ) from problem
        return tokenizer(text, **options)


def build_edits(model: nn.Module, method: EditMethod, targets: Targets, name: str, folded: bool = False) -> Adapter:
    """Make an adapter of edits and put it on the model, neither trainable nor active yet. Used by `attach` and `store.load`.

    `folded`: its tensors come from a file, and so does what an encoder of prompts had made of them.
    """
    _check_name(name, found_board(model))
    anatomy = anatomy_of(model)
    source = getattr(method, "tokenizer", None) or getattr(model, "name_or_path", None)
    known = method if folded else method.with_tokenizer(_Reader(source))
    edits = known.build_all(known.places(anatomy, targets.layers), anatomy, folded)
    reference = next(model.parameters(), None)
    for edit in edits.values():
        edit.to(device=None if reference is None else reference.device)
        edit.train(model.training)
    own = dataclasses.replace(targets, target_modules=(), layers=None)
    adapter = build(model, LoRA(), own, name, checked=False, paths=[])
    adapter.method, adapter.targets = known, dataclasses.replace(own, layers=targets.layers)
    adapter.edits, adapter.anatomy = edits, anatomy
    seams_of(board_of(model), model).put(name, edits, anatomy)
    adapter.requires_grad_(False)
    return adapter


def _check_name(name: str, board: Board | None) -> None:
    if not isinstance(name, str) or not name or "." in name or "/" in name:
        raise LorakitError(f"attach: an adapter's name is a non-empty string without '.' and '/'; {name!r} was given.")
    if board is not None and board.merged:
        raise LorakitError(
            f"attach: adapter {sorted(board.merged)[0]!r} is merged into the weights just now, so a new one would start from "
            "weights that are not the base's; leave `merged` first."
        )
    if board is not None and name in board.adapters:
        raise LorakitError(
            f"attach: an adapter {name!r} is on this model already. Give another name=, or lk.detach(model, {name!r}) first."
        )


def _spec_for(method: Method, targets: Targets, where: str, path: str) -> Method:
    """The method's spec with the rank and alpha of this part of a layer, or of the layer."""
    changes = {}
    for option, patterns in targets.patterns().items():
        if not patterns:
            continue
        if option not in method.pattern_fields:
            raise LorakitError(f"attach: {option}_pattern was given, but {method.name} has no {option} per layer.")
        value = value_for(patterns, where)
        value = value_for(patterns, path) if value is None else value
        if value is not None:
            changes[option] = value
    return method.replace(**changes) if changes else method


def _sites(module: nn.Module, path: str, targets: Targets) -> list[Site]:
    sites = sites_of(module)
    for suffix, parts in targets.parts.items():
        if has_suffix(path, suffix):
            return split(sites[0], parts, path)
    return sites


def _biases(module: nn.Module) -> list[str]:
    """Names of a layer's own bias parameters."""
    names = [name for name, _ in module.named_parameters(recurse=False) if "bias" in name]
    if isinstance(module, nn.MultiheadAttention):
        names += [f"out_proj.{name}" for name, _ in module.out_proj.named_parameters() if "bias" in name]
    return names


def build(
    model: nn.Module,
    method: Method,
    targets: Targets,
    name: str,
    checked: bool,
    start: Initialiser | None = None,
    paths: list[str] | None = None,
    batches: Iterable[Batch] | None = None,
    shifted: bool = False,
    originals: Mapping[str, Tensor] | None = None,
) -> Adapter:
    """Make an adapter and put it on the model, neither trainable nor active yet. Used by `attach` and `store.load`.

    All that can be refused is refused before the model is touched. `paths` gives the layers where they are known;
    `shifted` says that the deltas have a start to be taken off (`delta.Offset`), whose tensors are filled in afterwards.
    """
    start = start or Default()
    board = found_board(model)
    _check_name(name, board)
    if paths is None:
        paths = select(model, targets) if targets.target_modules else []
    if checked:
        method.check_layers(paths)
    saved = select_saved(model, targets)
    modules = dict(walk(model))
    plan: Plan = {}
    for path in paths:
        sites = _sites(modules[path], path, targets)
        specs = {}
        for site in sites:
            storage_of(modules[path], site.weight, path)
            where = f"{path}.{site.name}" if site.name else path
            specs[site.name] = _spec_for(
                method.at(path), targets, where, where if isinstance(site.layout, Rows) else path
            )
            if checked:
                specs[site.name].check(site.layout.shape, where)
        plan[path] = Planned(modules[path], sites, specs)
        held = _adapted_at(board, path)
        if held is not None and {s.name: s for s in sites} != held.sites and held.deltas:
            raise LorakitError(
                f"attach: {path} has adapters with other parts already; adapters on one layer must split its rows alike."
            )
    _check_nesting(board, modules, targets, set(paths), saved)
    _check_rewriting(start, board)
    _check_storage(modules, plan, saved)
    begun = begin(model, plan, start, batches, shifted, originals)
    if begun.patterns:
        targets = dataclasses.replace(
            targets,
            rank_pattern=begun.patterns.get("rank", targets.rank_pattern),
            alpha_pattern=begun.patterns.get("alpha", targets.alpha_pattern),
        )
    adapter = Adapter(name, model, method, targets, begun.pool, saved=tuple(saved))
    made: list[tuple[str, list[Site], dict[str, Delta], Replacement | None]] = []
    for path, planned in begun.plan.items():
        module = planned.layer
        names = _biases(module) if targets.bias != "none" else []
        replacement = Replacement(module, names, torch.float32) if names else None
        made.append((path, planned.sites, begun.deltas[path], replacement))
    for path, names in _replaced(modules, targets, set(begun.plan), saved):
        made.append((path, sites_of(modules[path]), {}, Replacement(modules[path], names, torch.float32)))
    _warn_of_ties(model, modules, [path for path, *_ in made])
    if board is None:
        board = Board()
        board.frozen = {key: parameter.requires_grad for key, parameter in model.named_parameters()}
        model._lorakit = board  # type: ignore[assignment]
        model.requires_grad_(False)
        settle(model)
    places = _places(model)
    for path, sites, deltas, replacement in made:
        layer = _adapted_at(board, path) or _wrap(path, modules[path], sites, board, places)
        if deltas:
            layer.sites = {site.name: site for site in sites}
        layer.add(name, deltas, replacement)
        if not layer.base.training:
            layer.eval()
        adapter.layers[path] = layer
        if path in begun.weights:
            adapter.originals[path] = rewrite(layer.base, begun.weights[path])
    if board.seams is not None:
        board.seams.seat()
    _settle_pool(adapter)
    adapter.router, adapter.handles = method.install(name, model, adapter.layers)
    for _, parameter in adapter.named_parameters():
        parameter.requires_grad_(False)
    board.adapters[name] = adapter
    return adapter


def _check_nesting(
    board: Board | None, modules: Mapping[str, nn.Module], targets: Targets, paths: set[str], saved: list[str]
) -> None:
    """No adapter may train whole a module within which another adapts layers: a copy would hold the other's tensors."""
    touched = paths | {path for path, _ in _replaced(modules, targets, paths, saved)}
    for other in board.adapters.values() if board is not None else ():
        pairs = [(whole, path) for whole in saved for path in other.layers]
        pairs += [(whole, path) for whole in other.saved for path in touched]
        for whole, path in pairs:
            if path.startswith(whole + "."):
                raise LorakitError(
                    f"attach: {whole} is trained whole by one adapter, and {path} within it is changed by another "
                    f"({other.name!r} is on this model already). Name the parts of {whole} in modules_to_save instead, or "
                    f"lk.detach(model, {other.name!r}) first."
                )


def _check_storage(modules: Mapping[str, nn.Module], plan: Plan, saved: list[str]) -> None:
    """What a packed weight cannot do: be trained whole, or be substituted into a layer that reads it itself."""
    for path, planned in plan.items():
        for site in planned.sites:
            storage = storage_of(planned.layer, site.weight, path)
            if not site.layout.beside and storage is not FLOAT:
                raise LorakitError(
                    f"attach: {path}.{site.weight} is held as {storage.label(planned.layer, site.weight)}, and this layer is "
                    "reached by substituting its weight, which needs floats; leave it out of quantisation, or out of "
                    "target_modules."
                )
    for whole in saved:
        for path, module in modules.items():
            if path != whole and not path.startswith(whole + "."):
                continue
            if isinstance(module, nn.Embedding) and module.max_norm is not None:
                continue  # nothing to adapt, and floats
            for site in sites_of(module):
                storage = storage_of(module, site.weight, path)
                if storage is not FLOAT:
                    raise LorakitError(
                        f"attach: modules_to_save names {whole}, and {path} is held as {storage.label(module, site.weight)}, "
                        "whose codes cannot be trained. Leave it in floats when the model is quantised (quantize.skip, or "
                        "llm_int8_skip_modules of transformers), or adapt it by target_modules."
                    )


def _check_rewriting(start: Initialiser, board: Board | None) -> None:
    """A start that replaces the base's weights must be the first on the model: the others were made for those weights."""
    if start.rewrites and board is not None:
        raise LorakitError(
            f"attach: init={start.name!r} replaces the base's weights, and there are adapters on this model that are about the "
            f"present ones: {', '.join(board.adapters)}. lk.detach(model) first, and attach them afterwards."
        )


def _settle_pool(adapter: Adapter) -> None:
    """The shared tensors on the model's device, in the widest dtype of the deltas that use them."""
    reference = next(adapter.model.parameters(), None)
    dtype = torch.float32
    for _, _, delta in adapter.deltas():
        for tensor in (*delta.parameters(), *delta.buffers()):
            if tensor.is_floating_point():
                dtype = torch.promote_types(dtype, tensor.dtype)
    adapter.pool.to(device=None if reference is None else reference.device, dtype=dtype)


def _replaced(
    modules: Mapping[str, nn.Module], targets: Targets, adapted: set[str], saved: list[str]
) -> list[tuple[str, list[str]]]:
    """Layers in which named tensors are replaced whole: modules_to_save, and with bias="all" all other biases."""
    result = []
    for path in saved:
        module = modules[path]
        names = [name for name, _ in module.named_parameters()]
        buffers = [name for name, _ in module.named_buffers() if name in module.state_dict()]
        result.append((path, names + buffers))
    if targets.bias == "all":
        for path, module in modules.items():
            inside = any(path == name or path.startswith(name + ".") for name in saved)
            names = _biases(module)
            if path and path not in adapted and not inside and names:
                result.append((path, names))
    return result


def _warn_of_ties(model: nn.Module, modules: Mapping[str, nn.Module], paths: list[str]) -> None:
    tied = ties(modules)
    for path in paths:
        if path in tied:
            log.warning(
                "%s shares its weight with %s. The adapter acts beside %s alone; merging will need untie=True.",
                path,
                ", ".join(tied[path]),
                path,
            )


def ties(modules: Mapping[str, nn.Module]) -> dict[str, list[str]]:
    """Path -> paths of other modules that hold one of the same parameters, for the modules that share any."""
    owners: dict[int, list[str]] = {}
    for path, module in modules.items():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(path)
    shared: dict[str, list[str]] = {}
    for paths in owners.values():
        for path in paths if len(paths) > 1 else ():
            others = [other for other in paths if other != path]
            shared[path] = list(dict.fromkeys(shared.get(path, []) + others))
    return shared


def _adapted_at(board: Board | None, path: str) -> Adapted | None:
    if board is None:
        return None
    for adapter in board.adapters.values():
        if path in adapter.layers:
            return adapter.layers[path]
    return None


Places = dict[int, list[tuple[nn.Module, str]]]


def _places(model: nn.Module) -> Places:
    """Every module's identity -> the parents and attributes that refer to it (a shared layer has several)."""
    places: Places = {}
    for parent in model.modules():
        if not isinstance(parent, Adapted):
            for name, child in parent._modules.items():
                places.setdefault(id(child), []).append((parent, name))
    return places


def _wrap(path: str, module: nn.Module, sites: list[Site], board: Board, places: Places) -> Adapted:
    layer = Adapted(module, sites, board, path)
    if any(isinstance(parent, nn.TransformerEncoderLayer) for parent, _ in places[id(module)]):
        # Torch's fused encoder reads its layers' weights and never calls them, unless a hook is registered.
        layer.register_forward_hook(_keep_call)
    for parent, name in places[id(module)]:
        parent._modules[name] = layer
    return layer


def _keep_call(module: nn.Module, args: Any, output: Any) -> None:
    """A forward hook that does nothing; its presence keeps torch's fused encoder away."""


def detach(model: nn.Module, name: str | None = None) -> nn.Module:
    """Take one adapter off (all, without a name); the layers it leaves bare are again the very module objects they were.

    With the last adapter the base's `requires_grad` flags come back too. Returns the model.
    """
    board = board_of(model)
    if name is not None and name not in board.adapters:
        raise unknown("adapter", name, board.adapters)
    gone = [name] if name is not None else list(board.adapters)
    for merged in board.merged.intersection(gone):
        raise LorakitError(f"detach: adapter {merged!r} is merged into the weights just now; leave `merged` first.")
    for one in gone:
        if board.adapters[one].originals and name is not None and len(board.adapters) > 1:
            raise LorakitError(
                f"detach: the start of adapter {one!r} replaced the base's weights, and there are others on them now: "
                f"{', '.join(other for other in board.adapters if other != one)}. Detach these first, or all at once."
            )
    for one, router in board.routers.items():
        for member in set(router.members).intersection(gone) if one not in gone else ():
            raise LorakitError(f"detach: adapter {member!r} is routed by {one!r}; lk.detach(model, {one!r}) first.")
    places = _places(model)
    for one in gone:
        adapter = board.adapters.pop(one)
        board.routers.pop(one, None)
        for handle in adapter.handles:
            handle.remove()
        for path, layer in adapter.layers.items():
            for held in adapter.originals.get(path, {}).values():
                held.restore()
            if layer.remove(one):
                for parent, attribute in places[id(layer)]:
                    parent._modules[attribute] = layer.base
    if board.seams is not None:
        board.seams.take(gone)
    if set(board.routing.names) - set(board.adapters):
        board.routing = BASE
    if not board.adapters:
        for key, parameter in model.named_parameters():
            parameter.requires_grad_(board.frozen.get(key, parameter.requires_grad))
        del model._lorakit
    return model
