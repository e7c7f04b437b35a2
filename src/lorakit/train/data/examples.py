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

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from lorakit.errors import LorakitError, plural
from lorakit.files.prompt import Prompt, as_chat, opened
from lorakit.train.config.options import DataOptions
from lorakit.train.data.blocks import Blocks
from lorakit.train.data.formats import Fields, RowReader, each_row, refuse_bad_rows, sort_out
from lorakit.train.data.rows import BadRow, Row, Rows
from lorakit.train.data.store import CACHE_FORMAT, Builder, Made, being_cached, cached
from lorakit.train.data.templates import (
    ChatTemplate,
    Conversation,
    TextTemplate,
    UnusableRow,
    diverges,
    text_of,
)
from lorakit.train.data.tokenise import IGNORED, Ends, Labeller, Tokenised, cut, split

if TYPE_CHECKING:
    from rich.console import Console

T = TypeVar("T")

log = logging.getLogger("lorakit.train")

TOLD = 100_000
"""Rows above which tokenisation shows how far it is."""


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
        leftover: with `pack_to`, tokens of the last block, which is shorter where the texts do not fill it.
        is_part: whether it is of one of several sources.
        sources: of several sources, the report of each; what is not used as it stands is told there.
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
    leftover: int = 0
    sources: tuple[Report, ...] = ()
    is_part: bool = False

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
            (self.leftover, "token", "left over in the last block, which is shorter"),
            (
                self.special,
                "row",
                "with special tokens as text (<|im_end|>, say): the model will treat them as real turn ends",
            ),
        ]
        said = told + [f"{plural(count, noun)} {words}" for count, noun, words in notes if count]
        spare = ", ".join(f"{name} ({plural(count, 'row')})" for name, count in self.unused)
        if self.examples == 1 and not self.is_part:
            said.append("a single example: the model will learn it by heart")
        elif self.repeated:
            said.append(f"{plural(self.repeated, 'example')} the same as an earlier one")
        said += [f"not used, since no template writes it: {spare}"] if spare else []
        return said + [line for one in self.sources for line in one.lines()]


@dataclass(frozen=True)
class Prepared:
    """Examples, and the report of how they came about. Of a classifier they are labelled texts, and `names` its classes by
    index; `prompt` is the form in which the model was asked, None where it was not (plain text, a classifier)."""

    examples: Sequence[Any]
    report: Report
    names: tuple[str, ...] = ()
    prompt: Prompt | None = None

    def __len__(self) -> int:
        return self.report.examples


@dataclass(frozen=True)
class Question:
    """A row asked instead of learned: the prompt's tokens and text, the expected answer, and the row's place."""

    prompt_ids: list[int]
    prompt: str
    answer: str
    where: str


def prepare(rows: Rows, tokenizer: Any, options: DataOptions, console: Console | None = None) -> Prepared:
    """Tokenised examples of the rows, with labels.

    Args:
        rows: from `load_rows` or `load_splits`.
        tokenizer: a Hugging Face tokenizer.
        options: the data section of the configuration.
        console: where the progress over many rows is shown.

    Raises:
        LorakitError: rows cannot be used (the first few with file, line and reason) and `on_bad_row` is raise; a row
            is too long and `overflow` is refuse; nothing is left; the format cannot be told from the columns.
    """
    makers = makers_of(rows, tokenizer, options)
    made = _made(rows, makers, tokenizer, options, console)
    found = made.facts["sources"]
    unusable = [BadRow(*one) for facts in found for one in facts["bad"]]
    bad = (*rows.bad, *unusable)
    refuse_bad_rows(bad, len(rows) + len(rows.bad), options)
    chosen = made.order(rows.order)
    examples: Any = made.examples.pick(chosen)
    owners, labels = rows.sources[made.owners[chosen]], made.labels[chosen]
    reports = []
    for facts, (number, maker) in zip(found, makers.items(), strict=True):
        mine = owners == number
        lengths, skipped = examples.lengths[mine], [BadRow(*one) for one in facts["bad"]]
        reports.append(
            Report(
                source=maker.reader.source,
                rows=len(maker.rows) + (len(rows.bad) if len(makers) == 1 else 0),
                examples=int(mine.sum()),
                tokens=int(lengths.sum()),
                label_tokens=int(labels[mine].sum()),
                longest=int(lengths.max(initial=0)),
                bad=bad if len(makers) == 1 else tuple(skipped),
                format=maker.reader.format,
                template=maker.reader.words,
                max_length=maker.limit,
                shared_prefix=facts["shared"],
                repeated=made.repeated(np.unique(chosen[mine])),
                is_part=len(makers) > 1,
                unused=tuple((name, count) for name, count in facts["unused"]),
                **facts["counts"],
            )
        )
    report = reports[0] if len(reports) == 1 else _total(rows, reports)
    if options.pack_to is not None and len(examples):
        examples = Blocks(examples, options.pack_to, options.pack_across, int(labels.sum()))
        of_blocks = {"examples": len(examples), "label_tokens": examples.label_tokens, "longest": examples.longest}
        report = replace(report, **of_blocks, leftover=examples.leftover, max_length=options.pack_to)
    if not len(examples):
        long = any(one.truncated or one.too_long for one in reports)
        more = (
            f" Raise data.max_length (now {report.max_length}), or cut the start of prompts: data.overflow: cut-start."
        )
        told = "; ".join(report.lines()) + "." + more * long
        raise LorakitError(f"prepare: no example is left of {rows.source}. {told}")
    return Prepared(examples, report, prompt=_prompt(list(makers.values()), [facts["stops"] for facts in found]))


