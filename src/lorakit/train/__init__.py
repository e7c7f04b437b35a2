"""Training: rows to tokens, the fast step, the Trainer around it, evaluation, and what a run leaves behind.

`train(config)` is a whole run; `load_config` reads its YAML file.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorakit.train.config.run import TrainConfig, load_config
    from lorakit.train.run import TrainResult, train

__all__ = ["TrainConfig", "TrainResult", "load_config", "train"]

_PLACES = {"TrainConfig": "config.run", "load_config": "config.run", "TrainResult": "run", "train": "run"}


def __getattr__(name: str) -> Any:
    # Read where it is asked for: a command that only checks a file need not wait for transformers.
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"lorakit.train.{_PLACES[name]}"), name)
