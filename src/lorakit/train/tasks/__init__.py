"""The table of tasks: one file and one row each. Everything that handles runs asks a row, and knows no task by name."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lorakit.errors import LorakitError
from lorakit.models.tasks import task_of_base
from lorakit.train.data.formats import renamed
from lorakit.train.tasks.causal_lm import CausalLm
from lorakit.train.tasks.classification import MultiLabel, PairClassification, Regression, Reranker, TextClassification
from lorakit.train.tasks.contract import PaddedTask, Task
from lorakit.train.tasks.embeddings import Embeddings
from lorakit.train.tasks.masked_lm import MaskedLm
from lorakit.train.tasks.question_answering import QuestionAnswering
from lorakit.train.tasks.seq2seq import Seq2Seq
from lorakit.train.tasks.token_cls import TokenClassification

if TYPE_CHECKING:
    from lorakit.train.config.run import TrainConfig
    from lorakit.train.data.rows import Rows

log = logging.getLogger("lorakit.train")

__all__ = ["TASKS", "PaddedTask", "Task", "check_columns", "settled", "task_of"]

TASKS: dict[str, Task] = {
    one.name: one
    for one in (
        CausalLm(),
        TextClassification(),
        PairClassification(),
        MultiLabel(),
        Regression(),
        TokenClassification(),
        QuestionAnswering(),
        Seq2Seq(),
        MaskedLm(),
        Embeddings(),
        Reranker(),
    )
}


def task_of(config: TrainConfig) -> Task:
    """The task of a run, whose name is settled (`settled`)."""
    return TASKS[config.task]


def settled(config: TrainConfig, base: Any) -> TrainConfig:
    """The run with its task by name: its own, or the one that its base was saved for.

    Args:
        base: transformers' configuration of the base; None where it has none of its own (GGUF).
    """
    if config.task != "auto":
        return config
    found = "causal-lm" if base is None else task_of_base(base)
    if found != "causal-lm":
        log.info("task %s, which the base was saved for", found)
    return config.replace(task=found)


def check_columns(task: Task, rows: Rows, config: TrainConfig, asked: bool = False) -> None:
    """LorakitError where no row has the columns of a task; says which tasks they are for.

    Args:
        asked: rows need no answers.
    """
    if not task.known_by_columns or not rows.rows:
        return
    found = _columns(rows, config)
    if task.fits(found, asked):
        return
    able = [one.name for one in TASKS.values() if one.fits(found, asked)]
    raise LorakitError(
        f"{rows.source}: task {task.name} needs {task.wanted()}; the columns are {', '.join(found) or 'none'}. "
        + (f"These fit task {', '.join(able)}. " if able else "")
        + "Columns of other names are given by data.columns."
    )


def _columns(rows: Rows, config: TrainConfig) -> Sequence[str]:
    """The columns of the first rows, under our names."""
    names = dict[str, None]()
    for row in rows.rows[:100]:
        names |= dict.fromkeys(renamed(row.fields, config.data.of(row.source)))
    return list(names)
