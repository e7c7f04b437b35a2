"""From a row to text: which characters are the prompt, and which carry loss.

Two templates answer the same question. `ChatTemplate` is the model's own Jinja template, or one from the
configuration. `TextTemplate` is text with placeholders, for models without one; `JOINED` is prompt and completion as
they are. Each gives for a row the whole text and the spans of it to learn from.

A chat template is a program, and where an answer begins in what it writes cannot be read off. Either the template
says so itself, by `{% generation %}` marks, or it is asked: what does it write for the messages up to the answer? If
that is not how the whole conversation begins, no mask can be trusted, and the row is refused.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from lorakit.errors import LorakitError, first_line
from lorakit.files.prompt import complete

log = logging.getLogger("lorakit.train")

Message = dict[str, Any]

ANSWERS = ("completion", "output", "response", "answer")
"""Placeholders that stand for what the model should write."""


class UnusableRow(Exception):  # noqa: N818 - a reason, turned into a BadRow, not an error of its own
    """Why a row cannot be rendered."""


@dataclass(frozen=True)
class Conversation:
    """One row's messages.

    Attributes:
        messages: roles and contents, as the template gets them.
        learned: indices of the messages that carry loss.
        tools: what the template gets as `tools`.
    """

    messages: list[Message]
    learned: tuple[int, ...]
    tools: Any = None


@dataclass(frozen=True)
class Rendered:
    """One row's text.

    Attributes:
        text: the whole of it.
        spans: (start, end) character positions that carry loss, in order; each start ends what a model is prompted with.
    """

    text: str
    spans: tuple[tuple[int, int], ...]


_PLACEHOLDER = re.compile(r"\{([A-Za-z_]\w*)\}")


@dataclass(frozen=True)
class TextTemplate:
    """Text with placeholders such as {prompt}, ending in the one that the model should write.

    What stands before the completion gets no loss; what follows it (a closing mark) does, as the model must write it.
    """

    text: str
    origin: str = "data.template"
    is_chat: ClassVar[bool] = False

    def __post_init__(self) -> None:
        names = self.placeholders
        asked = f"{self.origin}: expected placeholders, the last of them one of {_braced(ANSWERS)}"
        if not names:
            raise LorakitError(f"{asked}; found none in {self.text[:60]!r}")
        if names[-1] not in ANSWERS or sum(name in ANSWERS for name in names) > 1:
            raise LorakitError(f"{asked} and no other of them; found {_braced(names)}")

    @property
    def placeholders(self) -> list[str]:
        """The names in braces, in order."""
        return _PLACEHOLDER.findall(self.text)

    @property
    def pieces(self) -> list[str]:
        """The text before each placeholder and after the last."""
        return _PLACEHOLDER.split(self.text)[::2]

    @property
    def closing(self) -> str:
        """What the template writes after the completion."""
        return self.pieces[-1]

    @property
    def words(self) -> str:
        """The template in words, for the report."""
        if self is JOINED:
            return "none (prompt and completion joined as they are)"
        return f"{self.origin}, text with {_braced(dict.fromkeys(self.placeholders))}"

    def render(self, fields: Mapping[str, Any]) -> Rendered:
        """The text of one row; every placeholder is a column."""
        pieces: list[str] = []
        start = last = 0
        for match in _PLACEHOLDER.finditer(self.text):
            pieces.append(self.text[last : match.start()])
            start = sum(map(len, pieces))
            pieces.append(fields[match[1]])
            last = match.end()
        text = "".join(pieces) + self.text[last:]
        return Rendered(text, ((start, len(text)),))


def _braced(names: Iterable[str]) -> str:
    return ", ".join(f"{{{name}}}" for name in names)


JOINED = TextTemplate("{prompt}{completion}")
"""Prompt and completion one after the other, with nothing between: where there is no template."""


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja chat template, the tokenizer's own or one from the configuration, complete (see `files.prompt.complete`)."""

    tokenizer: Any
    jinja: str
    origin: str

    is_chat: ClassVar[bool] = True

    @property
    def words(self) -> str:
        """The template in words, for the report."""
        return self.origin + (", which marks what the assistant says" if self.marks else "")

    @property
    def marks(self) -> bool:
        """Whether the template says itself what the assistant generates."""
        return re.search(r"\{%-?\s*generation\s*-?%\}", self.jinja) is not None

    def render(self, conversations: Sequence[Conversation]) -> list[Rendered | UnusableRow]:
        """The text of each conversation and its spans, or why it has none."""
        wholes = self._write([(c.messages, c.tools) for c in conversations], opened=False)
        answers = [(c, index) for c in conversations for index in c.learned]
        starts = [(c.messages[:index], c.tools) for c, index in answers]
        ends = [(c.messages[: index + 1], c.tools) for c, index in answers if index + 1 < len(c.messages)]
        opened, closed = iter(self._write(starts, opened=True)), iter(self._write(ends, opened=False))
        results: list[Rendered | UnusableRow] = []
        for c, whole in zip(conversations, wholes, strict=True):
            before = [next(opened) for _ in c.learned]
            after = [next(closed) if index + 1 < len(c.messages) else whole for index in c.learned]
            try:
                results.append(_spans(whole, before, after))
            except UnusableRow as reason:
                results.append(reason)
        return results

    def prompts(self, conversations: Sequence[Conversation]) -> list[str | UnusableRow]:
        """What the model is given before the last learned message of each conversation."""
        return self._write([(c.messages[: c.learned[-1]], c.tools) for c in conversations], opened=True)

    def marked(self, conversation: Conversation) -> tuple[list[int], list[int]]:
        """Token ids and the template's own 0/1 mask of what the assistant generates."""
        try:
            encoded = self.tokenizer.apply_chat_template(
                conversation.messages,
                tools=conversation.tools,
                chat_template=self.jinja,
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=True,
                tokenizer_kwargs={"verbose": False},
            )
        except Exception as error:
            raise _refused(error) from error
        ids, mask = list(encoded["input_ids"]), list(encoded["assistant_masks"])
        if not any(mask):
            raise UnusableRow("the chat template's {% generation %} marks cover nothing of it")
        return ids, mask

    def _write(self, given: list[tuple[list[Message], Any]], opened: bool) -> list[str | UnusableRow]:
        if given and all(messages and tools is None for messages, tools in given):
            try:
                return list(self._apply([messages for messages, _ in given], None, opened))
            except Exception as error:  # templates raise what they like; one by one it is learned for which row
                log.debug("a row is refused by the chat template: %s", error)
        return [self._write_one(messages, tools, opened) for messages, tools in given]

    def _write_one(self, messages: list[Message], tools: Any, opened: bool) -> str | UnusableRow:
        if not messages:
            return UnusableRow("it begins with an assistant turn, before which there is no prompt")
        try:
            return str(self._apply(messages, tools, opened))
        except Exception as error:
            return _refused(error)

    def _apply(self, messages: Any, tools: Any, opened: bool) -> Any:
        return self.tokenizer.apply_chat_template(
            messages, tools=tools, chat_template=self.jinja, tokenize=False, add_generation_prompt=opened
        )


