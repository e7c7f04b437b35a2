"""How a conversation becomes the tokens that an adapter reads: as much a part of it as its matrices.

    chat_template.jinja   a complete chat template: default system message and template arguments are written into it, and a
                          text template is written as one, so that whoever reads the file needs nothing else
    lorakit.json          under "prompt": the tokens that end an answer, whether the tokenizer puts its first tokens (a BOS)
                          before the text, and what the training was given (data.template, data.system, ...)
    tokenizer files       where the adapter brings a tokenizer of its own (added tokens)

transformers, vLLM and PEFT's users look for the first and the last. A folder by another program is read the same way, with
what it has of them. Training, generation, evaluation, merging and serving all make their token ids here.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import logging
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorakit.errors import LorakitError, first_line
from lorakit.files.folder import Stamp, stamp_of
from lorakit.reading import read_json

log = logging.getLogger("lorakit")

TEMPLATE = "chat_template.jinja"
CONFIG, OWN = "tokenizer_config.json", "lorakit.json"
TOKENIZER = (
    "tokenizer.json", CONFIG, "special_tokens_map.json", "added_tokens.json", "tokenizer.model", "vocab.json",
    "merges.txt", "vocab.txt", "spiece.model",
)  # fmt: skip
"""What transformers writes of a tokenizer."""
PROMPT = (TEMPLATE, *TOKENIZER)
_LONGEST = 2**20
"""Characters of a chat template at most; real ones have some ten thousand."""


@dataclass(frozen=True)
class Prompt:
    """The form in which a model is asked.

    Attributes:
        template: a complete Jinja chat template; None: the texts as they are, a line each.
        stop: the tokens that end an answer besides the model's own, as text.
        opens: the tokenizer's first tokens (a BOS) are put before the text instead of being read from it; they differ only
            for tokenizers that treat the beginning of a text in a way of its own.
        given: what the training was given, as plain data: "template", "system", "arguments", and the "date" that the template
            writes where it would write that of the day.
        tokenizer: the folder whose tokenizer belongs to it; None: the base's.
        place: where it was found, in words.
    """

    template: str | None
    stop: tuple[str, ...] = ()
    opens: bool = False
    given: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: Path | None = field(default=None, compare=False)
    place: str = field(default="the base model's chat template", compare=False)

    def data(self) -> dict[str, Any]:
        """What lorakit.json keeps of it."""
        return {"stop": list(self.stop), "opens": self.opens, "given": dict(self.given)}

    def same_form(self, other: Prompt) -> bool:
        """Whether both make the same token ids of every conversation."""
        return (self.template, self.opens, self.tokenizer) == (other.template, other.opens, other.tokenizer)

    def write(self, folder: Path) -> None:
        """Put its files into a folder; `data` goes into lorakit.json."""
        if self.template is not None:
            (folder / TEMPLATE).write_bytes(self.template.encode())
        for name in TOKENIZER if self.tokenizer is not None else ():
            if (self.tokenizer / name).is_file():  # type: ignore[operator]
                shutil.copyfile(self.tokenizer / name, folder / name)  # type: ignore[operator]


def read_prompt(folder: str | Path) -> Prompt | None:
    """The prompt that an adapter's folder brings; None where it says nothing.

    Raises:
        LorakitError: a file of it cannot be read.
    """
    folder = Path(folder)
    own, config = (read_json(folder / name, "load") if (folder / name).is_file() else {} for name in (OWN, CONFIG))
    try:
        written = (folder / TEMPLATE).read_bytes().decode("utf-8") if (folder / TEMPLATE).is_file() else None
    except (OSError, ValueError) as problem:
        raise LorakitError(f"load: the prompt of {folder} cannot be read ({first_line(problem)}).") from problem
    kept = own.get("prompt")
    found = kept if isinstance(kept, Mapping) else {}
    template = written if written is not None else _named(config.get("chat_template"))
    if template is not None and len(template) > _LONGEST:
        raise LorakitError(
            f"load: the chat template of {folder} has {len(template):,} characters; {_LONGEST:,} at most."
        )
    has_tokenizer = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))
    tokenizer = folder if config and has_tokenizer else None
    if template is None and tokenizer is None and not found:
        return None
    stop = found.get("stop") or ()
    if not found and tokenizer is not None:
        stop = [end] if isinstance(end := _content(config.get("eos_token")), str) else ()
    given = found.get("given") or {}
    place = f"the chat template of {folder}" if template is not None else f"the prompt of {folder}"
    return Prompt(template, tuple(map(str, stop)), bool(found.get("opens")), dict(given), tokenizer, place)


def _named(templates: Any) -> str | None:
    """The chat template of a tokenizer's configuration: a text, or the default one of a list of named ones."""
    if isinstance(templates, list):
        templates = {one.get("name"): one.get("template") for one in templates if isinstance(one, Mapping)}
    if isinstance(templates, Mapping):
        templates = templates.get("default")
    return templates if isinstance(templates, str) else None


