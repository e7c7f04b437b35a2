"""What stands on disk for an adapter of any format: tensors and metadata, read whole and written in one step.

A source is a file (`.safetensors`, `.gguf`) or a folder; no pickle is ever read. A target is checked, made in memory and
refused there if need be; only then is anything written, beside its place and put there at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lorakit.errors import LorakitError
from lorakit.files.bundle import CONFIG, OWN, TENSORS, computable, plain, read_bundle, write_bundle
from lorakit.files.folder import recover, replace_file, replace_folder
from lorakit.reading import read_json, whole_tensors

MLX_TENSORS = "adapters.safetensors"
PIPELINE_TENSORS = "pytorch_lora_weights.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".npz")


@dataclass(frozen=True)
class Content:
    """The tensors of one file, and what is said beside them.

    Attributes:
        where: the file, for messages.
        tensors: under the names in the file.
        metadata: safetensors' own (strings), or the keys of a GGUF file.
        config: adapter_config.json of a folder, empty where there is none.
        own: lorakit.json of a folder, empty where there is none.
    """

    where: str
    tensors: dict[str, Tensor]
    metadata: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    own: dict[str, Any] = field(default_factory=dict)


# -- reading -----------------------------------------------------------------------------------------------------------------


def read_source(source: str | Path) -> dict[str, Content]:
    """What a path holds: component of a pipeline -> content ("" where a folder does not say).

    Raises:
        LorakitError: nothing is there, or no adapter, or several; a file is damaged or a pickle.
    """
    path = Path(source).expanduser()
    if path.parent.is_dir() and not path.is_file():
        recover(path, (CONFIG, TENSORS, OWN))
    if not path.exists():
        raise LorakitError(f"convert: {path} was asked for; no such file or folder (from {Path.cwd()}).")
    if path.is_file():
        return {"": _file(path)}
    if (path / CONFIG).is_file():
        if (path / MLX_TENSORS).is_file() and not (path / TENSORS).is_file():
            return {"": _mlx(path)}
        return {"": _bundle(path)}
    inside = {entry.parent.name: entry.parent for entry in sorted(path.glob(f"*/{CONFIG}"))}
    if inside:
        return {name: _bundle(folder) for name, folder in inside.items()}
    files = sorted([*path.glob("*.safetensors"), *path.glob("*.gguf")])
    if len(files) != 1:
        pickles = sorted(entry.name for entry in path.iterdir() if entry.suffix in PICKLES)
        found = ", ".join(file.name for file in files) or ", ".join(pickles) or "no adapter"
        raise LorakitError(f"convert: {path} holds {found}; name one file, or a folder with {CONFIG}.")
    return {"": _file(files[0])}


def _bundle(path: Path) -> Content:
    bundle = read_bundle(path)
    if bundle.stale:
        raise LorakitError(bundle.stale)
    return Content(str(path / TENSORS), bundle.tensors, {}, bundle.config, bundle.own)


def _mlx(path: Path) -> Content:
    config = read_json(path / CONFIG, "convert")
    content = _file(path / MLX_TENSORS)
    return Content(content.where, content.tensors, content.metadata, config)


def _file(path: Path) -> Content:
    if path.suffix == ".gguf":
        return _gguf(path)
    if path.suffix in PICKLES:
        raise LorakitError(
            f"convert: {path} is a pickle, which can run code when it is read; lorakit reads safetensors and GGUF "
            "only. Save its tensors with safetensors.torch.save_file."
        )
    with whole_tensors(path, "convert"), safe_open(path, "pt") as file:
        tensors = {key: computable(file.get_tensor(key)) for key in file.keys()}  # noqa: SIM118 - no mapping
        metadata = dict(file.metadata() or {})
    return Content(str(path), tensors, metadata)


@contextmanager
def open_gguf(path: Path) -> Iterator[Any]:
    """A reader of a GGUF file; what is wrong with the file is said in the block too."""
    from gguf import GGUFReader

    try:
        yield GGUFReader(path)
    except (ValueError, OSError, KeyError, IndexError) as problem:
        raise LorakitError(f"convert: {path} is no whole GGUF file ({problem}).") from problem


def _gguf(path: Path) -> Content:
    from gguf import dequantize

    with open_gguf(path) as reader:
        metadata = {name: entry.contents() for name, entry in reader.fields.items() if not name.startswith("GGUF.")}
        tensors = {
            tensor.name: torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
            for tensor in reader.tensors
        }
    return Content(str(path), tensors, metadata)


# -- writing ---------------------------------------------------------------------------------------------------------------


def write_bundles(output: Path, contents: Mapping[str, Content]) -> None:
    """PEFT's folder; several components as folders below one that is replaced whole."""

    def write(fresh: Path) -> None:
        for name, content in contents.items():
            (fresh / name).mkdir(exist_ok=True)
            write_bundle(fresh / name, content.config, content.tensors, content.own or None)

    replace_folder(output, write, (CONFIG, TENSORS, OWN) if list(contents) == [""] else tuple(contents))


def write_mlx(output: Path, contents: Mapping[str, Content]) -> None:
    """MLX's folder: the tensors and their configuration."""
    (content,) = contents.values()

    def write(fresh: Path) -> None:
        _save(content, fresh / MLX_TENSORS)
        (fresh / CONFIG).write_text(plain(content.config, CONFIG), encoding="utf-8")

    replace_folder(output, write, (MLX_TENSORS, CONFIG))


def write_file(output: Path, contents: Mapping[str, Content]) -> None:
    """One file; a GGUF file where its name says so."""
    (content,) = contents.values()
    replace_file(output, lambda fresh: (_save_gguf if output.suffix == ".gguf" else _save)(content, fresh))


def _save(content: Content, path: Path) -> None:
    held = {key: tensor.cpu().contiguous().clone() for key, tensor in content.tensors.items()}
    try:
        save_file(held, path, metadata={str(key): str(value) for key, value in content.metadata.items()} or None)
    except SafetensorError as problem:
        raise OSError(str(problem)) from problem


def _save_gguf(content: Content, path: Path) -> None:
    from gguf import GGUFWriter

    metadata = dict(content.metadata)
    writer = GGUFWriter(path, str(metadata.pop("general.architecture")))
    for key, value in metadata.items():
        if isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_string(key, str(value))
    for key, tensor in content.tensors.items():
        writer.add_tensor(key, tensor.detach().float().cpu().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
