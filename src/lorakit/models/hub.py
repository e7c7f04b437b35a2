"""The model hub, with or without a network.

transformers retries for half a minute when there is no network, and asks it for some files even when told to use local ones
only. So the hub is asked once whether it answers; if not, the cached copy is used as the local folder that it is.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from lorakit.errors import LorakitError, first_line, unknown
from lorakit.reading import neighbours

logger = logging.getLogger(__name__)


_NAME = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)((?P<below>(/[\w.-]+)+)?@(?P<revision>[\w.-]+(/[\w.-]+)*))?")
LARGE = ("*.safetensors", "*.bin", "*.gguf", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.onnx*", "*.tflite", "*.ot")
"""Files of a model's repository that hold weights."""


@dataclass(frozen=True)
class HubName:
    """A name on the hub: `owner/name`, `owner/name@revision` or `owner/name/folder@revision`."""

    repo: str
    revision: str | None = None
    below: str = ""

    @property
    def name(self) -> str:
        """What it is called: the last part of its path."""
        return (self.below or self.repo).rpartition("/")[2]

    def inside(self, snapshot: str | Path) -> Path:
        """Its folder in a copy of the repository."""
        return Path(snapshot) / self.below

    def patterns(self, names: Iterable[str]) -> list[str]:
        """File names as patterns over the repository."""
        return [f"{self.below}/{name}" if self.below else name for name in names]


def read_name(name: str) -> HubName | None:
    """A text as a name on the hub; None where it is none."""
    found = _NAME.fullmatch(name)
    return found and HubName(found["repo"], found["revision"], (found["below"] or "").removeprefix("/"))


def snapshot(name: str, weights: bool = True) -> str:
    """The local copy of `owner/name@revision`, which is fetched where it is not there; another name as it is.

    Args:
        name: a folder, or a name on the hub.
        weights: fetch the weights too.

    Raises:
        LorakitError: there is no such repository or revision, or it is not in the cache and the hub cannot be reached.
    """
    found = None if Path(name).exists() else read_name(name)
    if found is None or found.revision is None:
        return name
    online = reach_hub(found.repo, found.revision)
    try:
        folder = huggingface_hub.snapshot_download(
            found.repo, revision=found.revision, local_files_only=not online, ignore_patterns=[] if weights else [*LARGE],
            allow_patterns=found.patterns(["*"]) if found.below else None,
        )  # fmt: skip
    except OSError as error:
        raise not_cached(found.repo) from error
    if not found.inside(folder).is_dir():
        raise LorakitError(f'load model: "{found.repo}" has no folder {found.below} at {found.revision}.')
    return str(found.inside(folder))


def find_on_hub(name: str, options: dict[str, Any]) -> str:
    """What to give transformers for a hub name: the name, or without network the folder of its cached copy.

    The folder, because transformers asks the network for some files even when told to use local ones only.
    """
    if (folder := snapshot(name)) != name or Path(name).is_dir():
        return folder
    if reach_hub(name, options.get("revision")):
        return name
    try:
        return huggingface_hub.snapshot_download(
            name, revision=options.get("revision"), cache_dir=options.get("cache_dir"), local_files_only=True
        )
    except OSError as error:
        raise not_cached(name, options.get("cache_dir")) from error


def reach_hub(name: str, revision: str | None = None) -> bool:
    """Whether the hub answers for this model, asked once; transformers alone would retry for half a minute.

    Raises:
        LorakitError: the hub answers that there is no such model, or that it is closed to this user.
    """
    try:
        huggingface_hub.HfApi().model_info(name, revision=revision, timeout=10)
    except GatedRepoError as error:
        raise LorakitError(
            f'load model: "{name}" is gated on the hub. Ask for access on https://huggingface.co/{name}, '
            "then run `hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise LorakitError(f'load model: "{name}" has no revision "{revision}" on the hub.') from error
    except RepositoryNotFoundError as error:
        raise LorakitError(
            f'load model: "{name}" is neither a file or folder here (from {Path.cwd()}) nor a model on the hub that this user '
            "can see. Check the spelling, or run `hf auth login` if it is private."
        ) from error
    except HFValidationError as error:
        raise LorakitError(
            f'load model: "{name}" is neither a file or folder here (from {Path.cwd()}) nor a hub name (owner/name).'
        ) from error
    except Exception as error:
        # Whatever a network does: refused, timed out, no such name, a proxy's answer, offline mode.
        logger.info("the hub does not answer (%s); using the cached copy", first_line(error))
        return False
    return True


def download_gguf(name: str, gguf_file: str) -> Path:
    """One GGUF file of a hub repository, from the cache if it is there."""
    online = reach_hub(name)
    try:
        return Path(huggingface_hub.hf_hub_download(name, gguf_file, local_files_only=not online))
    except LocalEntryNotFoundError as error:
        raise not_cached(name) from error
    except EntryNotFoundError as error:
        found = [file for file in huggingface_hub.list_repo_files(name) if file.endswith(".gguf")]
        raise unknown("GGUF file", gguf_file, found, where=name) from error


def not_cached(name: str, cache_dir: str | Path | None = None) -> LorakitError:
    """The error for a hub name that is neither reachable nor whole in the cache."""
    kept = Path(cache_dir or huggingface_hub.constants.HF_HUB_CACHE)
    beside = (
        neighbours(Path(name), (one.parent.name for one in Path().glob("*/config.json"))) if "/" not in name else ""
    )
    cached = sorted(entry.name.removeprefix("models--").replace("--", "/") for entry in kept.glob("models--*"))
    return LorakitError(
        f"load model: the hub cannot be reached (no network, or HF_HUB_OFFLINE is set) and the cache {kept} does not hold "
        f'"{name}" whole. In the cache: {", ".join(cached) or "no model"}.{beside} What works: connect once (`hf download '
        f"{name}`), copy the cache from a machine that has it and set HF_HOME, or give a local folder or a .gguf file."
    )
