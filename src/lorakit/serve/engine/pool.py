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
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lorakit.files.bundle import CONFIG, TENSORS
from lorakit.serve.model import native
from lorakit.serve.model.packed import AdapterReader, PackedAdapter
from lorakit.serve.request import AdapterInfo, Refused, State, UnknownAdapter
from lorakit.serve.store import AdapterStore, Entry, Signature, signature

log = logging.getLogger("lorakit")


@dataclass(frozen=True)
class OnDisk:
    """An adapter that is not in memory, and that nobody reads."""


@dataclass(frozen=True)
class Loading:
    """An adapter that a thread reads, or will; `reserved` bytes are set aside for it."""

    reserved: int


@dataclass(frozen=True)
class Unusable:
    """An adapter that could not be read, why, and the files that were so."""

    reason: str
    signature: Signature


@dataclass(eq=False)
class Version:
    """One content of an adapter in memory, and how many running requests use it."""

    adapter: PackedAdapter
    signature: Signature
    users: int = 0


@dataclass(eq=False)
class PoolEntry(Entry):
    """One adapter of the pool.

    OnDisk -> Loading when a request or the operator wants it and there is room; Loading -> Version, Unusable, or OnDisk where
    the room has gone meanwhile; Version -> OnDisk when it is dropped or its files have changed; Unusable -> OnDisk when its
    files have changed or the operator loads it again.

    Attributes:
        now: what new requests find.
        draining: earlier versions, each until its last request ends.
        used: when it was last used, as a count of uses.
    """

    now: OnDisk | Loading | Version | Unusable = OnDisk()
    draining: list[Version] = field(default_factory=list)
    used: int = 0

    @property
    def current(self) -> Version | None:
        """The version that new requests get."""
        return self.now if isinstance(self.now, Version) else None

    @property
    def loading(self) -> bool:
        """Whether a thread reads it now, or will."""
        return isinstance(self.now, Loading)

    @property
    def state(self) -> State:
        """In the contract's words."""
        match self.now:
            case Version():
                return "pinned" if self.pinned else "resident"
            case Loading():
                return "loading"
            case Unusable():
                return "refused"
        return "draining" if self.draining else "on disk"

    @property
    def bytes(self) -> int:
        """Memory of all its versions."""
        versions = [*self.draining, *([self.current] if self.current else [])]
        return sum(version.adapter.bytes for version in versions)

    def info(self) -> AdapterInfo:
        """What the contract says of it."""
        version = self.current or (self.draining[-1] if self.draining else None)
        reason = self.now.reason if isinstance(self.now, Unusable) else ""
        known = {} if version is None else version.adapter.facts()
        known["reason"] = reason or known.get("reason", "")
        return AdapterInfo(self.name, self.state, pinned=self.pinned, **known | self.counts(), bytes=self.bytes)


class Lease:
    """One request's claim on one adapter: from submission to the end it counts as using, while it runs it holds a version."""

    def __init__(self, entry: PoolEntry) -> None:
        self.entry = entry
        self.version: Version | None = None


