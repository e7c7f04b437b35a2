"""From a row to text: which characters are the prompt, and which carry loss.

Two templates answer the same question. `ChatTemplate` is the model's own Jinja template, or one from the
configuration. `TextTemplate` is text with placeholders, for models without one; `JOINED` is prompt and completion as
they are. Each gives for a row the whole text and the spans of it to learn from.

A chat template is a program, and where an answer begins in what it writes cannot be read off. Either the template
says so itself, by `{% generation %}` marks, or it is asked: what does it write for the messages up to the answer? If
that is not how the whole conversation begins, each answer is learned by itself, after exactly what it will be asked with.
"""

from __future__ import annotations

import datetime
import difflib
import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from lorakit.errors import LorakitError, first_line
from lorakit.files.prompt import at_date, complete

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
    date: str | None = None
    """What it writes where it would write the date of the day; None where it writes none."""

    is_chat: ClassVar[bool] = True

    @property
    def words(self) -> str:
        """The template in words, for the report."""
        dated = f", which writes the date {self.date} from now on (data.date)" if self.date else ""
        return self.origin + (", which marks the assistant's turns" if self.marks else "") + dated

    @property
    def marks(self) -> bool:
        """Whether the template says itself what the assistant generates."""
        return re.search(r"\{%-?\s*generation\s*-?%\}", self.jinja) is not None

    def render(self, conversations: Sequence[Conversation]) -> list[list[Rendered] | UnusableRow]:
        """The texts of each conversation with their spans, or why it has none.

        One text holds all answers where what the model is given before each of them, and what ends it, are how that text
        begins. Where the template writes a turn in another way once more follows (reasoning models drop earlier thoughts),
        each answer is a text of its own that ends with it, which is what the model will see and write.
        """
        wholes = self._write([(c.messages, c.tools) for c in conversations], opened=False)
        answers = [(c, index) for c in conversations for index in c.learned]
        starts = [(c.messages[:index], c.tools) for c, index in answers]
        ends = [(c.messages[: index + 1], c.tools) for c, index in answers if index + 1 < len(c.messages)]
        opened, closed = iter(self._write(starts, opened=True)), iter(self._write(ends, opened=False))
        results: list[list[Rendered] | UnusableRow] = []
        for c, whole in zip(conversations, wholes, strict=True):
            before = [next(opened) for _ in c.learned]
            after = [next(closed) if index + 1 < len(c.messages) else whole for index in c.learned]
            try:
                together = _spans(_usable(whole), [_usable(one) for one in before], [_usable(one) for one in after])
                results.append([together] if together is not None else _each_alone(before, after))
            except UnusableRow as reason:
                results.append(reason)
        return results

    def idle(self, conversation: Conversation) -> list[str]:
        """The fields of a conversation that make no difference to its text: "tools", or a key of a message."""

        def same(changed: Conversation, index: int) -> bool:
            """Whether a change of one message (or of the tools) is seen neither in the whole nor where that is the last."""
            for end in dict.fromkeys((len(conversation.messages), index + 1)):
                texts = [self._write_one(one.messages[:end], one.tools, False) for one in (conversation, changed)]
                if isinstance(texts[0], str) and texts[0] != texts[1]:
                    return False
            return True

        found, messages = [], conversation.messages
        whole = self._write_one(messages, conversation.tools, False)
        if isinstance(whole, UnusableRow):
            return []  # which says why by itself
        if conversation.tools and same(replace(conversation, tools=None), len(messages) - 1):
            found.append("tools")
        for index, message in enumerate(messages):
            for key, value in message.items():
                bare = {name: one for name, one in message.items() if name != key}
                if key == "content":  # found in the text is the cheap answer
                    text = text_of(value).strip()
                    if not text or text in whole:
                        continue
                    bare["content"] = ""
                if key != "role" and same(
                    replace(conversation, messages=[*messages[:index], bare, *messages[index + 1 :]]), index
                ):
                    found.append(f"{message['role']} message" if key == "content" else key)
        return list(dict.fromkeys(found))

    def prompts(self, conversations: Sequence[Conversation]) -> list[str | UnusableRow]:
        """What the model is given before the last learned message of each conversation."""
        return self._write([(c.messages[: c.learned[-1]], c.tools) for c in conversations], opened=True)

    def before(self, conversation: Conversation, indices: Sequence[int]) -> list[str]:
        """What the model is given before each of these messages.

        Raises:
            UnusableRow: the template refuses one.
        """
        given = [(conversation.messages[:index], conversation.tools) for index in indices]
        return [_usable(text) for text in self._write(given, opened=True)]

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
        return list(encoded["input_ids"]), list(encoded["assistant_masks"])

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


