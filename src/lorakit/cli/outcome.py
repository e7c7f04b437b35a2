"""What the verbs of adapter arithmetic share: the base loaded only where it is needed, the result saved, its error printed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.cli.screen import err, out, show_log
from lorakit.errors import LorakitError, plural

if TYPE_CHECKING:
    from lorakit.adapter.adapter import Adapter
    from lorakit.algebra.outcome import Made


@dataclass
class Given:
    """The adapters of a command, on their base where that was needed, else as folders; and where the result goes.

    Attributes:
        folders: as they were named.
        to: the folder to write.
        base: the base that was loaded; None where none was.
        loaded: the adapters on it.
        tokenizer: of the base.
    """

    folders: Sequence[Path]
    to: Path | None = None
    base: str | None = None
    loaded: list[Adapter] = field(default_factory=list)
    tokenizer: Any = None

    @property
    def adapters(self) -> Sequence[Adapter | Path]:
        """What an operation works on."""
        return self.loaded or self.folders

    @property
    def output(self) -> Path | None:
        """What an operation is told to write: nothing where it makes an adapter on the base, which `finish` saves."""
        return None if self.loaded else self.to

    def batches(self, data: str, rows: int, size: int = 8) -> list[dict[str, Any]]:
        """The first rows of a file, or of what else a run trains on, as batches with labels."""
        from lorakit.train.config.options import DataOptions
        from lorakit.train.data.examples import prepare
        from lorakit.train.data.reading import load_splits
        from lorakit.train.step.packing import pad

        options = DataOptions(train=data, limit=rows)
        found, _ = load_splits(options)
        examples = prepare(found, self.tokenizer, options).examples
        return [pad(examples[start : start + size]) for start in range(0, len(examples), size)]

    def finish(self, made: Made, done: str = "") -> None:
        """Save what was made on the base, and print what was written and what it lacks."""
        assert self.to is not None
        if made.adapter is not None:
            names = [str(folder) for folder in self.folders]
            record = {
                verb: {**what, "from": names if len(names) > 1 else names[0]} for verb, what in made.record.items()
            }
            made.adapter.save(self.to, base=self.base, record=record)
        out.print(told(self.to, made, done), markup=False)


@contextmanager
def on_base(
    verb: str,
    folders: Sequence[Path],
    base: str | None,
    output: Path | None = None,
    overwrite: bool = False,
    always: bool = False,
) -> Iterator[Given]:
    """The adapters loaded onto their base, in float32, where one of them needs it (or `always`, or `base` is named)."""
    from lorakit.algebra.sources import needs_base
    from lorakit.files.bundle import read_config

    for folder in folders:
        if output is not None and output.expanduser().resolve() == folder.expanduser().resolve():
            raise LorakitError(f"{verb}: {output} is the adapter itself; choose another --output.")
    configs = [read_config(folder) for folder in folders]
    if output is not None:
        claim_adapter(verb, output, overwrite)
    named = dict.fromkeys(str(config.get("base_model_name_or_path") or "") for config in configs)
    if base is None and len(set(named) - {""}) > 1:
        err.print(
            f"{verb}: the adapters name different base models: {', '.join(filter(None, named))}",
            style="yellow",
            markup=False,
        )
    if base is None and not always and not any(needs_base(config) for config in configs):
        yield Given(folders, output)
        return
    show_log(err)
    import torch

    import lorakit as lk
    from lorakit.files.vocabulary import make_room
    from lorakit.models.loading import load_model
    from lorakit.train.tasks.record import recorded

    names = dict.fromkeys(str(config.get("base_model_name_or_path") or "") for config in configs)
    place = base or next(iter(names))
    if not place:
        raise LorakitError(f"{verb}: {folders[0]} does not name its base model; give --base.")
    if base is None and len(names) > 1:
        raise LorakitError(f"{verb}: the adapters name different base models: {', '.join(names)}; give --base.")
    task, _, classes = recorded(folders[0], place)
    model, tokenizer = load_model(place, dtype=torch.float32, task=task.name, **task.model_options(classes))
    task.settle(model)
    make_room(model, folders)
    loaded = [lk.load(model, folder, name=f"given-{index}", active=False) for index, folder in enumerate(folders)]
    yield Given(folders, output, place, loaded, tokenizer)


def claim_adapter(verb: str, output: Path, overwrite: bool) -> None:
    """Make sure that an adapter written there replaces nothing unasked."""
    from lorakit.files.bundle import CONFIG, CONTENT
    from lorakit.files.folder import claim
    from lorakit.files.prompt import TEMPLATE

    claim(output, (*CONTENT, TEMPLATE), overwrite, verb, marks=(CONFIG,))


def told(output: Path, made: Made, done: str = "") -> str:
    """What was written and what it lacks, in one line."""
    held = sorted(rank for rank in made.ranks.values() if rank is not None)
    if not held:
        shape = "whole matrices"
    elif held[0] == held[-1]:
        shape = f"rank {held[0]}"
    else:
        shape = f"rank {held[0]} to {held[-1]} ({sum(held) / len(held):.1f} on average)"
    line = f"{output}: {done + '; ' if done else ''}{plural(len(made.ranks), 'layer')} at {shape}"
    if made.error == 0.0:
        return f"{line}; ΔW is exact"
    return f"{line}; error of ΔW {made.error:.2%} overall, at most {made.errors[made.worst]:.2%} ({made.worst})"
