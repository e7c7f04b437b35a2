"""Four adapters on four texts, and what makes one of them: each on each, merged, routed, against one trained on all.

    make bench-compose                                   everything; the trainings are kept under .cache/compose
    make bench-compose BENCH_OPTIONS="--train-only"      the five trainings alone
    make bench-compose BENCH_OPTIONS="--rows ties svd"   these rows anew, the others as they were measured before
    make bench-compose BENCH_OPTIONS="--each 480"        what learns from all four sees four times as much

The texts are the demo's: film reviews, Amazon reviews, New York Times editorials, tweets. Each adapter learns to tell praise
from blame on one of them, 480 sentences, one epoch; "all" learns from the four together, from as many sentences in all
(120 of each, unless told otherwise), and so do the mixtures. What is measured is the share of
held-out sentences of each text for which the right one of the two words is the likelier. Results go to
benchmarks/results/compose.json after every row, the picture to docs/pictures/bench-compose.png; docs/composition.md says the
rest. A row is a function of the bench that gives a route, or one per text; experts/ adds its own at the end of ROWS.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import lorakit as lk
import material
from lorakit.adapter.adapter import Adapter

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "compose.json"
PICTURE = ROOT / "docs" / "pictures" / "bench-compose.png"

TEXTS = ("movies", "amazon", "nyt", "tweets")
KINDS = {"movies": "movie review", "amazon": "product review", "nyt": "newspaper editorial", "tweets": "tweet"}
QUESTION = "Classify the sentiment of this {kind} as positive or negative. Answer with one word."
CHOICES = ("positive", "negative")
TRAIN, HELD_OUT, FEW, RANK = 480, 200, 16, 16
EACH = TRAIN // 4  # as many in all as each of the four adapters has seen
QUESTIONS = 100  # of those held out; with 200 a row takes twice as long and its error falls by a third


# -- data and trainings ----------------------------------------------------------------------------------------------------


def folder() -> Path:
    """Where the rows and the trained adapters are kept."""
    return material.cache_root() / "compose"


def rows_of(text: str, count: int = TRAIN) -> tuple[Path, Path]:
    """The rows of one text to train on, the first `count` of them, and to score, as files of questions and answers."""
    train, held_out = material.split_reviews(TRAIN, HELD_OUT, name=text)
    question = QUESTION.format(kind=KINDS[text])
    kept = f"{text}-train.jsonl" if count == TRAIN else f"{text}-train-{count}.jsonl"
    paths = folder() / "rows" / kept, folder() / "rows" / f"{text}-held-out.jsonl"
    for path, rows in zip(paths, (train[:count], held_out), strict=True):
        material.write_rows(path, material.ask(rows, question=question))
    return paths


def configuration(name: str, texts: Sequence[str], output: Path, *more: str, each: int = TRAIN) -> Any:
    """The run that trains an adapter on `each` sentences of some texts; `more` are further options, such as another
    method's."""
    from lorakit.train.config.run import load_config

    return load_config(
        None,
        [
            f"model={material.fetch_model()}",
            f"name={name}",
            *(() if any(one.startswith("method=") for one in more) else (f"rank={RANK}", f"alpha={2 * RANK}")),
            f"data.train={json.dumps([str(rows_of(text, each)[0]) for text in texts])}",
            "data.max_length=256",
            "train.learning_rate=5e-4",
            f"train.output={output}",
            "evaluate.answers=none",
            *more,
        ],
    )


def trained(name: str, texts: Sequence[str], *more: str, each: int = TRAIN) -> Path:
    """The folder of an adapter trained on these texts; trained now where no finished run of the same recipe is kept."""
    from lorakit.train.run import train

    output = folder() / name
    facts: dict[str, Any] = {"texts": list(texts), "rows": each, "rank": RANK, "question": QUESTION, "epochs": 1}
    recipe = json.dumps(facts | ({"more": list(more)} if more else {}))
    done = output / "recipe.json"  # written last, so that a killed run is run again
    if done.is_file() and done.read_text() == recipe:
        return output
    say(f"training {name} ...")
    start = time.monotonic()
    result = train(configuration(name, texts, output, *more, each=each))
    done.write_text(recipe)
    say(f"trained {name}: {result.record.steps} steps in {time.monotonic() - start:.0f} s")
    return output


def train_four() -> dict[str, Path]:
    """The adapters, one per text."""
    return {text: trained(text, [text]) for text in TEXTS}


def say(line: str) -> None:
    """A line of progress, at once."""
    print(line, file=sys.stderr, flush=True)


# -- the bench --------------------------------------------------------------------------------------------------------------


