"""An adapter at another rank: a plain LoRA with a rank per layer, and by how much it differs as a number.

The best approximation of every layer's ΔW is kept; with `own` instead what the method itself puts first, which needs a
method that orders its ranks: DyLoRA's leading components, AdaLoRA's largest triplets.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

from lorakit.adapter.adapter import Adapter
from lorakit.algebra.changes import Cut, cut, distance
from lorakit.algebra.outcome import Made, make
from lorakit.algebra.sources import refuse_biases, source
from lorakit.core.spectrum import check_request
from lorakit.errors import LorakitError


def resize(
    adapter: Adapter | str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    own: bool = False,
    name: str | None = None,
    output: str | Path | None = None,
) -> Made:
    """Make a plain LoRA of another rank of an adapter; the adapter itself stays as it is.

    Args:
        adapter: of any method, on its model; or a LoRA's folder, which is resized from its tensors alone. ΔW is taken from
            the factors, never made, where there are factors.
        rank: of every layer; a layer that has less keeps what it has.
        energy: instead of a rank, the share of every layer's squared singular values to keep.
        own: keep what the method itself puts first instead of the largest singular values; needs `rank`.
        name: of the new adapter on the model; the old one's with "-resized" by default.
        output: the folder to write, for a folder.

    Raises:
        LorakitError: the request makes no sense; the adapter changes biases in a way that no LoRA has; the folder holds no
            LoRA, or one with DoRA's magnitudes (which need the base: load it, and resize the adapter).
    """
    check_request(rank, energy)
    if own and rank is None:
        raise LorakitError("resize: own was given, which needs rank; an energy share is one of singular values.")
    given = source(adapter, "resize", output)
    refuse_biases(given, "resize")
    cuts: dict[str, Cut] = {}
    for place in given.places():
        change = given.change(place)
        if own:
            after = given.leading(place, cast(int, rank))
            cuts[place] = Cut(after, change.norm(), distance(change, after))
        else:
            cuts[place] = cut(change, rank, energy)
    name = name or f"{given.label}-resized"
    return make([given], cuts, given.replaced(), name=name, output=output, done="resized", what={})
