"""Saving an adapter as a folder, and putting one from a folder on a model, whole or not at all.

The format is PEFT's (`interchange.py`), in a folder that is replaced in one step (`folder.py`), with lorakit.json beside
PEFT's two files (`bundle.py`); `filling.py` puts the tensors in. Nothing passes in silence: a tensor that no layer takes, a
layer that finds no tensor, an option that cannot be honoured, another base model, each is an error with a name in it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from lorakit.adapter.adapter import Adapter, adapters
from lorakit.adapter.attachment import detach
from lorakit.adapter.construction import build, build_edits
from lorakit.adapter.targets import Targets, select, unmatched
from lorakit.core.injection import ties
from lorakit.core.layout import Stored
from lorakit.core.stacks import stacked_sites
from lorakit.core.state import state_of
from lorakit.core.using import activate
from lorakit.core.walking import exactly, has_suffix, value_for, walk
from lorakit.edits.contract import EditMethod
from lorakit.errors import LorakitError, advice
from lorakit.experts import MEMBERS, MixLoRA, RouterSpec
from lorakit.experts.attachment import build_router, over
from lorakit.files.bundle import (
    CONFIG,
    LABELS,
    OWN,
    TENSORS,
    Bundle,
    content_with,
    own_data,
    plain,
    read_bundle,
    read_config,
    read_own,
    read_tensors,
    write_bundle,
)
from lorakit.files.experts import read_stacks
from lorakit.files.filling import Complain, Same, Supply, fill, fill_replacements
from lorakit.files.fingerprint import check, fingerprint
from lorakit.files.folder import replace_folder
from lorakit.files.formats import ending_of, format_of, known_entries, spec_from_peft
from lorakit.files.interchange import (
    COMMON,
    bare,
    config_of,
    names_in,
    plain_names,
    shifted,
    stored,
    targets_from,
    tensors_of,
    unwrapped,
)
from lorakit.files.packing import names_of, unpack
from lorakit.files.prompt import Prompt
from lorakit.files.renamed import nearest, under_todays_names
from lorakit.files.table import spec_from_dict
from lorakit.models.hub import read_name
from lorakit.models.replication import replication_of

log = logging.getLogger("lorakit")

# -- saving ------------------------------------------------------------------------------------------------------------------


def save(
    adapter: Adapter,
    folder: str | Path,
    base: str | None = None,
    record: Mapping[str, Any] | None = None,
    stored_weight: Callable[[str], Tensor] | None = None,
    prompt: Prompt | None = None,
) -> Path:
    """Write an adapter as a folder, in one step.

    Args:
        adapter: what to write.
        folder: where; an adapter that is there is replaced, other files stay.
        base: the base model's name for the file; by default the one transformers knows.
        record: anything to keep with it, such as how it was trained (plain data).
        stored_weight: gives a base tensor by its name, where the model is on the meta device and holds none.
        prompt: the form in which the model is asked; by default the one that the adapter was loaded with.

    Raises:
        LorakitError: the adapter is on no model, the method has no file format, a tensor holds a NaN, or writing failed;
            the folder is as it was.
    """
    bundle = contents(adapter, folder, base, record, stored_weight)
    target = Path(folder).expanduser()
    if isinstance(adapter.method, RouterSpec):
        bundle.own["members"] = _save_members(adapter, target, base)
    prompt = prompt or adapter.prompt
    replace_folder(
        target,
        lambda fresh: write_bundle(fresh, bundle.config, bundle.tensors, bundle.own, prompt),
        content_with(prompt),
    )
    return target


def contents(
    adapter: Adapter,
    folder: str | Path,
    base: str | None = None,
    record: Mapping[str, Any] | None = None,
    stored_weight: Callable[[str], Tensor] | None = None,
    sampled: Mapping[str, Any] | None = None,
) -> Bundle:
    """What the files of an adapter hold that is about to be written, but for the members of a router.

    Args:
        adapter, folder, base, record, stored_weight: as for `save`.
        sampled: the fingerprint of the base, where it is known already.

    Raises:
        LorakitError: as `save`; nothing is written.
    """
    if adapters(adapter.model).get(adapter.name) is not adapter:
        raise LorakitError(
            f"save: adapter {adapter.name!r} has been taken off its model, and its tensors with it; save it before lk.detach "
            "or lk.merge."
        )
    tensors = tensors_of(adapter)
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise LorakitError(f"save: {key} holds a NaN or an infinity; {folder} is left as it was.")
    config = config_of(adapter, base)
    method, targets = stored(adapter)
    found = {
        "name": config["base_model_name_or_path"],
        "fingerprint": sampled or fingerprint(adapter, stored_weight),
        "quantization": _quantization(adapter.model),
    }
    own = own_data(method.to_dict(), targets.as_data(), found, record or {}, shifted(adapter))
    for value, name in ((config, CONFIG), (own, OWN)):
        plain(value, name)  # refused before anything is written
    _warn_of_own_forwards(adapter)
    return Bundle(Path(folder), config, own, tensors)


Adapter.writer = save


def _warn_of_own_forwards(adapter: Adapter) -> None:
    """PEFT goes by a layer's class, and so reads the file otherwise where the class computes something else."""
    kinds = {
        type(layer.base).__name__
        for layer in adapter.layers.values()
        if any(isinstance(site.layout, Stored) and site.named_only for site in layer.sites.values())
    }
    if kinds:
        log.warning(
            "save: %s: a class with a forward of its own. PEFT will add to its output what a plain layer makes of the "
            "change, which is another output; lorakit reads the folder rightly.",
            ", ".join(sorted(kinds)),
        )


