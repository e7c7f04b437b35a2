"""Which layers an adapter changes: names, patterns, presets and ranges, resolved against a model.

Matching follows PEFT's rules, so that a PEFT configuration selects the same layers, with one difference: nothing that
was asked for may match nothing.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from torch import nn

from lorakit.core.delta import Method
from lorakit.core.layer import Adapted
from lorakit.core.layout import Bare, Expert, Linear, Rows, Site
from lorakit.core.patterns import matches, mistake
from lorakit.core.sites import adaptable_sites, refusal, sites_of
from lorakit.core.stacks import stacked_sites
from lorakit.core.walking import block_of, has_suffix, in_attention, value_for, walk
from lorakit.errors import LorakitError
from lorakit.methods.options import is_lenient

log = logging.getLogger("lorakit")

_TOWER = re.compile(r"(^|\.)(vision|visual|image|audio|speech)[^.]*(\.|$)", re.IGNORECASE)
_PROJECTOR = re.compile(r"(^|\.)[^.]*(projector|connector|merger|language_projection|modality_projection)[^.]*(\.|$)")
_CROSS = re.compile(r"(^|\.)(encoder_attn|EncDecAttention|crossattention|cross_attn|attn2|encdec_attn)(\.|$)")
_TEXT = re.compile(r"(^|\.)text_(encoder|model)[^.]*(\.|$)")


def _of_language(path: str) -> bool:
    return not (_TOWER.search(path) or _PROJECTOR.search(path))


PRESETS: Mapping[str, Callable[[str], bool]] = {
    "all-linear": lambda path: True,
    "attention": in_attention,
    "mlp": lambda path: not in_attention(path),
    "cross-attention": lambda path: bool(_CROSS.search(path)),
    "vision": lambda path: bool(_TOWER.search(path)) and not _PROJECTOR.search(path),
    "language": _of_language,
    "projector": lambda path: bool(_PROJECTOR.search(path)),
    "text-encoder": lambda path: bool(_TEXT.search(path)),
}
"""Names for groups of linear layers outside the output head -> whether a path is of the group. `cross-attention`, which is over
another sequence (encoder-decoders, UNets), is part of `attention`; `language` is what is neither tower nor projector."""

Parts = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Targets:
    """What was asked for, as it is saved with the adapter.

    Attributes:
        target_modules: suffixes of module names, or one regular expression for whole names, or a preset.
        exclude_modules: suffixes, or one regular expression; wins over target_modules.
        layers: only modules inside these numbered blocks.
        layers_pattern: the name of the list that `layers` counts in, where a model has several.
        patterns: option of the method -> {name pattern: its value in matching layers}; the first match counts. Which options
            may differ per layer is `Method.pattern_fields`.
        modules_to_save: suffixes of modules that are trained and saved whole.
        bias: "none"; "lora_only": biases of adapted layers train; "all": every bias of the model.
        parts: layer suffix -> part name -> row range(s): every part of a fused layer gets its own delta.
        trainable_tokens: layer suffix -> the rows of its table that train alone, beside what the method changes.
        ensure_weight_tying: what is asked for an embedding, or for a layer that shares its weight, is one for all of them.
    """

    target_modules: str | tuple[str, ...] = "all-linear"
    exclude_modules: str | tuple[str, ...] | None = None
    layers: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] | None = None
    patterns: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    modules_to_save: tuple[str, ...] = ()
    bias: str = "none"
    parts: Parts = field(default_factory=dict)
    trainable_tokens: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    ensure_weight_tying: bool = False

    def __post_init__(self) -> None:
        if self.bias not in ("none", "all", "lora_only"):
            raise LorakitError(f'attach: bias was given as {self.bias!r}; it is "none", "all" or "lora_only".')
        given = {option: dict(values) for option, values in self.patterns.items() if values}
        object.__setattr__(self, "patterns", given)

    def spec_for(self, method: Method, path: str, site: Site) -> Method:
        """The method's spec with the options that these patterns give to one matrix of the layer at `path`: by its own
        name, or by the layer's where it is no part of a fused one."""
        changes = {}
        for option, patterns in self.patterns.items():
            if option not in method.pattern_fields:
                able = ", ".join(method.pattern_fields) or "none"
                raise LorakitError(
                    f"attach: {option}_pattern was given, but {method.name} has no {option} per layer. Options of it that may "
                    f"differ per layer: {able}."
                )
            value = value_for(patterns, site.place(path))
            if value is None and isinstance(site.layout, Expert):
                value = value_for(patterns, f"{path}.{site.weight}")
            if value is None and not isinstance(site.layout, Rows):
                value = value_for(patterns, path)
            if value is not None:
                changes[option] = value
        spec = method.at(path)
        return spec.replace(**changes) if changes else spec

    def as_data(self) -> dict[str, Any]:
        """Plain data; patterns as `<option>_pattern` with pairs, since the first match counts and JSON objects are sorted in
        files."""
        own = dataclasses.asdict(self)
        patterns = {"rank": {}, "alpha": {}, **own.pop("patterns")}
        return {
            **own,
            **{f"{option}_pattern": [list(pair) for pair in one.items()] for option, one in patterns.items()},
        }

    @classmethod
    def from_data(cls, data: Mapping[str, Any], where: Path) -> Targets:
        """What `as_data` has written, read from the file `where`."""
        written = {key for key in data if key.endswith("_pattern") and key != "layers_pattern"}
        values = {key: data[key] for key in data if key not in written}
        values["patterns"] = {key.removesuffix("_pattern"): dict(data[key]) for key in written}
        values = {"trainable_tokens": {}, "ensure_weight_tying": False, **values}  # which older folders do not have
        known = {field.name for field in dataclasses.fields(cls)}
        if set(values) != known:
            raise LorakitError(
                f"load: {where} describes targets by {sorted(data)}; this version knows {sorted(known)}. Without "
                f"{where.name} the folder reads as PEFT's."
            )
        for key, value in values.items():
            if isinstance(value, list):
                values[key] = tuple(value)
        values["parts"] = {
            layer: {part: _ranges(given) for part, given in parts.items()} for layer, parts in values["parts"].items()
        }
        values["trainable_tokens"] = {layer: tuple(tokens) for layer, tokens in values["trainable_tokens"].items()}
        return cls(**values)


