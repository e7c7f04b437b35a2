"""The further methods of PEFT: each formula against a few independent lines, and what each refuses.

PEFT's files, both ways, are in test_peft_files.py, the laws in tests/laws.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit.core.delta import Delta, Method, Pool, Shape
from lorakit.errors import LorakitError
from lorakit.files.formats import UNSUPPORTED, spec_from_peft
from reference.models import MODELS, assert_same, logits, scramble

OUT, IN = 8, 12
Formula = Callable[[Any, Tensor], Tensor]


def _sums(delta: Any, W: Tensor) -> Tensor:
    """ΔW[o, j] = D[j mod rank, o mod columns]"""
    D = delta.D
    return torch.stack([torch.stack([D[j % len(D), o % D.shape[1]] for j in range(IN)]) for o in range(OUT)])


def _bat(delta: Any, W: Tensor) -> Tensor:
    change = torch.zeros_like(W)
    for p, D in enumerate(delta.D):
        rows = slice(4 * p, 4 * p + 4)
        for q in range(IN // 4):
            columns = slice(4 * q, 4 * q + 4)
            change[rows, columns] = W[rows, columns] @ D + D
    return change


def _delora(delta: Any, W: Tensor) -> Tensor:
    pieces = [torch.outer(b / b.norm(), a / a.norm()) for b, a in zip(delta.B.T, delta.A, strict=True)]
    return delta.lam * torch.stack(pieces).mean(0) * W.norm(dim=0)


def _gralora(delta: Any, W: Tensor) -> Tensor:
    change, (A, B) = torch.zeros_like(W), (delta.A, delta.B)
    for j in range(2):
        for n in range(2):
            block = (A[n][:, 2 * j : 2 * j + 2] @ B[j][2 * n : 2 * n + 2]).T
            change[4 * j : 4 * j + 4, 6 * n : 6 * n + 6] = block
    return (change + delta.whole_B @ delta.whole_A) * 3.0 / (4 + 1)


def _hra(delta: Any, W: Tensor) -> Tensor:
    turned = W
    for u in delta.u.T:
        turned = turned - 2 * torch.outer(turned @ u, u) / (u @ u)
    return turned - W


def _hra_orthogonal(delta: Any, W: Tensor) -> Tensor:
    return -2 * W @ delta.u @ torch.linalg.pinv(delta.u)


def _road(delta: Any, W: Tensor) -> Tensor:
    """road_1: output i is turned with output i + 2 of its group of four."""
    R = torch.zeros(OUT, OUT, dtype=W.dtype)
    pairs = [(0, 2), (1, 3), (4, 6), (5, 7)]
    for (i, j), theta, alpha in zip(pairs, delta.theta, delta.alpha, strict=True):
        R[i, i] = R[j, j] = alpha * theta.cos()
        R[j, i] = alpha * theta.sin()
        R[i, j] = -R[j, i]
    return R @ W - W


def _supertuning(delta: Any, W: Tensor) -> Tensor:
    change = torch.zeros_like(W)
    largest = W.abs().flatten().argsort(descending=True)[:9]
    for place, value in zip(largest.tolist(), delta.values, strict=True):
        change[place // IN, place % IN] = value
    return change + 2.0 * delta.B @ delta.A


def _pvera(delta: Any, W: Tensor) -> Tensor:
    """The mean: the first half of λ_d and of A's rows."""
    A, B = delta.pool.pvera_A, delta.pool.pvera_B
    return torch.diag(delta.lambda_b) @ B @ torch.diag(delta.lambda_d[:4]) @ A[:4]


