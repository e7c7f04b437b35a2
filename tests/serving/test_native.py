"""The compiled loops do what their namesakes in PyTorch do, and a model that they cannot serve is refused."""

from __future__ import annotations

import dataclasses
import functools
import shutil
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lorakit.core.storage.blocks import KINDS, BlockLinear, fits, unpack
from lorakit.errors import LorakitError
from lorakit.models.quantisation import Q4
from lorakit.native import elementwise
from lorakit.native.choice import FORCED
from lorakit.serve.engine.engine import LocalEngine
from lorakit.serve.engine.scheduler import Limits
from lorakit.serve.model import native
from lorakit.serve.model.attention import ForwardContext, attend
from lorakit.serve.model.batch import LONG, TOGETHER, Run, assemble, mix
from lorakit.serve.model.blocks import Block
from lorakit.serve.model.cache import Cache, LayerShape, page_count
from lorakit.serve.model.linear_layers import LinearForward, WeightBuffer, join
from lorakit.serve.model.packed import LayerTensors, PackedAdapter
from lorakit.serve.model.product import adapt, change_of
from lorakit.serve.model.serving_model import ServingModel
from lorakit.serve.request import Refused
from serving.small import model, prompt

DTYPES = [torch.float32, torch.bfloat16]
pytestmark = pytest.mark.skipif(native.find("attend", torch.float32) is None, reason="no C++ compiler here")


def close(found: Tensor, expected: Tensor) -> bool:
    eps = torch.finfo(expected.dtype).eps
    return torch.allclose(found.double(), expected.double(), rtol=16 * eps, atol=16 * eps)


class Layer(nn.Module):
    layer_idx = 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"softcap": 3.0},
        {"sliding_window": 19},
        {"scaling": 0.3},
        {"s_aux": True},
        {"sliding_window": 5, "softcap": 2.0},
    ],
    ids=["plain", "softcap", "window", "scale", "sinks", "window+softcap"],
)
@pytest.mark.parametrize(("heads", "key_heads", "d", "dv"), [(6, 2, 20, 12), (4, 4, 64, 64), (5, 1, 16, 80)])
def test_attention(dtype: torch.dtype, options: dict[str, Any], heads: int, key_heads: int, d: int, dv: int) -> None:
    """Chunks of several rows, some in the middle of pages, and single tokens; twice what is in the pages is not theirs."""
    torch.manual_seed(0)
    options = dict(options)
    if options.get("s_aux"):
        options["s_aux"] = torch.randn(heads)
    shapes = [LayerShape(key_heads, d, dv)]
    caches = [Cache(shapes, 16, dtype, torch.device("cpu")) for _ in range(2)]
    for cache in caches:  # what nobody may see
        cache.keys[0].fill_(float("nan"))
        cache.values[0].fill_(float("nan"))
    pages = [[3, 1, 7], [0, 9, 4, 2], [5]]
    for starts, counts in (((0, 0, 0), (33, 41, 1)), ((33, 41, 1), (1, 9, 1)), ((34, 50, 2), (2, 1, 3))):
        runs = [Run([0] * n, s, p) for s, n, p in zip(starts, counts, pages, strict=True)]
        batch = assemble(runs, torch.device("cpu"), None)
        q, k, v = (
            torch.randn(1, sum(counts), h, w).to(dtype).transpose(1, 2)
            for h, w in ((heads, d), (key_heads, d), (key_heads, dv))
        )
        found, expected = (
            attend(ForwardContext(batch, cache, compiled=compiled), Layer(), q, k, v, **options)
            for cache, compiled in zip(caches, (True, False), strict=True)
        )
        assert torch.isfinite(expected).all()
        assert close(found, expected)
    assert torch.equal(caches[0].keys[0].nan_to_num(), caches[1].keys[0].nan_to_num())


def packed(
    in_: int, out: int, dtype: torch.dtype, rank: int, gain: bool = False, bias: bool = False, dense: bool = False
) -> PackedAdapter:
    """An adapter over one layer of these sizes, with random numbers."""
    A = None if dense or not rank else torch.randn(rank, in_).to(dtype) / 8
    B = torch.randn(in_ if dense else rank, out).to(dtype) / 8 if rank or dense else None
    piece = LayerTensors(
        A, B, torch.randn(out).to(dtype) if gain else None, torch.randn(out).to(dtype) if bias else None
    )
    parts = torch.zeros(1, 5, dtype=torch.int64)
    for column, tensor in piece.tensors():
        parts[0, column] = tensor.data_ptr()
    parts[0, 4] = 0 if B is None else B.shape[0]
    return PackedAdapter("", "", torch.zeros(0), parts, {0: piece}, "", "form", 0.0, rank)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("in_", "out"), [(64, 96), (70, 33)])