def _quantization(model: nn.Module) -> dict[str, Any] | None:
    """How transformers was told to quantise the base, as plain data, so that the very base can be made again."""
    config = getattr(model, "config", None)
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    told = dict(found if isinstance(found, Mapping) else json.loads(found.to_json_string(use_diff=False)))
    return {**told, "dtype": str(getattr(config, "dtype", "auto")).removeprefix("torch.")}


def _save_members(adapter: Adapter, folder: Path, base: str | None) -> list[list[str]]:
    """Write the adapters behind a router into folders below its own; returns, in order, each one's name and what tells its
    tensors."""
    members = []
    for name in over(adapter).members:
        path = save(adapters(adapter.model)[name], folder / MEMBERS / name, base)
        members.append([name, read_own(path)["files"][TENSORS]])
    return members


def save_within(bundle: Bundle, adapter: Adapter, base: str | None = None, earlier: Path | None = None) -> None:
    """Write an adapter's files beside others into a folder that is not used yet (a checkpoint that is being made).

    Args:
        bundle: what `contents` gave.
        adapter: of which it is; the members of a router are written too.
        base: the base model's name for the file.
        earlier: an earlier folder of this router: its members, which nobody has changed, are linked instead of written.

    Raises:
        OSError: a file cannot be written.
    """
    own = bundle.own
    if isinstance(adapter.method, RouterSpec):
        known = read_own(earlier).get("members") if earlier is not None and (earlier / MEMBERS).is_dir() else None
        if known is not None and earlier is not None:
            shutil.copytree(earlier / MEMBERS, bundle.folder / MEMBERS, copy_function=_link)
        own = {**own, "members": known or _save_members(adapter, bundle.folder, base)}
    write_bundle(bundle.folder, bundle.config, bundle.tensors, own, adapter.prompt)


