"""An adapter at another rank: a plain LoRA with a rank per layer, and by how much it differs as a number.

`resize` works on an adapter on its model and on any method; `resize_folder` on a LoRA's folder alone, without the base.
Both keep the best approximation of every layer's ΔW; with `own` instead what the method itself puts first, which needs a
method that orders its ranks: DyLoRA's leading components, AdaLoRA's largest triplets.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorakit.adapter import Adapter, board_of, build
from lorakit.bundle import CONTENT, Bundle, read_bundle, write_bundle
from lorakit.delta import Delta, LowRank
from lorakit.errors import LorakitError
from lorakit.folder import replace_folder
from lorakit.interchange import COMMON
from lorakit.layout import Site
from lorakit.methods import LoRA
from lorakit.spectrum import check_request, distance, norm, spectrum, spectrum_of
from lorakit.storage import storage_of
from lorakit.targets import value_for


@dataclass(frozen=True)
class Resized:
    """What a resize did.

    Attributes:
        ranks: layer (or part of one) -> its rank now.
        errors: layer -> ‖ΔW - ΔW'‖ / ‖ΔW‖ in the Frobenius norm.
        error: the same over all layers together.
        adapter: the new adapter; None where a folder was written.
    """

    ranks: dict[str, int]
    errors: dict[str, float]
    error: float
    adapter: Adapter | None = None


@dataclass(frozen=True)
class _Cut:
    """One layer's new factors, scale within, and the norms of what was and of what is lost."""

    B: Tensor
    A: Tensor
    size: float
    lost: float

    @property
    def rank(self) -> int:
        return self.A.shape[0]


def _cut(B: Tensor, A: Tensor, rank: int | None, energy: float | None) -> _Cut:
    """The best approximation of `B A`."""
    found = spectrum(B, A)
    wanted = min(rank, len(found.values)) if rank is not None else found.rank_for(energy or 1.0)
    return _Cut(*found.cut(wanted), norm(B, A), found.lost(wanted))


def _report(cuts: Mapping[str, _Cut], adapter: Adapter | None = None) -> Resized:
    size = math.sqrt(sum(cut.size**2 for cut in cuts.values()))
    lost = math.sqrt(sum(cut.lost**2 for cut in cuts.values()))
    return Resized(
        ranks={where: cut.rank for where, cut in cuts.items()},
        errors={where: cut.lost / cut.size if cut.size else 0.0 for where, cut in cuts.items()},
        error=lost / size if size else 0.0,
        adapter=adapter,
    )


# -- on a model ------------------------------------------------------------------------------------------------------------


def resize(
    adapter: Adapter,
    *,
    rank: int | None = None,
    energy: float | None = None,
    own: bool = False,
    name: str | None = None,
) -> Resized:
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
    board_of(adapter.model)
    cuts: dict[str, _Cut] = {}
    with torch.no_grad():
        for path, site, delta in adapter.deltas():
            where = f"{path}.{site.name}" if site.name else path
            cuts[where] = _cut_delta(adapter, path, site, delta, rank, energy, own)
    common = Counter(cut.rank for cut in cuts.values()).most_common(1)[0][0]
    other = {f"^{re.escape(where)}": cut.rank for where, cut in cuts.items() if cut.rank != common}
    targets = dataclasses.replace(
        adapter.targets, rank_pattern=other, alpha_pattern={key: float(value) for key, value in other.items()}
    )
    paths = [path for path, layer in adapter.layers.items() if layer.deltas_of(adapter.name)]
    spec = LoRA(rank=common, alpha=float(common))
    made = build(adapter.model, spec, targets, name or f"{adapter.name}-resized", checked=False, paths=paths)
    for path, site, delta in made.deltas():
        cut = cuts[f"{path}.{site.name}" if site.name else path]
        low_rank = delta.low_rank()
        assert low_rank is not None
        low_rank.set_factors(cut.B, cut.A)
    before = dict(adapter.replacements())
    with torch.no_grad():
        for path, replacement in made.replacements():
            for key, tensor in replacement.tensors().items():
                tensor.copy_(before[path].tensors()[key])
    return _report(cuts, made)


def _cut_delta(
    adapter: Adapter, path: str, site: Site, delta: Delta, rank: int | None, energy: float | None, own: bool
) -> _Cut:
    base = adapter.layers[path].base
    bias = None if site.bias is None else base.get_parameter(site.bias).detach()
    if bias is not None and bias.shape[0] != site.layout.shape.out:
        bias = None
    if delta.shift(bias) is not None:
        raise LorakitError(f"resize: {delta.spec.name} changes the bias of {path}, which a LoRA cannot say.")
    if not isinstance(delta, LowRank):
        if own:
            raise LorakitError(f"resize: {delta.spec.name} does not order its ranks; leave own out.")
        found = spectrum_of(delta.dense(site.layout.matrix(storage_of(base, site.weight).read(base, site.weight))))
        wanted = min(rank, len(found.values)) if rank is not None else found.rank_for(energy or 1.0)
        return _Cut(*found.cut(wanted), float(torch.linalg.vector_norm(found.values)), found.lost(wanted))
    B, A = delta.factors()
    gate = delta.gate()
    B = (B if gate is None else B * gate) * delta.scale
    if not own:
        return _cut(B, A, rank, energy)
    if rank is None:
        raise LorakitError("resize: with own the rank is given; an energy share is one of singular values.")
    chosen = delta.truncated(rank)
    if chosen is None:
        raise LorakitError(f"resize: {delta.spec.name} does not order its ranks; leave own out.")
    return _Cut(*chosen, norm(B, A), distance(B, A, *chosen))


