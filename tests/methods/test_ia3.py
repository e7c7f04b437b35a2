"""IA3: both kinds of scale, which layer is of which, the bias, PEFT's files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import lorakit as lk
from lorakit.errors import LorakitError
from reference.models import MODELS, assert_same, logits, scramble


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.keys = nn.Linear(6, 4)
        self.down = nn.Linear(4, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.keys(x)))


def test_formula() -> None:
    torch.manual_seed(0)
    model = Block().double()
    adapter = lk.attach(model, lk.IA3(feedforward_modules=["down"]))
    assert adapter.num_parameters() == 4 + 4
    scramble(adapter.named_parameters())
    gain, feed = adapter.parameters()
    x = torch.randn(5, 6, dtype=torch.float64)
    W1, b1, W2, b2 = (p.detach().clone() for p in (*model.keys.base.parameters(), *model.down.base.parameters()))
    expected = (torch.tanh(gain * (x @ W1.T + b1)) * feed) @ W2.T + b2
    torch.testing.assert_close(model(x), expected)
    lk.merge(model, "default")
    torch.testing.assert_close(model(x), expected, msg="merged, with the bias")
    torch.testing.assert_close(model.keys.bias, gain * b1)
    assert torch.equal(model.down.bias, b2)


def test_count_of_the_paper() -> None:
    """L (d_k + d_v + d_ff), with the key-value heads' widths where queries share them."""
    model = MODELS["llama"]()
    spec = lk.IA3(feedforward_modules=["down_proj"])
    adapter = lk.attach(model, spec, target_modules=["k_proj", "v_proj", "down_proj"])
    assert adapter.num_parameters() == 3 * (12 + 12 + 40)


def test_which_layers_are_feed_forward_is_kept(tmp_path: Path) -> None:
    """By endings, by an expression, within DoRA, and through a file of lorakit's own."""
    x = torch.randn(5, 6, dtype=torch.float64)
    for number, spec in enumerate(
        [
            lk.IA3(feedforward_modules=["down"]),
            lk.IA3(feedforward_modules="do.*"),
            lk.DoRA(inner=lk.IA3(feedforward_modules=("down",))),
        ]
    ):
        model = Block().double()
        adapter = lk.attach(model, spec, name="a")
        kinds = {path: type(getattr(delta, "inner", delta)).__name__ for path, _, delta in adapter.deltas()}
        assert kinds == {"keys": "OutputGain", "down": "InputGain"}
        scramble(adapter.named_parameters())
        y = model(x)
        adapter.save(tmp_path / str(number))
        lk.detach(model)
        again = lk.load(model, tmp_path / str(number), name="a")
        assert again.method == spec
        with lk.use(model, "a"):
            torch.testing.assert_close(model(x), y)


def test_two_adapters_add_their_changes() -> None:
    """lorakit blends by sums: W + Σ w ΔW. PEFT multiplies the vectors, which is another composition."""
    base = MODELS["llama"]()
    for name in "ab":
        adapter = lk.attach(base, lk.IA3(feedforward_modules=[]), name=name, target_modules=["v_proj"])
        scramble(adapter.named_parameters(), seed=ord(name))
    with lk.use(base, {"a": 1.0, "b": 1.0}):
        together = logits(base, "llama")
    with lk.merged(base, {"a": 1.0, "b": 1.0}):
        assert_same(logits(base, "llama"), together)


def test_refusals() -> None:
    with pytest.raises(
        LorakitError, match=r"ia3 was given no feedforward_modules: .*\[\"down_proj\"\] for LLaMA.* \[\] if none"
    ):
        lk.attach(Block(), lk.IA3())
    with pytest.raises(
        LorakitError, match="names 'donw', which is none of the 2 adapted layers; their names end in down, keys"
    ):
        lk.attach(Block(), lk.IA3(feedforward_modules=["donw"]))
    with pytest.raises(LorakitError, match="names 'donw'"):
        lk.attach(Block(), lk.DoRA(inner=lk.IA3(feedforward_modules="donw")))
    with pytest.raises(LorakitError, match="is not one"):
        lk.IA3(feedforward_modules="(down")
    with pytest.raises(LorakitError, match="a list of names or one string"):
        lk.IA3(feedforward_modules=[3])  # type: ignore[arg-type]
    with pytest.raises(LorakitError, match="side was given as"):
        lk.IA3(side="both")
    with pytest.raises(LorakitError, match="rank_pattern was given, but ia3 has no rank"):
        lk.attach(Block(), lk.IA3(feedforward_modules=[]), rank_pattern={"down": 2})