def _link(source: str, target: str) -> None:
    """A second name for a file, or a copy where the file system has none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


# -- loading -----------------------------------------------------------------------------------------------------------------


def load(
    model: nn.Module,
    folder: str | Path,
    name: str | None = None,
    strict: bool = True,
    trainable: bool = False,
    revision: str | None = None,
    active: bool = True,
) -> Adapter:
    """Put an adapter from a folder (lorakit's or PEFT's) on a model; it acts from then on, instead of what acted before.

    Args:
        model: the base model.
        folder: an adapter folder; or, where there is no such folder, a name on the model hub ("user/name").
        name: its name on this model; the folder's name by default.
        strict: refuse another base model, tensors that no layer takes, layers without tensors, unknown options. False
            is said aloud: each is logged instead.
        trainable: leave its tensors trainable.
        revision: of a hub name, the branch, tag or commit.
        active: let it act. With False what acts stays as it is (nothing, on a model without adapters).

    Raises:
        LorakitError: it cannot be read or does not fit; the model is as before then.
    """
    complain = _complaints(strict)
    bundle = read_bundle(folder, revision, prompted=True)
    if bundle.stale:
        complain(bundle.stale)
        bundle = dataclasses.replace(bundle, own={})
    if not bundle.own:
        bundle = dataclasses.replace(bundle, config=_decided(bundle.config, bundle.tensors))
    place = Path(folder).expanduser()
    named = read_name(str(folder)) if not place.exists() else None
    name = name or re.sub(r"[./]", "-", place.absolute().name if named is None else named.name)
    before = set(adapters(model))
    if name in before:
        raise LorakitError(f"load: an adapter {name!r} is on this model already; give another name=.")
    try:
        if bundle.own.get("members"):
            adapter = _put_router(model, bundle, name, strict)
        else:
            adapter = _put(model, bundle, name, complain)
    except BaseException:
        for added in [one for one in reversed(adapters(model)) if one not in before]:
            detach(model, added)
        raise
    adapter.prompt = bundle.prompt
    adapter.requires_grad_(trainable)
    if active:
        _activate(model, name)
    else:
        state_of(model).decided = True
    return adapter


def _activate(model: nn.Module, name: str) -> None:
    state = state_of(model)
    before = [one for one in state.routing.names if one != name]
    if before:
        log.info("load: %s acts now instead of %s; lk.use and lk.activate choose.", name, ", ".join(before))
    activate(model, name)


def kind_of(bundle: Bundle) -> Literal["delta", "edit", "mixture"]:
    """What a folder holds, by its configuration: changes of weights, something around a model's calls, or experts that are
    weighed by token. LorakitError where that is nothing that lorakit reads."""
    if bundle.own.get("members"):
        return "mixture"
    method = _method(bundle, lambda message: None)
    return "edit" if isinstance(method, EditMethod) else "mixture" if isinstance(method, MixLoRA) else "delta"


def frame(bundle: Bundle) -> str:
    """What decides how a folder's adapter is built, as text: two folders of one frame differ in numbers only."""
    own = {
        key: value for key, value in bundle.own.items() if key not in ("record", "files", "lorakit_version", "prompt")
    }
    config = {key: value for key, value in bundle.config.items() if key not in LABELS}
    shapes = {key: [str(tensor.dtype), *tensor.shape] for key, tensor in bundle.tensors.items()}
    return json.dumps([own, config, shapes], sort_keys=True, default=str)


Places = Sequence[tuple[Tensor, str]]
"""Where each tensor of a file goes in an adapter that was built for it: (tensor of the adapter, name in the file)."""


def refill(adapter: Adapter, bundle: Bundle, places: Places | None = None) -> Places | None:
    """Put the numbers of a folder into an adapter that was loaded from another folder of the same `frame`, which is many times
    as fast as building it anew. Whether lorakit.json belongs to these tensors (`bundle.stale`, which waits for their digest) is
    left to the caller, who has other things to do meanwhile.

    Args:
        adapter: what to fill.
        bundle: the folder.
        places: what an earlier call gave for this adapter and a folder of this frame: nothing is looked up again then.

    Returns:
        Where every tensor went; None where the file's tensors are not copied whole, one to each.

    Raises:
        LorakitError: a tensor does not fit or is not finite; the adapter then holds a mixture and must be filled again.
    """
    where = bundle.folder / TENSORS
    if places is None:
        plain = plain_names(adapter.model)
        tensors = _for_filling(adapter, bundle, plain)
        places = _places(fill(adapter, tensors, plain, bundle.folder, _complaints(strict=True)), bundle)
    else:
        supply = Supply(bundle.tensors, where)
        for target, key in places:
            supply.put(target, supply.take(key), key)
    return places


def _for_filling(adapter: Adapter, bundle: Bundle, plain: Mapping[str, str]) -> Mapping[str, Tensor]:
    """The tensors of a folder under the names by which an adapter of its frame is filled."""
    named, config = names_in(bundle.tensors, plain, bundle.folder / TENSORS), bundle.config
    if not bundle.own:
        named, config = under_todays_names(named, config, adapter.model, plain)
    if any(layer.stack is not None for layer in adapter.layers.values()):
        named = read_stacks(named, config, adapter.model, plain, _own_targets(bundle)).tensors
    return _described(adapter.method, named, bundle)