def _waveft(delta: Any, W: Tensor) -> Tensor:
    """Haar's inverse transform: quarters a (means), h, v, d (differences of rows, of columns, of both), each number four
    pixels."""
    F, change = torch.zeros_like(W), torch.zeros_like(W)
    for place, value in zip(delta.places.tolist(), delta.c, strict=True):
        F[place // IN, place % IN] = value
    a, h, v, d = F[:4, :6], F[:4, 6:], F[4:, :6], F[4:, 6:]
    change[0::2, 0::2], change[0::2, 1::2] = a + h + v + d, a + h - v - d
    change[1::2, 0::2], change[1::2, 1::2] = a - h + v - d, a - h - v + d
    return 3.0 * change / 2


def _osf(delta: Any, W: Tensor) -> Tensor:
    """W's own three largest triplets, and what is trained in place of the rest."""
    U, S, V = torch.linalg.svd(W, full_matrices=False)
    strong = U[:, :3] @ torch.diag(S[:3]) @ V[:3]
    return strong + delta.U @ torch.diag(delta.S) @ delta.V - W


def _psoft(delta: Any, W: Tensor) -> Tensor:
    U, S, V = torch.linalg.svd(W, full_matrices=False)
    Q, I = torch.zeros(3, 3, dtype=W.dtype), torch.eye(3, dtype=W.dtype)  # noqa: E741
    Q[[0, 0, 1], [1, 2, 2]] = delta.Q
    Q = Q - Q.T
    R = torch.diag(delta.b) @ (I + Q) @ torch.linalg.inv(I - Q) @ torch.diag(delta.a)
    return U[:, :3] @ torch.diag(S[:3]) @ (R - I) @ V[:3]


def _peanut(delta: Any, W: Tensor) -> Tensor:
    first = torch.relu(delta.A @ W)
    second = torch.relu(delta.E0 @ first)
    return 0.5 * delta.B @ (torch.relu(delta.D0 @ second) + first)


def _deft(delta: Any, W: Tensor) -> Tensor:
    P = delta.P
    return P @ (2.0 * delta.R) - P @ P.clamp_min(0).T @ W


def _tinylora(delta: Any, W: Tensor) -> Tensor:
    U, S, V = torch.linalg.svd(W, full_matrices=False)
    v = delta.pool.get_parameter("tinylora_v.0")
    R = sum(v[i] * delta.P[i] for i in range(3))
    return U[:, :2] @ torch.diag(S[:2].sqrt()) @ R @ torch.diag(S[:2].sqrt()) @ V[:2]


def _unilora(delta: Any, W: Tensor) -> Tensor:
    """Of 2 · (8 + 12) = 40 numbers each of the 16 in θ is read two or three times."""
    read = torch.cat([delta.indices_A.flatten(), delta.indices_B.flatten()]).tolist()
    times = torch.tensor([read.count(i) for i in range(16)])
    assert set(times.tolist()) == {2, 3}
    theta = delta.pool.unilora_theta_d / times.sqrt()
    return theta[delta.indices_B] @ theta[delta.indices_A]


def _glora(delta: Any, W: Tensor) -> Tensor:
    return W * (delta.A_d @ delta.A_u) + delta.B_d @ delta.B_u


CASES: dict[str, tuple[Method, Formula]] = {
    "miss": (lk.MiSS(rank=5), _sums),
    "miss-mini": (lk.MiSS(rank=5, kind="mini", mini=4), _sums),
    "miss-bat": (lk.MiSS(rank=4, kind="bat"), _bat),
    "delora": (lk.DeLoRA(rank=3), _delora),
    "gralora": (lk.GraLoRA(rank=4, hybrid=1, alpha=3.0), _gralora),
    "hra": (lk.HRA(rank=3), _hra),
    "hra-orthogonal": (lk.HRA(rank=3, orthogonal=True), _hra_orthogonal),
    "road": (lk.RoAd(group=4), _road),
    "pvera": (lk.PVeRA(rank=4), _pvera),
    "waveft": (lk.WaveFT(n_frequency=40, scale=3.0), _waveft),
    "osf": (lk.OSF(kept=3), _osf),
    "psoft": (lk.PSOFT(rank=3, alpha=2.0), _psoft),
    "peanut": (lk.PEANuT(rank=3, depth=1, scale=0.5), _peanut),
    "deft": (lk.DEFT(rank=3, alpha=6.0), _deft),
    "tinylora": (lk.TinyLoRA(rank=2, count=3), _tinylora),
    "unilora": (lk.UniLoRA(rank=2, length=16), _unilora),
    "glora": (lk.GLoRA(rank=3), _glora),
    "supertuning": (lk.SuperTuning(sparsity=0.9, rank=2), _supertuning),
}


def filled(spec: Method, W: Tensor) -> Delta:
    """A delta on this weight with random tensors."""
    torch.manual_seed(0)
    shape = Shape(*W.shape)
    pool = Pool([shape])
    delta = spec.build(shape, pool).double()
    pool.double()
    delta.begin(W)
    for parameter in (*delta.parameters(), *pool.parameters()):
        nn.init.normal_(parameter)
    return delta


@pytest.mark.parametrize("name", CASES)
def test_formula(name: str) -> None:
    spec, formula = CASES[name]
    W = torch.randn(OUT, IN, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    delta = filled(spec, W)
    # the decompositions of OSF, PSOFT and TinyLoRA are in float32, as in PEFT
    exact = name not in ("osf", "psoft", "tinylora")
    rtol, atol = (1e-7, 1e-7) if exact else (1e-4, 1e-4)
    torch.testing.assert_close(delta.dense(W), formula(delta, W), rtol=rtol, atol=atol)


def test_reflections_are_orthogonal_and_an_even_number_starts_as_the_base() -> None:
    W = torch.randn(OUT, IN, dtype=torch.float64)
    turned = W + filled(lk.HRA(rank=5), W).dense(W)
    torch.testing.assert_close(turned @ turned.T, W @ W.T)
    specs = (lk.HRA(rank=4), lk.HRA(rank=3), lk.HRA(rank=4, orthogonal=True))
    assert [spec.identity for spec in specs] == [True, False, False]
    for spec in specs:
        change = spec.build(Shape(OUT, IN), Pool()).double().dense(W)
        assert (change.abs().max() < 1e-12) == spec.identity


def test_peft_starts_orthogonal_reflections_from_rounding_noise() -> None:
    """PEFT starts apply_GS from equal pairs too; what is left of the second of a pair after Gram-Schmidt is rounding, which is
    scaled to length 1. A start at the base is impossible (I - 2 Q Qᵀ is never I), so here the directions start apart."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(
            nn.Sequential(nn.Linear(12, 8)), peft.HRAConfig(r=4, apply_GS=True, target_modules=["0"])
        )
    u = theirs.base_model.model[0].hra_u["default"]
    assert torch.equal(u[:, 0], u[:, 1])
    own = lk.HRA(rank=4, orthogonal=True).build(Shape(8, 12), Pool())
    assert torch.linalg.matrix_rank(own.u) == 4


def test_super_tuning_without_indices_finds_its_places_in_the_base(tmp_path: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 8))
    adapter = lk.attach(model, lk.SuperTuning(sparsity=0.9, save_indices=False), target_modules=["0"])
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, 12)
    wanted = model(x)
    adapter.save(tmp_path)
    assert not [key for key in lk.files.store.read_tensors(tmp_path) if "indices" in key]
    lk.detach(model)
    lk.load(model, tmp_path, name="again")
    assert torch.equal(model(x), wanted)


def test_pvera_draws_its_middle_in_training_alone() -> None:
    """The mean of many drawn outputs is the mean's, their deviation λ_b B σ with σ² = exp(second half of λ_d ⊙ A x)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 8)).double()
    adapter = lk.attach(model, lk.PVeRA(rank=3), target_modules=["0"])
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(1, 12).double()
    model.eval()
    mean = model(x)
    assert torch.equal(mean, model(x))
    model.train()
    with torch.no_grad():
        drawn = model(x.expand(40_000, -1))
    ((_, _, delta),) = adapter.deltas()
    B, A = delta.both()
    sigma = ((delta.lambda_d * (x @ A.T))[0, 3:] / 2).exp()
    expected = (B * sigma).square().sum(1).sqrt()
    torch.testing.assert_close(drawn.std(0), expected, rtol=0.03, atol=0)
    assert ((drawn.mean(0) - mean[0]).abs() < 5 * expected / 200).all()


def test_osf_projects_its_gradients_off_the_strong_directions() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 8)).double()
    adapter = lk.attach(model, lk.OSF(kept=3), target_modules=["0"])
    x, towards = torch.randn(5, 12).double(), torch.randn(5, 8).double()
    (model(x) * towards).sum().backward()
    ((_, _, delta),) = adapter.deltas()
    dW = towards.T @ x  # of the whole weight: dU = dW Vᵀ S, less what lies in the strong U
    strong = delta.U_frozen @ delta.U_frozen.T
    expected = (torch.eye(8) - strong) @ dW @ delta.V.T * delta.S
    torch.testing.assert_close(delta.U.grad, expected, rtol=1e-6, atol=1e-6)
    assert (delta.U_frozen.T @ delta.U.grad).abs().max() < 1e-5
    assert (delta.V.grad @ delta.V_frozen.T).abs().max() < 1e-5
    assert delta.U.grad.abs().max() > 1e-3