def _usable(text: str | UnusableRow) -> str:
    if isinstance(text, UnusableRow):
        raise text
    return text


def _spans(whole: str, before: Sequence[str], after: Sequence[str]) -> Rendered | None:
    """The whole with a span from each prompt to the end of its answer; None where one is not how the whole begins."""
    spans = []
    for start, end in zip(before, after, strict=True):
        if not whole.startswith(end):
            end = end.rstrip()  # some templates end the last turn alone with a line break
        if not whole.startswith(start) or not whole.startswith(end) or len(end) <= len(start):
            return None
        spans.append((len(start), len(end)))
    return Rendered(whole, tuple(spans))


def _each_alone(before: Sequence[str | UnusableRow], after: Sequence[str | UnusableRow]) -> list[Rendered]:
    """Each answer as a text of its own.

    Raises:
        UnusableRow: an answer does not begin with what the model is given before it.
    """
    found = []
    for start, end in zip(map(_usable, before), map(_usable, after), strict=True):
        one = _spans(end, [start], [end])
        if one is None:
            raise UnusableRow(diverges(start, end))
        found.append(one)
    return found


def diverges(start: str, whole: str) -> str:
    """Why an answer cannot be learned after its prompt, and what would work."""
    same = shared_prefix_length([whole, start])
    return (
        f"the chat template writes the prompt before an answer differently once the answer follows "
        f"({start[same : same + 30]!r} against {whole[same : same + 30]!r}), so what it learned would never be asked. "
        "Begin the answers with what the template opens them with (a thought, say), set data.template_arguments (such as "
        "{enable_thinking: false}), or give another data.template"
    )


def choose_template(
    given: str | None,
    tokenizer: Any,
    system: str | None = None,
    arguments: Mapping[str, Any] | None = None,
    tools: bool = False,
    date: str | None = None,
) -> ChatTemplate | TextTemplate:
    """The template that a configuration asks for.

    Args:
        given: None for the tokenizer's own (or none, if it has none); text with placeholders; a Jinja chat template;
            or the path of a file (.jinja, .j2, .txt) with either.
        tokenizer: the model's tokenizer.
        system: the system message of conversations that have none, written into a chat template.
        arguments: of a chat template (`enable_thinking`, ...), written into it.
        tools: whether rows have tools, for which some tokenizers have a chat template of their own.
        date: what a chat template writes that writes the date of the day (YYYY-MM-DD); today by default.

    Raises:
        LorakitError: the file cannot be read, or the placeholders do not end in a completion.
    """

    def chat(jinja: str, origin: str) -> ChatTemplate:
        day = datetime.date.fromisoformat(date) if date else datetime.date.today()
        fixed = at_date(jinja, day)
        text = complete(fixed, system, arguments or {})
        return ChatTemplate(tokenizer, text, origin, None if fixed == jinja else day.isoformat())

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
        where = f'message {number} of "{name}"'
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise UnusableRow(f"{where} has no role")
        kept = {key: item for key, item in message.items() if item is not None and item != []}
        content, role = kept.get("content"), kept["role"]
        if "tool_calls" in kept:
            kept["tool_calls"] = _tool_calls(kept["tool_calls"], where)
        parts = content if isinstance(content, list) else []
        in_parts = bool(parts) and all(isinstance(part, Mapping) and part.get("type") == "text" for part in parts)
        if not isinstance(content, str) and not in_parts and not (content is None and kept.get("tool_calls")):
            raise UnusableRow(f"{where} ({role}) has no text as content")
        if role == "assistant" and not kept.get("tool_calls") and not text_of(content).strip():
            raise UnusableRow(f"{where} (assistant) is empty")
        messages.append(kept)
    return messages