def shared_prefix_length(rows: Sequence[Any]) -> int:
    """With how many equal items all rows begin: lists of tokens or words, or texts."""
    if not rows:
        return 0
    first, last = min(rows), max(rows)  # in lexical order, these two differ the earliest
    return next((at for at, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))


def _refused(error: Exception) -> UnusableRow:
    return UnusableRow(f"the chat template refuses it: {first_line(error)}")


def _spans(
    whole: str | UnusableRow, before: Sequence[str | UnusableRow], after: Sequence[str | UnusableRow]
) -> Rendered:
    for value in (whole, *before, *after):
        if isinstance(value, UnusableRow):
            raise value
    text = str(whole)
    spans = []
    for start, end in zip(map(str, before), map(str, after), strict=True):
        if not text.startswith(start):
            raise UnusableRow(_diverges(text, start, "the prompt before an answer"))
        if not text.startswith(end):
            end = end.rstrip()  # some templates end the last turn alone with a line break
        if not text.startswith(end) or len(end) <= len(start):
            raise UnusableRow(_diverges(text, end, "a conversation up to an answer"))
        spans.append((len(start), len(end)))
    return Rendered(text, tuple(spans))


def _diverges(whole: str, part: str, what: str) -> str:
    same = shared_prefix_length([whole, part])
    return (
        f"the chat template writes {what} differently once more follows ({part[same : same + 30]!r} against "
        f"{whole[same : same + 30]!r}), so where the answer begins is not certain. Use rows with one answer each, or a "
        "template with {% generation %} marks (data.template)"
    )


