"""What the files of an adapter's folder may be before any of them is read: whoever may put a folder into the store must not
be able to hang or to fill the server by it.

Regular files of a bounded size; JSON of a bounded depth; sizes in the configuration that the tensors' own header bears out,
since tensors are built by the configuration before they are filled. Regular expressions have their time limit where they are
matched (`core/patterns.py`), chat templates where they are rendered (`http/text.py`).
"""

from __future__ import annotations

import json
import stat
import struct
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

from lorakit.errors import LorakitError
from lorakit.files.bundle import CONFIG, OWN, TENSORS
from lorakit.files.prompt import PROMPT, TEMPLATE
from lorakit.reading import read_json

JSON_BYTES, HEADER_BYTES, TEMPLATE_BYTES = 16 * 2**20, 16 * 2**20, 2**20
TOKENIZER_BYTES = 128 * 2**20
DEPTH = 64
NUMBERS = 100_000
"""Entries of the configuration together."""

RANKS = frozenset({"r", "rank", "init_r", "initial_rank", "target_r", "rank_pattern"})
SIZES = frozenset(
    {"num_vectors", "vector_length", "num_virtual_tokens", "adapter_len", "n_frequency", "n_frequency_pattern", "token_dim",
     "encoder_hidden_size", "block_size", "oft_block_size", "boft_block_size", "boft_block_num"}
)  # fmt: skip
"""Entries that decide how large a tensor is built: by its rank, and by its size as a whole."""

SMALL = 256
"""Sizes up to this one need no tensor that shows them: some methods keep less than they were built with."""

LOOSE = frozenset({"LOKR", "OFT", "BOFT", "RANDLORA"})
"""PEFT's types whose `r` is no side of a tensor: a count of blocks or bases, or more than the whole where a factor is whole."""


def check_files(folder: Path) -> None:
    """Look at an adapter's folder from outside.

    Raises:
        LorakitError: a file is no file, too large, nested too deep, or says of the tensors what their header does not.
    """
    limits = {CONFIG: JSON_BYTES, OWN: JSON_BYTES, TEMPLATE: TEMPLATE_BYTES}
    for name in (CONFIG, TENSORS, OWN, *PROMPT):
        try:
            status = (folder / name).stat()
        except FileNotFoundError:
            continue
        except OSError as problem:
            raise LorakitError(f"{name} cannot be looked at ({problem.strerror}).") from None
        if not stat.S_ISREG(status.st_mode):
            raise LorakitError(f"{name} is no regular file.")
        most = limits.get(name, TOKENIZER_BYTES if name in PROMPT else None)
        if most is not None and status.st_size > most:
            raise LorakitError(f"{name} has {status.st_size:,} bytes; {most:,} at most.")
    shapes = _shapes(folder / TENSORS)
    found = {name: _json(folder / name) for name in (CONFIG, OWN) if (folder / name).is_file()}
    kind = found.get(CONFIG, {}).get("peft_type")
    for name, config in found.items():
        _check_sizes(name, config, shapes, str(kind) in LOOSE)


def without_path(text: str, folder: Path) -> str:
    """A message for others than the operator: the folder by its name alone."""
    for place in (folder, folder.absolute(), folder.resolve()):
        text = text.replace(str(place), folder.name)
    return text


def _json(file: Path) -> dict[str, Any]:
    value = read_json(file, "load")
    for count, (depth, _, _) in enumerate(_entries(value)):
        if depth > DEPTH:
            raise LorakitError(f"{file.name} is nested more than {DEPTH} deep.")
        if count > NUMBERS:
            raise LorakitError(f"{file.name} has more than {NUMBERS:,} entries.")
    return value


def _entries(value: Any) -> Iterator[tuple[int, str, Any]]:
    """(depth, key, value) of everything in a JSON value."""
    left: list[tuple[int, str, Any]] = [(0, "", value)]
    while left:
        depth, key, one = left.pop()
        yield depth, key, one
        if isinstance(one, Mapping):
            left += [(depth + 1, str(name), inner) for name, inner in one.items()]
        elif isinstance(one, list):
            left += [(depth + 1, key, inner) for inner in one]


def _shapes(file: Path) -> list[tuple[int, ...]]:
    """The shapes of the tensors, from the header of their file."""
    if not file.is_file():
        return []
    with file.open("rb") as opened:
        start = opened.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 0 < length <= HEADER_BYTES:
            raise LorakitError(f"{file.name} is no whole safetensors file: its header has {length:,} bytes.")
        header = opened.read(length)
    try:
        found = json.loads(header)
        shapes = [tuple(map(abs, map(int, one["shape"]))) for name, one in found.items() if name != "__metadata__"]
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError):
        raise LorakitError(f"{file.name} is no whole safetensors file: its header cannot be read.") from None
    return shapes


def _check_sizes(name: str, config: Mapping[str, Any], shapes: list[tuple[int, ...]], loose: bool) -> None:
    """Every size that is said is one that a tensor of the file can have."""
    numbers = max(map(prod, shapes), default=0)
    # a factor's rank is its smaller side; behind it stand the sides of a convolution's kernel
    sides = [sorted(shape)[-2] for shape in shapes if len(shape) > 1] or [max(shape, default=1) for shape in shapes]
    rank = max([SMALL, numbers if loose else 0, *sides])
    for _, key, value in _entries(config):
        for most, names in ((rank, RANKS), (max(SMALL, numbers), SIZES)):
            sizes = value.values() if isinstance(value, Mapping) else [value]
            for size in sizes if key in names else ():
                if isinstance(size, int | float) and not isinstance(size, bool) and not size <= most:
                    raise LorakitError(f"{name} says {key} = {size}, which no tensor of {TENSORS} bears out.")
