"""Adapters from and to other tools' formats: kohya, LyCORIS, Diffusers, loralib, GGUF, MLX, PEFT.

Every format is one file here and a row of `FORMATS`: a pair of functions to and from one neutral description
(`description.py`), so that any converts to any. No base weight is read: a base gives names and shapes (`names.py`), where a
format's own names are not enough, and tells a wrong base. What a target cannot say is folded exactly and said, or refused by
name, before anything is written.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from lorakit.conversion.content import Content, read_source
from lorakit.conversion.description import Description, fitted
from lorakit.conversion.diffusers import DIFFUSERS
from lorakit.conversion.format import Format, Target
from lorakit.conversion.gguf import GGUF
from lorakit.conversion.kohya import KOHYA
from lorakit.conversion.loralib import ALPHA, LORALIB
from lorakit.conversion.lycoris import LYCORIS
from lorakit.conversion.mlx import MLX
from lorakit.conversion.names import COMPONENTS, Names, names_of
from lorakit.conversion.peft import PEFT
from lorakit.conversion.underscores import original
from lorakit.errors import LorakitError, unknown
from lorakit.files.bundle import CONFIG
from lorakit.files.interchange import PREFIX
from lorakit.files.prompt import TEMPLATE, Prompt, read_prompt

log = logging.getLogger("lorakit")

CHAT_TEMPLATE = "tokenizer.chat_template"
"""The key of a chat template in a GGUF file."""

FORMATS: dict[str, Format] = {one.name: one for one in (PEFT, KOHYA, LYCORIS, DIFFUSERS, LORALIB, GGUF, MLX)}
"""The formats by name; a file is of the first that claims it."""


@dataclass(frozen=True)
class Converted:
    """What a conversion did.

    Attributes:
        output: the file or folder; None where nothing was to be written.
        source: the format that was read.
        target: the format that was written.
        description: the adapter as the target has it.
        notes: what was folded, filled up or left out, and what the target does not keep, in sentences.
    """

    output: Path | None
    source: str
    target: str
    description: Description
    notes: tuple[str, ...]


def convert(
    source: str | Path,
    output: str | Path | None,
    to: str,
    *,
    origin: str | None = None,
    base: nn.Module | Mapping[str, nn.Module] | Iterable[str] | str | Path | None = None,
    alpha: float | None = None,
    component: str | None = None,
    tell: Callable[[str], None] | None = None,
) -> Converted:
    """Write an adapter in another tool's format; nothing is written where anything is refused.

    Args:
        source: a file (.safetensors, .gguf) or a folder.
        output: the file or folder to write; None: only say what would be done.
        to: the target's format, a name of `FORMATS`.
        origin: the source's format; found from the file itself by default.
        base: the base model, for names that cannot be turned back without it, for a check of the shapes, and for GGUF: a
            model, {component: model}, layer names, a folder (its configuration is enough), a GGUF file, a name on the hub.
        alpha: the scale's numerator, for a source whose file does not say it (loralib).
        component: which part of a pipeline an adapter of one model is ("unet", "text_encoder", …), where its layers' names do
            not tell.
        tell: called with every note, before anything is written; by default they are logged.

    Raises:
        LorakitError: the source is damaged, unknown or mixed up; the base is another; the target has no place for something.
    """
    target = _named(to)
    place = _place(source, output, target) if output is not None else None
    names = names_of(base)
    contents = read_source(source)
    found = _format_of(contents, origin)
    if found is target:
        raise LorakitError(f"convert: {source} is in {to}'s format already.")
    if alpha is not None:
        contents = _with_alpha(contents, found, alpha)
    description = names.checked(_as_component(found.read(contents, names), component))
    if target is GGUF and not names.config and description.base:
        names = names_of(description.base)
        description = names.checked(description)
    described = fitted(description, target.holds, target.title)
    target.check(described)
    written, said = target.write(described, Target(names, names.name or description.base))
    prompt = read_prompt(source) if Path(source).expanduser().is_dir() else _gguf_prompt(contents, found)
    if prompt is not None and prompt.template is not None:
        said = said.noting(_with_prompt(prompt, target, written))
    for note in said.notes:
        tell(note) if tell is not None else log.info("convert: %s", note)
    if place is not None:
        target.save(place, written)
        if target is PEFT and prompt is not None:
            prompt.write(place)
    return Converted(place, found.name, to, said, said.notes)


def _gguf_prompt(contents: Mapping[str, Content], found: Format) -> Prompt | None:
    """The chat template that a GGUF file holds."""
    template = next(iter(contents.values())).metadata.get(CHAT_TEMPLATE) if found is GGUF else None
    return Prompt(str(template)) if template else None


def _with_prompt(prompt: Prompt, target: Format, written: Mapping[str, Content]) -> str:
    """What becomes of the adapter's chat template, in words; a GGUF file gets it."""
    if target is PEFT:
        return f"the chat template is written beside it ({TEMPLATE})"
    if target is GGUF:
        written[""].metadata[CHAT_TEMPLATE] = str(prompt.template)
        return (
            f"the chat template is kept in the file ({CHAT_TEMPLATE}); llama.cpp uses its base model's, unless it is given the "
            f"adapter's: --jinja --chat-template-file {TEMPLATE}"
        )
    return f"{target.name} has no place for the chat template of {prompt.place}; whoever asks the adapter needs it"