def kept_in(adapter: Adapter, bundle: Bundle) -> list[tuple[Tensor, Tensor]]:
    """The tensors of an adapter, or parts of them, that its file holds to the bit: (tensor of the adapter, the same in the
    file), each a view of the whole one. What a file holds in another form (folded, scaled, of masked ranks) is not among them.
    """
    if adapter.edits:
        held = {tensor.data_ptr(): tensor for tensor in bundle.tensors.values()}
        own = [tensor for tensor in adapter.state_dict().values() if tensor.is_contiguous()]
        there = [(tensor, held[tensor.data_ptr()]) for tensor in own if tensor.data_ptr() in held]
        return [(one, other.view(one.shape)) for one, other in there if one.numel() == other.numel()]
    plain, supply = plain_names(adapter.model), Same(bundle.tensors, bundle.folder / TENSORS)
    try:
        fill(adapter, _for_filling(adapter, bundle, plain), plain, bundle.folder, log.debug, supply)
    except LorakitError as problem:  # as a method that is written as another one
        log.debug("checkpoint: %s", problem)
    return supply.copies


def _places(copies: Sequence[tuple[Tensor, Tensor]], bundle: Bundle) -> Places | None:
    names = {(tensor.data_ptr(), tensor.shape, tensor.stride()): key for key, tensor in bundle.tensors.items()}
    found = [(target, names.get((value.data_ptr(), value.shape, value.stride()))) for target, value in copies]
    places = [(target, key) for target, key in found if key is not None]
    one_each = len(places) == len(copies) == len(bundle.tensors) == len({key for _, key in places})
    return places if one_each else None


def _put(model: nn.Module, bundle: Bundle, name: str, complain: Complain) -> Adapter:
    """An adapter of deltas or edits from a folder, on the model."""
    spans, present = bundle.config.get("layer_replication"), replication_of(unwrapped(model))
    if spans and present != [list(span) for span in spans]:
        raise LorakitError(
            f"load: {bundle.folder} is for a model whose layers are replicated by {spans}, and this one's are "
            f"{present or 'as they were'}; lk.replicate_layers(model, {spans}) makes it that one, before loading."
        )
    plain = plain_names(model)
    tensors = names_in(bundle.tensors, plain, bundle.folder / TENSORS)
    if not bundle.own:
        tensors, renamed = under_todays_names(tensors, bundle.config, model, plain)
        bundle = dataclasses.replace(bundle, config=renamed)
    experts = read_stacks(tensors, bundle.config, model, plain, _own_targets(bundle))
    tensors, bundle = experts.tensors, dataclasses.replace(bundle, config=experts.config)
    method = _method(bundle, complain)
    if isinstance(method, EditMethod):
        return _put_edits(model, method, bundle, tensors, name, plain, complain)
    unpooled = _unpooled(tensors, bundle.config, {plain[path]: module for path, module in walk(model)})
    named = _described(method, unpooled, bundle)
    config = {**bundle.config, **format_of(method.name).patterns(bundle.config)}
    targets = _targets(bundle, config, model, method.pattern_fields, named)
    if method.whole:
        adapter = build(model, method, targets, name, checked=False)
        _check_base(adapter, bundle, complain)
        fill(adapter, named, plain, bundle.folder, complain)
        return adapter
    found = _layers_in(named, plain, method, bundle.folder, model)
    if not found and not format_of(method.name).apart:
        found = select(model, targets)
    targets = _of_use(targets, found, model)
    halves = bool(bundle.own.get("shifted"))  # what is trained, and the start that is taken off it
    _check_targets(model, config, method.pattern_fields, [plain[path] for path in found], complain)
    adapter = build(
        model,
        method,
        _resolved(targets, found, plain, experts.parameters),
        name,
        checked=False,
        paths=found,
        shifted=halves,
    )
    adapter.targets = targets
    _check_base(adapter, bundle, complain)
    fill(adapter, named, plain, bundle.folder, complain)
    return adapter