def _ranges(given: list[Any]) -> Any:
    """Rows of a part as they were given: one pair (start, stop), or a list of pairs."""
    return [tuple(pair) for pair in given] if isinstance(given[0], list) else tuple(given)


def head_paths(model: nn.Module) -> set[str]:
    """Paths of the output head: the output embeddings, and whatever stands outside a transformers model's backbone."""
    heads: set[str] = set()
    find_head = cast("Callable[[], nn.Module | None] | None", getattr(model, "get_output_embeddings", None))
    head = find_head() if find_head is not None else None
    head = head.base if isinstance(head, Adapted) else head
    prefix = getattr(model, "base_model_prefix", "")
    inside = bool(prefix) and prefix in dict(model.named_children())
    for path, module in walk(model):
        if module is head or (inside and path and not (path == prefix or path.startswith(prefix + "."))):
            heads.add(path)
    return heads


def _compile(pattern: str, option: str) -> None:
    if wrong := mistake(pattern):
        raise LorakitError(
            f"attach: {option} was given as {pattern[:200]!r}, one string, which is read as a regular expression over whole "
            f"module names, and it is not one ({wrong}). A list of suffixes, or {', '.join(PRESETS)}, would work too."
        )


def describe_layers(model: nn.Module) -> str:
    """The endings of adaptable layers with their counts, for messages."""
    counts: Counter[str] = Counter()
    for path, module in walk(model):
        if path and _adaptable(module):
            counts[path.rpartition(".")[2]] += 1
    return ", ".join(f"{name} ×{count}" for name, count in counts.most_common(24)) or "none"