def _total(rows: Rows, reports: Sequence[Report]) -> Report:
    """The report of all sources together."""

    def words(name: str) -> str:
        return " and ".join(dict.fromkeys(str(getattr(one, name)) for one in reports))

    def total(name: str) -> int:
        return sum(int(getattr(one, name)) for one in reports)

    return Report(
        source=plural(len(reports), "source"),
        format=words("format"),
        template=words("template"),
        rows=total("rows") + len(rows.bad),
        examples=total("examples"),
        tokens=total("tokens"),
        label_tokens=total("label_tokens"),
        longest=max(one.longest for one in reports),
        max_length=max(one.max_length for one in reports),
        bad=rows.bad,
        sources=tuple(reports),
    )


def _prompt(makers: Sequence[Maker], stops: Sequence[Sequence[str]]) -> Prompt | None:
    """The one prompt that an adapter has: of the first source that asks anything."""
    made = ((maker.reader.source, maker.prompt(ends)) for maker, ends in zip(makers, stops, strict=True))
    found = [(source, one) for source, one in made if one is not None]
    if any((one.template, one.given) != (found[0][1].template, found[0][1].given) for _, one in found[1:]):
        log.warning("sources have different templates; the adapter will be asked by that of %s", found[0][0])
    return found[0][1] if found else None


def makers_of(rows: Rows, tokenizer: Any, options: DataOptions) -> dict[int, Maker]:
    """The way to tokens of each source that the rows are of, by its number."""
    numbers = [int(one) for one in np.unique(rows.sources)] or [0]
    if len(numbers) == 1:
        return {number: Maker(rows, tokenizer, options.of(number)) for number in numbers}
    named = rows.names or tuple(f"source {number + 1}" for number in range(max(numbers) + 1))
    return {
        number: Maker(replace(rows.of(number), bad=(), source=named[number]), tokenizer, options.of(number))
        for number in numbers
    }


def _made(rows: Rows, makers: dict[int, Maker], tokenizer: Any, options: DataOptions, console: Console | None) -> Made:
    """The examples of all rows: out of the cache, or into it, or in memory."""
    wanted = bool(rows.identity) and (options.cache == "on" or (options.cache == "auto" and rows.is_stored))
    key = _cache_key(rows, makers, tokenizer) if wanted else ""
    made = cached(key) if wanted else None
    if made is None:
        with being_cached(key) if wanted else nullcontext((None, lambda _: None)) as (file, keep):
            builder = Builder(file)
            with _progress(console, len(rows)) as advance:
                told = [maker.build(builder, advance) for maker in makers.values()]
            made = builder.made({"sources": told})
            keep(made)
    # the row of each example: the number of rows built before it, to its place among all
    places = [np.flatnonzero(rows.sources == number)[maker.rows.storage] for number, maker in makers.items()]
    return replace(made, owners=np.concatenate(places)[made.owners] if len(made.owners) else made.owners)