def _put_edits(
    model: nn.Module,
    method: EditMethod,
    bundle: Bundle,
    tensors: Mapping[str, Tensor],
    name: str,
    plain: Mapping[str, str],
    complain: Complain,
) -> Adapter:
    targets = _targets(bundle, bundle.config, model, {}, tensors)
    adapter = build_edits(model, method, targets, name, folded=True)
    _check_base(adapter, bundle, complain)
    if not bundle.own:
        format_of(method.name).check(adapter.anatomy)
    paths = [plain[place.path] for place in adapter.edits]
    supply = Supply(_described(method, tensors, bundle, paths), bundle.folder / TENSORS)
    for place, edit in adapter.edits.items():
        for letter, (name, axes) in names_of(edit).items():
            key = f"{plain[place.path]}.{name}" if place.path else name
            supply.put(edit.get_parameter(letter), unpack(None, supply.take(key), axes), key)
    fill_replacements(adapter, plain, supply)
    supply.finish(complain)
    return adapter


def _put_router(model: nn.Module, bundle: Bundle, name: str, strict: bool) -> Adapter:
    """A router with the adapters behind it; those that are on the model already must be the same."""
    complain = _complaints(strict)
    spec = _method(bundle, complain)
    before = set(adapters(model))
    for member, digest in bundle.own["members"]:
        folder = bundle.folder / MEMBERS / member
        if read_own(folder).get("files", {}).get(TENSORS) != digest:
            complain(f"load: {folder} is not the adapter that the router in {bundle.folder} was saved with.")
        if member not in before:
            load(model, folder, name=member, strict=strict, active=False)
        elif not _holds(adapters(model)[member], read_tensors(folder)):
            raise LorakitError(
                f"load: the router in {bundle.folder} routes an adapter {member!r}, and another one of that name is on "
                f"this model; lk.detach(model, {member!r}) first."
            )
    adapter = build_router(model, cast(RouterSpec, spec), [member for member, _ in bundle.own["members"]], name)
    plain = plain_names(model)
    fill(adapter, names_in(bundle.tensors, plain, bundle.folder / TENSORS), plain, bundle.folder, complain)
    return adapter


def _holds(adapter: Adapter, tensors: Mapping[str, Tensor]) -> bool:
    """Whether an adapter is the one of a file, to the bit."""
    own = tensors_of(adapter)
    return own.keys() == tensors.keys() and all(torch.equal(own[key].cpu(), tensors[key]) for key in own)


def _complaints(strict: bool) -> Complain:
    def complain(message: str) -> None:
        if strict:
            raise LorakitError(f"{message}{advice(' strict=False loads it anyway.', '')}")
        log.warning("%s", message)

    return complain


_TUCKER = re.compile(r"\.(hada_t[12]|lokr_t2)$")


def _kept_triplets(key: str, tensors: Mapping[str, Tensor]) -> int:
    (out, trained), in_ = tensors[key].shape, tensors[key.replace("U_low", "V_low")].shape[1]
    return min(out, in_) - trained


_COUNTS: dict[tuple[re.Pattern[str], str], Callable[[str, Mapping[str, Tensor]], int]] = {
    # PEFT passes the pattern over for Conv1D, and the rank scales nothing
    (re.compile(r"(.+)\.hira_(?:embedding_)?A"), "rank_pattern"): lambda key, tensors: len(tensors[key]),
    # PEFT spreads the numbers over layers by their size (proportional_parameters)
    (re.compile(r"(.+)\.waveft_spectrum"), "n_frequency_pattern"): lambda key, tensors: len(tensors[key]),
    # a share of each matrix, by patterns that PEFT searches for anywhere in a name
    (re.compile(r"(.+)\.osf_svd_params\.U_low"), "rank_pattern"): _kept_triplets,
}
"""Names of tensors and the pattern that they decide -> the value of their layer."""


