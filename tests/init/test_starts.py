"""All initialisers alike: nothing changes at the start, every method and layer kind takes them, files hold them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import lorakit as lk
from init.models import llama, mixed, mixed_batches, start_of, texts, train
from lorakit.core.offset import Offset
from lorakit.errors import LorakitError
from lorakit.files.store import TENSORS
from lorakit.init import EVA, INITIALISERS, CorDA, Initialiser, LoftQ, LoRAGA, PiSSA

METHODS = {
    "lora": lk.LoRA(rank=2, alpha=3.0),
    "rslora": lk.LoRA(rank=2, alpha=3.0, rslora=True),
    "lora-fa": lk.LoRAFA(rank=2, alpha=3.0),
    "dora": lk.DoRA(inner=lk.LoRA(rank=2, alpha=3.0)),
}
STARTS = [name for name in INITIALISERS if name != "loftq"]  # which changes the base
SHIFTED = [name for name in STARTS if INITIALISERS[name].shifts]


def options(start: str | Initialiser, batches: Any) -> dict[str, Any]:
    needs = start.needs if isinstance(start, Initialiser) else INITIALISERS[start].needs
    return {"init": start, **({"batches": batches} if needs in ("inputs", "gradients") else {})}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("start", STARTS)
def test_the_model_starts_as_its_base(start: str, method: str) -> None:
    """Linear, Conv1D and grouped convolutions; a shifted start is taken off exactly."""
    model, batch = mixed(), mixed_batches(1)[0]
    before = model(**batch)
    adapter = lk.attach(model, METHODS[method], target_modules=r".+", **options(start, mixed_batches()))
    after = model(**batch)
    if start in SHIFTED and method != "dora":  # DoRA multiplies by m / m
        assert torch.equal(after, before)
    assert torch.allclose(after, before, rtol=0, atol=1e-12)
    train(adapter)
    assert not torch.allclose(model(**batch), before, atol=1e-4)


@pytest.mark.parametrize("start", STARTS)
def test_something_learns_from_the_first_step(start: str) -> None:
    model = mixed()
    adapter = lk.attach(model, lk.LoRA(rank=2), target_modules=r".+", **options(start, mixed_batches()))
    model(**mixed_batches(1)[0]).backward()
    for path, _, _ in adapter.deltas():
        own = [p.grad for name, p in adapter.named_parameters() if name.startswith(path)]
        assert any(gradient is not None and gradient.abs().max() > 0 for gradient in own), path


def test_the_offset_trains_as_a_residual_base_does() -> None:
    """y = (W - s B₀A₀ + s B A) x: the same values and gradients as with the start taken off the weight itself."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5)).double()
    x = torch.randn(4, 7, dtype=torch.float64)
    W, b = model[0].weight.detach().clone(), model[0].bias.detach().clone()
    adapter = lk.attach(model, lk.LoRA(rank=2, alpha=3.0), target_modules=["0"], init="pissa")
    B0, A0, s = start_of(adapter)["0"]
    B0, A0 = B0.clone(), A0.clone()
    train(adapter)
    B, A, _ = start_of(adapter)["0"]
    B, A = B.clone().requires_grad_(), A.clone().requires_grad_()
    expected = x @ (W - s * B0 @ A0 + s * B @ A).T + b
    found = model(x)
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)
    expected.square().sum().backward()
    found.square().sum().backward()
    gradients = {name.rpartition(".")[2]: p.grad for name, p in adapter.named_parameters()}
    assert torch.allclose(gradients["B"], B.grad, atol=1e-11)
    assert torch.allclose(gradients["A"], A.grad, atol=1e-11)


