"""What a finished run leaves beside the adapter: model card, exact configuration, metrics as JSON lines, curves.

    README.md       the model card: how to use it, how it was trained, results, limits
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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorakit.adapter.coverage import Coverage
from lorakit.errors import plural
from lorakit.files.folder import write_whole
from lorakit.models.tasks import TASKS as MODELS
from lorakit.train.evaluate import Answer, Evaluation, compared

CARD, CONFIG, METRICS, CURVES = "README.md", "train.yaml", "metrics.jsonl", "curves.png"


@dataclass(frozen=True)
class RunRecord:
    """The facts of a run for its report. Counts are the whole run's, across resumes; `seconds` this session's. `classes` are a
    classifier's, by their index; `lineage` the adapters that it continues from, the oldest first; `prompt` is what an answer
    follows in the first training row, as text.

    `task` is the run's, `facts` what else of it prediction needs. `folder` is where the run saved the adapter, for the card's
    code.
    """

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
    prompt: str = ""
    coverage: Coverage | None = None
    lineage: Sequence[Mapping[str, Any]] = ()
    folder: str = "path/to/this/folder"
    task: str = "causal-lm"
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def measured(self) -> dict[str, Evaluation]:
        """What was measured: "before", with the base alone, and "after"."""
        found = {"before": self.before, "after": self.after}
        return {name: one for name, one in found.items() if one is not None}

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for the training record inside `lorakit.json`."""
        plain: dict[str, Any] = {}
        for key, value in vars(self).items():
            if isinstance(value, Coverage):
                value = value.as_dict()
            elif isinstance(value, Evaluation):
                value = {"rows": value.rows, **value.numbers()}
            elif isinstance(value, Mapping):
                value = dict(value)
            elif isinstance(value, Sequence) and not isinstance(value, str):
                value = list(value)
            plain[key] = value
        del plain["samples"], plain["prompt"]
        return plain


Series = dict[str, list[tuple[int, float]]]

SERIES = ("loss", "eval_loss", "token_accuracy", "eval_token_accuracy", "learning_rate")
"""What is drawn of a log history."""


def series_of(history: Iterable[Mapping[str, Any]]) -> Series:
    """The series of a log history as (step, value); numbers that are not finite cannot be drawn and are left out."""
    series: Series = {name: [] for name in SERIES}
    for event in history:
        for name in SERIES:
            value = event.get(name)
            if isinstance(value, int | float) and math.isfinite(value):
                series[name].append((int(event.get("step", 0)), float(value)))
    return series


def write_report(
    folder: str | os.PathLike[str], record: RunRecord, config_yaml: str, history: Sequence[Mapping[str, Any]]
) -> list[Path]:
    """Write the four files of the report into an adapter's folder; returns their paths.

    `config_yaml` is the text of the exact configuration, `history` the log events with a "step" each. The
    picture is left out when nothing was logged, since it would be empty.
    """
    texts = {CARD: model_card(record, curves=bool(history)), CONFIG: config_yaml, METRICS: json_lines(history)}
    files = {name: text.encode() for name, text in texts.items()}
    if history:
        title = f"{record.name}: {record.method} on {record.base}"
        files[CURVES] = draw_curves(series_of(history), title)
    return [write_whole(Path(folder) / name, content) for name, content in files.items()]


def json_lines(history: Iterable[Mapping[str, Any]]) -> str:
    """Log events as JSON lines. Numbers that are not finite become null, which every JSON reader takes."""

    def finite(value: Any) -> Any:
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return "".join(json.dumps({key: finite(value) for key, value in event.items()}) + "\n" for event in history)


# -- the picture -----------------------------------------------------------------------------------


