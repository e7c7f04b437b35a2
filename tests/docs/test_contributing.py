"""The guide for adding a method is complete: a method is added in a copy of the repository by its list, and by nothing else."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from docs.conftest import ROOT


def guide(title: str) -> list[str]:
    """The files that a guide lists, in order."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    part = text[text.index(f"### {title}\n") :].partition("\n##")[0]
    return re.findall(r"^\d+\. `([^`]+)`", part, re.MULTILINE)


@pytest.mark.parametrize("title", ["A method", "An edit", "A storage", "Another tool's format", "A router"])
def test_a_guide_counts_its_files(title: str) -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    part = text[text.index(f"### {title}\n") :].partition("\n##")[0]
    numbers = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6}
    said = re.search(r"(\w+) files by hand, (\w+) generated", part)
    assert said is not None
    generated = part.count("(*generated*)")
    assert numbers[said[2]] == generated
    assert numbers[said[1].lower()] == len(guide(title)) - generated
    for file in guide(title):
        assert (ROOT / (str(Path(file).parent) if "NAME" in file else file)).exists(), file


def renamed(text: str) -> str:
    """1LoRA under another name."""
    for old, new in (("OneLoRA", "NewLoRA"), ("onelora", "newlora"), ("1lora", "newlora"), ("1LoRA", "NewLoRA")):
        text = text.replace(old, new)
    return text


def after(path: Path, line: str) -> None:
    """Repeat the only line of a file that has this text, about the new method."""
    lines = path.read_text().splitlines(keepends=True)
    (place,) = [number for number, one in enumerate(lines) if line in one]
    lines.insert(place + 1, renamed(lines[place]))
    path.write_text("".join(lines))


@pytest.mark.slow
def test_a_method_is_added_by_the_files_of_the_guide(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines():
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    environment = os.environ | {"PYTHONPATH": str(copy / "src"), "OMP_NUM_THREADS": "1"}

    def run(*arguments: str) -> str:
        done = subprocess.run(arguments, cwd=copy, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{arguments}\n{done.stdout[-4000:]}\n{done.stderr[-2000:]}"
        return done.stdout

    run("git", "init", "--quiet")
    run(sys.executable, "docs/pages.py")
    run("git", "add", "--all")

    (copy / "src/lorakit/methods/newlora.py").write_text(renamed((copy / "src/lorakit/methods/onelora.py").read_text()))
    (copy / "tests/methods/test_newlora.py").write_text(renamed((copy / "tests/methods/test_onelora.py").read_text()))
    table = copy / "src/lorakit/methods/__init__.py"
    for line in ("import OneLoRA", '"1lora": OneLoRA'):
        after(table, line)
    after(copy / "src/lorakit/__init__.pyi", "import OneLoRA as OneLoRA")
    for line in ("    OneLoRA,", '"1lora": ('):
        after(copy / "tests/laws/cases.py", line)
    after(copy / "benchmarks/quality/settings.py", 'Setting("1LoRA"')
    run(sys.executable, "docs/pages.py")

    status = run("git", "status", "--porcelain", "--untracked-files=all").splitlines()
    changed = {line.split()[-1] for line in status if line[1] != " "}
    assert changed == {file.replace("NAME", "newlora") for file in guide("A method")}
    tests = ["tests/architecture", "tests/benchmarks/test_quality.py", "tests/methods/test_newlora.py"]
    tests += ["tests/laws/test_laws.py", "tests/docs/test_pages.py::test_generated_parts_are_current"]
    chosen = ["-k", "not test_law or newlora", "-m", "not slow", "-p", "no:cacheprovider"]
    run(sys.executable, "-m", "pytest", "-q", "-x", *tests, *chosen)
    assert "newlora" in run(sys.executable, "-m", "lorakit.cli", "methods")