def test_product(dtype: torch.dtype, in_: int, out: int) -> None:
    """Runs of every kind of piece, a blend, the base, and one long enough for matmuls."""
    torch.manual_seed(0)

    made = functools.partial(packed, in_, out, dtype)
    a, b, c, d, e = (
        made(5),
        made(8, gain=True, bias=True),
        made(0, gain=True),
        made(0, bias=True),
        made(0, dense=True),
    )
    blends = [[(a, 1.0)], [], [(a, 0.5), (b, -0.7)], [(c, 1.0)], [(d, 2.0)], [(e, 1.0)], [(b, 1.0)]]
    counts = [3, 2, 1, 4, 1, 2, LONG + 1]
    runs = [Run([0] * n, 0, [0] * page_count(n), blend) for n, blend in zip(counts, blends, strict=True)]
    batch = assemble(runs, torch.device("cpu"), mix(blends))
    assert batch.long == [6]
    x, y = torch.randn(sum(counts), in_).to(dtype), torch.randn(sum(counts), out).to(dtype)
    found, wide = y.clone(), y.double()
    adapt(batch, 0, x, found, compiled=True)
    for (first, count), blend in zip(batch.spans, blends, strict=True):
        part = slice(first, first + count)
        for one, weight in blend:
            piece = one.layers[0]
            own = x[part].double()
            change = torch.zeros(count, out, dtype=torch.float64)
            if piece.B is not None:
                change = change + (own if piece.A is None else own @ piece.A.double().T) @ piece.B.double()
            if piece.gain is not None:
                change = change + piece.gain.double() * y[part].double()
            if piece.bias is not None:
                change = change + piece.bias.double()
            wide[part] += weight * change
    eps = torch.finfo(dtype).eps
    assert torch.allclose(found.double(), wide, rtol=8 * eps, atol=32 * eps)
    assert torch.equal(found[3:5], y[3:5])
    by_matmuls = y.clone()
    adapt(batch, 0, x, by_matmuls, compiled=False)
    assert torch.allclose(by_matmuls.double(), wide, rtol=8 * eps, atol=32 * eps)


