"""From text to tokens and labels: exact at the edges of what is learned.

The tokens of a prompt must be the tokens that generation will be given. So the prompt is tokenised alone and with
what follows, and the one must begin the other. Where they merge, both are tokenised apart, provided that this says the
same; else the row is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

from lorakit.errors import LorakitError
from lorakit.files.prompt import opened, opening_of
from lorakit.train.data.templates import Rendered, UnusableRow

IGNORED = -100
"""The label of a token without loss."""


@dataclass(frozen=True)
class Tokenised:
    """Tokens and labels of one row; `apart` when prompt and completion had to be tokenised apart."""

    ids: list[int]
    labels: list[int]
    apart: bool = False


@dataclass
class Ends:
    """Which tokens end a turn: special tokens, of which the tokenizer's end of text is one, but for those `within` answers."""

    tokenizer: Any
    within: frozenset[str] = frozenset()
    ids: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        added = getattr(self.tokenizer, "added_tokens_decoder", {})
        # Some tokenizers add runs of spaces as tokens; those end nothing.
        named = {index for index, token in added.items() if str(token).strip()}
        own = set(self.tokenizer.convert_tokens_to_ids(sorted(self.within)))
        self.ids = frozenset((named | set(self.tokenizer.all_special_ids)) - own)
        self._blank: dict[int, bool] = {}

    def is_blank(self, token: int) -> bool:
        """Whether a token is white space, and no special token."""
        if token not in self._blank:
            self._blank[token] = token not in self.ids and not self.tokenizer.decode([token]).strip()
        return self._blank[token]

    def closes(self, ids: Sequence[int]) -> bool:
        """Whether these tokens finish with an end of turn, white space after it aside."""
        return self.last_of(ids) is not None

    def last_of(self, ids: Sequence[int]) -> int | None:
        """The end of turn that these tokens finish with, white space after it aside."""
        last = next((token for token in reversed(ids) if not self.is_blank(token)), None)
        return last if last in self.ids else None

    def last_learned(self, labels: Sequence[int]) -> int | None:
        """The end of turn that the tokens with loss finish with, white space after it aside."""
        last = next((one for one in reversed(labels) if one != IGNORED and not self.is_blank(one)), None)
        return last if last in self.ids else None

    def without_end(self, ids: list[int]) -> list[int]:
        """The tokens before the first special token."""
        end = next((position for position, token in enumerate(ids) if token in self.ids), len(ids))
        return ids[:end]

    def with_end(self, ids: list[int]) -> list[int]:
        """The tokens up to the first special token, and that one."""
        return ids[: len(self.without_end(ids)) + 1]


