"""What `generate` and `chat` share: a model with its adapters loaded, prompts in the model's own form,
streamed text."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.core.options import option
from lorakit.errors import LorakitError, unknown

Message = dict[str, str]


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn; the flags of `generate` and `chat`."""

    max_new_tokens: int = option(256, "maximum tokens per answer", minimum=1)
    temperature: float = option(0.0, "0 picks the most likely token; higher values sample", minimum=0)
    top_p: float = option(1.0, "sample from the most likely tokens of this total probability", minimum=0, maximum=1)
    seed: int = option(0, "random seed", minimum=0)


def write(text: str) -> None:
    """A piece of an answer, on stdout at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


class Speaker:
    """A base model, its tokenizer and the adapters that can speak through it.

    `adapters` are folders; each goes by its folder's name, which `speak` takes as `route` (None: the base
    model).
    """

    def __init__(self, base: str, adapters: Sequence[Path], dtype: str = "auto", quantize: str | None = None) -> None:
        import lorakit as lk
        from lorakit.models.loading import load_model

        self.model, self.tokenizer = load_model(base, dtype=dtype, quantize=quantize)
        self.names = [lk.load(self.model, folder, active=False).name for folder in adapters]

    def check(self, name: str) -> str:
        """The adapter's name if there is one; LorakitError with the known ones if not."""
        if name not in self.names:
            raise unknown("adapter", name, self.names)
        return name

    def seed(self, seed: int) -> None:
        """Start the random numbers of what is sampled."""
        import torch

        torch.manual_seed(seed)

    def encode(self, messages: Sequence[Message], *, raw: bool = False) -> list[int]:
        """Messages as the token ids of a prompt, in the model's chat template if it has one and `raw` is not
        asked.

        Without a template the texts follow one another, a line each.
        """
        if raw or not self.tokenizer.chat_template:
            return list(self.tokenizer("\n".join(message["content"] for message in messages))["input_ids"])
        ids = self.tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, tokenize=True, return_dict=True
        )["input_ids"]
        return list(ids)

    def speak(
        self,
        prompt: Sequence[int],
        route: Any = None,
        *,
        sampling: Sampling,
        on_text: Callable[[str], None] | None = None,
    ) -> str:
        """Answer a prompt through an adapter (or the base, for None). `on_text` gets the answer piece by piece.

        The answer ends where the model's window does. Raises LorakitError for a prompt that leaves no room for one.
        """
        import torch
        from transformers import TextStreamer

        import lorakit as lk

        room, length = sampling.max_new_tokens, len(prompt)
        limit = getattr(self.model.config, "max_position_embeddings", None)
        if isinstance(limit, int):
            if length >= limit:
                raise LorakitError(
                    f"generate: the prompt has {length} tokens, and this model reads {limit} in all; shorten the prompt "
                    "(in a chat: /clear)"
                )
            room = min(room, limit - length)
        pieces: list[str] = []

        class Streamer(TextStreamer):
            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                pieces.append(text)
                if on_text is not None and text:
                    on_text(text)

        drawn: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if sampling.temperature > 0:
            drawn = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p}
        ids = torch.tensor([list(prompt)], device=self.model.device)
        # a model without any adapter has no routing to set
        with torch.no_grad(), lk.use(self.model, route) if self.names else contextlib.nullcontext():
            self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=room,
                pad_token_id=self.tokenizer.pad_token_id,
                streamer=Streamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True),
                **drawn,
            )
        return "".join(pieces).strip()
