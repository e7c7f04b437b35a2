"""Keys and values of all requests, in pages of sixteen tokens; and which finished pages later requests may share.

A request takes pages as it grows, so memory is what its tokens need and no more. A full page has a key: a digest of who wrote
it (the adapters' contents and weights), of whose it is (`Request.domain`) and of all tokens up to its end. A later prompt of
the same domain that begins the same, under the same adapters of the same content, takes the pages instead of computing them.
An adapter that acts from an invocation on is part of the keys from there on alone: before it the pages are the base's. A
reloaded adapter has another content, so nothing stale is ever found. Pages that nobody uses stay findable until the room is
needed, the longest unused going first.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorakit.serve.model import native

PAGE = 16
"""Tokens of a page; `native.cpp` is written for this number."""


@dataclass(frozen=True)
class LayerShape:
    """What one attention layer keeps of a token: heads of keys and values, and the widths of a key and a value."""

    heads: int
    key: int
    value: int

    def numbers(self) -> int:
        """Numbers kept per token."""
        return self.heads * (self.key + self.value)


def root_key(writers: Iterable[tuple[str, float]], domain: str = "") -> bytes:
    """The key before the first page: a digest of the adapters (content, weight) that compute a request, and of the domain
    within which pages may be shared."""
    return hashlib.blake2b(repr((sorted(writers), domain)).encode(), digest_size=16).digest()


def next_key(before: bytes, tokens: Sequence[int], own: str = "") -> bytes:
    """The key of a page from that of the page before it, its own tokens and what else it is computed by."""
    return hashlib.blake2b(before + (repr(tuple(tokens)) + own).encode(), digest_size=16).digest()


class Cache:
    """The pages of all layers. A page number means the same page in every layer.

    Attributes:
        keys: layer -> (pages, heads, key width, 16).
        values: layer -> (pages, heads, 16, value width).
    """

    def __init__(
        self, shapes: Sequence[LayerShape], pages: int, dtype: torch.dtype, device: torch.device, reuse: bool = True
    ) -> None:
        self.shapes, self.pages, self.reuse = tuple(shapes), pages, reuse
        # Zeros are pages of the system that take no memory until they are written.
        self.keys = [torch.zeros(pages, s.heads, s.key, PAGE, dtype=dtype, device=device) for s in shapes]
        self.values = [torch.zeros(pages, s.heads, PAGE, s.value, dtype=dtype, device=device) for s in shapes]
        for tensor in [*self.keys, *self.values]:
            native.large_pages(tensor)
        self.page_bytes = page_bytes(shapes, dtype)
        self._free = list(range(pages - 1, -1, -1))
        self._users = [0] * pages
        self._key_of: dict[int, bytes] = {}
        self._page_of: dict[bytes, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def available(self) -> int:
        """Pages that `take` could give now."""
        return len(self._free) + len(self._idle)

    @property
    def used(self) -> int:
        """Pages that requests hold now."""
        return self.pages - self.available

    def take(self, count: int) -> list[int]:
        """`count` pages for one request. The caller has looked at `available`."""
        taken = []
        for _ in range(count):
            if self._free:
                page = self._free.pop()
            else:
                page, _ = self._idle.popitem(last=False)
                del self._page_of[self._key_of.pop(page)]
            self._users[page] = 1
            taken.append(page)
        return taken

    def find(
        self, root: bytes, tokens: Sequence[int], own: Callable[[int], str] = lambda page: ""
    ) -> tuple[list[int], list[bytes]]:
        """Pages that hold the beginning of `tokens`, and their keys; they are not taken yet. The last token is always left
        to compute, since its logits are wanted. `own` says what else the n-th page is computed by."""
        pages: list[int] = []
        keys: list[bytes] = []
        if not self.reuse:
            return pages, keys
        key = root
        for start in range(0, (len(tokens) - 1) // PAGE * PAGE, PAGE):
            key = next_key(key, tokens[start : start + PAGE], own(start // PAGE))
            page = self._page_of.get(key)
            if page is None:
                break
            pages.append(page)
            keys.append(key)
        return pages, keys

    def share(self, pages: Sequence[int]) -> None:
        """Take found pages for one more request."""
        for page in pages:
            self._users[page] += 1
            self._idle.pop(page, None)

    def idle(self, pages: Sequence[int]) -> int:
        """How many of these pages no request holds, so that sharing them makes `available` smaller."""
        return sum(page in self._idle for page in pages)

    def publish(self, page: int, key: bytes) -> None:
        """A page is full and its content is computed: later requests may find it."""
        if self.reuse and key not in self._page_of and page not in self._key_of:
            self._page_of[key], self._key_of[page] = page, key

    def give_back(self, pages: Sequence[int]) -> None:
        """A request holds these pages no more. Those at its end become the first to be written over."""
        for page in reversed(pages):
            self._users[page] -= 1
            if self._users[page]:
                continue
            if page in self._key_of:
                self._idle[page] = None
            else:
                self._free.append(page)

    def forget(self) -> None:
        """Make nothing findable any more."""
        for page in self._idle:
            self._free.append(page)
        self._idle.clear()
        self._key_of.clear()
        self._page_of.clear()


def page_bytes(shapes: Sequence[LayerShape], dtype: torch.dtype) -> int:
    """Memory of one page over all layers."""
    return PAGE * dtype.itemsize * sum(shape.numbers() for shape in shapes)


def page_count(tokens: int) -> int:
    """Pages that hold this many tokens."""
    return -(-tokens // PAGE)


def gathered(keys: Tensor, values: Tensor, pages: Tensor) -> tuple[Tensor, Tensor]:
    """One layer's keys (heads, key width, tokens) and values (heads, tokens, value width) in these pages."""
    k, v = keys[pages], values[pages]
    return (
        k.permute(1, 2, 0, 3).reshape(k.shape[1], k.shape[2], -1),
        v.permute(1, 0, 2, 3).reshape(v.shape[1], -1, v.shape[3]),
    )
