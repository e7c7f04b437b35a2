"""Sources of training data: files, folders, patterns and `datasets`, alone or several, and the rows they hold.

A source is a JSONL, JSON, CSV, TSV, Parquet, Arrow or text file, a pattern, a folder of these, a folder that `datasets` saved,
or a `datasets` name. Each is found as its `Origin`s first (which files, how large), then read a row at a time. What is done
about rows that cannot be parsed is decided where rows are used.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import json
import logging
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lorakit.errors import LorakitError, first_line, plural
from lorakit.reading import neighbours
from lorakit.train.config.options import DataOptions
from lorakit.train.config.sources import Source, as_sources
from lorakit.train.data.files import COMPRESSED, READERS, kind_of, read_file, without_nulls
from lorakit.train.data.rows import IN_MEMORY, BadRow, Collected, Indices, Row, Rows

log = logging.getLogger("lorakit.train")

SPLITS = ("train", "validation", "valid", "dev", "test", "eval", "evaluation", "held_out")

UNPACKED = 6
"""How much larger text is than compressed text, about."""


HEAD = 1000
"""Rows of each source by which data that are streamed are known."""


@dataclass(frozen=True)
class Origin:
    """One file, or one dataset, of a source.

    Attributes:
        read: its rows, from the first.
        nbytes: how large they are, about.
        identity: what tells its content from other.
        label_names: as `Rows` has them.
    """

    read: Callable[[], Iterator[Row | BadRow]]
    nbytes: int
    identity: Callable[[], str]
    label_names: tuple[str, ...] | None = None


def load_rows(
    source: str | Path | Source | Sequence[str | Path | Source],
    *,
    split: str = "train",
    subset: str | None = None,
    first: int = 0,
) -> Rows:
    """Reads the rows of a source, or of several one after the other.

    Args:
        source: a file, a folder, or a `datasets` name; or a list of these.
        split: which split of a folder or dataset; a single file has none, and is read whole.
        subset: the configuration of a `datasets` name.
        first: the number of the first source.

    Raises:
        LorakitError: no such source, an unknown kind of file, a file that cannot be read, or no rows in it.
    """
    named = [source] if isinstance(source, str | Path | Source) else list(source)
    if not named:
        raise LorakitError("load_rows: no source was given; name a file, a folder or a dataset")
    found = [origins_of(one, split, subset) for one in named]
    every = [origin for _, origins in found for origin in origins]
    collected = Collected(stored=sum(origin.nbytes for origin in every) > IN_MEMORY)
    for number, (words, origins) in enumerate(found, start=first):
        if not sum([collected.add(origin.read(), number) for origin in origins]):
            raise LorakitError(f"load_rows: {words} holds no rows")
    return Rows(
        collected.rows(),
        tuple(collected.bad),
        ", ".join(words for words, _ in found),
        every[0].label_names,
        tuple(origin.identity for origin in every),
        ("",) * first + tuple(words for words, _ in found),
    )


def origins_of(
    source: str | Path | Source, split: str, subset: str | None, streaming: bool = False
) -> tuple[str, list[Origin]]:
    """A source in words, and the files or the dataset that it is.

    Raises:
        LorakitError: there is none, or it is of no known kind.
    """
    if isinstance(source, Source):
        split, subset = source.split or split, source.subset or subset
        source = source.path
    path = Path(source)
    if not path.exists() and re.search(r"[*?\[]", str(source)):
        matched = [Path(one) for one in sorted(glob.glob(str(source), recursive=True)) if Path(one).is_file()]
        if not matched:
            raise LorakitError(f"load_rows: no file matches {source}")
        return str(source), [_file(one) for one in matched]
    if path.is_file():
        return str(path), [_file(path)]
    if path.is_dir():
        return _folder(path, split)
    if path.suffix.lower() in READERS or not re.fullmatch(r"[\w.\-]+(/[\w.\-]+)?", str(source)):
        near = [p.name for p in path.parent.iterdir() if p.suffix in READERS] if path.parent.is_dir() else []
        raise LorakitError(f"load_rows: there is no file or folder {path}.{neighbours(path, near)}")
    return _named_dataset(str(source), split, subset, streaming)


def _file(path: Path) -> Origin:
    read_file(path)  # refuses a kind that it does not know

    def identity() -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    size = path.stat().st_size * (UNPACKED if path.suffix.lower() in COMPRESSED else 1)
    return Origin(lambda: read_file(path), size, identity)


def _folder(path: Path, split: str) -> tuple[str, list[Origin]]:
    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        return _saved_dataset(path, split)
    for mark, what in (("adapter_config.json", "an adapter"), ("config.json", "a model")):
        if (path / mark).is_file():
            raise LorakitError(f"load_rows: {path} holds {what} ({mark}), and no rows to train on")
    files = sorted(p for p in path.iterdir() if p.is_file() and kind_of(p) in READERS)
    texts = [p for p in files if kind_of(p) in (".txt", ".md")]
    files = [p for p in files if p not in texts] or texts  # a README beside rows is no row
    if not files:
        raise LorakitError(f"load_rows: {path} holds no data files; known are {', '.join(READERS)}")
    named = {p: _split_of(p.stem) for p in files}
    if any(named.values()):  # files named after splits are never mixed: train.jsonl beside test.jsonl
        files = [p for p in files if named[p] == split]
        if not files:
            found = ", ".join(p.name for p in named)
            raise LorakitError(f'load_rows: {path} has no file of the split "{split}"; it holds {found}')
    return str(path), [_file(one) for one in files]


def _split_of(stem: str) -> str | None:
    return next((split for split in SPLITS if re.search(rf"(^|[-_.]){split}($|[-_.])", stem, re.IGNORECASE)), None)


def _datasets() -> Any:
    try:
        import datasets
    except ImportError:
        raise LorakitError("load_rows: reading a dataset by name needs datasets: pip install datasets") from None
    return datasets


def _saved_dataset(path: Path, split: str) -> tuple[str, list[Origin]]:
    datasets = _datasets()
    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:
        raise LorakitError(f"load_rows: {path} is not a whole saved dataset: {error}") from error
    return _from_dataset(loaded, split, str(path))


def _named_dataset(name: str, split: str, subset: str | None, streaming: bool) -> tuple[str, list[Origin]]:
    datasets = _datasets()
    try:
        loaded = datasets.load_dataset(name, subset, split=split, **({"streaming": True} if streaming else {}))
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


def _from_dataset(loaded: Any, split: str, source: str) -> tuple[str, list[Origin]]:
    if isinstance(loaded, dict):
        if split not in loaded:
            raise LorakitError(f'load_rows: {source} has no split "{split}"; it has {", ".join(map(str, loaded))}')
        loaded = loaded[split]
    feature = (loaded.features or {}).get("label")
    names = tuple(getattr(feature, "names", None) or ()) or None

    def read() -> Iterator[Row | BadRow]:
        for number, fields in enumerate(loaded, start=1):
            yield Row(without_nulls(fields), f"{source}[{split}], row {number}")

    nbytes = getattr(getattr(loaded, "data", None), "nbytes", None) or 0
    origin = Origin(read, int(nbytes), lambda: str(getattr(loaded, "_fingerprint", source)), names)
    return f"{source} ({split})", [origin]


def load_splits(options: DataOptions) -> tuple[Rows, Rows | None]:
    """The rows to train on and those to evaluate on, shuffled, held out, interleaved and limited as the options say.

    Raises:
        LorakitError: a source cannot be read; both would be the same rows; or nothing is left to train on.
    """
    if options.streaming:
        rows = head_rows(options)
    else:
        rows = load_rows(options.train_sources, split=options.split, subset=options.subset)
    if options.shuffle_seed is not None and not options.streaming:
        rows = rows.shuffled(options.shuffle_seed)
    evaluation: Rows | None = None
    if options.evaluation is not None or options.evaluation_split is not None:
        source = options.train if options.evaluation is None else options.evaluation
        split = options.evaluation_split or options.split
        named = ", ".join(one.path for one in as_sources(source))
        trained = f"the rows that are trained on ({named}, split {split}); name others, or give data.evaluation_size"
        if source == options.train and split == options.split:
            raise LorakitError(f"data.evaluation names {trained}")
        sources = options.evaluation_sources or tuple(one.replace(split=split) for one in options.train_sources)
        first = len(options.train_sources) if options.evaluation_sources else 0
        evaluation = load_rows(sources, split=split, subset=options.subset, first=first)
        if not options.streaming:
            _compare(rows, evaluation, trained)
    elif options.evaluation_size:
        size = options.evaluation_size
        held = int(size) if size >= 1 else max(1, round(size * len(rows)))
        if held >= len(rows):
            raise LorakitError(f"data.evaluation_size holds out {held} rows, but there are only {len(rows)}")
        evaluation, rows = rows.take(rows.rows[:held], ()), rows.take(rows.rows[held:])
    if evaluation is not None and options.evaluation_limit is not None:
        evaluation = evaluation.take(evaluation.rows[: options.evaluation_limit])
    if options.streaming:
        return rows, evaluation
    if options.mix != "concatenate":
        return interleaved(rows, options), evaluation
    if options.limit is not None:
        rows = rows.take(rows.rows[: options.limit])
    return rows, evaluation


def _compare(rows: Rows, evaluation: Rows, trained: str) -> None:
    """Refuses rows to evaluate on that are those to train on, by content, and tells of some that are."""
    known, asked = _contents(rows), _contents(evaluation)
    seen = int(np.isin(asked, known).sum())
    if seen == len(asked) and len(np.unique(asked)) == len(np.unique(known)):
        raise LorakitError(f"data.evaluation holds {trained}")
    if seen:
        log.warning(
            "data.evaluation: %s of %s are trained on too, so that the evaluation looks better than it is",
            f"{seen:,}",
            plural(len(evaluation), "row"),
        )


def _contents(rows: Rows) -> Indices:
    """What each row holds, as a number by which two rows can be compared."""
    written = (json.dumps(row.fields, sort_keys=True, default=str) for _, chunk in rows.chunks() for row in chunk)
    return np.fromiter(map(hash, written), np.int64, len(rows))


def streamed_origins(options: DataOptions) -> list[tuple[str, list[Origin]]]:
    """Each source to train on in words, and the files or the dataset that it is, read as they come."""
    return [origins_of(one, options.split, options.subset, streaming=True) for one in options.train_sources]


def read_all(origins: Sequence[Origin], number: int) -> Iterator[Row | BadRow]:
    """The rows of a source with its number."""
    for origin in origins:
        for one in origin.read():
            yield one if isinstance(one, BadRow) else Row(one.fields, one.where, number)


def head_rows(options: DataOptions) -> Rows:
    """The first rows of each source that is streamed, by which it is known.

    Raises:
        LorakitError: a source holds no rows.
    """
    found = streamed_origins(options)
    rows: list[Row] = []
    bad: list[BadRow] = []
    names: list[str] = []
    for number, (words, origins) in enumerate(found):
        read = list(itertools.islice(read_all(origins, number), HEAD))
        rows += [one for one in read if isinstance(one, Row)]
        bad += [one for one in read if isinstance(one, BadRow)]
        if not read:
            raise LorakitError(f"load_rows: {words} holds no rows")
        names.append(f"{words} (streamed; the first {plural(len(read), 'row')})")
    return Rows(tuple(rows), tuple(bad), ", ".join(names), names=tuple(names))


def interleaved(rows: Rows, options: DataOptions) -> Rows:
    """The rows in the order in which sources are drawn, each time one of them by its weight."""
    sources = rows.sources
    queues = [np.flatnonzero(sources == number) for number in range(len(options.train_sources))]
    for queue, source in zip(queues, options.train_sources, strict=True):
        if not len(queue):
            raise LorakitError(f"data.mix: no row is left of {source.path} to draw; hold out fewer rows")
    drawn = draws(options, [len(queue) for queue in queues], options.shuffle_seed or 0)
    order = np.fromiter(
        (queues[number][at % len(queues[number])] for number, at in itertools.islice(drawn, options.limit)), np.int64
    )
    kept = np.unique(order)  # rows that were not drawn are not prepared
    places = np.searchsorted(kept, order)
    return replace(rows.pick(kept), order=places)


def draws(options: DataOptions, lengths: Sequence[int], seed: int) -> Iterator[tuple[int, int]]:
    """(source, how many of it came before), one after the other, until the first source is exhausted or all are."""
    every = options.mix == "all-exhausted"
    drawing, taken, weights = random.Random(seed), [0] * len(lengths), options.weights
    open_ones = set(range(len(lengths)))
    while open_ones:
        [number] = drawing.choices(range(len(lengths)), weights)
        yield number, taken[number]
        taken[number] += 1
        if taken[number] == lengths[number]:
            open_ones.discard(number)
            if not every:
                return
