"""What describes the files of one method: a row of the table in `formats/`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

Config = Mapping[str, Any]
"""The entries of an adapter_config.json."""

Tensors = Mapping[str, Tensor]
"""The tensors of a file by name."""


def nothing(*_: Any) -> dict[str, Any]:
    """No entries."""
    return {}


def _as_they_are(spec: Any, tensors: Tensors, *_: Any) -> Tensors:
    return tensors


@dataclass(frozen=True)
class Format:
    """How the files of one method look. Entries of plain options are not here: they follow from the options' declarations.

    A tensor is described as "name" or "name:axes", its name below its layer and how it is packed (`packing.py`).

    Attributes:
        peft: PEFT's name of the method; None where PEFT lacks it. Its files then call themselves by the method's own name.
        tensors: attribute of a delta or an edit -> its tensor; what the delta does not have is left out. Empty: every tensor
            that the module keeps, named after method and attribute (of an edit: after the attribute).
        kinds: the same for kinds of layers that have other names or shapes.
        fixed: entries that are written so for every adapter; what they say is no part of how a finished adapter acts.
        ignored: further entries of PEFT's of which that is true.
        refused: entry -> why an adapter that sets it cannot be read.
        also: PEFT's other types that are read as this method, which no longer differ from it once they are trained.
        claims: of rows with the same PEFT name, whether the configuration is of this one.
        read: options by name that the configuration says otherwise than by their declarations, or LorakitError.
        write: entries that say options otherwise than by their declarations.
        whole: entries that depend on the adapter as it is on its model; gets the adapter and (layer -> spec in the file).
        patterns: pattern entries as the rule of LoRA would have them, where PEFT's say it otherwise.
        from_file: a file's tensors under the names that are described here.
        to_file: what all edits of an adapter keep together, {(path, name): tensor}; None: each what is described here.
        check: raises LorakitError where PEFT's file would be another function on this model; gets the anatomy of an edit's.
        apart: whether each adapted layer has tensors of its own in a file; if not, the configuration says which layers are
            adapted.
        replaced: before the names of the tensors of a module that is trained whole.
        router: before the names of the router's tensors, where the method has one.
    """

    peft: str | None = None
    tensors: Mapping[str, str] = field(default_factory=dict)
    kinds: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    fixed: Config = field(default_factory=dict)
    ignored: frozenset[str] = frozenset()
    refused: Mapping[str, str] = field(default_factory=dict)
    also: frozenset[str] = frozenset()
    claims: Callable[[Config], bool] = lambda config: True
    read: Callable[[Config], dict[str, Any]] = nothing
    write: Callable[[Any], dict[str, Any]] = nothing
    whole: Callable[[Any, Mapping[str, Any]], dict[str, Any]] = nothing
    patterns: Callable[[Config], dict[str, Any]] = nothing
    from_file: Callable[[Any, Tensors, Config, Sequence[str]], Tensors] = _as_they_are
    to_file: Callable[[Mapping[Any, Any]], dict[tuple[str, str], Tensor]] | None = None
    check: Callable[[Any], object] = nothing
    apart: bool = True
    replaced: str = ""
    router: str = "router."
