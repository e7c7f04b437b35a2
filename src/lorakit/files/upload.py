"""An adapter's folder on the model hub: which of its files go there, and the commit.

Only what belongs to an adapter is sent: its two files in PEFT's form, lorakit.json, the prompt, the model card and what the run
left (configuration, metrics, curves). Weights of a base, checkpoints and whatever else lies there stay; they are named. A file
that holds a key or a token, or that is a link out of the folder, is refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.errors import LorakitError, first_line
from lorakit.experts import MEMBERS
from lorakit.files.bundle import CONTENT, locate, read_config, read_tensors
from lorakit.files.prompt import PROMPT
from lorakit.models.hub import read_name

BESIDE = ("README.md", "train.yaml", "metrics.jsonl", "curves.png")
"""What a run writes beside an adapter."""

_SECRET = re.compile(
    r"\bhf_[A-Za-z0-9]{30,}|\bsk-[A-Za-z0-9_-]{20,}|\bAKIA[0-9A-Z]{16}\b|\bgh[pousr]_[A-Za-z0-9]{30,}"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
"""Tokens and keys, by how they are written."""


@dataclass(frozen=True)
class Upload:
    """What goes to the hub.

    Attributes:
        folder: the adapter's.
        files: names below the folder that are sent.
        kept: names that stay here.
        base: what the adapter names as its base.
    """

    folder: Path
    files: tuple[str, ...]
    kept: tuple[str, ...]
    base: str

    def sizes(self) -> list[tuple[str, int]]:
        """Every file that is sent, with its bytes."""
        return [(name, (self.folder / name).stat().st_size) for name in self.files]


def plan_upload(folder: str | Path) -> Upload:
    """What of an adapter's folder goes to the hub.

    Raises:
        LorakitError: it is no whole adapter, or one of its files is private.
    """
    folder = locate(folder)
    base = str(read_config(folder).get("base_model_name_or_path") or "")
    read_tensors(folder)  # a broken file is not worth an upload
    names = {*CONTENT, *PROMPT, *BESIDE}
    files: list[str] = []
    kept: list[str] = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_file():
            continue
        is_member = name.startswith(f"{MEMBERS}/") and name.count("/") == 2 and path.name in (*CONTENT, *PROMPT)
        (files if name in names or is_member else kept).append(name)
    for name in files:
        _refuse_private(folder, name)
    return Upload(folder, tuple(files), tuple(kept), base)


def _refuse_private(folder: Path, name: str) -> None:
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()) and "snapshots" not in folder.resolve().parts:
        raise LorakitError(f"push: {path} is a link out of the folder ({path.resolve()}); put the file itself there")
    if path.suffix not in (".safetensors", ".png", ".model"):
        found = _SECRET.search(path.read_text(encoding="utf-8", errors="replace"))
        if found:
            raise LorakitError(
                f"push: {path} holds what looks like a key or a token ({found[0][:6]}...); take it out before it is uploaded"
            )


def push(upload: Upload, name: str | None, private: bool, revision: str | None) -> str:
    """Upload an adapter as one commit; its address.

    Args:
        upload: what `plan_upload` gave.
        name: `owner/name` on the hub; None: the folder's name, with the user as owner.
        private: make the repository private, if it is new.
        revision: a branch, made if it is not there; None: the main one.

    Raises:
        LorakitError: nobody is logged in, the name is none, or the hub refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    api: Any = HfApi()
    try:
        name = name or f"{api.whoami()['name']}/{upload.folder.resolve().name}"
        if (asked := read_name(name)) is None or asked.revision is not None:
            raise LorakitError(
                f'push: "{name}" is no name on the hub; expected owner/name (and --revision for a branch)'
            )
        api.create_repo(name, private=private or None, exist_ok=True)
        if revision is not None:
            api.create_branch(name, branch=revision, exist_ok=True)
        operations = [CommitOperationAdd(one, str(upload.folder / one)) for one in upload.files]
        done = api.create_commit(name, operations, commit_message="Upload a LoRA adapter", revision=revision)
    except LocalTokenNotFoundError as problem:
        raise LorakitError("push: nobody is logged in to the hub; `hf auth login`, or set HF_TOKEN") from problem
    except HfHubHTTPError as problem:
        status = getattr(problem.response, "status_code", None)
        why = {401: "the token is not accepted: `hf auth login`", 403: "the token may not write there"}.get(
            status or 0, ""
        )
        raise LorakitError(f"push: the hub refuses {name}: {why or first_line(problem)}") from problem
    except (HFValidationError, OSError, ValueError) as problem:
        if isinstance(problem, LorakitError):
            raise
        raise LorakitError(f"push: {first_line(problem)}") from problem
    return str(done.commit_url)
