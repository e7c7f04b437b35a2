"""Going on from an adapter that is there already (`--from ADAPTER`), with new data or other settings.

The method, the ranks and the layers are the adapter's: what the run's options say otherwise is refused by name. Its values are
its own, so that no start is made again; what its prompt was (template, added tokens) comes along unless the run gives another.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.errors import LorakitError
from lorakit.experts import MEMBERS, RouterSpec
from lorakit.experts.attachment import over
from lorakit.files.bundle import TENSORS, digests, locate, read_config, read_own
from lorakit.files.prompt import Prompt, Prompter, read_prompt
from lorakit.files.store import load
from lorakit.files.vocabulary import add_tokens
from lorakit.train.config.options import DataOptions, TrainConfig
from lorakit.train.data.formats import with_prompt

if TYPE_CHECKING:
    from lorakit.adapter.adapter import Adapter
    from lorakit.train.data.rows import Rows

log = logging.getLogger("lorakit.train")


@dataclass(frozen=True)
class Source:
    """The adapter that a run goes on from.

    Attributes:
        given: as the configuration names it.
        folder: where it is.
        prompt: the form in which it was asked; None where its folder says nothing.
        lineage: the adapters that came before the run, the oldest first, this one last.
        classes: of a classifier, by their index.
    """

    given: str
    folder: Path
    prompt: Prompt | None
    lineage: Sequence[Mapping[str, Any]]
    classes: tuple[str, ...]

    def tokenizer(self, own: Any) -> Any:
        """The tokenizer to train with: the adapter's, where it brings one."""
        return own if self.prompt is None or self.prompt.tokenizer is None else Prompter(own, self.prompt).tokenizer

    def data(self, options: DataOptions, rows: Rows) -> DataOptions:
        """The options of rows in the form in which the adapter was asked, unless they give another; that is said."""
        if self.prompt is None:
            return options
        defaults = DataOptions(train="")
        names = ("template", "system", "template_arguments")
        given = [name for name in names if getattr(options, name) != getattr(defaults, name)]
        own = with_prompt(options, self.prompt, rows)
        if given == ["template"] and own == options:
            return options
        if given:
            log.warning("data.%s replaces %s, by which %s was trained", given[0], self.prompt.place, self.given)
        if "template" in given:
            return options
        return own.replace(**{name: getattr(options, name) for name in given})

    def check_tokens(self, options: DataOptions, tokenizer: Any) -> None:
        """Refuse special tokens that the adapter does not have.

        Raises:
            LorakitError: with the tokens.
        """
        known = tokenizer.get_vocab()
        if new := [token for token in options.special_tokens if token not in known]:
            raise LorakitError(
                f"data.special_tokens: {self.given} has no rows for {', '.join(new)}, and an adapter gets no more of them. "
                "Begin a new adapter with these tokens, or leave them out"
            )

    def along(self, prompt: Prompt | None) -> Prompt | None:
        """The prompt of the run, with the adapter's tokenizer."""
        if prompt is None or self.prompt is None or self.prompt.tokenizer is None:
            return prompt
        return dataclasses.replace(prompt, tokenizer=self.prompt.tokenizer)


def source_of(config: TrainConfig) -> Source | None:
    """What the run goes on from; None where it begins anew. No tensor is read.

    Raises:
        LorakitError: there is no such adapter.
    """
    if config.continue_from is None:
        return None
    folder = locate(config.continue_from)
    if folder.resolve().is_relative_to((Path(config.train.output) / "checkpoints").resolve()):
        raise LorakitError(
            f"train: {folder} is a checkpoint of train.output {config.train.output} itself, which a new run would remove. Give "
            "another train.output; or, to resume that run, --train.resume true"
        )
    own = read_own(folder)
    record = own.get("record", {})
    digest = digests(read_config(folder), folder / TENSORS)[TENSORS]
    this = {"adapter": config.continue_from, "sha256": digest, "steps": record.get("steps")}
    lineage = [*record.get("lineage", ()), this]
    return Source(config.continue_from, folder, read_prompt(folder), lineage, tuple(record.get("classes", ())))


