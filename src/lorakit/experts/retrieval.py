"""Retrieval: the adapters whose examples are nearest to the request, as the base model itself embeds both.

    e(text) = mean over its tokens of the base's last hidden states, less the mean over all adapters' examples
    s_a = cos(e(request), mean of e(examples of a))      w = softmax over the top_k largest s / temperature

The weights are those of the row (the request), for all its tokens and layers; while it is being answered from a cache, they
stay as the prompt had them. No second model is needed. The idea is LoraRetriever's (Zhao et al. 2024, arXiv 2402.09997),
which trains an embedding model for it; hidden states of language models all point one way, so the mean is taken off.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from lorakit.core.delta import Call, Card
from lorakit.core.options import option
from lorakit.core.using import routed
from lorakit.errors import LorakitError
from lorakit.experts.context import RouterContext, RouterSpec
from lorakit.experts.gates import softmax_over, top_mask
from lorakit.experts.two_pass import TwoPassRouter
from lorakit.models.evaluating import evaluating


@dataclass(frozen=True, kw_only=True)
class Retrieval(RouterSpec):
    """The options of retrieval."""

    name = "retrieval"
    card = Card(
        title="Retrieval",
        formula="w = softmax(top-k of cos(embedding of the request, of each adapter's examples))",
        parameters=lambda shape, spec: 0,
        paper="after arXiv 2402.09997",
        use="Requests of unknown kind, adapters with a few example requests each.",
        limits="One weight per request; needs the base model's pass over it.",
    )
    top_k: int | None = option(1, "adapters per request; null for all", minimum=1)
    temperature: float = option(0.1, "divides the likenesses; with top_k 1 it does not matter", above=0)


class Retriever(TwoPassRouter, of=Retrieval):
    """One centroid per adapter, (members, hidden), and their origin, (hidden,)."""

    whole_rows = True

    def __init__(self, spec: Retrieval, context: RouterContext) -> None:
        super().__init__(spec, context)
        self.spec = spec
        size = int(cast(Any, context.decoder()).config.get_text_config().hidden_size)
        self.register_buffer("centroids", torch.zeros(len(self.members), size))
        self.register_buffer("origin", torch.zeros(size))

    def fit(self, context: RouterContext, examples: Any) -> None:
        given = dict(examples) if isinstance(examples, Mapping) else {}
        if set(given) != set(self.members) or not all(given.values()):
            raise LorakitError(
                "route: retrieval needs example requests of every adapter: batches={name: [batch, ...]} with the names "
                f"{', '.join(self.members)}; given: {', '.join(map(str, given)) or 'none'}."
            )
        with evaluating(context.model), routed(context.state, None):
            means = [
                torch.cat([self._embed(context.decoder(), batch) for batch in given[name]]) for name in self.members
            ]
        origin = torch.stack([rows.mean(0) for rows in means]).mean(0)
        cast(Tensor, self.origin).copy_(origin)
        centroids = [F.normalize(rows - origin, dim=-1).mean(0) for rows in means]
        cast(Tensor, self.centroids).copy_(F.normalize(torch.stack(centroids), dim=-1))

    def _embed(self, decoder: Any, batch: Mapping[str, Any]) -> Tensor:
        """Embeddings of a batch, (rows, hidden)."""
        own = {key: batch[key] for key in ("input_ids", "attention_mask", "inputs_embeds") if key in batch}
        return mean_state(decoder(**own, use_cache=False).last_hidden_state, batch.get("attention_mask"))

    def likeness(self, embeddings: Tensor) -> Tensor:
        """The cosines of (rows, hidden) with every adapter's centroid, (rows, members)."""
        centred = F.normalize(embeddings - cast(Tensor, self.origin).to(embeddings), dim=-1)
        return centred @ cast(Tensor, self.centroids).to(embeddings).T

    def find(self, args: tuple[Any, ...], kwargs: dict[str, Any], memory: dict[str, Any] | None) -> Tensor:
        if kwargs.get("packed_batch") is not None:
            raise LorakitError(
                "use: retrieval weighs whole rows, and this batch is packed; turn packing off (train.fast_path: off)."
            )
        if memory is not None and "weights" in memory:
            return cast(Tensor, memory["weights"])
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        scores = self.likeness(mean_state(self.hidden(args, kwargs, None), mask))
        weights = softmax_over(scores / self.spec.temperature, top_mask(scores, self.spec.top_k))
        if memory is not None:
            memory["weights"] = weights
        return weights

    def weights(self, layer: str, site: str, call: Call, found: Tensor | None) -> Tensor:
        found = self.found_or_refuse(found, layer)
        leading = call.leading
        if leading[0] != len(found):
            raise LorakitError(
                f"use: retrieval has weights for {len(found)} rows, and {layer} was called with {leading[0]}; the rows of a "
                "batch must stay as they were in the prompt."
            )
        return found.reshape(len(found), *[1] * (len(leading) - 1), -1)


def mean_state(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """The mean of hidden states (rows, tokens, hidden) over the tokens that a mask (rows, tokens) marks, at least float32."""
    hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    if mask is None:
        return hidden.mean(1)
    m = mask.to(hidden)[..., None]
    return (hidden * m).sum(1) / m.sum(1).clamp_min(1)
