"""The code of the pages: Python runs, commands name verbs and flags that are there, the first five minutes run."""

from __future__ import annotations

import functools
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from docs.conftest import ROOT, blocks, named, sources
from lorakit.cli import app

WITH_PYTHON = [path for path in sources() if any(blocks(path, "python"))]
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.fixture
def own_peft() -> Iterator[None]:
    """PEFT's modules as they are, after a page that puts lorakit.peft in their place."""

    def held() -> dict[str, ModuleType]:
        return {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "peft"}

    before = held()
    yield
    for name in held():
        del sys.modules[name]
    sys.modules.update(before)


@pytest.mark.usefixtures("own_peft")
@pytest.mark.parametrize("path", WITH_PYTHON, ids=named)
def test_python_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks of a page in order, in one namespace; one that says why it is not run is read by the compiler alone."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "__page__"}
    for block in blocks(path, "python"):
        code = compile("\n" * (block.line - 1) + block.text, named(path), "exec")
        if not block.comment.startswith("not run:"):
            exec(code, namespace)
    if path.name in ("README.md", "start.md"):
        assert (tmp_path / "adapters" / "sql" / "adapter_model.safetensors").is_file()


def commands(path: Path) -> list[str]:
    """Every call of lorakit on a page: lines of its blocks, fenced or indented, and code within sentences."""
    text = path.read_text()
    lines = [line for block in blocks(path, "bash") for line in block.text.splitlines()]
    lines += re.findall(r"^    (.*)$", text, re.MULTILINE)
    lines += re.findall(r"`(lorakit [^`\n]+)`", text)
    calls = (re.search(r"(?:^|/|-m )lorakit(?:\.cli)? (.*)", line.partition("  #")[0].strip()) for line in lines)
    return [call[1] for call in calls if call and not re.match(r"VERB|\[", call[1])]


@functools.cache
def verbs() -> dict[str, Any]:
    group: Any = typer.main.get_command(app)
    return dict(group.commands)


@functools.cache
def run_flags() -> set[str]:
    from lorakit.train.config.run import config_fields

    return {option.flag for option in config_fields()}


def flags_of(verb: str) -> set[str]:
    own = {flag for one in verbs()[verb].params for flag in (*one.opts, *one.secondary_opts)} | {"--help", "--debug"}
    if verb == "train":
        own |= {"--schema", "--check", "--from"}
    return own | run_flags() if verb in ("train", "eval") else own


@pytest.mark.parametrize("path", [path for path in sources() if commands(path)], ids=named)
def test_commands_are_there(path: Path) -> None:
    for command in commands(path):
        verb, *rest = shlex.split(command)
        if verb.startswith("-"):
            assert verb in ("--version", "--help", "--debug"), command
            continue
        assert verb in verbs(), f"{named(path)} shows `lorakit {verb}`, which is no verb"
        for flag in rest:
            if re.match(r"--?[a-zA-Z]", flag):
                name = flag.partition("=")[0].replace("_", "-")
                # `init.iterations`, `quantize.skip`: parts of one option
                known = {name, name.rpartition(".")[0], name.replace("--no-", "--")} & flags_of(verb)
                assert known, f"{named(path)} shows `lorakit {verb} {flag}`; the verb has no such flag"


def test_flags_within_sentences_are_there() -> None:
    known = set().union(*(flags_of(verb) for verb in verbs())) | {"--set", "--version"}
    foreign = {
        "--extra-index-url",
        "--hook-type",
        "--lora",
        "--adapter-path",
        "--nproc-per-node",
        "--nnodes",
        "--node-rank",
        "--rdzv-endpoint",
        "--vllm-python",
        "--each",
        "--again",
        "--census",
        "--only",
        "--jinja",
        "--tiny",
    }
    for path in sources():
        for flag in re.findall(r"`(--[a-z][\w.-]*)[^`]*`", path.read_text()):
            name = flag.rpartition(".")[0] if flag not in known else flag
            assert {flag, name} & (known | foreign), f"{named(path)} names {flag}"


@pytest.mark.slow
def test_the_first_five_minutes(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows, the run and the commands of the page, with a tiny model for the real one; but chat and serve, which wait."""
    monkeypatch.chdir(tmp_path)
    page = ROOT / "docs" / "start.md"
    (rows,) = blocks(page, "json")
    (run,) = blocks(page, "yaml")
    Path("rows.jsonl").write_text(rows.text)
    Path("run.yaml").write_text(run.text.replace(MODEL, str(base)) + "\n")
    done = []
    for command in commands(page):
        verb, *arguments = shlex.split(command.replace(MODEL, str(base)))
        if verb in ("chat", "serve") or not arguments:
            continue
        if verb == "train":
            arguments += ["--train.compile", "off", "--train.precision", "fp32"]
        result = CliRunner().invoke(app, [verb, *arguments])
        assert result.exit_code == 0, f"lorakit {command}\n{result.output}"
        done.append(verb)
    assert done[:3] == ["train", "inspect", "generate"]
    assert {"eval", "merge"} <= set(done)
    held = {path.name for path in Path("adapters/yesno").iterdir()}
    assert held >= {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
        "train.yaml",
        "metrics.jsonl",
        "curves.png",
    }
    assert Path("merged/config.json").is_file()
