"""Which device a run computes on."""

from __future__ import annotations

import os

import torch

from lorakit.errors import LorakitError, plural


def resolve_device(asked: str) -> torch.device:
    """The device of a name: auto (CUDA where there is one, then Apple's MPS, else the CPU), cpu, cuda, cuda:1 or mps.

    Raises:
        LorakitError: it is no device, or not there; with the devices that are.
    """
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    has_mps = torch.backends.mps.is_available()
    if (
        asked in ("auto", "cuda") and cards and "LOCAL_RANK" in os.environ
    ):  # one process of several: the card of its number
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]) % cards)
    if asked == "auto":
        return torch.device("cuda" if cards else "mps" if has_mps else "cpu")
    found = ["cpu", *(f"cuda:{number}" for number in range(cards)), *["mps"] * has_mps]
    listed = f"found {', '.join(found)}; auto chooses among them"
    try:
        device = torch.device(asked)
    except RuntimeError:
        raise LorakitError(
            f'train.device: "{asked}" is no device; expected auto, cpu, cuda, cuda:1 or mps; {listed}'
        ) from None
    if f"{device.type}:{device.index or 0}" not in [name if ":" in name else f"{name}:0" for name in found]:
        why = ""
        if device.type == "cuda":
            built = torch.version.cuda is None and torch.version.hip is None
            why = f" ({plural(cards, 'CUDA device')} here" + (
                "; this torch is built for the CPU alone)" if built else ")"
            )
        raise LorakitError(f'train.device: "{asked}" is not there{why}; {listed}')
    return device
