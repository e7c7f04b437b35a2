"""How two adapters differ: the size of what each adds to every layer, their cosine, and the angles between their subspaces.

Two adapters that learned the same thing point the same way (cosine near 1); two that may be summed without getting into each
other's way are at right angles (cosine near 0, principal angles near 90°). The columns of ΔW are what it can write, the rows
what it reads; small angles there mean that both work in the same directions, whatever the sign.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lorakit.adapter.adapter import Adapter
from lorakit.algebra.changes import Change, distance, inner
from lorakit.algebra.sources import Stored, check_bases, check_shapes, sources
from lorakit.core.spectrum import check_request
from lorakit.errors import LorakitError

ENERGY = 0.9
"""A change without factors is taken for the directions that hold this share of its squared singular values."""


@dataclass(frozen=True)
class Angles:
    """Principal angles between two subspaces in degrees: the least, the largest; and the mean squared cosine, which is 1
    where the smaller subspace lies within the other and 0 where they are at right angles."""

    least: float
    largest: float
    overlap: float


@dataclass(frozen=True)
class Compared:
    """One matrix that both change.

    Attributes:
        norms: ‖ΔW‖ of each.
        distance: ‖ΔW - ΔW'‖.
        cosine: ⟨ΔW, ΔW'⟩ / (‖ΔW‖ ‖ΔW'‖); 0 where one is zero.
        columns: angles between what they write (None where one is zero).
        rows: angles between what they read.
    """

    norms: tuple[float, float]
    distance: float
    cosine: float
    columns: Angles | None
    rows: Angles | None


@dataclass(frozen=True)
class Difference:
    """Two adapters compared.

    Attributes:
        labels: their names.
        layers: place -> the comparison, for matrices that both change.
        alone: places that only the first or only the second changes.
        norms: of all of each.
        distance: between all of each, what only one changes included.
        cosine: of all of each.
    """

    labels: tuple[str, str]
    layers: dict[str, Compared]
    alone: tuple[tuple[str, ...], tuple[str, ...]]
    norms: tuple[float, float]
    distance: float
    cosine: float


def diff(one: Adapter | str | Path, other: Adapter | str | Path, *, rank: int | None = None) -> Difference:
    """Compare two adapters on one model, or two folders for one base.

    Args:
        one, other: adapters of any methods; folders of LoRAs.
        rank: compare the subspaces of so many largest singular directions; by default all that each has, of a change
            without factors those that hold 90% of its energy.

    Raises:
        LorakitError: they are not on one model or for one base, or change matrices of different shapes.
    """
    check_request(rank, None, "diff", needed=False)
    first, second = given = sources([one, other], "diff")
    if isinstance(first, Stored) and isinstance(second, Stored):
        check_bases([first, second], "diff")
    ours, theirs = (dict.fromkeys(source.places()) for source in given)
    layers: dict[str, Compared] = {}
    squares, product = [0.0, 0.0], 0.0
    for place in dict.fromkeys([*ours, *theirs]):
        a, b = first.found(place), second.found(place)
        norms = [0.0 if change is None else change.norm() for change in (a, b)]
        squares = [total + norm**2 for total, norm in zip(squares, norms, strict=True)]
        if a is None or b is None:
            continue
        check_shapes("diff", place, [(first.label, a.shape), (second.label, b.shape)])
        along = inner(a, b)
        product += along
        layers[place] = Compared(
            (norms[0], norms[1]), distance(a, b), _cosine(along, norms[0], norms[1]), *_angles(a, b, norms, rank)
        )
    if not layers:
        raise LorakitError(
            f"diff: {first.label} and {second.label} change no matrix in common; the first changes for example "
            f"{next(iter(ours))}, the second {next(iter(theirs))}."
        )
    sizes = math.sqrt(squares[0]), math.sqrt(squares[1])
    return Difference(
        labels=(first.label, second.label),
        layers=layers,
        alone=(tuple(p for p in ours if p not in theirs), tuple(p for p in theirs if p not in ours)),
        norms=sizes,
        distance=math.sqrt(max(0.0, squares[0] + squares[1] - 2 * product)),
        cosine=_cosine(product, *sizes),
    )


def _cosine(product: float, one: float, other: float) -> float:
    return max(-1.0, min(1.0, product / (one * other))) if one and other else 0.0


def _angles(a: Change, b: Change, norms: list[float], rank: int | None) -> tuple[Angles | None, Angles | None]:
    if not all(norms):
        return None, None
    (U, V), (other_U, other_V) = _directions(a, rank), _directions(b, rank)
    return principal_angles(U, other_U), principal_angles(V, other_V)


def _directions(change: Change, rank: int | None) -> tuple[Tensor, Tensor]:
    """Orthonormal bases (out, k) and (in, k) of what a change writes and reads."""
    found = change.spectrum()
    above = found.values > found.values[0] * len(found.values) * torch.finfo(torch.float32).eps
    count = int(above.sum()) if change.rank is not None else found.rank_for(ENERGY)
    count = count if rank is None else min(count if change.rank is not None else len(found.values), rank)
    return found.U[:, :count], found.Vh[:count].T


def principal_angles(U: Tensor, V: Tensor) -> Angles:
    """The angles between the spaces that the orthonormal columns of U (n, k) and V (n, l) span, min(k, l) of them."""
    cosines = torch.linalg.svdvals(U.T @ V).clamp(max=1.0)
    degrees = torch.rad2deg(torch.arccos(cosines))
    return Angles(float(degrees[0]), float(degrees[-1]), float(cosines.square().mean()))
