"""Layers are known by what they do: classes that inherit from a known one and compute something else are not taken for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils import weight_norm as old_weight_norm
from transformers.models.bit.modeling_bit import WeightStandardizedConv2d
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.gemma.modeling_gemma import GemmaTextScaledWordEmbedding
from transformers.models.layoutlmv3.modeling_layoutlmv3 import LayoutLMv3Encoder
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.llama4.configuration_llama4 import Llama4TextConfig
from transformers.models.llama4.modeling_llama4 import Llama4Router
from transformers.models.mamba.modeling_mamba import MambaMixer
from transformers.models.opt.modeling_opt import OPTLearnedPositionalEmbedding
from transformers.pytorch_utils import Conv1D

import lorakit as lk
from lorakit.adapter.coverage import coverage
from lorakit.core import known
from lorakit.core.known import is_known, multiplied_by, read_by
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


def hooked_weight() -> nn.Linear:
    """A user's own norm: the weight is written anew before each call."""
    layer = nn.Linear(8, 6)
    layer.raw = layer._parameters.pop("weight")

    def write(module: Any, inputs: Any) -> None:
        module.weight = module.raw / module.raw.norm()

    write(layer, None)
    layer.register_forward_pre_hook(write)
    return layer


def pruned() -> nn.Module:
    return prune.l1_unstructured(nn.Linear(8, 6), "weight", 0.5)


COMPUTED: dict[str, nn.Module] = {
    "weight_norm": parametrizations.weight_norm(nn.Linear(8, 6)),
    "weight_norm of a convolution": parametrizations.weight_norm(nn.Conv1d(4, 6, 3)),
    "spectral_norm": parametrizations.spectral_norm(nn.Linear(8, 6)),
    "orthogonal": parametrizations.orthogonal(nn.Linear(6, 6)),
    "weight_norm by hooks": old_weight_norm(nn.Linear(8, 6)),
    "pruned": pruned(),
    "by a hook": hooked_weight(),
}


def around(layer: nn.Module, what: str) -> nn.Module:
    """A layer object of a known class around which a user has set something."""
    if what == "output":
        layer.register_forward_hook(lambda module, inputs, output: output * 3)
    elif what == "input":
        layer.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 3,))
    elif what == "observer":
        layer.register_forward_hook(lambda module, inputs, output: None)
    else:
        layer.forward = MethodType(lambda self, x: type(self).forward(self, x) * 3, layer)  # type: ignore[method-assign]
    return layer


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
    model = nn.ModuleDict({"layer": layer, "other": nn.Linear(2, 2)})
    for targets in (["layer"], "la.er"):
        with pytest.raises(LorakitError, match="matches layer: its weight is computed at each call"):
            lk.attach(model, lk.LoRA(rank=2), target_modules=targets)


def test_an_expression_leaves_a_computed_weight_out_aloud(caplog: pytest.LogCaptureFixture) -> None:
    model = Around(parametrizations.weight_norm(nn.Linear(8, 6)))
    adapter = lk.attach(model, lk.LoRA(rank=2), target_modules="first|layer")
    assert list(adapter.layers) == ["first"]
    assert "matches layer, which is left out: its weight is computed at each call" in caplog.text


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Embedding(9, 6, max_norm=1.0)

    def forward(self, x: Tensor) -> Any:
        return self.layer((x[:, 0] > 0).long())


WHOLE: dict[str, Callable[[], nn.Module]] = {
    "weight_norm": lambda: Around(parametrizations.weight_norm(nn.Linear(8, 6))),
    "spectral_norm": lambda: Around(parametrizations.spectral_norm(nn.Linear(8, 6))),
    "orthogonal": lambda: Around(parametrizations.orthogonal(nn.Linear(8, 8))),
    "weight_norm by hooks": lambda: Around(old_weight_norm(nn.Linear(8, 6))),
    "pruned": lambda: Around(pruned()),
    "by a hook": lambda: Around(hooked_weight()),
    "inside a module": lambda: Around(nn.Sequential(parametrizations.weight_norm(nn.Linear(8, 6)), nn.Tanh())),
    "max_norm": Words,
}
"""Layers to which nothing can be added, trained whole as their refusal says."""


