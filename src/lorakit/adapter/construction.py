"""Building an adapter on a model: the request is planned, checked, its deltas are built, and put on the layers.

All that can be refused is refused before the model is touched.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorakit.adapter.adapter import Adapter, adapters_of
from lorakit.adapter.pretrained import share, take_over
from lorakit.adapter.targets import PRESETS, Targets, asked_sites, select, select_saved, select_tokens, trained_whole
from lorakit.core.delta import Delta, Method, Shape
from lorakit.core.injection import adapt, adapted_at, parents_of, ties
from lorakit.core.known import computed_weight
from lorakit.core.layout import Bare, Expert, Site
from lorakit.core.replacement import Replacement
from lorakit.core.sites import adaptable_sites, sites_of, split
from lorakit.core.stacks import stacked_sites
from lorakit.core.state import ModelState, found_state, open_state
from lorakit.core.storage import FLOAT, storage_of
from lorakit.core.tied import follower
from lorakit.core.walking import has_suffix, walk
from lorakit.edits.anatomy import anatomy_of
from lorakit.edits.contract import EditMethod
from lorakit.edits.hooks import edit_hooks
from lorakit.errors import LorakitError
from lorakit.init import Default, Initialiser
from lorakit.init.calibration import Batch
from lorakit.init.starts import BuiltDeltas, Plan, PlannedLayer, build_deltas, rewrite
from lorakit.methods import LoRA, TrainableTokens
from lorakit.methods.options import is_lenient
from lorakit.methods.tokens import TokenRows
from lorakit.models.replication import replication_of

log = logging.getLogger("lorakit")


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
    `shifted` says that the deltas have a start to be taken off (`core.offset`), whose tensors are filled in afterwards.
    """
    start = start or Default()
    state = found_state(model)
    check_name(name, state)
    _check_unmerged(state)
    asked = targets
    if method.whole:
        targets = trained_whole(model, targets)
    if paths is None:
        paths = select(model, targets) if targets.target_modules else []
    if checked:
        method.check_layers(paths)
    modules = dict(walk(model))
    tied = ties(modules)
    saved, kept_tied = _with_followers(targets, modules, tied, select_saved(model, targets))
    saved += kept_tied
    paths, following = _with_followers(targets, modules, tied, paths)
    plan = {path: _planned(path, modules[path], method, targets, checked) for path in paths}
    _check_parts(state, plan)
    _check_nesting(state, modules, targets, set(paths), saved)
    _check_rewriting(start, state)
    rows = _planned_rows(model, modules, targets, set(paths), saved)
    _check_parts(state, rows)
    _check_storage(modules, {**plan, **rows}, saved)
    built = build_deltas(model, plan, start, batches, shifted, originals)
    if rows or isinstance(method, TrainableTokens):
        of_rows = build_deltas(model, rows, Default())
        built.plan.update(of_rows.plan)
        built.deltas.update(of_rows.deltas)
        following |= _rows_follow(built, modules, tied, targets)
    _follow(built, modules, following)
    if built.patterns:
        asked = dataclasses.replace(asked, patterns={**asked.patterns, **built.patterns})
    adapter = Adapter(name, model, method, asked, built.pool, saved=tuple(saved))
    made: list[tuple[str, list[Site], dict[str, Delta], Replacement | None]] = []
    for path, planned in built.plan.items():
        module = planned.layer
        names = _biases(module) if targets.bias != "none" else []
        replacement = Replacement(module, names, torch.float32) if names else None
        made.append((path, planned.sites, built.deltas[path], replacement))
    for path, names in _replaced(modules, targets, set(built.plan), saved):
        leader = next((own for at, _, _, own in made if at == kept_tied.get(path)), None)
        own = Replacement(modules[path], names, torch.float32, shared={} if leader is None else leader.tensors())
        made.append((path, adaptable_sites(modules[path]), {}, own))
    if replication_of(model) is None:  # where all layers that come again are such
        _warn_of_ties(tied, [path for path, *_ in made], set(following) | set(kept_tied))
    state = open_state(model)
    parents = parents_of(model)
    mixtures = _mixtures(modules)
    for path, sites, deltas, replacement in made:
        layer = adapted_at(state, path) or adapt(path, modules[path], sites, state, parents)
        layer.tokens = any(path.startswith(block) for block in mixtures)
        if deltas:
            apart = all(isinstance(site.layout, Expert | Bare) for site in sites)
            layer.sites = {**(layer.sites if apart else {}), **{site.name: site for site in sites}}
        layer.add(name, deltas, replacement)
        if not layer.base.training:
            layer.eval()
        adapter.layers[path] = layer
        if path in built.weights:
            adapter.originals[path] = rewrite(layer.base, built.weights[path])
    if state.edits is not None:
        state.edits.rehook()
    _settle_pool(adapter)
    adapter.router, adapter.handles = method.install(name, model, adapter.layers)
    for _, parameter in adapter.named_parameters():
        parameter.requires_grad_(False)
    adapters_of(state)[name] = adapter
    share(adapter)
    take_over(model)
    return adapter


