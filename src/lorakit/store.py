"""One folder per adapter, in PEFT's format, read and written whole or not at all.

    adapter_config.json         PEFT's configuration
    adapter_model.safetensors   PEFT's tensors under PEFT's names and shapes
    lorakit.json                what PEFT has no place for: the exact spec, the base's fingerprint, the training record

PEFT, vLLM and their kin ignore lorakit.json; a folder without it (PEFT wrote it) reads as well. No pickle is ever read.
Nothing passes in silence: a tensor that no layer takes, a layer that finds no tensor, an option that cannot be honoured,
another base model, each is an error with a name in it.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import logging
import os
import re
import secrets
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lorakit.adapter import Adapter, activate, adapters, board_of, build, detach
from lorakit.delta import Delta, LowRank, Method
from lorakit.errors import LorakitError
from lorakit.fingerprint import check, fingerprint
from lorakit.layer import Replacement
from lorakit.layout import Rows, Site
from lorakit.methods import method_for_peft, method_named, spec_from_dict
from lorakit.targets import PRESETS, Targets, has_suffix, select, walk

log = logging.getLogger("lorakit")

CONFIG, TENSORS, OWN = "adapter_config.json", "adapter_model.safetensors", "lorakit.json"
FORMAT = 1
_PREFIX = "base_model.model."


# -- folders that are replaced whole ---------------------------------------------------------------------------------------


def _exchange(first: Path, second: Path) -> bool:
    """Swap two folders in one step where the system can (Linux renameat2, macOS renamex_np); False where it cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    if sys.platform == "linux" and hasattr(libc, "renameat2"):
        at_cwd, exchange = -100, 2
        return bool(libc.renameat2(at_cwd, os.fsencode(first), at_cwd, os.fsencode(second), exchange) == 0)
    if sys.platform == "darwin" and hasattr(libc, "renamex_np"):
        return bool(libc.renamex_np(os.fsencode(first), os.fsencode(second), 2) == 0)
    return False


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def recover(folder: Path) -> None:
    """Finish what a killed save left beside a folder: bring back its files, remove what is half-written."""
    for left in folder.parent.glob(f".{folder.name}.saving-*"):
        if folder.exists():
            _bring_over(left, folder)
            shutil.rmtree(left, ignore_errors=True)
    for previous in folder.parent.glob(f".{folder.name}.previous-*"):
        if folder.exists():
            _bring_over(previous, folder)
            shutil.rmtree(previous, ignore_errors=True)
        else:
            previous.rename(folder)


def _bring_over(source: Path, target: Path) -> None:
    """Move what is not part of an adapter (a card, metrics, checkpoints) unless the target has it."""
    for entry in source.iterdir():
        if entry.name not in (CONFIG, TENSORS, OWN) and not (target / entry.name).exists():
            entry.rename(target / entry.name)


def replace_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a fresh folder, then put it in place of `folder` in one step.

    A process killed at any moment leaves the old folder or the new one, whole. Files that are not part of an adapter
    are carried over.
    """
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.exists() and not folder.is_dir():
        raise LorakitError(f"save: {folder} exists and is a file; an adapter is a folder.")
    recover(folder)
    token = secrets.token_hex(4)
    fresh = folder.with_name(f".{folder.name}.saving-{token}")
    fresh.mkdir()
    try:
        write(fresh)
        for entry in fresh.iterdir():
            _flush(entry)
        _flush(fresh)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    if not folder.exists():
        fresh.rename(folder)
    elif _exchange(fresh, folder):
        _bring_over(fresh, folder)
        shutil.rmtree(fresh, ignore_errors=True)
    else:
        previous = folder.with_name(f".{folder.name}.previous-{token}")
        folder.rename(previous)
        fresh.rename(folder)
        _bring_over(previous, folder)
        shutil.rmtree(previous, ignore_errors=True)
    _flush(folder.parent)


# -- tensors ---------------------------------------------------------------------------------------------------------------


def _site_prefix(site: Site) -> str:
    """Where PEFT puts a site's tensors below its layer."""
    if site.name in ("", "in_proj"):
        return ""
    return f"base_layer.{site.name}." if site.layout.kind == "attention" else f"{site.name}."