def _content(token: Any) -> Any:
    return token.get("content") if isinstance(token, Mapping) else token


def common_prompt(prompts: Iterable[Prompt | None]) -> Prompt | None:
    """The one prompt of several adapters; None, and said, where they differ."""
    found: list[Prompt] = []
    for one in prompts:
        if one is not None and one not in found:
            found.append(one)
    if len(found) > 1:
        log.warning(
            "the adapters are prompted in different ways (%s); the result keeps no prompt, and the base model's is used",
            ", ".join(one.place for one in found),
        )
    return found[0] if len(found) == 1 else None


# -- templates ---------------------------------------------------------------------------------------------------------------


def literal(value: Any) -> str:
    """A plain value as Jinja writes it."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{literal(str(key))}: {literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(literal, value)) + "]"
    # Characters stand for themselves: Jinja does not put the halves of an escaped pair together.
    return "none" if value is None else json.dumps(value, ensure_ascii=False)


_TODAY = re.compile(r"""\bstrftime_now\(\s*(?:format\s*=\s*)?(["'])(.*?)\1\s*\)""")
"""Where a chat template writes the time at which it is asked."""


def writes_date(template: str | None) -> bool:
    """Whether a chat template writes the date on which it is used."""
    return template is not None and "strftime_now(" in template


def at_date(template: str, date: datetime.date) -> str:
    """A chat template that writes this date, whenever it is used: else the model would be asked otherwise every day.

    Raises:
        LorakitError: how it writes the date is decided while it runs.
    """
    fixed = _TODAY.sub(
        lambda found: literal(datetime.datetime.combine(date, datetime.time()).strftime(found[2])), template
    )
    if writes_date(fixed):
        raise LorakitError(
            "data.template: the chat template calls strftime_now with a format that is no plain text, so that the date cannot "
            "be fixed, and the model would be asked otherwise every day. Give a data.template that writes it by "
            'strftime_now("%d %b %Y"), or none.'
        )
    return fixed


def complete(template: str, system: str | None, arguments: Mapping[str, Any]) -> str:
    """A chat template with its arguments and the system message of conversations that have none written into it."""
    lines = [
        f"{{%- if {name} is not defined %}}{{%- set {name} = {literal(value)} %}}{{%- endif %}}"
        for name, value in arguments.items()
    ]
    if system is not None:
        first = literal([{"role": "system", "content": system}])
        lines.append(
            "{%- if messages and messages[0]['role'] not in ['system', 'developer'] %}"
            f"{{%- set messages = {first} + messages %}}{{%- endif %}}"
        )
    return "".join(f"{line}\n" for line in lines) + template  # the line break after a block is not written


def as_chat(pieces: Sequence[str], names: Sequence[str], system: str | None, opening: str, ending: str) -> str:
    """A text template as a chat template. A user's turn fills the first place (but for {system}); a message may bring further
    ones under their names, which are empty else.

    Args:
        pieces: the text before each place and after the last; one more than `names`.
        names: the places in order, the answer last.
        system: what {system} is where the conversation does not say.
        opening: what is written before everything (a BOS).
        ending: what follows an answer, beyond the template's own last piece.
    """
    main = next((name for name in names[:-1] if name != "system"), None)
    parts = []
    for piece, name in zip(pieces, names, strict=False):
        parts.append(literal(piece))
        if name == "system":
            parts.append("told.system")
        elif name == main:
            parts.append("text")
        elif name != names[-1]:
            parts.append(f"(message[{literal(name)}] or '')")
    asked = " ~ ".join(parts)
    return (
        f"{{%- set told = namespace(system={literal(system or '')}) -%}}{{{{- {literal(opening)} -}}}}"
        "{%- for message in messages -%}"
        "{%- set text = message['content'] if message['content'] is string else "
        "(message['content'] or []) | map(attribute='text') | join -%}"
        "{%- if message['role'] in ['system', 'developer'] -%}{%- set told.system = text -%}"
        f"{{%- elif message['role'] == 'assistant' -%}}{{{{- text ~ {literal(pieces[-1] + ending)} -}}}}"
        f"{{%- else -%}}{{{{- {asked} -}}}}{{%- endif -%}}{{%- endfor -%}}"
    )


def tuned_prompt(base: Path, tuned: Path) -> Prompt | None:
    """How a fine-tuned model is asked, where that is not how its base is: chat template, tokens that end an answer, tokenizer.
    None where nothing differs, or a folder has no tokenizer."""
    import transformers

    found = []
    for folder in (base, tuned):
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder))
            settings = folder / "generation_config.json"
            ends = read_json(settings, "load").get("eos_token_id") if settings.is_file() else None
        except (LorakitError, OSError, ValueError) as problem:
            log.warning("the tokenizer of %s cannot be read (%s), so no prompt is kept", folder, first_line(problem))
            return None
        ends = ends if isinstance(ends, list) else [ends]
        found.append((tokenizer, {*tokenizer.convert_ids_to_tokens([*end_ids(tokenizer), *filter(_is_id, ends)])}))
    (before, stops), (after, others) = found
    own = before.get_vocab() != after.get_vocab()
    if before.chat_template == after.chat_template and not own and others <= stops:
        return None
    template = after.get_chat_template() if after.chat_template else None
    place = f"the chat template of {tuned}" if template else f"the tokenizer of {tuned}"
    return Prompt(template, tuple(sorted(others - stops)), tokenizer=tuned if own else None, place=place)


