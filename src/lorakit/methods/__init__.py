"""The method table: names for files and command lines. One method is one file and one row here."""

from __future__ import annotations

from lorakit.core.delta import Method
from lorakit.methods.adalora import AdaLoRA as AdaLoRA
from lorakit.methods.bdlora import BDLoRA as BDLoRA
from lorakit.methods.bitfit import BitFit as BitFit
from lorakit.methods.boft import BOFT as BOFT
from lorakit.methods.c3a import C3A as C3A
from lorakit.methods.dora import DoRA as DoRA
from lorakit.methods.dylora import DyLoRA as DyLoRA
from lorakit.methods.elalora import ElaLoRA as ElaLoRA
from lorakit.methods.fourierft import FourierFT as FourierFT
from lorakit.methods.full import Full as Full
from lorakit.methods.hira import HiRA as HiRA
from lorakit.methods.ia3 import IA3 as IA3
from lorakit.methods.loha import LoHa as LoHa
from lorakit.methods.lokr import LoKr as LoKr
from lorakit.methods.lora import LoRA as LoRA
from lorakit.methods.lorafa import LoRAFA as LoRAFA
from lorakit.methods.loraxs import LoRAXS as LoRAXS
from lorakit.methods.mora import MoRA as MoRA
from lorakit.methods.oft import OFT as OFT
from lorakit.methods.onelora import OneLoRA as OneLoRA
from lorakit.methods.randlora import RandLoRA as RandLoRA
from lorakit.methods.relora import ReLoRA as ReLoRA
from lorakit.methods.shira import SHiRA as SHiRA
from lorakit.methods.tiedlora import TiedLoRA as TiedLoRA
from lorakit.methods.tokens import TrainableTokens as TrainableTokens
from lorakit.methods.vblora import VBLoRA as VBLoRA
from lorakit.methods.vera import VeRA as VeRA

METHODS: dict[str, type[Method]] = {
    "lora": LoRA,
    "lora-fa": LoRAFA,
    "dora": DoRA,
    "bd-lora": BDLoRA,
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
    "trainable-tokens": TrainableTokens,
}