def speaking(
    config: TrainConfig, rows: Rows, tokenizer: Any, source: Source | None
) -> tuple[TrainConfig, Any, list[int]]:
    """The configuration, the tokenizer and the ids of new tokens by which a run makes tokens of its rows: its own, or those of
    the adapter that it goes on from.

    Raises:
        LorakitError: special tokens that are none, or that the adapter does not have.
    """
    if source is None:
        return config, tokenizer, add_tokens(tokenizer, config.data.special_tokens)
    tokenizer = source.tokenizer(tokenizer)
    config = config.replace(data=source.data(config.data, rows))
    source.check_tokens(config.data, tokenizer)
    return config, tokenizer, []


def continued(config: TrainConfig, model: Any, source: Source, classes: Sequence[str] | None = None) -> Adapter:
    """The adapter of a run on its base (or on the base's shapes), with the values that it has, ready to train.

    Raises:
        LorakitError: it does not fit the base; the configuration or the rows ask for another adapter than it is.
    """
    if classes is not None and source.classes and source.classes != tuple(classes):
        raise LorakitError(
            f"train: {source.given} tells {', '.join(source.classes)} apart, and these rows have {', '.join(classes)}; the "
            "classes and their order must be the same"
        )
    adapter = load(model, source.folder, name=config.name, trainable=True)
    _check_options(config, adapter, source)
    return adapter


def resolved(config: TrainConfig, adapter: Adapter) -> TrainConfig:
    """The configuration with the method and the layers of the adapter that the run goes on from."""
    own = {name: getattr(adapter.targets, name) for name in _TARGETS}
    routed: tuple[str, ...] = ()
    if isinstance(adapter.method, RouterSpec):
        routed = tuple(str(Path(str(config.continue_from)) / MEMBERS / name) for name in over(adapter).members)
    return config.replace(method=adapter.method, adapters=routed, **own)


_TARGETS = ("target_modules", "exclude_modules", "layers", "patterns", "modules_to_save", "bias")


def _check_options(config: TrainConfig, adapter: Adapter, source: Source) -> None:
    """Refuses options about what the adapter is that say otherwise; those at their defaults say nothing."""
    fields = type(config).model_fields
    told, spec, own = [], config.method, plain_options(adapter.method)
    if spec.name not in (adapter.method.name, fields["method"].default):
        told.append(f"method is {spec.name}, and it is {adapter.method.name}")
    for name, value in plain_options(spec).items() if not told else ():
        if value != _default(type(spec), name) and value != own.get(name, "nothing of that name"):
            told.append(f"{name} is {value!r}, and it has {own.get(name, 'nothing of that name')!r}")
    for name in _TARGETS:
        value, has = getattr(config, name), getattr(adapter.targets, name)
        value = (value,) if isinstance(value, int) else value
        if value != fields[name].get_default(call_default_factory=True) and value != has:
            told.append(f"{name} is {value!r}, and it has {has!r}")
    if config.init.name != "default":
        told.append(f"init is {config.init.name}, and it has its values already")
    if config.adapters and not isinstance(adapter.method, RouterSpec):
        told.append("adapters are named, and it routes none")
    if told:
        raise LorakitError(
            f"train: the run continues from {source.given}: {'; '.join(told)}. Leave these options out; lorakit resize changes "
            "the rank of an adapter, and a run without --from begins a new one"
        )


def _default(spec: type, name: str) -> Any:
    """What an option of a spec, or of one that it holds, is if nobody says."""
    for one in dataclasses.fields(spec):
        value = one.default_factory() if callable(one.default_factory) else one.default
        if one.name == name:
            return value
        if dataclasses.is_dataclass(value) and name in plain_options(value):
            return plain_options(value)[name]
    return dataclasses.MISSING


def plain_options(spec: Any) -> dict[str, Any]:
    """A spec's options as plain values, an inner spec's among them."""
    plain: dict[str, Any] = {}
    for one in dataclasses.fields(spec):
        value = getattr(spec, one.name)
        plain |= plain_options(value) if dataclasses.is_dataclass(value) else {one.name: value}
    return plain