def _site_tensors(site: Site, delta: Delta) -> dict[str, Tensor]:
    """PEFT's names below the layer -> tensors, for one matrix."""
    return {
        _site_prefix(site) + key: site.layout.pack(torch.cat(view.tensors, dim=view.dim), view.axes).contiguous()
        if len(view.tensors) > 1
        else site.layout.pack(view.tensors[0], view.axes).contiguous()
        for key, view in delta.peft_views(site.layout.kind).items()
    }


def _fused(parts: list[tuple[Site, LowRank]]) -> tuple[Tensor, Tensor]:
    """The parts of a fused layer as one pair of factors: A stacked, B block by block. Exact, at the sum of the ranks."""
    rank = sum(delta.factors()[1].shape[0] for _, delta in parts)
    _, A = parts[0][1].factors()
    inner = cast(Rows, parts[0][0].layout).inner
    B_all, A_all, start = A.new_zeros(inner.shape.out, rank), [], 0
    for site, delta in parts:
        B, A = delta.factors()
        stop = start + A.shape[0]
        B_all[cast(Rows, site.layout).index(A.device), start:stop] = B.detach()
        A_all.append(A.detach())
        start = stop
    return B_all, torch.cat(A_all)


def tensors_of(adapter: Adapter) -> dict[str, Tensor]:
    """All tensors of an adapter under PEFT's names."""
    result: dict[str, Tensor] = {}
    for path, layer in adapter.layers.items():
        deltas = layer.deltas_of(adapter.name)
        sites = [(layer.sites[key], delta) for key, delta in deltas.items()]
        if sites and isinstance(sites[0][0].layout, Rows):
            for _, delta in sites:
                if not isinstance(delta, LowRank) or delta.spec.peft_type != "LORA":
                    raise LorakitError(
                        f"save: {path} is split into parts, which PEFT's format has for LoRA alone; its method is "
                        f"{delta.spec.name}."
                    )
            B, A = _fused([(site, cast(LowRank, delta)) for site, delta in sites])
            result[f"{_PREFIX}{path}.lora_A.weight"] = A.contiguous()
            result[f"{_PREFIX}{path}.lora_B.weight"] = B.contiguous()
        else:
            for site, delta in sites:
                for key, tensor in _site_tensors(site, delta).items():
                    result[f"{_PREFIX}{path}.{key}"] = tensor
    for path, replacement in adapter.replacements():
        for name, tensor in replacement.tensors().items():
            result[_replacement_key(adapter, path, name)] = tensor.detach().contiguous()
    for name, tensor in adapter.pool.state_dict().items():
        result[f"base_model.{name}"] = tensor.contiguous()
    return {key: tensor.clone() if tensor.is_shared() else tensor for key, tensor in result.items()}


def _replacement_key(adapter: Adapter, path: str, name: str) -> str:
    wraps = path not in adapter.saved and bool(adapter.layers[path].deltas_of(adapter.name))
    return f"{_PREFIX}{path}.base_layer.{name}" if wraps else f"{_PREFIX}{path}.{name}"


# -- the configuration -------------------------------------------------------------------------------------------------------


def _compact(paths: list[str], model: nn.Module) -> list[str]:
    """The shortest list of suffixes that selects exactly these layers by PEFT's rule; whole names where none does."""
    endings = sorted({path.rpartition(".")[2] for path in paths})
    everything = [path for path, _ in walk(model) if path]
    if [path for path in everything if any(has_suffix(path, end) for end in endings)] == sorted(
        paths, key=everything.index
    ):
        return endings
    return paths


