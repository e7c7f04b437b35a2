"""What a format is: a pair of functions between what stands on disk and the neutral description, and what it says of itself."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from lorakit.conversion.content import Content, write_file
from lorakit.conversion.description import Description, Layer
from lorakit.conversion.experts import unsplit
from lorakit.conversion.names import COMPONENTS, Names
from lorakit.errors import LorakitError
from lorakit.methods import DoRA

_MERGE = " Merge the adapter into its base (lorakit merge); PEFT's format, mlx and gguf have names for experts."
LINEAR, CONVOLUTION, EMBEDDING = "linear", "convolution", "embedding"


@dataclass(frozen=True)
class Target:
    """What is asked of a writer.

    Attributes:
        names: the base, where it was named.
        base: the base's name for the file.
    """

    names: Names
    base: str | None = None


@dataclass(frozen=True)
class Format:
    """One format.

    Attributes:
        name: on the command line.
        title: for people.
        file: what it is on disk.
        suffix: of its file; "" where it is a folder.
        holds: methods that it has a place for.
        kinds: kinds of layers that it has a place for.
        about: "one" model by itself, "parts" of a pipeline, or "any" of both.
        scale: where it keeps the scale.
        limits: what it cannot say, or what must be given to read or write it.
        claims: whether some content is of this format.
        read: its content by component -> the description; names of the base where the format's own are not enough.
        write: the description, of what it holds, -> its content by component, and the description with notes.
        save: puts the content in its place.
    """

    name: str
    title: str
    file: str
    suffix: str
    holds: tuple[str, ...]
    kinds: tuple[str, ...]
    about: Literal["one", "parts", "any"]
    scale: str
    limits: str
    claims: Callable[[Content], bool]
    read: Callable[[Mapping[str, Content], Names], Description]
    write: Callable[[Description, Target], tuple[dict[str, Content], Description]]
    save: Callable[[Path, Mapping[str, Content]], None] = write_file

    def check(self, description: Description) -> None:
        """Refuse models and kinds of layers for which the format has no place."""
        components = list(description.components)
        if self.about == "one" and len(components) != 1:
            raise LorakitError(
                f"convert: {self.name} is for one model, and this adapter changes {', '.join(components)}."
            )
        if self.about == "parts" and not set(components) <= set(COMPONENTS):
            raise LorakitError(
                f"convert: {self.name} is for parts of a diffusion pipeline ({', '.join(COMPONENTS)}), and this "
                "adapter's model is none. Say which part it is (--component), or convert to lycoris."
            )
        for _, path, layer in description.layers():
            if unsplit(path):
                raise LorakitError(
                    f"convert: {path} is an expert's matrix as one model holds it, and {self.name} has gate, up and down apart "
                    "or no names for experts. With --base (a folder with config.json, or a name on the hub) a LoRA can be "
                    "taken apart; else merge the adapter into its base (lorakit merge)."
                )
            if layer.layout.kind not in self.kinds:
                raise LorakitError(
                    f"convert: {path} is a layer of kind {layer.layout.kind}, for which {self.name} has no place; it holds "
                    f"{', '.join(self.kinds)}.{_MERGE if layer.layout.kind == 'expert' else ''}"
                )


_OTHERS = {
    r"\.[ab][12]\.weight$": "it is GLoRA's, which no other tool's files have",
    r"\.on_input$": "it is LyCORIS' (IA)³, whose scales have no other form",
    r"\.oft_(blocks|diag)$|\.boft": "it is a rotation (OFT, BOFT) in LyCORIS' form, which is not PEFT's",
    r"\.[wb]_norm$|norm\w*\.diff(_b)?$": "it is a change of a norm, and no matrix",
    r"^(bundle_)?emb|string_to_param": "it is a token's embedding (pivotal tuning), which is no change of a layer",
}
"""Tensors that other tools write and that are not converted: what a name matches -> what it is."""


def grouped(content: Content, cut: Callable[[str], tuple[str, str] | None]) -> dict[str, dict[str, Tensor]]:
    """The tensors of a file by layer: name -> word -> tensor.

    Args:
        content: the file.
        cut: a tensor's name -> (layer's name in the file, word), None where it is none of the format's.

    Raises:
        LorakitError: a name is none of the format's, or one layer has a word twice.
    """
    layers: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in content.tensors.items():
        found = cut(key)
        if found is None:
            what = next((f": {word}" for end, word in _OTHERS.items() if re.search(end, key)), "")
            raise LorakitError(f"convert: {content.where} holds {key!r}, which is no tensor of this format{what}.")
        name, word = found
        if word in layers[name]:
            raise LorakitError(f"convert: {content.where} holds {word} of {name} twice, the second as {key!r}.")
        layers[name][word] = tensor
    if not layers:
        raise LorakitError(f"convert: {content.where} holds no tensors.")
    return dict(layers)


def ending(key: str, words: Mapping[str, str]) -> tuple[str, str] | None:
    """A tensor's name taken apart at the longest of these endings: (layer, our word for the ending)."""
    for end in sorted(words, key=len, reverse=True):
        if key.endswith("." + end):
            return key[: -len(end) - 1], words[end]
    return None


def only(contents: Mapping[str, Content], title: str) -> Content:
    """The one file of a format that is one file."""
    if len(contents) != 1:
        raise LorakitError(f"convert: {title} is one file; {', '.join(contents)} were found.")
    return next(iter(contents.values()))


def all_dora(layers: Iterable[Layer], title: str) -> bool:
    """Whether the layers have DoRA's magnitudes, for a format in which all have them or none."""
    (found, *more) = {isinstance(layer.method, DoRA) for layer in layers}
    if more:
        raise LorakitError(f"convert: some layers have DoRA's magnitudes and others not; {title} has one kind for all.")
    return found
