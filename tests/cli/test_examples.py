"""The recipes in examples/ are runs that lorakit accepts, and that of an edit trains on the real model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from jsonschema import Draft202012Validator, ValidationError
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from conftest import MODEL
from lorakit.core.options import options_of
from lorakit.edits import EDITS, PromptTuning
from lorakit.errors import LorakitError
from lorakit.experts import ROUTERS
from lorakit.files.table import TABLE
from lorakit.methods import LoRA
from lorakit.train.config.choices import METHOD
from lorakit.train.config.document import dump, parse_document
from lorakit.train.config.run import TrainConfig, load_config, to_tree
from lorakit.train.config.schema import json_schema
from lorakit.train.metrics import pearson

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


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    return json_schema()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_the_schema_takes_a_recipe_and_no_misspelt_key(recipe: Path, schema: dict[str, Any], tmp_path: Path) -> None:
    Draft202012Validator.check_schema(schema)
    validator = Draft202012Validator(schema)
    tree, _ = parse_document(recipe.read_text(), recipe.name)
    validator.validate(tree)
    for wrong in (
        {**tree, "raank": 8},
        {**tree, "train": {**tree["train"], "max_stepz": 3}},
        {**tree, "train": {**tree["train"], "epochs": 0}},
        {**tree, "method": {"name": "lora", "raank": 8}},
        {**tree, "method": "lorra"},
        {**tree, "init": {"name": "pissa", "std": 0.1}},
    ):
        with pytest.raises(ValidationError):
            validator.validate(wrong)
        (tmp_path / "run.yaml").write_text(dump(wrong))
        with pytest.raises(LorakitError):
            load_config(tmp_path / "run.yaml")


def test_the_schema_takes_what_a_run_stores_and_an_option_only_with_its_method(schema: dict[str, Any]) -> None:
    validator = Draft202012Validator(schema)
    small: dict[str, Any] = {"model": "m", "data": {"train": "rows.jsonl"}}
    for name, spec in TABLE.items():
        chosen = {**small, "method": name, **({"adapters": ["a", "b"]} if name in ROUTERS else {})}
        stored = to_tree(TrainConfig(**chosen))
        validator.validate(stored)
        for option in options_of(spec):
            validator.validate({**chosen, option: stored["method"][option]})
        owner = METHOD.reachable(spec)
        for option in ("rank", "first"):
            assert validator.is_valid({**chosen, option: 4}) == (option in owner), (name, option)
    for given in (
        {"method": "dora", "inner": "lokr", "factor": 4},
        {"rank_pattern": {"q_proj": 4}},
        {"quantize": None},
    ):
        validator.validate({**small, **given})
    assert not validator.is_valid({**small, "rank_pattern": {"q_proj": "four"}})


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


@pytest.mark.model
@pytest.mark.slow
def test_ratings_are_learned_predicted_and_merged(tmp_path: Path, lorakit: Callable[..., Result]) -> None:
    """The recipe in a small setting: better than the base, predicted as it was evaluated, the same merged."""
    rows, encoder = MODEL.parent / "ratings", MODEL.parent / "all-MiniLM-L6-v2"
    if not (rows / "held_out.jsonl").exists() or not (encoder / "config.json").exists():
        pytest.skip("the encoder and the ratings are not fetched; `make data` does")
    out, merged, held = tmp_path / "out", tmp_path / "merged", tmp_path / "held.jsonl"
    lines = (rows / "held_out.jsonl").read_text().splitlines(keepends=True)[:100]
    held.write_text("".join(lines))
    short = ["--train.max-steps", "40", "--data.limit", "640", "--train.compile", "off", "--train.precision", "fp32"]
    short += ["--model", str(encoder), "--data.train", str(rows / "train.jsonl"), "--data.evaluation", str(held)]
    done = lorakit("train", str(EXAMPLES / "ratings.yaml"), *short, "--train.output", str(out))
    assert done.exit_code == 0, done.output
    record = json.loads((out / "lorakit.json").read_text())["record"]
    before, after = record["before"], record["after"]
    assert after["loss"] < 0.8 * before["loss"]
    assert after["pearson"] > before["pearson"] + 0.3

    def answers(*arguments: str) -> list[float]:
        given = lorakit("predict", *arguments, str(held), "-o", str(tmp_path / "given.jsonl"), "--overwrite")
        assert given.exit_code == 0, given.output
        return [json.loads(line)["prediction"] for line in (tmp_path / "given.jsonl").read_text().splitlines()]

    labels, found = [json.loads(line)["label"] for line in lines], answers(str(out))
    assert pearson(found, labels) == pytest.approx(after["pearson"], abs=1e-5)
    assert lorakit("merge", str(encoder), str(out), "--output", str(merged)).exit_code == 0
    model: Any = AutoModelForSequenceClassification.from_pretrained(merged).eval()
    tokenizer = AutoTokenizer.from_pretrained(merged)
    asked = tokenizer([json.loads(line)["text"] for line in lines[:8]], return_tensors="pt", padding=True)
    with torch.no_grad():
        whole = model(**asked).logits[:, 0]
    torch.testing.assert_close(whole, torch.tensor(found[:8]), rtol=1e-3, atol=1e-3)