def _patterns(adapter: Adapter) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The most common value of each field that differs per layer, and the exceptions by whole layer name."""
    values: dict[str, dict[str, Any]] = {field: {} for field in adapter.method.pattern_fields}
    for path, layer in adapter.layers.items():
        deltas = list(layer.deltas_of(adapter.name).values())
        if not deltas:
            continue
        spec = deltas[0].peft_spec()
        if len(deltas) > 1 and "" not in layer.deltas_of(adapter.name) and "rank" in values:
            sites = list(layer.sites.values())
            if isinstance(sites[0].layout, Rows):
                spec = _fused_spec(spec, len(deltas))
        for field in values:
            values[field][path] = getattr(spec, field)
    common, patterns = {}, {}
    for field, by_path in values.items():
        if by_path:
            common[field] = Counter(by_path.values()).most_common(1)[0][0]
            patterns[field] = {path: value for path, value in by_path.items() if value != common[field]}
    return common, patterns


def _fused_spec(spec: Method, count: int) -> Method:
    """The spec of `count` equal parts taken as one low-rank pair, with the same scale."""
    rank, alpha = cast(Any, spec).rank, cast(Any, spec).alpha
    factor = count**0.5 if getattr(spec, "rslora", False) else count
    return spec.replace(rank=rank * count, alpha=alpha * factor)


_TASKS = {"ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM", "ForConditionalGeneration": "SEQ_2_SEQ_LM"}


def _task(model: nn.Module) -> str | None:
    """PEFT's task type, where PEFT does not attach conditions to it (classification adds modules_to_save by itself)."""
    for ending, task in _TASKS.items():
        if type(model).__name__.endswith(ending):
            return task
    return None


def config_of(adapter: Adapter, base: str | None = None) -> dict[str, Any]:
    """PEFT's adapter_config.json for an adapter.

    target_modules are written as they were resolved, so that PEFT selects the same layers whatever the request was.
    """
    common, patterns = _patterns(adapter)
    method = adapter.method.replace(**common) if common else adapter.method
    targets = [path for path, layer in adapter.layers.items() if layer.deltas_of(adapter.name)]
    config: dict[str, Any] = {
        "peft_type": adapter.method.peft_type or adapter.method.name.upper(),
        "task_type": _task(adapter.model),
        "base_model_name_or_path": base or getattr(adapter.model, "name_or_path", None) or None,
        "revision": None,
        "inference_mode": True,
        "auto_mapping": None,
        "target_modules": _compact(targets, adapter.model),
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "modules_to_save": list(adapter.saved) or None,
        "bias": adapter.targets.bias,
        **method.peft_config(),
    }
    for field, option in adapter.method.pattern_fields.items():
        config[option] = patterns.get(field, {})
    return config


def save(
    adapter: Adapter,
    folder: str | Path,
    base: str | None = None,
    record: Mapping[str, Any] | None = None,
) -> Path:
    """Write an adapter as a folder, in one step.

    Args:
        adapter: what to write.
        folder: where; an adapter that is there is replaced, other files stay.
        base: the base model's name for the file; by default the one transformers knows.
        record: anything to keep with it, such as how it was trained (plain data).

    Raises:
        LorakitError: the method has no file format, or a tensor holds a NaN; nothing is written then.
    """
    tensors = tensors_of(adapter)
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise LorakitError(f"save: {key} holds a NaN or an infinity; {folder} is left as it was.")
    config = config_of(adapter, base)
    from lorakit import __version__

    own = {
        "format": FORMAT,
        "lorakit_version": __version__,
        "method": adapter.method.to_dict(),
        "targets": dataclasses.asdict(adapter.targets),
        "base": {"name": config["base_model_name_or_path"], "fingerprint": fingerprint(adapter)},
        "record": dict(record or {}),
    }
    texts = {name: _json(value, name) for name, value in ((CONFIG, config), (OWN, own))}

    def write(fresh: Path) -> None:
        save_file({key: tensor.cpu() for key, tensor in tensors.items()}, fresh / TENSORS, metadata={"format": "pt"})
        for name, text in texts.items():
            (fresh / name).write_text(text)

    target = Path(folder)
    replace_folder(target, write)
    return target


def _json(value: Any, name: str) -> str:
    try:
        return json.dumps(value, indent=2, sort_keys=True) + "\n"
    except TypeError as problem:
        raise LorakitError(f"save: {name} takes plain data only ({problem}).") from problem


# -- reading -----------------------------------------------------------------------------------------------------------------


