"""What every engine shares: its states, how it is drained, and counts of the requests that it refused or that have ended."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import Counter

from lorakit.errors import LorakitError
from lorakit.serve.request import Overloaded, Request, Ticket, UnknownAdapter


class Lifecycle(ABC):
    """The part of the contract's `Engine` that does not generate: new -> ready -> draining -> stopped."""

    def __init__(self) -> None:
        self._lock = threading.Condition()
        self._state = "new"
        self._context = 0
        self._failure = ""
        self._finished: Counter[str] = Counter()
        self._refused: Counter[str] = Counter()

    @abstractmethod
    def _accept(self, request: Request) -> Ticket:
        """Accept a request, or raise Overloaded, UnknownAdapter, TooLong or Refused."""

    @abstractmethod
    def _unended(self) -> bool:
        """Whether any accepted request has not ended."""

    @property
    def context(self) -> int:
        """Tokens of prompt and answer together that one request may have."""
        return self._context

    @property
    def failure(self) -> str:
        """Why it has given up for good, or "": what ends its process."""
        return self._failure

    def ready(self) -> bool:
        """Whether requests are taken."""
        return self._state == "ready"

    def drain(self, timeout: float | None = None) -> bool:
        """Accept nothing more and wait until every accepted request has ended; False after `timeout` seconds."""
        with self._lock:
            if self._state == "ready":
                self._state = "draining"
            return self._lock.wait_for(lambda: self._state == "stopped" or not self._unended(), timeout)

    def submit(self, request: Request) -> Ticket:
        """Accept a request, or raise Overloaded, UnknownAdapter, TooLong or Refused."""
        try:
            return self._accept(request)
        except LorakitError as refusal:
            kind = {Overloaded: "overloaded", UnknownAdapter: "unknown"}.get(type(refusal), "refused")
            with self._lock:
                self._refused[kind] += 1
            raise