def choose_template(
    given: str | None,
    tokenizer: Any,
    system: str | None = None,
    arguments: Mapping[str, Any] | None = None,
    tools: bool = False,
) -> ChatTemplate | TextTemplate:
    """The template that a configuration asks for.

    Args:
        given: None for the tokenizer's own (or none, if it has none); text with placeholders; a Jinja chat template;
            or the path of a file (.jinja, .j2, .txt) with either.
        tokenizer: the model's tokenizer.
        system: the system message of conversations that have none, written into a chat template.
        arguments: of a chat template (`enable_thinking`, ...), written into it.
        tools: whether rows have tools, for which some tokenizers have a chat template of their own.

    Raises:
        LorakitError: the file cannot be read, or the placeholders do not end in a completion.
    """

    def chat(jinja: str, origin: str) -> ChatTemplate:
        return ChatTemplate(tokenizer, complete(jinja, system, arguments or {}), origin)

    if given is None:
        if not getattr(tokenizer, "chat_template", None):
            return JOINED
        return chat(tokenizer.get_chat_template(tools=[{}] if tools else None), "the model's chat template")
    origin = "data.template"
    if "\n" not in given and given.endswith((".jinja", ".j2", ".txt")) and "{" not in given:
        try:
            given, origin = Path(given).read_bytes().decode("utf-8-sig"), given
        except (OSError, UnicodeDecodeError) as error:
            raise LorakitError(f"data.template: the file {given} cannot be read: {error}") from None
    if "{%" in given or "{{" in given:
        return chat(given, f"{origin} (Jinja)")
    return TextTemplate(given, origin)


def read_messages(value: Any, name: str) -> list[Message]:
    """The messages of a column, checked: a list of objects with a role and text (tool calls pass through).

    Raises:
        UnusableRow: with the reason.
    """
    if isinstance(value, str):  # CSV has no other way
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            raise UnusableRow(f'"{name}" is text, expected a list of messages') from None
    if not isinstance(value, list) or not value:
        raise UnusableRow(f'"{name}" is {"empty" if value == [] else "not a list of messages"}')
    messages: list[Message] = []
    for number, message in enumerate(value, start=1):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise UnusableRow(f'message {number} of "{name}" has no role')
        kept = {key: item for key, item in message.items() if item is not None}
        content, role = kept.get("content"), kept["role"]
        parts = content if isinstance(content, list) else []
        in_parts = bool(parts) and all(isinstance(part, Mapping) and part.get("type") == "text" for part in parts)
        if not isinstance(content, str) and not in_parts and not (content is None and kept.get("tool_calls")):
            raise UnusableRow(f'message {number} of "{name}" ({role}) has no text as content')
        if role == "assistant" and not kept.get("tool_calls") and not text_of(content).strip():
            raise UnusableRow(f'message {number} of "{name}" (assistant) is empty')
        messages.append(kept)
    return messages


def text_of(content: Any) -> str:
    """The text of a message's content, which may come in parts."""
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content)
    return str(content or "")
