"""Which base model an adapter was made for, told by a small sample of its weights.

An adapter on another base gives plausible nonsense, so the base is checked and not believed by name. The sample is a
few numbers of every adapted layer, kept to bfloat16's precision: the same model in float32, float16 or bfloat16 agrees,
a further fine-tuned one does not. A quantised base is told by the correlation of its sample.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorakit.adapter import Adapter
from lorakit.interchange import plain_names, unwrapped
from lorakit.storage import storage_of

SAMPLES = 512
"""Numbers kept in all."""


def _sample(tensor: Tensor, count: int) -> Tensor:
    flat = tensor.detach().reshape(-1)
    # whole numbers: a float has no exact place in a weight of more than 2²⁴ entries
    index = torch.arange(count, device=flat.device) * (flat.numel() - 1) // max(1, count - 1)
    return flat[index].float().cpu()


def _layers(adapter: Adapter) -> list[tuple[str, Tensor, bool]]:
    """`(name, weight, is it a plain float)` of every adapted matrix, or of every replaced tensor without any."""
    layers = []
    plain = plain_names(adapter.model)
    for path, site, _ in adapter.deltas():
        layer = adapter.layers[path]
        storage = storage_of(layer.base, site.weight, path)
        weight = layer.kept.get(site.weight)  # while another or this adapter is merged, the weight from before
        weight = storage.read(layer.base, site.weight) if weight is None else weight
        layers.append((f"{plain[path]}.{site.weight}", weight, storage.name == "float"))
    if not layers:
        for path, replacement in adapter.replacements():
            state = {**adapter.layers[path].base.state_dict(), **adapter.layers[path].kept}
            layers += [(f"{plain[path]}.{name}", state[name], True) for name in replacement.names]
    return layers


def fingerprint(adapter: Adapter) -> dict[str, Any]:
    """The fingerprint of the base under an adapter, as plain data."""
    layers = _layers(adapter)
    shapes = hashlib.sha256("\n".join(f"{name} {tuple(tensor.shape)}" for name, tensor, _ in layers).encode())
    chosen = layers[:: max(1, len(layers) // 64)]
    each = max(4, SAMPLES // max(1, len(chosen)))
    values = torch.cat([_sample(tensor, each) for _, tensor, _ in chosen]) if chosen else torch.zeros(0)
    return {
        "architecture": type(unwrapped(adapter.model)).__name__,
        "layers": len(layers),
        "shapes": shapes.hexdigest(),
        "sample": [round(value, 8) for value in values.to(torch.bfloat16).tolist()],
        "float": all(plain for _, _, plain in layers),
    }


def check(adapter: Adapter, expected: Mapping[str, Any] | None, path: Path, complain: Callable[[str], None]) -> None:
    """Compare the base under an adapter with the one its file names; complain where they differ."""
    if not expected:
        return
    found = fingerprint(adapter)
    if expected["shapes"] != found["shapes"]:
        complain(
            f"load: {path} was made for a {expected['architecture']} with {expected['layers']} adapted matrices of other "
            f"names or shapes than the {found['layers']} of this {found['architecture']}."
        )
        return
    wrong = disagreement(expected, found)
    if wrong:
        complain(f"load: {path} was made for another base model: {wrong} (here is a {found['architecture']}).")


def disagreement(one: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> str | None:
    """How two fingerprints differ, in words; empty where they are of one base, None where they cannot be compared."""
    if not one or not other or one["shapes"] != other["shapes"]:
        return None
    first, second = torch.tensor(one["sample"]), torch.tensor(other["sample"])
    if one.get("float", True) and other.get("float", True):
        # two roundings to bfloat16 differ by at most 2^-7 of the value; tiny numbers are compared absolutely
        differing = ((first - second).abs() > 2**-7 * first.abs() + 1e-6).float().mean().item()
        return f"{differing:.0%} of {len(first)} sampled weights differ" if differing > 0.02 else ""
    likeness = torch.nn.functional.cosine_similarity(first, second, dim=0).item()
    if likeness < 0.97:
        return f"the sampled weights agree to {likeness:.2f} only, where a quantised copy of the same model has at least 0.97"
    return ""
