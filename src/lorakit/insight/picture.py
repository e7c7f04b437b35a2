"""Pictures of adapters: the ranks of their layers, and which experts a router gives layers and tokens to."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from io import BytesIO
from typing import Any, Protocol

_BLOCK = re.compile(r"(?:^|\.)(\d+)\.")


class Ranked(Protocol):
    """What is drawn of a layer."""

    @property
    def name(self) -> str:
        """Its path in the model."""

    @property
    def rank(self) -> int:
        """The rank of what is added."""


def place_of(name: str) -> tuple[str, int]:
    """A layer's kind and block: the last part of its name that is not its block, and the first number in it (else 0)."""
    found = _BLOCK.search(name)
    rest = name[found.end() :] if found else name
    return ".".join(rest.split(".")[-2:]), int(found.group(1)) if found else 0


def draw_ranks(layers: Iterable[Ranked], title: str = "") -> bytes:
    """The picture as PNG bytes. Cells are numbered and shaded by rank; a layer that has none is left white."""
    import matplotlib

    matplotlib.use("Agg", force=False)
    from matplotlib.figure import Figure

    ranks: dict[tuple[str, int], int] = {}
    for layer in layers:
        place = place_of(layer.name)
        ranks[place] = ranks.get(place, 0) + layer.rank
    kinds = list(dict.fromkeys(kind for kind, _ in ranks))
    blocks = sorted({block for _, block in ranks})
    values: list[list[float]] = [[float(ranks.get((kind, block), "nan")) for block in blocks] for kind in kinds]
    highest = max(ranks.values(), default=1)
    figure = Figure(figsize=(2.6 + 0.36 * len(blocks), 1.2 + 0.34 * len(kinds)), dpi=130, layout="constrained")
    axis: Any = figure.subplots()
    axis.imshow(values, cmap="Blues", vmin=0, vmax=highest, aspect="auto")
    for row, kind in enumerate(kinds):
        for column, block in enumerate(blocks):
            rank = ranks.get((kind, block))
            if rank is not None:
                colour = "white" if rank > 0.6 * highest else "#1a202c"
                axis.text(column, row, str(rank), ha="center", va="center", fontsize=7, color=colour)
    axis.set_yticks(range(len(kinds)), kinds, fontsize=8)
    axis.set_xticks(range(len(blocks)), [str(block) for block in blocks], fontsize=8)
    axis.set_xlabel("block")
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)
    figure.suptitle(title or "rank of what each layer adds", fontsize=10)
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def draw_routes(
    prompts: Sequence[tuple[str, Mapping[str, Any], Sequence[str]]], experts: Sequence[str], title: str
) -> bytes:
    """Who was routed where, as PNG bytes: for each prompt, the mean weight of every expert in every layer, and of every
    expert for every token.

    Args:
        prompts: (text, {layer: weights (tokens, experts)}, the tokens as text).
        experts: the experts' names.
        title: above it all.
    """
    import matplotlib

    matplotlib.use("Agg", force=False)
    import torch
    from matplotlib.figure import Figure

    tall = max(max(len(tokens) for _, _, tokens in prompts), 12)
    width = 2.2 + 0.5 * len(experts)
    figure = Figure(figsize=(2 * width * len(prompts), 1.6 + 0.16 * min(tall, 60)), dpi=130, layout="constrained")
    axes: Any = figure.subplots(1, 2 * len(prompts), squeeze=False)[0]
    highest = max(float(weights.max()) for _, layers, _ in prompts for weights in layers.values())
    for place, (text, layers, tokens) in enumerate(prompts):
        by_layer = torch.stack([weights.mean(0) for weights in layers.values()])
        by_token = torch.stack(list(layers.values())).mean(0)
        left, right = axes[2 * place], axes[2 * place + 1]
        image = left.imshow(by_layer, cmap="Blues", vmin=0, vmax=highest, aspect="auto", interpolation="nearest")
        right.imshow(by_token, cmap="Blues", vmin=0, vmax=highest, aspect="auto", interpolation="nearest")
        blocks = [place_of(name)[1] for name in layers]
        starts = [row for row, block in enumerate(blocks) if row == 0 or block != blocks[row - 1]]
        step = max(1, len(starts) // 15)
        left.set_yticks(starts[::step], [str(blocks[row]) for row in starts[::step]], fontsize=7)
        left.set_ylabel("block", fontsize=8)
        step = max(1, len(tokens) // 60)
        right.set_yticks(range(0, len(tokens), step), [repr(token)[1:-1] for token in tokens[::step]], fontsize=6)
        left.set_title(text if len(text) < 30 else text[:28] + "…", fontsize=8, loc="left")
        for axis in (left, right):
            axis.set_xticks(range(len(experts)), experts, fontsize=7, rotation=40, ha="right")
            axis.spines[:].set_visible(False)
            axis.tick_params(length=0)
    figure.colorbar(image, ax=list(axes), shrink=0.5, pad=0.01).ax.tick_params(labelsize=7)
    figure.suptitle(title, fontsize=10)
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