def test_a_small_step_is_not_lost_in_bfloat16() -> None:
    """A moves by less than its rounding in bfloat16; the output moves all the same."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 24, bias=False)).bfloat16()
    adapter = lk.attach(model, lk.LoRA(rank=4, alpha=4.0), target_modules=["0"], init="pissa")
    (delta,) = [delta for _, _, delta in adapter.deltas()]
    assert isinstance(delta, Offset)
    step = torch.randn_like(delta.inner.A) * 2**-12 * delta.inner.A.abs().mean()
    with torch.no_grad():
        delta.inner.A += step
    x = torch.randn(8, 32).bfloat16()
    B, A = delta.factors()
    change = (x.float() @ A.T) @ B.T * delta.scale
    assert torch.allclose(change, x.float() @ step.T @ delta.inner.B.T, rtol=1e-2, atol=1e-6)
    narrow = (x @ A.bfloat16().T) @ B.bfloat16().T
    assert (narrow.float() - change).norm() < 0.02 * change.norm()


# -- files -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("start", SHIFTED)
def test_saved_as_an_exact_plain_lora_for_the_original_base(start: str, method: str, tmp_path: Path) -> None:
    """PEFT loads the file on the original base with the same logits; lorakit restores both halves and trains on."""
    model, batch = llama(), texts(1)[0]
    adapter = lk.attach(
        model, METHODS[method], target_modules=["q_proj", "down_proj"], name="mine", **options(start, texts())
    )
    train(adapter)
    logits = model(**batch).logits
    adapter.save(tmp_path)

    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path)
    assert torch.allclose(theirs(**batch).logits, logits, atol=1e-10)
    assert theirs.peft_config["default"].r == 4

    plain = lk.load(llama(), tmp_path)
    state, restored = adapter.state_dict(), plain.state_dict()
    assert set(state) == set(restored)
    assert all(torch.equal(state[name], restored[name]) for name in state)
    again = llama()
    loaded = lk.load(again, tmp_path, trainable=True)
    assert torch.equal(again(**batch).logits, logits)
    trained = {name for name, p in loaded.named_parameters() if p.requires_grad}
    assert trained == {name for name, p in adapter.named_parameters() if p.requires_grad}
    again(**batch).loss.backward()
    model.zero_grad()
    model(**batch).loss.backward()
    ours = dict(adapter.named_parameters())
    for name, parameter in loaded.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter.grad, ours[name].grad)


def test_a_converted_adapter_is_nothing_at_the_start(tmp_path: Path) -> None:
    """s' B' A' = s (B A - B₀ A₀): zero before training, of rank 2r after it; with rsLoRA alpha grows by √2, else by 2."""
    for method, factor in ((METHODS["lora"], 2.0), (METHODS["rslora"], 2.0**0.5)):
        model = mixed()
        adapter = lk.attach(model, method, target_modules=["first"], init="pissa", name="mine")
        folder = adapter.save(tmp_path / str(factor))
        tensors = load_file(folder / TENSORS)
        A, B = (next(t for key, t in tensors.items() if f"lora_{letter}" in key) for letter in "AB")
        assert A.shape[0] == B.shape[1] == 4
        assert (B @ A).abs().max() < 1e-12
        config = lk.files.store.read_config(folder)
        assert config["r"] == 4
        assert config["lora_alpha"] == pytest.approx(3.0 * factor)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_parts_of_a_fused_layer(start: str, tmp_path: Path) -> None:
    def model() -> nn.Module:
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(9, 12)).double()

    x = torch.randn(3, 9, dtype=torch.float64)
    fused = model()
    before = fused(x)
    parts = {"0": {"q": (0, 5), "v": [(6, 8), (9, 12)]}}
    adapter = lk.attach(fused, lk.LoRA(rank=2), target_modules=["0"], parts=parts, init=start, name="mine")
    assert torch.equal(fused(x), before)
    train(adapter)
    after = fused(x)
    adapter.save(tmp_path)
    theirs = peft.PeftModel.from_pretrained(model(), tmp_path)
    assert torch.allclose(theirs(x), after, atol=1e-12)
    again = model()
    lk.load(again, tmp_path, name="mine", trainable=True)
    assert torch.allclose(again(x), after, atol=1e-12)
    assert all(torch.equal(t, lk.adapters(again)["mine"].state_dict()[n]) for n, t in adapter.state_dict().items())


def test_embeddings_start_from_their_weight() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(20, 6)).double()
    ids = torch.randint(20, (3, 4))
    before = model(ids)
    adapter = lk.attach(model, lk.LoRA(rank=2), target_modules=["0"], init="pissa")
    assert torch.equal(model(ids), before)
    B, A, s = start_of(adapter)["0"]
    E = model[0].base.weight.detach()
    assert torch.linalg.matrix_norm(E.T - s * B @ A, 2) == pytest.approx(float(torch.linalg.svdvals(E)[2]))


# -- what is refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"init": "eva"},
            r"init='eva' measures the inputs .* no batches were given; give batches=\[…\], .*model\(\*\*batch\)",
        ),
        ({"init": "lora-ga"}, "arguments with labels"),
        ({"init": "corda", "batches": []}, "batches is empty"),
        ({"init": "eva", "batches": {"x": torch.zeros(1)}}, "batches was given as dict; it is a list of batches"),
        ({"init": "eva", "batches": [torch.zeros(1)]}, "batches holds a Tensor"),
        ({"init": "pisa"}, 'unknown init "pisa"; did you mean "pissa"'),
        ({"init": "pissa", "method": lk.LoRA(rank=2, alpha=0.0)}, "alpha above 0"),
        ({"init": "orthogonal", "method": lk.LoRA(rank=3)}, "give an even rank"),
        ({"init": "lora-ga", "batches": [{}], "method": lk.LoRA(rank=7)}, "a rank of at most 5"),
    ],
)
def test_refused_with_the_model_untouched(given: dict[str, Any], message: str) -> None:
    model = mixed()
    method = given.pop("method", lk.LoRA(rank=2))
    with pytest.raises(LorakitError, match=message):
        lk.attach(model, method, target_modules=["first"], **given)
    assert not hasattr(model, "_lorakit")
    assert type(model.first) is nn.Linear


