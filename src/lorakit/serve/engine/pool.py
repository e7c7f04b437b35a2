"""Where adapters are: thousands on disk, as many in memory as a budget of bytes allows, those of running requests in use.

An adapter in memory lies there in the form in which the batch reads it, so going into the batch costs nothing. Reading
happens in threads of its own; the engine's thread only ever looks whether it is done. Ranks count, since bytes do. What no
running request uses may be dropped, the longest unused first. An adapter that is unusable is refused with its reason, which is
remembered until its files change. Changed files are noticed when the next request asks: it gets the new content, running
ones end with what they began with.
"""

from __future__ import annotations

import itertools
import logging
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from lorakit.files.bundle import CONFIG, TENSORS
from lorakit.serve.model import native
from lorakit.serve.model.packed import Lowered, Lowering, signature
from lorakit.serve.request import AdapterInfo, Refused, State, UnknownAdapter

log = logging.getLogger("lorakit")

Signature = tuple[tuple[int, int, int], ...]


@dataclass(eq=False)
class Version:
    """One content of an adapter in memory, and how many running requests use it."""

    lowered: Lowered
    signature: Signature
    users: int = 0


@dataclass(eq=False)
class Entry:
    """One adapter of the store.

    Attributes:
        current: what new requests get, or None.
        loading: whether a thread reads it now, or will.
        reserved: bytes set aside for what is being read.
        refusal: why it is unusable, and the signature of the files that were so.
        wanted: accepted requests that have not ended.
        used: when it was last used, as a count of uses.
    """

    name: str
    folder: Path
    current: Version | None = None
    draining: list[Version] = field(default_factory=list)
    loading: bool = False
    reserved: int = 0
    refusal: tuple[str, Signature] | None = None
    pinned: bool = False
    wanted: int = 0
    used: int = 0
    requests: int = 0
    hits: int = 0
    loads: int = 0
    evictions: int = 0

    @property
    def state(self) -> State:
        if self.current is not None:
            return "pinned" if self.pinned else "resident"
        if self.loading:
            return "loading"
        if self.refusal is not None:
            return "refused"
        return "draining" if self.draining else "on disk"


class Lease:
    """One request's claim on one adapter: from submission to the end it counts as wanted, while it runs as used."""

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self.version: Version | None = None


