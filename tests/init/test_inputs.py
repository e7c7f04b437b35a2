"""Starts read off the inputs: what is measured, on which tokens; EVA and CorDA."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.config import CordaConfig, EvaConfig
from torch import Tensor, nn

import lorakit as lk
from init.models import llama, matrix, mixed, mixed_batches, start_of, texts
from lorakit.core.layout import Shape
from lorakit.core.sites import sites_of
from lorakit.errors import LorakitError
from lorakit.init import EVA, CorDA, PiSSA, calibration
from lorakit.init.calibration import Matrix, calibrate
from lorakit.init.corda import SecondMoment, damped
from lorakit.init.eva import IncrementalPCA
from lorakit.init.initialiser import Measured, Start


class Kept:
    """A statistic that keeps everything."""

    def __init__(self) -> None:
        self.samples: list[Tensor] = []
        self.calls = 0

    def add(self, samples: Any) -> None:
        self.calls += 1
        self.samples += list(samples)


class Keep(EVA):
    """An initialiser that measures with `Kept`."""

    redistributes = False  # type: ignore[assignment]

    def statistic(self, shape: Shape, rank: int) -> Any:
        return Kept()

    def settled(self, matrices: Any) -> bool:
        return False


def measured(model: nn.Module, paths: list[str], batches: Any, start: Any, **options: Any) -> dict[str, Any]:
    matrices = {
        path: Matrix(model.get_submodule(path), sites_of(model.get_submodule(path))[0], 2, 1.0) for path in paths
    }
    return dict(calibrate(model, matrices, start, batches, **options))


# -- what is measured --------------------------------------------------------------------------------------------------------


def test_inputs_are_what_the_matrix_meets() -> None:
    """For every layer kind W times the inputs is the layer's output without bias."""
    model, batches = mixed(), mixed_batches(2)
    outputs: dict[str, list[Tensor]] = {}
    for path in ("first", "second", "image", "line"):
        module = model.get_submodule(path)
        module.register_forward_hook(lambda m, a, y, path=path: outputs.setdefault(path, []).append(y.detach()))
    found = measured(model, list(outputs) or ["first", "second", "image", "line"], batches, Keep())
    for path, kept in found.items():
        layer = model.get_submodule(path)
        W, y = matrix(model, path), torch.cat(outputs[path][-2:])
        X = torch.stack(kept.samples)
        if isinstance(layer, nn.Conv1d | nn.Conv2d):
            y = (y - layer.bias.reshape(-1, *[1] * (y.ndim - 2))).movedim(1, -1)
            X = X.reshape(*y.shape[:-1], layer.groups, -1)  # positions of every group
            product = torch.einsum("...gi,goi->...go", X, W.reshape(layer.groups, -1, W.shape[1])).flatten(-2)
        else:
            y, product = y - layer.bias, (X @ W.T).reshape(y.shape)
        assert torch.allclose(product, y, atol=1e-12), path


def test_padding_and_prompts_are_left_out() -> None:
    model, batch = llama(), texts(1)[0]
    path = "model.layers.1.mlp.up_proj"
    seen: list[Tensor] = []
    model.get_submodule(path).register_forward_pre_hook(lambda m, args: seen.append(args[0].detach()))
    for start, mask in (
        (Keep(), batch["labels"] != -100),
        (Keep(labelled=False), batch["attention_mask"].bool()),
    ):
        kept = measured(model, [path], [batch], start)[path]
        assert torch.equal(torch.cat(kept.samples), seen[-1][mask])
    unpadded = {"input_ids": batch["input_ids"]}
    kept = measured(model, [path], [unpadded], Keep())[path]
    assert len(torch.cat(kept.samples)) == batch["input_ids"].numel()


