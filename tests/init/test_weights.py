"""Starts read off the weight: PiSSA, MiLoRA, OLoRA, LoftQ; and the random ones."""

from __future__ import annotations

import itertools
import math
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lorakit as lk
from init.models import llama, matrix, mixed, start_of, texts
from lorakit.errors import LorakitError
from lorakit.init import LoftQ, MiLoRA, OLoRA, Orthogonal, PiSSA
from lorakit.init.quantiser import NF4, SimulatedQuantiser

LAYERS = ["first", "second", "image", "line"]


def begun(
    init: Any, model: nn.Module | None = None, **spec: Any
) -> tuple[nn.Module, dict[str, tuple[Tensor, Tensor, float]]]:
    model = model or mixed()
    method = lk.LoRA(**{"rank": 2, "alpha": 3.0, **spec})
    adapter = lk.attach(model, method, target_modules=r".+", init=init)
    return model, start_of(adapter)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("path", LAYERS)
def test_pissa_is_the_principal_part(path: str, rslora: bool) -> None:
    """‖W_res‖₂ = σ_{r+1}; ‖W_res‖_F² = Σ_{k>r} σ_k²; A Aᵀ = Bᵀ B = diag(S_r) / s."""
    model, starts = begun(PiSSA(), rslora=rslora)
    B, A, s = starts[path]
    W = matrix(model, path)
    sigma = torch.linalg.svdvals(W)
    residual = W - s * B @ A
    assert torch.linalg.matrix_norm(residual, 2) == pytest.approx(float(sigma[2]), abs=1e-12)
    assert residual.square().sum() == pytest.approx(float(sigma[2:].square().sum()), abs=1e-12)
    assert torch.allclose(A @ A.T, torch.diag(sigma[:2]) / s, atol=1e-12)
    assert torch.allclose(B.T @ B, torch.diag(sigma[:2]) / s, atol=1e-12)
    assert s == pytest.approx(3 / 2**0.5 if rslora else 1.5)


@pytest.mark.parametrize("path", LAYERS)
def test_milora_is_the_minor_part(path: str) -> None:
    """The residual has the leading singular values, and nothing else."""
    model, starts = begun(MiLoRA())
    B, A, s = starts[path]
    W = matrix(model, path)
    sigma = torch.linalg.svdvals(W)
    left = torch.linalg.svdvals(W - s * B @ A)
    assert torch.allclose(left[:-2], sigma[:-2], atol=1e-12)
    assert left[-2:].max() < 1e-12
    assert torch.allclose(A @ A.T, torch.diag(sigma[-2:]) / s, atol=1e-12)


def test_the_fast_decomposition_finds_the_same_part() -> None:
    """With a spectrum that decays; more iterations come closer. Its width is beyond the rank, so it is exact when small."""
    torch.manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(n, 60, dtype=torch.float64))[0] for n in (90, 70))
    model = nn.Sequential(nn.Linear(70, 90)).double()
    with torch.no_grad():
        model[0].weight.copy_(U @ torch.diag(0.95 ** torch.arange(60, dtype=torch.float64)) @ V.T)
    best = math.sqrt(sum(0.95 ** (2 * k) for k in range(4, 60)))
    errors = []
    for iterations in (0, 1, 4):
        torch.manual_seed(1)
        adapter = lk.attach(model, lk.LoRA(rank=4), target_modules=["0"], init=PiSSA(iterations=iterations))
        B, A, s = start_of(adapter)["0"]
        errors.append(float((matrix(model, "0") - s * B @ A).norm()) / best - 1)
        lk.detach(model)
    assert errors[0] > errors[1] > errors[2] > -1e-12
    assert errors[2] < 1e-4
    with pytest.raises(LorakitError, match=r"iterations was given as -1"):
        PiSSA(iterations=-1)


@pytest.mark.parametrize("path", LAYERS)
def test_olora_is_the_first_columns(path: str) -> None:
    """Bᵀ B = I; A is upper trapezoidal; W[:, :r] lies in span(B); with s = 1 these columns of W_res are zero."""
    model, starts = begun(OLoRA(), alpha=2.0)
    B, A, s = starts[path]
    W = matrix(model, path)
    assert torch.allclose(B.T @ B, torch.eye(2, dtype=B.dtype), atol=1e-12)
    assert A[1, 0] == 0
    assert torch.allclose(B @ B.T @ W[:, :2], W[:, :2], atol=1e-12)
    assert (W - s * B @ A)[:, :2].abs().max() < 1e-12


