"""The method table: names for files and command lines. One method is one file and one row here."""

from __future__ import annotations

from lorakit.core.delta import Method
from lorakit.methods.adalora import AdaLoRA as AdaLoRA
from lorakit.methods.bdlora import BDLoRA as BDLoRA
from lorakit.methods.bitfit import BitFit as BitFit
from lorakit.methods.boft import BOFT as BOFT
from lorakit.methods.c3a import C3A as C3A
from lorakit.methods.deft import DEFT as DEFT
from lorakit.methods.delora import DeLoRA as DeLoRA
from lorakit.methods.dora import DoRA as DoRA
from lorakit.methods.dylora import DyLoRA as DyLoRA
from lorakit.methods.elalora import ElaLoRA as ElaLoRA
from lorakit.methods.fourierft import FourierFT as FourierFT
from lorakit.methods.full import Full as Full
from lorakit.methods.glora import GLoRA as GLoRA
from lorakit.methods.gralora import GraLoRA as GraLoRA
from lorakit.methods.hira import HiRA as HiRA
from lorakit.methods.hra import HRA as HRA
from lorakit.methods.ia3 import IA3 as IA3
from lorakit.methods.lntuning import LNTuning as LNTuning
from lorakit.methods.loha import LoHa as LoHa
from lorakit.methods.lokr import LoKr as LoKr
from lorakit.methods.lora import LoRA as LoRA
from lorakit.methods.lorafa import LoRAFA as LoRAFA
from lorakit.methods.loraxs import LoRAXS as LoRAXS
from lorakit.methods.miss import MiSS as MiSS
from lorakit.methods.mora import MoRA as MoRA
from lorakit.methods.oft import OFT as OFT
from lorakit.methods.onelora import OneLoRA as OneLoRA
from lorakit.methods.osf import OSF as OSF
from lorakit.methods.peanut import PEANuT as PEANuT
from lorakit.methods.psoft import PSOFT as PSOFT
from lorakit.methods.pvera import PVeRA as PVeRA
from lorakit.methods.randlora import RandLoRA as RandLoRA
from lorakit.methods.relora import ReLoRA as ReLoRA
from lorakit.methods.road import RoAd as RoAd
from lorakit.methods.shira import SHiRA as SHiRA
from lorakit.methods.supertuning import SuperTuning as SuperTuning
from lorakit.methods.tiedlora import TiedLoRA as TiedLoRA
from lorakit.methods.tinylora import TinyLoRA as TinyLoRA
from lorakit.methods.tokens import TrainableTokens as TrainableTokens
from lorakit.methods.unilora import UniLoRA as UniLoRA
from lorakit.methods.vblora import VBLoRA as VBLoRA
from lorakit.methods.vera import VeRA as VeRA
from lorakit.methods.waveft import WaveFT as WaveFT

WHOLE: dict[str, type[Method]] = {"ln-tuning": LNTuning}
"""Methods that change no matrix: the modules that they are given train whole."""

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
    "miss": MiSS,
    "delora": DeLoRA,
    "gralora": GraLoRA,
    "hra": HRA,
    "road": RoAd,
    "supertuning": SuperTuning,
    "pvera": PVeRA,
    "waveft": WaveFT,
    "osf": OSF,
    "psoft": PSOFT,
    "peanut": PEANuT,
    "deft": DEFT,
    "tinylora": TinyLoRA,
    "unilora": UniLoRA,
    "glora": GLoRA,
    "bitfit": BitFit,
    "full": Full,
    "trainable-tokens": TrainableTokens,
}