def _planned(path: str, module: nn.Module, method: Method, targets: Targets, checked: bool) -> PlannedLayer:
    """What one layer will carry: a spec for each of its matrices, or of the parts that were asked for."""
    sites = asked_sites(path, sites_of(module), targets)
    for suffix, parts in targets.parts.items():
        if has_suffix(path, suffix):
            sites = split(sites[0], parts, path)
            break
    specs = {}
    for site in sites:
        storage_of(module, site.weight, path)  # refused here, if it is of no kind that is known
        specs[site.name] = targets.spec_for(method, path, site)
        if checked and targets.target_modules in PRESETS and not is_lenient():
            specs[site.name] = capped(specs[site.name], site.layout.shape)  # `coverage.report` says where
        if checked:
            specs[site.name].check(site.layout.shape, site.place(path))
    return PlannedLayer(module, sites, specs)


def _planned_rows(
    model: nn.Module, modules: Mapping[str, nn.Module], targets: Targets, adapted: set[str], saved: list[str]
) -> Plan:
    """The tables of which some rows train alone, beside the adapter's own method."""
    plan: Plan = {}
    for path, tokens in select_tokens(model, targets).items():
        whole = next((one for one in saved if path == one or path.startswith(one + ".")), None)
        if whole is not None or path in adapted:
            other = (
                f"modules_to_save names {whole}, of which" if whole is not None else f"the method changes {path}, and"
            )
            raise LorakitError(
                f"attach: {other} trainable_tokens trains some rows of {path} alone; a table has one or the other. Leave it "
                "out of one of the two."
            )
        sites, spec = sites_of(modules[path]), TrainableTokens(tokens=tokens)
        for site in sites:
            spec.check(site.layout.shape, site.place(path))
        plan[path] = PlannedLayer(modules[path], sites, {site.name: spec for site in sites})
    return plan


def _with_followers(
    targets: Targets, modules: Mapping[str, nn.Module], tied: Mapping[str, list[str]], paths: list[str]
) -> tuple[list[str], dict[str, str]]:
    """Where tied layers stay tied: the layers to adapt, an embedding for all that share its weight; and path ->
    embedding of those that follow one."""
    following: dict[str, str] = {}
    for path in [path for path in tied if targets.ensure_weight_tying and isinstance(modules[path], nn.Embedding)]:
        if path not in following and not {path, *tied[path]}.isdisjoint(paths):
            following |= dict.fromkeys(tied[path], path)
    if not following:
        return paths, {}
    leaders = {*following.values(), *paths}
    return [path for path in modules if path in leaders and path not in following], following


def _follow(built: BuiltDeltas, modules: Mapping[str, nn.Module], following: Mapping[str, str]) -> None:
    """Add the deltas of layers that follow an embedding: path -> path of the embedding."""
    for path, embedding in following.items():
        (leader,), sites = built.deltas[embedding].values(), sites_of(modules[path])
        if len(sites) != 1:
            continue
        built.plan[path] = PlannedLayer(modules[path], sites, {sites[0].name: leader.spec})
        built.deltas[path] = {sites[0].name: follower(leader, sites[0].layout.shape, path)}


def _rows_follow(
    built: BuiltDeltas, modules: Mapping[str, nn.Module], tied: Mapping[str, list[str]], targets: Targets
) -> dict[str, str]:
    """Path -> embedding of the layers in which rows of an embedding act too: all that share its weight (a tied head), but for
    those that have other rows of their own, or that the method changes."""
    following: dict[str, str] = {}
    for path, others in tied.items():
        leader = next(iter(built.deltas.get(path, {}).values()), None)
        if not isinstance(leader, TokenRows) or not isinstance(modules[path], nn.Embedding) or path in following:
            continue
        for other in others:
            held = next(iter(built.deltas.get(other, {}).values()), None)
            if held is None or held.spec == leader.spec:
                following[other] = path
            elif targets.ensure_weight_tying:
                raise LorakitError(
                    f"attach: {path} and {other} share their weight, and other rows of them are to be trained; give both the "
                    "same tokens, or leave ensure_weight_tying off."
                )
    return following


def capped(spec: Method, shape: Shape) -> Method:
    """The spec with the largest useful rank of a matrix, where a preset has chosen one that is smaller than the rank (a gate
    with one output). The scale stays."""
    own, most = cast(Any, spec), min(shape.out, shape.in_)
    return spec if "rank" not in own.pattern_fields or own.rank <= most else spec.resized(most)


# -- what is refused -------------------------------------------------------------------------------------------------------


def check_name(name: str, state: ModelState | None, verb: str = "attach") -> None:
    """LorakitError unless this is a name, and no adapter's on the model."""
    if not isinstance(name, str) or not name or "." in name or "/" in name:
        raise LorakitError(f"{verb}: an adapter's name is a non-empty string without '.' and '/'; {name!r} was given.")
    if state is not None and name in adapters_of(state):
        raise LorakitError(
            f"{verb}: an adapter {name!r} is on this model already. Give another name=, or lk.detach(model, {name!r}) first."
        )