@dataclass
class Bench:
    """What a row works with.

    Attributes:
        model: the base, in the format it was trained in.
        adapters: the four, by text, on the model.
        each: sentences of each text for what learns from all of them.
        questions: text -> held-out questions; never for a row to look at.
        few: text -> a few training questions, for rows that search or need examples.
        choices: the tokens of the two words.
        notes: what a row wants said beside its figures.
    """

    model: Any
    tokenizer: Any
    adapters: dict[str, Adapter]
    questions: dict[str, list[Any]]
    few: dict[str, list[Any]]
    choices: list[list[int]]
    each: int
    notes: dict[str, str] = field(default_factory=dict)
    known: dict[tuple[str | None, str], int] = field(default_factory=dict)
    """(adapter or None, text) -> right answers, so that a row of loaded adapters alone measures nothing twice."""

    @property
    def four(self) -> list[Adapter]:
        """The four adapters, in the order of TEXTS."""
        return [self.adapters[text] for text in TEXTS]

    def right(self, route: Any, text: str) -> int:
        """How many of a text's held-out questions are answered rightly under a route."""
        lasting = route is None or (isinstance(route, str) and route in self.adapters)
        if not lasting:
            return self.correct(route, self.questions[text])
        if (route, text) not in self.known:
            self.known[route, text] = self.correct(route, self.questions[text])
        return self.known[route, text]

    def correct(self, route: Any, questions: Sequence[Any]) -> int:
        """How many questions are answered rightly under a route; an adapter is in the weights meanwhile, which is in float32
        here, so that a whole matrix costs no second product."""
        from lorakit.train.scoring import score_choices

        plain = isinstance(route, str) and lk.adapters(self.model)[route].router is None
        with lk.merged(self.model, route) if plain else lk.use(self.model, route):
            scores = score_choices(self.model, [one.prompt_ids for one in questions], self.choices, batch_size=25)
        given = [CHOICES[index] for index in scores.argmax(1).tolist()]
        return sum(answer == one.answer for answer, one in zip(given, questions, strict=True))


def prepared(paths: Mapping[str, Path], count: int, each: int) -> Bench:
    """The base with the adapters, and `count` held-out questions of each text."""
    from lorakit.models.loading import load_model
    from lorakit.train.config.options import DataOptions
    from lorakit.train.data.examples import choice_ids, questions
    from lorakit.train.data.reading import load_splits

    model, tokenizer = load_model(material.fetch_model())
    adapters = {name: lk.load(model, path, name=name) for name, path in paths.items()}
    asked: dict[str, list[Any]] = {}
    few: dict[str, list[Any]] = {}
    choices: list[list[int]] = []
    for text in TEXTS:
        train, held_out = rows_of(text)
        for path, into, limit in ((held_out, asked, count), (train, few, FEW)):
            options = DataOptions(train=str(path), max_length=256, shuffle_seed=None, limit=limit)
            rows, _ = load_splits(options)
            into[text] = questions(rows, tokenizer, options)
            choices = choice_ids(CHOICES, rows, tokenizer, options)
    return Bench(model, tokenizer, adapters, asked, few, choices, each)


# -- the rows ---------------------------------------------------------------------------------------------------------------

Route = Any
"""A route of `lk.use` for all texts, or {text: route}, whose keys are then all of TEXTS."""


def alone(name: str | None) -> Callable[[Bench], Route]:
    """One adapter for every text, or the base."""
    return lambda bench: name


def own(bench: Bench) -> Route:
    """Each text by the adapter that was trained on it: what a perfect router would reach."""
    return {text: text for text in TEXTS}


def combined(weights: Sequence[float], how: str, measured: bool = False, **options: Any) -> Callable[[Bench], Route]:
    """The four as one; where something is measured, each on a few training questions of its own text."""

    def make(bench: Bench) -> Route:
        batches = [[answered(bench, one) for one in bench.few[text]] for text in TEXTS] if measured else None
        found = lk.combine(bench.four, weights, how, name="row", batches=batches, **options)
        ranks = set(found.ranks.values())
        shape = "whole matrices" if None in ranks else f"rank {max(rank for rank in ranks if rank is not None)}"
        bench.notes["row"] = shape + (f", ΔW differs by {found.error:.1%}" if found.error else "")
        return "row"

    return make


def routed(spec: Any, batches: Callable[[Bench], Any] = lambda bench: None) -> Callable[[Bench], Route]:
    """The four behind a router that is not trained."""

    def make(bench: Bench) -> Route:
        found = lk.route(bench.model, spec, TEXTS, name="row", batches=batches(bench))
        blend = getattr(found.router, "blend", None)
        bench.notes["row"] = ", ".join(f"{name} {w:.2f}" for name, w in blend().items()) if blend is not None else ""
        return "row"

    return make


