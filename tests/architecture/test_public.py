"""The public names: one list, whose every name is there, and on which every table's entry is."""

from __future__ import annotations

import dataclasses
import inspect
import re
import subprocess
import sys
from importlib import import_module

import lorakit as lk
from lorakit.core.options import docs
from lorakit.edits import EDITS
from lorakit.experts import MIXTURES, ROUTERS
from lorakit.init import INITIALISERS, Default
from lorakit.methods import METHODS
from lorakit.models.quantisation import FORMATS


def test_every_public_name_is_what_its_home_has() -> None:
    assert len(lk.__all__) > 60
    for name, home in lk._HOMES.items():
        assert getattr(lk, name) is getattr(import_module(home), name), name


def test_everything_in_a_table_is_public() -> None:
    tables = [METHODS, EDITS, MIXTURES, ROUTERS, INITIALISERS]
    for entry in (entry for table in tables for entry in table.values()):
        assert entry is Default or getattr(lk, entry.__name__) is entry


def test_importing_lorakit_imports_nothing_heavy() -> None:
    code = (
        "import sys, lorakit; assert lorakit.__version__ and not {'torch', 'numpy', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_docstring_says_its_arguments_and_errors() -> None:
    """That of a function names each argument, that of a class each field, unless the field's declaration says it."""
    for name in lk._HOMES:
        public = getattr(lk, name)
        if inspect.isfunction(public) and name != "activate":  # `use` without an end
            text, names = inspect.getdoc(public) or "", list(inspect.signature(public).parameters)
            assert "LorakitError" in text or name == "adapters", f"{name} does not say when it raises"
        elif dataclasses.is_dataclass(public):
            text = "\n".join(one.__doc__ or "" for one in inspect.getmro(public) if not _made(one))
            names = [name for name, doc in docs(public).items() if not doc]
        else:
            continue
        missing = [one for one in names if not re.search(rf"\b{one}\b", text)]
        assert not missing, f"the docstring of {name} does not say what {missing} are"


def test_every_option_is_declared_with_one_line() -> None:
    """What `--help` and the pages say of an option stands in its declaration and reads well alone."""
    tables = [METHODS, EDITS, MIXTURES, ROUTERS, INITIALISERS, FORMATS]
    for spec in (entry for table in tables for entry in table.values()):
        for name, doc in docs(spec).items():
            assert doc, f"{spec.__name__}.{name}"
            assert doc == doc.strip().rstrip("."), f"{spec.__name__}.{name}: {doc!r}"
            assert doc.split()[0] in doc.split()[0].lower() + "CD", f"{spec.__name__}.{name}: {doc!r}"
            assert len(doc) < 125, f"{spec.__name__}.{name}: {doc!r} is not one line"


def _made(one: type) -> bool:
    """Whether a class has the docstring that dataclasses make of a signature."""
    return (one.__doc__ or "").startswith(f"{one.__name__}(")
