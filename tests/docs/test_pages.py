"""The pages say what is so: generated parts are current, and the README's Python runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_generated_parts_are_current() -> None:
    done = subprocess.run(
        [sys.executable, "docs/pages.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_readme_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
    assert (tmp_path / "adapters" / "sql" / "adapter_model.safetensors").is_file()


def test_links_lead_somewhere() -> None:
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}, which is not there"


def test_readme_commands_exist() -> None:
    """Every `lorakit VERB` of the README is a verb of the command line."""
    help_text = subprocess.run(
        [sys.executable, "-m", "lorakit.cli", "--help"], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout
    verbs = set(re.findall(r"^lorakit (\w+)", (ROOT / "README.md").read_text(), re.MULTILINE))
    assert verbs
    for verb in verbs:
        assert re.search(rf"\b{verb}\b", help_text), f"the README shows `lorakit {verb}`"