def _check_unmerged(state: ModelState | None) -> None:
    """A new adapter starts from the base's weights, which are not there while another is merged."""
    if state is not None and state.merged:
        raise LorakitError(
            f"attach: adapter {sorted(state.merged)[0]!r} is merged into the weights just now, so a new one would start from "
            "weights that are not the base's; leave `merged` first."
        )


def _check_parts(state: ModelState | None, plan: Plan) -> None:
    """Adapters on one layer see the same matrices; of those that a module multiplies by itself each may change some."""
    for path, planned in plan.items():
        held, own = adapted_at(state, path), {site.name: site for site in planned.sites}
        apart = all(isinstance(site.layout, Expert | Bare) for site in planned.sites)
        if held is not None and held.deltas and own != held.sites and not apart:
            raise LorakitError(
                f"attach: {path} has adapters with other parts already; adapters on one layer must split its rows alike."
            )


def _check_nesting(
    state: ModelState | None, modules: Mapping[str, nn.Module], targets: Targets, paths: set[str], saved: list[str]
) -> None:
    """No adapter may train whole a module within which another adapts layers: a copy would hold the other's tensors."""
    touched = paths | {path for path, _ in _replaced(modules, targets, paths, saved)}
    for other in adapters_of(state).values() if state is not None else ():
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
                    f"attach: {path}.{site.weight} is stored as {storage.label(planned.layer, site.weight)}, and this layer is "
                    "reached by substituting its weight, which needs floats; leave it out of quantisation, or out of "
                    "target_modules."
                )
    for whole in saved:
        for path, module in modules.items():
            if path != whole and not path.startswith(whole + "."):
                continue
            if (isinstance(module, nn.Embedding) and module.max_norm is not None) or computed_weight(module):
                continue  # nothing to add to, and floats
            for site in sites_of(module):
                storage = storage_of(module, site.weight, path)
                if storage is not FLOAT:
                    raise LorakitError(
                        f"attach: modules_to_save names {whole}, and {path} is stored as {storage.label(module, site.weight)}, "
                        "whose codes cannot be trained. Leave it in floats when the model is quantised (quantize.skip, or "
                        "llm_int8_skip_modules of transformers), or adapt it by target_modules."
                    )


def _check_rewriting(start: Initialiser, state: ModelState | None) -> None:
    """A start that replaces the base's weights must be the first on the model: the others were made for those weights."""
    if start.rewrites and state is not None:
        raise LorakitError(
            f"attach: init={start.name!r} replaces the base's weights, and there are adapters on this model that are about the "
            f"present ones: {', '.join(adapters_of(state))}. lk.detach(model) first, and attach them afterwards."
        )


# -- what is replaced and shared -------------------------------------------------------------------------------------------


def _biases(module: nn.Module) -> list[str]:
    """Names of a layer's own bias parameters."""
    names = [name for name, _ in module.named_parameters(recurse=False) if "bias" in name]
    if isinstance(module, nn.MultiheadAttention):
        names += [f"out_proj.{name}" for name, _ in module.out_proj.named_parameters() if "bias" in name]
    return names


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


def _mixtures(modules: Mapping[str, nn.Module]) -> list[str]:
    """The mixtures of experts of a model, as what their layers' paths begin with: in them tokens lie without their rows."""
    blocks = []
    for path, module in modules.items():
        if path and any(isinstance(site.layout, Expert) for site in stacked_sites(module)):
            blocks += [f"{path}.", f"{path.rpartition('.')[0]}."]
    return blocks


def _warn_of_ties(tied: Mapping[str, list[str]], paths: list[str], following: set[str]) -> None:
    for path in paths:
        if path in tied and following.isdisjoint((path, *tied[path])):
            log.warning(
                "%s shares its weight with %s. The adapter acts beside %s alone; merging will need untie=True, unless all of "
                "them get the same weight.",
                path,
                ", ".join(tied[path]),
                path,
            )


def _settle_pool(adapter: Adapter) -> None:
    """The shared tensors on the model's device, in the widest dtype of the deltas that use them."""
    if not any(True for _ in (*adapter.pool.parameters(), *adapter.pool.buffers())):
        return
    reference = next(adapter.model.parameters(), None)
    dtype = torch.float32
    for _, _, delta in adapter.deltas():
        for tensor in (*delta.parameters(), *delta.buffers()):
            if tensor.is_floating_point():
                dtype = torch.promote_types(dtype, tensor.dtype)
    adapter.pool.to(device=None if reference is None else reference.device, dtype=dtype)


# -- edits -----------------------------------------------------------------------------------------------------------------


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
    check_name(name, found_state(model))
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
    edit_hooks(model, anatomy).add(name, known, edits, anatomy)
    adapter.requires_grad_(False)
    return adapter
