"""Trainable tokens: some rows of a table train alone, such as the embeddings of new tokens.

    W'[i] = R[i] for i in tokens        every other row stays; R starts at the base's own rows

A row is an entry of an embedding's vocabulary, or an output of any other layer. R holds the rows themselves and not what is
added to them (as PEFT has it), so that an adapter for tokens that a resized model drew at random means the same on a copy of
it that drew others. 10 tokens of a model of width 2048 train 20,480 numbers, where the whole table would be hundreds of
millions. A layer that shares the embedding's weight (a tied head) follows it: one R acts in both.

Beside another method: attach(model, LoRA(), trainable_tokens=[...]).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorakit.core.delta import Call, Card, Delta, Form, Method, Pool, Shape
from lorakit.core.options import option
from lorakit.errors import LorakitError


@dataclass(frozen=True, kw_only=True)
class TrainableTokens(Method):
    """The options of trainable tokens."""

    name = "trainable-tokens"
    card = Card(
        title="Trainable tokens",
        formula="W'[i] = R[i] for the tokens i",
        parameters=lambda shape, spec: len(spec.tokens) * (shape.out if shape.lookup else shape.in_),
        paper="-",
        use="When a model must learn new tokens, and their embeddings alone train.",
        limits="A token has a row in the table.",
    )

    tokens: tuple[int, ...] = option(
        (), "the rows that train: token numbers, or outputs of a layer that is no embedding", minimum=0, peft="token_indices",
        from_peft=tuple,
    )  # fmt: skip

    def __post_init__(self) -> None:
        given: Any = self.tokens
        if not isinstance(given, str | int):
            object.__setattr__(self, "tokens", tuple(given))
        super().__post_init__()
        twice = {token for token in self.tokens if self.tokens.count(token) > 1} if len(set(given)) < len(given) else ()
        if twice:
            raise LorakitError(f"trainable-tokens: token {min(twice)} is named twice.")

    def check(self, shape: Shape, path: str) -> None:
        rows = shape.in_ if shape.lookup else shape.out
        if not self.tokens:
            raise LorakitError(
                f"attach: trainable-tokens was given no tokens to train in {path}, such as tokens=[32000]."
            )
        if max(self.tokens) >= rows:
            raise LorakitError(
                f"attach: {path} has {rows} rows, and none for token {max(self.tokens)}. New tokens get theirs by "
                "model.resize_token_embeddings(len(tokenizer)), before the adapter is attached."
            )


class TokenRows(Delta, of=TrainableTokens):
    """R (tokens, width) of one table."""

    spec: TrainableTokens
    index: Tensor

    def __init__(self, spec: TrainableTokens, shape: Shape, pool: Pool) -> None:
        super().__init__(spec, shape, pool)
        self.R = nn.Parameter(torch.zeros(len(spec.tokens), shape.out if shape.lookup else shape.in_))
        self.register_buffer("index", torch.tensor(spec.tokens, dtype=torch.long), persistent=False)

    def follower(self, shape: Shape) -> Delta:
        own = TokenRows(self.spec, shape, self.pool)
        del own.R
        own.leader = (self,)
        return own

    def rows(self) -> Tensor:
        """R, its own or that of the layer that it follows."""
        return cast(Tensor, self.leader[0].R if self.leader else self.R)

    def _table(self, W: Tensor) -> Tensor:
        return W.T if self.shape.lookup else W

    def _change(self, W: Tensor) -> tuple[Tensor, Tensor]:
        """What is added to the rows (tokens, width), and which they are."""
        R, index = self.rows(), self.index.to(W.device)
        return R - self._table(W)[index].to(R.dtype), index

    def begin(self, W: Tensor) -> None:
        if not self.leader:
            with torch.no_grad():
                self.R.copy_(self._table(W)[self.index.to(W.device)])

    def dense(self, W: Tensor) -> Tensor:
        D, index = self._change(W)
        return self._table(D.new_zeros(self._table(W).shape).index_copy(0, index, D))

    def act(self, call: Call) -> Tensor:
        return call.some(*self._change(call.W))

    def form(self, W: Tensor, b: Tensor | None) -> Form:
        """As many ranks as there are tokens."""
        D, index = self._change(W)
        places = D.new_zeros(self._table(W).shape[0], len(index))
        places[index, torch.arange(len(index), device=places.device)] = 1
        return Form(B=D.T, A=places.T) if self.shape.lookup else Form(B=places, A=D)