def _place(source: str | Path, output: str | Path, target: Format) -> Path:
    """Where the target goes: a file of its suffix, or a folder."""
    path = Path(output).expanduser()
    if target is DIFFUSERS and path.suffix != target.suffix:
        path = path / target.file
    if path.resolve() == Path(source).expanduser().resolve():
        raise LorakitError(f"convert: {output} is the source itself; choose another output.")
    if target.suffix and path.suffix != target.suffix:
        raise LorakitError(f"convert: {target.name} is {target.file}, and the output is {output}; give it that ending.")
    if not target.suffix and path.is_file():
        raise LorakitError(f"convert: {target.name} is a {target.file}, and {output} is a file.")
    return path


def _named(name: str) -> Format:
    if name not in FORMATS:
        raise unknown("format", name, FORMATS)
    return FORMATS[name]


def _format_of(contents: Mapping[str, Content], origin: str | None) -> Format:
    if origin is not None:
        return _named(origin)
    content = next(iter(contents.values()))
    for format in FORMATS.values():
        if all(format.claims(one) for one in contents.values()):
            return format
    keys = sorted(content.tensors)
    example = ", ".join(keys[:3]) or "no tensors"
    hint = next((told for key in keys if (told := original(key))), "")
    if any(key.startswith(PREFIX) for key in keys):
        hint = f" These are the tensors of a PEFT folder, whose {CONFIG} says their scale; name the folder that holds both."
    raise LorakitError(
        f"convert: {content.where} has no known format ({', '.join(FORMATS)}); it holds {example}.{hint}"
    )


def _with_alpha(contents: Mapping[str, Content], found: Format, alpha: float) -> dict[str, Content]:
    if found is not LORALIB:
        raise LorakitError(f"convert: alpha was given, and {found.name}'s format says its scale itself: {found.scale}.")
    return {
        name: replace(content, metadata={**content.metadata, ALPHA: repr(float(alpha))})
        for name, content in contents.items()
    }


def _as_component(description: Description, component: str | None) -> Description:
    """The description with its one model taken for a part of a pipeline."""
    if component is None:
        return description
    if component not in COMPONENTS:
        raise unknown("component", component, COMPONENTS)
    if len(description.components) != 1:
        raise LorakitError(
            f"convert: component={component!r} was given for an adapter that has {', '.join(description.components)} already."
        )
    return replace(description, components={component: next(iter(description.components.values()))})


__all__ = ["FORMATS", "Converted", "Description", "Format", "Names", "convert", "names_of"]
