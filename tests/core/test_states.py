"""Modules that return states beside their output, in a batch whose rows have adapters of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit.adapter.adapter import Adapter
from lorakit.errors import LorakitError

ROUTES = ["a", "b", "a", None, "b"]


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], layers: int, batch_first: bool) -> None:
        super().__init__()
        self.lin = nn.Linear(6, 6)
        self.rnn = kind(6, 5, num_layers=layers, batch_first=batch_first)  # type: ignore[arg-type]

    def forward(self, x: Tensor, start: Any = None) -> Any:
        return self.rnn(x, start)


def carried(model: nn.Module, **options: Any) -> list[Adapter]:
    adapters = [lk.attach(model, lk.LoRA(rank=2), name=name, target_modules=["lin"], **options) for name in "ab"]
    with torch.no_grad():
        for parameter in [parameter for adapter in adapters for parameter in adapter.parameters()]:
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return adapters


@pytest.mark.parametrize("layers", [1, 2, 4, 5])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM, nn.RNN])
@pytest.mark.parametrize("started", [False, True])
def test_states_have_the_batch_on_their_second_axis(
    kind: type[nn.RNNBase], layers: int, batch_first: bool, started: bool
) -> None:
    torch.manual_seed(0)
    model = Recurrent(kind, layers, batch_first)
    carried(model, modules_to_save=["rnn"])
    axis = 0 if batch_first else 1
    x = torch.randn(5, 3, 6) if batch_first else torch.randn(3, 5, 6)
    state = torch.randn(layers, 5, 5)
    start: Any = None if not started else (state, state * 0.5) if kind is nn.LSTM else state
    with torch.no_grad():
        with lk.use(model, ROUTES):
            y, states = model(x, start)
        for row, name in enumerate(ROUTES):
            with lk.use(model, name):
                own, own_states = model(x, start)
            torch.testing.assert_close(y.select(axis, row), own.select(axis, row))
            pairs = zip(states, own_states, strict=True) if kind is nn.LSTM else [(states, own_states)]
            for found, expected in pairs:
                torch.testing.assert_close(found[:, row], expected[:, row])


def test_rows_that_cannot_be_told_are_refused_by_name() -> None:
    model = Recurrent(nn.GRU, 2, True)
    carried(model, modules_to_save=["rnn"])
    packed: Any = nn.utils.rnn.pack_padded_sequence(torch.randn(5, 3, 6), [3] * 5, batch_first=True)
    with lk.use(model, ROUTES):
        with pytest.raises(LorakitError, match="rnn was called with a PackedSequence"):
            model(packed)
        with pytest.raises(LorakitError, match="rnn was called without a batch axis"):
            model(torch.randn(3, 6))

    class Within(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Recurrent(nn.GRU, 1, True)
            self.lin = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Any:
            return self.inner(x)

    holder = Within()
    adapters = [lk.attach(holder, lk.LoRA(rank=1), name=name, target_modules=r"lin",
                          modules_to_save=["inner"]) for name in "ab"]  # fmt: skip
    assert len(adapters) == 2
    with (
        lk.use(holder, ROUTES),
        pytest.raises(LorakitError, match="inner holds a recurrent layer and returns 2 values"),
    ):
        holder(torch.randn(5, 3, 6))


def test_a_value_without_rows_beside_the_output_is_refused() -> None:
    class Scored(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x), x.new_zeros(())

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin, self.scored = nn.Linear(4, 4), Scored(4, 4)

        def forward(self, x: Tensor) -> Any:
            return self.scored(self.lin(x))

    model = Model()
    carried(model, modules_to_save=["scored"])
    with lk.use(model, ROUTES), pytest.raises(LorakitError, match=r"scored returns a tensor of shape \(\) for"):
        model(torch.randn(5, 4))