def test_flattened_tokens_and_two_masks() -> None:
    """A layer that gets all tokens in one axis; an encoder and a decoder with masks of their own."""
    layout = sites_of(nn.Linear(3, 2))[0].layout
    layer, mask = nn.Linear(3, 2), torch.tensor([[1, 1, 0], [1, 0, 0]])
    flat = torch.randn(6, 3)
    (kept,) = calibration.samples_of(layout, layer, flat, [mask])
    assert torch.equal(kept, flat[mask.flatten().bool()])
    other = torch.tensor([[1, 1, 1], [1, 0, 0]])
    with pytest.raises(LorakitError, match="encoder and decoder"):
        calibration.samples_of(layout, layer, torch.randn(2, 3, 3), [mask, other], "q")
    longer = torch.ones(2, 4)
    assert len(calibration.samples_of(layout, layer, torch.randn(2, 3, 3), [mask, longer])[0]) == 2
    model = SimpleNamespace(config=SimpleNamespace(is_encoder_decoder=True))
    labels = torch.tensor([[5, -100, -100, -100]])
    masks = calibration._masks(model, {"attention_mask": mask, "labels": labels}, True)  # type: ignore[arg-type]
    assert [m.shape for m in masks] == [(2, 3), (1, 4)]
    assert masks[1].tolist() == [[True, False, False, False]]


def test_layers_with_one_input_are_measured_once() -> None:
    """q, k and v share one statistic, gate and up another; a budget of nothing gives the same numbers, set by set."""
    names = [
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
    ]
    paths = [f"model.layers.{block}.{name}" for block in (0, 1) for name in names]
    model, batches = llama(), texts(3)
    found = measured(model, paths, batches, Keep())
    assert len({id(kept) for kept in found.values()}) == 6
    q, k, o = (found[f"model.layers.0.self_attn.{name}_proj"] for name in "qko")
    assert q is k
    assert q is not o
    assert q.calls == 3  # one per batch
    runs = 0

    def count(module: nn.Module, args: Any) -> None:
        nonlocal runs
        runs += 1

    model.register_forward_pre_hook(count)
    few = measured(model, paths, batches, Keep(), budget=0)
    assert runs == 1 + 6 * 3  # one to see who shares; then every set alone
    for path in paths:
        assert all(torch.equal(a, b) for a, b in zip(few[path].samples, found[path].samples, strict=True))


def test_a_layer_called_twice_sees_both_inputs() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.one(self.one(x)) + self.two(x)

    model = Twice()
    found = measured(model, ["one", "two"], [{"x": torch.randn(2, 5, 4)}], Keep())
    assert len(found["one"].samples) == 4
    assert len(found["two"].samples) == 2


def test_inputs_that_are_shared_only_at_first_are_noticed() -> None:
    class Fickle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor, apart: bool) -> Tensor:
            return self.one(x) + self.two(x * 2 if apart else x)

    x = torch.randn(2, 5, 4)
    with pytest.raises(LorakitError, match="two had the same input as one in the first batch and another one later"):
        measured(Fickle(), ["one", "two"], [{"x": x, "apart": False}, {"x": x, "apart": True}], Keep())


def test_the_model_is_left_as_it_was() -> None:
    """Measured without other adapters and without dropout; modes, gradients and hooks come back, also after an error."""
    model = llama()
    first = lk.attach(model, lk.LoRA(rank=2), target_modules=["q_proj"], name="first", init="gaussian")
    for parameter in first.parameters():
        torch.nn.init.normal_(parameter)
    model.train()
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    lk.attach(model, lk.LoRA(rank=2), target_modules=["v_proj"], name="second", init=EVA(rho=1.0), batches=texts())
    fresh = lk.attach(llama(), lk.LoRA(rank=2), target_modules=["v_proj"], init=EVA(rho=1.0), batches=texts())
    own = start_of(lk.adapters(model)["second"])
    assert all(torch.equal(own[path][1], A) for path, (_, A, _) in start_of(fresh).items())
    assert model.training
    assert all(module.training for module in model.modules())
    after = {name.replace(".base.", "."): p.requires_grad for name, p in model.named_parameters()}
    assert {name: after[name.replace(".base.", ".")] for name in before} == before
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    bare = llama().train()
    with pytest.raises(LorakitError):
        lk.attach(
            bare,
            lk.LoRA(rank=2),
            target_modules=["v_proj"],
            init="lora-ga",
            batches=[{"input_ids": torch.ones(1, 3).long()}],
        )
    assert bare.training
    assert all(parameter.requires_grad for parameter in bare.parameters())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in bare.modules())


