"""Does a model support the padding-free path? It is tried, once per model object, and nothing is taken on trust."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.core.using import whole_rows
from lorakit.errors import LorakitError
from lorakit.models.evaluating import evaluating
from lorakit.train.data.store import Example
from lorakit.train.step.attention import edits_obstacle, packed_attention, packed_hidden
from lorakit.train.step.last_block import relative_gap
from lorakit.train.step.loss import PACKED, PADDED, LossPath, base_alone, decoder_of, read_head
from lorakit.train.step.packing import pack

log = logging.getLogger("lorakit.train")


def choose_path(model: nn.Module, fast_path: str = "auto") -> LossPath:
    """The padding-free path where the model supports it and it is not turned off, else padded batches; the log says why."""
    whole = whole_rows(model)
    reason = edits_obstacle(model) or (None if whole is None else f"router {whole!r} weighs whole rows")
    return choose(fast_path, PACKED, PADDED, lambda: reason or packing_support(model))


def choose(fast_path: str, packed: LossPath, padded: LossPath, obstacle: Callable[[], str | None]) -> LossPath:
    """`packed`, or `padded` where the fast path is off or there is an obstacle; the log says which and why."""
    reason = "train.fast_path is off" if fast_path == "off" else obstacle()
    if reason is None:
        log.info("fast path: %s", packed.name)
        return packed
    log.info("padded batches (%s)", reason)
    return padded


_verdicts: weakref.WeakKeyDictionary[nn.Module, str | None] = weakref.WeakKeyDictionary()


def packing_support(model: Any) -> str | None:
    """Why a model cannot take packed batches, or None if it can. Tried once per model object.

    Nothing is taken on trust: three short examples, two of them with a common prefix, go through the model packed
    and one by one, and logits must agree to what the model's precision allows.
    """
    if model not in _verdicts:
        with base_alone(model):
            _verdicts[model] = _find_reason(model)
    return _verdicts[model]


def _find_reason(model: Any) -> str | None:
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "get_output_embeddings"):
        return f"{type(model).__name__} is not a transformers model"
    if getattr(config, "is_encoder_decoder", False):
        return "encoder-decoder models are not supported"
    try:
        head, decoder = read_head(model), decoder_of(model)
    except LorakitError as error:
        return str(error)
    text = config.get_text_config()
    reason = _find_stated_reason(text)
    if reason is not None:
        return reason

    vocabulary = int(text.vocab_size)
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(0, vocabulary, (40,), generator=generator).tolist()
    rows = [tokens[:12] + tokens[20:27], tokens[:12] + tokens[27:31], tokens[31:40]]
    try:
        with evaluating(model):
            alone = logits_alone(model, rows, use_cache=False)
            packed = pack([Example(row, row) for row in rows], minimum_shared=4, row_multiple=8).to(alone[0].device)
            with packed_attention(model):
                hidden = packed_hidden(decoder, packed)
            logits = head.shape(head.module(hidden))
    except Exception as error:  # an architecture may fail in any way; each of them means the padded path
        return refusal(error)
    for expected, place in zip(alone, packed.places, strict=True):
        reason = difference(model, logits[torch.tensor(place, device=logits.device)], expected)
        if reason is not None:
            return reason
    seen, stated = packed.windows, _stated_windows(text)
    if seen != stated:
        return f"the model's attention uses sliding windows {seen}, its configuration states {stated}"
    return None


def logits_alone(model: Any, rows: Sequence[Sequence[int]], **options: Any) -> list[Tensor]:
    """The model's own logits of each row of tokens by itself."""
    device = next(model.parameters()).device
    return [model(input_ids=torch.tensor([row], device=device), **options).logits[0] for row in rows]


def refusal(error: Exception) -> str:
    """The reason of a model whose forward fails on a packed batch."""
    return f"the model's forward does not take packed batches ({type(error).__name__}: {str(error)[:200]})"


def difference(model: Any, found: Tensor, expected: Tensor, least: float = 0.0) -> str | None:
    """The reason of a model that gives other logits in a packed batch, or None where they agree to what its dtype
    allows, or to `least`."""
    dtype, config = next(model.parameters()).dtype, model.config.get_text_config()
    # Roundings of different orders of summation, one per layer, add up like a random walk.
    bound = 16 * torch.finfo(dtype).eps * max(1.0, float(getattr(config, "num_hidden_layers", 1)) ** 0.5)
    if dtype == torch.float64:
        bound = 1e-5  # norms and angles are computed in fp32 by most models
    gap = relative_gap(found, expected)
    if gap <= max(bound, least):
        return None
    return f"a packed batch gives other logits than each example alone (off by {gap:.1e})"


def _stated_windows(text: Any) -> set[int | None]:
    """The windows of all layers, None for a layer that sees everything; short examples fit into any window."""
    window = getattr(text, "sliding_window", None)
    if not getattr(text, "use_sliding_window", True):
        window = None
    kinds = getattr(text, "layer_types", None)
    if not kinds:
        return {window}
    return {window if kind == "sliding_attention" else None for kind in kinds}


def _find_stated_reason(text: Any) -> str | None:
    """What short examples cannot show: layer kinds beyond full and sliding attention, and dropout."""
    kinds = set(getattr(text, "layer_types", None) or ())
    odd = kinds - {"full_attention", "sliding_attention"}
    if odd:
        return f"layers of kind {', '.join(sorted(odd))} are not supported"
    if getattr(text, "attention_dropout", 0.0) or getattr(text, "attn_pdrop", 0.0):
        return "attention dropout is not supported; set it to 0 in the model's configuration"
    return None