@pytest.mark.parametrize("name", ["pissa", "olora"])
def test_peft_starts_from_the_same_part(name: str) -> None:
    """PEFT writes W - s B₀A₀ into the base; what it took off is what is taken off here (signs and order are free)."""
    theirs = llama(torch.float32)
    originals = {
        path: module.weight.detach().clone() for path, module in theirs.named_modules() if path.endswith("q_proj")
    }
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj"], init_lora_weights=name, use_rslora=True)
    wrapped = peft.get_peft_model(theirs, config)
    ours = llama(torch.float32)
    method = lk.LoRA(rank=3, alpha=5.0, rslora=True)
    starts = start_of(lk.attach(ours, method, target_modules=["q_proj"], init=name))
    for path, (B, A, s) in starts.items():
        residual = wrapped.base_model.model.get_submodule(path).base_layer.weight
        assert torch.allclose(s * B @ A, originals[path] - residual, atol=2e-6)


def test_peft_s_unconverted_folder_is_refused_with_the_way_out(tmp_path: Any) -> None:
    """It belongs to a base that PEFT has changed; PEFT itself decomposes the base again on loading."""
    config = peft.LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights="pissa")
    peft.get_peft_model(llama(torch.float32), config).save_pretrained(tmp_path)
    with pytest.raises(LorakitError, match="path_initial_model_for_weight_conversion"):
        lk.load(llama(torch.float32), tmp_path)


def test_orthogonal_factors_cancel() -> None:
    """B A = 0, neither is zero, and both get a gradient at once (PEFT's start of this name does the same)."""
    torch.manual_seed(0)
    model, starts = begun(Orthogonal(std=0.3), rank=4, model=nn.Sequential(nn.Linear(400, 300)).double())
    B, A, _ = starts["0"]
    assert (B @ A).abs().max() < 1e-14
    # Q's rows are unit vectors in a space of 4, of which each half mixes 2: the variance is std² · 2 / 4.
    assert A.std() == pytest.approx(0.3 / 2**0.5, rel=0.1)
    assert B.std() == pytest.approx(0.3 / 2**0.5, rel=0.1)
    model(torch.randn(3, 400, dtype=torch.float64)).square().sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in model.parameters() if parameter.requires_grad)


def test_several_shifted_adapters_share_one_base() -> None:
    """Each is about the original base: together they add up, and taking one off leaves the other."""
    model, batch = mixed(), {"x": torch.randn(2, 6, 10, dtype=torch.float64)}
    before = model(**batch)
    lk.attach(model, lk.LoRA(rank=2), name="one", target_modules=["first"], init="pissa")
    lk.attach(model, lk.LoRA(rank=3), name="two", target_modules=["first", "second"], init="olora")
    with lk.use(model, {"one": 1.0, "two": 1.0}):
        assert torch.allclose(model(**batch), before, atol=1e-12)
    lk.merge(model, "two")
    assert torch.allclose(model(**batch), before, atol=1e-12)


# -- LoftQ -------------------------------------------------------------------------------------------------------------------


def test_nf4() -> None:
    """Codes are fixed points, the error is within half a gap of the block's scale, blocks of zeros stay zero."""
    torch.manual_seed(0)
    quantise = SimulatedQuantiser()
    W = torch.randn(256, 512)
    W[0, :64] = 0
    Q = quantise(W)
    assert torch.equal(quantise(Q), Q)
    assert (Q[0, :64] == 0).all()
    assert float((W - Q).norm() / W.norm()) == pytest.approx(0.0920, abs=5e-4)
    gap = max(b - a for a, b in itertools.pairwise(NF4))
    error = (W - Q).flatten().reshape(-1, 64).abs().amax(1)
    assert (error <= quantise.scales(W) * gap / 2 + 1e-6).all()
    odd = torch.randn(3, 7)  # fewer numbers than a block
    assert quantise(odd).shape == odd.shape


