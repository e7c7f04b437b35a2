"""From rows to tokens and labels: every example says exactly which tokens it is learned from.

A row becomes text by a template, the text becomes tokens, and the spans that carry loss become labels. Three things
go wrong here in silence elsewhere, and are checked instead:

- tokens that merge across the end of the prompt, so that training sees another prompt than generation will. The
  prompt's own tokens must begin the example; where they do not, prompt and completion are tokenised apart, and where
  that changes the text, the row is refused;
- an answer without its end, which teaches a model never to stop. The end-of-turn token is inside the loss, and is
  added where the template has none;
- rows cut short until nothing is left to learn. What is cut and what is dropped is counted and told.

Labels are as Hugging Face has them: aligned with the tokens, -100 where there is no loss. The first token has none,
since nothing predicts it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from lorakit.errors import LorakitError, plural
from lorakit.files.prompt import Prompt, as_chat, opened
from lorakit.train.config.options import DataOptions
from lorakit.train.data.formats import RowReader, each_row, refuse_bad_rows, sort_out
from lorakit.train.data.reading import BadRow, Row, Rows, load_rows
from lorakit.train.data.templates import (
    ChatTemplate,
    Conversation,
    TextTemplate,
    UnusableRow,
    diverges,
    shared_prefix_length,
    text_of,
)
from lorakit.train.data.tokenise import IGNORED, Ends, Labeller, Tokenised, cut, split

T = TypeVar("T")

log = logging.getLogger("lorakit.train")


@dataclass(frozen=True)
class Example:
    """One tokenised example; `labels[t]` is predicted from the tokens before position t, -100 means no loss."""

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class Report:
    """What became of the rows.

    Attributes:
        source: where the rows came from.
        format: what a row held.
        template: the template in words.
        rows: rows read.
        examples: examples made of them.
        tokens, label_tokens: of all examples; label tokens carry loss.
        longest: tokens of the longest example.
        max_length: the limit.
        truncated: rows that were cut, and `tokens_cut` the tokens that they lost.
        split: further examples made from long texts.
        too_long: rows dropped because they were too long (`overflow: drop`).
        without_labels: rows dropped because cutting left nothing to learn.
        bad: rows that could not be used, and were skipped.
        apart: rows whose prompt and completion had to be tokenised apart.
        special: rows whose text spells a special token, which the tokenizer reads as one.
        shared_prefix: tokens with which all examples begin.
        alone: rows of several answers, each of which became an example of its own.
        unused: columns and fields of messages that make no difference, and in how many rows.
        repeated: examples whose tokens and labels are those of an earlier one.
    """

    source: str
    format: str
    template: str
    rows: int
    examples: int
    tokens: int
    label_tokens: int
    longest: int
    max_length: int
    truncated: int = 0
    tokens_cut: int = 0
    split: int = 0
    too_long: int = 0
    without_labels: int = 0
    bad: tuple[BadRow, ...] = ()
    apart: int = 0
    special: int = 0
    shared_prefix: int = 0
    alone: int = 0
    unused: tuple[tuple[str, int], ...] = ()
    repeated: int = 0

    def lines(self) -> list[str]:
        """The report for people: one line of facts, and one for everything that was not used as it stood."""
        told = [
            f"{self.source}: {plural(self.rows, 'row')} ({self.format}), {plural(self.examples, 'example')}, {self.tokens:,} "
            f"tokens ({self.label_tokens:,} with loss), longest {self.longest:,}; template: {self.template}"
        ]
        notes = [
            (
                self.truncated,
                "row",
                f"truncated to {self.max_length} tokens: {self.tokens_cut:,} tokens lost",
            ),
            (self.alone, "row", "became an example for each answer: its form depends on what follows"),
            (self.split, "example", f"added by splitting texts longer than {self.max_length} tokens"),
            (self.too_long, "row", f"dropped: longer than {self.max_length} tokens"),
            (self.without_labels, "row", f"dropped: no labelled token within {self.max_length} tokens"),
            (len(self.bad), "row", f"skipped, the first: {self.bad[0] if self.bad else ''}"),
            (self.apart, "row", "tokenised apart: the end of the prompt would merge with the completion"),
            (
                self.special,
                "row",
                "with special tokens as text (<|im_end|>, say): the model will treat them as real turn ends",
            ),
        ]
        said = told + [f"{plural(count, noun)} {words}" for count, noun, words in notes if count]
        if self.examples == 1:
            said.append("a single example: the model will learn it by heart")
        elif self.repeated:
            said.append(f"{plural(self.repeated, 'example')} the same as an earlier one")
        spare = ", ".join(f"{name} ({plural(count, 'row')})" for name, count in self.unused)
        return said + ([f"not used, since no template writes it: {spare}"] if spare else [])

    @classmethod
    def of(
        cls, rows: Rows, examples: Sequence[Any], label_tokens: int, bad: tuple[BadRow, ...], **facts: Any
    ) -> Report:
        """The report of examples made of rows."""
        lengths = [len(example.input_ids) for example in examples]
        return cls(
            source=rows.source,
            rows=len(rows) + len(rows.bad),
            examples=len(examples),
            tokens=sum(lengths),
            label_tokens=label_tokens,
            longest=max(lengths, default=0),
            bad=bad,
            **facts,
        )


@dataclass(frozen=True)
class Prepared:
    """Examples, and the report of how they came about. Of a classifier they are labelled texts, and `names` its classes by
    index; `prompt` is the form in which the model was asked, None where it was not (plain text, a classifier)."""

    examples: list[Any]
    report: Report
    names: tuple[str, ...] = ()
    prompt: Prompt | None = None

    def __len__(self) -> int:
        return len(self.examples)


@dataclass(frozen=True)
class Question:
    """A row asked instead of learned: the prompt's tokens and text, the expected answer, and the row's place."""

    prompt_ids: list[int]
    prompt: str
    answer: str
    where: str


def load_splits(options: DataOptions) -> tuple[Rows, Rows | None]:
    """The rows to train on and those to evaluate on, shuffled, held out and limited as the options say.

    Raises:
        LorakitError: a source cannot be read; both would be the same rows; or nothing is left to train on.
    """
    rows = load_rows(options.train, split=options.split, subset=options.subset)
    if options.shuffle_seed is not None:
        rows = rows.shuffled(options.shuffle_seed)
    evaluation: Rows | None = None
    if options.evaluation is not None or options.evaluation_split is not None:
        source = options.train if options.evaluation is None else options.evaluation
        split = options.evaluation_split or options.split
        trained = f"the rows that are trained on ({source}, split {split}); name others, or give data.evaluation_size"
        if source == options.train and split == options.split:
            raise LorakitError(f"data.evaluation names {trained}")
        evaluation = load_rows(source, split=split, subset=options.subset)
        known = {_content(row) for row in rows.rows}
        seen = sum(_content(row) in known for row in evaluation.rows)
        if seen == len(evaluation) and len({_content(row) for row in evaluation.rows}) == len(known):
            raise LorakitError(f"data.evaluation holds {trained}")
        if seen:
            log.warning(
                "data.evaluation: %s of %s are trained on too, so that the evaluation looks better than it is",
                f"{seen:,}",
                plural(len(evaluation), "row"),
            )
    elif options.evaluation_size:
        size = options.evaluation_size
        held = int(size) if size >= 1 else max(1, round(size * len(rows)))
        if held >= len(rows):
            raise LorakitError(f"data.evaluation_size holds out {held} rows, but there are only {len(rows)}")
        evaluation, rows = rows.take(rows.rows[:held], ()), rows.take(rows.rows[held:])
    if evaluation is not None and options.evaluation_limit is not None:
        evaluation = evaluation.take(evaluation.rows[: options.evaluation_limit])
    if options.limit is not None:
        rows = rows.take(rows.rows[: options.limit])
    return rows, evaluation


def _content(row: Row) -> int:
    """What a row holds, as a number by which two rows can be compared."""
    return hash(json.dumps(row.fields, sort_keys=True, default=str))


def prepare(rows: Rows, tokenizer: Any, options: DataOptions) -> Prepared:
    """Tokenised examples of the rows, with labels.

    Args:
        rows: from `load_rows` or `load_splits`.
        tokenizer: a Hugging Face tokenizer.
        options: the data section of the configuration.

    Raises:
        LorakitError: rows cannot be used (the first few with file, line and reason) and `on_bad_row` is raise; a row
            is too long and `overflow` is refuse; nothing is left; the format cannot be told from the columns.
    """
    maker = _Maker(rows, tokenizer, options)
    tokenised, unusable = maker.tokenised()
    bad = (*rows.bad, *unusable)
    refuse_bad_rows(bad, len(rows) + len(rows.bad), options)
    limit = length_limit(tokenizer, options)
    examples: list[Example] = []
    counts = dict.fromkeys(("truncated", "tokens_cut", "split", "too_long", "without_labels", "apart"), 0)
    for row, one in tokenised:
        counts["apart"] += one.apart
        ids, labels = one.ids, one.labels
        if len(ids) <= limit:
            pieces = [(ids, labels)]
        elif options.overflow == "refuse":
            raise LorakitError(
                f"{row.where}: {len(ids)} tokens, above data.max_length {limit}; raise the limit, or choose "
                "data.overflow: cut, cut-start, split or drop"
            )
        elif options.overflow == "drop":
            counts["too_long"] += 1
            continue
        elif options.overflow == "split":
            pieces = split(ids, labels, limit, len(maker.opening))
            counts["split"] += len(pieces) - 1
        else:
            counts["truncated"] += 1
            counts["tokens_cut"] += len(ids) - limit
            pieces = [cut(ids, labels, limit, options.overflow, bool(maker.opening))]
        for piece_ids, piece_labels in pieces:
            piece_labels = [IGNORED, *piece_labels[1:]]
            if all(label == IGNORED for label in piece_labels):
                counts["without_labels"] += 1
            else:
                examples.append(Example(piece_ids, piece_labels))
    report = Report.of(
        rows,
        examples,
        sum(len(example.labels) - example.labels.count(IGNORED) for example in examples),
        bad,
        format=maker.reader.format,
        template=maker.reader.words,
        max_length=limit,
        special=maker.reader.count_special_tokens(),
        shared_prefix=shared_prefix_length([example.input_ids for example in examples]),
        alone=maker.alone,
        unused=tuple(sorted(maker.reader.unused.items())),
        repeated=len(examples) - len({hash((*one.input_ids, *one.labels)) for one in examples}),
        **counts,
    )
    if not examples:
        long = counts["truncated"] + counts["too_long"]
        more = f" Raise data.max_length (now {limit}), or cut the start of prompts: data.overflow: cut-start."
        told = "; ".join(report.lines()) + "." + more * bool(long)
        raise LorakitError(f"prepare: no example is left of {rows.source}. {told}")
    return Prepared(examples, report, prompt=maker.prompt(examples))


def questions(rows: Rows, tokenizer: Any, options: DataOptions) -> list[Question]:
    """The rows as questions with known answers, for answers that are generated or scored.

    The prompt is what the template opens for an answer; of a conversation, the last assistant turn is asked.

    Raises:
        LorakitError: rows cannot be used (as in `prepare`), or they are texts, which ask nothing.
    """
    maker = _Maker(rows, tokenizer, options)
    found, bad = maker.asked()
    refuse_bad_rows(bad, len(rows), options)
    return found


def choice_ids(choices: Sequence[str], rows: Rows, tokenizer: Any, options: DataOptions) -> list[list[int]]:
    """The tokens of each possible answer as they follow a prompt of `rows`, without the end of turn.

    Where one answer begins another ("yes", "yes, but"), all keep their end-of-turn token, or the longer could never
    be told from the shorter.

    Raises:
        LorakitError: a choice is empty, or an answer's tokens depend on the prompt before it.
    """
    if not choices or not all(choice.strip() for choice in choices) or len(set(choices)) < len(choices):
        raise LorakitError(f"evaluate.choices: expected different answers, none empty, found {list(choices)}")
    plain = options.replace(on_bad_row="skip")
    tried: list[list[list[int]]] = []
    for row in rows.rows[:3]:
        maker = _Maker(rows.take([row], ()), tokenizer, plain)
        tried.append([maker.completion(choice) for choice in choices])
    if not tried or any(one != tried[0] for one in tried[1:]):
        raise LorakitError(
            "evaluate.choices: the tokens of an answer depend on the prompt before it; use evaluate.answers: generate"
        )
    ends = Ends(tokenizer)
    closed = [ends.with_end(ids) for ids in tried[0]]
    bare = [ends.without_end(ids) for ids in tried[0]]
    begins = any(a is not b and a == b[: len(a)] for a in bare for b in bare)
    return closed if begins else bare


def length_limit(tokenizer: Any, options: DataOptions) -> int:
    """The longest example in tokens: `data.max_length`, or what the tokenizer says the model takes if that is less."""
    return min(options.max_length, int(min(getattr(tokenizer, "model_max_length", None) or 1e9, 1e9)))


class _Maker:
    """The way of one source's rows from columns to tokens: a reader and a labeller that fit each other."""

    def __init__(self, rows: Rows, tokenizer: Any, options: DataOptions) -> None:
        self.reader = RowReader(rows, tokenizer, options)
        is_text = self.reader.format == "text"
        if options.overflow == "split" and not is_text:
            raise LorakitError(
                f"data.overflow split is for text alone, found {self.reader.format}; use cut, cut-start or drop"
            )
        self.is_chat = self.reader.template.is_chat and not is_text
        self.labeller = Labeller(
            tokenizer, opens=not self.is_chat, learn_all=not options.completion_only_loss, must_end=not is_text
        )
        self.opening = self.labeller.opening
        self.alone = 0

    def tokenised(self) -> tuple[list[tuple[Row, Tokenised]], list[BadRow]]:
        """Tokens and labels of every usable row, in order, and the unusable rows."""
        template = self.reader.template
        if not self.is_chat:
            rendered, bad = self.reader.texts()
        else:
            assert isinstance(template, ChatTemplate)
            conversations, bad = self.reader.conversations()
            if self.reader.format == "messages" and template.marks and not self.labeller.learn_all:
                marked, more = each_row(conversations, self._mark)
                return self._each(marked), bad + more
            texts, more = sort_out(conversations, template.render([c for _, c in conversations]))
            rendered, bad = self._each(texts), bad + more
        tokenised, more = sort_out(rendered, self.labeller.label([one for _, one in rendered]))
        return self._each(tokenised), bad + more

    def _each(self, rows: Sequence[tuple[Row, Sequence[T]]]) -> list[tuple[Row, T]]:
        """Every example with its row; those that a row has more of are counted."""
        self.alone += sum(len(made) > 1 for _, made in rows)
        return [(row, one) for row, made in rows for one in made]

    def _mark(self, conversation: Conversation) -> list[Tokenised]:
        """The examples of a conversation by the marks of its template: one where every prompt is how the whole begins and every
        answer is marked in it, else one for each answer."""
        template, labeller, messages = self.reader.template, self.labeller, conversation.messages
        assert isinstance(template, ChatTemplate)
        answers = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
        given = template.before(conversation, [at for at in answers if at])
        prompts = dict(zip(answers, ([] if answers[0] else [[]]) + labeller.encode(given), strict=True))
        ids, mask = template.marked(conversation)
        if all(ids[: len(prompt)] == prompt for prompt in prompts.values()):
            starts = [len(prompts[at]) for at in answers]
            each = [
                labeller.within(mask, starts, [at]) for at in range(len(answers)) if answers[at] in conversation.learned
            ]
            if all(map(any, each)):
                return [labeller.label_marked(ids, [int(any(marks)) for marks in zip(*each, strict=True)])]
        made = []
        for at in conversation.learned:
            ids, mask = template.marked(replace(conversation, messages=messages[: at + 1], learned=(at,)))
            prompt = prompts[at]
            if ids[: len(prompt)] != prompt:
                decode = labeller.tokenizer.decode
                raise UnusableRow(diverges(decode(prompt), decode(ids)))
            mask = labeller.within(mask, [len(prompt)], [0])
            if not any(mask):
                raise UnusableRow("the chat template's {% generation %} marks cover nothing of an answer")
            made.append(labeller.label_marked(ids, mask))
        return made

    def prompt(self, examples: Sequence[Example]) -> Prompt | None:
        """The form in which the model is asked in these examples, for those who ask it later."""
        template, options, tokenizer = self.reader.template, self.reader.options, self.labeller.tokenizer
        if self.reader.format == "text":
            return None
        ends = {self.labeller.ends.last_of([label for label in one.labels if label != IGNORED]) for one in examples}
        stop = tuple(tokenizer.convert_ids_to_tokens(sorted(end for end in ends if end is not None)))
        given: dict[str, Any] = {
            "template": None, "system": options.system, "arguments": dict(options.template_arguments)
        }  # fmt: skip
        place = f"the template of its training ({self.reader.words})"
        if isinstance(template, ChatTemplate):
            given |= {"date": template.date} if template.date else {}
            return Prompt(template.jinja, stop, given=given, place=place)
        head = "".join(tokenizer.convert_ids_to_tokens(self.opening))
        opens = bool(head) and not template.text.startswith(head)
        closing = template.closing
        closed = bool(closing) and self.labeller.ends.closes(self.labeller.encode([closing])[0])
        ending = "" if closed else tokenizer.eos_token or ""
        jinja = as_chat(template.pieces, template.placeholders, options.system, head if opens else "", ending)
        return Prompt(jinja, stop, opens, {**given, "template": template.text}, place=place)

    def asked(self) -> tuple[list[Question], list[BadRow]]:
        """Every row as a question."""
        reader, template = self.reader, self.reader.template
        if reader.format == "text":
            raise LorakitError("questions: rows of text hold no answers; use prompt and completion, or messages")
        asked: list[tuple[Row, str, str]] = []
        if isinstance(template, ChatTemplate):
            conversations, bad = reader.conversations()
            prompts = template.prompts([c for _, c in conversations])
            for (row, c), prompt in zip(conversations, prompts, strict=True):
                if isinstance(prompt, UnusableRow):
                    bad.append(BadRow(row.where, str(prompt)))
                else:
                    asked.append((row, prompt, text_of(c.messages[c.learned[-1]].get("content"))))
        else:
            rendered, bad = reader.texts()
            closing = template.closing if isinstance(template, TextTemplate) else ""
            for row, one in rendered:
                start = one.spans[-1][0]
                asked.append((row, one.text[:start], one.text[start:].removesuffix(closing)))
        encoded = self.labeller.encode([prompt for _, prompt, _ in asked])
        return [
            Question(opened(ids, self.labeller.opening), prompt, answer.strip(), row.where)
            for (row, prompt, answer), ids in zip(asked, encoded, strict=True)
        ], bad

    def completion(self, answer: str) -> list[int]:
        """The learned tokens at the end of the only row, had it this answer."""
        self.reader.put_answer(answer)
        made, bad = self.tokenised()
        if not made:
            raise LorakitError(f"evaluate.choices: {answer!r} cannot be put after a prompt: {bad[0]}")
        labels = made[-1][1].labels
        last = max(at for at, label in enumerate(labels) if label != IGNORED)
        before = max((at for at in range(last) if labels[at] == IGNORED), default=-1)
        return labels[before + 1 : last + 1]
