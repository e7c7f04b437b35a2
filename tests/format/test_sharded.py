"""Adapters of a model that FSDP2 spreads over processes are saved whole."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import lorakit as lk
from lorakit.files.bundle import read_tensors

dist = pytest.importorskip("torch.distributed")


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_dtensors_are_gathered(tmp_path: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    adapter = lk.attach(model, lk.LoRA(rank=2), modules_to_save=["2"], target_modules=["0"])
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    adapter.save(tmp_path / "before")
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    assert all(isinstance(parameter, DTensor) for parameter in adapter.parameters())
    adapter.save(tmp_path / "after")
    before, after = read_tensors(tmp_path / "before"), read_tensors(tmp_path / "after")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
