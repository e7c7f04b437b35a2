"""A pair of hooks around the calls of a module: the one way in which edits and routers stand around a model's calls."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

Enter = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any], Any] | None]
Leave = Callable[[Any, Any], Any]


class CallHooks:
    """`enter(module, args, kwargs)` gives None (leave this call alone), or the call's new arguments and something to keep
    while it runs; `leave(kept, output)` gives the call's new output, or None. `leave` is also called if the call fails,
    with None for its output."""

    def __init__(self, enter: Enter, leave: Leave) -> None:
        self.enter, self.leave = enter, leave
        self.calls: dict[int, list[Any]] = {}
        """Thread -> what is kept for each of its calls that is running, the innermost last; None for one left alone."""

    @property
    def kept(self) -> Any:
        """What is kept for this thread's innermost call; None outside of one."""
        running = self.calls.get(threading.get_ident())
        return running[-1] if running else None

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        running = self.calls.setdefault(threading.get_ident(), [])
        running.append(None)
        entered = self.enter(module, args, kwargs)
        if entered is None:
            return None
        args, kwargs, running[-1] = entered
        return args, kwargs

    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        running = self.calls.get(threading.get_ident())
        if not running:
            return None
        kept = running.pop()
        if not running:
            del self.calls[threading.get_ident()]
        return None if kept is None else self.leave(kept, output)

    def on(self, module: nn.Module, first: bool = False) -> list[RemovableHandle]:
        """Put both on a module; with `first`, `enter` comes before the hooks that are there already."""
        return [
            module.register_forward_pre_hook(self._before, prepend=first, with_kwargs=True),
            module.register_forward_hook(self._after, with_kwargs=True, always_call=True),
        ]


@contextmanager
def hooked(handles: list[RemovableHandle]) -> Iterator[None]:
    """Take these hooks off at the end of the block."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
