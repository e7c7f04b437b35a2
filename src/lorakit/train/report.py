"""What a finished run leaves beside the adapter: model card, exact configuration, metrics as JSON lines,
curves.

    README.md       the model card: what it is, on what it was trained, results, use, limits, how to load it
    train.yaml      the configuration that makes this run again, defaults and overrides included
    metrics.jsonl   one line per log event, in order of steps
    curves.png      loss, token accuracy and learning rate over the steps

The files are written after `Adapter.save`, which leaves files it does not know alone, and each is put in
place whole (a temporary file, then a rename): a run that is killed leaves the old file or the new one.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorakit.train.evaluate import Answer, Evaluation, written

CARD, CONFIG, METRICS, CURVES = "README.md", "train.yaml", "metrics.jsonl", "curves.png"


@dataclass(frozen=True)
class RunRecord:
    """The facts of a run that its report tells. Counts are whole runs', across resumes; `seconds` this
    session's. `classes` are a classifier's, by their index."""

    name: str
    base: str
    method: str
    method_options: Mapping[str, Any]
    targets: str
    parameters: int
    base_parameters: int
    dtype: str
    path: str
    train_rows: int
    eval_rows: int
    data: Sequence[str]
    steps: int
    epochs: float
    batch_size: int
    learning_rate: float
    seed: int
    tokens: int
    seconds: float
    versions: Mapping[str, str]
    base_revision: str | None = None
    before: Evaluation | None = None
    after: Evaluation | None = None
    findings: Sequence[str] = ()
    stopped: str | None = None
    checkpoint: str | None = None
    samples: Sequence[Answer] = ()
    classes: Sequence[str] = ()
    base_bytes: int = 0
    quantize: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for the training record inside `lorakit.json`."""
        plain = {key: value for key, value in vars(self).items() if key not in ("before", "after", "samples")}
        plain["method_options"], plain["versions"] = dict(self.method_options), dict(self.versions)
        plain["data"], plain["findings"] = list(self.data), list(self.findings)
        plain["classes"] = list(self.classes)
        for key in ("before", "after"):
            evaluation = getattr(self, key)
            plain[key] = None if evaluation is None else {"rows": evaluation.rows, **evaluation.numbers()}
        return plain


@dataclass(frozen=True)
class Curves:
    """The series of a log history, each a list of (step, value)."""

    loss: list[tuple[int, float]] = field(default_factory=list)
    eval_loss: list[tuple[int, float]] = field(default_factory=list)
    token_accuracy: list[tuple[int, float]] = field(default_factory=list)
    eval_token_accuracy: list[tuple[int, float]] = field(default_factory=list)
    learning_rate: list[tuple[int, float]] = field(default_factory=list)

    @classmethod
    def of(cls, history: Iterable[Mapping[str, Any]]) -> Curves:
        """Read the series out of log events; numbers that are not finite cannot be drawn and are left out."""
        curves = cls()
        for event in history:
            for name, series in vars(curves).items():
                value = event.get(name)
                if isinstance(value, int | float) and math.isfinite(value):
                    series.append((int(event.get("step", 0)), float(value)))
        return curves


def write_report(
    folder: str | os.PathLike[str], record: RunRecord, config_yaml: str, history: Sequence[Mapping[str, Any]]
) -> list[Path]:
    """Write the four files of the report into an adapter's folder; returns their paths.

    `config_yaml` is the text of the exact configuration, `history` the log events with a "step" each. The
    picture is left out when nothing was logged, since it would be empty.
    """
    folder = Path(folder)
    texts = {
        CARD: model_card(record, curves=bool(history)),
        CONFIG: config_yaml,
        METRICS: json_lines(history),
    }
    paths = [write_whole(folder / name, text.encode()) for name, text in texts.items()]
    if history:
        paths.append(write_whole(folder / CURVES, draw_curves(Curves.of(history), title=_title(record))))
    return paths