# -- EVA ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("centred", [True, False])
def test_two_batches_are_as_one(centred: bool) -> None:
    """Without truncation the singular values are those of all rows together (centred, or as they are)."""
    torch.manual_seed(0)
    parts = [torch.randn(n, 9, dtype=torch.float64) + n / 10 for n in (20, 5, 13)]
    found = IncrementalPCA(9, centred)
    for part in parts:
        found.add([part[:3], part[3:]])
    X = torch.cat(parts)
    _U, S, Vh = torch.linalg.svd(X - X.mean(0) if centred else X, full_matrices=False)
    assert torch.allclose(found.S, S, atol=1e-12)
    assert torch.allclose((found.V * Vh).sum(1).abs(), torch.ones(9, dtype=X.dtype), atol=1e-10)
    assert sum(found.shares) == pytest.approx(1.0)
    short = IncrementalPCA(3, centred)
    for part in parts:
        short.add([part])
    assert short.total == pytest.approx(found.total)  # what was cut off still counts as variance


def test_eva_points_where_the_inputs_vary() -> None:
    """A Aᵀ = I, B = 0; the directions are those of the inputs of every layer kind."""
    model, batches = mixed(), mixed_batches(4)
    start = EVA(rho=1.0, cosine=1.0)
    adapter = lk.attach(model, lk.LoRA(rank=3), target_modules=r".+", init=start, batches=batches)
    inputs = measured(mixed(), ["first", "second", "image", "line"], batches, Keep())
    for path, (B, A, _) in start_of(adapter).items():
        X = torch.cat(inputs[path].samples)
        X = X - X.mean(0)
        assert not B.any()
        assert torch.allclose(A @ A.T, torch.eye(3, dtype=A.dtype), atol=1e-10)
        S = torch.linalg.svdvals(X)
        # What three directions can catch of the variance, but for the little that each batch's truncation forgets.
        assert (X @ A.T).square().sum() > 0.95 * S[:3].square().sum(), path


def test_whitened_rows_are_divided_by_the_roots_of_their_sizes() -> None:
    torch.manual_seed(0)
    X = torch.randn(20, 6, dtype=torch.float64)
    found = IncrementalPCA(6)
    found.add([X])
    start = Start("layer", Shape(5, 6), 3, 1.0, X, lambda: X, found)
    A = EVA(whiten=True).factors(start).A
    S = torch.linalg.svdvals(X - X.mean(0))
    assert torch.allclose(A @ A.T, torch.diag(1 / S[:3]), atol=1e-12)