def _in_presets(module: nn.Module) -> bool:
    """Whether presets mean a layer: it multiplies by matrices, in a way that is known."""
    return any(
        isinstance(getattr(site.layout, "inner", site.layout), Linear) and not site.named_only
        for site in adaptable_sites(module)
    )


def _adaptable(module: nn.Module) -> bool:
    return bool(adaptable_sites(module))


def select(model: nn.Module, targets: Targets) -> list[str]:
    """The paths of the layers to adapt, in the model's order; LorakitError where anything asked matches nothing."""
    modules = [(path, module) for path, module in walk(model) if path]
    chosen = _chosen(model, modules, targets)
    chosen = _without_excluded(chosen, targets)
    if targets.layers is not None:
        chosen = _in_blocks(chosen, targets)
    saved = select_saved(model, targets)
    chosen = [path for path in chosen if not any(path == name or path.startswith(name + ".") for name in saved)]
    if not chosen and targets.target_modules:
        raise LorakitError(
            f"attach: target_modules={targets.target_modules!r} leaves no layer after exclude_modules, layers and "
            f"modules_to_save. Layers here: {describe_layers(model)}."
        )
    for option, pattern in unmatched(targets, chosen, dict(modules)):
        _idle(
            f"attach: {option}_pattern has the pattern {pattern!r}, which matches none of the {len(chosen)} adapted layers "
            f"(the first is {chosen[0] if chosen else '-'}). A pattern matches the end of a layer's name."
        )
    for suffix in targets.parts:
        if not any(has_suffix(path, suffix) for path in chosen):
            raise LorakitError(f"attach: parts names {suffix!r}, which is none of the adapted layers.")
    return chosen


def unmatched(targets: Targets, chosen: Sequence[str], modules: Mapping[str, nn.Module]) -> list[tuple[str, str]]:
    """`(option, pattern)` of the patterns that match none of the chosen layers."""
    if not targets.patterns:
        return []
    sites = [name for path in chosen for name in _site_names(path, modules[path])]
    names = [*chosen, *_part_names(chosen, targets.parts), *sites]
    found = []
    for option, patterns in targets.patterns.items():
        for pattern in patterns:
            _compile(pattern, f"{option}_pattern")
            if not any(value_for({pattern: 1}, name) for name in names):
                found.append((option, pattern))
    return found


def asked_sites(path: str, sites: list[Site], targets: Targets) -> list[Site]:
    """The matrices of a chosen layer that are meant: all, or those of the parameters or experts that are named
    (experts.down_proj, experts.down_proj.3)."""
    wanted = targets.target_modules
    if wanted in PRESETS or not any(isinstance(site.layout, Expert | Bare) for site in sites) or _names(wanted, path):
        return sites
    return [site for site in sites if any(_names(wanted, name) for name in _own_names(path, site))] or sites


def _own_names(path: str, site: Site) -> dict[str, None]:
    """The names of a matrix that its module multiplies by itself: its parameter's, and its own."""
    return dict.fromkeys((f"{path}.{site.weight}", site.place(path)))


def _names(wanted: str | tuple[str, ...], path: str) -> bool:
    """Whether a request by names or by one expression means a path."""
    if isinstance(wanted, str):
        return matches(wanted, path)
    return any(has_suffix(path, suffix) for suffix in wanted)


def _stacks(modules: list[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module, str]]:
    """(path of its module, module, own path) of every parameter, and every expert, that a module multiplies by itself."""
    return [
        (path, module, name)
        for path, module in modules
        for name in dict.fromkeys(name for site in stacked_sites(module) for name in _own_names(path, site))
    ]


def _site_names(path: str, module: nn.Module) -> list[str]:
    """The names under which patterns give values of their own to each matrix of a layer that has several, to experts and to
    stacks of them."""
    own = [site.place(path) for site in adaptable_sites(module)]
    return list(dict.fromkeys([*own, *(name for site in stacked_sites(module) for name in _own_names(path, site))]))