ROLES = ("system", "developer", "user", "assistant", "tool")
"""Roles that every chat template is expected to know; one that a template names itself is taken too."""


def check_roles(messages: Sequence[Message], source: str, name: str) -> None:
    """Refuses roles that neither OpenAI's format nor this chat template (its source) has.

    Raises:
        UnusableRow: with the role and those that are known.
    """
    for number, message in enumerate(messages, start=1):
        role = message["role"]
        if role not in ROLES and not re.search(rf"""["']{re.escape(role)}["']""", source):
            near = difflib.get_close_matches(role, ROLES, 1)
            hint = f'; did you mean "{near[0]}"?' if near else ""
            raise UnusableRow(f'message {number} of "{name}" has the role "{role}"; known are {", ".join(ROLES)}{hint}')


def is_learned(message: Message, marked: bool = False) -> bool:
    """Whether a message carries loss: an assistant's, unless its `train` or `weight` says no (`marked`: only if one says yes);
    both are taken out of it.

    Raises:
        UnusableRow: a weight that is neither 0 nor 1.
    """
    train, weight = message.pop("train", None), message.pop("weight", None)
    if train not in (None, True, False) or weight not in (None, 0, 1):
        said = f"train {train!r}" if train not in (None, True, False) else f"weight {weight!r}"
        raise UnusableRow(
            f"a message has {said}; a turn is learned (weight 1, train true) or not (weight 0, train false)"
        )
    yes = bool(train or weight) if marked else True
    return message["role"] == "assistant" and train is not False and weight != 0 and yes


def from_json(value: Any, what: str) -> Any:
    """A value that may be given as JSON text.

    Raises:
        UnusableRow: it is text, and no JSON.
    """
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise UnusableRow(f"{what} is text that is not JSON ({error.msg} at column {error.colno})") from None


def read_tools(value: Any) -> list[Any] | None:
    """The tools of a row, which may be JSON text as a whole or one by one.

    Raises:
        UnusableRow: they are no list of objects.
    """
    tools = from_json(value or None, '"tools"')
    if not tools:
        return None
    tools = [from_json(one, '"tools"') for one in tools] if isinstance(tools, list) else tools
    if not isinstance(tools, list) or not all(isinstance(one, Mapping) for one in tools):
        raise UnusableRow('"tools" is not a list of objects')
    return tools


def _tool_calls(value: Any, where: str) -> list[Any]:
    """Tool calls with their arguments as objects: OpenAI has them as JSON text, and chat templates expect objects."""
    calls = from_json(value, f"tool_calls of {where}")
    if not isinstance(calls, list) or not all(isinstance(one, Mapping) for one in calls):
        raise UnusableRow(f"tool_calls of {where} is not a list of objects")
    read = []
    for call in calls:
        function = call.get("function")
        holder = dict(function) if isinstance(function, Mapping) else dict(call)
        if "arguments" in holder:
            holder["arguments"] = from_json(holder["arguments"] or {}, f"the arguments of a tool call in {where}")
            if not isinstance(holder["arguments"], Mapping):
                raise UnusableRow(f"the arguments of a tool call in {where} are not an object")
        read.append({**call, "function": holder} if isinstance(function, Mapping) else holder)
    return read


def text_of(content: Any) -> str:
    """The text of a message's content, which may come in parts."""
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content)
    return str(content or "")