def test_eva_agrees_with_peft() -> None:
    """The same tokens, centred, batch by batch: the same directions, and the same ranks per layer."""
    batches = texts(6, rows=8)
    config = peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=["q_proj", "o_proj", "down_proj"], init_lora_weights="eva",
        eva_config=EvaConfig(rho=2.0, tau=0.99), task_type="CAUSAL_LM",
    )  # fmt: skip
    theirs = peft.get_peft_model(llama(torch.float32), config, low_cpu_mem_usage=True)
    peft.initialize_lora_eva_weights(theirs, batches, show_progress_bar=False)
    ours = llama(torch.float32)
    adapter = lk.attach(
        ours,
        lk.LoRA(rank=3, alpha=6.0),
        target_modules=["q_proj", "o_proj", "down_proj"],
        init=EVA(cosine=0.99),
        batches=batches,
    )
    ranks, similar = {}, []
    for path, (_, A, scale) in start_of(adapter).items():
        module = theirs.base_model.model.get_submodule(path)
        A_theirs = module.lora_A["default"].weight
        ranks[path] = (len(A), len(A_theirs))
        both = min(len(A), len(A_theirs))
        similar += (A[:both] * A_theirs[:both]).sum(1).abs().tolist()
        assert scale == pytest.approx(2.0)
    assert sum(own for own, _ in ranks.values()) == sum(other for _, other in ranks.values()) == 18
    assert all(abs(own - other) <= 1 for own, other in ranks.values()), ranks
    assert sorted(similar)[len(similar) // 4] > 0.9


def test_ranks_follow_variance_and_add_up() -> None:
    """The sum stays, layers come in any order, no layer gets more than rho · rank or than it has, a flat one gets none."""

    def statistic(*values: float, width: int = 8) -> Any:
        found = IncrementalPCA(6)
        found.S = torch.tensor(values).sqrt()
        found.total = sum(values) + 1e-9
        return found

    shape = Shape(8, 8)
    matrices = {
        "a": Measured(shape, 3, 1.0, statistic(90, 5, 2, 1, 1, 1)),
        "b": Measured(shape, 3, 1.0, statistic(30, 25, 20, 15, 10, 0.1)),
        "c": Measured(Shape(2, 8), 3, 1.0, statistic(40, 30, 20, 10)),
        "d": Measured(shape, 3, 1.0, statistic(*[1e-3] * 6)),
    }
    start = EVA(rho=2.0)
    ranks = start.ranks(matrices)
    assert sum(ranks.values()) == 12
    assert ranks == start.ranks(dict(reversed(matrices.items())))
    assert ranks["c"] == 2  # its own size
    assert ranks == {"a": 1, "b": 3, "c": 2, "d": 6}  # by shares of each layer's own variance, not by its size
    assert EVA(rho=1.0).ranks(matrices) == dict.fromkeys("abcd", 3)
    narrow = EVA(rho=1.3).ranks(matrices)
    assert max(narrow.values()) <= 4


@pytest.mark.parametrize("rslora", [False, True])
def test_redistributed_layers(rslora: bool, tmp_path: Any) -> None:
    """Ranks differ, the scale of every layer stays, a layer without a rank has no adapter; files hold that."""

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.many, self.one, self.none = nn.Linear(12, 8), nn.Linear(12, 8), nn.Linear(12, 8)

        def forward(self, x: Tensor) -> Tensor:
            few = x[..., :1] * torch.ones(12, dtype=x.dtype)
            return self.many(x) + self.one(few) + self.none(x + torch.randn_like(x) * 0.01).detach()

    def model() -> nn.Module:
        torch.manual_seed(0)
        return Wide().double()

    torch.manual_seed(1)
    axes = torch.tensor([8, 8, 8, 8, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1]).double()
    batches = [{"x": torch.randn(40, 12, dtype=torch.float64) * axes} for _ in range(4)]
    ours = model()
    method = lk.LoRA(rank=2, alpha=5.0, rslora=rslora)
    adapter = lk.attach(ours, method, target_modules=["many", "one"], init=EVA(rho=2.0), batches=batches, name="mine")
    starts = start_of(adapter)
    assert {path: len(A) for path, (_, A, _) in starts.items()} == {"many": 3, "one": 1}
    assert all(scale == pytest.approx(method.scale) for _, _, scale in starts.values())
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter)
    x = batches[0]["x"]
    torch.manual_seed(5)
    expected = ours(x)
    adapter.save(tmp_path)
    again = model()
    lk.load(again, tmp_path, name="mine", trainable=True)
    torch.manual_seed(5)
    assert torch.allclose(again(x), expected, atol=1e-12)
    theirs = peft.PeftModel.from_pretrained(model(), tmp_path)
    torch.manual_seed(5)
    assert torch.allclose(theirs(x), expected, atol=1e-12)
    alone = model()
    flat = [{"x": x * torch.eye(12, dtype=x.dtype)[0]} for x in (batch["x"] for batch in batches)]
    few = lk.attach(alone, lk.LoRA(rank=1), target_modules=["many", "none"], init=EVA(rho=2.0), batches=flat)
    assert set(few.layers) == {"many", "none"}
    assert sum(len(A) for _, A, _ in start_of(few).values()) == 2


