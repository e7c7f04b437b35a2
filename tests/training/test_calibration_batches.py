"""Informed starts in a run: written in a configuration, measured on the run's own rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import lorakit as lk
from lorakit.errors import LorakitError
from lorakit.train.config.run import TrainConfig, load_config, to_yaml
from lorakit.train.data.calibration_batches import calibration_batches
from lorakit.train.step.packing import pad
from training.tiny import llama, rows


def loaded(folder: Path, init: str) -> TrainConfig:
    path = folder / "run.yaml"
    path.write_text(f"model: m\ndata: {{train: t.jsonl}}\ninit: {init}\n")
    return load_config(path)


@pytest.mark.parametrize(
    ("written", "init"),
    [
        ("pissa", lk.PiSSA()),
        ("{name: pissa, iterations: 4}", lk.PiSSA(iterations=4)),
        ("{name: eva, rho: 1}", lk.EVA(rho=1.0)),
        ("{name: corda, mode: knowledge}", lk.CorDA(mode="knowledge")),
        ("{name: lora-ga, direction: ArBr, iterations: null}", lk.LoRAGA(direction="ArBr", iterations=None)),
        ("{name: loftq, rounds: 5}", lk.LoftQ(rounds=5)),
    ],
)
def test_starts_in_a_configuration(written: str, init: object, tmp_path: Path) -> None:
    config = loaded(tmp_path, written)
    assert config.init == init
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "again.yaml") == config


def test_a_wrong_option_of_a_start_is_named(tmp_path: Path) -> None:
    with pytest.raises(LorakitError, match="ArBB"):
        loaded(tmp_path, "{name: lora-ga, direction: ArBB}")
    with pytest.raises(LorakitError, match=r"pissa has no rho; rho belongs to eva\..*line 3"):
        loaded(tmp_path, "{name: pissa, rho: 2}")


def test_batches_are_padded_training_rows() -> None:
    examples = rows(30)
    start = lk.EVA(examples=20)
    batches = calibration_batches(examples, start, seed=4)
    assert batches is not None
    found = [
        (ids[:length].tolist(), labels[:length].tolist())
        for batch in batches
        for ids, labels, length in zip(batch["input_ids"], batch["labels"], batch["attention_mask"].sum(1), strict=True)
    ]
    known = [(list(example.input_ids), list(example.labels)) for example in examples]
    assert len(found) == 20
    assert all(pair in known for pair in found)
    assert all((batch["labels"][batch["attention_mask"] == 0] == -100).all() for batch in batches)
    again = calibration_batches(examples, start, seed=4)
    assert all(torch.equal(one["input_ids"], two["input_ids"]) for one, two in zip(batches, again or [], strict=True))
    assert calibration_batches(examples, lk.PiSSA()) is None
    few = calibration_batches(examples[:3], start)
    assert few is not None
    assert sum(len(batch["input_ids"]) for batch in few) == 3


@pytest.mark.parametrize("start", [lk.EVA(), lk.CorDA(), lk.LoRAGA()])
def test_a_start_measured_on_training_rows_learns(start: lk.init.Initialiser) -> None:
    examples = rows(24)
    model = llama()
    batch = pad(examples[:16])
    before = model(**batch).loss.item()
    batches = calibration_batches(examples, start)
    adapter = lk.attach(model, lk.LoRA(rank=4, alpha=8.0), init=start, batches=batches)
    assert model(**batch).loss.item() == pytest.approx(before, abs=1e-6)
    optimizer = torch.optim.Adam(adapter.parameters(), lr=3e-3)
    for _ in range(20):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert model(**batch).loss.item() < before - 0.1
