"""Text generation: the next token of texts, of prompts and completions, of conversations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from lorakit.models.evaluating import evaluating
from lorakit.models.tasks import check_causal
from lorakit.train.data.examples import Prepared, choice_ids, prepare, questions
from lorakit.train.data.rows import Row, Rows
from lorakit.train.data.streaming import streamed
from lorakit.train.evaluate import Evaluation, EvaluationSet, generate_answers, measure
from lorakit.train.step.loss import LossPath
from lorakit.train.step.support import choose_path
from lorakit.train.tasks.contract import Columns, Task

if TYPE_CHECKING:
    from rich.console import Console

    from lorakit.train.config.run import TrainConfig


class CausalLm(Task):
    """Text generation, on packed batches where the model takes them."""

    name = "causal-lm"
    columns: ClassVar[Columns] = {"prompt": ("prompt", "messages", "text", "input_ids", "instruction", "conversations")}
    answer = ("completion",)
    learned = "completions"
    known_by_columns = False

    def learns(self, config: TrainConfig) -> str:
        return "completions only" if config.data.completion_only_loss else "all tokens"

    def check_model(self, model: Any, where: str) -> None:
        check_causal(model, where)

    def prepare(
        self,
        rows: Rows,
        tokenizer: Any,
        config: TrainConfig,
        classes: Sequence[str] | None,
        console: Console | None = None,
        *,
        streaming: bool = False,
        asked: bool = False,
    ) -> Prepared:
        if streaming:
            return streamed(rows, tokenizer, config.data)
        return prepare(rows, tokenizer, config.data, console)

    def path(self, model: Any, config: TrainConfig) -> LossPath:
        return choose_path(model, config.train.fast_path)

    def held(
        self, rows: Rows, tokenizer: Any, config: TrainConfig, classes: Sequence[str] | None, prepared: Prepared
    ) -> EvaluationSet:
        options = config.evaluate
        if options.answers == "none":
            return EvaluationSet(prepared.examples)
        asked = questions(rows, tokenizer, config.data)
        choices = choice_ids(options.choices, rows, tokenizer, config.data) if options.answers == "score" else ()
        stops = prepared.prompt.stop if prepared.prompt is not None else ()
        return EvaluationSet(prepared.examples, asked, choices, tokenizer.convert_tokens_to_ids(list(stops)))

    def examine(
        self, model: Any, tokenizer: Any, held: EvaluationSet, config: TrainConfig, path: LossPath
    ) -> Evaluation:
        with path.opened(model), evaluating(model):
            how: dict[str, Any] = {"batch_size": config.train.evaluation_batch_size, "loss_of": path.loss}
            return measure(model, tokenizer, held, config.evaluate, **how)

    def predict(
        self, model: Any, tokenizer: Any, rows: Rows, config: TrainConfig, classes: Sequence[str] | None
    ) -> list[Any]:
        """Generated answers, as training's evaluation generates them."""
        asked = questions(rows.take([_asked(row) for row in rows.rows]), tokenizer, config.data)
        given = generate_answers(
            model,
            tokenizer,
            [one.prompt_ids for one in asked],
            max_new_tokens=config.evaluate.max_new_tokens,
            batch_size=config.train.evaluation_batch_size,
        )
        return [text.strip() for text in given]


def _asked(row: Row) -> Row:
    """A row whose answer is not known, with a stand-in that the question leaves out."""
    fields = dict(row.fields)
    messages = fields.get("messages")
    if isinstance(messages, list) and messages and messages[-1].get("role") != "assistant":
        fields["messages"] = [*messages, {"role": "assistant", "content": "-"}]
    elif "prompt" in fields and not fields.get("completion"):
        fields["completion"] = "-"
    elif "instruction" in fields and not fields.get("output"):
        fields["output"] = "-"
    return replace(row, fields=fields)
