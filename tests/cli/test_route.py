"""`lorakit route`: shares per prompt that sum to one, a picture, and what routes nothing is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result
from transformers import LlamaForCausalLM

import lorakit as lk
from core.models import randomise


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
    assert "(lora) routes nothing" in result.stderr