class Labeller:
    """One tokenizer's way from text to tokens and labels.

    Args:
        tokenizer: a Hugging Face tokenizer.
        opens: whether the tokenizer's own first token (a BOS) is put before texts; chat templates write it themselves.
        learn_all: loss on prompts too.
        must_end: whether it is an error that there is no token to end a text with.
        within: special tokens that stand within answers and end none.
    """

    def __init__(
        self, tokenizer: Any, opens: bool, learn_all: bool, must_end: bool, within: frozenset[str] = frozenset()
    ) -> None:
        self.tokenizer, self.learn_all, self.must_end = tokenizer, learn_all, must_end
        self.ends = Ends(tokenizer, within)
        self.opening = opening_of(tokenizer) if opens else []

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Tokens of each text, without any that the tokenizer would add."""
        if not texts:
            return []
        encoded = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        return list(encoded["input_ids"])

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    def label(self, rendered: list[Rendered]) -> list[list[Tokenised] | UnusableRow]:
        """Tokens of every text; labels on its spans, each of which must begin at a token that the prompt ends with.

        A text of several answers that had to be tokenised apart becomes one for each: before every answer stand the tokens
        that its prompt will have.
        """
        edges = [sorted({at for span in one.spans for at in span if 0 < at < len(one.text)}) for one in rendered]
        both = list(zip(rendered, edges, strict=True))
        tokens = iter(self.encode([one.text[:at] for one, inside in both for at in (len(one.text), *inside)]))
        results: list[list[Tokenised] | UnusableRow] = []
        for one, inside in both:
            ids = next(tokens)
            cuts = {at: next(tokens) for at in inside}  # character -> the tokens of the text before it
            try:
                whole = self._label_one(one, ids, cuts)
                if not whole.apart or len(one.spans) < 2 or self.learn_all:
                    results.append([whole])
                    continue
                alone = self.label([Rendered(one.text[:end], ((start, end),)) for start, end in one.spans])
                results.append([_usable(part)[0] for part in alone])
            except UnusableRow as reason:
                results.append(reason)
        return results

    def _label_one(self, one: Rendered, ids: list[int], cuts: dict[int, list[int]]) -> Tokenised:
        apart = any(ids[: len(part)] != part for part in cuts.values())
        positions = {0: 0, len(one.text): len(ids), **{at: len(part) for at, part in cuts.items()}}
        if apart:
            places = sorted({0, len(one.text), *cuts})
            pieces = self.encode([one.text[a:b] for a, b in pairwise(places)])
            separate = [token for piece in pieces for token in piece]
            if self._decode(separate) != self._decode(ids):
                raise UnusableRow(
                    "the tokens of prompt and completion merge, and tokenised separately they give another "
                    "text; move the white "
                    "space from the end of the prompt to the start of the completion"
                )
            ids = separate
            positions = dict(zip(places, accumulate(map(len, pieces), initial=0), strict=True))
        labels = [IGNORED] * len(ids)
        spans = ((0, len(one.text)),) if self.learn_all else one.spans
        for start, end in spans:
            said = ids[positions[start] : positions[end]]
            if self.must_end and all(token in self.ends.ids or self.ends.is_blank(token) for token in said):
                raise UnusableRow(
                    "an answer is empty after the template is applied; it would teach the model to answer nothing"
                )
            labels[positions[start] : positions[end]] = said
        whole = opened(ids, self.opening)
        labels = [IGNORED] * (len(whole) - len(ids)) + labels
        return self._closed(Tokenised(whole, labels, apart))

    @staticmethod
    def within(mask: list[int], starts: Sequence[int], which: Sequence[int]) -> list[int]:
        """A mask without the answers that are not asked for; `starts` are where each begins."""
        kept = [0] * len(mask)
        ends = [*starts[1:], len(mask)]
        for at in which:
            kept[starts[at] : ends[at]] = mask[starts[at] : ends[at]]
        return kept

    def label_marked(self, ids: list[int], mask: list[int]) -> Tokenised:
        """Labels by a template's own 0/1 mask, and by the end of turn after each marked run where the mask leaves it out.

        Raises:
            UnusableRow: the last turn goes on, unmarked, with text that the model would never learn to write.
        """
        labels = [token if marked else IGNORED for token, marked in zip(ids, mask, strict=True)]
        runs_end = [at for at in range(len(ids)) if mask[at] and not (at + 1 < len(ids) and mask[at + 1])]
        for last in runs_end:
            if ids[last] in self.ends.ids:
                continue
            after = next((at for at in range(last + 1, len(ids)) if not self.ends.is_blank(ids[at])), len(ids))
            after = last + 1 if last + 1 < len(ids) and ids[last + 1] in self.ends.ids else after
            if after == len(ids):  # nothing but white space follows: end there
                return self._closed(Tokenised(ids[: last + 1], labels[: last + 1]))
            if (after == last + 1 and ids[after] in self.ends.ids) or ids[after] == self.tokenizer.eos_token_id:
                labels[last + 1 : after + 1] = ids[last + 1 : after + 1]
            elif last == runs_end[-1]:
                raise UnusableRow("the chat template's {% generation %} marks leave out how the assistant's turn ends")
        return self._closed(Tokenised(ids, labels))

    def _closed(self, one: Tokenised) -> Tokenised:
        """With the end of turn (or of text) after the last learned token, if it is not there already."""
        if one.labels[-1] == IGNORED or self.ends.closes(one.ids):
            return one
        end = self.tokenizer.eos_token_id
        if end is None:
            if not self.must_end:
                return one
            raise LorakitError(
                "prepare: the tokenizer has no end-of-text token and the template writes none, so the model would never "
                "learn to stop; set tokenizer.eos_token, or end data.template with a special token"
            )
        return Tokenised([*one.ids, end], [*one.labels, end], one.apart)


def _usable(made: list[Tokenised] | UnusableRow) -> list[Tokenised]:
    if isinstance(made, UnusableRow):
        raise made
    return made


def cut(ids: list[int], labels: list[int], limit: int, overflow: str, opens: bool) -> tuple[list[int], list[int]]:
    """Tokens and labels within the limit; `opens` where the first token begins every text."""
    if overflow == "cut-start":
        if opens and ids:  # the token that begins every text stays where the model knows it
            return [ids[0], *ids[1 - limit :]], [IGNORED, *labels[1 - limit :]]
        return ids[-limit:], labels[-limit:]
    return ids[:limit], labels[:limit]


def split(ids: list[int], labels: list[int], limit: int, opening: int) -> list[tuple[list[int], list[int]]]:
    """A long text as several examples, each begun as the first is."""
    step = limit - opening
    if step < 2:
        raise LorakitError(f"data.max_length {limit} leaves no room for text after {opening} opening tokens")
    head, silent = ids[:opening], [IGNORED] * opening
    body = range(opening, len(ids), step)
    return [(head + ids[at : at + step], silent + labels[at : at + step]) for at in body]
