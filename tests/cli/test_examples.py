"""The recipes in examples/ are runs that lorakit accepts, and that of an edit trains on the real model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from conftest import MODEL
from lorakit.edits import EDITS, PromptTuning
from lorakit.methods import LoRA
from lorakit.train.config.run import load_config

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
RECIPES = sorted(EXAMPLES.glob("*.yaml"))


def test_every_recipe_has_a_page() -> None:
    assert RECIPES
    assert {recipe.with_suffix(".md") for recipe in RECIPES} == set(EXAMPLES.glob("*.md"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_a_recipe_is_accepted_and_so_is_another_method_in_it(recipe: Path) -> None:
    own = load_config(recipe)
    assert isinstance(own.method, LoRA | PromptTuning)
    assert type(load_config(recipe, ["--method", "lora"]).method) is LoRA
    for name, method in EDITS.items() if isinstance(own.method, LoRA) else ():
        assert type(load_config(recipe, ["--method", name]).method) is method


@pytest.mark.model
def test_a_prompt_trains_as_its_recipe_says(tmp_path: Path, lorakit: Callable[..., Result]) -> None:
    rows = MODEL.parent / "reviews"
    short = ["--train.max-steps", "2", "--train.compile", "off", "--evaluate.before-and-after", "false"]
    short += ["--data.limit", "32", "--data.evaluation-limit", "8", "--model", str(MODEL)]
    short += ["--data.train", str(rows / "train.jsonl"), "--data.evaluation", str(rows / "held_out.jsonl")]
    done = lorakit("train", str(EXAMPLES / "prompt-tuning.yaml"), *short, "--train.output", str(tmp_path / "out"))
    assert done.exit_code == 0, done.output
    assert "accuracy" in done.stdout
    seen = lorakit("inspect", str(tmp_path / "out"))
    assert "prompt-tuning" in seen.stdout
    assert "11,520" in seen.stdout
    assert (tmp_path / "out" / "adapter_model.safetensors").stat().st_size < 50_000
