"""Methods that hold another method: a spec over an inner spec, and a delta over an inner delta.

What a combinator does not say itself is said by what it holds: options and patterns, checks, which factors an initialiser sets,
roles of parameters. So DoRA works over any method, and `DoRA(inner=LoRA(rank=8)).rank` is 8.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

from torch import Tensor, nn

from lorakit.core.delta import Delta, LowRank, Method, Shape
from lorakit.core.options import option


def inner_option(default: type[Method], doc: str) -> Any:
    """The option `inner` of a combinator."""
    return option(doc=doc, factory=default, shown="a method's spec, such as LoRA(rank=8)")


class Combinator(Method):
    """The spec of a method over another one, `inner`."""

    inner: Method

    def __getattr__(self, name: str) -> Any:
        """An option of the inner method, as if it were its own."""
        if name.startswith("_") or name == "inner":  # asked while a copy or a pickle is being made
            raise AttributeError(name)
        return getattr(self.inner, name)

    @property
    def pattern_fields(self) -> Mapping[str, str]:
        return self.inner.pattern_fields

    def replace(self, **changes: Any) -> Self:
        """A copy with some options changed; those that are not its own are the inner method's."""
        own = {name: changes.pop(name) for name in list(changes) if name in self.option_names()}
        if changes:
            own["inner"] = own.get("inner", self.inner).replace(**changes)
        return super().replace(**own)

    def resized(self, rank: int) -> Self:
        return self.replace(inner=self.inner.resized(rank))

    def check(self, shape: Shape, path: str) -> None:
        self.inner.check(shape, path)

    def check_layers(self, paths: Sequence[str]) -> None:
        self.inner.check_layers(paths)

    def at(self, path: str) -> Method:
        inner = self.inner.at(path)
        return self if inner is self.inner else self.replace(inner=inner)


class Combined(Delta):
    """A delta over another one, `inner`."""

    inner: Delta

    def begin(self, W: Tensor) -> None:
        self.inner.begin(W)

    def low_rank(self) -> LowRank | None:
        return self.inner.low_rank()

    def roles(self) -> dict[str, str]:
        return self.inner.roles()

    def frozen(self) -> list[nn.Parameter]:
        return self.inner.frozen()
