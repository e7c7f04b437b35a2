"""What a row holds, and its text: columns under our names, checked, and put through a template.

A row that cannot be used becomes a `BadRow` with the reason; `refuse_bad_rows` is the one place that decides whether
that stops everything.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from lorakit.errors import LorakitError, nearest
from lorakit.files.prompt import Prompt
from lorakit.train.config.options import DataOptions
from lorakit.train.data.rows import BadRow, Row, Rows
from lorakit.train.data.templates import (
    JOINED,
    ChatTemplate,
    Conversation,
    Message,
    Rendered,
    TextTemplate,
    UnusableRow,
    check_roles,
    choose_template,
    is_learned,
    read_messages,
    read_tools,
)
from lorakit.train.data.tokenise import IGNORED

Fields = Sequence[tuple[Row, Mapping[str, Any]]]
"""Rows with what they hold."""

Given = TypeVar("Given")
Kept = TypeVar("Kept")


def detect_format(columns: Sequence[str], source: str = "the data") -> str:
    """What rows with these columns hold.

    Raises:
        LorakitError: nothing known fits, or more than one thing does; lists the columns.
    """
    found = [
        name
        for name, needed in (
            ("messages", {"messages"}),
            ("prompt-completion", {"prompt", "completion"}),
            ("text", {"text"}),
            ("tokens", {"input_ids"}),
            ("classification", {"text", "label"}),
        )
        if needed <= set(columns)
    ]
    if len(found) == 1:
        return found[0]
    listed = ", ".join(columns) or "none"
    if found:
        raise LorakitError(f"{source}: the columns ({listed}) fit {' and '.join(found)}; choose by data.format")
    raise LorakitError(
        f"{source}: the columns are {listed}; expected prompt and completion, messages, "
        "instruction and output (Alpaca), conversations (ShareGPT), text, or input_ids. "
        f"{_likely(columns)}, or use them in a data.template with placeholders."
    )


LIKELY = {
    "messages": ("messages", "conversation", "dialog", "dialogue", "chat", "turns"),
    "prompt": ("prompt", "question", "query", "instruction", "input", "source", "problem"),
    "completion": ("completion", "answer", "response", "output", "target", "reply", "solution"),
    "text": ("text", "content", "document", "body"),
}
"""Our columns, and what others call them."""


def _likely(columns: Sequence[str]) -> str:
    """Which of the columns may be meant by which of ours, as a sentence without its end."""
    found: dict[str, str] = {}
    for ours, theirs in LIKELY.items():
        for name in theirs:
            near = nearest(name, [one for one in columns if one not in found.values()], cutoff=0.8)
            if near and ours not in found:
                found[ours] = near[0]
    pairs = [{"messages"}, {"prompt", "completion"}, {"text"}]
    fits = next((pair for pair in pairs if pair <= set(found)), None)
    if fits is not None:
        mapping = ", ".join(f"{ours}: {found[ours]}" for ours in LIKELY if ours in fits and found[ours] != ours)
        return f"Did you mean data.columns: {{{mapping}}}? Give it so"
    hint = ""
    if any(len(name) > 24 or " " in name.strip() for name in columns):
        hint = "Is the line with the names of the columns missing? "
    return hint + "Say which columns these are by data.columns, e.g. {prompt: question, completion: answer}"


def say_missing(name: str, values: Mapping[str, Any]) -> str:
    """Why the text of a column cannot be used."""
    if name not in values:
        return f'there is no column "{name}"; the row has {", ".join(map(str, values)) or "none"}'
    value = values[name]
    if value is None or (isinstance(value, str) and not value.strip()):
        return f'"{name}" is empty'
    return f'"{name}" is {value!r:.40}, expected text'


def refuse_bad_rows(bad: Sequence[BadRow], total: int, options: DataOptions) -> None:
    """Raises for rows that cannot be used, naming the first few, unless they are to be skipped."""
    if bad and options.on_bad_row == "raise":
        shown = "\n".join(f"  {one}" for one in bad[:5])
        more = f"\n  and {len(bad) - 5:,} more" if len(bad) > 5 else ""
        raise LorakitError(
            f"prepare: {len(bad):,} of {total:,} rows cannot be used:\n{shown}{more}\n"
            "Correct them, or leave them out by data.on_bad_row: skip."
        )


def renamed(values: Mapping[str, Any], options: DataOptions) -> Mapping[str, Any]:
    """What a row holds, with columns under our names."""
    if not options.columns:
        return values
    away = set(options.columns.values()) - set(options.columns)
    kept = {name: value for name, value in values.items() if name not in away}
    return kept | {ours: values[theirs] for ours, theirs in options.columns.items() if theirs in values}


def fields_of(rows: Iterable[Row], options: DataOptions) -> list[tuple[Row, Mapping[str, Any]]]:
    """Rows with what they hold, columns under our names."""
    return [(row, renamed(row.fields, options)) for row in rows]


@dataclass(frozen=True)
class Survey:
    """What all rows of a source hold: a row for each set of columns that occurs, under our names; and whether any has tools.

    Raises LorakitError where a column that is to be renamed is in no row.
    """

    forms: tuple[Mapping[str, Any], ...]
    tools: bool

    @classmethod
    def of(cls, rows: Rows, options: DataOptions) -> Survey:
        """Look at every row once."""
        forms: dict[tuple[str, ...], Mapping[str, Any]] = {}
        tools = False
        for _, chunk in rows.chunks():
            for row in chunk:
                forms.setdefault(tuple(row.fields), row.fields)
                tools = tools or bool(renamed(row.fields, options).get("tools"))
        columns = dict.fromkeys(name for form in forms for name in form)
        for ours, theirs in options.columns.items():
            if forms and theirs not in columns:
                raise LorakitError(
                    f'data.columns: "{ours}" is mapped to "{theirs}", but the columns are {", ".join(columns)}'
                )
        return cls(tuple(renamed(one, options) for one in forms.values()), tools)

    def names(self, known: bool = False) -> tuple[str, ...]:
        """The columns, in order of appearance; `known`: with Alpaca and ShareGPT as prompt and completion or messages."""
        return tuple(dict.fromkeys(name for one in self.forms for name in (as_known(one) if known else one)))


def with_prompt(options: DataOptions, prompt: Prompt | None, rows: Rows) -> DataOptions:
    """The options by which rows are written as this adapter was asked in its training; plain text is asked nothing."""
    names = set(Survey.of(rows, options).names())
    is_text = options.format in ("text", "tokens") or (
        options.format == "auto" and {"text", "input_ids"} & names and not {"prompt", "messages"} & names
    )
    if prompt is None or is_text or options.format == "classification":
        return options
    text = prompt.given.get("template")
    asked: dict[str, Any] = {"template": prompt.template if text is None else str(text), "template_arguments": {}}
    asked["system"] = None if text is None else prompt.given.get("system")
    unsaid = dict.fromkeys(asked)  # by a source, too
    named = {"train": options.train_sources, "evaluation": options.evaluation_sources}
    own = {
        name: tuple(one.replace(**unsaid) for one in sources)
        for name, sources in named.items()
        if any(one.own for one in sources)
    }
    return options.replace(**asked, **own)


SHAREGPT = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant", "model": "assistant",
    "system": "system", "observation": "tool", "tool": "tool", "function_call": "assistant",
}  # fmt: skip
"""ShareGPT's names of who speaks, and the roles."""


