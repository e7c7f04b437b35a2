"""The folder of adapters that a server offers: their names, what is known of each, and whether its files have changed.

A name is that of one folder within the store: no path, no parent, nothing hidden. Where an adapter is in memory is for the
engine to say (`engine/pool.py`, or `remote/folders.py` where the engine is another process).
"""

from __future__ import annotations

import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from lorakit.files.bundle import CONFIG, CONTENT
from lorakit.files.folder import Stamp, stamp_of
from lorakit.serve.request import AdapterInfo, Refused, UnknownAdapter

log = logging.getLogger("lorakit")

Signature = Stamp

LONGEST_NAME = 200
"""Characters of an adapter's name."""


def signature(folder: Path) -> Signature:
    """What the file system says of an adapter's files: another signature, another content (the other way round not)."""
    return stamp_of(*(folder / name for name in CONTENT))


@dataclass(eq=False)
class Entry(ABC):
    """One adapter of the store; the counts are those of `AdapterInfo`."""

    name: str
    folder: Path
    pinned: bool = False
    using: int = 0
    requests: int = 0
    hits: int = 0
    loads: int = 0
    evictions: int = 0
    faults: int = 0

    @abstractmethod
    def info(self) -> AdapterInfo:
        """What the contract says of an adapter."""

    def counts(self) -> dict[str, Any]:
        """What has happened to it, by the names of `AdapterInfo`."""
        return {name: getattr(self, name) for name in ("using", "requests", "hits", "loads", "evictions", "faults")}


E = TypeVar("E", bound=Entry)


class AdapterStore(ABC, Generic[E]):
    """The part of the contract's `Adapters` that every engine shares. Safe to use from any thread.

    Args:
        folder: the folder whose folders are adapters; None holds none.
        make: an entry for a folder that has been found.

    Raises:
        Refused: `folder` is not a folder.
    """

    def __init__(self, folder: Path | None, make: Callable[[str, Path], E]) -> None:
        self.folder = None if folder is None else folder.expanduser()
        self._make = make
        self._entries: dict[str, E] = {}
        self._left_out: set[str] = set()
        self._lock = threading.Condition()
        self.scan()

    @abstractmethod
    def load(self, name: str) -> AdapterInfo:
        """Bring an adapter into memory; waits."""

    @abstractmethod
    def _forget(self, entry: E) -> None:
        """Let new requests read the adapter again (called within the lock)."""

    def _pin(self, entry: E, pinned: bool) -> None:
        """Called before `pinned` is set, outside the lock."""

    def _removable(self, entry: E) -> bool:
        """Whether an entry whose folder has vanished may go (called within the lock)."""
        return True

    def names(self) -> Sequence[str]:
        """All names in the store, sorted."""
        with self._lock:
            return sorted(self._entries)

    def scan(self) -> Sequence[str]:
        """Look at the store again: new folders become known, vanished ones leave; returns the names now known."""
        found: dict[str, Path] = {}
        if self.folder is not None:
            if not self.folder.is_dir():
                # by its name alone: clients see this too
                raise Refused(
                    f"the adapter store {self.folder.name} is not a folder; give one whose folders are adapters."
                )
            # Only what lies in the store itself: a link out of it is the operator's, a path in a name is nobody's.
            for folder in self._folders():
                if is_name(folder.name) and (folder / CONFIG).is_file():
                    found[folder.name] = folder
        with self._lock:
            for name in set(self._entries) - set(found):
                if self._removable(self._entries[name]):
                    del self._entries[name]
            for name in set(found) - set(self._entries):
                self._entries[name] = self._make(name, found[name])
        return self.names()

    def _folders(self) -> list[Path]:
        """What lies in the store; what no request could name is left out, and that is said once."""
        assert self.folder is not None
        try:
            found = sorted(self.folder.iterdir())
        except OSError as problem:
            raise Refused(f"the adapter store {self.folder.name} cannot be read ({problem.strerror}).") from problem
        for folder in found:
            if not folder.name.startswith(".") and not is_name(folder.name) and folder.name not in self._left_out:
                self._left_out.add(folder.name)
                log.warning(
                    "serve: %s is not served: requests could not name it. A name has %d printable characters at most.",
                    ascii(folder.name),
                    LONGEST_NAME,
                )
        return found

    def info(self, name: str) -> AdapterInfo:
        """One adapter."""
        with self._lock:
            return self._entry(name).info()

    def all(self) -> Sequence[AdapterInfo]:
        """Every adapter, sorted by name."""
        with self._lock:
            return [self._entries[name].info() for name in sorted(self._entries)]

    def unload(self, name: str) -> AdapterInfo:
        """Let an adapter go; returns at once."""
        with self._lock:
            entry = self._entry(name)
            entry.pinned = False
            self._forget(entry)
            return entry.info()

    def pin(self, name: str) -> AdapterInfo:
        """Bring an adapter into memory and keep it there; waits."""
        self.load(name)
        return self._set_pinned(name, True)

    def unpin(self, name: str) -> AdapterInfo:
        """Let a pinned adapter be dropped again."""
        return self._set_pinned(name, False)

    def reload(self, name: str) -> AdapterInfo:
        """Read the files again; waits."""
        with self._lock:
            entry = self._entry(name)
            pinned = entry.pinned
            self._forget(entry)
        info = self.load(name)
        return self.pin(name) if pinned else info

    def _set_pinned(self, name: str, pinned: bool) -> AdapterInfo:
        with self._lock:
            entry = self._entry(name)
        self._pin(entry, pinned)
        with self._lock:
            entry.pinned = pinned
            return entry.info()

    def _entry(self, name: str) -> E:
        """The entry of a name, also of a folder that has come since the last look (called within the lock)."""
        new = self.folder / name if name not in self._entries and self.folder is not None and is_name(name) else None
        if new is not None and (new / CONFIG).is_file():
            self._entries[name] = self._make(name, new)
        if name not in self._entries:
            some = sorted(self._entries)[:8]
            more = f" and {len(self._entries) - 8} more" if len(self._entries) > 8 else ""
            raise UnknownAdapter(f"unknown adapter {name!r}. Known: {', '.join(some) or 'none'}{more}.")
        return self._entries[name]


def is_name(name: str) -> bool:
    """Whether a name is one folder's and nothing else, and one that a request can hold: no path, no parent, nothing hidden, no
    character that is none."""
    return (
        0 < len(name) <= LONGEST_NAME and not name.startswith(".") and not set(name) & set("/\\") and name.isprintable()
    )