def learned(name: str, *options: str) -> Callable[[Bench], Route]:
    """An adapter, a mixture, or a router over the four, trained on all texts together."""

    def make(bench: Bench) -> Route:
        lk.load(bench.model, trained(name, TEXTS, *options, each=bench.each), name="row")
        bench.notes["row"] = f"{bench.each * len(TEXTS)} sentences"
        return "row"

    return make


def answered(bench: Bench, one: Any) -> dict[str, Any]:
    """A training question with its answer, as a batch of one row."""
    answer = list(bench.choices[CHOICES.index(one.answer)])
    ids = torch.tensor([[*one.prompt_ids, *answer]])
    labels = torch.full_like(ids, -100)
    labels[0, -len(answer) :] = ids[0, -len(answer) :]
    return {"input_ids": ids, "labels": labels}


def examples(bench: Bench) -> list[dict[str, Any]]:
    """Two training questions of each text with their answers, a batch each."""
    return [answered(bench, one) for text in TEXTS for one in bench.few[text][:2]]


def requests(bench: Bench) -> dict[str, list[dict[str, Any]]]:
    """Training questions of each text, without answers."""
    return {text: [{"input_ids": torch.tensor([list(one.prompt_ids)])} for one in bench.few[text]] for text in TEXTS}


def four() -> str:
    """The folders of the four adapters, as an option."""
    return f"adapters={json.dumps([str(folder() / text) for text in TEXTS])}"


MIXTURE = f"method={{name: mixlora, experts: 4, top_k: 2, inner: {{name: lora, rank: {RANK}, alpha: {2 * RANK}}}}}"

MEAN, HALF, SUM = (0.25,) * 4, (0.5,) * 4, (1.0,) * 4


@dataclass(frozen=True)
class Row:
    """One line of the table: its name, what it is, and how it comes about."""

    name: str
    text: str
    make: Callable[[Bench], Route]


ROWS: list[Row] = [
    Row("base", "no adapter", alone(None)),
    *(Row(text, f"trained on {text}", alone(text)) for text in TEXTS),
    Row("own", "each text by its own adapter", own),
    Row("linear-mean", "linear, weights 1/4", combined(MEAN, "linear")),
    Row("linear-half", "linear, weights 1/2", combined(HALF, "linear")),
    Row("linear-sum", "linear, weights 1", combined(SUM, "linear")),
    Row("svd", "linear, weights 1/2, cut by SVD to one adapter's rank", combined(HALF, "svd", rank=RANK)),
    Row("ties", "TIES, density 0.2, λ 1", combined(SUM, "ties")),
    Row("ties-2", "TIES, density 0.2, λ 2", combined(SUM, "ties", factor=2.0)),
    Row("dare", "DARE, density 0.2, weights 1/2", combined(HALF, "dare-linear")),
    Row("dare-ties", "DARE-TIES, density 0.5, λ 1", combined(SUM, "dare-ties", density=0.5)),
    Row("prune", "largest 20% of entries, weights 1/2", combined(HALF, "magnitude-prune")),
    Row("regmean", "RegMean, 16 questions of each", combined(MEAN, "regmean", measured=True)),
    Row("fisher", "Fisher mean, 16 questions of each", combined(MEAN, "fisher", measured=True)),
    Row("all", "one adapter trained on all four", learned("all")),
    Row("lorahub", "LoRAHub, 8 examples, 40 trials", routed(lk.LoRAHub(evaluations=40), examples)),
    Row("arrow", "Arrow, all four", routed(lk.Arrow())),
    Row("arrow-1", "Arrow, top 1", routed(lk.Arrow(top_k=1))),
    Row("retrieval", "retrieval, 16 requests each", routed(lk.Retrieval(), requests)),
    Row("xlora", "X-LoRA over the four, trained on all", learned("xlora", "method=xlora", four())),
    Row("mixlora", "MixLoRA, 4 experts, top 2, trained on all", learned("mixlora", MIXTURE)),
]


@contextlib.contextmanager
def cleaned(bench: Bench) -> Iterator[None]:
    """Afterwards the model has the adapters that it had."""
    before = set(lk.adapters(bench.model))
    try:
        yield
    finally:
        for name in set(lk.adapters(bench.model)) - before:
            lk.detach(bench.model, name)


def measured(bench: Bench, row: Row) -> dict[str, Any]:
    """A row's figures."""
    start = time.monotonic()
    bench.notes.clear()
    with cleaned(bench):
        route = row.make(bench)
        made = time.monotonic() - start
        routes = route if isinstance(route, Mapping) and set(route) == set(TEXTS) else dict.fromkeys(TEXTS, route)
        right = {text: bench.right(routes[text], text) for text in TEXTS}
    return {
        "text": row.text,
        "accuracy": {text: right[text] / len(bench.questions[text]) for text in TEXTS},
        "mean": sum(right.values()) / sum(len(asked) for asked in bench.questions.values()),
        "note": next(iter(bench.notes.values()), ""),
        "seconds": {"made": round(made, 1), "scored": round(time.monotonic() - start - made, 1)},
    }