def as_known(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """A row in Alpaca's or ShareGPT's form as prompt and completion, or as messages; any other as it is."""
    if {"instruction", "output"} <= set(values) and not {"prompt", "completion"} & set(values):
        rest = {name: value for name, value in values.items() if name not in ("instruction", "input", "output")}
        asked = [values["instruction"], *([values["input"]] if values.get("input") else [])]
        prompt = "\n\n".join(asked) if all(isinstance(one, str) for one in asked) else values["instruction"]
        return {**rest, "prompt": prompt, "completion": values["output"]}
    if "conversations" in values and "messages" not in values:
        rest = {name: value for name, value in values.items() if name != "conversations"}
        turns = values["conversations"]
        return {**rest, "messages": [_turn(one) for one in turns] if isinstance(turns, list) else turns}
    return values


def _turn(turn: Any) -> Any:
    """A turn of ShareGPT's as a message; whoever speaks under another name keeps it, and is refused as a role."""
    if not isinstance(turn, Mapping) or "from" not in turn:
        return turn
    speaker, value = str(turn["from"]), turn.get("value")
    rest = {name: item for name, item in turn.items() if name not in ("from", "value")}
    if speaker == "function_call" and isinstance(value, str):
        return {**rest, "role": "assistant", "tool_calls": f'[{{"type": "function", "function": {value}}}]'}
    return {**rest, "role": SHAREGPT.get(speaker, speaker), "content": value}


MEANT = frozenset(
    {"system", "tools", "tool_calls", "functions", "function_call", "weight", "train", "chosen", "rejected", "label",
     "labels", "score", "image", "images", "audio", "audios", "video", "videos", "reasoning_content", "reasoning",
     "thinking", "thoughts", "input"}
)  # fmt: skip
"""Fields whose meaning is known: a row that has one is not learned as if it had none."""


def read_tokens(values: Mapping[str, Any], vocabulary: int) -> tuple[list[int], list[int]]:
    """Ids and labels of a row that is tokenised already: all is learned without labels; what its mask hides is left out.

    Raises:
        UnusableRow: ids that the tokenizer does not have; labels or a mask of another length; a label that is neither -100 nor
            the token at its place.
    """

    def numbers(name: str) -> list[int] | None:
        given = values.get(name)
        if given is None and name != "input_ids":
            return None
        if not isinstance(given, list) or not given or not all(type(one) is int for one in given):
            raise UnusableRow(f'"{name}" is {given!r:.40}, expected a list of integers')
        if name != "input_ids" and len(given) != len(ids or ()):
            raise UnusableRow(
                f'"{name}" has {len(given)} numbers and "input_ids" has {len(ids or ())}; they must agree'
            )
        return given

    ids: list[int] | None = None
    ids = numbers("input_ids") or []
    labels, mask = numbers("labels") or list(ids), numbers("attention_mask") or [1] * len(ids)
    if wrong := [one for one in ids if not 0 <= one < vocabulary]:
        raise UnusableRow(
            f'"input_ids" holds {wrong[0]}, and this tokenizer has ids from 0 to {vocabulary - 1}; was another tokenizer used?'
        )
    for at, (token, label) in enumerate(zip(ids, labels, strict=True)):
        if label not in (IGNORED, token):
            raise UnusableRow(
                f'"labels" holds {label} at position {at}, where the token is {token}; a label is the token at its place, or '
                f"{IGNORED} for no loss (they are shifted while training)"
            )
    seen = [at for at, one in enumerate(mask) if one]
    return [ids[at] for at in seen], [labels[at] for at in seen]


class RowReader:
    """The rows of one source, on their way to text: their format and template, found once.

    Attributes:
        format: "prompt-completion", "messages", "text", "tokens", or "template" where placeholders name the columns.
        template: how they are written.
        words: the template in words.
    """

    def __init__(self, rows: Rows, tokenizer: Any, options: DataOptions) -> None:
        self.options, self.source, self.tokenizer = options, rows.source or "the data", tokenizer
        survey = Survey.of(rows, options)
        written = (options.template_arguments, survey.tools, options.date)
        given = (options.template, tokenizer, options.system, *written)
        self.template = choose_template(*given)
        # placeholders name the columns as they are
        self.known = self.template is JOINED or self.template.is_chat
        self.format = self._format(survey.names(self.known))
        self.unused: Counter[str] = Counter()
        self.is_plain = self.format in ("text", "tokens")
        self.words = f"none ({self.format} as it is)" if self.is_plain else self.template.words
        has_place = self.template.is_chat or (
            isinstance(self.template, TextTemplate) and "system" in self.template.placeholders
        )
        if options.system is not None and (self.is_plain or not has_place):
            raise LorakitError(
                f"data.system: the template ({self.words}) has no place for a system message; use a chat template, or "
                "{system} in data.template"
            )
        if options.template_arguments and (self.is_plain or not self.template.is_chat):
            raise LorakitError(f"data.template_arguments are for a chat template; the template is {self.words}")

    def read(self, rows: Iterable[Row]) -> list[tuple[Row, Mapping[str, Any]]]:
        """What some of the rows hold, in forms that are known."""
        fields = fields_of(rows, self.options)
        return [(row, as_known(values)) for row, values in fields] if self.known else fields

    def _format(self, names: tuple[str, ...]) -> str:
        asked = self.options.format
        if isinstance(self.template, TextTemplate) and self.template is not JOINED:
            if asked in ("auto", "prompt-completion"):
                return "template"
            raise LorakitError(
                f"data.template has placeholders, which rows of format {asked} cannot fill; "
                "use a Jinja chat template for messages, none for text"
            )
        if asked != "auto":
            found: str = asked
        elif names:
            found = detect_format(names, self.source)
        else:
            found = "text"  # nothing is readable: the bad rows are what will be told
        if found == "classification":
            raise LorakitError(f"{self.source}: rows of text and label are for a classifier; use prepare_labels")
        if found == "messages" and self.template is JOINED:
            raise LorakitError(
                f"{self.source}: rows of messages need a chat template, and this tokenizer has none; "
                "give one as data.template"
            )
        if found in ("text", "tokens") and self.options.template is not None and names:
            raise LorakitError(
                f"{self.source}: rows of {found} are taken as they are, but data.template is given; drop one"
            )
        return found

    def texts(self, fields: Fields) -> tuple[list[tuple[Row, Rendered]], list[BadRow]]:
        """The text of every row that needs no chat template, and the unusable rows."""
        return each_row(fields, self._text)

    def conversations(self, fields: Fields) -> tuple[list[tuple[Row, Conversation]], list[BadRow]]:
        """The messages of every row for a chat template, and the unusable rows."""
        return each_row(fields, self._conversation)

    def tokens(self, fields: Fields) -> tuple[list[tuple[Row, tuple[list[int], list[int]]]], list[BadRow]]:
        """The ids and labels of every row that is tokenised already, and the unusable rows."""
        return each_row(fields, self._tokens)

    def _account(self, values: Mapping[str, Any], used: Iterable[str], idle: Iterable[str] = ()) -> None:
        """What of a row is not used is refused if its meaning is known, else counted."""
        spare = [name for name, value in values.items() if name not in used and value not in (None, "", [], {})]
        for name in dict.fromkeys([*spare, *idle]):
            if name in self.options.ignore:
                continue
            if name in MEANT or name.endswith(" message"):
                raise UnusableRow(
                    f'"{name}" makes no difference to what is learned ({self.words}); use a template that writes it, or leave '
                    f"it out on purpose by data.ignore: [{name}]"
                )
            self.unused[name] += 1

    def _text(self, values: Mapping[str, Any]) -> Rendered:
        self._account(values, ("text",) if self.format == "text" else self.template.placeholders)  # type: ignore[union-attr]
        if self.format == "text":
            if not isinstance(values.get("text"), str) or not values["text"]:
                raise UnusableRow(say_missing("text", values))
            return Rendered(values["text"], ((0, len(values["text"])),))
        assert isinstance(self.template, TextTemplate)
        names = self.template.placeholders
        filled = dict(values)
        if self.options.system is not None:
            filled["system"] = values.get("system") or self.options.system
        for name in names:
            if not isinstance(filled.get(name), str) or (name == names[-1] and not filled[name].strip()):
                raise UnusableRow(say_missing(name, filled))
        return self.template.render(filled)

    def _tokens(self, values: Mapping[str, Any]) -> tuple[list[int], list[int]]:
        self._account(values, ("input_ids", "labels", "attention_mask", "token_type_ids", "length"))
        return read_tokens(values, len(self.tokenizer))

    def _conversation(self, values: Mapping[str, Any]) -> Conversation:
        if self.format == "messages":
            if "messages" not in values:
                raise UnusableRow(say_missing("messages", values))
            messages, before = read_messages(values["messages"], "messages"), 0
        else:
            asked = self._turns(values, "prompt", "user")
            messages, before = asked + self._turns(values, "completion", "assistant"), len(asked)
        assert isinstance(self.template, ChatTemplate)
        name = "messages" if self.format == "messages" else "completion"
        check_roles(messages, self.template.jinja, name)
        turns = self.options.turns
        marked = [is_learned(message, turns == "marked") for message in messages]
        learned = [index for index, yes in enumerate(marked) if yes and index >= before]
        if turns == "last":  # a last turn that is taken out of the loss leaves nothing
            last = max((at for at, message in enumerate(messages) if message["role"] == "assistant"), default=-1)
            learned = [last] if last in learned else []
        if not learned and turns != "all":
            raise UnusableRow(f'"{name}" has no assistant turn that data.turns: {turns} would learn')
        if not learned:
            roles = ", ".join(dict.fromkeys(message["role"] for message in messages))
            raise UnusableRow(f'"{name}" has no assistant turn to learn; its roles are {roles}')
        messages = [{key: item for key, item in one.items() if key not in self.options.ignore} for one in messages]
        if isinstance(values.get("system"), str) and values["system"].strip():
            if messages[0]["role"] == "system":
                raise UnusableRow('it has a system message and a column "system"; keep one')
            messages, learned = [{"role": "system", "content": values["system"]}, *messages], [at + 1 for at in learned]
        tools = None if "tools" in self.options.ignore else read_tools(values.get("tools"))
        conversation = Conversation(messages, tuple(learned), tools)
        used = (
            ("messages", "tools", "system")
            if self.format == "messages"
            else ("prompt", "completion", "tools", "system")
        )
        self._account(values, used, self.template.idle(conversation))
        return conversation

    def _turns(self, values: Mapping[str, Any], name: str, role: str) -> list[Message]:
        value = values.get(name)
        if isinstance(value, list):
            return read_messages(value, name)
        if not isinstance(value, str) or not value.strip():
            raise UnusableRow(say_missing(name, values))
        return [{"role": role, "content": value}]

    def answered(self, fields: Fields, answer: str) -> Fields:
        """Every row with this answer instead of its own."""
        return [(row, self._answered(values, answer)) for row, values in fields]

    def _answered(self, values: Mapping[str, Any], answer: str) -> Mapping[str, Any]:
        if isinstance(self.template, TextTemplate):
            return {**values, self.template.placeholders[-1]: answer}
        if self.format == "prompt-completion":
            return {**values, "completion": answer}
        messages = read_messages(values.get("messages"), "messages")
        last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=0)
        return {**values, "messages": [*messages[:last], {**messages[last], "content": answer}]}

    def count_special_tokens(self, fields: Fields) -> int:
        """Rows whose own text spells a special token."""
        if self.is_plain or not self.template.is_chat:
            return 0
        names = sorted({str(token) for token in self.tokenizer.all_special_tokens if str(token).strip()})
        names = [name for name in names if name not in self.options.special_tokens]  # which are meant
        if not names:
            return 0
        pattern = re.compile("|".join(map(re.escape, names)))
        columns = ("messages",) if self.format == "messages" else ("prompt", "completion")
        return sum(
            any(pattern.search(text) for name in columns for text in texts_in(values.get(name))) for _, values in fields
        )


def texts_in(value: Any) -> Iterable[str]:
    """Every text of a column, inside messages too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from texts_in(value.get("content"))
    elif isinstance(value, list):
        for item in value:
            yield from texts_in(item)


def each_row(
    rows: Sequence[tuple[Row, Given]], make: Callable[[Given], Kept]
) -> tuple[list[tuple[Row, Kept]], list[BadRow]]:
    """What `make` makes of what each row holds, and the rows that it refuses."""
    results: list[Kept | UnusableRow] = []
    for _, given in rows:
        try:
            results.append(make(given))
        except UnusableRow as reason:
            results.append(reason)
    return sort_out(rows, results)


def sort_out(
    rows: Sequence[tuple[Row, Any]], results: Sequence[Kept | UnusableRow]
) -> tuple[list[tuple[Row, Kept]], list[BadRow]]:
    """Results by row, those that are reasons among the bad rows."""
    kept: list[tuple[Row, Kept]] = []
    bad: list[BadRow] = []
    for (row, _), result in zip(rows, results, strict=True):
        if isinstance(result, UnusableRow):
            bad.append(BadRow(row.where, str(result)))
        else:
            kept.append((row, result))
    bad.sort(key=lambda one: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", one.where)])
    return kept, bad
