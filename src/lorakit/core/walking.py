"""A model's modules by path, as if no adapter were attached, and how names and patterns match paths.

Matching follows PEFT's rules: a suffix or a pattern ends a path at a dot.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

from torch import nn

from lorakit.core.layer import Adapted
from lorakit.core.patterns import match, matches

_ATTENTION = re.compile(r"(^|\.)[^.]*att(n|ention)[^.]*(\.|$)", re.IGNORECASE)
_BLOCK = re.compile(r"(?:^|\.)(\d+)\.")

T = TypeVar("T")


class AdapterModules(nn.ModuleDict):
    """Modules that adapters put into a model beside its own; `walk` passes over them."""


def walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules of the base model by path, seen as if no adapter were attached.

    An adapted layer appears as its base. nn.MultiheadAttention is one layer: it never calls its out_proj.
    """

    seen: set[int] = set()
    pending = [("", model)]
    while pending:
        path, module = pending.pop()
        base = module.base if isinstance(module, Adapted) else module
        if id(base) in seen:
            continue
        seen.add(id(base))
        yield path, base
        if isinstance(base, nn.MultiheadAttention):
            continue
        for name, child in reversed(base._modules.items()):
            if child is not None and not isinstance(child, AdapterModules):
                pending.append((f"{path}.{name}" if path else name, child))


def in_attention(path: str) -> bool:
    """Whether a module stands in an attention module, by its path."""
    return bool(_ATTENTION.search(path))


def has_suffix(path: str, suffix: str) -> bool:
    """Whether `path` is `suffix` or ends with it at a dot."""
    return path == suffix or path.endswith("." + suffix)


def block_of(path: str, lists: Sequence[str] | None = None) -> int | None:
    """The number of the block that a module stands in: the first number of its path (after one of `lists`, if given)."""
    if not lists:
        number = _BLOCK.search(path)
        return int(number.group(1)) if number else None
    for name in lists:
        found = match(rf"(?:^|.*?\.){name}\.(\d+)\.", path)
        if found:
            return int(found.group(1))
    return None


def value_for(patterns: Mapping[str, T], path: str) -> T | None:
    """The value of the first pattern that matches a path, by PEFT's rule: the pattern ends the path at a dot."""
    for pattern, value in patterns.items():
        if matches(rf"(.*\.)?({pattern})$", path, whole=False):
            return value
    return None


def exactly(path: str) -> str:
    """The pattern that matches this path and no other."""
    return f"^{re.escape(path)}"


def as_patterns(values: Mapping[str, T], pattern: Callable[[str], str] = exactly) -> tuple[T, dict[str, T]]:
    """Values by path as `value_for` reads them: the most common one, and patterns for the paths that have another."""
    common = Counter(values.values()).most_common(1)[0][0]
    return common, {pattern(path): value for path, value in values.items() if value != common}