def _part_names(paths: Sequence[str], parts: Parts) -> list[str]:
    """The names that parts of fused layers have, under which patterns give them ranks of their own."""
    return [
        f"{path}.{part}" for layer, own in parts.items() for path in paths if has_suffix(path, layer) for part in own
    ]


def _chosen(model: nn.Module, modules: list[tuple[str, nn.Module]], targets: Targets) -> list[str]:
    wanted = targets.target_modules
    if wanted in PRESETS:
        heads = head_paths(model)
        paths = []
        for path, module in modules:
            if _in_presets(module) and path not in heads and PRESETS[cast(str, wanted)](path):
                paths.append(path)
        if not paths:
            raise LorakitError(
                f'attach: target_modules="{wanted}" found no such linear layer in {type(model).__name__}. Layers here: '
                f"{describe_layers(model)}."
            )
        return paths
    if isinstance(wanted, str):
        _compile(wanted, "target_modules")
        chosen = {path for path, module in modules if matches(wanted, path) and _adaptable(module)}
        chosen |= {path for path, _, own in _stacks(modules) if matches(wanted, own)}
        paths = [path for path, _ in modules if path in chosen]
        if not paths:
            for path, reason in left_out(model, wanted).items():
                raise LorakitError(f'attach: the regular expression "{wanted}" matches {path}: {reason}')
            raise LorakitError(
                f'attach: the regular expression "{wanted}" matches no layer\'s whole name (for example '
                f"{next((path for path, module in modules if _adaptable(module)), '-')}). Layers here end in: "
                f"{describe_layers(model)}. For a single suffix give a list: [{wanted!r}]."
            )
        return paths
    paths, stacks = [], _stacks(modules)
    for suffix in wanted:
        matching = [(path, module) for path, module in modules if has_suffix(path, suffix)]
        matching += [(path, module) for path, module, own in stacks if has_suffix(own, suffix)]
        if not matching:
            raise LorakitError(f'attach: no layer matches "{suffix}". Layers here end in: {describe_layers(model)}.')
        for path, module in matching:
            if reason := refusal(module):
                raise LorakitError(f'attach: "{suffix}" matches {path}: {reason}')
            if not sites_of(module):
                raise LorakitError(
                    f'attach: "{suffix}" matches {path}, a {type(module).__name__}, which has no matrix to adapt. To train '
                    f"it whole, name it in modules_to_save. Layers here end in: {describe_layers(model)}."
                )
            paths.append(path)
    order = {path: index for index, (path, _) in enumerate(modules)}
    return sorted(dict.fromkeys(paths), key=order.__getitem__)


def left_out(model: nn.Module, pattern: str) -> dict[str, str]:
    """The layers whose names a regular expression matches and whose matrices nothing can be added to -> why not."""
    _compile(pattern, "target_modules")
    return {path: reason for path, module in walk(model) if matches(pattern, path) and (reason := refusal(module))}


def _idle(words: str) -> None:
    """LorakitError of something that was asked for and has no effect; a warning where options are PEFT's, which takes it."""
    if not is_lenient():
        raise LorakitError(words)
    log.warning("%s", words)


def _without_excluded(paths: list[str], targets: Targets) -> list[str]:
    excluded = targets.exclude_modules
    if not excluded:
        return paths
    if isinstance(excluded, str):
        _compile(excluded, "exclude_modules")
        left = [path for path in paths if not matches(excluded, path)]
        if len(left) == len(paths):
            _idle(f'attach: the expression exclude_modules="{excluded}" matches none of the targeted layers.')
        return left
    for suffix in excluded:
        if not any(has_suffix(path, suffix) for path in paths):
            _idle(
                f'attach: exclude_modules names "{suffix}", which is none of the {len(paths)} targeted layers; their names '
                f"end in {', '.join(sorted({path.rpartition('.')[2] for path in paths}))}."
            )
    return [path for path in paths if not any(has_suffix(path, suffix) for suffix in excluded)]


