"""Rows of training data, each with the file and line it came from.

Sources are JSONL, JSON, CSV, TSV, Parquet, Arrow and text files, patterns, folders of these, folders that `datasets` saved,
and `datasets` names. Everything is read into memory: fine-tuning data is small beside the model. A line that cannot be parsed
does not stop the reading; it becomes a `BadRow` that says why, and what is done about it is decided where rows are used.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import random
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.errors import LorakitError, first_line, plural
from lorakit.reading import decoded, neighbours, refuse_encoding

SPLITS = ("train", "validation", "valid", "dev", "test", "eval", "evaluation", "held_out")


@dataclass(frozen=True, slots=True)
class Row:
    """One row: its columns, and where it stands ("reviews.jsonl, line 12")."""

    fields: Mapping[str, Any]
    where: str


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be used, and why."""

    where: str
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


@dataclass(frozen=True)
class Rows:
    """The rows of a source.

    Attributes:
        rows: the readable ones, in order.
        bad: the unreadable ones.
        source: the source in words.
        label_names: the names of a dataset's integer labels, where it has them.
    """

    rows: tuple[Row, ...]
    bad: tuple[BadRow, ...] = ()
    source: str = ""
    label_names: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that any row has, in order of appearance."""
        return tuple(dict.fromkeys(name for row in self.rows for name in row.fields))

    def take(self, rows: Sequence[Row], bad: Sequence[BadRow] | None = None) -> Rows:
        """The same source with other rows."""
        return Rows(tuple(rows), self.bad if bad is None else tuple(bad), self.source, self.label_names)

    def shuffled(self, seed: int) -> Rows:
        """The rows in an order drawn from `seed`, the same on every machine."""
        order = list(self.rows)
        random.Random(seed).shuffle(order)
        return self.take(order)


def load_rows(source: str | Path | Sequence[str | Path], *, split: str = "train", subset: str | None = None) -> Rows:
    """Reads the rows of a source, or of several one after the other.

    Args:
        source: a file, a folder, or a `datasets` name; or a list of these.
        split: which split of a folder or dataset; a single file has none, and is read whole.
        subset: the configuration of a `datasets` name.

    Raises:
        LorakitError: no such source, an unknown kind of file, a file that cannot be read, or no rows in it.
    """
    if not isinstance(source, str | Path):
        parts = [load_rows(one, split=split, subset=subset) for one in source]
        if not parts:
            raise LorakitError("load_rows: no source was given; name a file, a folder or a dataset")
        return _joined(parts, ", ".join(part.source for part in parts))
    path = Path(source)
    if not path.exists() and re.search(r"[*?\[]", str(source)):
        matched = sorted(one for one in path.parent.glob(path.name) if one.is_file())
        if not matched:
            raise LorakitError(f"load_rows: no file matches {source}")
        return _joined([_read_file(one) for one in matched], str(source))
    if path.is_file():
        found = _read_file(path)
    elif path.is_dir():
        found = _read_folder(path, split)
    elif path.suffix.lower() in READERS or not re.fullmatch(r"[\w.\-]+(/[\w.\-]+)?", str(source)):
        near = [p.name for p in path.parent.iterdir() if p.suffix in READERS] if path.parent.is_dir() else []
        raise LorakitError(f"load_rows: there is no file or folder {path}.{neighbours(path, near)}")
    else:
        found = _read_dataset(str(source), split, subset)
    if not found.rows and not found.bad:
        raise LorakitError(f"load_rows: {found.source} holds no rows")
    return found


def _read_file(path: Path) -> Rows:
    reader = READERS.get(_kind_of(path))
    if reader is None:
        raise LorakitError(
            f"load_rows: {path} is not of a known kind; known are {', '.join(READERS)}, and these compressed "
            f"({', '.join(COMPRESSED)})"
        )
    try:
        found = list(reader(path))
    except OSError as error:
        raise LorakitError(f"load_rows: {path} cannot be read: {error}") from error
    bad = tuple(one for one in found if isinstance(one, BadRow))
    return Rows(tuple(one for one in found if isinstance(one, Row)), bad, str(path))


COMPRESSED: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.decompress, ".bz2": bz2.decompress, ".xz": lzma.decompress
}  # fmt: skip
"""Ways of compression by suffix: rows.jsonl.gz."""


def _kind_of(path: Path) -> str:
    """The suffix that says what a file holds, behind that of its compression."""
    name = path.name.lower()
    suffix = Path(name).suffix
    return Path(Path(name).stem).suffix if suffix in COMPRESSED else suffix


def _bytes(path: Path) -> bytes:
    """A file's content, decompressed."""
    raw = path.read_bytes()
    if path.suffix.lower() in COMPRESSED:
        try:
            raw = COMPRESSED[path.suffix.lower()](raw)
        except (OSError, EOFError, ValueError, lzma.LZMAError) as error:
            raise LorakitError(f"load_rows: {path} is not a whole {path.suffix} file: {first_line(error)}") from None
    refuse_encoding(raw, f"load_rows: {path}")
    return raw