@pytest.mark.parametrize("build", WHOLE.values(), ids=WHOLE)
def test_what_computes_its_weight_trains_whole(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = build().eval(), torch.randn(4, 8)
    names, outputs = list(model.state_dict()), {}
    with torch.no_grad():
        base = model(x).clone()
        for name in ("one", "two"):
            adapter = lk.attach(model, lk.LoRA(rank=2), name=name, target_modules=[], modules_to_save=["layer"])
            lk.activate(model, name)
            assert torch.equal(model(x), base)
            for parameter in adapter.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.3)
            model(x)  # max_norm writes the adapter's own rows at the first call
            outputs[name] = model(x)
            assert not torch.allclose(outputs[name], base, atol=1e-3)
            with lk.merged(model, name):
                torch.testing.assert_close(model(x), outputs[name])
        with lk.use(model, ["one", "two", "one", "two"]):
            rows = model(x)
        torch.testing.assert_close(rows[::2], outputs["one"][::2])
        torch.testing.assert_close(rows[1::2], outputs["two"][1::2])
        lk.adapters(model)["one"].save(tmp_path)
        lk.detach(model)
        assert torch.equal(model(x), base)
        assert list(model.state_dict()) == names
        lk.load(model, tmp_path)
        torch.testing.assert_close(model(x), outputs["one"])


@pytest.mark.parametrize("what", ["output", "input", "observer", "forward"])
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_what_stands_around_a_layer_acts_on_its_change_too(kind: type[nn.Module], what: str, tmp_path: Path) -> None:
    """Beside, merged and loaded onto a layer without it: the change is that of the weight. Presets take layers with hooks."""
    torch.manual_seed(0)
    model, x = Around(around(kind(8, 8), what)).eval(), torch.randn(3, 8)
    preset = lk.attach(model, lk.LoRA(rank=2), name="preset")
    assert ("layer" in preset.layers) == (what != "forward")
    lk.detach(model)
    adapter = lk.attach(model, lk.LoRA(rank=2), name="one", target_modules=["layer"])
    with torch.no_grad():
        base = model(x)
        for parameter in adapter.parameters():
            nn.init.normal_(parameter)
        beside = model(x)
        assert not torch.allclose(beside, base)
        with lk.merged(model, "one"):
            torch.testing.assert_close(model(x), beside)
        adapter.save(tmp_path)
        bare = Around(kind(8, 8)).eval()
        bare.load_state_dict(model.state_dict(), strict=False)
        lk.load(bare, tmp_path)
        times = {"output": 3.0, "forward": 3.0}.get(what, 1.0)
        if what == "input":
            bare.layer.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 3,))
        torch.testing.assert_close(bare(x) * times, beside)


def test_a_layer_of_its_own_forward_has_its_kinds_names_in_files(tmp_path: Path) -> None:
    for layer in (Trebled(9, 4), nn.Embedding(9, 4)):
        model = nn.ModuleDict({"layer": layer})
        lk.attach(model, lk.LoRA(rank=2), target_modules=["layer"]).save(tmp_path / type(layer).__name__)
        assert "base_model.model.layer.lora_embedding_A" in load_file(
            tmp_path / type(layer).__name__ / "adapter_model.safetensors"
        )


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


class Reader(nn.Module):
    """Reads one layer's weight by itself, asks about another's, and does both with a third."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.asked, self.both = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.asked(x.to(self.asked.weight.dtype)))
        x = torch.tanh((self.read.weight @ x.mT).mT + self.read.bias)
        return self.both(x) - self.both.bias if isinstance(self.both.weight, Tensor) else x


def test_layers_whose_weights_a_model_reads() -> None:
    assert {name.partition(".")[0] for name in read_by(Reader)} == {"read", "both"}
    assert "dt_proj.bias" in read_by(MambaMixer)
    assert "rel_pos_bias.weight" in read_by(LayoutLMv3Encoder)
    assert not read_by(LlamaAttention) | read_by(nn.TransformerEncoderLayer)


def test_a_read_weight_has_the_adapter_in_it() -> None:
    torch.manual_seed(0)
    model, x = Reader().double().requires_grad_(False), torch.randn(2, 3, 8, dtype=torch.float64)
    base = model(x)
    adapter = lk.attach(model, lk.LoRA(rank=2), name="a")
    with torch.no_grad():  # torch folds a product otherwise where an input has a gradient
        assert torch.equal(model(x), base)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    beside = model(x)
    beside.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in adapter.parameters())
    with torch.no_grad(), lk.merged(model, "a"):
        torch.testing.assert_close(model(x), beside)
    with lk.use(model, None):
        assert torch.equal(model(x), base)
    with lk.use(model, ["a", None]), pytest.raises(LorakitError, match="reads the weight of this layer by itself"):
        model(x)


class Quantising(nn.Module):
    """The sizes of a linear layer, a float weight, and a tuple for a result (I-BERT's)."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = 8, 6
        self.weight, self.bias = nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.zeros(6))

    def forward(self, x: Tensor) -> tuple[Tensor, float]:
        return F.linear(x.round(), self.weight, self.bias), 1.0


