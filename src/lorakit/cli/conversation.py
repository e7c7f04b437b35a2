"""What `generate` and `chat` share: a model with its adapters loaded, prompts in the model's own form,
streamed text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lorakit.errors import LorakitError, unknown

Message = dict[str, str]


class Speaker:
    """A base model, its tokenizer and the adapters that can speak through it.

    `adapters` are folders; each goes by its folder's name, which `speak` takes as `route` (None: the base
    model).
    """

    def __init__(self, base: str, adapters: Sequence[Path], dtype: str = "auto", quantize: str | None = None) -> None:
        import lorakit as lk
        from lorakit.models.loading import load_model

        self.model, self.tokenizer = load_model(base, dtype=dtype, quantize=quantize)
        self.names = [lk.load(self.model, folder).name for folder in adapters]

    def check(self, name: str) -> str:
        """The adapter's name if there is one; LorakitError with the known ones if not."""
        if name not in self.names:
            raise unknown("adapter", name, self.names)
        return name

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
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        on_text: Callable[[str], None] | None = None,
    ) -> str:
        """Answer a prompt through an adapter (or the base, for None). `on_text` gets the answer piece by
        piece.

        Temperature 0 takes the likeliest token each time; above, tokens are drawn. The answer ends where the model's
        window does. Raises LorakitError for a prompt that leaves no room for one.
        """
        import torch
        from transformers import TextStreamer

        import lorakit as lk

        length = len(prompt)
        limit = getattr(self.model.config, "max_position_embeddings", None)
        if isinstance(limit, int) and length >= limit:
            raise LorakitError(
                f"generate: the prompt has {length} tokens and this model reads {limit}, its answer included; "
                "shorten the prompt (in a chat: /clear)"
            )
        room = max_new_tokens if not isinstance(limit, int) else min(max_new_tokens, limit - length)
        pieces: list[str] = []

        class Streamer(TextStreamer):
            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                pieces.append(text)
                if on_text is not None and text:
                    on_text(text)

        drawn = {"do_sample": True, "temperature": temperature, "top_p": top_p}
        likeliest = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        ids = torch.tensor([list(prompt)], device=self.model.device)
        with torch.no_grad(), _route(lk, self.model, route, self.names):
            self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=room,
                pad_token_id=self.tokenizer.pad_token_id,
                streamer=Streamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True),
                **(drawn if temperature > 0 else likeliest),
            )
        return "".join(pieces).strip()


def _route(lk: Any, model: Any, route: Any, names: Sequence[str]) -> Any:
    """The routing of one answer; a model without any adapter has none to set."""
    import contextlib

    return lk.use(model, route) if names else contextlib.nullcontext()
