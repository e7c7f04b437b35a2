"""What a client wrote as the token ids of a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lorakit.serve.http.faults import Fault
from lorakit.serve.http.schema import Message

CHARACTERS = 64
"""No text of more characters than this per token of the window is read into tokens: it could not fit."""


def encode_messages(tokenizer: Any, messages: Sequence[Message], window: int) -> list[int]:
    """A conversation in the model's chat template, or where it has none, its texts a line each.

    Raises:
        Fault: the template refuses these messages (an order of roles that it does not know), or they are far too long.
    """
    check_length(sum(len(message.text) for message in messages), window)
    template = tokenizer.chat_template
    if not template:
        return encode_text(tokenizer, "\n".join(message.text for message in messages), window)
    turns = []
    for message in messages:
        role = "system" if message.role == "developer" and "developer" not in template else message.role
        turn = {"role": role, "content": message.text}
        turns.append(turn | {"name": message.name} if message.name else turn)
    try:
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=True)
    except Exception as problem:  # a template is a program of the model's: it may raise anything
        raise Fault(
            400, f"the model's chat template refuses these messages: {problem}", "template", "messages"
        ) from None
    return list(ids["input_ids"])


def encode_text(tokenizer: Any, text: str, window: int) -> list[int]:
    """A text as token ids, with what the tokenizer puts before a text."""
    check_length(len(text), window)
    return list(tokenizer(text)["input_ids"])


def encode_prompt(tokenizer: Any, prompt: str | list[int], window: int) -> list[int]:
    """A prompt of /v1/completions: text, or token ids as they are."""
    if isinstance(prompt, str):
        return encode_text(tokenizer, prompt, window)
    known = len(tokenizer)
    for one in prompt:
        if one >= known:
            raise Fault(
                400, f"prompt holds the token id {one}; this model has {known} tokens.", "unknown_token", "prompt"
            )
    return prompt


def check_length(characters: int, window: int) -> None:
    """Refuse a text that cannot fit before time is spent on it."""
    if characters > CHARACTERS * window:
        raise Fault(
            400,
            f"the prompt has {characters:,} characters; this model reads {window:,} tokens, its answer included.",
            "context_length_exceeded",
            "messages",
        )


class Pieces:
    """Single tokens as OpenAI's log probabilities show them: a text, and the bytes behind it where they are known."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._known: dict[int, tuple[str, list[int] | None]] = {}

    def __call__(self, token: int) -> tuple[str, list[int] | None]:
        """The text and the bytes of a token. A token that is a part of a character has no text of its own."""
        if token not in self._known:
            text = self.tokenizer.decode([token], skip_special_tokens=False)
            whole = "\N{REPLACEMENT CHARACTER}" not in text
            self._known[token] = (text, list(text.encode("utf-8", "replace")) if whole else None)
        return self._known[token]
