"""A pytest plugin that runs PEFT's own tests against `lorakit.peft`, on stand-ins of the hub's models.

Names that the shim lacks become objects that skip the test which uses them, so that a file with one of them still runs.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn
from zlib import crc32

import pytest

import lorakit.peft

FOLDER = os.environ["PEFT_TESTS"]
HERE = "lorakit.peft has no "


def _refuse(name: str) -> NoReturn:
    pytest.skip(f"{HERE}{name}")


class _Absent(type):
    """A name that is not there: it may stand in a list of cases and be compared, and skips the test that uses it."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if "PYTEST_CURRENT_TEST" not in os.environ:  # while cases are listed
            return _absent(f"{cls.__name__}()")
        _refuse(cls.__name__)

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _absent(f"{cls.__name__}.{name}")

    def __instancecheck__(cls, one: Any) -> bool:
        # nothing here is of a method that is not here; of other classes the answer would say nothing
        if cls.__name__.endswith(("Config", "Model")):
            return False
        _refuse(cls.__name__)


def _absent(name: str) -> Any:
    refuse: Callable[..., NoReturn] = lambda *_: _refuse(name)  # noqa: E731
    operators = ("__iter__", "__len__", "__getitem__", "__contains__", "__enter__", "__add__", "__lt__", "__gt__")
    return _Absent(name, (), {}) if not name.isupper() else type(name, (), dict.fromkeys(operators, refuse))()


def _named(found: Callable[[str], Any]) -> Callable[[str], Any]:
    """The shim's `__getattr__` that gives PEFT's tests, and only these, something for a name that is not there."""

    def get(name: str) -> Any:
        try:
            return found(name)
        except (AttributeError, ImportError):
            frame: Any = sys._getframe(1)
            while frame is not None and frame.f_globals.get("__name__", "").startswith(
                ("lorakit.peft", "importlib._bootstrap")
            ):
                frame = frame.f_back
            if name in lorakit.peft._MODULES:  # a module, which the import makes next
                raise
            if frame is None or not frame.f_code.co_filename.startswith(FOLDER) or name.startswith("__"):
                raise
            return _absent(name)

    return get


def _installed(module: str) -> Any:
    """A module of the installed PEFT that asks what else is installed, and needs nothing of PEFT."""
    folder = importlib.metadata.distribution("peft").locate_file("peft")
    spec = importlib.util.spec_from_file_location(f"peft.{module}", Path(str(folder)) / f"{module}.py")
    assert spec is not None
    assert spec.loader is not None
    sys.modules[f"peft.{module}"] = found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


sys.modules["peft"] = lorakit.peft
_installed("import_utils")
lorakit.peft.__dict__["__getattr__"] = _named(lorakit.peft.__getattr__)


class _All(dict[str, int]):
    """Every model of the hub counts as fetched already."""

    def __contains__(self, name: object) -> bool:
        return True

    def __missing__(self, name: str) -> int:
        return 1


def _quotes(name: str, *args: Any, **kwargs: Any) -> Any:
    """The two data sets that tests of existing methods use."""
    from datasets import Dataset, DatasetDict
    from PIL import Image

    if "cats-image" in name:
        return {"test": {"image": [Image.new("RGB", (32, 32), (90, 120, 30))]}}
    if "english_quotes" not in name:
        pytest.skip(f"data set {name} of the hub")
    return DatasetDict(train=Dataset.from_dict({"quote": [f"Be yourself, {n} is already taken." for n in range(200)]}))


_WEIGHTS: dict[str, int] = {}
"""File -> how many tests each of its tests that run stands for."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """How much runs, and where the results go."""
    parser.addoption("--share", type=int, default=1, help="of huge files every n-th test, by a hash of its name")


def pytest_configure(config: pytest.Config) -> None:
    """Before any test file is imported: no hub, and no data of it."""
    import datasets

    datasets.load_dataset = _quotes
    sys.path.insert(0, str(Path(FOLDER).parent))
    from tests import testing_utils

    testing_utils._HUB_MODEL_ACCESSES = _All()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The share that was asked for; files of less than a thousand tests run whole."""
    share, sizes = config.getoption("--share"), Counter(one.path for one in items)
    _WEIGHTS.update({one.name: share for one, size in sizes.items() if size >= 1000})
    items[:] = [one for one in items if sizes[one.path] < 1000 or crc32(one.nodeid.encode()) % share == 0]


def _cause(report: Any) -> tuple[str, str]:
    """Message and place of a failure."""
    crash = getattr(report.longrepr, "reprcrash", None)
    message = crash.message if crash is not None else str(report.longrepr)[-400:]
    places = [
        f"{Path(entry.reprfileloc.path).name}:{entry.reprfileloc.lineno}"
        for entry in getattr(getattr(report.longrepr, "reprtraceback", None), "reprentries", [])
        if getattr(entry, "reprfileloc", None)
    ]
    return message, " > ".join(places[-4:])


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report: Any) -> None:
    """One line per test, written by the process that reports."""
    results = os.environ.get("PEFT_SUITE_RESULTS")
    if results is None or "PYTEST_XDIST_WORKER" in os.environ:
        return
    if report.when == "call" or (report.when == "setup" and not report.passed):
        line: dict[str, Any] = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2)}
        line["weight"] = _WEIGHTS.get(Path(report.nodeid.partition("::")[0]).name, 1)
        if hasattr(report, "wasxfail"):
            line["outcome"] = "skipped"
            line["cause"] = f"xfail: {report.wasxfail}"
        elif report.skipped:
            line["cause"] = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        elif report.failed:
            line["cause"], line["place"] = _cause(report)
        with open(results, "a") as file:
            file.write(json.dumps(line) + "\n")