# -- what comes of it ---------------------------------------------------------------------------------------------------------


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The page's table."""
    lines = [
        "| | " + " | ".join(TEXTS) + " | all four | |",
        "|---|" + "---|" * (len(TEXTS) + 2),
    ]
    for row in rows.values():
        shares = [f"{row['accuracy'][text]:.1%}" for text in TEXTS]
        lines.append(f"| {row['text']} | {' | '.join(shares)} | **{row['mean']:.1%}** | {row['note']} |")
    return "\n".join(lines)


def draw(rows: Mapping[str, Mapping[str, Any]]) -> bytes:
    """The picture: a line per row, a mark per text, the mean over all as a bar."""
    from io import BytesIO

    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.36 * len(rows) + 1.2), layout="constrained")
    axes = figure.subplots()
    names = list(rows)
    axes.barh(names, [rows[name]["mean"] for name in names], color="#c9d7e8", height=0.62, label="all four")
    for text, mark, colour in zip(TEXTS, "osD^", ("#b5442e", "#2e7d4f", "#5b4a9e", "#c08a1e"), strict=True):
        axes.plot([rows[name]["accuracy"][text] for name in names], names, mark, color=colour, label=text, markersize=5)
    axes.invert_yaxis()
    lowest = min(min(rows[name]["accuracy"].values()) for name in names)
    axes.set_xlim(max(0.0, lowest - 0.05), 1.0)
    axes.set_xlabel("share of held-out sentences answered rightly")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=5, frameon=False)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()


def write(rows: dict[str, Any], output: Path, count: int) -> None:
    """The results so far, in the order of ROWS, whole or not at all."""
    order = {row.name: index for index, row in enumerate(ROWS)}
    rows = dict(sorted(rows.items(), key=lambda item: order.get(item[0], len(order))))
    places = ", ".join(f"{name} {version(name)}" for name in ("lorakit", "torch", "transformers"))
    error = 100 * (0.85 * 0.15 / count) ** 0.5
    said = (
        f"{datetime.now(UTC):%Y-%m-%d}, SmolLM2-135M-Instruct, {places}. {TRAIN} sentences of each text to train on and "
        f"{count} held out, rank {RANK}, one epoch, one seed. A standard error is about {error:.1f} points for one text and "
        f"{error / 2:.1f} for all four."
    )
    picture = "![The share of right answers of every row on every text](pictures/bench-compose.png)"
    missing = ", ".join(row.name for row in ROWS if row.name not in rows)
    rest = f"\n\nNot measured yet: {missing}." if missing else ""
    record = {"rows": rows, "markdown": f"{said}\n\n{picture}\n\n{table(rows)}{rest}"}
    material.write_whole(output, (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode())


def main() -> None:
    """Train what is not trained yet, and measure the rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--train-only", action="store_true", help="the trainings and no more")
    parser.add_argument(
        "--rows", nargs="+", metavar="ROW", help="these rows alone: " + ", ".join(row.name for row in ROWS)
    )
    parser.add_argument(
        "--questions", type=int, default=QUESTIONS, help=f"of each text to score (default: {QUESTIONS})"
    )
    parser.add_argument(
        "--each", type=int, default=EACH, help=f"sentences of each text for what learns from all (default: {EACH})"
    )
    parser.add_argument("--output", type=Path, default=RESULTS)
    asked = parser.parse_args()
    unknown = set(asked.rows or ()) - {row.name for row in ROWS}
    if unknown:
        parser.error(f"no row {sorted(unknown)[0]!r}; there are: {', '.join(row.name for row in ROWS)}")
    paths = train_four()
    if asked.train_only:
        trained("all", TEXTS, each=asked.each)
        return
    known: dict[str, Any] = json.loads(asked.output.read_text())["rows"] if asked.output.is_file() else {}
    bench = prepared(paths, asked.questions, asked.each)
    for row in ROWS:
        if asked.rows and row.name not in asked.rows:
            continue
        known[row.name] = measured(bench, row)
        accuracy = ", ".join(f"{text} {share:.1%}" for text, share in known[row.name]["accuracy"].items())
        say(f"{row.name}: {accuracy}; all four {known[row.name]['mean']:.1%} ({known[row.name]['seconds']})")
        write(known, asked.output, asked.questions)
    if asked.output == RESULTS:
        material.write_whole(PICTURE, draw(json.loads(RESULTS.read_text())["rows"]))
    print(json.loads(asked.output.read_text())["markdown"])


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