def _folder(folder: str | Path) -> Path:
    path = Path(folder)
    if path.parent.is_dir():
        recover(path.absolute())
    if not path.is_dir():
        raise LorakitError(f"load: {path} is no folder. An adapter is a folder with {CONFIG} and {TENSORS}.")
    if not (path / CONFIG).is_file():
        inside = sorted(entry.parent.name for entry in path.glob(f"*/{CONFIG}"))
        hint = f" It has adapters below it: {', '.join(inside[:8])}; name one of these." if inside else ""
        raise LorakitError(f"load: {path} has no {CONFIG}.{hint}")
    return path


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as problem:
        raise LorakitError(f"load: {path} cannot be read as JSON ({problem}).") from problem
    if not isinstance(value, dict):
        raise LorakitError(f"load: {path} holds a {type(value).__name__}; a configuration is an object.")
    return value


def read_config(folder: str | Path) -> dict[str, Any]:
    """PEFT's configuration of an adapter folder."""
    config = _read_json(_folder(folder) / CONFIG)
    if not isinstance(config.get("peft_type"), str):
        raise LorakitError(f"load: {Path(folder) / CONFIG} names no peft_type.")
    return config


def read_own(folder: str | Path) -> dict[str, Any]:
    """lorakit.json of an adapter folder; empty where another tool wrote it."""
    path = _folder(folder) / OWN
    if not path.is_file():
        return {}
    own = _read_json(path)
    if own.get("format", FORMAT) > FORMAT:
        raise LorakitError(
            f"load: {path} has format {own['format']}, written by lorakit {own.get('lorakit_version')}; this version reads "
            f"up to {FORMAT}. A newer lorakit reads it; without {OWN} it reads as PEFT's."
        )
    return own


def read_tensors(folder: str | Path) -> dict[str, Tensor]:
    """The tensors of an adapter folder under the names in the file."""
    path = _folder(folder) / TENSORS
    if not path.is_file():
        if path.with_suffix(".bin").is_file():
            raise LorakitError(
                f"load: {path.parent} holds adapter_model.bin, a pickle, which can run code when it is read; lorakit reads "
                "safetensors only. Load it with PEFT and save it again (safe_serialization is its default)."
            )
        raise LorakitError(f"load: {path.parent} has no {TENSORS}.")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as problem:
        raise LorakitError(f"load: {path} is no whole safetensors file ({problem}).") from problem


_COMMON = {
    "peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "bias",
    "rank_pattern", "alpha_pattern",
}  # fmt: skip


def _targets_from_peft(config: Mapping[str, Any]) -> Targets:
    def names(value: Any) -> Any:
        return value if value is None or isinstance(value, str) else tuple(value)

    layers = config.get("layers_to_transform")
    lists = config.get("layers_pattern") or None
    return Targets(
        target_modules=names(config.get("target_modules")) or (),
        exclude_modules=names(config.get("exclude_modules")) or None,
        layers=None if layers is None or layers == [] else (layers,) if isinstance(layers, int) else tuple(layers),
        layers_pattern=(lists,) if isinstance(lists, str) else None if lists is None else tuple(lists),
        rank_pattern=config.get("rank_pattern") or {},
        alpha_pattern=config.get("alpha_pattern") or {},
        modules_to_save=tuple(config.get("modules_to_save") or ()),
        bias=config.get("bias", "none"),
    )


