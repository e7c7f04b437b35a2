"""What all tests share: where the real model is, and when a test that needs it may be left out.

Tests marked `model` work on the files that `make data` fetches; no test fetches anything. Without those files
such a test is skipped with a reason, unless LORAKIT_REQUIRE_MODEL is set, as `make test` does: then it fails
instead, so that no run looks complete that was not.
"""

import gc
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import material
from parts import Parts

# Test runs print no progress bars, and ask no network whatever the machine has.
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

MODEL = material.cache_root() / Path(material.MODEL_MEMBER).name
# Floats made from GGUF files are kept beside it, where `make demo` finds them too.
os.environ.setdefault("LORAKIT_CACHE", str(material.cache_root()))


def has_material() -> bool:
    """Whether the model and the four texts are there; their content was checked when they were fetched."""
    texts = [material.cache_root() / "texts" / source.file for source in material.TEXTS.values()]
    return all(path.exists() for path in [MODEL, *texts])


def pytest_addoption(parser: pytest.Parser) -> None:
    """What `make test` asks for."""
    parser.addoption("--parts", action="store_true", help="one line per part (a folder of tests) instead of dots")


def pytest_configure(config: pytest.Config) -> None:
    """Lines per part come from the process that reports, and from no worker."""
    if config.getoption("--parts") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Parts(config))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the model tests where the material is missing and nobody insists."""
    if has_material() or os.environ.get("LORAKIT_REQUIRE_MODEL"):
        return
    for item in items:
        if item.get_closest_marker("model"):
            item.add_marker(pytest.mark.skip(reason="the model is not fetched; `make data` does"))


def pytest_collection_finish() -> None:
    """What has been imported and collected stays: the garbage collector need not look through it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _log_as_before() -> Iterator[None]:
    """Commands send the log to the screen and servers to JSON lines; the next test finds it as it was."""
    loggers = [logging.getLogger(name) for name in ("lorakit", "uvicorn")]
    before = [(list(logger.handlers), logger.propagate, logger.level) for logger in loggers]
    yield
    for logger, (handlers, propagate, level) in zip(loggers, before, strict=True):
        logger.handlers[:], logger.propagate = handlers, propagate
        logger.setLevel(level)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """torch on one thread and from one seed: small numbers come sooner so, and the same in every run."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def model_path() -> Path:
    """The real model's GGUF file."""
    if not has_material():
        pytest.fail(f"{MODEL} or the texts are not there; `make data` fetches them")
    return MODEL


@pytest.fixture(scope="session")
def reviews(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The demo's rows, as the paths of a training and a held-out JSONL file."""
    return material.write_reviews(tmp_path_factory.mktemp("reviews"))


@pytest.fixture
def chat_model(model_path: Path) -> tuple[Any, Any]:
    """The real model, new for each test since adapters change it, and its tokenizer."""
    from lorakit.models.loading import load_model

    return load_model(model_path)