def test_sizes_alone_make_no_linear_layer() -> None:
    torch.manual_seed(0)
    model = Around(Quantising())
    assert list(lk.attach(model, lk.LoRA(rank=2), name="a").layers) == ["first"]
    adapter = lk.attach(model, lk.LoRA(rank=2), name="b", target_modules=["layer"])
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(3, 8)
    with torch.no_grad(), lk.use(model, "b"):
        beside = model(x)[0]
    with torch.no_grad(), lk.merged(model, "b"):
        torch.testing.assert_close(model(x)[0], beside)


def test_the_start_has_the_bits_of_an_expanded_input() -> None:
    """torch multiplies an expanded input by another loop than its rows."""
    torch.manual_seed(0)
    model, x = (
        nn.Sequential(nn.Linear(64, 48, bias=False)).requires_grad_(False),
        torch.randn(1, 7, 64).expand(5, 7, 64),
    )
    base = model(x)
    lk.attach(model, lk.LoRA(rank=2), target_modules=["0"])
    assert torch.equal(model(x), base)


class Listed(nn.Module):
    """Calls its layers from a plain list (Mask2Former's heads)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = [nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)]
        for index, layer in enumerate(self.layers):
            self.add_module(str(index), layer)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_layers_that_are_called_from_a_list() -> None:
    torch.manual_seed(0)
    model, x = Listed().double(), torch.randn(3, 8, dtype=torch.float64)
    before, base = list(model.layers), model(x)
    adapter = lk.attach(model, lk.LoRA(rank=2), name="a")
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    with torch.no_grad():
        beside = model(x)
        assert not torch.allclose(beside, base)
        with lk.merged(model, "a"):
            torch.testing.assert_close(model(x), beside)
    lk.detach(model)
    assert model.layers == before


class Multiplier(nn.Module):
    """Parameters of two axes that are multiplied as matrices, and others that are added, looked up, or a decay."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("at", "linear", "viewed", "summed", "A_log", "table", "positions", "offset"):
            setattr(self, name, nn.Parameter(torch.ones(4, 4)))
        self.proj = nn.Linear(4, 4)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        A = -torch.exp(self.A_log.float())
        turned = self.viewed.float().transpose(0, 1)
        x = self.proj(x) @ self.at + F.linear(x, self.linear) + torch.matmul(x, turned)
        x = torch.einsum("...i,ij->...j", x, self.summed) + torch.addmm(self.offset, x, self.at)
        return x * A + self.table[ids] + self.positions


def test_matrices_are_what_is_multiplied() -> None:
    assert multiplied_by(Multiplier) == {"at", "linear", "viewed", "summed"}
    assert multiplied_by(nn.LSTM) is None
    found = coverage(nn.ModuleDict({"a": Multiplier(), "b": nn.LSTM(4, 4)}), ["a.proj"])
    assert (found.reached, found.total) == (16, 16 + 4 * 16 + 2 * 4 * 16)
    assert set(found.left) == {"a.at", "a.linear", "a.viewed", "a.summed", "b.weight_ih_l0", "b.weight_hh_l0"}


def test_saving_says_where_peft_reads_the_folder_otherwise(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(Cosine(6, 4), nn.Linear(4, 3))
    lk.attach(model, lk.LoRA(rank=2), name="all", target_modules=["0", "1"]).save(tmp_path / "all")
    assert caplog.text.count("save: Cosine: a class with a forward of its own. PEFT will add") == 1
    caplog.clear()
    lk.attach(model, lk.LoRA(rank=2), name="plain", target_modules=["1"]).save(tmp_path / "plain")
    assert "a forward of its own. PEFT" not in caplog.text
