"""The adapters of a store as the front knows them where another process reads them: names, states, counts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from lorakit.errors import LorakitError
from lorakit.serve.limits import check_files, without_path
from lorakit.serve.request import AdapterInfo, Refused
from lorakit.serve.store import AdapterStore, Entry, Signature, signature


@dataclass(eq=False)
class Folder(Entry):
    """One adapter's folder.

    Attributes:
        facts: what `prepare` has said of it.
        path: what the engine is given, another folder where it had to be converted.
        files: what the folder was when it was prepared; () before.
        version: how often it has been prepared.
        refusal: why it cannot be used, or "".
    """

    facts: AdapterInfo | None = None
    path: Path = Path()
    files: Signature = ()
    version: int = 0
    refusal: str = ""

    def info(self) -> AdapterInfo:
        """What the contract says of it."""
        known = self.facts or AdapterInfo(self.name, "on disk")
        if self.refusal:
            known = replace(known, state="refused", reason=self.refusal)
        elif not self.files:
            known = replace(known, state="on disk", bytes=0)
        elif self.pinned:
            known = replace(known, state="pinned")
        return replace(known, pinned=self.pinned, **self.counts())


class Folders(AdapterStore[Folder]):
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
        self.prepare, self.pins = prepare, pins
        super().__init__(store, Folder)

    def ready(self, name: str) -> Folder:
        """A folder that may be handed on; prepared where it was not, or has changed since.

        Raises:
            UnknownAdapter, Refused: there is none, or it cannot be used.
        """
        with self._lock:
            entry = self._entry(name)
            files = signature(entry.folder)
            if entry.files != files:
                try:
                    check_files(entry.folder)
                    entry.facts, entry.path = self.prepare(name, entry.folder)
                except LorakitError as problem:
                    # clients see this too, and no path of the server
                    entry.files, entry.refusal = (), without_path(str(problem), entry.folder)
                    raise Refused(entry.refusal) from problem
                entry.files, entry.refusal, entry.pinned = files, "", False  # what was pinned was another version
                entry.loads += 1
                entry.version += 1
            return entry

    def count(self, names: Iterable[str], *, using: int, requests: int = 0) -> None:
        """Add to the counts of adapters, as far as they are still in the store."""
        with self._lock:
            for name in names:
                if (entry := self._entries.get(name)) is not None:
                    entry.using += using
                    entry.requests += requests

    def load(self, name: str) -> AdapterInfo:
        """Prepare an adapter now."""
        return self.ready(name).info()

    def _forget(self, entry: Folder) -> None:
        """Forget what was prepared; the engine drops its own copy when it needs the room."""
        entry.files, entry.refusal = (), ""

    def _pin(self, entry: Folder, pinned: bool) -> None:
        if self.pins is None:
            raise Refused(f"adapter {entry.name!r}: this engine cannot pin adapters; it keeps those that are used.")
        self.pins(entry, pinned)
