"""The method table: names for files and command lines. One method is one file and one row here."""

from __future__ import annotations

from lorakit.core.delta import Method
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
]
