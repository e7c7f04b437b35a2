"""Layers are known by what they do: classes that inherit from a known one and compute something else are not taken for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils import weight_norm as old_weight_norm
from transformers.models.bit.modeling_bit import WeightStandardizedConv2d
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.gemma.modeling_gemma import GemmaTextScaledWordEmbedding
from transformers.models.llama4.configuration_llama4 import Llama4TextConfig
from transformers.models.llama4.modeling_llama4 import Llama4Router
from transformers.models.opt.modeling_opt import OPTLearnedPositionalEmbedding

import lorakit as lk
from lorakit.core import known
from lorakit.core.known import is_known
from lorakit.errors import LorakitError


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 0.5


class Cosine(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.normalize(x, dim=-1), F.normalize(self.weight, dim=-1))


class Masked(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.tril(), self.bias)


class Noisy(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.dropout(x, 0.5, self.training))


class Rewritten(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight.mT
        return y if self.bias is None else y + self.bias


class Trebled(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * 3


def router() -> nn.Module:
    sizes = {"hidden_size": 8, "num_local_experts": 4, "num_experts_per_tok": 1, "num_attention_heads": 2}
    return Llama4Router(Llama4TextConfig(**sizes))


SAME: dict[str, nn.Module] = {
    "linear": nn.Linear(8, 6),
    "no forward of its own": type("Named", (nn.Linear,), {})(8, 6),
    "the same in other words": Rewritten(8, 6),
    "Falcon's": FalconLinear(8, 6),
    "convolution": nn.Conv2d(4, 6, 3, padding=1),
    "embedding": nn.Embedding(9, 4, padding_idx=1),
    "Gemma's scaled embedding": GemmaTextScaledWordEmbedding(9, 4, 0, embed_scale=2.0),
}
OTHER: dict[str, nn.Module] = {
    "scaled": Scaled(8, 6),
    "cosine classifier": Cosine(8, 6),
    "masked": Masked(8, 8),
    "dropout inside": Noisy(8, 6),
    "standardised convolution": WeightStandardizedConv2d(4, 6, 3, padding=1),
    "embedding times three": Trebled(9, 4),
    "OPT's positions": OPTLearnedPositionalEmbedding(9, 4),
    "Llama 4's router": router(),
}
COMPUTED: dict[str, nn.Module] = {
    "weight_norm": parametrizations.weight_norm(nn.Linear(8, 6)),
    "weight_norm of a convolution": parametrizations.weight_norm(nn.Conv1d(4, 6, 3)),
    "spectral_norm": parametrizations.spectral_norm(nn.Linear(8, 6)),
    "orthogonal": parametrizations.orthogonal(nn.Linear(6, 6)),
    "weight_norm by hooks": old_weight_norm(nn.Linear(8, 6)),
}


@pytest.mark.parametrize("layer", SAME.values(), ids=SAME)
def test_known_by_what_it_computes(layer: nn.Module) -> None:
    assert is_known(layer)


@pytest.mark.parametrize("layer", SAME.values(), ids=SAME)
def test_known_without_weights_too(layer: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known, "_TRIED", {})
    assert is_known(layer.to("meta"))


@pytest.mark.parametrize("layer", {**OTHER, **COMPUTED}.values(), ids={**OTHER, **COMPUTED})
def test_not_known_by_its_class_alone(layer: nn.Module) -> None:
    assert not is_known(layer)


class Around(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.first, self.layer = nn.Linear(8, 8), layer

    def forward(self, x: Tensor) -> Any:
        return self.layer(torch.tanh(self.first(x)))


@pytest.mark.parametrize("name", ["scaled", "cosine classifier", "masked", "Llama 4's router"])
def test_presets_leave_it_out_aloud_and_by_name_it_goes_by_substitution(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model = Around(OTHER[name]).eval()
    with caplog.at_level("WARNING"):
        adapter = lk.attach(model, lk.LoRA(rank=2), name="preset")
    assert list(adapter.layers) == ["first"]
    assert "leaves out layer" in caplog.text
    assert "forward of its own" in caplog.text
    lk.detach(model)
    adapter = lk.attach(model, lk.LoRA(rank=2), name="named", target_modules=["layer"])
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(3, 8)

    def first(y: Any) -> Tensor:
        return y[0] if isinstance(y, tuple) else y

    with torch.no_grad():
        beside = first(model(x))
        with lk.use(model, None):
            base = first(model(x))
        with lk.merged(model, "named"):
            merged = first(model(x))
        lk.merge(model, "named")
        after = first(model(x))
    torch.testing.assert_close(beside, merged)
    torch.testing.assert_close(beside, after)
    assert not torch.allclose(beside, base)


@pytest.mark.parametrize("layer", COMPUTED.values(), ids=COMPUTED)
def test_a_computed_weight_is_refused_with_the_reason(layer: nn.Module) -> None:
    with pytest.raises(LorakitError, match="its weight is computed at each call"):
        lk.attach(nn.ModuleDict({"layer": layer, "other": nn.Linear(2, 2)}), lk.LoRA(rank=2), target_modules=["layer"])


def test_the_trial_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial that believes the class lets a scaled layer pass, and then beside and merged differ."""
    monkeypatch.setattr(known, "_TRIED", {Scaled: True})
    model = Around(Scaled(8, 6)).eval()
    adapter = lk.attach(model, lk.LoRA(rank=2), name="a", target_modules=["layer"])
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(3, 8)
    with torch.no_grad():
        beside = model(x)
        with lk.merged(model, "a"):
            assert not torch.allclose(beside, model(x))


def test_an_output_changed_in_place() -> None:
    """Models add residuals and masks into a layer's output."""

    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(8, 6)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            y.add_(1.0)
            y[..., 0] *= 2
            return y

    model, x = InPlace().double(), torch.randn(2, 3, 8, dtype=torch.float64)
    adapter = lk.attach(model, lk.LoRA(rank=2), target_modules=["a"])
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    model(x).square().sum().backward()
    found = [parameter.grad.clone() for parameter in adapter.parameters()]
    (_, _, delta), *_ = adapter.deltas()
    W = model.a.base.weight.detach() + delta.dense(model.a.base.weight.detach())
    y = F.linear(x, W, model.a.base.bias.detach()) + 1
    y = torch.cat([y[..., :1] * 2, y[..., 1:]], -1)
    for own, expected in zip(found, torch.autograd.grad(y.square().sum(), list(adapter.parameters())), strict=True):
        torch.testing.assert_close(own, expected)
