"""Mixtures and routers on the command line: trained, evaluated, looked at, shown; what routes nothing is refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result
from transformers import LlamaForCausalLM

import lorakit as lk
from core.models import randomise

SHORT = ("--data.evaluation-size", "6", "--train.precision", "fp32", "--train.compile", "off", "--train.max-steps", "3")
ASKED = ("--train.batch-size", "4", "--evaluate.answers", "score", "--evaluate.choices", "[yes, no]")
ROUTES = {
    "xlora": ("--top-k", "1", "--layerwise", "false"),
    "mole": ("--balance", "0.3"),
    "mixlora": ("--experts", "3", "--top-k", "2", "--rank", "2"),
}


@pytest.mark.parametrize("kind", ROUTES)
def test_trained_evaluated_looked_at_and_shown(
    kind: str, base: Path, rows: Path, tmp_path: Path, lorakit: Callable[..., Result]
) -> None:
    """The whole way by commands alone: `train` writes it, `eval`, `inspect`, `route` and `generate` read it."""
    torch.manual_seed(0)
    over: tuple[str, ...] = ()
    if kind != "mixlora":
        model = LlamaForCausalLM.from_pretrained(base)
        for name, rank in (("one", 2), ("two", 3)):
            randomise(lk.attach(model, lk.LoRA(rank=rank), name=name))
            lk.adapters(model)[name].save(tmp_path / name, base=str(base))
        over = ("--adapters", f"[{tmp_path / 'one'}, {tmp_path / 'two'}]")
    folder = tmp_path / "mixed"
    run = ("--model", str(base), "--data.train", str(rows), "--method", kind, *ROUTES[kind], *over, *SHORT, *ASKED)
    trained = lorakit("train", *run, "--train.output", str(folder))
    assert trained.exit_code == 0, trained.output
    assert "accuracy" in trained.stdout

    measured = lorakit("eval", str(folder))
    assert measured.exit_code == 0, measured.output
    assert "mixed" in measured.stdout

    seen = lorakit("inspect", str(folder))
    assert seen.exit_code == 0, seen.output
    count = 3 if kind == "mixlora" else 2
    assert f"router {kind} over {count} experts" in seen.stdout
    said = {"xlora": "layerwise False", "mole": "balance 0.3", "mixlora": "top_k 2"}[kind]
    assert said in seen.stdout
    assert "also holds base_model.router" not in seen.stdout
    report = json.loads(lorakit("inspect", str(folder), "--json").stdout)["router"]
    names, ranks = [one["name"] for one in report["experts"]], [one["ranks"] for one in report["experts"]]
    assert (names, ranks) == ((["0", "1", "2"], [[2]] * 3) if kind == "mixlora" else (["one", "two"], [[2], [3]]))
    assert all(one["method"] == "lora" and one["norm"] > 0 for one in report["experts"])
    fresh = LlamaForCausalLM.from_pretrained(base)
    adapter = lk.load(fresh, folder)
    assert report["parameters"] == sum(p.numel() for p in adapter.router.parameters())  # type: ignore[union-attr]

    shown = lorakit("route", str(base), str(folder), "-p", "the film was good")
    assert shown.exit_code == 0, shown.output
    answered = lorakit(
        "generate", str(base), "--adapter", str(folder), "--prompt", "the film was good", "--max-new-tokens", "2"
    )
    assert answered.exit_code == 0, answered.output


def test_an_expert_that_is_gone_is_named(base: Path, tmp_path: Path, lorakit: Callable[..., Result]) -> None:
    model = LlamaForCausalLM.from_pretrained(base)
    for name in ("one", "two"):
        randomise(lk.attach(model, lk.LoRA(rank=2), name=name))
    folder = lk.route(model, lk.Arrow(), ["one", "two"]).save(tmp_path / "routed")
    shutil.rmtree(folder / "experts" / "two")
    result = lorakit("inspect", str(folder))
    assert result.exit_code == 2
    assert "experts/two" in result.stderr


@pytest.mark.parametrize("kind", ["arrow", "xlora", "mixlora"])
def test_shares_and_picture(kind: str, base: Path, tmp_path: Path, lorakit: Callable[..., Result]) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM.from_pretrained(base)
    if kind == "mixlora":
        adapter = lk.attach(model, lk.MixLoRA(experts=3, top_k=2, inner=lk.LoRA(rank=2)))
        randomise(adapter)
    else:
        for name in ("one", "two"):
            randomise(lk.attach(model, lk.LoRA(rank=2), name=name))
        adapter = lk.route(model, {"arrow": lk.Arrow(), "xlora": lk.XLoRA()}[kind], ["one", "two"])
    folder, picture = adapter.save(tmp_path / kind), tmp_path / "picture.png"
    result = lorakit("route", str(base), str(folder), "-p", "the film is good", "-p", "no", "--picture", str(picture))
    assert result.exit_code == 0, result.output
    lines = [line for line in result.stdout.splitlines() if re.match(r"the film is good|no ", line)]
    assert len(lines) == 2
    for line in lines:
        shares = [float(number) for number in re.findall(r"\d\.\d{3}", line)]
        assert len(shares) == (3 if kind == "mixlora" else 2)
        assert sum(shares) == pytest.approx(1.0, abs=2e-3)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_what_routes_nothing_is_refused(base: Path, tmp_path: Path, lorakit: Callable[..., Result]) -> None:
    model = LlamaForCausalLM.from_pretrained(base)
    folder = lk.attach(model, lk.LoRA(rank=2)).save(tmp_path / "plain")
    result = lorakit("route", str(base), str(folder), "-p", "no")
    assert result.exit_code == 2
    assert "(lora) has no router" in result.stderr
