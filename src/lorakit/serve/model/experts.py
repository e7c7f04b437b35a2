"""Experts in the serving model: tokens with the same adapters go through the stack together, as `W + B A` that is never built.

A stack's module chooses, multiplies and sums by itself, so that adapters are put in the place of its parameters
(`core/lazy_sum.py`), once for each group of tokens with the same adapters in a step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lorakit.core.layout import Transposed
from lorakit.core.lazy_sum import LazySum
from lorakit.core.storage import value_of
from lorakit.serve.model.attention import ForwardContext
from lorakit.serve.model.batch import Mixture
from lorakit.serve.model.packed import served_stacks
from lorakit.serve.request import Refused


class ExpertForward:
    """The forward of one module of experts of the serving model.

    Attributes:
        numbers: parameter -> its place among the layers of the model.
        tokens: how many tokens it saw in the last forward.
    """

    def __init__(self, module: nn.Module, numbers: dict[str, int], context: ForwardContext) -> None:
        self.module, self.numbers, self.context, self.tokens = module, numbers, context, 0
        self.original: Callable[..., Tensor] = module.forward
        self.stacks = served_stacks(module)
        self.inside = False

    def __call__(self, hidden: Tensor, *choice: Any, **options: Any) -> Tensor:
        batch = self.context.batch
        if batch is None or self.inside:
            return self.original(hidden, *choice, **options)
        first = next(iter(self.stacks.values()))
        times = first.count if first.order == "experts" else 1
        self.tokens = hidden.shape[0] // times
        mixture = batch.mixture
        if mixture is None or not any(mixture.touched[number] for number in self.numbers.values()):
            return self.original(hidden, *choice, **options)
        row = batch.row.long()
        if hidden.ndim != 2 or len(row) * times != hidden.shape[0]:
            raise Refused(
                f"experts were called with {tuple(hidden.shape)} for {len(row)} tokens, so that whose each is is not known."
            )
        kinds = torch.from_numpy(mixture.kinds)[row]  # on the host, where sizes are known
        result: Tensor | None = None
        for kind in kinds.unique().tolist():
            own = (kinds == kind).repeat(times).nonzero().flatten().to(hidden.device)
            given, named = (
                [one[own] if isinstance(one, Tensor) else one for one in choice],
                {key: one[own] if isinstance(one, Tensor) else one for key, one in options.items()},
            )
            y = self._changed(mixture, kind, hidden[own], given, named)
            result = y.new_empty(hidden.shape[0], *y.shape[1:]) if result is None else result
            result[own] = y
        return hidden if result is None else result

    def _changed(
        self, mixture: Mixture, kind: int, hidden: Tensor, choice: Sequence[Any], options: dict[str, Any]
    ) -> Tensor:
        """The module's output for tokens whose adapters are those of this kind."""
        if kind < 0:
            return self.original(hidden, *choice, **options)
        run = mixture.kinds.tolist().index(kind)
        blend = [(adapter, weight) for at, adapter, weight in mixture.entries if at == run]
        sums: dict[str, Tensor] = {}
        for name, number in self.numbers.items():
            held = [(adapter.layers[number], weight) for adapter, weight in blend if number in adapter.layers]
            if not held:
                continue
            W = cast(Tensor, value_of(self.module, name))
            A = torch.cat([cast(Tensor, own.A) for own, _ in held], 1)  # (experts, rank, in)
            B = torch.cat([cast(Tensor, own.B) * weight for own, weight in held], 1)  # (experts, rank, out)
            turned = isinstance(self.stacks[name].inner, Transposed)
            sums[name] = LazySum(W, (A.mT, B) if turned else (B.mT, A))
        self.inside = True
        try:
            return cast(Tensor, functional_call(self.module, sums, (hidden, *choice), options))
        finally:
            self.inside = False