def _cache_key(rows: Rows, makers: dict[int, Maker], tokenizer: Any) -> str:
    """A hash of everything that decides the tokens: the content of the files, which rows, tokenizer, templates and options."""
    core = getattr(tokenizer, "backend_tokenizer", None)
    about = {
        "format": CACHE_FORMAT,
        "content": [identity() for identity in rows.identity],
        "tokenizer": [
            type(tokenizer).__name__,
            core.to_str() if core is not None else sorted(tokenizer.get_vocab().items()),
            repr(tokenizer.special_tokens_map),
        ],
        "sources": [maker.identity() for maker in makers.values()],
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()


@contextmanager
def _progress(console: Console | None, total: int) -> Iterator[Any]:
    """What is told how many rows are through: a bar on a terminal, else a line in the log now and then."""
    if total < TOLD:
        yield lambda _: None
        return
    if console is not None and console.is_terminal:
        from rich.progress import Progress

        with Progress(console=console, transient=True) as bar:
            task = bar.add_task("tokenising", total=total)
            yield lambda count: bar.advance(task, count)
        return
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        if (done + count) * 20 // total > done * 20 // total:
            log.info("tokenised %s of %s rows", f"{done + count:,}", f"{total:,}")
        done += count

    yield advance


def questions(rows: Rows, tokenizer: Any, options: DataOptions) -> list[Question]:
    """The rows as questions with known answers, for answers that are generated or scored.

    The prompt is what the template opens for an answer; of a conversation, the last assistant turn is asked.

    Raises:
        LorakitError: rows cannot be used (as in `prepare`), or they are texts, which ask nothing.
    """
    found: list[tuple[int, Question]] = []
    bad: list[BadRow] = []
    for number, maker in makers_of(rows, tokenizer, options).items():
        asked, more = maker.asked()
        place = {rows.rows[at].where: at for at in np.flatnonzero(rows.sources == number).tolist()}
        found += [(place[one.where], one) for one in asked]
        bad += more
    refuse_bad_rows(bad, len(rows), options)
    return [question for _, question in sorted(found, key=lambda one: one[0])]


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
        maker = Maker(rows.take([row], ()), tokenizer, plain.of(row.source))
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


@dataclass
class Counts:
    """What became of the rows of a source, as `Report` has it."""

    truncated: int = 0
    tokens_cut: int = 0
    split: int = 0
    too_long: int = 0
    without_labels: int = 0
    apart: int = 0
    special: int = 0
    alone: int = 0


class Maker:
    """The way of one source's rows from columns to tokens: a reader and a labeller that fit each other."""

    def __init__(self, rows: Rows, tokenizer: Any, options: DataOptions) -> None:
        self.rows, self.options = rows, options
        self.reader = RowReader(rows, tokenizer, options)
        if options.pack_to is not None and not self.reader.is_plain:
            raise LorakitError(
                f"data.pack_to is for text or tokens, found {self.reader.format} in {self.reader.source}; batches of "
                "other rows are packed without it (train.fast_path)"
            )
        most = int(getattr(tokenizer, "model_max_length", None) or 1e9)
        if options.pack_to is not None and options.pack_to > most:
            raise LorakitError(
                f"data.pack_to is {options.pack_to}, and the tokenizer says that the model takes {most} tokens"
            )
        if options.overflow == "split" and not self.reader.is_plain:
            raise LorakitError(
                f"data.overflow split is for text alone, found {self.reader.format}; use cut, cut-start or drop"
            )
        self.is_chat = self.reader.template.is_chat and not self.reader.is_plain
        template = self.reader.template  # a new token ends an answer where the template writes it
        source = template.jinja if isinstance(template, ChatTemplate) else template.text
        self.labeller = Labeller(
            tokenizer,
            opens=not self.is_chat,
            learn_all=not options.completion_only_loss,
            must_end=not self.reader.is_plain,
            within=frozenset(token for token in options.special_tokens if token not in source),
        )
        self.opening = self.labeller.opening if self.reader.format != "tokens" else []
        self.limit = length_limit(tokenizer, options)
        self.counts = Counts()

    def identity(self) -> Any:
        """What decides the tokens of the rows besides their content and the tokenizer."""
        reader, rows = self.reader, self.rows.rows
        names = ("columns", "ignore", "overflow", "completion_only_loss", "turns", "system", "special_tokens")
        template = reader.template
        which: Any = getattr(rows, "places", None)
        digest = hashlib.sha256(
            repr([row.where for row in rows]).encode() if which is None else np.sort(which).tobytes()
        ).hexdigest()
        text = template.jinja if isinstance(template, ChatTemplate) else template.text
        given = {name: getattr(self.options, name) for name in names}
        return [reader.format, text, self.limit, self.options.pack_to is not None, digest, given]

    def build(self, builder: Builder, advance: Any) -> dict[str, Any]:
        """Adds the examples of all rows, each with the number of its row in the order of building; returns what is told of
        them."""
        first, bad, stops = builder.rows, list[BadRow](), set[int | None]()
        for _, chunk in self.rows.chunks():
            place = {id(row): builder.rows + at for at, row in enumerate(chunk)}
            for row, ids, labels in self.examples(chunk, bad):
                builder.add(place[id(row)], ids, labels)
                if not self.reader.is_plain:
                    stops.add(self.labeller.ends.last_learned(labels))
            builder.rows += len(chunk)
            advance(len(chunk))
        assert builder.rows - first == len(self.rows)
        names = self.labeller.tokenizer.convert_ids_to_tokens(sorted(end for end in stops if end is not None))
        return {
            "bad": [(one.where, one.reason) for one in bad],
            "stops": list(names),
            "shared": builder.take_shared(),
            "counts": vars(self.counts),
            "unused": sorted(self.reader.unused.items()),
        }

    def examples(self, rows: Sequence[Row], bad: list[BadRow]) -> Iterator[tuple[Row, list[int], list[int]]]:
        """Tokens and labels of every example that some rows give, cut to the limit; what cannot be used is added to `bad`.

        Raises:
            LorakitError: a row is too long, and `overflow` is refuse.
        """
        options, counts = self.options, self.counts
        fields = self.reader.read(rows)
        counts.special += self.reader.count_special_tokens(fields)
        tokenised, unusable = self.tokenised(fields)
        bad += unusable
        for row, one in tokenised:
            counts.apart += one.apart
            ids, labels = one.ids, one.labels
            if options.pack_to is not None:
                yield row, ids, labels
                continue
            if len(ids) <= self.limit:
                pieces = [(ids, labels)]
            elif options.overflow == "refuse":
                raise LorakitError(
                    f"{row.where}: {len(ids)} tokens, above data.max_length {self.limit}; raise the limit, or choose "
                    "data.overflow: cut, cut-start, split or drop"
                )
            elif options.overflow == "drop":
                counts.too_long += 1
                continue
            elif options.overflow == "split":
                pieces = split(ids, labels, self.limit, len(self.opening))
                counts.split += len(pieces) - 1
            else:
                counts.truncated += 1
                counts.tokens_cut += len(ids) - self.limit
                pieces = [cut(ids, labels, self.limit, options.overflow, bool(self.opening))]
            for piece_ids, piece_labels in pieces:
                piece_labels = [IGNORED, *piece_labels[1:]]
                if all(label == IGNORED for label in piece_labels):
                    counts.without_labels += 1
                else:
                    yield row, piece_ids, piece_labels

    def tokenised(self, fields: Fields) -> tuple[list[tuple[Row, Tokenised]], list[BadRow]]:
        """Tokens and labels of every usable row, in order, and the unusable rows."""
        template = self.reader.template
        if self.reader.format == "tokens":
            given, bad = self.reader.tokens(fields)
            return [(row, Tokenised(ids, labels)) for row, (ids, labels) in given], bad
        if not self.is_chat:
            rendered, bad = self.reader.texts(fields)
        else:
            assert isinstance(template, ChatTemplate)
            conversations, bad = self.reader.conversations(fields)
            if self.reader.format == "messages" and template.marks and not self.labeller.learn_all:
                marked, more = each_row(conversations, self._mark)
                return self._each(marked), bad + more
            texts, more = sort_out(conversations, template.render([c for _, c in conversations]))
            rendered, bad = self._each(texts), bad + more
        tokenised, more = sort_out(rendered, self.labeller.label([one for _, one in rendered]))
        return self._each(tokenised), bad + more

    def _each(self, rows: Sequence[tuple[Row, Sequence[T]]]) -> list[tuple[Row, T]]:
        """Every example with its row; those that a row has more of are counted."""
        self.counts.alone += sum(len(made) > 1 for _, made in rows)
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

    def prompt(self, stops: Sequence[str]) -> Prompt | None:
        """The form in which the model is asked in these examples, for those who ask it later; `stops` ended the answers."""
        template, options, tokenizer = self.reader.template, self.reader.options, self.labeller.tokenizer
        if self.reader.is_plain:
            return None
        stop = tuple(stops)
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
        if reader.is_plain:
            raise LorakitError(
                f"questions: rows of {reader.format} hold no answers; use prompt and completion, or messages"
            )
        fields = reader.read(self.rows.rows)
        asked: list[tuple[Row, str, str]] = []
        if isinstance(template, ChatTemplate):
            conversations, bad = reader.conversations(fields)
            prompts = template.prompts([c for _, c in conversations])
            for (row, c), prompt in zip(conversations, prompts, strict=True):
                if isinstance(prompt, UnusableRow):
                    bad.append(BadRow(row.where, str(prompt)))
                else:
                    asked.append((row, prompt, text_of(c.messages[c.learned[-1]].get("content"))))
        else:
            rendered, bad = reader.texts(fields)
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
        made, bad = self.tokenised(self.reader.answered(self.reader.read(self.rows.rows), answer))
        if not made:
            raise LorakitError(f"evaluate.choices: {answer!r} cannot be put after a prompt: {bad[0]}")
        labels = made[-1][1].labels
        last = max(at for at, label in enumerate(labels) if label != IGNORED)
        before = max((at for at in range(last) if labels[at] == IGNORED), default=-1)
        return labels[before + 1 : last + 1]