@pytest.mark.parametrize("alpha", [4.0, 16.0])
def test_loftq_starts_from_q_and_its_error(alpha: float) -> None:
    """‖W - Q - s B A‖ ≤ ‖W - Q‖, and equals √Σ_{k>r} S_k² of W - Q, whatever the scale is.

    PEFT's and the authors' start misses the division by the scale, so that there it holds for alpha = rank alone."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 40)).double()
    original = model[0].weight
    W, bits = original.detach().clone(), original.detach().clone()
    x = torch.randn(3, 48, dtype=torch.float64)
    before = model(x)
    adapter = lk.attach(model, lk.LoRA(rank=4, alpha=alpha), target_modules=["0"], init=LoftQ(rounds=1))
    B, A, s = start_of(adapter)["0"]
    Q = matrix(model, "0")
    assert torch.equal(Q, SimulatedQuantiser()(W))
    sigma = torch.linalg.svdvals(W - Q)
    assert (W - Q - s * B @ A).norm() == pytest.approx(float(sigma[4:].square().sum().sqrt()), rel=1e-10)
    assert (W - Q - s * B @ A).norm() < (W - Q).norm()
    with lk.use(model, "default"):
        assert torch.allclose(model(x), x @ (Q + s * B @ A).T + model[0].bias, atol=1e-12)
    with lk.use(model, None):
        assert torch.allclose(model(x), x @ Q.T + model[0].bias, atol=1e-12)
    lk.detach(model)
    assert model[0].weight is original
    assert torch.equal(original, bits)
    assert torch.equal(model(x), before)


def loftq_error(W: Tensor, rounds: int) -> float:
    model = nn.Sequential(nn.Linear(W.shape[1], W.shape[0])).double()
    with torch.no_grad():
        model[0].weight.copy_(W)
    adapter = lk.attach(model, lk.LoRA(rank=4), target_modules=["0"], init=LoftQ(rounds=rounds))
    B, A, s = start_of(adapter)["0"]
    return float((W - matrix(model, "0") - s * B @ A).norm())


def test_more_rounds_of_loftq_are_never_worse() -> None:
    """The best round is kept; round by round the error may rise, as the scales are taken anew (methods: not monotone)."""
    risen = 0
    for seed in range(6):
        torch.manual_seed(seed)
        W = torch.randn(24, 32, dtype=torch.float64)
        errors = [loftq_error(W, rounds) for rounds in range(1, 7)]
        assert all(later <= earlier for earlier, later in itertools.pairwise(errors))
        assert errors[0] < float((W - SimulatedQuantiser()(W)).norm())
        risen += sum(later == earlier for earlier, later in itertools.pairwise(errors))
    assert risen > 0  # so that keeping the best is needed


def test_with_fixed_scales_every_round_is_better() -> None:
    """Both steps are then exact minimisers over the same sets."""
    for seed in range(6):
        torch.manual_seed(seed)
        W = torch.randn(24, 32, dtype=torch.float64)
        quantise = SimulatedQuantiser()
        scales, answer, errors = quantise.scales(W), torch.zeros_like(W), []
        for _ in range(6):
            Q = quantise(W - answer, scales)
            U, S, Vh = torch.linalg.svd(W - Q)
            answer = (U[:, :4] * S[:4]) @ Vh[:4]
            errors.append(float((W - Q - answer).norm()))
        assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(errors))


def test_loftq_under_dora_conv1d_and_parts() -> None:
    """Magnitudes are those of Q + s B A; a Conv1D's weight is written transposed; rows of no part keep theirs."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"linear": nn.Linear(16, 12), "turned": Conv1D(12, 16), "fused": nn.Linear(16, 12)}).double()
    kept = model["fused"].weight.detach().clone()
    W = model["turned"].weight.detach().clone()
    adapter = lk.attach(
        model, lk.DoRA(inner=lk.LoRA(rank=2)), target_modules=["linear", "turned"], init="loftq", name="one"
    )
    for path, _, delta in adapter.deltas():
        B, A, s = start_of(adapter)[path]
        assert torch.allclose(delta.m, (matrix(model, path) + s * B @ A).norm(dim=1), atol=1e-12)
    assert torch.equal(matrix(model, "turned"), SimulatedQuantiser()(W.T))
    with pytest.raises(LorakitError, match=r"replaces the base's weights, and there are adapters .*: one"):
        lk.attach(model, lk.LoRA(rank=2), target_modules=["fused"], init="loftq", name="two")
    lk.attach(model, lk.LoRA(rank=2), target_modules=["linear"], name="two")
    with pytest.raises(LorakitError, match="Detach these first, or all at once"):
        lk.detach(model, "one")
    lk.detach(model)
    assert torch.equal(model["turned"].weight, W)
    parts = {"fused": {"q": (0, 5), "v": (7, 12)}}
    lk.attach(model, lk.LoRA(rank=2), target_modules=["fused"], parts=parts, init="loftq")
    Q = matrix(model, "fused")
    assert torch.equal(Q[5:7], kept[5:7])
    assert torch.equal(Q[:5], SimulatedQuantiser()(kept[:5]))
    assert torch.equal(Q[7:], SimulatedQuantiser()(kept[7:]))


def test_a_merged_loftq_stays_merged() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 12)).double()
    x = torch.randn(3, 16, dtype=torch.float64)
    lk.attach(model, lk.LoRA(rank=2), target_modules=["0"], init="loftq")
    acted = model(x)
    lk.merge(model, "default")
    assert torch.allclose(model(x), acted, atol=1e-12)


def test_a_file_begun_by_loftq_needs_its_base(tmp_path: Any) -> None:
    model, batch = llama(), texts(1)[0]
    adapter = lk.attach(model, lk.LoRA(rank=2), target_modules=["q_proj"], init=LoftQ(rounds=2), name="mine")
    adapter.save(tmp_path)
    with pytest.raises(LorakitError, match="another base model"):
        lk.load(llama(), tmp_path)
    logits = model(**batch).logits
    lk.load(model, tmp_path, name="again")
    with lk.use(model, "again"):
        assert torch.equal(model(**batch).logits, logits)
