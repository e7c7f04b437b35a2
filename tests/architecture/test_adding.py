"""A method is added by one file: a copy of the package gets a new one, and everything that must know of it does."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

METHOD = '''"""Stripes: every row of the weight gets one trained number, added to all of its entries.

    ΔW = strength · v 1ᵀ          v (out,), starts at zero
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lorakit.core.delta import Card, Delta, Method, Pool, Shape
from lorakit.core.options import option


@dataclass(frozen=True, kw_only=True)
class Stripes(Method):
    """The options of Stripes."""

    name: ClassVar[str] = "stripes"
    card: ClassVar[Card] = Card(
        title="Stripes",
        formula="ΔW = strength · v 1ᵀ",
        parameters=lambda shape, spec: shape.out,
        paper="-",
        use="In a test.",
    )

    strength: float = option(2.0, "factor of what is added", above=0, pattern="strength_pattern")

    def build(self, shape: Shape, pool: Pool) -> "StripesDelta":
        return StripesDelta(self, shape, pool)


class StripesDelta(Delta):
    """v of one matrix."""

    def __init__(self, spec: Stripes, shape: Shape, pool: Pool) -> None:
        super().__init__(spec, shape, pool)
        self.strength = spec.strength
        self.v = nn.Parameter(torch.zeros(shape.out))

    def dense(self, W: Tensor) -> Tensor:
        return self.strength * self.v[:, None].expand_as(W)
'''

USE = """
import torch, lorakit as lk
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
adapter = lk.attach(model, lk.Stripes(), target_modules=["0", "1"], patterns={"strength": {"1": 0.5}})
torch.nn.init.normal_(next(adapter.parameters()))
adapter.save("saved")
x = torch.ones(1, 4)
again = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
again.load_state_dict({k.replace(".base", ""): v for k, v in lk.detach(model).state_dict().items()})
loaded = lk.load(again, "saved", name="a")
assert loaded.method == lk.Stripes() and [d.strength for _, _, d in loaded.deltas()] == [2.0, 0.5]
try:
    lk.Stripes(strength=0.0)
except lk.LorakitError as error:
    assert str(error) == "stripes: strength was given as 0.0; it is a number above 0.", error
"""


COMMAND = "import sys; from lorakit.cli import main; sys.exit(main())"


def _with(path: Path, pattern: str, addition: str) -> None:
    """Add text behind the first match of a pattern."""
    text = path.read_text("utf-8")
    found = re.search(pattern, text, re.MULTILINE)
    assert found is not None, f"{path} has no {pattern}"
    path.write_text(text[: found.end()] + addition + text[found.end() :], "utf-8")


def _changed(before: Path, after: Path) -> set[str]:
    """The files of a folder that are new or differ."""
    found = set()
    for path in after.rglob("*"):
        name = path.relative_to(after)
        old = before / name
        if (
            path.is_file()
            and "__pycache__" not in path.parts
            and not (old.is_file() and old.read_bytes() == path.read_bytes())
        ):
            found.add(name.as_posix())
    return found


@pytest.mark.slow
def test_a_method_is_one_file_a_row_and_a_case(tmp_path: Path) -> None:
    """Four files: the method's own, the table, the list of public names, and the laws' examples."""
    for part in ("src/lorakit", "tests/laws", "tests/architecture", "examples"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    for part in ("pyproject.toml", "tests/conftest.py", "tests/parts.py"):
        shutil.copy(ROOT / part, tmp_path / part)
    package = tmp_path / "src/lorakit"
    (package / "methods/stripes.py").write_text(METHOD, "utf-8")
    table = package / "methods/__init__.py"
    _with(
        table,
        r"^from lorakit\.methods\.relora import ReLoRA as ReLoRA\n",
        "from lorakit.methods.stripes import Stripes as Stripes\n",
    )
    _with(table, r"^METHODS: .* = \{\n", '    "stripes": Stripes,\n')
    _with(
        package / "__init__.pyi",
        r"^from lorakit\.methods import ReLoRA as ReLoRA\n",
        "from lorakit.methods import Stripes as Stripes\n",
    )
    _with(tmp_path / "tests/laws/cases.py", r"^SPECS: .* = \{\n", '    "stripes": (lk.Stripes(),),\n')
    assert _changed(ROOT / "src/lorakit", package) == {"methods/stripes.py", "methods/__init__.py", "__init__.pyi"}
    assert _changed(ROOT / "tests/laws", tmp_path / "tests/laws") == {"cases.py"}

    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "src")}

    def run(*command: str) -> str:
        done = subprocess.run([sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        return done.stdout

    run("-c", USE)
    assert "--strength" in run("-c", COMMAND, "train", "--method", "stripes", "--help")
    run(
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--import-mode=importlib",
        "tests/laws/test_laws.py",
        "-k",
        "stripes or every",
    )
    run("-m", "pytest", "-q", "-p", "no:cacheprovider", "--import-mode=importlib", "tests/architecture/test_public.py")
