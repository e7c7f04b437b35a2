"""Kinds of files and how their rows are read, one after another, so that a file need not fit into memory.

JSONL, JSON, CSV, TSV, Parquet, Arrow and texts, and all but Parquet and Arrow compressed. A line that cannot be parsed does not
stop the reading; it becomes a `BadRow` that says why. A `.json` file that holds one value is read as a whole text.
"""

from __future__ import annotations

import bz2
import contextlib
import csv
import gzip
import io
import json
import lzma
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from lorakit.errors import LorakitError, first_line, plural
from lorakit.reading import decoded, refuse_encoding
from lorakit.train.data.rows import BadRow, Row


def _open_zst(path: Path) -> IO[bytes]:
    import pyarrow  # type: ignore[import-untyped]

    stream: Any = pyarrow
    opened: Any = io.BufferedReader(stream.CompressedInputStream(stream.OSFile(str(path)), "zstd"))
    return opened  # type: ignore[no-any-return]


COMPRESSED: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _open_zst
}  # fmt: skip
"""Ways of compression by suffix: rows.jsonl.gz."""


def kind_of(path: Path) -> str:
    """The suffix that says what a file holds, behind that of its compression."""
    name = path.name.lower()
    suffix = Path(name).suffix
    return Path(Path(name).stem).suffix if suffix in COMPRESSED else suffix


def read_file(path: Path) -> Iterator[Row | BadRow]:
    """The rows of a file, as they are read.

    Raises:
        LorakitError: an unknown kind of file (at once), or one that cannot be read.
    """
    reader = READERS.get(kind_of(path))
    if reader is None:
        raise LorakitError(
            f"load_rows: {path} is not of a known kind; known are {', '.join(READERS)}, and these compressed "
            f"({', '.join(COMPRESSED)})"
        )
    return _guarded(reader, path)


def _guarded(reader: Callable[[Path], Iterator[Row | BadRow]], path: Path) -> Iterator[Row | BadRow]:
    """The rows of a file; the errors of reading and of decompressing as lorakit's."""
    try:
        yield from reader(path)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        if path.suffix.lower() in COMPRESSED:
            raise LorakitError(f"load_rows: {path} is not a whole {path.suffix} file: {first_line(error)}") from None
        raise LorakitError(f"load_rows: {path} cannot be read: {error}") from error


def _opened(path: Path) -> IO[bytes]:
    """A file's content, decompressed, from its beginning."""
    opener = COMPRESSED.get(path.suffix.lower())
    opened: Any = path.open("rb") if opener is None else opener(path)
    refuse_encoding(opened.peek(4096), f"load_rows: {path}")
    return opened  # type: ignore[no-any-return]


def _row(value: Any, where: str) -> Row | BadRow:
    if isinstance(value, dict):
        return Row(value, where)
    return BadRow(where, f"expected an object with columns, found {_kind(value)}")


def _kind(value: Any) -> str:
    kinds = {str: "text", list: "a list", dict: "an object", type(None): "null", bool: "true or false"}
    return kinds.get(type(value), f"a number ({value})" if isinstance(value, int | float) else type(value).__name__)


def _read_json_lines(path: Path) -> Iterator[Row | BadRow]:
    # Bytes are split at line feeds alone: text may hold U+2028 and its kin, which str.splitlines would split at.
    with _opened(path) as file:
        for number, line in enumerate(file, start=1):
            raw = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            where = f"{path}, line {number}"
            if not raw.strip():
                continue
            try:
                yield _row(json.loads(raw.decode("utf-8")), where)
            except UnicodeDecodeError as error:
                yield BadRow(where, f"not UTF-8 text (byte {error.start + 1})")
            except json.JSONDecodeError as error:
                hint = "; a .jsonl file has one object on each line, and one JSON list is a .json file" * (number == 1)
                yield BadRow(where, f"not JSON: {error.msg} at column {error.colno}{hint}")
            except RecursionError:
                yield BadRow(where, "not usable JSON: nested too deeply")


def _decoded(path: Path) -> str:
    with _opened(path) as file:
        return decoded(file.read(), f"load_rows: {path}")


def _read_json(path: Path) -> Iterator[Row | BadRow]:
    text = _decoded(path)
    start = len(text) - len(text.lstrip())
    if text[start : start + 1] != "[":
        if (inner := _list_inside(text)) is not None:  # {"data": [...]}
            name, values = inner
            for number, value in enumerate(values, start=1):
                yield _row(value, f"{path}, item {number} of {name}")
            return
        yield from _read_json_lines(path)  # many a .json file holds an object per line
        return
    decoder = json.JSONDecoder()
    blank = re.compile(r"[\s,]*")
    position, line, counted = start + 1, 1, 0
    while True:
        match = blank.match(text, position)
        position = match.end() if match else position
        line += text.count("\n", counted, position)
        counted = position
        if text[position : position + 1] == "]":
            return
        try:
            value, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            # What follows a broken item cannot be told apart from it, so the file as a whole is refused.
            place = f"{path}, line {error.lineno}"
            raise LorakitError(f"load_rows: {place}: not JSON: {error.msg} at column {error.colno}") from None
        yield _row(value, f"{path}, line {line}")


