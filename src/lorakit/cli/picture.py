"""The picture of an adapter's ranks: one row per kind of layer, one column per block, so that uneven spending shows."""

from __future__ import annotations

import re
from collections.abc import Iterable
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