@pytest.mark.skipif(native.find("linear", torch.bfloat16) is None, reason="this processor does not multiply bfloat16")
@pytest.mark.parametrize(("in_", "outs"), [(64, (96, 32, 48)), (70, (33, 1)), (96, (64,))])
@pytest.mark.parametrize("way", ["panels", "ordered", *KINDS])
def test_layers_with_their_adapters(way: str, in_: int, outs: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers that read one input, in one call: what each gives alone, and its adapters, of every kind and in tiles of any
    size, added to the rounded output."""
    if way in KINDS and not fits(in_):
        pytest.skip(f"{way} needs rows of a multiple of 32 numbers")
    torch.manual_seed(0)
    dtype, context = torch.bfloat16, ForwardContext()
    layers: list[Any] = [nn.Linear(in_, out, bias=number != 1).to(dtype) for number, out in enumerate(outs)]
    if way in KINDS:
        layers = [BlockLinear(layer.weight, layer.bias, way) for layer in layers]
    monkeypatch.setenv(FORCED, f"linear={way}")
    forwards = [LinearForward(layer, number, context, pack=True) for number, layer in enumerate(layers)]
    x = torch.randn(1, 5, in_).to(dtype)
    for forward, layer in zip(forwards, layers, strict=True):
        assert torch.equal(forward(x), layer(x)), "outside of a step the layer is what it was"
    join(forwards)
    assert {forward.group for forward in forwards} == {forwards[0].group}

    def everywhere(rank: int, **kinds: bool) -> PackedAdapter:
        own = [packed(in_, out, dtype, rank, **kinds) for out in outs]
        own[-1].parts.zero_()  # the last layer has none of it
        parts = torch.cat([one.parts for one in own])
        return dataclasses.replace(own[0], parts=parts, layers={n: one.layers[0] for n, one in enumerate(own[:-1])})

    a, b, c, d = everywhere(5), everywhere(16), everywhere(4, gain=True, bias=True), everywhere(0, dense=True)
    blends = [[(a, 1.0)], [(b, 2.0)], [], [(a, 1.0)], [(a, 0.5), (b, -0.7)], [(c, 1.0)], [(d, 1.0)], [(a, 1.0)]]
    for counts in ([1] * 8, [3, 9, 2, 1, 4, 2, 2, 13], [1, 6, 1, 1, 7, 1, 1, 5], [LONG + 3, 1, 2, 1, LONG, 1, 1, 2]):
        runs = [Run([0] * n, 0, [0] * page_count(n), blend) for n, blend in zip(counts, blends, strict=True)]
        context.batch = batch = assemble(runs, torch.device("cpu"), mix(blends))
        order, begins = batch.tiles_of_adapters
        assert sorted(order.tolist()) == [t for t, run in enumerate(batch.row.tolist()) if run != 2]
        assert all(0 < size <= TOGETHER for size in begins.diff().tolist())
        x = torch.randn(1, sum(counts), in_).to(dtype)
        for number, (forward, layer) in enumerate(zip(forwards, layers, strict=True)):
            found = forward(x)
            base = _base_output(layer, x[0])
            expected = base.clone()
            for (first, count), blend in zip(batch.spans, blends, strict=True):
                part = slice(first, first + count)
                for adapter, weight in blend:
                    if number in adapter.layers:
                        change = change_of(_wide(adapter.layers[number]), x[0, part].double(), base[part])
                        expected[part] += weight * change
            # To the roundings of bfloat16: the output, and A x, which is rounded as PEFT rounds it.
            assert torch.allclose(found[0].double(), expected, rtol=2**-6, atol=2**-5), number
        context.batch = None


def _base_output(layer: Any, x: Tensor) -> Tensor:
    """A layer's output in float64; of weights in blocks for the inputs as they are rounded to bytes."""
    bias = None if layer.bias is None else layer.bias.double()
    if not isinstance(layer, BlockLinear):
        return nn.functional.linear(x.double(), layer.weight.double(), bias)
    parts = x.float().unflatten(1, (-1, 32))
    scale = parts.abs().amax(2, keepdim=True) / 127
    rounded = ((parts * torch.where(scale > 0, 1 / scale, 0)).round().double() * scale.double()).flatten(1)
    return nn.functional.linear(rounded, unpack(layer.codes, layer.scales, layer.kind, torch.float64), bias)


@pytest.mark.skipif(native.find("linear", torch.bfloat16) is None, reason="this processor does not multiply bfloat16")
@pytest.mark.parametrize("kind", KINDS)
def test_products_with_weights_in_blocks(kind: str) -> None:
    """To the rounding of the output; a token's outputs are the same bits whatever is computed with it; a token that is not
    finite has outputs that are not, and its neighbours stay."""
    torch.manual_seed(0)
    in_, out = 192, 100
    layer = BlockLinear(torch.randn(out, in_).bfloat16(), None, kind)
    forward = LinearForward(layer, 0, ForwardContext(), pack=True)
    forward(torch.zeros(1, 1, in_, dtype=torch.bfloat16))
    join([forward])
    assert forward.group is not None
    x = torch.randn(150, in_).bfloat16()
    x[3, 32:64] = 0
    x[4, 7] = 100.0
    product = forward.group.product
    found = product(x, None).view(150, out)
    expected = _base_output(layer, x)
    terms = x.double().abs() @ unpack(layer.codes, layer.scales, kind, torch.float64).T.abs()
    assert ((found.double() - expected).abs() <= 2**-8 * expected.abs() + 1e-6 * terms).all()
    for count in (1, 2, 3, 5, 6, 7, 15, 16, 17, 33, 64, 100):
        assert torch.equal(product(x[:count], None).view(count, out), found[:count]), count
    x[5, 9], x[6, 40] = float("nan"), float("inf")
    spoilt = product(x, None).view(150, out)
    assert not torch.isfinite(spoilt[5:7]).any()
    assert torch.equal(torch.cat([spoilt[:5], spoilt[7:]]), torch.cat([found[:5], found[7:]]))


@pytest.mark.skipif(native.find("linear", torch.bfloat16) is None, reason="this processor does not multiply bfloat16")
def test_a_base_in_blocks_is_served() -> None:
    """A request alone and among others gives the same bits."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=96)
    ).bfloat16()  # fmt: skip
    Q4(head=True).pack(base, torch.bfloat16)
    assert base.lm_head.kind == "q8_0"
    assert base.model.layers[0].mlp.down_proj.kind == "q4_0"
    served = ServingModel(base)
    assert all(layer.group is not None for layer in served.layers.values())
    assert any(isinstance(vars(module).get("forward"), Block) for module in base.modules())
    texts = [prompt(number, 20 + number) for number in range(3)]
    cache = Cache(served.shapes, 12, torch.bfloat16, torch.device("cpu"), reuse=False)
    runs = [Run([t % 96 for t in text], 0, list(range(4 * n, 4 * n + 4)), wanted=1) for n, text in enumerate(texts)]
    together = served.forward(assemble(runs, torch.device("cpu"), None), cache)
    for number, run in enumerate(runs):
        alone = served.forward(assemble([run], torch.device("cpu"), None), cache)
        assert torch.equal(alone[0], together[number])
    served.close()


def _wide(piece: LayerTensors) -> LayerTensors:
    return LayerTensors(*(None if t is None else t.double() for t in (piece.A, piece.B, piece.gain, piece.bias)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_elementwise_operations_of_any_width(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(9, 70).to(dtype), torch.randn(70).to(dtype)
    wide = x.float()
    rows = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)
    assert close(elementwise.norm(x, weight, 1e-5, 0.0), rows.to(dtype) * weight)
    assert close(elementwise.norm(x, weight, 1e-5, 1.0), (rows * (1 + weight.float())).to(dtype))
    a, b = torch.randn(3, 333).to(dtype) * 30, torch.randn(3, 333).to(dtype)
    assert close(elementwise.gate("silu", a, b), nn.functional.silu(a) * b)
    x, cosine, sine = (torch.randn(*shape).to(dtype) for shape in ((1, 7, 3, 10), (7, 10), (7, 10)))
    x = x.transpose(1, 2)
    turned = torch.cat((-x[..., 5:], x[..., :5]), -1)
    expected = x.double() * cosine.double() + turned.double() * sine.double()
    eps = torch.finfo(dtype).eps
    assert torch.allclose(elementwise.turn(x, cosine, sine).double(), expected, rtol=4 * eps, atol=4 * eps)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_first_of_the_greatest(dtype: torch.dtype) -> None:
    x = torch.randn(6, 83).to(dtype)
    x[1, 81], x[2, 5], x[2, 40], x[3, 0] = 9, 9, 9, 9
    x[4] = -float("inf")
    assert native.greatest(x).tolist() == x.argmax(-1).tolist()


def test_packed_weights_lie_together_and_apart_from_each_other() -> None:
    buffer = WeightBuffer()
    first, second = buffer.take(3, 11), buffer.take(5, 7)
    assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    assert second.data_ptr() == first.data_ptr() + 2 * 64, "33 numbers, up to the next cache line"
    large = buffer.take(WeightBuffer.BLOCK + 1)
    assert large.shape == (WeightBuffer.BLOCK + 1,)
    assert large.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()


def forget() -> None:
    native.LOOPS.forget()
    native._reported.cache_clear()


def test_why_the_loops_are_off(monkeypatch: pytest.MonkeyPatch) -> None:
    assert native.obstacle(nn.Linear(2, 2)) is None
    assert native.obstacle(nn.Linear(2, 2).half()) == "its numbers are torch.float16"
    assert native.obstacle(nn.Linear(2, 2, device="meta")) == "the model is on meta"
    monkeypatch.setattr(shutil, "which", lambda name: None)
    forget()
    assert native.obstacle(nn.Linear(2, 2)) == "no C++ compiler was found (g++, clang++)"
    forget()


def test_a_model_whose_layers_mix_tokens_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: an MLP that looks at the token before."""
    base = model()
    layer = base.model.layers[1].mlp
    forward = layer.forward
    monkeypatch.setattr(layer, "forward", lambda x: forward(x + x.roll(1, dims=1)))
    with pytest.raises(
        Refused, match=r"LlamaForCausalLM cannot be served in batches: packed into one row its logits differ"
    ):
        LocalEngine(base, None, Limits(cache_bytes=2**20))
    assert "lorakit" not in base.config._attn_implementation_internal  # and it is as it was


def test_a_model_without_transformers_attention_is_refused() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

    with pytest.raises(LorakitError, match="takes no attention from transformers' registry"):
        LocalEngine(Plain(), None)