def write_whole(path: Path, content: bytes) -> Path:
    """Put a file in place whole: a reader sees the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files for their owner alone; an adapter folder is meant to be shared.
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def json_lines(history: Iterable[Mapping[str, Any]]) -> str:
    """Log events as JSON lines. Numbers that are not finite become null, which every JSON reader takes."""
    return "".join(json.dumps({key: _finite(value) for key, value in event.items()}) + "\n" for event in history)


# -- the picture -----------------------------------------------------------------------------------


def draw_curves(curves: Curves, title: str = "") -> bytes:
    """The picture of a run as PNG bytes: panels over a common axis of steps, only those that have data."""
    import matplotlib

    matplotlib.use("Agg", force=False)
    from io import BytesIO

    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    panels: list[tuple[str, list[tuple[list[tuple[int, float]], str, str]]]] = [
        ("loss", [(curves.loss, "training", _BLUE), (curves.eval_loss, "evaluation", _ORANGE)]),
        (
            "token accuracy",
            [(curves.token_accuracy, "training", _BLUE), (curves.eval_token_accuracy, "evaluation", _ORANGE)],
        ),
        ("learning rate", [(curves.learning_rate, "learning rate", _GREY)]),
    ]
    panels = [(name, drawn) for name, series in panels if (drawn := [one for one in series if one[0]])]
    heights = [1.0 if name == "learning rate" else 2.2 if name == "loss" else 1.8 for name, _ in panels]
    # A Figure of its own, not pyplot's: no global state, safe in any thread, nothing to close.
    figure = Figure(figsize=(8, 1.0 + 1.35 * sum(heights)), dpi=130, layout="constrained")
    if not panels:
        figure.text(0.5, 0.5, "nothing was logged", ha="center")
    axes: Any = (
        figure.subplots(len(panels), 1, sharex=True, height_ratios=heights, squeeze=False)[:, 0] if panels else []
    )
    for axis, (name, series) in zip(axes, panels, strict=True):
        for points, label, colour in series:
            _draw_series(axis, points, label, colour)
        axis.set_ylabel(name)
        axis.grid(visible=True, color="#e6e6e6", linewidth=0.8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.01)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        if name == "loss":
            axis.set_ylim(bottom=0)
        elif name == "token accuracy":
            axis.yaxis.set_major_formatter(PercentFormatter(xmax=1.0, decimals=0))
        else:
            axis.set_ylim(bottom=0)
            axis.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        if len(series) > 1 or name == "loss":
            axis.legend(frameon=False, loc="best")
    if panels:
        axes[-1].set_xlabel("optimiser step")
    if title:
        figure.suptitle(title, fontsize=11)
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


_BLUE, _ORANGE, _GREY = "#2b6cb0", "#dd6b20", "#4a5568"


def _draw_series(axis: Any, points: list[tuple[int, float]], label: str, colour: str) -> None:
    steps, values = [step for step, _ in points], [value for _, value in points]
    if label == "evaluation" or len(points) == 1:
        axis.plot(steps, values, color=colour, marker="o", markersize=4.5, linewidth=1.6, label=label, zorder=3)
        return
    if label == "training" and len(points) >= 20:
        # The raw series of small batches is a thicket: it stays visible, faintly, under its running mean.
        axis.plot(steps, values, color=colour, alpha=0.22, linewidth=1.0)
        axis.plot(steps, _running_mean(values), color=colour, linewidth=1.9, label=f"{label} (running mean)")
        return
    axis.plot(steps, values, color=colour, linewidth=1.6, label=label)


def _running_mean(values: list[float]) -> list[float]:
    """Mean over a window of about a tenth of the run around each step: centred, so that a steep fall is not
    late."""
    half = max(2, len(values) // 20)
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


# -- the model card --------------------------------------------------------------------------------


def model_card(record: RunRecord, *, curves: bool = True) -> str:
    """The model card as Markdown, with the header that model hubs read."""
    lines = [
        "---",
        f"base_model: {json.dumps(record.base)}",
        "library_name: peft",
        "tags: [lora, lorakit]",
        "---",
        "",
        f"# {record.name}",
        "",
        f"A {record.method} adapter for `{record.base}`: {record.parameters:,} parameters, "
        f"{100 * record.parameters / max(record.base_parameters, 1):.2f}% of the base model's "
        f"{record.base_parameters:,}.",
        "",
    ]
    if record.stopped:
        lines += [f"**The run was stopped before its end: {record.stopped}.**", ""]
    lines += ["## What it is", "", *_table(_facts(record)), "", "## Training data", ""]
    lines += [
        f"{record.train_rows:,} rows to train, {record.eval_rows:,} held out.",
        *[f"- {line}" for line in record.data],
    ]
    lines += ["", "## Results", "", *_results(record), ""]
    if curves:
        lines += [f"![loss, token accuracy and learning rate over the steps]({CURVES})", ""]
    lines += _findings(record)
    lines += [
        "## Intended use",
        "",
        f"For the task that its training rows show, on top of `{record.base}`, with prompts written the way "
        "those rows write them. The adapter may be used on its own, mixed with others, or merged into the "
        "base.",
        "",
        "## Limits",
        "",
        "- It was measured on the held-out rows above and on nothing else: other texts, languages and "
        "phrasings are untried."
        if record.eval_rows
        else "- It was not measured on held-out rows: nothing is known about how well it does.",
        "- It keeps the knowledge, gaps and biases of its base model and adds those of its training rows.",
        "- It fits this base model only. Another version of the base gives other answers; lorakit refuses "
        "to load it there.",
        "- Its licence is that of the base model and of the training data; this card grants none.",
        "",
        *_loading(record),
        "",
        f"The exact configuration is in [`{CONFIG}`]({CONFIG}), every logged number in [`{METRICS}`]({METRICS}).",
        "",
    ]
    return "\n".join(lines)


def _facts(record: RunRecord) -> list[tuple[str, str]]:
    options = [(name.replace("_", " "), _plain(value)) for name, value in record.method_options.items()]
    return [
        ("method", record.method),
        *options,
        ("targets", f"`{record.targets}`"),
        ("base", f"`{record.base}`" + (f" ({record.base_revision})" if record.base_revision else "")),
        ("steps", f"{record.steps:,} of batch {record.batch_size}, {record.epochs:.2f} epochs"),
        ("learning rate", f"{record.learning_rate:g}"),
        ("precision", f"base in {record.dtype}, adapter in float32"),
        *([("base takes", f"{record.base_bytes / 1e6:,.1f} MB")] if record.base_bytes else []),
        ("training path", record.path),
        ("seed", str(record.seed)),
        ("tokens", f"{record.tokens:,}"),
        (
            "time",
            f"{_duration(record.seconds)} ({record.tokens / max(record.seconds, 1e-9):,.0f} tokens per second)",
        ),
        ("versions", ", ".join(f"{name} {version}" for name, version in record.versions.items())),
        *([("checkpoint", record.checkpoint)] if record.checkpoint else []),
    ]


def _results(record: RunRecord) -> list[str]:
    measured = {name: one for name, one in (("before", record.before), ("after", record.after)) if one is not None}
    if not measured:
        return ["Nothing was measured: the run had no evaluation rows."]
    names = list(dict.fromkeys(name for evaluation in measured.values() for name in evaluation.numbers()))
    head = f"| on {next(iter(measured.values())).rows:,} held-out rows | " + " | ".join(
        {"before": "base model", "after": "with the adapter"}[name] for name in measured
    )
    rows = [head + " |", "|---|" + "---:|" * len(measured)]
    for name in names:
        cells = [evaluation.numbers().get(name) for evaluation in measured.values()]
        shown = ["" if cell is None else written(name, cell) for cell in cells]
        rows.append(f"| {name.replace('_', ' ')} | " + " | ".join(shown) + " |")
    if record.samples:
        rows += ["", "Sample answers:", ""]
        for answer in record.samples:
            mark = "right" if answer.right else f"expected `{_inline(answer.expected)}`"
            rows.append(f"- {_inline(answer.prompt)} → `{_inline(answer.given)}` ({mark})")
    return rows


def _findings(record: RunRecord) -> list[str]:
    if not record.findings:
        return ["The health watch saw nothing unusual during the run.", ""]
    return ["## What the health watch saw", "", *[f"- {finding}" for finding in record.findings], ""]


def _loading(record: RunRecord) -> list[str]:
    model, head = "AutoModelForCausalLM", ""
    if record.classes:
        model, head = "AutoModelForSequenceClassification", f", num_labels={len(record.classes)}"
    named = [f"The classes, by their index: {', '.join(f'`{_inline(name)}`' for name in record.classes)}.", ""]
    imported, loaded = f"from transformers import {model}", f'model = {model}.from_pretrained("{record.base}"{head})'
    if record.quantize is not None:  # trained on the base held so, and exact on that alone
        imported, loaded = (
            "from lorakit.models.loading import load_model",
            f'model, tokenizer = load_model("{record.base}", quantize="{record.quantize}")',
        )
    elif record.base.endswith(".gguf"):
        # transformers flags what it reads from such a file as quantised, and needs the folder and the file apart.
        imported, loaded = (
            "from lorakit.models.loading import load_model",
            f'model, tokenizer = load_model("{record.base}")',
        )
    return [
        "## How to load it",
        "",
        *(named if record.classes else []),
        "```python",
        "import lorakit as lk",
        imported,
        "",
        loaded,
        'adapter = lk.load(model, "path/to/this/folder")',
        "lk.activate(model, adapter.name)",
        "",
        "# or with PEFT",
        "from peft import PeftModel",
        'model = PeftModel.from_pretrained(model, "path/to/this/folder")',
        "```",
    ]


def _table(facts: Sequence[tuple[str, str]]) -> list[str]:
    return ["| | |", "|---|---|", *[f"| {name} | {_cell(value)} |" for name, value in facts]]


def _title(record: RunRecord) -> str:
    return f"{record.name}: {record.method} on {record.base}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _inline(text: str, longest: int = 160) -> str:
    """Text in one line of Markdown: no line breaks, no back-ticks that would end its code span."""
    flat = " ".join(text.split()).replace("`", "'")
    return flat if len(flat) <= longest else f"…{flat[-longest + 1 :]}"


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
