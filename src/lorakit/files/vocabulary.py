"""New tokens: rows of a base's embedding (and output head) for tokens that its vocabulary does not have.

An adapter holds the rows that it has trained, and the base gets room for them: whoever loads such an adapter from the command
line has the embedding resized first. The new rows of the base are the mean of the others, so that they are the same each time.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorakit.core.walking import has_suffix, walk
from lorakit.errors import LorakitError, plural
from lorakit.files.bundle import read_config

log = logging.getLogger("lorakit")


def add_tokens(tokenizer: Any, tokens: Sequence[str]) -> list[int]:
    """Make texts special tokens of a tokenizer; returns their ids, of those too that it had."""
    if not tokens:
        return []
    if "" in tokens or len(set(tokens)) < len(tokens):
        raise LorakitError(f"data.special_tokens: expected different texts, none empty, found {list(tokens)}")
    known = tokenizer.get_vocab()
    had = [token for token in tokens if token in known]
    new = [token for token in tokens if token not in known]
    tokenizer.add_tokens(new, special_tokens=True)
    log.info(
        "data.special_tokens: %s added%s",
        plural(len(new), "token"),
        f"; known already: {', '.join(had)}" if had else "",
    )
    return list(tokenizer.convert_tokens_to_ids(list(tokens)))


def tokens_trained(folder: str | Path) -> list[int]:
    """The tokens whose rows an adapter trains alone."""
    config = read_config(folder)
    given = config.get("trainable_token_indices") or config.get("token_indices") or ()
    return [int(token) for own in (given.values() if isinstance(given, Mapping) else [given]) for token in own]


def make_room(model: Any, adapters: Iterable[str | Path]) -> None:
    """Give a base the rows that these adapters train and it does not have. Call it before they are loaded."""
    grow(model, max((token + 1 for folder in adapters for token in tokens_trained(folder)), default=0))


def grow(model: Any, rows: int) -> None:
    """Give a base an embedding of so many rows, if it has fewer, and its output head."""
    if not rows or rows <= (before := int(model.get_input_embeddings().weight.shape[0])):
        return
    model.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            weight = getattr(layer, "weight", None)
            if weight is not None and len(weight) == rows:
                weight[before:] = weight[:before].float().mean(dim=0)
    log.info("the base's embedding has %d rows for new tokens: %d in all", rows - before, rows)


def token_rows(model: Any, ids: Sequence[int], saved: Sequence[str]) -> dict[str, list[int]] | None:
    """What `attach` trains of new tokens: their rows of the embedding, and of an output head with a weight of its own (a tied
    one follows); not of what is trained whole (`saved`)."""
    if not ids:
        return None
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tables = [embedding] + ([head] if head is not None and head.weight is not embedding.weight else [])
    paths = {id(module): path for path, module in walk(model) if isinstance(module, nn.Module)}
    names = [paths[id(table)] for table in tables if id(table) in paths]
    return {name: list(ids) for name in names if not any(has_suffix(name, one) for one in saved)}
