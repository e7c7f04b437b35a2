"""Quantising a float model as it is loaded: the formats by name, and what transformers is told.

    nf4, fp4       bitsandbytes: 4 bits in blocks of 64, scales in 8 bits too (4.127 bits a weight in all)
    int8           bitsandbytes: 8 bits, a scale per row
    torchao-int8   torchao: the same, the layer stays an nn.Linear
    hqq            HQQ: 8, 4, 3, 2 or 1 bits, scales and zero points per group
    q8_0, q4_0     llama.cpp's blocks of 32: 8.5 and 4.5 bits a weight; the server multiplies in them (no package needed)

Only linear layers are quantised; embeddings, norms and the output head stay as they are, and what `skip` names. Formats
that need data to be quantised (GPTQ, AWQ, AQLM) are read where a model comes in them, and not made here.
"""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, cast

import torch
from torch import nn

from lorakit.core.options import check, option
from lorakit.core.sites import adaptable_sites
from lorakit.core.storage import FLOAT, storage_of
from lorakit.core.storage.blocks import BlockLinear, fits
from lorakit.errors import LorakitError, plural, unknown

HEADS = ("lm_head", "embed_out", "score", "classifier", "qa_outputs")
"""What output heads are called: transformers leaves them alone by itself only where nothing else is to be skipped."""


@dataclass(frozen=True, kw_only=True)
class Quantisation(ABC):
    """How a float model is quantised when it is loaded."""

    name: ClassVar[str]
    library: ClassVar[str]
    skip: tuple[str, ...] = option(
        (), "linear layers to leave in floats, by parts of their names; the output head always is"
    )

    def __post_init__(self) -> None:
        check(self, f"quantize: {self.name}")

    def config(self, dtype: torch.dtype) -> Any:
        """The `quantization_config` of transformers' `from_pretrained`, for a model computed in `dtype`; None where the
        model is packed afterwards (`pack`)."""
        if importlib.util.find_spec(self.library) is None:
            raise LorakitError(
                f"quantize: {self.name} needs the package {self.library}, which is not installed: pip install {self.library}, "
                f"or use a format whose package is installed: {', '.join(available()) or 'none'}."
            )
        return self._config(dtype)

    @abstractmethod
    def _config(self, dtype: torch.dtype) -> Any: ...

    def pack(self, model: nn.Module, dtype: torch.dtype) -> None:  # noqa: B027 - transformers does it while it reads
        """Quantise the model that was read, where transformers does not."""

    def _skipped(self) -> list[str] | None:
        return [*self.skip, *HEADS] if self.skip else None


@dataclass(frozen=True, kw_only=True)
class NF4(Quantisation):
    """Sixteen values at the quantiles of a normal distribution."""

    name: ClassVar[str] = "nf4"
    library: ClassVar[str] = "bitsandbytes"
    double: bool = option(True, "quantise the blocks' scales too, to 8 bits")
    compute_dtype: Literal["auto", "bf16", "fp16", "fp32"] = option("auto", "dtype to multiply in; auto is the model's")

    def _config(self, dtype: torch.dtype) -> Any:
        from transformers import BitsAndBytesConfig

        asked = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
        made: Any = BitsAndBytesConfig
        return made(
            load_in_4bit=True,
            bnb_4bit_quant_type=self.name,
            bnb_4bit_use_double_quant=self.double,
            bnb_4bit_compute_dtype=asked.get(self.compute_dtype, dtype),
            llm_int8_skip_modules=self._skipped(),
        )


@dataclass(frozen=True, kw_only=True)
class FP4(NF4):
    """Sixteen values of a float with two bits of exponent and one of mantissa."""

    name: ClassVar[str] = "fp4"


@dataclass(frozen=True, kw_only=True)
class Int8(Quantisation):
    """Rows of signed 8-bit numbers."""

    name: ClassVar[str] = "int8"
    library: ClassVar[str] = "bitsandbytes"
    threshold: float = option(
        6.0, "inputs of a larger magnitude are multiplied in 16 bits; 0 makes no exception", minimum=0
    )

    def _config(self, dtype: torch.dtype) -> Any:
        from transformers import BitsAndBytesConfig

        made: Any = BitsAndBytesConfig
        return made(load_in_8bit=True, llm_int8_threshold=self.threshold, llm_int8_skip_modules=self._skipped())


@dataclass(frozen=True, kw_only=True)
class TorchAOInt8(Quantisation):
    """Rows of signed 8-bit numbers in torchao's tensor."""

    name: ClassVar[str] = "torchao-int8"
    library: ClassVar[str] = "torchao"

    def _config(self, dtype: torch.dtype) -> Any:
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        return TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=self._skipped())