@pytest.mark.parametrize("method", ["loha", "ia3"])
def test_a_method_without_factors_names_those_that_have_them(method: str) -> None:
    spec: Any = lk.methods.METHODS[method]
    model = llama()
    targets = {"target_modules": ["k_proj", "down_proj"]}
    with pytest.raises(
        LorakitError, match=r"no low-rank factors .*init='pissa'.*Methods that have them: lora, lora-fa, dora"
    ):
        lk.attach(
            model, spec(**({"feedforward_modules": ["down_proj"]} if method == "ia3" else {})), init="pissa", **targets
        )


def test_layers_that_cannot_be_measured() -> None:
    words = nn.Sequential(nn.Embedding(10, 6))
    with pytest.raises(LorakitError, match="one-hot"):
        lk.attach(words, lk.LoRA(rank=2), target_modules=["0"], init="eva", batches=[{"input": torch.tensor([1])}])
    attention = nn.ModuleDict({"a": nn.MultiheadAttention(8, 2)})
    with pytest.raises(LorakitError, match="substitution only"):
        lk.attach(attention, lk.LoRA(rank=2), target_modules=["a"], init="lora-ga", batches=[{}])


def test_a_layer_that_no_batch_reaches() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.never = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x).sum()

    batches = [{"x": torch.randn(9, 6)}]
    for start in (LoRAGA(), EVA(rho=1.0), CorDA()):
        with pytest.raises(LorakitError, match="never"):
            lk.attach(Unused(), lk.LoRA(rank=2), target_modules=["used", "never"], init=start, batches=batches)


def test_gradients_need_a_loss() -> None:
    batch = {key: value for key, value in texts(1)[0].items() if key != "labels"}
    with pytest.raises(LorakitError, match="put labels in the batches"):
        lk.attach(llama(), lk.LoRA(rank=2), target_modules=["q_proj"], init="lora-ga", batches=[batch])


def test_names_of_the_table() -> None:
    assert all(INITIALISERS[name].name == name for name in INITIALISERS)
    assert lk.init.initialiser("pissa") == PiSSA()
    with pytest.raises(LorakitError, match='unknown quantiser "nf3"; did you mean "nf4"'):
        LoftQ(quantiser="nf3")


@pytest.mark.parametrize("start", [*SHIFTED, "eva", "orthogonal"])
@pytest.mark.parametrize("spec", [lk.AdaLoRA(rank=2), lk.ElaLoRA(rank=2), lk.DyLoRA(rank=3), lk.ReLoRA(rank=2)])
def test_methods_whose_ranks_change(spec: Any, start: str, tmp_path: Path) -> None:
    """They start from any factors too, and their files give the same function: with both halves while ranks are as they
    were, else as one product."""
    if start == "orthogonal" and spec.rank % 2:
        return
    given: Any = EVA(rho=1.0) if start == "eva" else start
    model, batch = mixed(), mixed_batches(1)[0]
    before = model(**batch)
    adapter = lk.attach(model, spec, target_modules=["first", "image"], name="mine", **options(given, mixed_batches()))
    assert torch.allclose(model(**batch), before, rtol=0, atol=1e-12)
    train(adapter)
    for name in ("as it was", "changed"):
        if name == "changed":
            for _, _, delta in adapter.deltas():
                change_rank(delta.low_rank())
        model.eval()
        expected = model(**batch)
        adapter.save(tmp_path / name)
        again = mixed()
        loaded = lk.load(again, tmp_path / name, name="mine")
        with lk.use(again, "mine"):
            assert torch.allclose(again(**batch), expected, rtol=0, atol=1e-10)
        kept = any(isinstance(delta, Offset) for _, _, delta in loaded.deltas())
        assert kept == (start in SHIFTED and (name == "as it was" or isinstance(spec, lk.DyLoRA)))


def change_rank(delta: Any) -> None:
    """What a schedule does to a delta."""
    if hasattr(delta, "restart"):
        delta.restart(delta.B.detach() * 0, delta.A.detach().clone())
    elif hasattr(delta, "kept"):
        delta.kept[0] = False
        with torch.no_grad():
            delta.lam[0] = 0
