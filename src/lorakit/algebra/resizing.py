"""An adapter at another rank: a plain LoRA with a rank per layer, and by how much it differs as a number.

`resize` works on an adapter on its model and on any method; `resize_folder` on a LoRA's folder alone, without the base.
Both keep the best approximation of every layer's ΔW; with `own` instead what the method itself puts first, which needs a
method that orders its ranks: DyLoRA's leading components, AdaLoRA's largest triplets.
"""

from __future__ import annotations

import math
from pathlib import Path

from lorakit.adapter.adapter import Adapter
from lorakit.algebra.changes import Change, Cut, cut, distance
from lorakit.algebra.outcome import Made, beside, in_folder, made
from lorakit.algebra.sources import Live, Stored
from lorakit.core.delta import LowRank
from lorakit.core.spectrum import check_request
from lorakit.errors import LorakitError


def resize(
    adapter: Adapter,
    *,
    rank: int | None = None,
    energy: float | None = None,
    own: bool = False,
    name: str | None = None,
) -> Made:
    """Put a plain LoRA of another rank beside an adapter; the adapter itself stays as it is.

    Args:
        adapter: of any method. Its ΔW is taken from its factors, never made, where it has factors.
        rank: of every layer; a layer that has less keeps what it has.
        energy: instead of a rank, the share of every layer's squared singular values to keep.
        own: keep what the method itself puts first instead of the largest singular values; needs `rank`.
        name: of the new adapter; the old one's with "-resized" by default.

    Raises:
        LorakitError: the request makes no sense, or the adapter changes biases in a way that no LoRA has.
    """
    check_request(rank, energy)
    live = Live(adapter, "resize")
    cuts: dict[str, Cut] = {}
    for place in live.places():
        method = live.at[place][2].spec.name
        if live.shift(place) is not None:
            raise LorakitError(f"resize: {method} changes the bias of {place}, which a LoRA cannot say.")
        cuts[place] = _own(live, place, rank) if own else cut(live.change(place), rank, energy)
    replaced = {path: replacement.tensors() for path, replacement in adapter.replacements()}
    return beside([live], name or f"{adapter.name}-resized", cuts, replaced)


def _own(live: Live, place: str, rank: int | None) -> Cut:
    if rank is None:
        raise LorakitError("resize: with own the rank is given; an energy share is one of singular values.")
    delta = live.at[place][2]
    chosen = delta.truncated(rank) if isinstance(delta, LowRank) else None
    if chosen is None:
        raise LorakitError(f"resize: {delta.spec.name} does not order its ranks; leave own out.")
    before, after = live.change(place), Change.of(*chosen)
    return Cut(after, before.norm(), distance(before, after))


def resize_folder(
    folder: str | Path, output: str | Path, *, rank: int | None = None, energy: float | None = None, own: bool = False
) -> Made:
    """Write a LoRA's folder at another rank, from its tensors alone; options as for `resize`.

    Raises:
        LorakitError: the folder holds no LoRA, or one with DoRA's magnitudes (which need the base: `resize`).
    """
    check_request(rank, energy)
    stored = Stored(folder, "resize")
    cuts = {
        place: _own_of_folder(stored, place, rank) if own else cut(stored.change(place), rank, energy)
        for place in stored.places()
    }
    error = made(cuts).error
    record = {"resized": {"from": str(stored.bundle.folder), "error": error}}
    return in_folder([stored], output, cuts, stored.others, record, "resize")


def _own_of_folder(stored: Stored, place: str, rank: int | None) -> Cut:
    method = stored.bundle.own.get("method", {}).get("name", "lora")
    if method != "dylora" or rank is None:
        raise LorakitError(
            f"resize: own keeps the ranks that the method itself puts first, and needs rank; this folder's method is {method}. "
            "Without own the largest singular values are kept."
        )
    before = stored.change(place)
    assert before.A is not None
    full = before.A.shape[0]
    b = min(rank, full)
    root = bool(stored.bundle.config.get("use_rslora"))
    grown = math.sqrt(full / b) if root else full / b  # alpha stays, so that the scale is that of the smaller rank
    after = Change(before.B[:, :b] * grown, before.A[:b])
    return Cut(after, before.norm(), distance(before, after))
