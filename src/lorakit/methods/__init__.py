"""The method table: names for files and command lines. One method is one file and one row here."""

from __future__ import annotations

from lorakit.delta import Method
from lorakit.errors import unknown
from lorakit.methods.lora import LoRA

METHODS: dict[str, type[Method]] = {
    "lora": LoRA,
}


def method_named(name: str) -> type[Method]:
    """The spec class of this name, or an error with the nearest one."""
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    return METHODS[name]


def method_for_peft(peft_type: str) -> type[Method]:
    """The spec class that reads files of this PEFT type."""
    for method in METHODS.values():
        if method.peft_type == peft_type:
            return method
    known = [str(method.peft_type) for method in METHODS.values() if method.peft_type]
    raise unknown("PEFT type", peft_type, dict.fromkeys(known))


__all__ = ["METHODS", "LoRA", "method_for_peft", "method_named"]
