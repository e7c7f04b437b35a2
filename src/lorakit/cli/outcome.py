"""What the verbs of adapter arithmetic share: the base loaded only where a method needs it, and the error told as a number."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.cli.screen import err, show_log

if TYPE_CHECKING:
    from lorakit.adapter.adapter import Adapter
    from lorakit.algebra.outcome import Made


@dataclass
class Given:
    """The adapters of a command: on their base where that was needed, else their folders alone."""

    base: str | None = None
    adapters: list[Adapter] = field(default_factory=list)
    model: Any = None
    tokenizer: Any = None

    @property
    def on_model(self) -> bool:
        """Whether the base was loaded."""
        return self.model is not None

    def save(self, report: Made, output: Path, record: Mapping[str, Any]) -> None:
        """Write the adapter that was made on the model."""
        assert report.adapter is not None
        report.adapter.save(output, base=self.base, record=record)


@contextmanager
def on_base(verb: str, base: str | None, folders: Sequence[Path], always: bool = False) -> Iterator[Given]:
    """The adapters loaded onto their base, in float32, where one of them needs it (or `always`, or `base` is named)."""
    from lorakit.algebra.sources import needs_base
    from lorakit.errors import LorakitError
    from lorakit.files import store

    configs = [store.read_config(folder) for folder in folders]
    if base is None and not always and not any(needs_base(config) for config in configs):
        yield Given()
        return
    show_log(err)
    import torch

    import lorakit as lk
    from lorakit.models.loading import load_model

    names = dict.fromkeys(str(config.get("base_model_name_or_path") or "") for config in configs)
    place = base or next(iter(names))
    if not place:
        raise LorakitError(f"{verb}: {folders[0]} does not name its base model; give --base.")
    if base is None and len(names) > 1:
        raise LorakitError(f"{verb}: the adapters name different base models: {', '.join(names)}; give --base.")
    model, tokenizer = load_model(place, dtype=torch.float32)
    loaded = [lk.load(model, folder, name=f"given-{index}") for index, folder in enumerate(folders)]
    yield Given(place, loaded, model, tokenizer)


def batches_of(tokenizer: Any, data: str, rows: int, size: int = 8) -> list[dict[str, Any]]:
    """The first rows of a file, or of what else a run trains on, as batches with labels."""
    from lorakit.train.config.options import DataOptions
    from lorakit.train.data.examples import load_splits, prepare
    from lorakit.train.step.packing import pad

    options = DataOptions(train=data, limit=rows)
    found, _ = load_splits(options)
    examples = prepare(found, tokenizer, options).examples
    return [pad(examples[start : start + size]) for start in range(0, len(examples), size)]


def unlike(verb: str, output: Path, adapters: Sequence[Path]) -> None:
    """Refuse to write over one of the adapters."""
    from lorakit.errors import LorakitError

    for adapter in adapters:
        if output.expanduser().resolve() == adapter.expanduser().resolve():
            raise LorakitError(f"{verb}: {output} is the adapter itself; choose another --output.")


def numbers(text: str, option: str) -> list[float]:
    """ "0.7,0.3" as numbers."""
    from lorakit.errors import LorakitError

    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise LorakitError(
            f"{option} was given as {text!r}; it is numbers with commas between, such as 0.7,0.3."
        ) from None


def pattern_numbers(given: Sequence[str], option: str) -> dict[str, list[float]]:
    """["q_proj=1,0"] as {"q_proj": [1, 0]}."""
    from lorakit.errors import LorakitError

    result = {}
    for text in given:
        pattern, separator, values = text.rpartition("=")
        if not separator:
            raise LorakitError(
                f"{option} was given as {text!r}; it is a name's end and its weights, such as q_proj=1,0."
            )
        result[pattern] = numbers(values, option)
    return result


def told(output: Path, report: Made, done: str = "") -> str:
    """What was written and what it lacks, in one line."""
    held = sorted(rank for rank in report.ranks.values() if rank is not None)
    if not held:
        shape = "whole matrices"
    elif held[0] == held[-1]:
        shape = f"rank {held[0]}"
    else:
        shape = f"rank {held[0]} to {held[-1]}, {sum(held) / len(held):.1f} on average"
    line = f"{output}: {done + '; ' if done else ''}{len(report.ranks)} layers at {shape}"
    worst = max(report.errors, key=lambda place: report.errors[place])
    if report.error == 0.0:
        return f"{line}; ΔW is exact"
    return f"{line}; ΔW differs by {report.error:.2%} in all, by at most {report.errors[worst]:.2%} ({worst})"