def test_a_layer_without_a_rank_keeps_no_adapter() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(6, 6), "b": nn.Linear(6, 6)}).double()

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = model["a"], model["b"]

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x * torch.tensor([9, 9, 0, 0, 0, 0]).double()) + self.b(x)

    both = Both()
    batches = [{"x": torch.randn(60, 6, dtype=torch.float64)} for _ in range(3)]
    adapter = lk.attach(both, lk.LoRA(rank=1, alpha=2.0), target_modules=["a", "b"], init=EVA(rho=2.0), batches=batches)
    assert list(adapter.layers) == ["a"]
    assert type(both.b) is nn.Linear
    assert len(start_of(adapter)["a"][1]) == 2


def test_eva_stops_when_its_directions_stand_still() -> None:
    torch.manual_seed(0)
    axes = torch.tensor([9.0, 6.0, 4.0, 0.1, 0.1, 0.1])
    batches = [{"input": torch.randn(500, 6) * axes} for _ in range(20)]
    runs = 0

    def count(module: nn.Module, args: Any) -> None:
        nonlocal runs
        runs += 1

    def attached(cosine: float) -> int:
        nonlocal runs
        model, runs = nn.Sequential(nn.Linear(6, 5)), 0
        model.register_forward_pre_hook(count)
        lk.attach(model, lk.LoRA(rank=3), target_modules=["0"], init=EVA(rho=1.0, cosine=cosine), batches=batches)
        return runs

    assert attached(0.9) < attached(0.9999) <= attached(1.0) == 21


def test_eva_says_what_is_missing() -> None:
    model = nn.Sequential(nn.Linear(6, 5))
    with pytest.raises(LorakitError, match=r"needs 3 directions for 0, and the batches gave 2 tokens"):
        lk.attach(
            model, lk.LoRA(rank=3), target_modules=["0"], init=EVA(rho=1.0), batches=[{"input": torch.randn(2, 6)}]
        )
    with pytest.raises(LorakitError, match="inputs vary"):
        lk.attach(model, lk.LoRA(rank=3), target_modules=["0"], init=EVA(), batches=[{"input": torch.ones(9, 6)}])
    with pytest.raises(LorakitError, match="rho was given as"):
        EVA(rho=0.5)


# -- CorDA -------------------------------------------------------------------------------------------------------------------


def given(W: Tensor, C: Tensor | None, rank: int, scale: float = 1.5) -> Start:
    statistic = SecondMoment()
    statistic.total, statistic.count = C, 1
    return Start("layer", Shape(*W.shape), rank, scale, W, lambda: W, statistic)


@pytest.fixture
def W() -> Tensor:
    torch.manual_seed(2)
    return torch.randn(7, 9, dtype=torch.float64)


@pytest.fixture
def C() -> Tensor:
    torch.manual_seed(3)
    X = torch.randn(30, 9, dtype=torch.float64) * torch.linspace(0.3, 2, 9)
    return X.T @ X / 30


def test_corda_is_best_in_its_norm(W: Tensor, C: Tensor) -> None:
    """‖(W - s B A) C̃‖_F² = Σ_{k>r} S_k², the least of any rank-r change; Bᵀ B is diagonal."""
    B, A, _ = CorDA().factors(given(W, C, 3))
    damp, _ = damped(C, 0.01, "")
    S = torch.linalg.svdvals(W @ damp)
    assert ((W - 1.5 * B @ A) @ damp).square().sum() == pytest.approx(float(S[3:].square().sum()))
    assert torch.allclose(B.T @ B, torch.diag(S[:3]) / 1.5, atol=1e-12)


