"""The public names: one list, whose every name is there, and on which every table's entry is."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module

import lorakit as lk
from lorakit.edits import EDITS
from lorakit.experts import MIXTURES, ROUTERS
from lorakit.init import INITIALISERS, Default
from lorakit.methods import METHODS


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
