"""Layers in the packing of GPTQ, AWQ and AQLM, under the attributes of those libraries: known, read, trained on, merged.

The libraries' own kernels are not here: what is tested is that lorakit's way reaches such layers without knowing how they pack.
Each stub is made from codes, keeps only what its library keeps, and unpacks in its call; the weight that the codes stand
for is worked out beside it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit.algebra.merging import merge
from lorakit.core.sites import sites_of
from lorakit.core.storage import storage_of
from lorakit.errors import LorakitError

IN, OUT, GROUP, PER_INT = 64, 32, 16, 8


def packed(codes: Tensor, axis: int, order: tuple[int, ...] = tuple(range(PER_INT))) -> Tensor:
    """4-bit codes, eight to an int32 along an axis; `order` says which of the eight stands at each place."""
    groups = codes.movedim(axis, -1).unflatten(-1, (-1, PER_INT))[..., list(order)].long()
    whole = (groups << (4 * torch.arange(PER_INT))).sum(-1)
    return torch.where(whole >= 2**31, whole - 2**32, whole).to(torch.int32).movedim(-1, axis)


def unpacked(whole: Tensor, axis: int, order: tuple[int, ...] = tuple(range(PER_INT))) -> Tensor:
    codes = (whole.movedim(axis, -1)[..., None].long() >> (4 * torch.arange(PER_INT))) & 15
    return codes[..., torch.tensor(order).argsort()].flatten(-2).movedim(-1, axis)


class Outline:
    """What GPTQModel's layer gives for `weight`: shape and dtype, and no numbers."""

    shape, dtype = (OUT, IN), torch.float16