def test_corda_keeps_or_changes(W: Tensor, C: Tensor) -> None:
    """The two modes take disjoint parts: with all of the rank between them they add up to W; at full rank they agree."""
    low = CorDA(mode="instruction").factors(given(W, C, 3))
    high = CorDA(mode="knowledge").factors(given(W, C, 4))
    assert torch.allclose(1.5 * (low.B @ low.A + high.B @ high.A), W, atol=1e-10)
    full = [CorDA(mode=mode).factors(given(W, C, 7)) for mode in ("instruction", "knowledge")]
    assert torch.allclose(full[0].B @ full[0].A, full[1].B @ full[1].A, atol=1e-10)
    assert torch.allclose(1.5 * full[0].B @ full[0].A, W, atol=1e-10)
    with pytest.raises(LorakitError, match="one of instruction, knowledge"):
        CorDA(mode="both")  # type: ignore[arg-type]


def test_corda_of_white_inputs_is_pissa(W: Tensor) -> None:
    start = given(W, torch.eye(9, dtype=W.dtype), 3)
    ours, pissa = CorDA().factors(start), PiSSA().factors(start)
    assert torch.allclose(ours.B @ ours.A, pissa.B @ pissa.A, atol=1e-12)


def test_a_singular_moment_is_damped_until_it_inverts(W: Tensor) -> None:
    x = torch.randn(1, 9, dtype=torch.float64)
    safe, inverse = damped(x.T @ x, 1e-18, "layer")
    assert torch.linalg.matrix_norm(safe @ inverse - torch.eye(9)) < 0.05
    with pytest.raises(LorakitError, match="are they zero"):
        damped(torch.zeros(9, 9), 0.01, "layer")


def test_the_second_moment_is_per_sample() -> None:
    """Each sample is divided by the magnitude of its largest entry, which is not its largest magnitude."""
    one, two = torch.tensor([[-4.0, 2.0], [1.0, 0.0]]), torch.tensor([[3.0, 1.0]])
    moment = SecondMoment()
    moment.add([one])
    moment.add([two, one[:0]])
    assert torch.allclose(moment.mean(), (one.T @ one / 4 + two.T @ two / 9) / 2)


@pytest.mark.parametrize(("mode", "theirs"), [("instruction", "ipm"), ("knowledge", "kpm")])
def test_corda_agrees_with_peft(mode: Any, theirs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sample per batch and no padding, as PEFT's collection has it; the part taken off the base is the same."""
    # Its module takes `dataclass` from attrs, which need not be installed; the standard one does the same there.
    if importlib.util.find_spec("attr") is None:
        monkeypatch.setitem(sys.modules, "attr", SimpleNamespace(dataclass=dataclasses.dataclass))
    from peft.tuners.lora.corda import preprocess_corda

    batches = [{"input_ids": torch.randint(31, (1, 40), generator=torch.Generator().manual_seed(n))} for n in range(6)]
    model = llama(torch.float32)
    originals = {
        path: m.weight.detach().clone() for path, m in model.named_modules() if path.endswith(("q_proj", "up_proj"))
    }
    config = peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=["q_proj", "up_proj"], init_lora_weights="corda",
        corda_config=CordaConfig(corda_method=theirs),
    )  # fmt: skip
    preprocess_corda(model, config, run_model=lambda: [model(**batch) for batch in batches])
    wrapped = peft.get_peft_model(model, config)
    ours = llama(torch.float32)
    method = lk.LoRA(rank=3, alpha=6.0)
    adapter = lk.attach(ours, method, target_modules=["q_proj", "up_proj"], init=CorDA(mode=mode), batches=batches)
    for path, (B, A, s) in start_of(adapter).items():
        residual = wrapped.base_model.model.get_submodule(path).base_layer.weight
        taken = originals[path] - residual
        assert (s * B @ A - taken).norm() < 2e-3 * taken.norm(), path
