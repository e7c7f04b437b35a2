"""The loss of a classifier of texts: on padded batches, or packed without padding where the model is an encoder.

An encoder reads the class off the first token of a text. In a packed batch that is one token of many, so a hook between the
encoder and the part that reads it hands on the first tokens alone. Where that is, and whether a packed batch gives the logits
that each text gives alone, is found by trying (`encoder_support`); what fails is trained on padded batches.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.errors import LorakitError
from lorakit.models.evaluating import evaluating
from lorakit.train.data.classification import LabelledExample
from lorakit.train.step.attention import edits_obstacle, packed_attention, packed_call
from lorakit.train.step.loss import LossPath, LossStats, base_alone, class_loss
from lorakit.train.step.noise import tell_lengths
from lorakit.train.step.packing import mask_of, pack_texts, pad_rows
from lorakit.train.step.support import choose, difference, logits_alone, refusal

PLACES = ("encoder", "transformer", "final_norm")
"""Names of the part whose output is the last hidden states, on the bodies of encoders."""


@dataclass(frozen=True)
class Support:
    """How an encoder takes packed batches: after which part first tokens are picked, and the position of a first token.

    `reason` says why it does not take them, where it does not.
    """

    place: str = ""
    first_position: int = 0
    reason: str | None = None


_found: weakref.WeakKeyDictionary[nn.Module, Support] = weakref.WeakKeyDictionary()


def choose_class_path(model: nn.Module, fast_path: str = "auto") -> LossPath:
    """The padding-free path where the model is an encoder that takes it and it is not turned off, else padded batches."""
    return choose(fast_path, PACKED, PADDED, lambda: edits_obstacle(model, texts=True) or encoder_support(model).reason)


def encoder_support(model: nn.Module) -> Support:
    """How a sequence classifier takes packed batches, or why not. Tried once per model object."""
    if model not in _found:
        with base_alone(model):
            _found[model] = _try_places(model)
    return _found[model]


def _try_places(model: Any) -> Support:
    config = getattr(model, "config", None)
    body = getattr(model, "base_model", None)
    if config is None or body is None or body is model:
        return Support(reason=f"{type(model).__name__} is not a transformers model with a head")
    places = [name for name in PLACES if isinstance(getattr(body, name, None), nn.Module)]
    if not places:
        return Support(reason="the padding-free path supports encoder models only")
    vocabulary = int(config.get_text_config().vocab_size)
    tokens = torch.randint(0, vocabulary, (24,), generator=torch.Generator().manual_seed(7)).tolist()
    rows = [tokens[:11], tokens[11:15], tokens[15:]]
    # RoBERTa and its kin count positions from behind the padding token.
    starts = sorted({0, int(getattr(config, "pad_token_id", None) or 0) + 1})
    reason: str | None = None
    with evaluating(model):
        alone = torch.stack(logits_alone(model, rows))
        for place in places:
            for start in starts:
                found, reason = _try(model, rows, Support(place, start))
                if found is not None and (reason := difference(model, found, alone, least=1e-5)) is None:
                    return Support(place, start)
    return Support(reason=reason)


def _try(model: nn.Module, rows: list[list[int]], support: Support) -> tuple[Tensor | None, str]:
    """The logits of texts by one way of taking them, or None and how it failed."""
    try:
        with packed_attention(model):
            logits = packed_logits(model, rows, support)
    except Exception as error:  # an architecture may fail in any way; each of them means the padded path
        return None, refusal(error)
    if logits.ndim != 2 or logits.shape[0] != len(rows):
        return None, f"logits of a packed batch of {len(rows)} texts have shape {tuple(logits.shape)}"
    return logits, ""


def packed_logits(model: Any, rows: Sequence[Sequence[int]], support: Support) -> Tensor:
    """Logits `[texts, classes]` of packed texts, inside `packed_attention`."""
    batch = pack_texts(rows, next(model.parameters()).device, support.first_position)
    with _picking(getattr(model.base_model, support.place), batch.first):
        logits: Tensor = packed_call(model, batch).logits
    return logits


@contextlib.contextmanager
def _picking(part: nn.Module, first: Tensor) -> Iterator[None]:
    """Inside, the part's hidden states `[1, tokens, hidden]` leave it as `[texts, 1, hidden]`, the first tokens'."""

    def pick(module: nn.Module, inputs: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return output[0].index_select(0, first)[:, None]
        if isinstance(output, tuple):
            return (pick(module, inputs, output[0]), *output[1:])
        output.last_hidden_state = pick(module, inputs, output.last_hidden_state)
        return output

    handle = part.register_forward_hook(pick)
    try:
        yield
    finally:
        handle.remove()


# -- the two paths ---------------------------------------------------------------------------------


def _padded(model: nn.Module, examples: Sequence[LabelledExample], **how: Any) -> tuple[Tensor, LossStats]:
    device = next(model.parameters()).device
    rows = [example.input_ids for example in examples]
    ids = pad_rows(rows, int(getattr(getattr(model, "config", None), "pad_token_id", None) or 0))
    mask = mask_of(rows).to(device)
    tell_lengths(model, lambda: mask.sum(1, keepdim=True).float())
    logits = model(input_ids=ids.to(device), attention_mask=mask).logits
    return _loss_of_texts(logits, examples, **how)


def _packed(model: nn.Module, examples: Sequence[LabelledExample], **how: Any) -> tuple[Tensor, LossStats]:
    logits = packed_logits(model, [example.input_ids for example in examples], encoder_support(model))
    return _loss_of_texts(logits, examples, **how)


def _loss_of_texts(logits: Tensor, examples: Sequence[LabelledExample], **how: Any) -> tuple[Tensor, LossStats]:
    """The loss of logits `[texts, classes]`; a target is a text."""
    if logits.ndim != 2:
        raise LorakitError(f"class loss: expected logits [texts, classes], found {tuple(logits.shape)}")
    return class_loss(logits, torch.tensor([example.label for example in examples], device=logits.device), **how)


PADDED = LossPath("off: padded batches", _padded)
PACKED = LossPath("no padding", _packed, packed_attention)