def _in_blocks(paths: list[str], targets: Targets) -> list[str]:
    assert targets.layers is not None
    numbers = {path: block_of(path, targets.layers_pattern) for path in paths}
    present = sorted({number for number in numbers.values() if number is not None})
    missing = [number for number in targets.layers if number not in present]
    if missing:
        span = f"blocks {present[0]} to {present[-1]}" if present else "no numbered block"
        raise LorakitError(f"attach: layers names block {missing[0]}, but the targeted layers stand in {span}.")
    return [path for path in paths if numbers[path] in targets.layers]


def trained_whole(model: nn.Module, targets: Targets) -> Targets:
    """The request with the modules that it targets as modules_to_save; a preset means all norms."""
    wanted, modules = targets.target_modules, {path: module for path, module in walk(model) if path}
    able = [path for path, module in modules.items() if any(True for _ in module.parameters())]
    if wanted in PRESETS:
        chosen = [path for path in able if "norm" in type(modules[path]).__name__.lower()]
    else:
        for suffix in () if isinstance(wanted, str) else wanted:
            if not any(has_suffix(path, suffix) for path in able):
                raise LorakitError(f'attach: no module with parameters matches "{suffix}".')
        chosen = [path for path in able if _names(wanted, path)]
    chosen = _without_excluded(chosen, targets)
    chosen = chosen if targets.layers is None else _in_blocks(chosen, targets)
    if not chosen:
        raise LorakitError(
            f"attach: target_modules={targets.target_modules!r} leaves no module to train; those with parameters end in "
            f"{', '.join(sorted({path.rpartition('.')[2] for path in able})[:40])}."
        )
    return dataclasses.replace(
        targets,
        target_modules=(),
        exclude_modules=None,
        layers=None,
        modules_to_save=(*chosen, *targets.modules_to_save),
    )


def select_saved(model: nn.Module, targets: Targets) -> list[str]:
    """The paths of the modules that are trained whole."""
    paths: list[str] = []
    everything = [(path, module) for path, module in walk(model) if path]
    for suffix in targets.modules_to_save:
        matching = [
            path for path, module in everything if has_suffix(path, suffix) and any(True for _ in module.parameters())
        ]
        if not matching:
            children = sorted(
                {path.rpartition(".")[2] for path, _ in everything if not path.rpartition(".")[2].isdigit()}
            )
            raise LorakitError(
                f'attach: modules_to_save names "{suffix}", but no module of that name has parameters. Modules end in: '
                f"{', '.join(children[:40])}."
            )
        paths += matching
    return list(dict.fromkeys(paths))


def select_tokens(model: nn.Module, targets: Targets) -> dict[str, tuple[int, ...]]:
    """The path of every table of which some rows train alone -> which rows."""
    found: dict[str, tuple[int, ...]] = {}
    for suffix, tokens in targets.trainable_tokens.items():
        paths = [path for path, module in walk(model) if path and has_suffix(path, suffix) and _adaptable(module)]
        if not paths:
            raise LorakitError(
                f'attach: trainable_tokens names "{suffix}", and no layer of that name has rows. Layers here end in: '
                f"{describe_layers(model)}."
            )
        found |= dict.fromkeys(paths, tokens)
    return {path: found[path] for path, _ in walk(model) if path in found}  # in the model's order, whatever a file's is


def input_embedding(model: nn.Module) -> str:
    """The path of the table that a model looks its input tokens up in, as transformers' models tell."""
    find = cast("Callable[[], nn.Module | None] | None", getattr(model, "get_input_embeddings", None))
    table = find() if find is not None else None
    table = table.base if isinstance(table, Adapted) else table
    path = next((path for path, module in walk(model) if table is not None and module is table), None)
    if path is None:
        raise LorakitError(
            f"attach: {type(model).__name__} does not say which layer its input embedding is; name it: "
            'trainable_tokens={"embed_tokens": [...]}, or target_modules with lk.TrainableTokens.'
        )
    return path
