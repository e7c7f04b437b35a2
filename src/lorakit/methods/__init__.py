"""The method table: names for files and command lines. One method is one file and one row here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

from lorakit.delta import Method
from lorakit.errors import LorakitError, unknown
from lorakit.methods.adalora import AdaLoRA
from lorakit.methods.bitfit import BitFit
from lorakit.methods.boft import BOFT
from lorakit.methods.c3a import C3A
from lorakit.methods.dora import DoRA
from lorakit.methods.dylora import DyLoRA
from lorakit.methods.elalora import ElaLoRA
from lorakit.methods.fourierft import FourierFT
from lorakit.methods.full import Full
from lorakit.methods.hira import HiRA
from lorakit.methods.ia3 import IA3
from lorakit.methods.loha import LoHa
from lorakit.methods.lokr import LoKr
from lorakit.methods.lora import LoRA
from lorakit.methods.lorafa import LoRAFA
from lorakit.methods.loraxs import LoRAXS
from lorakit.methods.mora import MoRA
from lorakit.methods.oft import OFT
from lorakit.methods.onelora import OneLoRA
from lorakit.methods.randlora import RandLoRA
from lorakit.methods.relora import ReLoRA
from lorakit.methods.shira import SHiRA
from lorakit.methods.tiedlora import TiedLoRA
from lorakit.methods.vblora import VBLoRA
from lorakit.methods.vera import VeRA

METHODS: dict[str, type[Method]] = {
    "lora": LoRA,
    "lora-fa": LoRAFA,
    "dora": DoRA,
    "adalora": AdaLoRA,
    "elalora": ElaLoRA,
    "dylora": DyLoRA,
    "relora": ReLoRA,
    "vera": VeRA,
    "vb-lora": VBLoRA,
    "lora-xs": LoRAXS,
    "tied-lora": TiedLoRA,
    "1lora": OneLoRA,
    "randlora": RandLoRA,
    "fourierft": FourierFT,
    "shira": SHiRA,
    "c3a": C3A,
    "mora": MoRA,
    "loha": LoHa,
    "lokr": LoKr,
    "oft": OFT,
    "boft": BOFT,
    "hira": HiRA,
    "ia3": IA3,
    "bitfit": BitFit,
    "full": Full,
}


def method_named(name: str) -> type[Method]:
    """The spec class of this name, or an error with the nearest one."""
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    return METHODS[name]


def method_for_peft(config: dict[str, Any]) -> type[Method]:
    """The spec class that reads files with this PEFT configuration."""
    for method in METHODS.values():
        if method.peft_type is not None and method.reads(config):
            return method
    known = [str(method.peft_type) for method in METHODS.values() if method.peft_type]
    raise unknown("PEFT type", str(config.get("peft_type")), dict.fromkeys(known))


def spec_from_dict(options: Mapping[str, Any], where: str | None = None) -> Method:
    """A spec from plain data, {"name": …, option: …}; the inverse of `Method.to_dict`.

    Unknown options are refused with the nearest known one; a combinator's inner method is a mapping of the same kind.
    """
    if "name" not in options:
        raise LorakitError(f"a method is given by its name and options; {dict(options)!r} has no name.")
    method = method_named(options["name"])
    known = [field.name for field in dataclasses.fields(cast(Any, method))]
    values = {}
    for key, value in options.items():
        if key == "name":
            continue
        if key not in known:
            raise unknown(f"option of {method.name}", key, known, where=where)
        values[key] = spec_from_dict(value, where) if isinstance(value, Mapping) and "name" in value else value
    return method(**values)


__all__ = [
    "BOFT",
    "C3A",
    "IA3",
    "METHODS",
    "OFT",
    "AdaLoRA",
    "BitFit",
    "DoRA",
    "DyLoRA",
    "ElaLoRA",
    "FourierFT",
    "Full",
    "HiRA",
    "LoHa",
    "LoKr",
    "LoRA",
    "LoRAFA",
    "LoRAXS",
    "MoRA",
    "OneLoRA",
    "RandLoRA",
    "ReLoRA",
    "SHiRA",
    "TiedLoRA",
    "VBLoRA",
    "VeRA",
    "method_for_peft",
    "method_named",
    "spec_from_dict",
]