def test_osf_on_a_preset() -> None:
    """A preset lowers a rank that is above a layer's smaller side; what OSF keeps is a count of another kind."""
    adapter = lk.attach(MODELS["llama"](), lk.OSF())
    assert {delta.S.numel() for _, _, delta in adapter.deltas()} == {6, 12}


def test_tinylora_ties_neighbours() -> None:
    """PEFT's rule: layers in groups of ⌊L / groups⌋, the last group takes the rest."""
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(5)))
    groups = {}
    for tying in (0.0, 0.5, 1.0):
        adapter = lk.attach(model, lk.TinyLoRA(count=3, tying=tying), target_modules=r"\d")
        groups[tying] = [delta.group for _, _, delta in adapter.deltas()]
        assert adapter.num_parameters(trainable=True) == 3 * len(set(groups[tying]))
        lk.detach(model)
    assert groups == {0.0: [0, 1, 2, 3, 4], 0.5: [0, 0, 1, 1, 1], 1.0: [0] * 5}


REFUSALS: list[tuple[Callable[[], Method], str]] = [
    (lambda: lk.MiSS(rank=5, kind="bat"), r"rank 5 does not divide both sides of 0 \(8 × 12\)"),
    (lambda: lk.MiSS(rank=5, kind="mini", mini=3), "mini 3 does not divide the 8 outputs of 0"),
    (lambda: lk.MiSS(rank=13), "rank 13 is above the 12 inputs of 0"),
    (lambda: lk.GraLoRA(rank=6, blocks=3), "blocks 3 does not divide both sides of 0"),
    (lambda: lk.GraLoRA(rank=5, blocks=2), "blocks=2 does not divide rank=5"),
    (lambda: lk.HRA(rank=13), "more directions than the 12 features"),
    (lambda: lk.RoAd(group=6), "group 6 does not divide the 8 outputs of 0; 2, 4, 8 would"),
    (lambda: lk.RoAd(group=3), "an even number"),
    (lambda: lk.WaveFT(wavelet="coif2"), "wavelet was given as 'coif2'; it is db1 to db10"),
    (lambda: lk.WaveFT(), "n_frequency 2592 is above the 96 places"),
    (lambda: lk.OSF(kept=8), "freezes 8 of the 8 singular triplets of 0; 1 to 7"),
    (lambda: lk.OSF(kept=1.5), "a count of triplets, a share below 1"),
    (lambda: lk.PEANuT(activation="mish"), "one of relu, gelu"),
    (lambda: lk.PSOFT(rank=9), "exceeds the maximum useful rank"),
    (lambda: lk.SuperTuning(sparsity=0.999), "leaves none of the 96 entries"),
    (lambda: lk.SuperTuning(alpha=2.0), "there is none without rank"),
]


