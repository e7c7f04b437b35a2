"""What `generate` and `chat` share: a model with its adapters loaded, prompts in the model's own form,
streamed text."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.core.options import option
from lorakit.errors import LorakitError, first_line, unknown

if TYPE_CHECKING:
    from lorakit.adapter.adapter import Adapter
    from lorakit.files.prompt import Prompter

log = logging.getLogger("lorakit")

Message = dict[str, str]


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn; the flags of `generate` and `chat`."""

    max_new_tokens: int = option(256, "maximum tokens per answer", minimum=1)
    temperature: float = option(0.0, "0 picks the most likely token; higher values sample", minimum=0)
    top_p: float = option(1.0, "sample from the most likely tokens of this total probability", minimum=0, maximum=1)
    seed: int = option(0, "random seed", minimum=0)


def _prompter_of(tokenizer: Any, prompt: Any = None) -> Prompter:
    from lorakit.files.prompt import Prompter

    return Prompter(tokenizer, prompt)


def write(text: str) -> None:
    """A piece of an answer, on stdout at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def check_adapters(folders: Sequence[Path], base: str | None = None) -> None:
    """Read adapters before the base, so that what is wrong with one does not wait for a model."""
    from lorakit.files.bundle import read_bundle
    from lorakit.models.loading import find_local

    if base is not None:
        find_local(base)
    names = [folder.expanduser().absolute().name for folder in folders]
    for folder, name in zip(folders, names, strict=True):
        if stale := read_bundle(folder).stale:
            raise LorakitError(stale)
        if names.count(name) > 1:
            raise LorakitError(f'two adapters are called "{name}"; name each once, or rename the folder of one')


class Speaker:
    """A base model, its tokenizer and the adapters that can speak through it.

    `adapters` are folders; each goes by its folder's name, which `speak` takes as `route` (None: the base
    model).
    """

    def __init__(self, base: str, adapters: Sequence[Path], dtype: str = "auto", quantize: str | None = None) -> None:
        import lorakit as lk
        from lorakit.files.vocabulary import make_room
        from lorakit.models.loading import load_model

        check_adapters(adapters, base)
        self.model, self.tokenizer = load_model(base, dtype=dtype, quantize=quantize)
        make_room(self.model, adapters)
        loaded = [lk.load(self.model, folder, active=False) for folder in adapters]
        self.names = [one.name for one in loaded]
        self.base = _prompter_of(self.tokenizer)
        self._prompters = {one.name: self._prompter(one) for one in loaded}

    def _prompter(self, adapter: Adapter) -> Prompter:
        """How an adapter is asked; said where that is not how the base is."""
        if adapter.prompt is None:
            if not self.base.prompt.template:
                log.info("%s brings no chat template and the base has none: texts are sent as they are", adapter.name)
            return self.base
        found = _prompter_of(self.tokenizer, adapter.prompt)
        if found.prompt.template != self.base.prompt.template:
            log.info("%s is asked by %s", adapter.name, found.prompt.place)
        return found

    def prompter(self, route: Any = None) -> Prompter:
        """How the model is asked through this adapter; None: the base."""
        return self._prompters.get(route, self.base) if isinstance(route, str) else self.base

    def check(self, name: str) -> str:
        """The adapter's name if there is one; LorakitError with the known ones if not."""
        if name not in self.names:
            raise unknown("adapter", name, self.names)
        return name

    def seed(self, seed: int) -> None:
        """Start the random numbers of what is sampled."""
        import torch

        torch.manual_seed(seed)

    def encode(self, messages: Sequence[Message], route: Any = None, *, raw: bool = False) -> list[int]:
        """Messages as the token ids of a prompt, in the form in which this adapter was trained, or as they are if `raw` is
        asked.

        Raises LorakitError where the chat template refuses them.
        """
        prompter = self.prompter(route)
        if raw:
            return prompter.raw("\n".join(message["content"] for message in messages))
        try:
            return prompter.encode(messages)
        except Exception as problem:  # a template is a program: it may raise anything
            raise LorakitError(f"generate: {prompter.prompt.place} refuses this: {first_line(problem)}") from problem

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
        from lorakit.files.prompt import end_ids

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
        prompter = self.prompter(route)

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
                eos_token_id=[*end_ids(self.tokenizer, self.model), *prompter.stop_ids] or None,
                streamer=Streamer(prompter.tokenizer, skip_prompt=True, skip_special_tokens=True),
                **drawn,
            )
        return "".join(pieces).strip()