def _targets_from_own(own: Mapping[str, Any]) -> Targets:
    def freeze(value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    return Targets(**{name: value if name == "parts" else freeze(value) for name, value in own["targets"].items()})


def _strip(key: str) -> str:
    for prefix in (_PREFIX, "base_model."):
        if key.startswith(prefix):
            key = key.removeprefix(prefix)
            break
    return key.replace(".modules_to_save.", ".")


def _layer_of(key: str, paths: set[str]) -> str | None:
    """The longest module path that a tensor name starts with."""
    head = key
    while "." in head:
        head = head.rpartition(".")[0]
        if head in paths:
            return head
    return None


def load(
    model: nn.Module,
    folder: str | Path,
    name: str | None = None,
    strict: bool = True,
    trainable: bool = False,
) -> Adapter:
    """Put an adapter from a folder (lorakit's or PEFT's) on a model. It is not active until `use` or `activate`.

    Args:
        model: the base model.
        folder: an adapter folder.
        name: its name on this model; the folder's name by default.
        strict: refuse another base model, tensors that no layer takes, layers without tensors, unknown options. False
            is said aloud: each is logged instead.
        trainable: leave its tensors trainable, and make it active.

    Raises:
        LorakitError: it cannot be read or does not fit; the model is as before then.
    """
    path = _folder(folder)
    name = name or re.sub(r"[./]", "-", path.absolute().name)
    if name in adapters(model):
        raise LorakitError(f"load: an adapter {name!r} is on this model already; give another name=.")
    complain = _complaints(strict)
    config, own, tensors = read_config(path), read_own(path), read_tensors(path)
    method_class = method_for_peft(config) if not own else method_named(own["method"]["name"])
    method = _method(method_class, config, own, path, complain)
    targets = _targets_from_own(own) if own else _targets_from_peft(config)
    modules = dict(walk(model))
    stripped = {_strip(key): tensor for key, tensor in tensors.items()}
    if len(stripped) != len(tensors):
        raise LorakitError(f"load: {path / TENSORS} holds the same tensor under two names.")
    found = _paths_in(stripped, list(modules), method_class, path)
    _check_targets(model, targets, found, complain)
    exact = dataclasses.replace(targets, target_modules=tuple(found))
    adapter = build(model, method, exact, name, checked=False, paths=found)
    adapter.targets = targets
    try:
        _fill(adapter, stripped, modules, path, complain)
        check(adapter, own.get("base", {}).get("fingerprint"), path, complain)
    except BaseException:
        detach(model, name)
        raise
    if trainable:
        adapter.requires_grad_(True)
        activate(model, name)
    return adapter


Complain = Callable[[str], None]


def _complaints(strict: bool) -> Complain:
    def complain(message: str) -> None:
        if strict:
            raise LorakitError(f"{message} strict=False goes on regardless.")
        log.warning("%s", message)

    return complain


def _method(
    method_class: type[Method], config: dict[str, Any], own: Mapping[str, Any], path: Path, complain: Complain
) -> Method:
    if own:
        return spec_from_dict(own["method"], str(path / OWN))
    read = method_class.from_peft(config)
    known = _COMMON | set(read.peft_config()) | method_class.peft_ignored
    for key, value in config.items():
        if key not in known and value not in (None, False, {}, [], ""):
            complain(
                f"load: {path / CONFIG} sets {key}={value!r}, which lorakit does not know for {method_class.name}, so the "
                "adapter might act otherwise than its author saw."
            )
    return read


def _paths_in(tensors: Mapping[str, Tensor], paths: list[str], method: type[Method], folder: Path) -> list[str]:
    """The layers for which the file holds this method's tensors, in the model's order."""
    suffix = re.compile(method.peft_suffix)
    found, known = set(), set(paths)
    for key in tensors:
        if not suffix.search(key):
            continue
        layer = _layer_of(key.replace(".base_layer.out_proj.", "."), known)
        if layer is None:
            raise LorakitError(
                f"load: {folder / TENSORS} holds {key!r}, and this model has no layer of that name. It was made for "
                "another architecture, or saved under another prefix."
            )
        found.add(layer)
    order = {path: index for index, path in enumerate(paths)}
    return sorted(found, key=order.__getitem__)


def _check_targets(model: nn.Module, targets: Targets, found: list[str], complain: Complain) -> None:
    """Every layer that the configuration selects must have its tensors in the file."""
    if not targets.target_modules:
        return
    try:
        selected = select(model, targets)
    except LorakitError as problem:
        complain(f"load: the configuration does not fit this model: {problem}")
        return
    missing = [path for path in selected if path not in set(found)]
    if missing and targets.target_modules not in PRESETS:
        complain(
            f"load: the configuration targets {missing[0]} ({len(missing)} such layers), for which the file holds no tensors."
        )


def _fill(
    adapter: Adapter,
    tensors: dict[str, Tensor],
    modules: Mapping[str, nn.Module],
    folder: Path,
    complain: Complain,
) -> None:
    """Copy the file's tensors into a built adapter; every tensor must be taken and every place filled."""
    left = dict(tensors)

    def take(key: str) -> Tensor:
        if key not in left:
            raise LorakitError(
                f"load: {folder / TENSORS} lacks {key!r}, which adapter {adapter.name!r} needs"
                + (f"; it holds for example {next(iter(left))!r}." if left else ".")
            )
        return left.pop(key)

    def put(target: Tensor, value: Tensor, key: str) -> None:
        if target.shape != value.shape:
            raise LorakitError(
                f"load: {key} in {folder / TENSORS} has shape {tuple(value.shape)}; this model's layer needs "
                f"{tuple(target.shape)}."
            )
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise LorakitError(f"load: {key} in {folder / TENSORS} holds a NaN or an infinity.")
        with torch.no_grad():
            target.copy_(value)

    for path, layer in adapter.layers.items():
        deltas = layer.deltas_of(adapter.name)
        sites = [(layer.sites[key], delta) for key, delta in deltas.items()]
        if sites and isinstance(sites[0][0].layout, Rows):
            _fill_parts(path, sites, take, put)
            continue
        for site, delta in sites:
            for suffix, view in delta.peft_views(site.layout.kind).items():
                key = f"{path}.{_site_prefix(site)}{suffix}"
                value = site.layout.unpack(take(key), view.axes)
                sizes = [tensor.shape[view.dim] if tensor.ndim else 1 for tensor in view.tensors]
                if len(sizes) > 1 and sum(sizes) == value.shape[view.dim]:
                    for own, piece in zip(view.tensors, value.split(sizes, dim=view.dim), strict=True):
                        put(own, piece, key)
                else:
                    put(view.tensors[0], value, key)
    for path, replacement in adapter.replacements():
        _fill_replacement(adapter, path, replacement, take, put)
    for attribute, tensor in adapter.pool.state_dict().items():
        put(tensor, take(attribute), attribute)
    for key in list(left):
        if key.endswith(".base_layer.weight"):
            _check_copy(key, left.pop(key), modules, complain)
    if left:
        complain(
            f"load: {folder / TENSORS} holds {next(iter(left))!r} and {len(left) - 1} more tensors that nothing in this "
            "model takes."
        )


def _fill_parts(
    path: str,
    sites: list[tuple[Site, Delta]],
    take: Callable[[str], Tensor],
    put: Callable[[Tensor, Tensor, str], None],
) -> None:
    A, B = take(f"{path}.lora_A.weight"), take(f"{path}.lora_B.weight")
    start = 0
    for site, delta in sites:
        own_B, own_A = cast(LowRank, delta).factors()
        stop = start + own_A.shape[0]
        put(own_A, A[start:stop], f"{path}.lora_A.weight")
        put(own_B, B[cast(Rows, site.layout).index(), start:stop], f"{path}.lora_B.weight")
        start = stop


def _fill_replacement(
    adapter: Adapter,
    path: str,
    replacement: Replacement,
    take: Callable[[str], Tensor],
    put: Callable[[Tensor, Tensor, str], None],
) -> None:
    for name, tensor in replacement.tensors().items():
        key = _strip(_replacement_key(adapter, path, name))
        put(tensor, take(key), key)


def _check_copy(key: str, value: Tensor, modules: Mapping[str, nn.Module], complain: Complain) -> None:
    """PEFT writes the whole base weight of an adapted embedding; it must be the weight that is here."""
    path = key.removesuffix(".base_layer.weight")
    module = modules.get(path)
    weight = getattr(module, "weight", None)
    if (
        not isinstance(weight, Tensor)
        or weight.shape != value.shape
        or not torch.allclose(weight.detach().float().cpu(), value.float(), rtol=2**-7, atol=1e-6)
    ):
        complain(f"load: the file carries its own copy of {path}.weight, which is not the weight of this model.")


__all__ = [
    "CONFIG",
    "OWN",
    "TENSORS",
    "board_of",
    "load",
    "read_config",
    "read_own",
    "read_tensors",
    "save",
    "select",
]
