"""Broken inputs over the verbs: each ends in a message with exit code 2, none in a traceback."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import Result

Run = Callable[..., Result]

CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
NAME = "base_model.model.model.layers.0.self_attn.q_proj"


def adapter(folder: Path, config: str | None = None, tensors: bytes | None = None) -> None:
    folder.mkdir()
    save_file(
        {f"{NAME}.lora_A.weight": torch.ones(2, 24), f"{NAME}.lora_B.weight": torch.ones(24, 2)},
        folder / "adapter_model.safetensors",
    )
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG) if config is None else config)
    if tensors is not None:
        (folder / "adapter_model.safetensors").write_bytes(tensors)


def model(folder: Path, config: str | None, tensors: bytes | None) -> None:
    folder.mkdir()
    if config is not None:
        (folder / "config.json").write_text(config)
    if tensors is not None:
        (folder / "model.safetensors").write_bytes(tensors)


LLAMA = json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]})


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A folder of adapters and models, each broken in one way."""
    adapter(tmp_path / "sound")
    adapter(tmp_path / "truncated", tensors=(tmp_path / "sound/adapter_model.safetensors").read_bytes()[:-20])
    adapter(tmp_path / "zeros", tensors=b"\0" * 40)
    adapter(tmp_path / "empty", tensors=b"")
    adapter(tmp_path / "no-json", config="{not json")
    adapter(tmp_path / "list", config="[1, 2]")
    adapter(tmp_path / "kind", config=json.dumps({**CONFIG, "peft_type": "NOTHING"}))
    adapter(tmp_path / "wrong-type", config=json.dumps({**CONFIG, "r": "two", "target_modules": 5}))
    (tmp_path / "nothing").mkdir()
    (tmp_path / "no-config").mkdir()
    save_file({"x": torch.ones(1)}, tmp_path / "no-config/adapter_model.safetensors")
    adapter(tmp_path / "folder-as-file")
    (tmp_path / "folder-as-file/adapter_model.safetensors").unlink()
    (tmp_path / "folder-as-file/adapter_model.safetensors").mkdir()
    (tmp_path / "file").write_text("text")
    (tmp_path / "bytes.safetensors").write_bytes(b"\xff" * 30)
    (tmp_path / "bytes.gguf").write_bytes(b"\xff" * 30)
    model(tmp_path / "m-json", "{", b"")
    model(tmp_path / "m-type", json.dumps({"model_type": "nothing-known"}), b"")
    model(tmp_path / "m-class", json.dumps({"model_type": "llama", "architectures": ["None"]}), b"\0" * 40)
    model(tmp_path / "m-zeros", LLAMA, b"\0" * 40)
    model(tmp_path / "m-no-weights", LLAMA, None)
    model(tmp_path / "m-list", "[]", None)
    model(tmp_path / "m-index", LLAMA, None)
    (tmp_path / "m-index/model.safetensors.index.json").write_text("{")
    (tmp_path / "bad.yaml").write_text("model: [")
    return tmp_path


ADAPTERS = [
    "truncated",
    "zeros",
    "empty",
    "no-json",
    "list",
    "kind",
    "wrong-type",
    "nothing",
    "no-config",
    "folder-as-file",
]
SILENT = [one for one in ADAPTERS if one not in ("kind", "wrong-type")]  # inspect shows what those say
MODELS = ["m-json", "m-type", "m-class", "m-zeros", "m-no-weights", "m-list", "m-index", "file", "nothing", "missing"]

CASES: list[list[str]] = [
    *(["inspect", one] for one in [*SILENT, "file", "missing", "bytes.safetensors"]),
    *(["scale", one, "2", "--output", "out"] for one in ADAPTERS[3:8]),
    *(["resize", one, "--rank", "1", "--output", "out"] for one in ("zeros", "wrong-type")),
    *(["convert", one, "--to", "kohya"] for one in [*ADAPTERS, "bytes.safetensors", "bytes.gguf"]),
    *(["prune", one, "--keep", "0.5", "--output", "out"] for one in ("truncated", "list")),
    *(["diff", one, "sound"] for one in ("truncated", "no-json", "nothing")),
    *(["combine", one, "sound", "--output", "out"] for one in ("truncated", "kind")),
    *(["extract", one, one, "--rank", "2", "--output", "out"] for one in MODELS),
    *(["plan", one] for one in ("m-json", "m-type", "m-list", "file", "nothing", "./missing")),
    *(["merge", one, "sound", "--output", "out"] for one in MODELS),
    *(["generate", one, "--prompt", "a"] for one in ("m-json", "m-index", "nothing")),
    *(["verify", "sound", "--base", one] for one in ("m-json", "m-zeros")),
    ["train", "bad.yaml"],
    ["train", "nothing"],
    ["train", "missing.yaml"],
    ["eval", "m-list"],
]


def test_every_broken_input_is_refused_in_words(
    broken: Path, lorakit: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(broken)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    wrong = []
    for case in CASES:
        result = lorakit(*case)
        said = result.stderr.strip()
        if result.exit_code != 2 or "Traceback" in result.output or "Usage:" in said or not said:
            wrong.append(f"{' '.join(case)}: exit {result.exit_code}, {said[-300:]}")
    assert not wrong, "\n".join(wrong)
    assert not (broken / "out").exists()
