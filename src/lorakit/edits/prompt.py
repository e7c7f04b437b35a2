"""Prompt tuning: a soft prompt, trained rows before the input's embeddings; the model stays as it is.

    input = [P; Emb(x)]        P (tokens, hidden)

P starts as embeddings of random vocabulary entries ("vocabulary"), of a text ("text": repeated or cut to the length), or
uniform in ±0.5 ("random", the paper's weakest). It costs `tokens` positions of every input. 20 tokens at width 576 train
11,520 numbers. It wants a far higher learning rate than a delta (0.01 to 0.3), and catches up with full training only on
very large models. In an encoder-decoder the encoder gets it, and the decoder looks at it too. Lester et al. 2021, arXiv
2104.08691.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from lorakit.core.delta import Card
from lorakit.core.options import option
from lorakit.edits.contract import INPUT, Anatomy, EditMethod, Place, Prompt
from lorakit.errors import LorakitError


@dataclass(frozen=True, kw_only=True)
class PromptMethod(EditMethod):
    """What all methods that put prompt rows before the input have in common."""

    blends = False
    family = "prompt"
    reason = "a prompt is rows of the input and no weight of any layer"

    tokens: int = option(20, "how many rows stand in front of the input", minimum=1, peft="num_virtual_tokens")

    def places(self, anatomy: Anatomy, layers: Sequence[int] | None) -> list[Place]:
        if layers is not None:
            raise LorakitError(
                f"attach: {self.name} adds rows to the model's input and acts in no layer; leave layers out."
            )
        return [INPUT]


@dataclass(frozen=True, kw_only=True)
class PromptTuning(PromptMethod):
    """The options of prompt tuning."""

    name = "prompt-tuning"
    card = Card(
        title="Prompt tuning",
        formula="input = [P; Emb(x)]",
        parameters=lambda anatomy, spec: spec.tokens * anatomy.hidden,
        paper="arXiv 2104.08691",
        use="When an adapter must be a few kilobytes and the model large.",
        limits="Takes positions of every input; prompts do not blend.",
        identity=False,
    )

    start: Literal["vocabulary", "text", "random"] = option(
        "vocabulary", "what the rows start as: embeddings of random vocabulary entries, of a text, or random numbers"
    )
    text: str | None = option(None, "text whose embeddings the rows start as, with start text")
    tokenizer: str | None = option(
        None, "hub name or folder of the tokenizer that reads the text; the model's own by default"
    )
    ids: tuple[int, ...] | None = option(None, "the text's tokens, where they are known; else the tokenizer finds them")

    def __post_init__(self) -> None:
        if self.ids is not None:
            object.__setattr__(self, "ids", tuple(self.ids))
        super().__post_init__()
        if (self.start == "text") != (self.text is not None or self.ids is not None):
            raise LorakitError(
                f'{self.name}: start is {self.start!r} and text {self.text!r}; start="text" needs a text, and a text '
                'start="text".'
            )

    def with_tokenizer(self, tokenizer: Any) -> Self:
        if self.start != "text" or self.ids is not None:
            return self
        return self.replace(ids=tuple(tokenizer(self.text, add_special_tokens=False)["input_ids"]))

    def build(self, place: Place, anatomy: Anatomy, folded: bool = False) -> PromptRows:
        P = torch.empty(self.tokens, anatomy.hidden)
        if folded:
            return PromptRows(self, place, P)
        if self.start == "random":
            return PromptRows(self, place, P.uniform_(-0.5, 0.5))
        assert anatomy.embed is not None
        ids = self.ids if self.start == "text" else torch.randint(0, anatomy.vocabulary, (self.tokens,)).tolist()
        if ids is None:
            raise LorakitError(
                f"attach: {self.name} starts from a text and needs a tokenizer; give tokenizer=, a hub name or folder."
            )
        if not ids:
            raise LorakitError(f"attach: the text {self.text!r} that {self.name} starts from has no token.")
        whole = (list(ids) * -(-self.tokens // len(ids)))[: self.tokens]
        return PromptRows(self, place, anatomy.embed(whole).detach().to(torch.promote_types(P.dtype, torch.float32)))


class PromptRows(Prompt):
    """P (tokens, hidden)."""

    def __init__(self, spec: PromptMethod, place: Place, P: Tensor) -> None:
        super().__init__(spec, place)
        self.P = nn.Parameter(P)

    def rows(self) -> Tensor:
        return self.P
