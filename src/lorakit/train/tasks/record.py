"""The task of a trained adapter: what its folder records, for every verb that loads one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorakit.errors import LorakitError, unknown
from lorakit.files.bundle import read_config, read_own
from lorakit.train.config.options import DataOptions, TrainConfig
from lorakit.train.config.run import load_config
from lorakit.train.report import CONFIG
from lorakit.train.tasks import TASKS, Task

_TYPES = {
    "SEQ_CLS": "seq-cls",
    "TOKEN_CLS": "token-cls",
    "QUESTION_ANS": "question-answering",
    "SEQ_2_SEQ_LM": "seq2seq",
}
"""PEFT's task types, for folders that lorakit did not train."""


def recorded(folder: Path, base: str | None = None) -> tuple[Task, TrainConfig, tuple[str, ...] | None]:
    """The task of an adapter, its configuration and the names of its classes.

    Args:
        folder: the adapter.
        base: the base to use in place of the one that it names.

    Raises:
        LorakitError: the adapter names no base, or a task that this version does not know.
    """
    record: dict[str, Any] = read_own(folder).get("record", {})
    own = read_config(folder)
    name = record.get("task") or ("seq-cls" if record.get("classes") else _TYPES.get(str(own.get("task_type"))))
    name = name or "causal-lm"
    if name not in TASKS:
        raise unknown("task", name, TASKS)
    place = base or record.get("base") or own.get("base_model_name_or_path")
    if not place:
        raise LorakitError(f"{folder} does not name its base model; give --base")
    file = folder / CONFIG
    config = (
        load_config(file, []) if file.is_file() else TrainConfig(model=str(place), data=DataOptions(train=str(folder)))
    )
    return TASKS[name], config.replace(model=str(place), task=name), tuple(record.get("classes", ())) or None