def _row(value: Any, where: str) -> Row | BadRow:
    if isinstance(value, dict):
        return Row(value, where)
    return BadRow(where, f"expected an object with columns, found {_kind(value)}")


def _kind(value: Any) -> str:
    kinds = {str: "text", list: "a list", dict: "an object", type(None): "null", bool: "true or false"}
    return kinds.get(type(value), f"a number ({value})" if isinstance(value, int | float) else type(value).__name__)


def _read_json_lines(path: Path) -> Iterator[Row | BadRow]:
    # Bytes are split at line feeds alone: text may hold U+2028 and its kin, which str.splitlines would split at.
    for number, raw in enumerate(_bytes(path).removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        where = f"{path}, line {number}"
        if not raw.strip():
            continue
        try:
            yield _row(json.loads(raw.decode("utf-8")), where)
        except UnicodeDecodeError as error:
            yield BadRow(where, f"not UTF-8 text (byte {error.start + 1})")
        except json.JSONDecodeError as error:
            hint = (
                "; a .jsonl file has one object on each line, and one JSON list is a .json file" if number == 1 else ""
            )
            yield BadRow(where, f"not JSON: {error.msg} at column {error.colno}{hint}")
        except RecursionError:
            yield BadRow(where, "not usable JSON: nested too deeply")


def _decoded(path: Path) -> str:
    return decoded(_bytes(path), f"load_rows: {path}")


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
    text = _decoded(path)
    head = text.split("\n", 1)[0]  # semicolons are what spreadsheets write where the comma is in numbers
    delimiter = "\t" if _kind_of(path) == ".tsv" else next((one for one in ",;\t|" if one in head), ",")
    limit = csv.field_size_limit(sys.maxsize)  # the default refuses texts above 128 KiB
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
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
    except csv.Error as error:
        raise LorakitError(f"load_rows: {path}, line {line}: not CSV: {error}") from None
    finally:
        csv.field_size_limit(limit)


def _read_parquet(path: Path) -> Iterator[Row | BadRow]:
    try:
        import pyarrow  # type: ignore[import-untyped]
        import pyarrow.parquet  # type: ignore[import-untyped]
    except ImportError:
        raise LorakitError("load_rows: reading Parquet needs pyarrow: pip install pyarrow") from None
    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise LorakitError(f"load_rows: {path} is not a whole Parquet file: {first_line(error)}") from None
    yield from _rows_of(table, path)


def _rows_of(table: Any, path: Path) -> Iterator[Row]:
    for number, fields in enumerate(table.to_pylist(), start=1):
        yield Row(_without_nulls(fields), f"{path}, row {number}")


def _read_arrow(path: Path) -> Iterator[Row | BadRow]:
    try:
        import pyarrow
        import pyarrow.ipc  # type: ignore[import-untyped]
    except ImportError:
        raise LorakitError("load_rows: reading Arrow needs pyarrow: pip install pyarrow") from None
    try:
        with pyarrow.memory_map(str(path)) as file:
            try:
                table = pyarrow.ipc.open_file(file).read_all()
            except pyarrow.ArrowInvalid:  # as `datasets` keeps them
                file.seek(0)
                table = pyarrow.ipc.open_stream(file).read_all()
            yield from _rows_of(table, path)
    except pyarrow.ArrowException as error:
        raise LorakitError(f"load_rows: {path} is not a whole Arrow file: {first_line(error)}") from None


def _without_nulls(fields: Mapping[str, Any]) -> dict[str, Any]:
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


def _read_folder(path: Path, split: str) -> Rows:
    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        return _saved_dataset(path, split)
    for mark, what in (("adapter_config.json", "an adapter"), ("config.json", "a model")):
        if (path / mark).is_file():
            raise LorakitError(f"load_rows: {path} holds {what} ({mark}), and no rows to train on")
    files = sorted(p for p in path.iterdir() if p.is_file() and _kind_of(p) in READERS)
    texts = [p for p in files if _kind_of(p) in (".txt", ".md")]
    files = [p for p in files if p not in texts] or texts  # a README beside rows is no row
    if not files:
        raise LorakitError(f"load_rows: {path} holds no data files; known are {', '.join(READERS)}")
    named = {p: _split_of(p.stem) for p in files}
    if any(named.values()):  # files named after splits are never mixed: train.jsonl beside test.jsonl
        files = [p for p in files if named[p] == split]
        if not files:
            found = ", ".join(p.name for p in named)
            raise LorakitError(f'load_rows: {path} has no file of the split "{split}"; it holds {found}')
    return _joined([_read_file(p) for p in files], str(path))


def _joined(parts: Sequence[Rows], source: str) -> Rows:
    rows, bad = (tuple(row for part in parts for row in getattr(part, kind)) for kind in ("rows", "bad"))
    return Rows(rows, bad, source, parts[0].label_names)


def _split_of(stem: str) -> str | None:
    return next((split for split in SPLITS if re.search(rf"(^|[-_.]){split}($|[-_.])", stem, re.IGNORECASE)), None)


def _datasets() -> Any:
    try:
        import datasets
    except ImportError:
        raise LorakitError("load_rows: reading a dataset by name needs datasets: pip install datasets") from None
    return datasets


def _saved_dataset(path: Path, split: str) -> Rows:
    datasets = _datasets()
    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:
        raise LorakitError(f"load_rows: {path} is not a whole saved dataset: {error}") from error
    return _from_dataset(loaded, split, str(path))


def _read_dataset(name: str, split: str, subset: str | None) -> Rows:
    datasets = _datasets()
    try:
        loaded = datasets.load_dataset(name, subset, split=split)
    except Exception as error:  # datasets raises a dozen kinds; each is said with what would work
        first = first_line(error)
        offline = isinstance(error, ConnectionError | TimeoutError) or "offline" in first.lower()
        if offline or "couldn't reach" in first.lower() or "connection" in first.lower():
            raise LorakitError(
                f'load_rows: "{name}" is no file or folder here, and the hub cannot be reached ({first}). Check the path, or '
                "download the dataset first and give its folder."
            ) from error
        raise LorakitError(
            f'load_rows: the dataset "{name}" (split "{split}") cannot be loaded: {first}. Is it a local file? Check its path.'
        ) from error
    return _from_dataset(loaded, split, name)


def _from_dataset(loaded: Any, split: str, source: str) -> Rows:
    if isinstance(loaded, dict):
        if split not in loaded:
            raise LorakitError(f'load_rows: {source} has no split "{split}"; it has {", ".join(map(str, loaded))}')
        loaded = loaded[split]
    feature = (loaded.features or {}).get("label")
    names = tuple(getattr(feature, "names", None) or ()) or None
    rows = (
        Row(_without_nulls(fields), f"{source}[{split}], row {number}") for number, fields in enumerate(loaded, start=1)
    )
    return Rows(tuple(rows), (), f"{source} ({split})", names)
