"""Files that others wrote: read whole or refused in words. The one place that knows how a text, a JSON file or a safetensors
file can be broken, and what is near a name that does not exist.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lorakit.errors import LorakitError, first_line, nearest

KINDS = {
    str: "text", list: "a list", dict: "an object", type(None): "null", bool: "true or false", int: "a number",
    float: "a number",
}  # fmt: skip
"""JSON's types in words."""


def neighbours(path: Path, known: Iterable[str]) -> str:
    """A sentence, with a space before it, about what is beside a path that does not exist, the likest name first; empty where
    nothing is."""
    names = sorted(known)
    near = nearest(path.name, names, 3, 0.6)
    listed = [*near, *(name for name in names if name not in near)]
    if not listed:
        return ""
    if names == near[:1]:
        return f' Did you mean "{path.parent / near[0]}"?'
    hint = f' Did you mean "{path.parent / near[0]}"?' if near else ""
    more = f" and {len(listed) - 8} more" if len(listed) > 8 else ""
    place = "The current folder" if path.parent == Path() else path.parent
    return f"{hint} {place} has {', '.join(listed[:8])}{more}."


def read_text(path: str | Path, verb: str) -> str:
    """The text of a file in UTF-8, with or without a byte order mark.

    Raises:
        LorakitError: there is no such file, it is a folder, may not be read, or is not UTF-8.
    """
    path = Path(path).expanduser()
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        beside = path.parent.iterdir() if path.parent.is_dir() else ()
        same = [one.name for one in beside if one.suffix == path.suffix and one.is_file()]
        raise LorakitError(f"{verb}: there is no file {path}.{neighbours(path, same)}") from None
    except IsADirectoryError:
        raise LorakitError(f"{verb}: {path} is a folder; a file is expected.") from None
    except OSError as problem:
        raise LorakitError(f"{verb}: {path} cannot be read ({os.strerror(problem.errno or 0)}).") from problem
    return decoded(raw, f"{verb}: {path}")


def decoded(raw: bytes, where: str) -> str:
    """Bytes as text in UTF-8; LorakitError, which begins with `where`, if they are not."""
    refuse_encoding(raw, where)
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise LorakitError(f"{where}, line {line}: not UTF-8 text; save the file as UTF-8.") from None


def refuse_encoding(raw: bytes, where: str) -> None:
    """LorakitError where a file begins as no text in UTF-8 does."""
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise LorakitError(f"{where} looks like UTF-16; save it as UTF-8.")
    if b"\0" in raw[:4096]:
        raise LorakitError(
            f"{where} is no text file: it holds zero bytes. If it is UTF-16 or UTF-32, save it as UTF-8."
        )


def read_json(path: Path, verb: str) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        LorakitError: it cannot be read, is cut short or otherwise no JSON, or holds something else.
    """
    text = read_text(path, verb)
    try:
        value = json.loads(text)
    except ValueError as problem:
        short = "; it is empty" if not text.strip() else ""
        raise LorakitError(f"{verb}: {path} is not JSON ({problem}){short}. Copy or save it again.") from problem
    except RecursionError:
        raise LorakitError(f"{verb}: {path} is nested too deeply to be read.") from None
    if not isinstance(value, dict):
        raise LorakitError(f"{verb}: {path} holds {KINDS[type(value)]}; an object is expected.")
    return value


@contextmanager
def whole_tensors(path: Path, verb: str) -> Iterator[None]:
    """Around the reading of a safetensors file: what is wrong with it in words."""
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, OSError, RuntimeError) as problem:
        raise LorakitError(
            f"{verb}: {path} is no whole safetensors file ({first_line(problem)}). Copy or save it again."
        ) from problem
