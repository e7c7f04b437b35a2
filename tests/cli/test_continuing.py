"""`lorakit train --from ADAPTER`: the adapter's method, values and prompt, new data or settings, and where it came from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import lorakit as lk
from lorakit.files.bundle import OWN, TENSORS, read_own
from lorakit.files.prompt import read_prompt
from lorakit.train.config.run import load_config
from lorakit.train.continuing import continued, resolved, source_of

Run = Callable[..., Result]

TEMPLATE = "<user> {prompt} <assistant> {completion}"
STILL = ["--train.learning-rate", "1e-30", "--train.max-steps", "1", "--evaluate.answers", "none"]
"""A step that moves nothing."""


@pytest.fixture(scope="module")
def first(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter with a rank, layers and a template that are not the defaults, started as PiSSA, and its checkpoint."""
    from tests.cli.conftest import call

    out = tmp_path_factory.mktemp("first") / "first"
    words = [
        "--rank",
        "3",
        "--alpha",
        "5",
        "--target-modules",
        "q_proj,down_proj",
        "--init",
        "pissa",
        "--data.template",
        TEMPLATE,
    ]
    words += ["--train.max-steps", "4", "--train.output", str(out), "--evaluate.answers", "none"]
    done = call("train", str(config), *words)
    assert done.exit_code == 0, done.output
    return out


@pytest.fixture
def plain(config: Path, tmp_path: Path) -> Path:
    """The run's file without anything about the adapter."""
    path = tmp_path / "plain.yaml"
    path.write_text(config.read_text().replace("rank: 8\nalpha: 32\n", ""))
    return path


@pytest.mark.parametrize("which", ["adapter", "checkpoint", "PEFT's"])
def test_the_adapter_says_method_layers_values_and_prompt(
    which: str, first: Path, plain: Path, lorakit: Run, tmp_path: Path
) -> None:
    source = first
    if which == "checkpoint":
        source = first / "checkpoints" / "checkpoint-4"
    elif which == "PEFT's":
        source = tmp_path / "peft"
        shutil.copytree(first, source, ignore=shutil.ignore_patterns("checkpoints", OWN))
    out = tmp_path / "out"
    done = lorakit("train", str(plain), "--from", str(source), "--train.output", str(out), *STILL)
    assert done.exit_code == 0, done.output
    before, after = load_file(source / TENSORS), load_file(out / TENSORS)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    then, now = read_prompt(source), read_prompt(out)
    assert then is not None
    assert now is not None
    assert now.same_form(then)
    (ancestor,) = read_own(out)["record"]["lineage"]
    assert ancestor["adapter"] == str(source)
    assert f"`{source}` (sha256 {ancestor['sha256'][:12]}" in (out / "README.md").read_text()
    again = lorakit("train", str(out / "train.yaml"), "--train.output", str(tmp_path / "again"))
    assert again.exit_code == 0, again.output


def test_lineage_is_of_all_that_came_before(first: Path, plain: Path, lorakit: Run, tmp_path: Path) -> None:
    file = tmp_path / "from.yaml"
    file.write_text(plain.read_text() + f"from: {first}\n")
    outs = [tmp_path / "second", tmp_path / "third"]
    assert lorakit("train", str(file), "--train.output", str(outs[0]), *STILL).exit_code == 0
    done = lorakit("train", str(plain), "--from", str(outs[0]), "--train.output", str(outs[1]), *STILL)
    assert done.exit_code == 0, done.output
    lineage = read_own(outs[1])["record"]["lineage"]
    assert [one["adapter"] for one in lineage] == [str(first), str(outs[0])]
    assert [one["steps"] for one in lineage] == [4, 1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--rank", "8"], ("rank is 8", "it has 3")),
        (["--method", "vera"], ("method is vera", "it is lora")),
        (["--target-modules", "attention"], ("target_modules is 'attention'", "down_proj")),
        (["--init", "eva"], ("init is eva", "its values already")),
        (["--from", "nowhere"], ("nowhere is no folder",)),
        (["--bias", "all", "--layers", "1"], ("bias is 'all'", "layers is (1,)")),
    ],
)
def test_contradictions_are_named(
    words: list[str],
    said: tuple[str, ...],
    first: Path,
    plain: Path,
    lorakit: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And before the base's weights are read."""
    monkeypatch.setattr("lorakit.train.run.load_model", None)
    given = words if "--from" in words else ["--from", str(first), *words]
    done = lorakit("train", str(plain), *given, "--train.output", str(tmp_path / "out"))
    assert done.exit_code == 2
    assert all(one in done.stderr for one in said), done.stderr
    assert not (tmp_path / "out").exists()


def test_another_prompt_is_taken_aloud(first: Path, plain: Path, lorakit: Run, tmp_path: Path) -> None:
    words = ["--data.template", "{prompt} <assistant> {completion}", "--train.output", str(tmp_path / "out")]
    done = lorakit("train", str(plain), "--from", str(first), *words, *STILL)
    assert "data.template replaces" in done.output + done.stderr
    prompt = read_prompt(tmp_path / "out")
    assert prompt is not None
    assert prompt.given["template"] == words[1]


def test_only_the_adapter_trains_and_the_base_is_what_it_was(first: Path, plain: Path, base: Path) -> None:
    config = load_config(plain, ["--from", str(first)])
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    untouched = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    source = source_of(config)
    assert source is not None
    adapter = continued(config, model, source)
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert trained == {id(parameter) for parameter in adapter.parameters() if parameter.requires_grad}
    assert trained
    now = {name: tensor for name, tensor in model.state_dict().items() if "lorakit." not in name}
    assert all(torch.equal(untouched[name], now[name]) for name in untouched)
    own = resolved(config, adapter)
    assert (own.method, own.target_modules) == (lk.LoRA(rank=3, alpha=5.0), ("q_proj", "down_proj"))


def test_a_checkpoint_of_the_same_output_is_no_source(first: Path, plain: Path, lorakit: Run) -> None:
    words = ["--from", str(first / "checkpoints" / "checkpoint-4"), "--train.output", str(first), "--overwrite"]
    done = lorakit("train", str(plain), *words)
    assert "--train.resume true" in done.stderr
    assert (first / "checkpoints" / "checkpoint-4").exists()
    assert json.loads((first / OWN).read_text())["record"]["lineage"] == []
