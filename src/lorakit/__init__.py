"""lorakit: low-rank adaptation of any torch model. Its public names are listed in `__init__.pyi`, for editors and for Python.

Each is imported when it is first used: importing torch takes seconds, and `lorakit --help` and tools that only ask for the
version should not wait for it.
"""

import re
from importlib import import_module
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

_LISTED = re.findall(
    r"^from (\S+) import (\S+) as", Path(__file__).with_suffix(".pyi").read_text("utf-8"), re.MULTILINE
)
_HOMES = {name: home for home, name in _LISTED}

__all__ = sorted([*_HOMES, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lorakit' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    if _HOMES[name] != "lorakit.errors":
        import_module("lorakit.files.store")  # gives Adapter its `save`
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