def _is_id(value: Any) -> bool:
    return isinstance(value, int)


# -- tokens ------------------------------------------------------------------------------------------------------------------


def opening_of(tokenizer: Any) -> list[int]:
    """The tokens that the tokenizer puts before every text."""
    with_them = list(tokenizer("a", verbose=False)["input_ids"])
    without = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    for at in range(len(with_them) - len(without) + 1):
        if with_them[at : at + len(without)] == without:
            return with_them[:at]
    return []


def opened(ids: list[int], opening: list[int]) -> list[int]:
    """Token ids with the tokenizer's first ones before them, unless the text wrote them itself."""
    return ids if ids[: len(opening)] == opening else opening + ids


class Prompter:
    """A prompt and the tokenizer that it is read with.

    Args:
        tokenizer: the base model's.
        prompt: an adapter's; None: the base model's own chat template, if it has one.
    """

    def __init__(self, tokenizer: Any, prompt: Prompt | None = None) -> None:
        if prompt is None:
            prompt = Prompt(tokenizer.get_chat_template() if getattr(tokenizer, "chat_template", None) else None)
        elif prompt.template is None and getattr(tokenizer, "chat_template", None):
            # a tokenizer with added tokens and without a template, or a training on plain text
            prompt = dataclasses.replace(prompt, template=tokenizer.get_chat_template(), opens=False)
        if prompt.tokenizer is not None:
            import transformers

            try:
                tokenizer = transformers.AutoTokenizer.from_pretrained(str(prompt.tokenizer))
            except Exception as problem:  # the file is another program's; transformers raises a dozen kinds
                raise LorakitError(
                    f"load: the tokenizer in {prompt.tokenizer} cannot be read ({first_line(problem)})."
                ) from problem
        self.prompt, self.tokenizer = prompt, tokenizer
        self.opening = opening_of(tokenizer)

    def encode(self, messages: Sequence[Mapping[str, Any]], tools: Any = None) -> list[int]:
        """The token ids of a conversation, opened for the model's answer. Whatever the template raises is raised."""
        template = self.prompt.template
        if template is None:
            return self.raw("\n".join(str(message["content"]) for message in messages))
        text = self.tokenizer.apply_chat_template(
            list(messages), tools=tools, chat_template=template, tokenize=False, add_generation_prompt=True
        )
        if self.prompt.opens:
            head = "".join(self.tokenizer.convert_ids_to_tokens(self.opening))
            return self.opening + self._ids(text.removeprefix(head))
        return self._ids(text)

    def raw(self, text: str) -> list[int]:
        """The token ids of a text as it is, with what the tokenizer puts before a text; once, if it is written there."""
        return opened(self._ids(text), self.opening)

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    @property
    def stop_ids(self) -> list[int]:
        """The tokens that end an answer, besides the model's own."""
        known = self.tokenizer.get_vocab()
        return [known[token] for token in self.prompt.stop if token in known]

    def settle(self, model: Any) -> Any:
        """Write the prompt into a model that is saved whole and into its tokenizer, which is returned."""
        self.tokenizer.chat_template = self.prompt.template
        settings = getattr(model, "generation_config", None)
        if settings is not None:
            settings.eos_token_id = one_or_many([*end_ids(self.tokenizer, model), *self.stop_ids])
        return self.tokenizer


