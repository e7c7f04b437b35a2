"""Adapter folders that somebody has made to hurt the server that reads them."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

CONFIG, TENSORS, OWN = "adapter_config.json", "adapter_model.safetensors", "lorakit.json"
Break = Callable[[Path], None]


def _config(**entries: Any) -> Break:
    def change(folder: Path) -> None:
        found = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(found | entries))

    return change


def _text(name: str, content: str | bytes) -> Break:
    def change(folder: Path) -> None:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return change


def _tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Break:
    def write(folder: Path) -> None:
        save_file(change(load_file(folder / TENSORS)), folder / TENSORS)

    return write


def _instead(name: str, make: Callable[[Path], None]) -> Break:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return change


def _sparse(folder: Path) -> None:
    with (folder / TENSORS).open("r+b") as file:
        file.truncate(50 * 2**30)


def _cut(folder: Path) -> None:
    content = (folder / TENSORS).read_bytes()
    (folder / TENSORS).write_bytes(content[: len(content) // 2])


def _header(folder: Path) -> None:
    size = 17 * 2**20
    with (folder / TENSORS).open("wb") as file:
        file.write(struct.pack("<Q", size) + b"{" + b" " * (size - 2) + b"}")


_NO_FILE = "no regular file"
_SIZE = "which no tensor of"
_SLOW = "takes more than"
_YEARS = r"(.|[a-z]|\w)*\s?[^a-z_.0-9]"
HOSTILE: dict[str, tuple[str, Break]] = {
    "nan": ("NaN|not finite|infinity", _tensors(lambda t: {k: v * float("nan") for k, v in t.items()})),
    "inf": ("NaN|not finite|infinity", _tensors(lambda t: {k: v + float("inf") for k, v in t.items()})),
    "missing": ("", _tensors(lambda t: dict(list(t.items())[2:]))),
    "extra": ("", _tensors(lambda t: {**t, "base_model.model.model.layers.99.q.lora_A.weight": torch.zeros(4, 8)})),
    "odd name": ("", _tensors(lambda t: {**t, "__class__": torch.zeros(1)})),
    "transposed": ("", _tensors(lambda t: {k: v.T.contiguous() for k, v in t.items()})),
    "rank 1e9": (_SIZE, _config(r=10**9)),
    "rank nan": ("", _config(r=float("nan"))),
    "rank pattern": (_SIZE, _config(rank_pattern={"q_proj": 10**8})),
    "vera": (_SIZE, _config(peft_type="VERA", r=10**8, projection_prng_key=0, save_projection=False)),
    "virtual tokens": ("", _config(peft_type="PROMPT_TUNING", num_virtual_tokens=10**12)),
    "redos": (_SLOW, _config(target_modules=_YEARS)),
    "redos pattern": (_SLOW, _config(rank_pattern={_YEARS: 4})),
    "no expression": ("", _config(target_modules="((((")),
    "long expression": ("at most", _config(target_modules="a" * 100_000)),
    "many targets": ("at most|entries|matches|layer", _config(target_modules=[f"x{n}" for n in range(200_000)])),
    "type": ("", _config(peft_type="__import__")),
    "type of no text": ("", _config(peft_type=["LORA"])),
    "deep": ("cannot be read|deep", _text(CONFIG, "[" * 200_000)),
    "deep objects": ("cannot be read|deep", _text(CONFIG, '{"a":' * 300 + "1" + "}" * 300)),
    "own deep": ("cannot be read|deep", _text(OWN, '{"a":' * 3000 + "1" + "}" * 3000)),
    "no utf-8": ("UTF-16", _text(CONFIG, b"\xff\xfe{}")),
    "list": ("", _text(CONFIG, "[]")),
    "huge header": ("safetensors", _text(TENSORS, struct.pack("<Q", 2**62) + b"{}")),
    "long header": ("safetensors", _header),
    "cut": ("safetensors", _cut),
    "empty": ("safetensors", _text(TENSORS, b"")),
    "sparse": ("more than the whole budget", _sparse),
    "folder": (_NO_FILE, _instead(TENSORS, Path.mkdir)),
    "fifo": (_NO_FILE, _instead(TENSORS, os.mkfifo)),
    "own fifo": (_NO_FILE, _instead(OWN, os.mkfifo)),
    "zero": (_NO_FILE, _instead(TENSORS, lambda path: path.symlink_to("/dev/zero"))),
    "template": ("at most", _text("chat_template.jinja", "x" * (2**20 + 1))),
}
"""Name -> (words of the refusal, what is done to a good folder)."""


def make(store: Path, name: str) -> Path:
    """One of them, made of the store's folder "good"."""
    folder = store / name
    shutil.copytree(store / "good", folder)
    if not name.startswith("own"):
        (folder / OWN).unlink()
    HOSTILE[name][1](folder)
    return folder
