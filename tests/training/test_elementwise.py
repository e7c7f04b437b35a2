"""The operations in C++ do what their namesakes in PyTorch do, and training takes them inside `fused` alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lorakit.core.kernel import gain_backward
from lorakit.native import elementwise
from lorakit.train.step import fusion

CONSTANTS: dict[str, list[dict[str, Any]]] = {
    "norm_rows": [{"eps": 1e-5, "shift": 0.0}, {"eps": 1e-3, "shift": 1.0}],
    "norm_rows_backward": [{"shift": 0.0}, {"shift": 1.0}],
}
CASES = [(function, constants) for function in fusion.COMPILED for constants in CONSTANTS.get(function.__name__, [{}])]


@pytest.fixture(autouse=True)
def compiler() -> None:
    if elementwise.LIBRARY.obstacle is not None:
        pytest.skip("no C++ compiler here")


def inputs(function: Callable[..., Any], dtype: torch.dtype, tokens: int, width: int) -> list[Tensor]:
    """What the function takes: rows of `width`, of rotary positions three heads of it, weights, statistics."""
    generator = torch.Generator().manual_seed(tokens)

    def draw(*shape: int) -> Tensor:
        return (3 * torch.randn(*shape, generator=generator)).to(dtype)

    if "rotate" in function.__name__:
        # Two halves of angles that do not agree: the transpose must be right for those too.
        return [draw(tokens, 3, width), draw(tokens, width), draw(tokens, width)]
    if function is elementwise.norm_rows:
        return [draw(tokens, width), draw(width)]
    if function is gain_backward:
        return [draw(tokens, width), draw(tokens, width), torch.randn(width, generator=generator)]
    if function is elementwise.norm_rows_backward:
        return [draw(tokens, width), draw(tokens, width), draw(width), torch.rand(tokens, 1, generator=generator) + 0.1]
    return [draw(tokens, width) for _ in range(3 if "backward" in function.__name__ else 2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "width"), [(5, 32), (33, 96), (1, 64)])
@pytest.mark.parametrize(("function", "constants"), CASES)
def test_values(
    function: Callable[..., Any], constants: dict[str, Any], tokens: int, width: int, dtype: torch.dtype
) -> None:
    given = inputs(function, dtype, tokens, width)
    assert elementwise.suit(tuple(given), "rotate" in function.__name__, function is gain_backward)
    found, expected = fusion.COMPILED[function](*given, **constants), function(*given, **constants)
    pairs = zip(found, expected, strict=True) if isinstance(found, tuple) else [(found, expected)]
    for one, other in pairs:
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        # Sums of float32 in another order, and at the end of it the next number of bf16 at most.
        largest = float(other.abs().max())
        rounding = 0.0 if one.dtype == torch.float32 else torch.finfo(one.dtype).eps
        torch.testing.assert_close(one, other, rtol=rounding, atol=16 * torch.finfo(torch.float32).eps * largest)


def test_ends_of_the_range() -> None:
    """Gates far out: no infinity, no NaN, in values and derivatives."""
    gate = torch.tensor([[-3e38, -1e4, -100, -90, 0, 90, 100, 1e4] * 4])
    up = torch.ones_like(gate)
    for kind in elementwise.GATES:
        within = gate if kind == "silu" else gate.clamp(-1e4, 1e4)
        assert torch.isfinite(elementwise.gate(kind, within, up)).all()
        assert all(torch.isfinite(one).all() for one in fusion.COMPILED[elementwise.GATES[kind][1]](up, within, up))


def test_what_they_do_not_take() -> None:
    row = torch.randn(2, 16)
    assert elementwise.suit((row, row))
    assert not elementwise.suit((row, row), halves=True)
    assert not elementwise.suit((row, row.double()))
    assert not elementwise.suit((row.bfloat16(), row.bfloat16(), row[0]))
    assert elementwise.suit((row.bfloat16(), row.bfloat16(), row[0]), masters=True)
    assert not elementwise.suit((row.half(), row.half()))
    assert not elementwise.suit((row, row.T.contiguous().T))
    assert not elementwise.suit((row[:, :12].contiguous(),) * 2)
    assert not elementwise.suit((row.to("meta"),) * 2)


def test_taken_inside_fused_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    call = elementwise.LIBRARY.call
    monkeypatch.setattr(elementwise.LIBRARY, "call", lambda name, *rest: calls.append(name) or call(name, *rest))
    gate, up = torch.randn(3, 16), torch.randn(3, 16)
    outside = fusion.call(elementwise.gate_silu, gate, up)
    assert calls == []
    with fusion.fused(torch.nn.Linear(2, 2)) as report:
        inside = fusion.call(elementwise.gate_silu, gate, up)
    assert calls == ["gate"]
    assert report.compiled == 0  # nothing for torch.compile to do
    torch.testing.assert_close(inside, outside)
