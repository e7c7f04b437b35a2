"""`lorakit convert`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from click.testing import Result
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import lorakit as lk

Run = Callable[..., Result]


def test_convert_says_what_applies_and_writes(base: Path, lorakit: Run, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    lk.attach(model, lk.LoRA(rank=2), rank_pattern={"up_proj": 1}).save(tmp_path / "a")
    result = lorakit("convert", str(tmp_path / "a"), "--to", "mlx")
    assert result.exit_code == 0, result.output
    assert "dry run: 14 layers from peft to mlx" in result.stdout
    assert result.stderr.splitlines() == [
        "MLX has one scale: 8; in 2 layers of another scale B is multiplied by it",
        "MLX has one rank: 2 layers of a smaller rank filled up with zeros to 2, which changes nothing",
    ], "what applies to this adapter, and none of the format's other limits"
    result = lorakit(
        "convert", str(tmp_path / "a"), "--to", "gguf", "-o", str(tmp_path / "a.gguf"), "--base", str(base)
    )
    assert result.exit_code == 0, result.output
    result = lorakit(
        "convert",
        str(tmp_path / "a.gguf"),
        "--to",
        "loralib",
        "-o",
        str(tmp_path / "b.safetensors"),
        "--base",
        str(base),
    )
    assert result.exit_code == 0, result.output
    assert len(load_file(tmp_path / "b.safetensors")) == 28


def test_convert_refuses_by_name(lorakit: Run, tmp_path: Path) -> None:
    result = lorakit("convert", str(tmp_path / "none"), "--to", "peft", "-o", str(tmp_path / "b"))
    assert result.exit_code == 2
    assert "no such file or folder" in result.stderr
    result = lorakit("convert", str(tmp_path), "--to", "pfet", "-o", str(tmp_path / "b"))
    assert 'did you mean "peft"' in result.stderr