class Pool:
    """The adapters of one engine; `Adapters` of the contract. Safe to use from any thread."""

    def __init__(
        self, lowerings: Sequence[Lowering], store: Path | None, budget: int, changed: Callable[[], None] = lambda: None
    ) -> None:
        self.store = None if store is None else store.expanduser()
        self.budget = budget
        self.hits = self.misses = self.loads = self.evictions = 0
        self._changed = changed
        self._entries: dict[str, Entry] = {}
        self._lock = threading.Condition()
        self._uses = itertools.count(1)
        self._jobs: queue.SimpleQueue[Entry | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._work, args=(lowering,), name=f"lorakit-load-{number}", daemon=True)
            for number, lowering in enumerate(lowerings)
        ]
        self.scan()

    def start(self) -> None:
        """Start the reading threads."""
        for thread in self._threads:
            if not thread.is_alive():
                thread.start()

    def stop(self) -> None:
        """End the reading threads when they have read what they began."""
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            if thread.is_alive():
                thread.join(timeout=30)

    # -- the contract's side ---------------------------------------------------------------------------------------------
    def names(self) -> Sequence[str]:
        """All names in the store, sorted."""
        with self._lock:
            return sorted(self._entries)

    def scan(self) -> Sequence[str]:
        """Look at the store again; see the contract."""
        found: dict[str, Path] = {}
        if self.store is not None:
            if not self.store.is_dir():
                raise Refused(f"the adapter store {self.store} is no folder; give one whose folders are adapters.")
            # Only what lies in the store itself: a link out of it is the operator's, a path in a name is nobody's.
            for folder in self.store.iterdir():
                if not folder.name.startswith(".") and (folder / CONFIG).is_file():
                    found[folder.name] = folder
        with self._lock:
            for name, folder in found.items():
                self._entries.setdefault(name, Entry(name, folder))
            for name in set(self._entries) - set(found):
                entry = self._entries[name]
                if entry.current is None and not entry.loading and not entry.wanted:
                    del self._entries[name]
        return self.names()

    def info(self, name: str) -> AdapterInfo:
        """One adapter."""
        with self._lock:
            return self._info(self._entry(name))

    def all(self) -> Sequence[AdapterInfo]:
        """Every adapter, sorted by name."""
        with self._lock:
            return [self._info(self._entries[name]) for name in sorted(self._entries)]

    def load(self, name: str) -> AdapterInfo:
        """Bring an adapter into memory; waits."""
        with self._lock:
            entry = self._entry(name)
            self._notice_change(entry)
            if entry.current is None:
                entry.refusal = None
                if not self._request(entry):
                    raise Refused(
                        f"adapter {name!r} finds no room: all {self.budget} bytes are pinned or in use by requests."
                    )
            self._lock.wait_for(lambda: not entry.loading)
            if entry.current is None:
                raise Refused(
                    entry.refusal[0] if entry.refusal else f"adapter {name!r} was dropped as soon as it was read."
                )
            return self._info(entry)

    def unload(self, name: str) -> AdapterInfo:
        """Let an adapter go; returns at once."""
        with self._lock:
            entry = self._entry(name)
            entry.pinned = False
            self._retire(entry)
            return self._info(entry)

    def pin(self, name: str) -> AdapterInfo:
        """Bring an adapter into memory and keep it there; waits."""
        self.load(name)
        with self._lock:
            entry = self._entry(name)
            entry.pinned = True
            return self._info(entry)

    def unpin(self, name: str) -> AdapterInfo:
        """Let a pinned adapter be dropped again."""
        with self._lock:
            entry = self._entry(name)
            entry.pinned = False
            return self._info(entry)

    def reload(self, name: str) -> AdapterInfo:
        """Read the files again; waits."""
        with self._lock:
            entry = self._entry(name)
            pinned = entry.pinned
            self._retire(entry)
            entry.refusal = None
        info = self.load(name)
        return self.pin(name) if pinned else info

    # -- the engine's side ---------------------------------------------------------------------------------------------
    def claim(self, name: str) -> Lease:
        """A request names an adapter: begin to read it if there is room. Raises UnknownAdapter or Refused."""
        with self._lock:
            entry = self._entries.get(name)
            if entry is None and self.store is not None and _is_name(name) and (self.store / name / CONFIG).is_file():
                entry = self._entries[name] = Entry(name, self.store / name)  # come since the last look
            if entry is None:
                raise self._unknown(name)
            self._notice_change(entry)
            if entry.current is None and not (entry.folder / CONFIG).is_file() and not entry.loading:
                if not entry.wanted:
                    del self._entries[name]
                raise UnknownAdapter(f"adapter {name!r} has vanished from the store.")
            if entry.refusal is not None:
                raise Refused(entry.refusal[0])
            entry.wanted += 1
            entry.requests += 1
            if entry.current is not None:
                entry.hits += 1
                self.hits += 1
                entry.used = next(self._uses)
            else:
                self.misses += 1
                if not entry.loading:
                    self._request(entry, evict=False)
            return Lease(entry)

    def place(self, leases: Sequence[Lease]) -> bool | None:
        """Bring a request's adapters into use.

        Returns:
            True: all are in use now. False: some find no room at present. None: some are being read.

        Raises:
            Refused: one turned out to be unusable.
        """
        with self._lock:
            keep = {lease.entry.name for lease in leases}
            result: bool | None = True
            for lease in leases:
                entry = lease.entry
                if lease.version is not None or entry.current is not None:
                    continue
                if entry.refusal is not None:
                    raise Refused(entry.refusal[0])
                if not entry.loading and not self._request(entry, keep=keep):
                    return False
                result = None
            if result:
                for lease in leases:
                    if lease.version is None:
                        lease.version = lease.entry.current
                        assert lease.version is not None
                        lease.version.users += 1
                        lease.entry.used = next(self._uses)
            return result

    def fetch(self, claims: Sequence[Sequence[Lease]]) -> None:
        """Begin to read the adapters of the requests that come next, as far as room can be made for them."""
        with self._lock:
            keep = {lease.entry.name for leases in claims for lease in leases}
            for leases in claims:
                for lease in leases:
                    entry = lease.entry
                    if entry.current is None and entry.refusal is None and not entry.loading and lease.version is None:
                        self._request(entry, keep=keep)

    def release(self, lease: Lease) -> None:
        """The request has ended."""
        with self._lock:
            entry, version = lease.entry, lease.version
            entry.wanted -= 1
            lease.version = None
            if version is not None:
                version.users -= 1
                if not version.users and version in entry.draining:
                    entry.draining.remove(version)

    @property
    def bytes(self) -> int:
        """Memory of all adapters that are there, and of those that are being read."""
        with self._lock:
            return self._bytes()

    @property
    def reading(self) -> bool:
        """Whether an adapter is being read, or is about to be."""
        with self._lock:
            return any(entry.loading for entry in self._entries.values())

    def counts(self) -> dict[str, int]:
        """State -> how many adapters."""
        result: dict[str, int] = {}
        with self._lock:
            for entry in self._entries.values():
                result[entry.state] = result.get(entry.state, 0) + 1
        return result

    # -- within the lock -----------------------------------------------------------------------------------------------
    def _entry(self, name: str) -> Entry:
        if name not in self._entries:
            raise self._unknown(name)
        return self._entries[name]

    def _unknown(self, name: str) -> UnknownAdapter:
        some = sorted(self._entries)[:8]
        listed = ", ".join(some) + (f" and {len(self._entries) - 8} more" if len(self._entries) > 8 else "")
        return UnknownAdapter(f"unknown adapter {name!r}. Known: {listed or 'none'}.")

    def _info(self, entry: Entry) -> AdapterInfo:
        version = entry.current or (entry.draining[-1] if entry.draining else None)
        lowered = None if version is None else version.lowered
        return AdapterInfo(
            name=entry.name,
            state=entry.state,
            reason=entry.refusal[0] if entry.refusal else "",
            pinned=entry.pinned,
            method="" if lowered is None else lowered.method,
            how="" if lowered is None else lowered.how,
            error=0.0 if lowered is None else lowered.error,
            rank=0 if lowered is None else lowered.rank,
            bytes=sum(v.lowered.bytes for v in self._versions(entry)),
            content="" if lowered is None else lowered.content,
            using=entry.wanted,
            requests=entry.requests,
            hits=entry.hits,
            loads=entry.loads,
            evictions=entry.evictions,
        )

    @staticmethod
    def _versions(entry: Entry) -> Iterator[Version]:
        if entry.current is not None:
            yield entry.current
        yield from entry.draining

    def _bytes(self) -> int:
        return sum(
            entry.reserved + sum(version.lowered.bytes for version in self._versions(entry))
            for entry in self._entries.values()
        )

    def _notice_change(self, entry: Entry) -> None:
        """Forget what is known of files that are others now; files that have vanished stay served from memory."""
        now = signature(entry.folder)
        if entry.refusal is not None and entry.refusal[1] != now:
            entry.refusal = None
        if entry.current is not None and entry.current.signature != now and now[0][0] and now[1][0]:
            pinned = entry.pinned
            self._retire(entry)
            entry.pinned = pinned

    def _retire(self, entry: Entry) -> None:
        """New requests no longer get the current version; its memory goes when its last request ends."""
        version, entry.current = entry.current, None
        if version is not None and version.users:
            entry.draining.append(version)

    def _request(self, entry: Entry, evict: bool = True, keep: set[str] | frozenset[str] = frozenset()) -> bool:
        """Have an entry read, if room for it can be made; `keep` names those not to be dropped for it."""
        if entry.loading:
            return True
        try:
            size = (entry.folder / TENSORS).stat().st_size
        except OSError:
            size = 0  # reading will say what is wrong
        if not self._make_room(size, evict, keep):
            return False
        entry.loading, entry.reserved = True, size
        self._jobs.put(entry)
        return True

    def _make_room(self, size: int, evict: bool, keep: set[str] | frozenset[str] = frozenset()) -> bool:
        missing = self._bytes() + size - self.budget
        if missing <= 0:
            return True
        idle = sorted(
            (
                e
                for e in self._entries.values()
                if e.current and not e.current.users and not e.pinned and e.name not in keep
            ),
            key=lambda e: e.used,
        )
        if not evict or sum(e.current.lowered.bytes for e in idle if e.current) < missing:
            return False
        for entry in idle:
            assert entry.current is not None
            missing -= entry.current.lowered.bytes
            entry.current = None
            entry.evictions += 1
            self.evictions += 1
            if missing <= 0:
                break
        return True

    # -- the reading threads ---------------------------------------------------------------------------------------------
    def _work(self, lowering: Lowering) -> None:
        native.alone()
        while (entry := self._jobs.get()) is not None:
            before = signature(entry.folder)
            lowered: Lowered | None = None
            reason = ""
            try:
                lowered = lowering.read(entry.name, entry.folder)
            except Refused as problem:
                reason = problem.reason
            except Exception as problem:  # a thread that ends would leave every later adapter waiting
                log.exception("serve: reading adapter %s failed", entry.name)
                reason = f"adapter {entry.name!r} could not be read: {type(problem).__name__}: {problem}"
            with self._finished(entry):
                entry.reserved = 0
                if lowered is not None and lowered.bytes > self.budget:
                    reason = (
                        f"adapter {entry.name!r} takes {lowered.bytes} bytes in memory, more than the whole budget of "
                        f"{self.budget}; raise adapter_bytes."
                    )
                if reason or lowered is None:
                    entry.refusal = (reason, before)
                    log.warning("serve: refused: %s", reason)
                elif self._make_room(lowered.bytes, True):  # files may unfold to more than their size
                    entry.current = Version(lowered, before)
                    entry.loads += 1
                    self.loads += 1
                    entry.used = next(self._uses)

    @contextmanager
    def _finished(self, entry: Entry) -> Iterator[None]:
        with self._lock:
            try:
                yield
            finally:
                entry.loading = False
                self._lock.notify_all()
        self._changed()


def _is_name(name: str) -> bool:
    """Whether a name is one folder's and nothing else: no path, no parent, nothing hidden."""
    return bool(name) and not name.startswith(".") and not set(name) & set("/\\\0")
