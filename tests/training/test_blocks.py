"""Packing to a length: a law (every token of the data occurs exactly once), planted bugs that it finds, and the loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.training.test_data import CHAT, byte_pairs, learned, options, rows_of, text_of
from tests.training.tiny import llama

from lorakit.errors import LorakitError
from lorakit.train.data import blocks
from lorakit.train.data.blocks import Blocks, documents
from lorakit.train.data.examples import prepare
from lorakit.train.data.store import Example, Examples
from lorakit.train.data.tokenise import IGNORED
from lorakit.train.evaluate import evaluate_loss
from lorakit.train.step.loss import padded_loss

TEXTS = [{"text": f"the film {'was good ' * (n % 4)}{n}"} for n in range(23)]


def packed(size: int, crosses: bool, texts: list[dict[str, Any]] | None = None, bos: bool = False) -> Blocks:
    given = options(pack_to=size, pack_across=crosses, max_length=4)
    made = prepare(rows_of(*(texts or TEXTS)), byte_pairs(bos=bos), given)
    assert isinstance(made.examples, Blocks)
    return made.examples


def unlawful(size: int, crosses: bool, bos: bool = False) -> list[str]:
    """What of the law does not hold."""
    plain = prepare(rows_of(*TEXTS), byte_pairs(bos=bos), options(max_length=10_000)).examples
    expected = [token for example in plain for token in example.input_ids]
    made = packed(size, crosses, bos=bos)
    problems = []
    if [token for block in made for token in block.input_ids] != expected:
        problems.append("tokens are lost, repeated or moved")
    lengths = [len(block.input_ids) for block in made]
    if any(length != size for length in lengths[:-1]) or lengths[-1] > size or made.leftover != len(expected) % size:
        problems.append("blocks of another length")
    if lengths != made.lengths.tolist():
        problems.append("told other lengths")
    apart = documents(made)
    if not crosses and any(token == 1 for one in apart for token in one.input_ids[:-1]):  # </s> ends a text
        problems.append("a text sees another")
    if [token for one in apart for token in one.input_ids] != expected:
        problems.append("texts are not those of the blocks")
    if sum(label != IGNORED for one in apart for label in one.labels) != made.label_tokens:
        problems.append("told other labels")
    for one in apart:
        opening = int(bos and one.input_ids[0] == 0)
        if any(
            label != token for label, token in zip(one.labels[1 + opening :], one.input_ids[1 + opening :], strict=True)
        ):
            problems.append("a token is not learned")
    return problems


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("crosses", [False, True])
@pytest.mark.parametrize("size", [2, 3, 7, 16, 64, 5000])
def test_every_token_occurs_once(size: int, crosses: bool, bos: bool) -> None:
    problems = unlawful(size, crosses, bos)
    if bos and crosses:  # an opening token is predicted by nobody, wherever it stands
        problems = [one for one in problems if one != "a token is not learned"]
    assert problems == []


@pytest.mark.parametrize("plant", ["lost", "repeated", "crossing", "mask"])
def test_the_law_finds_planted_bugs(plant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if plant == "lost":  # the last block is dropped
        monkeypatch.setattr(Blocks, "__len__", lambda self: len(self.lengths) - 1)
    elif plant == "repeated":  # the piece at an edge is in both blocks
        read = Blocks.__init__

        def wrong(self: Blocks, *given: Any) -> None:
            read(self, *given)
            self.edges[1:-1] += 1
            self.edges[1] -= 1

        monkeypatch.setattr(Blocks, "__init__", wrong)
    elif plant == "crossing":
        monkeypatch.setattr(blocks, "documents", lambda examples: list(examples))
        monkeypatch.setitem(globals(), "documents", blocks.documents)
    else:
        one = blocks.example_of
        monkeypatch.setattr(blocks, "example_of", lambda tokens: one(tokens[::-1]))
    assert unlawful(16, False)


def test_the_loss_is_that_of_the_texts() -> None:
    model = llama()
    rng = np.random.default_rng(0)
    lengths = np.array([9, 4, 13, 1, 6])
    tokens = rng.integers(0, 61, lengths.sum(), dtype=np.int32)
    texts = Examples(tokens, np.cumsum(lengths) - lengths, lengths, "")
    apart, across = (Blocks(texts, 8, crosses, len(tokens)) for crosses in (False, True))
    pieces = [(0, 8), (8, 9), (9, 13), (13, 16), (16, 24), (24, 26), (26, 27), (27, 32), (32, 33)]
    by_hand = [Example(ids, [IGNORED, *ids[1:]]) for ids in (tokens[a:b].tolist() for a, b in pieces)]
    assert documents(apart) == by_hand
    expected = evaluate_loss(model, by_hand, batch_size=3)
    found = evaluate_loss(model, apart, batch_size=2)
    assert found.targets == expected.targets == apart.label_tokens
    assert float(found.total) == pytest.approx(float(expected.total), rel=1e-6)
    logits = model(torch.tensor([tokens[:8].tolist()])).logits[0, :-1].float()
    whole = torch.nn.functional.cross_entropy(logits, torch.tensor(tokens[1:8]).long(), reduction="sum")
    assert float(padded_loss(model, documents(across[:1]))[1].total) == pytest.approx(whole.item(), rel=1e-5)
    assert across.label_tokens == len(tokens) - len(across)


def test_what_is_told_and_refused(tmp_path: Path) -> None:
    report = prepare(rows_of(*TEXTS), byte_pairs(), options(pack_to=16)).report
    assert f"{report.leftover} tokens left over in the last block, which is shorter" in report.lines()
    assert (report.rows, report.longest) == (23, 16)
    with pytest.raises(LorakitError, match=r"data\.pack_to is for text or tokens, found prompt-completion"):
        prepare(rows_of({"prompt": "a", "completion": "b"}), byte_pairs(CHAT), options(pack_to=16))
    tokenizer = byte_pairs()
    tokenizer.model_max_length = 8
    with pytest.raises(
        LorakitError, match=r"data\.pack_to is 16, and the tokenizer says that the model takes 8 tokens"
    ):
        prepare(rows_of(*TEXTS), tokenizer, options(pack_to=16))


# -- rows that are tokenised already -----------------------------------------------------------------------------------------


def test_rows_that_are_tokenised_already() -> None:
    tokenizer = byte_pairs(CHAT)
    made = prepare(
        rows_of(
            {"input_ids": [5, 6, 7]},
            {"input_ids": [5, 6, 7], "labels": [-100, -100, 7]},
            {"input_ids": [5, 6, 7, 1, 1], "attention_mask": [1, 1, 1, 0, 0], "labels": [-100, 6, 7, -100, -100]},
        ),
        tokenizer,
        options(),
    )
    assert [one.input_ids for one in made.examples] == [[5, 6, 7]] * 3
    assert [one.labels for one in made.examples] == [[-100, 6, 7], [-100, -100, 7], [-100, 6, 7]]
    assert made.prompt is None
    assert "(tokens)" in made.report.lines()[0]
    cut = prepare(rows_of({"input_ids": list(range(5, 15))}), tokenizer, options(max_length=4, overflow="split"))
    assert [one.input_ids for one in cut.examples] == [[5, 6, 7, 8], [9, 10, 11, 12], [13, 14]]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"input_ids": [5, 9999]},
            r'"input_ids" holds 9999, and this tokenizer has ids from 0 to \d+; was another tokenizer',
        ),
        ({"input_ids": [5, -1]}, '"input_ids" holds -1'),
        ({"input_ids": [5, 6], "labels": [5]}, '"labels" has 1 numbers and "input_ids" has 2; they must agree'),
        ({"input_ids": [5, 6], "attention_mask": [1]}, '"attention_mask" has 1 numbers'),
        ({"input_ids": [5, 6], "labels": [6, -100]}, r'"labels" holds 6 at position 0, where the token is 5'),
        ({"input_ids": "5 6"}, "\"input_ids\" is '5 6', expected a list of integers"),
        ({"input_ids": []}, "expected a list of integers"),
        ({"input_ids": [5, 6.0]}, "expected a list of integers"),
    ],
)
def test_tokens_that_cannot_be_used(row: dict[str, Any], said: str) -> None:
    with pytest.raises(LorakitError, match="row 1: .*" + said):
        prepare(rows_of(row), byte_pairs(CHAT), options())


# -- which turns carry loss --------------------------------------------------------------------------------------------------


def test_the_turns_that_carry_loss() -> None:
    turns = [
        ("user", "a"),
        ("assistant", "one"),
        ("user", "b"),
        ("assistant", "two"),
        ("user", "c"),
        ("assistant", "three"),
    ]
    messages: list[dict[str, Any]] = [{"role": role, "content": text} for role, text in turns]
    tokenizer = byte_pairs(CHAT)

    def said(which: str, changes: dict[int, dict[str, Any]]) -> list[str]:
        row = [{**message, **changes.get(at, {})} for at, message in enumerate(messages)]
        return learned(tokenizer, prepare(rows_of({"messages": row}), tokenizer, options(turns=which)).examples[0])

    one, two, three = (f"{word}<|im_end|>\n" for word in ("one", "two", "three"))
    assert said("all", {}) == [one, two, three]
    assert said("last", {}) == [three]
    assert said("marked", {3: {"train": True}}) == [two]
    assert said("marked", {1: {"weight": 1}, 3: {"weight": 0}, 5: {"train": True}}) == [one, three]
    assert said("all", {3: {"weight": 0}}) == [one, three]
    for which, changes in (("marked", {}), ("last", {5: {"train": False}})):
        with pytest.raises(
            LorakitError, match=f'"messages" has no assistant turn that data.turns: {which} would learn'
        ):
            said(which, changes)
    [example] = prepare(rows_of({"messages": messages}), tokenizer, options(turns="last")).examples
    assert "one" in text_of(tokenizer, example)