class Pool(AdapterStore[PoolEntry]):
    """The adapters of one engine; `Adapters` of the contract. Safe to use from any thread.

    Args:
        readers: each reads adapters in a thread of its own.
        folder: the store.
        budget: bytes of all adapters in memory.
        changed: called when an adapter has come, or turned out to be unusable.
    """

    def __init__(
        self,
        readers: Sequence[AdapterReader],
        folder: Path | None,
        budget: int,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        self.budget = budget
        self.hits = self.misses = self.loads = self.evictions = 0
        self._changed, self._stopped = changed, False
        self._uses = itertools.count(1)
        self._jobs: queue.SimpleQueue[PoolEntry | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._work, args=(reader,), name=f"lorakit-load-{number}", daemon=True)
            for number, reader in enumerate(readers)
        ]
        self._look = readers[0].look
        self._looking = threading.Thread(target=self._look_through, name="lorakit-look", daemon=True)
        super().__init__(folder, PoolEntry)

    def start(self) -> None:
        """Start the reading threads, and look through the store for what cannot be served."""
        for thread in (*self._threads, self._looking):
            if thread.ident is None:
                thread.start()

    def stop(self) -> None:
        """End the reading threads when they have read what they began."""
        self._stopped = True
        for _ in self._threads:
            self._jobs.put(None)
        for thread in (*self._threads, self._looking):
            if thread.is_alive():
                thread.join(timeout=30)

    def load(self, name: str) -> AdapterInfo:
        """Bring an adapter into memory; waits."""
        with self._lock:
            entry = self._entry(name)
            self._notice_change(entry)
            if isinstance(entry.now, Unusable):
                entry.now = OnDisk()
            if entry.current is None and not self._request(entry):
                raise Refused(
                    f"adapter {name!r} finds no room: all {self.budget} bytes are pinned or in use by requests."
                )
            self._lock.wait_for(lambda: not entry.loading)
            if isinstance(entry.now, Unusable):
                raise Refused(entry.now.reason)
            if entry.current is None:
                raise Refused(f"adapter {name!r} was dropped as soon as it was read.")
            return entry.info()

    # -- the engine's side ---------------------------------------------------------------------------------------------
    def claim(self, name: str) -> Lease:
        """A request names an adapter: begin to read it if there is room. Raises UnknownAdapter or Refused."""
        with self._lock:
            entry = self._entry(name)
            self._notice_change(entry)
            if entry.current is None and not entry.loading and not (entry.folder / CONFIG).is_file():
                if not entry.using:
                    del self._entries[name]
                raise UnknownAdapter(f"adapter {name!r} has vanished from the store.")
            if isinstance(entry.now, Unusable):
                raise Refused(entry.now.reason)
            entry.using += 1
            entry.requests += 1
            if entry.current is not None:
                entry.hits += 1
                self.hits += 1
                entry.used = next(self._uses)
            else:
                self.misses += 1
                self._request(entry, evict=False)
                if isinstance(entry.now, Unusable):
                    entry.using -= 1
                    raise Refused(entry.now.reason)
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
                if isinstance(entry.now, Unusable):
                    raise Refused(entry.now.reason)
                if not self._request(entry, keep=keep):
                    return False
                if isinstance(entry.now, Unusable):
                    raise Refused(entry.now.reason)
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
                    if isinstance(lease.entry.now, OnDisk) and lease.version is None:
                        self._request(lease.entry, keep=keep)

    def release(self, lease: Lease) -> None:
        """The request has ended."""
        with self._lock:
            entry, version = lease.entry, lease.version
            entry.using -= 1
            lease.version = None
            if version is not None:
                version.users -= 1
                if not version.users and version in entry.draining:
                    entry.draining.remove(version)

    @property
    def bytes(self) -> int:
        """Memory of all adapters that are there, and of those that are being read."""
        with self._lock:
            entries = self._entries.values()
            return sum(entry.bytes + (entry.now.reserved if isinstance(entry.now, Loading) else 0) for entry in entries)

    @property
    def reading(self) -> bool:
        """Whether an adapter is being read, or is about to be."""
        with self._lock:
            return any(entry.loading for entry in self._entries.values())

    def counts(self) -> dict[str, int]:
        """State -> how many adapters."""
        with self._lock:
            return dict(Counter(entry.state for entry in self._entries.values()))

    # -- within the lock -----------------------------------------------------------------------------------------------
    def _removable(self, entry: PoolEntry) -> bool:
        return entry.current is None and not entry.loading and not entry.using

    def _notice_change(self, entry: PoolEntry) -> None:
        """Forget what is known of files that are others now; files that have vanished stay served from memory."""
        files = signature(entry.folder)
        if isinstance(entry.now, Unusable) and entry.now.signature != files:
            entry.now = OnDisk()
        if entry.current is not None and entry.current.signature != files and files[0][0] and files[1][0]:
            self._forget(entry)

    def _forget(self, entry: PoolEntry) -> None:
        """New requests no longer get the current version; its memory goes when its last request ends."""
        if entry.current is not None:
            if entry.current.users:
                entry.draining.append(entry.current)
            entry.now = OnDisk()

    def _request(self, entry: PoolEntry, evict: bool = True, keep: Collection[str] = ()) -> bool:
        """Have an entry read, if room for it can be made; `keep` names those not to be dropped for it."""
        if entry.loading:
            return True
        try:
            size = (entry.folder / TENSORS).stat().st_size
        except OSError:
            size = 0  # reading will say what is wrong
        if size > self.budget:
            entry.now = Unusable(self._too_large(entry.name, size, "on disk"), signature(entry.folder))
            return True
        if not self._make_room(size, evict, keep):
            return False
        entry.now = Loading(size)
        self._jobs.put(entry)
        return True

    def _too_large(self, name: str, size: int, where: str) -> str:
        return (
            f"adapter {name!r} takes {size} bytes {where}, more than the whole budget of {self.budget}. The operator can "
            "give adapters more memory (--memory)."
        )

    def _make_room(self, size: int, evict: bool = True, keep: Collection[str] = ()) -> bool:
        missing = self.bytes + size - self.budget
        if missing <= 0:
            return True
        idle = sorted(
            (
                (entry.used, entry.current.adapter.bytes, entry)
                for entry in self._entries.values()
                if entry.current and not entry.current.users and not entry.pinned and entry.name not in keep
            ),
            key=lambda one: one[0],
        )
        if not evict or sum(freed for _, freed, _ in idle) < missing:
            return False
        for _, freed, entry in idle:
            entry.now = OnDisk()
            entry.evictions += 1
            self.evictions += 1
            missing -= freed
            if missing <= 0:
                break
        return True

    # -- the reading threads ---------------------------------------------------------------------------------------------
    def _look_through(self) -> None:
        """Say of every adapter at the start whether its configuration alone shows that it cannot be served."""
        with self._lock:
            entries = list(self._entries.values())
        for entry in entries:
            if self._stopped or not isinstance(entry.now, OnDisk):
                continue
            before = signature(entry.folder)
            try:
                reason = self._look(entry.name, entry.folder)
            except Exception:  # whoever reads it will say what is wrong
                continue
            with self._lock:
                if reason and isinstance(entry.now, OnDisk):
                    entry.now = Unusable(reason, before)
                    log.warning("serve: refused: %s", reason)

    def _work(self, reader: AdapterReader) -> None:
        native.alone()
        while (entry := self._jobs.get()) is not None:
            before = signature(entry.folder)
            result: PackedAdapter | str
            try:
                result = reader.read(entry.name, entry.folder)
            except Refused as problem:
                result = problem.reason
            except Exception:  # a thread that ends would leave every later adapter waiting
                log.exception("serve: reading adapter %s failed", entry.name)
                result = f"adapter {entry.name!r} could not be read; the server's log has the details."
            if isinstance(result, PackedAdapter) and result.bytes > self.budget:
                result = self._too_large(entry.name, result.bytes, "in memory")
            with self._lock:
                entry.now = OnDisk()  # from here on nothing is reserved
                if isinstance(result, str):
                    entry.now = Unusable(result, before)
                    log.warning("serve: refused: %s", result)
                elif self._make_room(result.bytes):  # files may unfold to more than their size
                    entry.now = Version(result, before)
                    entry.loads += 1
                    self.loads += 1
                    entry.used = next(self._uses)
                self._lock.notify_all()
            self._changed()
