"""The tests of `test_triton.py`, for a process of their own: every kernel gives what the functions in PyTorch give."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lorakit as lk
from lorakit.native.elementwise import (
    GATES,
    norm_rows,
    norm_rows_backward,
    rotate,
    rotate_back,
)
from lorakit.native.triton import adapters, elementwise, paged, tree
from lorakit.serve.engine.engine import LocalEngine
from lorakit.serve.engine.scheduler import Limits
from lorakit.serve.model.attention import ForwardContext, attend
from lorakit.serve.model.batch import TILE as BATCH_TILE
from lorakit.serve.model.batch import Run, assemble, mix
from lorakit.serve.model.cache import Cache, LayerShape, page_count
from lorakit.serve.model.graphs import Graphs
from lorakit.serve.model.packed import LayerTensors, PackedAdapter
from lorakit.serve.model.product import adapt
from lorakit.train.step.batched_attention import PackedAttention, plan_attention
from lorakit.train.step.tree import runs_of
from serving.small import greedy, model, prompt, write_adapter
from training.test_tree import batch

KINDS = [torch.float32, torch.bfloat16]
WITHIN = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


def close(found: Any, expected: Any, within: float) -> None:
    """Equal to so much of the largest."""
    pairs = zip(found, expected, strict=True) if isinstance(expected, tuple | list) else [(found, expected)]
    for one, other in pairs:
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        gap = (one.double() - other.double()).abs().max() / other.double().abs().max().clamp_min(1e-30)
        assert gap <= within, f"off by {float(gap):.2g}"


def draw(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_norms(dtype: torch.dtype, shift: float) -> None:
    x, weight, grad = draw(5, 48, dtype=dtype), draw(48, dtype=dtype, seed=1), draw(5, 48, dtype=dtype, seed=2)
    y, scale = norm_rows(x, weight, eps=1e-5, shift=shift)
    close(elementwise.norm(x, weight, eps=1e-5, shift=shift), (y, scale), WITHIN[dtype])
    expected = norm_rows_backward(grad, x, weight, scale, shift=shift)
    close(elementwise.norm_backward(grad, x, weight, scale, shift=shift), expected, WITHIN[dtype])


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("kind", GATES)
def test_gates(dtype: torch.dtype, kind: str) -> None:
    gate, up, grad = (3 * draw(7, 300, dtype=dtype, seed=seed) for seed in range(3))
    forward, backward = GATES[kind]
    close(elementwise.gate(kind, gate, up), forward(gate, up), WITHIN[dtype])
    close(elementwise.gate_backward(kind, grad, gate, up), backward(grad, gate, up), WITHIN[dtype])


@pytest.mark.parametrize("dtype", KINDS)
def test_rotary_positions(dtype: torch.dtype) -> None:
    x, cos, sin = (draw(*shape, dtype=dtype, seed=seed) for seed, shape in enumerate([(4, 3, 24), (4, 24), (4, 24)]))
    close(elementwise.turn(x, cos, sin), rotate(x, cos, sin), WITHIN[dtype])
    close(elementwise.turn(x, cos, sin, back=True), rotate_back(x, cos, sin), WITHIN[dtype])
    strided = draw(3, 4, 24, dtype=dtype).transpose(0, 1)
    close(elementwise.turn(strided, cos, sin), rotate(strided, cos, sin), WITHIN[dtype])


# -- attention over shared prefixes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize(
    ("heads", "width", "window", "beginning", "lengths"),
    [
        ((4, 2), 32, None, 37, [5, 1, 70, 8]),
        ((3, 3), 24, 7, 37, [5, 1, 60]),
        ((4, 1), 16, 40, 0, [130, 40]),
        ((2, 2), 64, None, 20, [3]),
    ],
)
def test_tree_attention(
    dtype: torch.dtype, heads: tuple[int, int], width: int, window: int | None, beginning: int, lengths: list[int]
) -> None:
    packed = batch(beginning, lengths)
    runs = runs_of(packed)
    assert runs is not None
    assert tree.walks(runs)
    q, k, v = (
        draw(packed.tokens, count, width, dtype=dtype, seed=seed)
        for seed, count in enumerate((heads[0], heads[1], heads[1]))
    )
    grad = draw(packed.tokens, heads[0], width, dtype=dtype, seed=9)
    grad[packed.used :] = 0
    plan = plan_attention(packed, *heads, width, window)
    leaves = [one.double().requires_grad_() for one in (q, k, v)]
    expected = PackedAttention.apply(*leaves, None, plan, 0.2, None, window)  # type: ignore[no-untyped-call]
    expected.backward(grad.double())
    on_gpu = tree.Tree(runs, torch.device("cpu"))
    out, log_sums = tree.attend(q, k, v, on_gpu, 0.2, window)
    used = slice(packed.used)
    close(out[used], expected.detach()[used].to(dtype), WITHIN[dtype])
    assert not out[packed.used :].any()
    found = tree.attend_backward(q, k, v, out, log_sums, grad, on_gpu, 0.2, window)
    close(found, [leaf.grad.to(dtype) for leaf in leaves], WITHIN[dtype])


def test_only_walks_are_taken() -> None:
    assert tree.walks(torch.tensor([[0, 3, 0, -1], [3, 2, 3, 0], [5, 2, 5, 1], [7, 1, 3, 0], [8, 4, 0, -1]]))
    assert not tree.walks(torch.tensor([[0, 3, 0, -1], [3, 2, 0, -1], [5, 2, 3, 0]])), "a child of one that has ended"
    assert not tree.walks(torch.tensor([[0, 3, 0, -1], [4, 2, 3, 0]])), "a gap"


# -- serving ------------------------------------------------------------------------------------------------------------------


class Layer(torch.nn.Module):
    layer_idx = 0


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize(
    ("heads", "key_heads", "d", "dv", "options"),
    [
        (6, 2, 24, 24, {}),
        (2, 2, 64, 32, {"softcap": 3.0, "scaling": 0.3}),
        (4, 1, 16, 16, {"sliding_window": 19}),
        (4, 2, 16, 16, {"s_aux": True}),
    ],
)
def test_paged_attention(
    dtype: torch.dtype, heads: int, key_heads: int, d: int, dv: int, options: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    given = {**options, **({"s_aux": torch.randn(heads)} if "s_aux" in options else {})}
    caches = [Cache([LayerShape(key_heads, d, dv)], 16, dtype, torch.device("cpu")) for _ in range(2)]
    for cache in caches:  # what nobody may see
        cache.keys[0].fill_(float("nan"))
        cache.values[0].fill_(float("nan"))
    pages = [[3, 1, 7, 8, 11, 12], [0, 9, 4, 2], [5]]
    for starts, counts in (((0, 0, 0), (66, 20, 1)), ((66, 20, 1), (1, 9, 1)), ((67, 29, 2), (2, 1, 3))):
        runs = [Run([0] * n, s, p) for s, n, p in zip(starts, counts, pages, strict=True)]
        step = assemble(runs, torch.device("cpu"), None)
        q, k, v = (
            torch.randn(1, sum(counts), h, w).to(dtype).transpose(1, 2)
            for h, w in ((heads, d), (key_heads, d), (key_heads, dv))
        )
        expected = attend(ForwardContext(step, caches[0], compiled=False), Layer(), q, k, v, **given)
        found = paged.attend(
            *(
                q,
                k,
                v,
                caches[1].keys[0],
                caches[1].values[0],
                step.table,
                step.row,
                step.place,
                step.tiles,
                BATCH_TILE,
            ),
            *(
                given.get("scaling", d**-0.5),
                given.get("softcap", 0.0),
                given.get("sliding_window", 0),
                given.get("s_aux"),
            ),
        )
        close(found, expected, WITHIN[dtype])
    assert torch.equal(caches[0].keys[0].nan_to_num(), caches[1].keys[0].nan_to_num())
    assert torch.equal(caches[0].values[0].nan_to_num(), caches[1].values[0].nan_to_num())


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize(("in_", "out"), [(64, 96), (70, 33)])
def test_the_product_over_adapters(dtype: torch.dtype, in_: int, out: int) -> None:
    """Runs with adapters of different ranks, a blend, gains, biases, a dense change, the base."""
    torch.manual_seed(0)
    made = functools.partial(adapter, in_, out, dtype)
    a, b, c, d, e, f = (
        made(5),
        made(8, gain=True, bias=True),
        made(0, gain=True),
        made(0, bias=True),
        made(in_),
        made(40),
    )
    blends = [[(a, 1.0)], [], [(a, 0.5), (b, -0.7)], [(c, 1.0)], [(d, 2.0)], [(e, 1.0)], [(f, 1.0)], [(a, 1.0)]]
    counts = [3, 2, 1, 4, 1, 2, 35, 1]
    runs = [Run([0] * n, 0, [0] * page_count(n), blend) for n, blend in zip(counts, blends, strict=True)]
    mixture = mix(blends)
    assert mixture is not None
    step = assemble(runs, torch.device("cpu"), mixture)
    assert (mixture.slots, mixture.rank) == (2, max(in_, 40))
    x, y = torch.randn(sum(counts), in_).to(dtype), torch.randn(sum(counts), 2 * out).to(dtype)[:, :out]
    expected, before = y.clone(), y.clone()
    adapt(step, 0, x, expected, compiled=False)
    adapters.adapt(
        x, y, mixture.parts[0], mixture.starts, mixture.weights, step.row, *step.tiles_of_tokens, 2, mixture.rank
    )
    close(y, expected, WITHIN[dtype])
    assert torch.equal(y[3:5], before[3:5])


def adapter(in_: int, out: int, dtype: torch.dtype, rank: int, gain: bool = False, bias: bool = False) -> PackedAdapter:
    """An adapter over one layer of these sizes, with random numbers; a rank of `in_` is a dense change."""
    dense = rank == in_
    A = None if dense or not rank else torch.randn(rank, in_).to(dtype) / 8
    B = torch.randn(rank, out).to(dtype) / 8 if rank else None
    vectors = [torch.randn(out).to(dtype) if there else None for there in (gain, bias)]
    piece = LayerTensors(A, B, *vectors)
    parts = torch.zeros(1, 5, dtype=torch.int64)
    for column, tensor in piece.tensors():
        parts[0, column] = tensor.data_ptr()
    parts[0, 4] = rank
    return PackedAdapter("", "", torch.zeros(0), parts, {0: piece}, "", "form", 0.0, rank)


class Again:
    """In the place of a CUDA graph: what it would replay is called again, over the same tensors."""

    def record(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """See `Recorder`."""
        result = run().clone()

        def replay() -> None:
            result.copy_(run())

        return replay, result


def test_an_engine_by_kernels_and_graphs_answers_as_by_torch(tmp_path: Path) -> None:
    """Mixed adapters and a blend; steps of decoding are replayed with room for more requests and ranks than there are."""
    base = model("llama")
    for seed, (name, rank) in enumerate({"one": 2, "two": 5}.items()):
        write_adapter(base, tmp_path / name, lk.LoRA(rank=rank), seed=seed)
    blends: list[dict[str, float]] = [{}, {"one": 1.0}, {"one": 0.5, "two": 0.5}]

    def answers(kernels: bool) -> tuple[list[list[int]], Graphs | None]:
        engine = LocalEngine(base, tmp_path, Limits(batch=4, step_tokens=24, cache_bytes=1 << 20), compiled=False)
        engine.pool.start()
        serving = engine.model
        if kernels:
            serving.context.kernels = True
            serving.graphs = Graphs(serving._forward, engine.cache, Again())
        try:
            for name in ("one", "two"):
                engine.pool.load(name)
            tickets = [engine.submit(greedy(n, prompt(n, 9 + n), blend, 3)) for n, blend in enumerate(blends)]
            while engine.step():
                pass
            return [ticket.tokens() for ticket in tickets], serving.graphs
        finally:
            engine.pool.stop()
            serving.close()

    expected, _ = answers(False)
    found, graphs = answers(True)
    assert found == expected
    assert graphs is not None
    assert graphs.recorded
    assert 4 in {one.batch.row.shape[0] for one in graphs.recorded.values()}, "three requests in the place of four"