# -- in a folder -----------------------------------------------------------------------------------------------------------

_PAIRS = {".lora_A.weight": ".lora_B.weight", ".lora_embedding_A": ".lora_embedding_B"}


def works_on_folder(config: Mapping[str, Any]) -> bool:
    """Whether a folder's file says all that a resize needs: it is a LoRA without DoRA's magnitudes."""
    return config.get("peft_type") == "LORA" and not config.get("use_dora")


def resize_folder(
    folder: str | Path, output: str | Path, *, rank: int | None = None, energy: float | None = None, own: bool = False
) -> Resized:
    """Write a LoRA's folder at another rank, from its tensors alone; options as for `resize`.

    Raises:
        LorakitError: the folder holds no LoRA, or one with DoRA's magnitudes (which need the base: `resize`).
    """
    check_request(rank, energy)
    bundle = read_bundle(folder)
    if bundle.stale:
        raise LorakitError(bundle.stale)
    config, spec = bundle.config, bundle.own.get("method", {})
    if not works_on_folder(config):
        kind = "DoRA" if config.get("use_dora") else config.get("peft_type")
        raise LorakitError(
            f"resize: {folder} holds {kind}, whose ΔW is not the product of two factors in the file. With its base "
            "model: load it and use lorakit.resize."
        )
    cuts: dict[str, _Cut] = {}
    tensors = dict(bundle.tensors)
    for key in bundle.tensors:
        ending = next((ending for ending in _PAIRS if key.endswith(ending)), None)
        if ending is None:
            continue
        partner = key.removesuffix(ending) + _PAIRS[ending]
        path = key.removesuffix(ending).removeprefix("base_model.model.")
        A, B = tensors[key], tensors[partner]
        cut = _cut_pair(config, spec, path, B, A, rank, energy, own)
        tensors[key] = cut.A.reshape(cut.rank, *A.shape[1:]).to(A.dtype).contiguous()
        tensors[partner] = cut.B.reshape(B.shape[0], cut.rank, *B.shape[2:]).to(B.dtype).contiguous()
        cuts[path] = cut
    report = _report(cuts)
    _write(bundle, Path(output), tensors, report)
    return report


def _cut_pair(
    config: Mapping[str, Any],
    spec: Mapping[str, Any],
    path: str,
    B: Tensor,
    A: Tensor,
    rank: int | None,
    energy: float | None,
    own: bool,
) -> _Cut:
    full = A.shape[0]
    alpha = value_for(config.get("alpha_pattern") or {}, path)
    alpha = float(config.get("lora_alpha", full) if alpha is None else alpha)
    root = bool(config.get("use_rslora"))

    def scale(r: int) -> float:
        return alpha / (math.sqrt(r) if root else r)

    B, A = B.flatten(1).double(), A.flatten(1).double()
    if not own:
        return _cut(scale(full) * B, A, rank, energy)
    if spec.get("name") != "dylora" or rank is None:
        raise LorakitError(
            f"resize: own keeps the ranks that the method itself puts first, and needs rank; this folder's method is "
            f"{spec.get('name', 'lora')}. Without own the largest singular values are kept."
        )
    b = min(rank, full)
    chosen = scale(b) * B[:, :b], A[:b]
    return _Cut(*chosen, norm(scale(full) * B, A), distance(scale(full) * B, A, *chosen))


def _write(bundle: Bundle, output: Path, tensors: dict[str, Tensor], report: Resized) -> None:
    """The folder of a resized LoRA: PEFT's two files, and lorakit.json where there was one."""
    common = Counter(report.ranks.values()).most_common(1)[0][0]
    other = {f"^{re.escape(path)}": rank for path, rank in report.ranks.items() if rank != common}
    method = LoRA(rank=common, alpha=float(common))
    kept = {key: value for key, value in bundle.config.items() if key in COMMON}
    config = {
        **kept,
        **method.peft_config(),
        "rank_pattern": other,
        "alpha_pattern": {path: float(rank) for path, rank in other.items()},
    }
    own = dict(bundle.own)
    if own.get("targets", {}).get("parts"):
        own = {}  # parts of a fused layer are one pair in the file, and after the cut no longer apart: a plain LoRA of it
    if own:
        own["method"] = method.to_dict()
        patterns = {"rank_pattern": list(other.items()), "alpha_pattern": [(p, float(r)) for p, r in other.items()]}
        own["targets"] = {**own["targets"], **patterns}
        own["record"] = {**own.get("record", {}), "resized": {"from": str(bundle.folder), "error": report.error}}

    replace_folder(output.expanduser(), lambda fresh: write_bundle(fresh, config, tensors, own or None), CONTENT)