@pytest.mark.parametrize(("make", "said"), REFUSALS, ids=[said[:30] for _, said in REFUSALS])
def test_refusals(make: Callable[[], Method], said: str) -> None:
    with pytest.raises(LorakitError, match=said):
        lk.attach(nn.Sequential(nn.Linear(12, 8)), make(), target_modules=["0"])


def test_ln_tuning_trains_norms_whole_and_merges() -> None:
    base = MODELS["bert"]()
    before = logits(base, "bert")
    adapter = lk.attach(base, lk.LNTuning())
    norms = [path for path, module in MODELS["bert"]().named_modules() if isinstance(module, nn.LayerNorm)]
    assert list(adapter.layers) == norms
    assert adapter.num_parameters(trainable=True) == len(norms) * 2 * 24
    assert_same(logits(base, "bert"), before)
    scramble(adapter.named_parameters(), size=0.5)
    wanted = logits(base, "bert")
    assert (wanted - before).abs().max() > 1e-3
    with lk.use(base, None):
        assert_same(logits(base, "bert"), before)
    lk.merge(base, adapter.name)
    assert_same(logits(base, "bert"), wanted)


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ({"target_modules": ["LayerNorm"], "exclude_modules": ["embeddings.LayerNorm"], "layers": [1]}, 2),
        ({"target_modules": r".*\.0\..*LayerNorm"}, 2),
        ({"target_modules": ["pooler"]}, 1),
    ],
)
def test_what_ln_tuning_is_given(asked: dict[str, Any], found: int) -> None:
    adapter = lk.attach(MODELS["bert"](), lk.LNTuning(), **asked)
    assert len(adapter.saved) == found


def test_ln_tuning_of_nothing_is_refused() -> None:
    with pytest.raises(LorakitError, match='no module with parameters matches "LayerNrom"'):
        lk.attach(MODELS["bert"](), lk.LNTuning(), target_modules=["LayerNrom"])
    with pytest.raises(LorakitError, match="leaves no module to train; those with parameters end in 0"):
        lk.attach(nn.Sequential(nn.Linear(2, 2)), lk.LNTuning())


def test_the_bias_of_glora() -> None:
    """b + b ∘ D + E + W c"""
    W, b = torch.randn(OUT, IN, dtype=torch.float64), torch.randn(OUT, dtype=torch.float64)
    delta: Any = filled(lk.GLoRA(rank=3), W)
    expected = b * delta.D + delta.E + W @ (delta.C_d @ delta.C_u).flatten()
    torch.testing.assert_close(delta.shift(b, lambda: W), expected)
    assert delta.shift(None, lambda: W) is None
    plain = lk.GLoRA().build(Shape(OUT, IN, bias=False), Pool())
    assert sorted(name for name, _ in plain.named_parameters()) == ["A_d", "A_u", "B_d", "B_u"]


@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_what_is_not_supported_says_why(kind: str, tmp_path: Any) -> None:
    with pytest.raises(LorakitError, match=f"PEFT type {kind} is not supported because "):
        spec_from_peft({"peft_type": kind, "target_modules": ["0"]})
    assert kind in list(peft.PeftType)
