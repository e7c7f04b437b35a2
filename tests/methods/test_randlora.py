"""RandLoRA: its formula, full rank, and PEFT's files with and without the bases."""

import warnings
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lorakit as lk
from lorakit.errors import LorakitError
from lorakit.files.store import TENSORS, read_tensors
from methods.peft_files import TARGETS, Net, from_peft, to_peft


def attached(**options: object) -> lk.Adapter:
    return lk.attach(Net().double(), lk.RandLoRA(rank=3, **{"alpha": 6.0, **options}), target_modules=TARGETS)


def test_formula():
    """ΔW = s Σ_j B_j diag(λ_j) A_j diag(γ_j), or its transpose where the input is the larger side; B_j's columns are numbered
    as PEFT numbers them: the k-th of all columns, counted pair by pair, meets row k // n of A and pair k % n."""
    adapter = attached()
    A, B = adapter.pool.randlora_A, adapter.pool.randlora_B
    assert A.shape == (3, 1, 16)
    assert B.shape == (16, 6, 3)
    for _, site, delta in adapter.deltas():
        nn.init.normal_(delta.lambda_)
        nn.init.normal_(delta.gamma)
        small, large = sorted((site.layout.shape.out, site.layout.shape.in_))
        n = -(-small // 3)
        columns = B[:large, :n].reshape(large, n * 3)
        expected = torch.zeros(large, small).double()
        for j in range(n):
            own = torch.stack([columns[:, r * n + j] for r in range(3)], dim=1)
            expected += own @ torch.diag(delta.lambda_[:, j]) @ A[:, 0, :small] @ torch.diag(delta.gamma[j])
        expected = 2.0 * (expected if site.layout.shape.out == large else expected.T)
        torch.testing.assert_close(delta.dense(torch.empty(0)), expected)
        assert torch.linalg.matrix_rank(delta.dense(torch.empty(0))) == small


def test_start_and_counts():
    """λ is zero, γ the same everywhere; the bases have deviation 1; a smaller rank trains more."""
    adapter = attached()
    for _, _, delta in adapter.deltas():
        assert not delta.lambda_.any()
        assert (delta.gamma == delta.gamma.flatten()[0]).all()
    assert abs(adapter.pool.randlora_B.std() - 1) < 1e-2
    counts = [3 * (3 + 8), 4 * (3 + 12), 3 * (3 + 8)]
    assert adapter.num_parameters(trainable=True) == sum(counts)
    shape = lk.core.delta.Shape(576, 576)
    count = lk.RandLoRA.card.parameters
    assert count(shape, lk.RandLoRA(rank=16)) > count(shape, lk.RandLoRA(rank=32)) == 18 * (32 + 576)


@pytest.mark.parametrize("basis", ["sparse", "very_sparse"])
def test_ternary_bases(basis: str):
    adapter = attached(basis=basis)
    for tensor in (adapter.pool.randlora_A, adapter.pool.randlora_B):
        values = tensor.unique()
        assert values.numel() == 3
        assert values[1] == 0
        assert values[0] == -values[2]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("basis", ["dense", "sparse", "very_sparse"])
@pytest.mark.parametrize("saved", [True, False])
def test_peft(saved: bool, basis: str, transposed: bool, tmp_path: Path):
    """Their file repeats the bases under every layer, ours has them once or not at all."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a file without bases
        config = peft.RandLoraConfig(
            r=3, target_modules=TARGETS, projection_prng_key=5, save_projection=saved, randlora_alpha=30
        )
    config.sparse, config.very_sparse = basis == "sparse", basis == "very_sparse"
    _, adapter = from_peft(config, tmp_path / "theirs", transposed)
    spec = lk.RandLoRA(rank=3, alpha=30, seed=5, save_projection=saved, basis=basis)
    assert adapter.method == spec
    warned = to_peft(spec, tmp_path / "ours", transposed)
    assert all("randlora_A" in message for message in warned)  # the repeated ones, of which PEFT says they are missing
    bases = [key for key in read_tensors(tmp_path / "ours") if key.endswith(("randlora_A", "randlora_B"))]
    assert sorted(bases) == (["base_model.randlora_A", "base_model.randlora_B"] if saved else [])


def test_bases_that_differ_are_refused(tmp_path: Path):
    from_peft(peft.RandLoraConfig(r=3, target_modules=TARGETS), tmp_path)
    tensors = load_file(tmp_path / TENSORS)
    tensors["base_model.model.second.randlora_B"] = tensors["base_model.model.second.randlora_B"] + 1
    save_file(tensors, tmp_path / TENSORS)
    with pytest.raises(LorakitError, match="one pair of bases"):
        lk.load(Net(), tmp_path)


def test_refusals():
    with pytest.raises(LorakitError, match="basis"):
        lk.RandLoRA(basis="thin")
    with pytest.raises(LorakitError, match="rank"):
        lk.RandLoRA(rank=0)
