"""The loss of a classifier of texts: padded as its model has it, or as one flat row where the model is an encoder.

An encoder reads the class off the first token of a text. On a flat row that is one token of many, so between the encoder
and the part that reads it stands a hook that hands on the first tokens alone. Where that is, and whether the row gives
the logits that each text gives alone, is found by trying (`encoder_support`); what fails is trained padded.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.errors import LorakitError
from lorakit.train.data.classification import LabelledExample
from lorakit.train.step.attention import edits_obstacle, flat_attention, flat_call
from lorakit.train.step.loss import base_alone
from lorakit.train.step.packing import pack_texts
from lorakit.train.trainer import LossPath

log = logging.getLogger("lorakit.train")

PLACES = ("encoder", "transformer", "final_norm")
"""Names of the part whose output is the last hidden states, on the bodies of encoders."""


@dataclass(frozen=True)
class Support:
    """How an encoder takes flat rows: after which part first tokens are picked, and the position of a first token.

    `reason` says why it does not take them, where it does not.
    """

    place: str = ""
    first_position: int = 0
    reason: str | None = None


_found: weakref.WeakKeyDictionary[nn.Module, Support] = weakref.WeakKeyDictionary()


def choose_class_path(model: nn.Module, fast_path: str = "auto") -> LossPath:
    """The flat path where the model is an encoder that takes it and it is not turned off, else the padded one."""
    reason = "train.fast_path is off" if fast_path == "off" else edits_obstacle(model, texts=True)
    reason = reason or encoder_support(model).reason
    if reason is not None:
        log.info("training path: padded texts, because %s", reason)
        return PADDED
    log.info("training path: texts in one flat row without padding")
    return FLAT


def encoder_support(model: nn.Module) -> Support:
    """How a sequence classifier takes flat rows, or why not. Tried once per model object."""
    if model not in _found:
        with base_alone(model):
            _found[model] = _try_places(model)
    return _found[model]


def _try_places(model: Any) -> Support:
    config = getattr(model, "config", None)
    body = getattr(model, "base_model", None)
    if config is None or body is None or body is model:
        return Support(reason="it is not a transformers model with a head")
    places = [name for name in PLACES if isinstance(getattr(body, name, None), nn.Module)]
    if not places:
        return Support(reason="no encoder was found in it, whose first tokens the class would be read from")
    device = next(model.parameters()).device
    vocabulary = int(config.get_text_config().vocab_size)
    tokens = torch.randint(0, vocabulary, (24,), generator=torch.Generator().manual_seed(7)).tolist()
    rows = [tokens[:11], tokens[11:15], tokens[15:]]
    # RoBERTa and its kin count positions from behind the padding token.
    starts = sorted({0, int(getattr(config, "pad_token_id", None) or 0) + 1})
    training, reason = model.training, ""
    dtype = next(model.parameters()).dtype
    bound = 16 * torch.finfo(dtype).eps * max(1.0, float(getattr(config, "num_hidden_layers", 1)) ** 0.5)
    try:
        model.eval()
        with torch.no_grad():
            alone = torch.cat([model(input_ids=torch.tensor([row], device=device)).logits for row in rows]).double()
            for place in places:
                for start in starts:
                    found, reason = _try(model, rows, Support(place, start))
                    if found is None:
                        continue
                    gap = float((found.double() - alone).norm() / alone.norm().clamp_min(1e-30))
                    if gap <= max(bound, 1e-5):
                        return Support(place, start)
                    reason = f"a flat row gives other logits than each text alone (off by {gap:.1e})"
    finally:
        model.train(training)
    return Support(reason=reason)


def _try(model: nn.Module, rows: list[list[int]], support: Support) -> tuple[Tensor | None, str]:
    """The logits of texts by one way of taking them, or None and how it failed."""
    try:
        with flat_attention(model):
            logits = flat_logits(model, rows, support)
    except Exception as error:  # an architecture may fail in any way; each of them means the padded path
        return None, f"its forward refuses a flat row ({type(error).__name__}: {str(error)[:200]})"
    if logits.ndim != 2 or logits.shape[0] != len(rows):
        return None, f"it gives logits of shape {tuple(logits.shape)} for a flat row of {len(rows)} texts"
    return logits, ""


def flat_logits(model: Any, rows: Sequence[Sequence[int]], support: Support) -> Tensor:
    """Logits `[texts, classes]` of texts in one flat row, inside `flat_attention`."""
    batch = pack_texts(rows, next(model.parameters()).device, support.first_position)
    with _picking(getattr(model.base_model, support.place), batch.first):
        logits: Tensor = flat_call(model, batch).logits
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


# -- the two ways ----------------------------------------------------------------------------------


def _padded(
    model: nn.Module, examples: Sequence[Any], num_items: float, label_smoothing: float
) -> tuple[Tensor, Tensor, int]:
    device = next(model.parameters()).device
    rows: list[list[int]] = [list(example.input_ids) for example in examples]
    longest = max(map(len, rows))
    filler = int(getattr(getattr(model, "config", None), "pad_token_id", None) or 0)
    ids = torch.tensor([row + [filler] * (longest - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=device)
    return _class_loss(model(input_ids=ids, attention_mask=mask).logits, examples, num_items, label_smoothing)


def _flat(
    model: nn.Module, examples: Sequence[Any], num_items: float, label_smoothing: float
) -> tuple[Tensor, Tensor, int]:
    logits = flat_logits(model, [example.input_ids for example in examples], encoder_support(model))
    return _class_loss(logits, examples, num_items, label_smoothing)


def _class_loss(
    logits: Tensor, examples: Sequence[LabelledExample], num_items: float, label_smoothing: float
) -> tuple[Tensor, Tensor, int]:
    """Cross entropy `[texts, classes]` summed over texts and divided by `num_items`; how many were right; how many."""
    if logits.ndim != 2:
        raise LorakitError(f"class loss: expected logits [texts, classes], found {tuple(logits.shape)}")
    labels = torch.tensor([example.label for example in examples], device=logits.device)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    total = nn.functional.cross_entropy(wide, labels, reduction="sum", label_smoothing=label_smoothing)
    right = (wide.detach().argmax(-1) == labels).sum().float()
    return total / max(num_items, 1.0), right, len(examples)


PADDED = LossPath("padded texts", _padded)
FLAT = LossPath("texts in a flat row", _flat, flat_attention)
