"""The adapters of a store as the front knows them where the engine that reads them is another's: names, states, counts."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lorakit.errors import LorakitError
from lorakit.files.bundle import CONFIG
from lorakit.serve.request import AdapterInfo, Refused, UnknownAdapter


@dataclass
class Folder:
    """One adapter's folder; `path` is what the engine is given, which is another folder where it had to be converted."""

    info: AdapterInfo
    path: Path
    stamp: tuple[int, ...] = ()
    version: int = 0


class Folders:
    """`Adapters` of the contract over folders alone.

    Args:
        store: the folder whose folders are adapters.
        prepare: looks at a folder before its first use, and again when its files have changed; gives what is known of the
            adapter and the folder to hand on, or raises LorakitError with the reason why it cannot be used.
        pins: what `pin` and `unpin` do with a folder that is ready; None where there is no such thing.
    """

    def __init__(
        self,
        store: Path | None,
        prepare: Callable[[str, Path], tuple[AdapterInfo, Path]],
        pins: Callable[[Folder, bool], None] | None = None,
    ) -> None:
        self.store, self.prepare, self.pins = store, prepare, pins
        self._known: dict[str, Folder] = {}
        self._lock = threading.RLock()
        self.scan()

    def names(self) -> Sequence[str]:
        """All names in the store, sorted."""
        with self._lock:
            return sorted(self._known)

    def scan(self) -> Sequence[str]:
        """Look at the store again."""
        found: set[str] = set()
        if self.store is not None:
            for folder in self.store.iterdir():
                if not folder.name.startswith(".") and (folder / CONFIG).is_file():
                    found.add(folder.name)
        with self._lock:
            for name in found - set(self._known):
                assert self.store is not None
                self._known[name] = Folder(AdapterInfo(name, "on disk"), self.store / name)
            for name in set(self._known) - found:
                del self._known[name]
        return self.names()

    def info(self, name: str) -> AdapterInfo:
        """One adapter."""
        with self._lock:
            return self._folder(name).info

    def all(self) -> Sequence[AdapterInfo]:
        """Every adapter."""
        with self._lock:
            return [self._known[name].info for name in sorted(self._known)]

    def ready(self, name: str) -> Folder:
        """A folder that may be handed on; prepared where it was not, or has changed since.

        Raises:
            UnknownAdapter, Refused: there is none, or it cannot be used.
        """
        with self._lock:
            folder = self._folder(name)
            assert self.store is not None
            source = self.store / name
            stamp = _stamp(source)
            if folder.stamp != stamp or folder.info.state == "refused":
                try:
                    info, path = self.prepare(name, source)
                except LorakitError as problem:
                    folder.info = replace(folder.info, state="refused", reason=str(problem))
                    folder.stamp = ()
                    raise Refused(str(problem)) from problem
                counts = {
                    key: getattr(folder.info, key) for key in ("pinned", "using", "requests", "hits", "evictions")
                }
                folder.info = replace(info, state="resident", loads=folder.info.loads + 1, **counts)
                folder.path, folder.stamp, folder.version = path, stamp, folder.version + 1
            return folder

    def count(self, name: str, **by: int) -> None:
        """Add to an adapter's counts."""
        with self._lock:
            if name in self._known:
                folder = self._known[name]
                folder.info = replace(folder.info, **{key: getattr(folder.info, key) + add for key, add in by.items()})

    def load(self, name: str) -> AdapterInfo:
        """Prepare an adapter now."""
        return self.ready(name).info

    def unload(self, name: str) -> AdapterInfo:
        """Forget what was prepared; the engine drops its own copy when it needs the room."""
        with self._lock:
            folder = self._folder(name)
            folder.stamp = ()
            folder.info = replace(folder.info, state="on disk", bytes=0, pinned=False)
            return folder.info

    def pin(self, name: str) -> AdapterInfo:
        """Keep an adapter in memory, where the engine can."""
        return self._pinned(name, True)

    def unpin(self, name: str) -> AdapterInfo:
        """Let it be dropped again."""
        return self._pinned(name, False)

    def reload(self, name: str) -> AdapterInfo:
        """Prepare it again from its files."""
        pinned = self.info(name).pinned
        self.unload(name)
        found = self.load(name)
        return self.pin(name) if pinned else found

    def _pinned(self, name: str, pinned: bool) -> AdapterInfo:
        folder = self.ready(name)
        if self.pins is None:
            raise Refused(f"adapter {name!r}: this engine cannot pin adapters; it keeps those that are used.")
        self.pins(folder, pinned)
        with self._lock:
            folder.info = replace(folder.info, pinned=pinned, state="pinned" if pinned else "resident")
            return folder.info

    def _folder(self, name: str) -> Folder:
        if name not in self._known:
            raise UnknownAdapter(f"unknown adapter {name!r}.")
        return self._known[name]


def _stamp(folder: Path) -> tuple[int, ...]:
    """Changes whenever a file of a folder does."""
    stamp: list[int] = []
    for file in sorted(folder.glob("adapter_*")):
        found = file.stat()
        stamp += [found.st_mtime_ns, found.st_size, found.st_ino]
    return tuple(stamp)