def draw_curves(series: Series, title: str = "") -> bytes:
    """The picture of a run as PNG bytes: panels over a common axis of steps, only those that have data."""
    import matplotlib

    matplotlib.use("Agg", force=False)
    from io import BytesIO

    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    panels = []
    for name, height, label in (
        ("loss", 2.2, "training"),
        ("token_accuracy", 1.8, "training"),
        ("learning_rate", 1.0, ""),
    ):
        own, evaluated = series[name], series.get(f"eval_{name}", [])
        lines = [(own, label, _BLUE if label else _GREY), (evaluated, "evaluation", _ORANGE)]
        if drawn := [line for line in lines if line[0]]:
            panels.append((name, height, drawn))
    heights = [height for _, height, _ in panels]
    # A Figure of its own, not pyplot's: no global state, safe in any thread, nothing to close.
    figure = Figure(figsize=(8, 1.0 + 1.35 * sum(heights)), dpi=130, layout="constrained")
    if not panels:
        figure.text(0.5, 0.5, "nothing was logged", ha="center")
    axes: Any = (
        figure.subplots(len(panels), 1, sharex=True, height_ratios=heights, squeeze=False)[:, 0] if panels else []
    )
    for axis, (name, _, drawn) in zip(axes, panels, strict=True):
        for points, label, colour in drawn:
            _draw_series(axis, points, label, colour)
        axis.set_ylabel(name.replace("_", " "))
        axis.grid(visible=True, color="#e6e6e6", linewidth=0.8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.01)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        if name == "token_accuracy":
            axis.yaxis.set_major_formatter(PercentFormatter(xmax=1.0, decimals=0))
        else:
            axis.set_ylim(bottom=0)
        if name == "learning_rate":
            axis.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        if len(drawn) > 1 or name == "loss":
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
    """Mean over a window of about a tenth of the run around each step: centred, so that a steep fall is not late."""
    half = max(2, len(values) // 20)
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


# -- the model card --------------------------------------------------------------------------------


def model_card(record: RunRecord, *, curves: bool = True) -> str:
    """The model card as Markdown, with the header that model hubs read."""
    share = 100 * record.parameters / max(record.base_parameters, 1)
    stopped = f"**The run was stopped before its end: {record.stopped}.**\n\n" if record.stopped else ""
    prompt = f"A prompt from its training data:\n\n{_fenced(record.prompt)}\n\n" if record.prompt else ""
    facts = "\n".join(["| | |", "|---|---|", *(f"| {name} | {_cell(value)} |" for name, value in _facts(record))])
    data = "\n".join(f"- {line}" for line in record.data)
    findings = "No NaNs, spikes or overfitting were detected."
    if record.findings:
        findings = "\n".join(["Warnings during the run:", "", *(f"- {one}" for one in record.findings)])
    results = "\n".join(_results(record))
    picture = f"\n![loss, token accuracy and learning rate over the steps]({CURVES})\n" if curves else ""
    evaluated = "It was not evaluated on held-out rows: its quality is unknown."
    if record.eval_rows:
        evaluated = (
            "It was evaluated on the held-out rows above only; other texts, languages and phrasings are untested."
        )
    return f"""---
base_model: {json.dumps(record.base)}
library_name: peft
tags: [lora, lorakit]
---

# {record.name}

{stopped}A {record.method} adapter for `{record.base}`: {record.parameters:,} parameters, {share:.2f}% of the base \
model's {record.base_parameters:,}.

## How to use it

{_loading(record)}

{prompt}The adapter can be used on its own, combined with others, or merged into the base model.

## Training

{facts}

Data: {plural(record.train_rows, "row")}, {record.eval_rows:,} held out.

{data}

{findings}

## Results

{results}
{picture}
## Limits

- {evaluated}
- It keeps the knowledge, gaps and biases of its base model and adds those of its training rows.
- It fits this base model only; lorakit refuses to load it on another version of the base.
- Its licence is that of the base model and of the training data; this card grants none.

The exact configuration is in [`{CONFIG}`]({CONFIG}), every logged number in [`{METRICS}`]({METRICS}).
"""


def _facts(record: RunRecord) -> list[tuple[str, str]]:
    options = [(name.replace("_", " "), _plain(value)) for name, value in record.method_options.items()]
    return [
        ("task", ", ".join([record.task, *(f"{name} {value}" for name, value in record.facts.items())])),
        ("method", record.method),
        *options,
        ("targets", f"`{record.targets}`"),
        *_reached(record.coverage),
        ("base", f"`{record.base}`" + (f" ({record.base_revision})" if record.base_revision else "")),
        ("steps", f"{record.steps:,} with batch size {record.batch_size}, {record.epochs:.2f} epochs"),
        ("learning rate", f"{record.learning_rate:g}"),
        ("precision", f"base in {record.dtype}, adapter in float32"),
        *([("base model memory", f"{record.base_bytes / 1e6:,.1f} MB")] if record.base_bytes else []),
        ("fast path", record.path),
        ("seed", str(record.seed)),
        ("tokens", f"{record.tokens:,}"),
        (
            "time",
            f"{duration(record.seconds)} ({record.tokens / max(record.seconds, 1e-9):,.0f} tokens per second)",
        ),
        ("versions", ", ".join(f"{name} {version}" for name, version in record.versions.items())),
        *([("checkpoint", record.checkpoint)] if record.checkpoint else []),
        *([("continues from", ", then ".join(map(_ancestor, record.lineage)))] if record.lineage else []),
    ]


def _ancestor(one: Mapping[str, Any]) -> str:
    steps = f", {plural(one['steps'], 'step')}" if one.get("steps") else ""
    return f"`{one['adapter']}` (sha256 {str(one['sha256'])[:12]}{steps})"


def _reached(coverage: Coverage | None) -> list[tuple[str, str]]:
    """What share of the base's matrices an adapter changes, every kind of weight that it leaves out, and lowered ranks."""
    if coverage is None:
        return []
    share = f"{coverage.share:.1%} of the matrix numbers ({coverage.reached:,} of {coverage.total:,})"
    told = {"reaches": share, "leaves out": ", ".join(coverage.kinds()), "ranks": "; ".join(coverage.capped)}
    return [(name, text) for name, text in told.items() if text]


def _results(record: RunRecord) -> list[str]:
    measured = record.measured
    if not measured:
        return ["Not evaluated: the run had no held-out rows."]
    head = f"| on {next(iter(measured.values())).rows:,} held-out rows | " + " | ".join(
        {"before": "base model", "after": "with the adapter"}[name] for name in measured
    )
    rows = [head + " |", "|---|" + "---:|" * len(measured)]
    rows += [f"| {' | '.join(row)} |" for row in compared(measured.values())]
    if record.samples:
        rows += ["", "Sample answers:", ""]
        for answer in record.samples:
            mark = "right" if answer.right else f"expected `{_inline(answer.expected)}`"
            rows.append(f"- {_inline(answer.prompt)} → `{_inline(answer.given)}` ({mark})")
    return rows


def _loading(record: RunRecord) -> str:
    model, head = MODELS[record.task], ""
    if record.classes:
        head = f", num_labels={len(record.classes)}"
    elif model == MODELS["seq-cls"]:
        head = ", num_labels=1"
    imported, loaded = f"from transformers import {model}", f'model = {model}.from_pretrained("{record.base}"{head})'
    if record.quantize is not None or record.base.endswith(".gguf"):
        # A quantised base is exact on that alone; transformers flags what it reads from a GGUF file as quantised.
        quantize = "" if record.quantize is None else f', quantize="{record.quantize}"'
        task = "" if record.task == "causal-lm" else f', task="{record.task}"'
        imported = "from lorakit.models.loading import load_model"
        loaded = f'model, tokenizer = load_model("{record.base}"{quantize}{task}{head})'
    place = json.dumps(record.folder)
    lines = [
        "```python",
        "import lorakit as lk",
        imported,
        "",
        loaded,
        f"adapter = lk.load(model, {place})",
        "```",
        "",
        "or with PEFT:",
        "",
        "```python",
        "from peft import PeftModel",
        imported,
        "",
        loaded,
        f"model = PeftModel.from_pretrained(model, {place})",
        "```",
    ]
    if record.classes:
        lines += ["", f"The classes, by their index: {', '.join(f'`{_inline(name)}`' for name in record.classes)}."]
    return "\n".join(lines)


def _fenced(text: str, longest: int = 2000) -> str:
    """Text as a block of Markdown; a long one without its middle."""
    half = longest // 2
    shown = text if len(text) <= longest else f"{text[:half]}\n…\n{text[-half:]}"
    return f"~~~\n{shown.replace('~~~', '~ ~')}\n~~~"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _inline(text: str, longest: int = 160) -> str:
    """Text in one line of Markdown: no line breaks, no back-ticks that would end its code span."""
    line = " ".join(text.split()).replace("`", "'")
    return line if len(line) <= longest else f"…{line[-longest + 1 :]}"


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def duration(seconds: float) -> str:
    """A time as coarse as a person wants it: "8 s", "3 min 20 s", "2 h 05 min"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