def _list_inside(text: str) -> tuple[str, list[Any]] | None:
    """The list of objects that a JSON object holds, if it holds one, and its name."""
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError):
        return None
    lists = [
        (name, value)
        for name, value in (whole.items() if isinstance(whole, dict) else ())
        if isinstance(value, list) and value and all(isinstance(one, dict) for one in value)
    ]
    # a row of messages is itself an object with one list of objects
    return (
        lists[0] if len(lists) == 1 and len(whole) == 1 and lists[0][0] not in ("messages", "conversations") else None
    )


def _read_text(path: Path) -> Iterator[Row | BadRow]:
    text = _decoded(path)
    if text.strip():
        yield Row({"text": text}, str(path))


def _read_table(path: Path) -> Iterator[Row | BadRow]:
    with _opened(path) as file:  # semicolons are what spreadsheets write where the comma is in numbers
        head = file.readline().decode("utf-8", "replace")
    delimiter = "\t" if kind_of(path) == ".tsv" else next((one for one in ",;\t|" if one in head), ",")
    limit = csv.field_size_limit(sys.maxsize)  # the default refuses texts above 128 KiB
    try:
        text = io.TextIOWrapper(_opened(path), encoding="utf-8-sig", newline="")
        reader = csv.reader(text, delimiter=delimiter, strict=True)
        header: list[str] | None = None
        line = 1
        for cells in reader:
            where, line = f"{path}, line {line}", reader.line_num + 1
            if not cells:
                continue
            if header is None:
                header = [cell.strip() for cell in cells]
                if len(set(header)) < len(header):
                    twice = next(name for name in header if header.count(name) > 1)
                    raise LorakitError(f'load_rows: {where}: the column "{twice}" is named twice')
            elif len(cells) != len(header):
                yield BadRow(
                    where, f"{plural(len(cells), 'cell')} under {plural(len(header), 'column')} ({', '.join(header)})"
                )
            else:
                yield Row(dict(zip(header, cells, strict=True)), where)
    except UnicodeDecodeError as error:
        with _opened(path) as file:  # which line that is, is found by reading again
            for number, raw in enumerate(file, start=1):
                with contextlib.suppress(UnicodeDecodeError):
                    raw.decode()
                    continue
                raise LorakitError(
                    f"load_rows: {path}, line {number}: not UTF-8 text; save the file as UTF-8."
                ) from None
        raise LorakitError(f"load_rows: {path}: not UTF-8 text ({error})") from None
    except csv.Error as error:
        raise LorakitError(f"load_rows: {path}, line {line}: not CSV: {error}") from None
    finally:
        csv.field_size_limit(limit)


def _read_parquet(path: Path) -> Iterator[Row | BadRow]:
    try:
        import pyarrow
        import pyarrow.parquet  # type: ignore[import-untyped]
    except ImportError:
        raise LorakitError("load_rows: reading Parquet needs pyarrow: pip install pyarrow") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield from _rows_of(file.iter_batches(1024), path)
    except (pyarrow.ArrowException, OSError) as error:
        raise LorakitError(f"load_rows: {path} is not a whole Parquet file: {first_line(error)}") from None


def _rows_of(batches: Iterable[Any], path: Path) -> Iterator[Row]:
    fields = (one for batch in batches for one in batch.to_pylist())
    for number, one in enumerate(fields, start=1):
        yield Row(without_nulls(one), f"{path}, row {number}")


def _read_arrow(path: Path) -> Iterator[Row | BadRow]:
    try:
        import pyarrow
        import pyarrow.ipc  # type: ignore[import-untyped]
    except ImportError:
        raise LorakitError("load_rows: reading Arrow needs pyarrow: pip install pyarrow") from None
    try:
        with pyarrow.memory_map(str(path)) as file:
            try:
                reader = pyarrow.ipc.open_file(file)
                batches: Iterable[Any] = map(reader.get_batch, range(reader.num_record_batches))
            except pyarrow.ArrowInvalid:  # as `datasets` keeps them
                file.seek(0)
                batches = pyarrow.ipc.open_stream(file)
            yield from _rows_of(batches, path)
    except pyarrow.ArrowException as error:
        raise LorakitError(f"load_rows: {path} is not a whole Arrow file: {first_line(error)}") from None


def without_nulls(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A row of Arrow's without the keys that other rows brought: it gives every object the keys of all, null where one has
    none. A column that is null stays, since whoever uses it says that it is empty."""

    def inner(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: inner(item) for key, item in value.items() if item is not None}
        return [inner(item) for item in value] if isinstance(value, list) else value

    return {key: inner(value) for key, value in fields.items()}


READERS: dict[str, Callable[[Path], Iterator[Row | BadRow]]] = {
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_table,
    ".tsv": _read_table,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
    ".txt": _read_text,
    ".md": _read_text,
}
"""Kinds of files by their suffix."""
