"""The three files of an adapter folder: their names, and how they are found and read.

    adapter_config.json         PEFT's configuration
    adapter_model.safetensors   PEFT's tensors under PEFT's names and shapes
    lorakit.json                what PEFT has no place for: the exact spec, the base's fingerprint, the training record

PEFT, vLLM and their kin ignore lorakit.json; a folder without it (PEFT wrote it) reads as well. No pickle is ever read.
lorakit.json says which configuration and which tensors it belongs to: if another program has written a different adapter
over them, what it says is no longer true, and that is noticed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorakit.errors import LorakitError
from lorakit.experts import MEMBERS
from lorakit.files.folder import recover, stamp_of
from lorakit.files.formats import check_axes, with_integers
from lorakit.files.prompt import PROMPT, Prompt, read_prompt
from lorakit.models.hub import HubName, read_name
from lorakit.reading import neighbours, read_json, whole_tensors

CONFIG, TENSORS, OWN = "adapter_config.json", "adapter_model.safetensors", "lorakit.json"
CONTENT = (CONFIG, TENSORS, OWN)
FORMAT = 1
LABELS = ("base_model_name_or_path", "revision", "task_type", "inference_mode", "auto_mapping", "peft_version")
"""Entries of the configuration that may be edited by hand: they do not change what the adapter computes."""

_ATTEMPTS = 100

T = TypeVar("T")


@dataclass(frozen=True)
class Bundle:
    """What one adapter folder holds.

    Attributes:
        folder: where it was read.
        config: PEFT's configuration.
        own: lorakit.json; empty where another program wrote the folder.
        tensors: under the names in the file.
        compare: gives what `stale` is.
        prompt: the form in which the adapter is asked, where it was read too.
    """

    folder: Path
    config: dict[str, Any]
    own: dict[str, Any]
    tensors: dict[str, Tensor]
    compare: Callable[[], str] = str
    prompt: Prompt | None = None

    @property
    def stale(self) -> str:
        """Why `own` does not belong to the rest, or empty."""
        return self.compare()


# -- finding ---------------------------------------------------------------------------------------------------------------


def locate(folder: str | Path, revision: str | None = None) -> Path:
    """The adapter folder of this path, or else of this name on the model hub ("user/name", "user/name@revision" or
    "user/name/folder@revision").

    The network is asked only where no such folder exists and the name can be nothing else.
    """
    path = Path(folder).expanduser()
    if path.parent.is_dir():
        recover(path, CONTENT)
        if not path.is_dir():
            recover(path, CONTENT)  # now it waits for a save that is just between its two renames
    if not path.is_dir():
        # A known first part ("adapters/sql" where ./adapters exists) is a misspelt path and not a user of the hub.
        named = read_name(folder) if isinstance(folder, str) and not path.exists() else None
        if named is not None and not Path(named.repo).parent.exists():
            path = _fetch(named, named.revision or revision)
        else:
            raise LorakitError(
                f"load: {path} is no folder.{neighbours(path, _beside(path))} An adapter is a folder with {CONFIG} and "
                f"{TENSORS}, or a name on the model hub such as user/name."
            )
    if not (path / CONFIG).is_file():
        inside = sorted(entry.parent.name for entry in path.glob(f"*/{CONFIG}"))
        hint = f" It has adapters below it: {', '.join(inside[:8])}; name one of these." if inside else ""
        unfinished = sorted(path.glob(f"checkpoints/checkpoint-*/{CONFIG}"), key=lambda file: file.stat().st_mtime)
        if unfinished:
            hint = f" It is an unfinished run; its newest checkpoint is an adapter too: {unfinished[-1].parent}."
        elif (path / "config.json").is_file():
            hint = " It is a base model (config.json); an adapter is expected here."
        elif not inside:
            found = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
            hint = f" It holds {found}; an adapter is a folder with {CONFIG} and {TENSORS}."
        raise LorakitError(f"load: {path} has no {CONFIG}.{hint}")
    return path


def _beside(path: Path) -> list[str]:
    """The adapter folders beside a path."""
    return [entry.parent.name for entry in path.parent.glob(f"*/{CONFIG}")] if path.parent.is_dir() else []


def _fetch(named: HubName, revision: str | None) -> Path:
    """The cached copy of an adapter on the hub, fetched or brought up to date if the network allows."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name, wanted = named.repo, named.patterns([*CONTENT, *PROMPT, f"{MEMBERS}/*"])
    try:
        return named.inside(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except GatedRepoError as problem:
        raise LorakitError(
            f"load: {name!r} is closed on the hub; ask for access on its page, then `hf auth login`."
        ) from problem
    except RevisionNotFoundError as problem:
        raise LorakitError(f"load: {name!r} has no revision {revision!r} on the hub.") from problem
    except (RepositoryNotFoundError, HFValidationError) as problem:
        raise LorakitError(f"load: {name!r} is neither a folder here nor an adapter on the hub.") from problem
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as problem:
        raise LorakitError(
            f"load: {name!r} is no folder here, and as a name on the hub it is not in the cache and the hub cannot be asked "
            f"now ({type(problem).__name__}). Fetch it while online, or give the path of a folder."
        ) from problem


# -- reading -----------------------------------------------------------------------------------------------------------------


def read_bundle(folder: str | Path, revision: str | None = None, later: bool = False, prompted: bool = False) -> Bundle:
    """All of an adapter folder, from one and the same save also while another process saves to it; `prompted`: with how it is
    asked.

    The digest of a large file takes longer than reading it. With `later` it is still being computed when this returns, `stale`
    waits for it, and whether the files have stayed the same until then is the caller's to find out.
    """
    path = locate(folder, revision)

    def read() -> Bundle:
        config, own = _config(path), _own(path)
        beside = ThreadPoolExecutor(1)
        try:
            stale = beside.submit(_stale, path, config, own)
            tensors = _tensors(path)
            if not own:
                config = with_integers(config)
                check_axes(config, tensors)
            return Bundle(path, config, own, tensors, stale.result, read_prompt(path) if prompted else None)
        finally:
            beside.shutdown(wait=not later)

    return _unmoved(path, read)


def read_config(folder: str | Path) -> dict[str, Any]:
    """PEFT's configuration of an adapter folder."""
    return _config(locate(folder))


def read_own(folder: str | Path) -> dict[str, Any]:
    """lorakit.json of an adapter folder; empty where another tool wrote it."""
    return _own(locate(folder))


def read_tensors(folder: str | Path) -> dict[str, Tensor]:
    """The tensors of an adapter folder under the names in the file."""
    return _tensors(locate(folder))


def _unmoved(path: Path, read: Callable[[], T]) -> T:
    """What `read` gives while the files are the same ones; a folder that is replaced meanwhile is read again."""
    files = [path / name for name in CONTENT]
    for _ in range(_ATTEMPTS):
        before = stamp_of(*files)
        try:
            result = read()
        except LorakitError:
            if path.is_dir() and stamp_of(*files) == before:
                raise
            recover(path, CONTENT)  # waits for the save that is just between its two renames
        else:
            if stamp_of(*files) == before:
                return result
    raise LorakitError(f"load: {path} was replaced {_ATTEMPTS} times while it was read; save to it less often.")


def _config(path: Path) -> dict[str, Any]:
    config = read_json(path / CONFIG, "load")
    if not isinstance(config.get("peft_type"), str):
        raise LorakitError(f"load: {path / CONFIG} names no peft_type.")
    return config


def _own(path: Path) -> dict[str, Any]:
    file = path / OWN
    if not file.is_file():
        return {}
    own = read_json(file, "load")
    version = own.get("format")
    if not isinstance(version, int) or version < 1:
        raise LorakitError(f"load: {file} has format {version!r}; a format is a number from 1 to {FORMAT}.")
    if version > FORMAT:
        raise LorakitError(
            f"load: {file} has format {version}, written by lorakit {own.get('lorakit_version')}; this version reads up to "
            f"{FORMAT}. A newer lorakit reads it; without {OWN} it reads as PEFT's."
        )
    for key, kind in (("method", dict), ("targets", dict), ("base", dict), ("files", dict)):
        if not isinstance(own.get(key), kind):
            raise LorakitError(
                f"load: {file} has no {key!r}; it is not whole. Without {OWN} the folder reads as PEFT's."
            )
    return own


def _tensors(path: Path) -> dict[str, Tensor]:
    file = path / TENSORS
    if not file.is_file():
        if file.with_suffix(".bin").is_file():
            raise LorakitError(
                f"load: {path} holds adapter_model.bin, a pickle, which can run code when it is read; lorakit reads "
                "safetensors only. Load it with PEFT and save it again (safe_serialization is its default)."
            )
        raise LorakitError(f"load: {path} has no {TENSORS}.")
    with whole_tensors(file, "load"):
        return {key: computable(tensor) for key, tensor in load_file(file).items()}


def computable(tensor: Tensor) -> Tensor:
    """A tensor in a format that torch computes in: floats of 8 bits or fewer (float8_e4m3fn, …) as float32, which holds them
    exactly."""
    return tensor.float() if tensor.is_floating_point() and tensor.dtype.itemsize == 1 else tensor


# -- what belongs together ---------------------------------------------------------------------------------------------------


def write_bundle(
    fresh: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    own: Mapping[str, Any] | None,
    prompt: Prompt | None = None,
) -> None:
    """Write the three files into an empty folder (see `folder.replace_folder`); lorakit.json only where `own` is given. With
    `prompt`, how the adapter is asked.

    Raises:
        OSError: a file cannot be written.
    """
    path = fresh / TENSORS
    try:
        save_file({key: tensor.cpu() for key, tensor in tensors.items()}, path, metadata={"format": "pt"})
    except SafetensorError as problem:
        raise OSError(str(problem)) from problem
    text = plain(config, CONFIG)
    (fresh / CONFIG).write_text(text, encoding="utf-8")
    # safetensors makes its file readable by its owner alone; the adapter's files are all as readable as the rest
    path.chmod((fresh / CONFIG).stat().st_mode)
    if prompt is not None:
        prompt.write(fresh)
        own = None if own is None else {**own, "prompt": prompt.data()}
    if own is not None:
        files = digests(json.loads(text), path)
        (fresh / OWN).write_text(plain({**own, "files": files}, OWN), encoding="utf-8")


def content_with(prompt: Prompt | None) -> tuple[str, ...]:
    """The files that saving an adapter replaces: those of an earlier prompt only where a new one takes their place."""
    return CONTENT if prompt is None else (*CONTENT, *PROMPT)


def own_data(
    method: Mapping[str, Any],
    targets: Mapping[str, Any],
    base: Mapping[str, Any],
    record: Mapping[str, Any] | None = None,
    shifted: bool = False,
) -> dict[str, Any]:
    """What lorakit.json says, but for the digests that `write_bundle` adds.

    Args:
        method: the spec as data (`Spec.to_dict`).
        targets: what was asked for (`Targets.as_data`).
        base: {"name": …, "fingerprint": …, "quantization": …}, as far as they are known.
        record: anything to keep with it, such as how it was trained.
        shifted: the tensors are what is trained and the start that is taken off it (`core.offset`).
    """
    from lorakit import __version__

    return {
        "format": FORMAT,
        "lorakit_version": __version__,
        "method": dict(method),
        "targets": dict(targets),
        "shifted": shifted,
        "base": dict(base),
        "record": dict(record or {}),
    }


def plain(value: Any, name: str) -> str:
    """JSON as the files hold it: sorted, so that the same adapter gives the same bytes."""
    try:
        return json.dumps(value, indent=2, sort_keys=True) + "\n"
    except (TypeError, ValueError) as problem:
        raise LorakitError(f"save: {name} takes plain data only ({problem}).") from problem


def digests(config: Mapping[str, Any], tensors: Path) -> dict[str, str]:
    """What lorakit.json remembers of the other two files: a digest of the entries that matter, one of the tensor file."""
    matter = {key: value for key, value in config.items() if key not in LABELS}
    text = json.dumps(matter, sort_keys=True)
    with tensors.open("rb") as file:
        return {
            CONFIG: hashlib.sha256(text.encode()).hexdigest(),
            TENSORS: hashlib.file_digest(file, "sha256").hexdigest(),
        }


def _stale(path: Path, config: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    if not own:
        return ""
    try:
        found = digests(config, path / TENSORS)
    except OSError as problem:
        raise LorakitError(f"load: {path / TENSORS} cannot be read ({problem}).") from problem
    other = [name for name, digest in found.items() if own["files"].get(name) != digest]
    if not other:
        return ""
    return (
        f"load: {path / other[0]} was changed after lorakit wrote {OWN} beside it, which therefore describes another "
        f"adapter. Without {OWN} (rename it) the folder reads as PEFT's."
    )