class GPTQ(nn.Module):
    """GPTQModel's: qweight packed along the inputs, qzeros along the outputs, a group for every input."""

    __module__ = "gptqmodel.nn_modules.qlinear.torch"

    def __init__(self, codes: Tensor, zeros: Tensor, scales: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bits, self.group_size = IN, OUT, 4, GROUP
        self.weight = Outline()
        self.register_buffer("qweight", packed(codes, 0))
        self.register_buffer("qzeros", packed(zeros, 1))
        self.register_buffer("scales", scales)
        self.register_buffer("g_idx", torch.arange(IN, dtype=torch.int32) // GROUP)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        group = self.g_idx.long()
        W = self.scales[group] * (unpacked(self.qweight, 0) - unpacked(self.qzeros, 1)[group])
        return x @ W.to(x.dtype) + self.bias.to(x.dtype)


class AWQ(nn.Module):
    """AutoAWQ's: both packed along the outputs, in the order of its kernel; the number of bits has another name."""

    __module__ = "awq.modules.linear.gemm"
    ORDER = (0, 2, 4, 6, 1, 3, 5, 7)

    def __init__(self, codes: Tensor, zeros: Tensor, scales: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.in_features, self.out_features, self.w_bit, self.group_size = IN, OUT, 4, GROUP
        self.register_buffer("qweight", packed(codes, 1, self.ORDER))
        self.register_buffer("qzeros", packed(zeros, 1, self.ORDER))
        self.register_buffer("scales", scales)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        codes, zeros = (unpacked(whole, 1, self.ORDER) for whole in (self.qweight, self.qzeros))
        W = self.scales.repeat_interleave(GROUP, 0) * (codes - zeros.repeat_interleave(GROUP, 0))
        return x @ W.to(x.dtype) + self.bias.to(x.dtype)


class AQLM(nn.Module):
    """AQLM's: every eight inputs of an output are a sum of entries of two code books, times the output's scale."""

    __module__ = "aqlm.inference"

    def __init__(self, codes: Tensor, codebooks: Tensor, scales: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.in_features, self.out_features, self.nbits_per_codebook = IN, OUT, 4
        self.codes = nn.Parameter(codes, requires_grad=False)
        self.codebooks = nn.Parameter(codebooks)
        self.scales = nn.Parameter(scales)
        self.bias = nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        picked = sum(self.codebooks[book, self.codes[..., book].long(), 0] for book in range(self.codes.shape[-1]))
        W = picked.flatten(1) * self.scales.flatten(1)
        return x @ W.T.to(x.dtype) + self.bias.to(x.dtype)


def groups(kind: Callable[..., nn.Module]) -> tuple[nn.Module, Tensor, Tensor]:
    """A layer of codes in groups, its weight (out, in) and its bias."""
    codes, zeros = torch.randint(0, 16, (IN, OUT)), torch.randint(0, 16, (IN // GROUP, OUT))
    scales, bias = torch.rand(IN // GROUP, OUT) * 0.05 + 0.01, torch.randn(OUT)
    W = scales.repeat_interleave(GROUP, 0) * (codes - zeros.repeat_interleave(GROUP, 0))
    return kind(codes, zeros, scales, bias), W.T, bias


def books(kind: Callable[..., nn.Module]) -> tuple[nn.Module, Tensor, Tensor]:
    """A layer of sums of two code books' entries, its weight and its bias."""
    codes, codebooks = torch.randint(0, 16, (OUT, IN // 8, 2), dtype=torch.int8), torch.randn(2, 16, 1, 8)
    scales, bias = torch.rand(OUT, 1, 1, 1) * 0.2, torch.randn(OUT)
    rows = [
        torch.cat([codebooks[0, int(a), 0] + codebooks[1, int(b), 0] for a, b in row]) * scale
        for row, scale in zip(codes, scales.flatten(), strict=True)
    ]
    return kind(codes, codebooks, scales, bias), torch.stack(rows), bias


MAKE = {"gptq": (groups, GPTQ), "awq": (groups, AWQ), "aqlm": (books, AQLM)}
LABELS = {"gptq": "gptqmodel GPTQ 4-bit", "awq": "awq AWQ 4-bit", "aqlm": "aqlm AQLM 4-bit"}
GROUPS = IN * OUT // 2 + IN // GROUP * OUT // 2 + 4 * IN // GROUP * OUT
BYTES = {"gptq": GROUPS + 4 * IN, "awq": GROUPS, "aqlm": IN // 8 * OUT * 2 + 4 * 2 * 16 * 8 + 4 * OUT}


class Net(nn.Module):
    """A packed layer between two of floats."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.before, self.layer, self.head = nn.Linear(IN, IN), layer, nn.Linear(OUT, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(torch.tanh(self.layer(torch.tanh(self.before(x)))))
        return y


def made(name: str) -> tuple[Net, Tensor, Tensor]:
    torch.manual_seed(0)
    build, kind = MAKE[name]
    layer, W, bias = build(kind)
    return Net(layer), W, bias


@pytest.mark.parametrize("name", MAKE)
def test_a_packed_layer_is_known_and_read(name: str) -> None:
    model, W, _ = made(name)
    (site,) = sites_of(model.layer)
    assert (site.layout.shape.out, site.layout.shape.in_, site.bias) == (OUT, IN, "bias")
    storage = storage_of(model.layer, site.weight)
    assert torch.allclose(storage.read(model.layer, "weight"), W, atol=1e-5)
    assert storage.label(model.layer, "weight") == LABELS[name]
    assert storage.nbytes(model.layer, "weight") == BYTES[name]


@pytest.mark.parametrize("method", [lk.LoRA(rank=4), lk.DoRA(inner=lk.LoRA(rank=4))], ids=lambda one: one.name)
@pytest.mark.parametrize("name", MAKE)
def test_an_adapter_trains_on_it_and_the_float_copy_is_the_same(name: str, method: lk.LoRA | lk.DoRA) -> None:
    model, W, bias = made(name)
    x, y = torch.randn(16, IN), torch.randint(0, 3, (16,))
    start = model(x)
    adapter = lk.attach(model, method, name="one", target_modules=["before", "layer"])
    assert torch.allclose(model(x), start, atol=1e-5)
    held = {key: value.clone() for key, value in model.layer.base.state_dict().items()}
    optimiser = torch.optim.AdamW(adapter.parameters(), lr=0.02)
    losses = []
    for _ in range(20):
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(torch.equal(value, held[key]) for key, value in model.layer.base.state_dict().items())
    trained = model(x)
    with pytest.raises(LorakitError, match=rf"nothing can be written into layer: {LABELS[name]} .*--dtype bf16"):
        merge(model, "one")
    merge(model, "one", dtype=torch.float32)
    assert type(model.layer) is nn.Linear
    assert torch.equal(model.layer.bias, bias)
    assert not torch.allclose(model.layer.weight, W, atol=1e-3)
    assert torch.allclose(model(x), trained, atol=1e-4)


@pytest.mark.parametrize("name", MAKE)
def test_what_was_trained_on_it_loads_again_and_on_its_floats(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, W, bias = made(name)
    adapter = lk.attach(model, lk.LoRA(rank=4), name="one", target_modules=["layer"])
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    adapter.save(tmp_path / "one")
    x = torch.randn(5, IN)
    again = made(name)[0]
    lk.load(again, tmp_path / "one")
    with lk.use(again, "one"):
        assert torch.equal(again(x), model(x))
    floats = made(name)[0]
    floats.layer = nn.Linear(IN, OUT)
    floats.layer.load_state_dict({"weight": W, "bias": bias})
    lk.load(floats, tmp_path / "one")
    with lk.use(floats, "one"):
        assert torch.allclose(floats(x), model(x), atol=1e-4)
    told = [one for one in caplog.records if one.levelno >= logging.WARNING]
    assert not told, "the very numbers that the codes stand for are no other base"


@pytest.mark.parametrize("name", MAKE)
def test_a_start_that_asks_the_quantiser_is_refused(name: str) -> None:
    model, W, _ = made(name)
    with pytest.raises(LorakitError, match=rf"{LABELS[name]} quantises by data or a search of its own"):
        lk.attach(model, lk.LoRA(rank=4), init="loftq", originals={"layer.weight": W}, target_modules=["layer"])
