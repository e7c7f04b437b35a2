"""Names that stand for adapters: versions behind one name, a share of the requests for a new one, and the way back."""

from __future__ import annotations

import hashlib
import threading

from lorakit.serve.http.faults import Fault

ALIASES = 1000
"""Aliases at most."""

HISTORY = 20
"""Settings of an alias that rollback can go back over."""


class Aliases:
    """What every alias means now, and meant before."""

    def __init__(self) -> None:
        self._settings: dict[str, list[dict[str, float]]] = {}
        self._lock = threading.Lock()

    def all(self) -> dict[str, dict[str, float]]:
        """Every alias as it is now."""
        with self._lock:
            return {name: dict(settings[-1]) for name, settings in sorted(self._settings.items())}

    def set(self, name: str, shares: dict[str, float]) -> None:
        """Give an alias another meaning."""
        with self._lock:
            if name not in self._settings and len(self._settings) >= ALIASES:
                raise Fault(400, f"there are {ALIASES} aliases, which are the most.", "too_many_aliases", "name")
            settings = self._settings.setdefault(name, [])
            settings.append(dict(shares))
            del settings[:-HISTORY]

    def back(self, name: str) -> None:
        """Give an alias its meaning before the last one; one that had none is an alias no more."""
        with self._lock:
            if name not in self._settings:
                raise Fault(404, f'there is no alias "{name}".', "no_such_alias", "name")
            self._settings[name].pop()
            if not self._settings[name]:
                del self._settings[name]

    def find(self, name: str, who: str) -> str | None:
        """The adapter that an alias means for a user: the same one for as long as the shares are, and a user who is moved by
        a growing share stays moved. None where the name is no alias."""
        with self._lock:
            settings = self._settings.get(name)
            shares = dict(settings[-1]) if settings else {}
        place = int.from_bytes(hashlib.blake2b(f"{name}\0{who}".encode(), digest_size=8).digest()) / 2**64
        for adapter, share in shares.items():
            place -= share
            if place < 0:
                return adapter
        return next(reversed(shares), None)
