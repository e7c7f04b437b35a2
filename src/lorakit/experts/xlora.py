"""X-LoRA: a small classifier of the base model's hidden states weighs frozen adapters, for every token and layer.

    pass 1: h = last hidden states of the base model alone      λ = softmax(classifier(h) / temperature)
    pass 2: y = W x + scale · Σ_e λ_e ΔW_e x,   λ of this token and, with `layerwise`, of this layer

The classifier alone trains: one linear layer, or several with ReLU between. With `top_k` the softmax is over the largest
alone, so that the weights still sum to 1. In PEFT's X-LoRA a cache is not possible (every new token runs the whole text
through both passes), and top-k after a softmax does not sum to 1, or is put through a second one. Buehler and Buehler 2024,
arXiv 2402.07148.

The folder is one that PEFT reads: its configuration and its names, with the experts in folders below, which PEFT looks for
from the present directory (or where `config.adapters` says). Top-k with a temperature is the one thing that PEFT has no
entry for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.core.delta import Call, Card
from lorakit.core.options import option
from lorakit.experts.context import RouterContext, RouterSpec, on_tokens
from lorakit.experts.gates import softmax_over, top_mask
from lorakit.experts.two_pass import TwoPassRouter


@dataclass(frozen=True, kw_only=True)
class XLoRA(RouterSpec):
    """The options of X-LoRA."""

    name = "xlora"
    card = Card(
        title="X-LoRA",
        formula="y = W x + Σ λ_e ΔW_e x, λ = softmax(classifier(last hidden state of the base)) per token and layer",
        parameters=lambda shape, spec: 0,
        paper="arXiv 2402.07148",
        use="Adapters of several skills, and data in which they are needed together.",
        limits="Two passes; a weight per token: cannot be merged.",
    )
    layerwise: bool = option(
        True, "weights for every adapted matrix of their own; else one set for all", peft="layerwise_scalings"
    )
    top_k: int | None = option(None, "adapters per token; null for all", minimum=1, peft="top_k_lora")
    temperature: float = option(1.0, "divides the classifier's logits", above=0, peft="softmax_temperature")
    scale: float = option(1.0, "factor of what all adapters add together", peft="global_scaling_weight")
    depth: int = option(1, "layers of the classifier", minimum=1, peft="xlora_depth")
    width: int = option(2048, "inner size of the classifier, from a depth of 2 on", minimum=1, peft="xlora_size")
    classifier_dropout: float = option(
        0.2, "dropout within the classifier, from a depth of 2 on", minimum=0, below=1, peft="xlora_dropout_p"
    )


class XRouter(TwoPassRouter, of=XLoRA):
    """The classifier, whose last layer gives (matrices × members) or (members) logits."""

    def __init__(self, spec: XLoRA, context: RouterContext) -> None:
        super().__init__(spec, context)
        self.spec = spec
        decoder: Any = context.decoder()
        size = int(decoder.config.get_text_config().hidden_size)
        layers: list[nn.Module] = []
        for _ in range(spec.depth - 1):
            layers += [nn.Linear(size, spec.width), nn.ReLU()]
            layers += [nn.Dropout(spec.classifier_dropout)] if spec.classifier_dropout else []
            size = spec.width
        count = len(self.members) * (len(self.places) if spec.layerwise else 1)
        self.layers = nn.Sequential(*layers, nn.Linear(size, count))

    def find(self, args: tuple[Any, ...], kwargs: dict[str, Any], memory: dict[str, Any] | None) -> Tensor:
        """λ for the tokens of a call, (batch, tokens, matrices or 1, members)."""
        hidden = self.hidden(args, kwargs, memory)
        self.layers.train(self.decoder.training)
        last = self.layers[-1]
        assert isinstance(last, nn.Linear)
        logits = self.layers(hidden.to(last.weight.dtype)).unflatten(-1, (-1, len(self.members)))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / self.spec.temperature
        return self.spec.scale * softmax_over(logits, top_mask(logits, self.spec.top_k))

    def weights(self, layer: str, site: str, call: Call, found: Tensor | None) -> Tensor:
        found = self.found_or_refuse(found, layer)
        place = self.places[layer, site] if self.spec.layerwise else 0
        return on_tokens(found[:, :, place], call.leading, layer)