def end_ids(tokenizer: Any, model: Any = None) -> list[int]:
    """Every token that ends an answer of this model: the tokenizer's, and those of its generation settings."""
    known: list[int] = []
    for source in (tokenizer, getattr(model, "generation_config", None)):
        token = getattr(source, "eos_token_id", None)
        known += token if isinstance(token, list) else [token] if token is not None else []
    return list(dict.fromkeys(known))


def one_or_many(ids: Sequence[int]) -> int | list[int] | None:
    """End tokens as a configuration holds them."""
    known = list(dict.fromkeys(ids))
    return known[0] if len(known) == 1 else known or None


class Prompts:
    """The prompts of adapters over one base model, each read once and again when its files change; `check` looks at a folder
    before it is read, and raises."""

    def __init__(self, tokenizer: Any, check: Callable[[Path], None] = lambda _: None) -> None:
        self.base, self._check = Prompter(tokenizer), check
        self._known: dict[Path, tuple[Stamp, Prompter]] = {}

    def of(self, folder: Path) -> Prompter:
        """How the adapter of this folder is asked.

        Raises:
            LorakitError: its files cannot be read.
        """
        stamp = stamp_of(*(folder / name for name in (*PROMPT, OWN)))
        known = self._known.get(folder)
        if known is not None and known[0] == stamp:
            return known[1]
        self._check(folder)
        prompt = read_prompt(folder)
        found = self.base if prompt is None else Prompter(self.base.tokenizer, prompt)
        if prompt is None:
            log.info("%s brings no prompt: %s is used", folder.name, _words(self.base.prompt))
        elif found.prompt.template != self.base.prompt.template:
            log.info("%s is asked by %s", folder.name, _words(found.prompt))
        self._known[folder] = (stamp, found)
        return found


def _words(prompt: Prompt) -> str:
    return prompt.place if prompt.template is not None else "no chat template (the text as it is)"