def _decided(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """PEFT's configuration with what the tensors decide: some entries say what was asked for, and not what PEFT made of it."""
    decided = dict(config)
    if decided.get("use_effective_conv2d") and not any(map(_TUCKER.search, tensors)):
        decided["use_effective_conv2d"] = False  # no convolution with a kernel was adapted
    turned = [tensor for key, tensor in tensors.items() if key.endswith(".boft_R")]
    if turned and "boft_n_butterfly_factor" in decided:
        decided["boft_n_butterfly_factor"] = turned[0].shape[0]  # PEFT takes 1 where its kernel does not compile
    for (pattern, field), count in _COUNTS.items():
        own = {exactly(bare(found[1])): count(key, tensors) for key in tensors if (found := pattern.fullmatch(key))}
        if own:
            decided[field] = own
    return decided


def _unpooled(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], modules: Mapping[str, nn.Module]
) -> Mapping[str, Tensor]:
    """A QA-LoRA, whose A reads the means of groups of inputs times the number of groups, as the LoRA that it is: each column of
    A stands for all inputs of its group."""
    result, group = dict(tensors), int(config.get("qalora_group_size") or 1)
    for key, A in tensors.items() if config.get("use_qalora") else ():
        width = getattr(modules.get(key.removesuffix(".lora_A.weight")), "in_features", None)
        if key.endswith(".lora_A.weight") and group > 1 and width == A.shape[1] * group:
            result[key] = A.repeat_interleave(group, dim=1) * (A.shape[1] / group)
    return result


def _method(bundle: Bundle, complain: Complain) -> Any:
    if bundle.own:
        return spec_from_dict(bundle.own["method"], str(bundle.folder / OWN))
    read = spec_from_peft(bundle.config)
    known = COMMON | known_entries(read)
    for key, value in bundle.config.items():
        if key not in known and value not in (None, False, {}, [], ""):
            complain(
                f"load: {bundle.folder / CONFIG} sets {key}={value!r}, which lorakit does not know for "
                f"{read.name}, so the adapter might act otherwise than its author saw."
            )
    return read


def _described(
    method: Any, tensors: Mapping[str, Tensor], bundle: Bundle, paths: Sequence[str] = ()
) -> Mapping[str, Tensor]:
    """The file's tensors under the names that `formats` has for this method; `paths` are those of an edit's places."""
    return format_of(method.name).from_file(method, tensors, bundle.config, paths)


def _targets(
    bundle: Bundle, config: Mapping[str, Any], model: nn.Module, fields: Mapping[str, str], tensors: Iterable[str]
) -> Targets:
    """What was asked for when the adapter was made, as lorakit.json says it, or else PEFT's configuration."""
    return _own_targets(bundle) or targets_from(config, model, fields, tensors)


def _own_targets(bundle: Bundle) -> Targets | None:
    """What lorakit.json says was asked for; None where there is none."""
    return Targets.from_data(bundle.own["targets"], bundle.folder / OWN) if bundle.own else None


def _layers_in(
    tensors: Iterable[str], plain: Mapping[str, str], method: Any, folder: Path, model: nn.Module
) -> list[str]:
    """The model's layers for which the file holds this method's tensors, in the model's order."""
    names = re.compile(rf"(.+?)\.(?:{ending_of(method)})")
    known = set(plain.values())
    inside = {site.place(plain[path]): plain[path] for path, module in walk(model) for site in stacked_sites(module)}
    found: dict[str, str] = {}
    lost: dict[str, str] = {}
    for key in tensors:
        match = names.fullmatch(key)
        if match is None:
            continue
        layer = inside.get(match[1], match[1])
        if layer not in known:
            layer = layer.partition(".base_layer.")[0]  # a matrix within nn.MultiheadAttention
        (found if layer in known else lost).setdefault(layer, key)
    if lost:
        raise LorakitError(
            f"load: {folder / TENSORS} holds {next(iter(lost.values()))!r}, and this model has no layer of that name"
            f"{f' (nor {len(lost) - 1} others)' if len(lost) > 1 else ''}. It was made for another architecture, or saved "
            f"under another prefix.{nearest(plain.values(), list(lost))}"
        )
    return [path for path, name in plain.items() if name in found]


def _of_use(targets: Targets, paths: list[str], model: nn.Module) -> Targets:
    """The request without patterns that match no layer of the file, which PEFT passes over; a warning names them."""
    idle = set(unmatched(targets, paths, dict(walk(model))))
    for option, pattern in sorted(idle):
        log.warning("load: %s_pattern has the pattern %r, which matches no layer of the file.", option, pattern)
    kept = {
        option: {pattern: value for pattern, value in own.items() if (option, pattern) not in idle}
        for option, own in targets.patterns.items()
    }
    return dataclasses.replace(targets, patterns=kept)


