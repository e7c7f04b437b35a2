"""What a format is: a pair of functions between what stands on disk and the neutral description, and what it says of itself."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from lorakit.conversion.content import Content
from lorakit.conversion.description import Description
from lorakit.conversion.names import Names
from lorakit.errors import LorakitError


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
        scale: where it keeps the scale.
        limits: what it cannot say, or what must be given to read or write it.
        claims: whether some content is of this format.
        read: its content by component -> the description; names of the base where the format's own are not enough.
        write: the description, in methods that it holds, -> its content by component, and the description with notes.
    """

    name: str
    title: str
    file: str
    suffix: str
    holds: tuple[str, ...]
    scale: str
    limits: str
    claims: Callable[[Content], bool]
    read: Callable[[Mapping[str, Content], Names], Description]
    write: Callable[[Description, Target], tuple[dict[str, Content], Description]]


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
            raise LorakitError(f"convert: {content.where} holds {key!r}, which is no tensor of this format.")
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


def check_lone(description: Description, title: str) -> None:
    """Refuse several components where a format is about one model."""
    if len(description.components) != 1:
        raise LorakitError(
            f"convert: {title} is about one model, and this adapter changes {', '.join(description.components)}."
        )
