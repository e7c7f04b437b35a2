"""May a model take flat rows? It is tried, once per model object, and nothing is taken on trust."""

from __future__ import annotations

import logging
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lorakit.errors import LorakitError
from lorakit.train.step.attention import flat_attention, flat_hidden
from lorakit.train.step.loss import base_alone, decoder_of, read_head
from lorakit.train.step.packing import FlatBatch, pack

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Probe:
    input_ids: list[int]
    labels: list[int]


_verdicts: weakref.WeakKeyDictionary[nn.Module, str | None] = weakref.WeakKeyDictionary()


def flat_support(model: Any) -> str | None:
    """Why a model cannot take flat rows, or None if it can. Asked once per model object.

    Nothing is taken on trust: three short examples, two of them with a common beginning, go through the model packed
    and one by one, and logits must agree to what the model's precision allows.
    """
    if model not in _verdicts:
        with base_alone(model):
            _verdicts[model] = _find_reason(model)
        if _verdicts[model] is not None:
            logger.info("flat rows: %s takes padded batches, %s", type(model).__name__, _verdicts[model])
    return _verdicts[model]


def _find_reason(model: Any) -> str | None:
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "get_output_embeddings"):
        return "it is not a transformers model"
    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder-decoder"
    try:
        head, decoder = read_head(model), decoder_of(model)
    except LorakitError as error:
        return str(error)
    text = config.get_text_config()
    reason = _find_stated_reason(model, text)
    if reason is not None:
        return reason

    vocabulary = int(text.vocab_size)
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(0, vocabulary, (40,), generator=generator).tolist()
    rows = [tokens[:12] + tokens[20:27], tokens[:12] + tokens[27:31], tokens[31:40]]
    training = model.training
    device = next(model.parameters()).device
    try:
        model.eval()
        with torch.no_grad():
            alone = [model(input_ids=torch.tensor([row], device=device), use_cache=False).logits[0] for row in rows]
            packed = pack([_Probe(row, row) for row in rows], minimum_shared=4, row_multiple=8).to(device)
            with flat_attention(model):
                hidden = flat_hidden(decoder, packed)
            logits = head.shape(head.module(hidden))
    except Exception as error:  # an architecture may fail in any way; each of them means the padded path
        return f"its forward refuses a flat row ({type(error).__name__}: {str(error)[:200]})"
    finally:
        model.train(training)
    dtype = next(model.parameters()).dtype
    layers = int(getattr(text, "num_hidden_layers", 1))
    # Roundings of different orders of summation, one per layer, add up like a random walk.
    bound = 16 * torch.finfo(dtype).eps * max(1.0, layers**0.5)
    if dtype == torch.float64:
        bound = 1e-5  # norms and angles are computed in fp32 by most models
    places = _places(packed, rows)
    for expected, place in zip(alone, places, strict=True):
        found = logits[torch.tensor(place, device=device)].double()
        gap = (found - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)
        if not bool(gap <= bound):
            return f"a flat row gives other logits than each example alone (off by {float(gap):.1e})"
    seen, stated = packed.windows, _stated_windows(text)
    if seen != stated:
        return f"its attention is given the sliding windows {seen}, its configuration states {stated}"
    return None


def _stated_windows(text: Any) -> set[int | None]:
    """The windows of all layers, None for a layer that sees everything; short examples fit into any window."""
    window = getattr(text, "sliding_window", None)
    if not getattr(text, "use_sliding_window", True):
        window = None
    kinds = getattr(text, "layer_types", None)
    if not kinds:
        return {window}
    return {window if kind == "sliding_attention" else None for kind in kinds}


def _find_stated_reason(model: Any, text: Any) -> str | None:
    """What short examples cannot show: layer kinds beyond full and sliding attention, and dropout."""
    kinds = set(getattr(text, "layer_types", None) or ())
    odd = kinds - {"full_attention", "sliding_attention"}
    if odd:
        return f"it has layers of kind {', '.join(sorted(odd))}"
    if getattr(text, "attention_dropout", 0.0) or getattr(text, "attn_pdrop", 0.0):
        return "it has attention dropout; set it to 0 in the model's configuration"
    return None


def _places(packed: FlatBatch, rows: list[list[int]]) -> list[list[int]]:
    """Flat rows of each probe's tokens, found by following segments with its tokens."""
    flat = packed.input_ids[0].tolist()
    result = []
    for row in rows:
        place: list[int] = []
        parent = -1
        while len(place) < len(row):
            for node, segment in enumerate(packed.segments):
                run = flat[segment.start : segment.start + segment.length]
                if segment.parent == parent and run == row[len(place) : len(place) + segment.length]:
                    place += range(segment.start, segment.start + segment.length)
                    parent = node
                    break
            else:
                raise AssertionError("a probe must lie in its own batch")
        result.append(place)
    return result