def _resolved(
    targets: Targets, paths: list[str], plain: Mapping[str, str], parameters: Mapping[str, Sequence[str]]
) -> Targets:
    """The request for exactly these layers. On a wrapped model the file's names are turned into the model's."""
    asked = [f"{path}.{one}" for path in paths for one in parameters.get(plain[path], ())]
    whole = [path for path in paths if plain[path] not in parameters]
    resolved = dataclasses.replace(targets, target_modules=(*whole, *asked))
    if all(path == name for path, name in plain.items()):
        return resolved
    actual = {name: path for path, name in plain.items()}
    exact: dict[str, Any] = {}
    for option, patterns in targets.patterns.items():
        values = {path: value_for(patterns, plain[path]) for path in paths}
        exact[option] = {exactly(path): value for path, value in values.items() if value is not None}
    saved = tuple(actual.get(name, name) for name in targets.modules_to_save)
    tokens = {actual.get(name, name): rows for name, rows in targets.trainable_tokens.items()}
    return dataclasses.replace(resolved, modules_to_save=saved, patterns=exact, trainable_tokens=tokens)


def _check_targets(
    model: nn.Module, config: Mapping[str, Any], fields: Mapping[str, str], found: list[str], complain: Complain
) -> None:
    """The layers that the configuration selects and those that the file has tensors for must be the same."""
    model = unwrapped(model)
    targets = targets_from(config, model, fields)
    if not targets.target_modules or any(path != name for path, name in plain_names(model).items()):
        return
    try:
        selected = select(model, dataclasses.replace(targets, exclude_modules=None, patterns={}))
        if targets.exclude_modules:
            with contextlib.suppress(LorakitError):  # an exclusion of nothing
                selected = select(model, dataclasses.replace(targets, patterns={}))
    except LorakitError as problem:
        complain(f"load: the configuration does not fit this model: {problem}")
        return
    modules = dict(walk(model))
    missing = [path for path in selected if path not in set(found) and not _passed_over(path, modules[path], config)]
    if missing:
        complain(
            f"load: the configuration targets {missing[0]} ({len(missing)} such layers), for which the file holds no "
            "tensors."
        )
    shared = ties(modules)  # a head follows the embedding that it is tied to, unasked
    extra = [path for path in found if set(selected).isdisjoint((path, *shared.get(path, ())))]
    if extra:
        complain(
            f"load: the file holds tensors for {extra[0]} ({len(extra)} such layers), which its configuration does not "
            "target, so that PEFT would leave them out."
        )


def _passed_over(path: str, module: nn.Module, config: Mapping[str, Any]) -> bool:
    """Whether PEFT takes a name for something else than this layer: its target_modules never mean a parameter, nor its
    target_parameters a layer, though both may be called down_proj (in experts, and in a shared expert beside them)."""
    parameters, asked = config.get("target_parameters") or (), config.get("target_modules") or ()
    held = [f"{path}.{name}" for name, _ in module.named_parameters()]
    if any(has_suffix(name, one) for name in held for one in parameters):
        return False
    named = isinstance(asked, str) or any(has_suffix(path, one) for one in asked)
    return bool(stacked_sites(module)) or (not named and any(has_suffix(path, one) for one in parameters))


def _check_base(adapter: Adapter, bundle: Bundle, complain: Complain) -> None:
    """The base must be the one that the adapter was made for: by its fingerprint. PEFT's files name their base and say no
    more; a different name is worth a word, though paths may differ. A model on the meta device has no weights to compare."""
    if any(parameter.is_meta for parameter in adapter.model.parameters()):
        return
    if bundle.own:
        check(adapter, bundle.own["base"].get("fingerprint"), bundle.folder, complain)
        return
    theirs, ours = bundle.config.get("base_model_name_or_path"), getattr(adapter.model, "name_or_path", None)
    if theirs and ours and Path(str(theirs)).name != Path(str(ours)).name:
        log.warning(
            "load: %s was made for %s, and this model is %s. The file holds no fingerprint by which to tell whether they "
            "are the same.",
            bundle.folder,
            theirs,
            ours,
        )


__all__ = [
    "CONFIG",
    "OWN",
    "TENSORS",
    "load",
    "read_config",
    "read_own",
    "read_tensors",
    "save",
]