@dataclass(frozen=True, kw_only=True)
class HalfQuadratic(Quantisation):
    """Groups with a scale and a zero point."""

    name: ClassVar[str] = "hqq"
    library: ClassVar[str] = "hqq"
    bits: int = option(
        4, "bits per number: 8, 4, 3, 2 or 1", allows=(8, 4, 3, 2, 1).__contains__, shown="8, 4, 3, 2 or 1"
    )
    group_size: int = option(64, "numbers that share a scale", minimum=1)

    def _config(self, dtype: torch.dtype) -> None:
        """None: the model is packed afterwards."""

    def pack(self, model: nn.Module, dtype: torch.dtype) -> None:
        # transformers 5.23 neither quantises nor reads HQQ; the library does it, layer by layer.
        from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

        for path, layer in list(model.named_modules()):
            left = any(part in path for part in (*self.skip, *HEADS))
            if type(layer) is nn.Linear and not left and layer.weight.numel() % self.group_size == 0:
                config = BaseQuantizeConfig(nbits=self.bits, group_size=self.group_size)
                made = HQQLinear(layer, config, compute_dtype=dtype, device=str(layer.weight.device))
                model.set_submodule(path, made)


@dataclass(frozen=True, kw_only=True)
class Q8(Quantisation):
    """Blocks of 32 signed bytes with a scale."""

    name: ClassVar[str] = "q8_0"
    library: ClassVar[str] = "torch"
    head: bool = option(False, "lay the output head in q8_0 blocks too, as a server does")

    def _config(self, dtype: torch.dtype) -> None:
        """None: the model is packed afterwards."""

    def pack(self, model: nn.Module, dtype: torch.dtype) -> None:
        for path, layer in list(model.named_modules()):
            head = any(part in path for part in HEADS)
            if type(layer) is nn.Linear and not any(part in path for part in self.skip) and (self.head or not head):
                in_blocks(model, path, "q8_0" if head else self.name)


@dataclass(frozen=True, kw_only=True)
class Q4(Q8):
    """Blocks of 32 four-bit numbers with a scale."""

    name: ClassVar[str] = "q4_0"


def in_blocks(model: nn.Module, path: str, kind: str) -> bool:
    """Lay the weight of a linear layer in blocks; False, and nothing done, where its rows are no multiple of 32."""
    layer = cast(nn.Linear, model.get_submodule(path))
    if fits(layer.in_features):
        model.set_submodule(path, BlockLinear(layer.weight, layer.bias, kind))
    return fits(layer.in_features)


FORMATS: dict[str, type[Quantisation]] = {cls.name: cls for cls in (NF4, FP4, Int8, TorchAOInt8, HalfQuadratic, Q8, Q4)}
"""Formats by name."""


def available() -> list[str]:
    """The formats whose package is installed."""
    return [name for name, cls in FORMATS.items() if importlib.util.find_spec(cls.library) is not None]


def quantisation(given: str | Quantisation | None) -> Quantisation | None:
    """A format from its name; LorakitError for a name that is none."""
    if given is None or isinstance(given, Quantisation):
        return given
    if given not in FORMATS:
        raise unknown("quantisation", given, FORMATS)
    return FORMATS[given]()


def for_serving(name: str | None) -> Quantisation | None:
    """A format from its name, the output head quantised too where the server multiplies in it: an answer reads the head for
    every token."""
    found = quantisation(name)
    return replace(found, head=True) if isinstance(found, Q8) else found


# -- what is held how ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Holding:
    """What a model's numbers are and what they take.

    Attributes:
        numbers: weights and biases, packed ones counted as what they stand for.
        nbytes: bytes of all of them, scales included.
        packed: format -> how many layers hold their weight in it.
    """

    numbers: int
    nbytes: int
    packed: dict[str, int]

    def words(self) -> str:
        """The packed layers for people: "210 layers in nf4"; empty where all are floats."""
        return ", ".join(f"{plural(count, 'layer')} in {label}" for label, count in self.packed.items())


def holding(model: nn.Module) -> Holding:
    """How a model holds its numbers; a tensor that several layers share counts once."""
    numbers = nbytes = 0
    packed: dict[str, int] = {}
    seen: set[int] = set()
    for module in model.modules():
        skip = set()
        for site in adaptable_sites(module):
            if "." in site.weight:
                continue
            storage = storage_of(module, site.weight)
            if storage is FLOAT:
                continue
            label = storage.label(module, site.weight)
            packed[label] = packed.get(label, 0) + 1
            numbers += site.layout.shape.out * site.layout.shape.in_
            nbytes += storage.nbytes(module, site.weight)
            skip = {name for name, tensor in module.named_parameters(recurse=False) if name != site.bias}
        for name, parameter in module.named_parameters(recurse=False):
            if name not in skip and id(parameter) not in seen:
                seen.add(id(parameter))
                numbers += parameter.numel()
                nbytes += parameter.numel() * parameter.element_size()
    return Holding(numbers, nbytes, packed)


def existing(config: Any) -> str | None:
    """The method by which a checkpoint says that it is quantised already; None where it is not."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
    return str(getattr(method, "value", method))


def as_config(plain: dict[str, Any]) -> Any:
    """transformers' configuration object from the plain data that an adapter's file keeps of it."""
    from transformers.quantizers.auto import AutoQuantizationConfig

    return AutoQuantizationConfig.from_dict(dict(plain))
