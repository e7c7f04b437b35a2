"""Quantised layers in a model: what is refused, what is warned of, what a start makes of them, and that PEFT agrees."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import lorakit as lk
from core.test_experts import MODELS
from laws import storages
from laws.storages import FORMAT, Foreign
from lorakit.algebra.merging import merge
from lorakit.core.sites import has_linear_face, sites_of
from lorakit.core.storage import storage_of
from lorakit.core.storage.blocks import KINDS, BlockLinear, pack, unpack
from lorakit.errors import LorakitError
from lorakit.init import LoftQ
from lorakit.models import quantisation


class Two(nn.Module):
    """Two layers of 128 → 64 and 128 → 64 beside each other, and a head."""

    def __init__(self, one: nn.Module, other: nn.Module) -> None:
        super().__init__()
        self.one, self.other, self.head = one, other, nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.one(x) + self.other(x))


def floats(seed: int = 0) -> Two:
    torch.manual_seed(seed)
    return Two(nn.Linear(128, 64), nn.Linear(128, 64, bias=False))


def packed(name: str, seed: int = 0) -> Two:
    model = floats(seed)
    model.one, model.other = FORMAT[name].pack(model.one), FORMAT[name].pack(model.other)
    return model.train()


def llama(folder: Path, **config: Any) -> LlamaForCausalLM:
    """A small Llama read from a folder, quantised as it is read."""
    if not folder.exists():
        torch.manual_seed(0)
        made = LlamaConfig(
            vocab_size=64,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
        LlamaForCausalLM(made).save_pretrained(folder)
    options = {"quantization_config": BitsAndBytesConfig(**config)} if config else {}
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)


BOTH = ["one", "other"]
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}


# -- layers ----------------------------------------------------------------------------------------------------------------


def test_a_packed_layer_is_known_by_its_face() -> None:
    layer = Foreign(nn.Linear(128, 64))
    assert has_linear_face(layer)
    (site,) = sites_of(layer)
    assert (site.layout.shape.out, site.layout.shape.in_, site.bias) == (64, 128, "bias")
    storage = storage_of(layer, site.weight)
    assert storage.label(layer, "weight") == "laws Foreign 4-bit"
    assert torch.allclose(storage.read(layer, "weight"), layer.weight_inside().T, atol=1e-5)
    assert storage.nbytes(layer, "weight") == 128 * 64 + 4 * 64 * (1 + 4)


def test_bytes_of_each_format() -> None:
    numbers = 128 * 64
    held = {name: FORMAT[name].pack(nn.Linear(128, 64)) for name in FORMAT if name != "foreign"}
    found = {name: storage_of(layer, "weight").nbytes(layer, "weight") for name, layer in held.items()}
    assert found["nf4"] == numbers // 2 + 4 * (numbers // 64) + 4 * 16
    assert found["nf4-doubled"] == numbers // 2 + numbers // 64 + 4 * 1 + 4 * (16 + 256) + 4
    assert found["int8"] == numbers + 4 * 64
    assert found["torchao-int8"] == numbers + 5 * 64 or found["torchao-int8"] == numbers + 4 * 64
    assert found["hqq-4"] == numbers // 2 + 8 * (numbers // 64)


def test_a_layer_with_the_face_that_is_not_linear_is_refused() -> None:
    class Squares(Foreign):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) ** 2

    model = Two(Squares(nn.Linear(128, 64)), nn.Linear(128, 64))
    with pytest.raises(LorakitError, match=r"Squares looks like a linear layer and is none"):
        lk.attach(model, lk.LoRA(rank=2), target_modules=["one"])
    assert not hasattr(model, "_lorakit")


def test_a_kernel_without_a_gradient_is_refused() -> None:
    class ForInference(Foreign):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.detach())

    model = Two(ForInference(nn.Linear(128, 64)), nn.Linear(128, 64))
    with pytest.raises(LorakitError, match=r"kernel of ForInference .* gives its inputs no gradient"):
        lk.attach(model, lk.LoRA(rank=2), target_modules=["one"])


def test_a_kernel_that_cannot_be_called_here_is_refused() -> None:
    class Elsewhere(Foreign):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("no kernel image is available")

    model = Two(Elsewhere(nn.Linear(128, 64)), nn.Linear(128, 64))
    with pytest.raises(LorakitError, match=r"Elsewhere .* cannot be called on cpu in torch.float32.*no kernel image"):
        lk.attach(model, lk.LoRA(rank=2), target_modules=["one"])


def test_eight_bit_floats_are_not_taken_for_the_weight() -> None:
    layer = nn.Linear(8, 4)
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(LorakitError, match="no known storage"):
        storage_of(layer, "weight")


def test_codes_are_not_trained_whole() -> None:
    model = packed("nf4")
    with pytest.raises(LorakitError, match=r"modules_to_save names one, and one is stored as nf4"):
        lk.attach(model, lk.LoRA(rank=2), target_modules=["other"], modules_to_save=["one"])
    assert not hasattr(model, "_lorakit")
    lk.attach(model, lk.LoRA(rank=2), target_modules=["other"], modules_to_save=["head"])


def test_a_layer_that_reads_its_weight_itself_needs_floats() -> None:
    attention = nn.MultiheadAttention(128, 2)
    attention.out_proj = storages.four_bit("nf4", False)(nn.Linear(128, 64))
    with pytest.raises(
        LorakitError, match=r"out_proj.weight is stored as nf4, and this layer is reached by substituting"
    ):
        lk.attach(nn.ModuleDict({"a": attention}), lk.LoRA(rank=2), target_modules=["a"])


def test_what_cannot_be_written_is_merged_into_floats_on_request() -> None:
    model = packed("foreign")
    lk.attach(model, lk.LoRA(rank=2), name="one", target_modules=["one", "other"])
    with pytest.raises(LorakitError, match=r"nothing can be written into one: .*--dtype bf16"):
        merge(model, "one")
    report = merge(model, "one", dtype=torch.bfloat16)
    assert set(report.layers) == {"one", "other"}
    assert type(model.one) is nn.Linear
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_merging_one_of_two_into_floats_leaves_the_other_as_it_is() -> None:
    model, x = packed("nf4"), torch.randn(3, 128)
    for name in ("one", "other"):
        adapter = lk.attach(model, lk.LoRA(rank=2), name=name, target_modules=[name])
        storages_random(adapter)
    with lk.use(model, {"one": 1.0, "other": 1.0}):
        expected = model(x)
    merge(model, "one", dtype=torch.float32)
    with lk.use(model, "other"):
        assert torch.allclose(model(x), expected, atol=1e-4)


def storages_random(adapter: lk.Adapter) -> None:
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1)


# -- starts ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["pissa", "olora", "milora"])
def test_starts_read_off_the_weight_leave_a_quantised_base_as_it_is(init: str) -> None:
    model, x = packed("nf4-doubled"), torch.randn(4, 128)
    before = model(x)
    adapter = lk.attach(model, lk.LoRA(rank=4), init=init, target_modules=BOTH)
    assert torch.allclose(model(x), before, atol=1e-4)
    assert all(float(delta.low_rank().factors()[0].abs().max()) > 0 for _, _, delta in adapter.deltas())


@pytest.mark.parametrize("name", ["nf4", "nf4-doubled", "fp4", "int8", "torchao-int8", "hqq-4"])
@pytest.mark.parametrize("rounds", [1, 3])
def test_loftq_answers_the_error_of_the_real_quantiser(name: str, rounds: int) -> None:
    """What is left is the tail of the spectrum of the error that the layers make, and less than without an answer."""
    model, originals = packed(name), floats().state_dict()
    plain = {path: error_of(getattr(model, path), originals[f"{path}.weight"]) for path in ("one", "other")}
    before = {path: storage_of(getattr(model, path), "weight").read(getattr(model, path), "weight") for path in plain}
    adapter = lk.attach(
        model, lk.LoRA(rank=8, alpha=32), init=LoftQ(rounds=rounds), originals=originals, target_modules=BOTH
    )
    for path, site, delta in adapter.deltas():
        layer = adapter.layers[path].base
        W, Q = originals[f"{path}.weight"], storage_of(layer, site.weight).read(layer, site.weight)
        left = torch.linalg.matrix_norm(W - Q - delta.dense(Q).detach())
        tail = torch.linalg.svdvals(W - Q)[8:].norm()
        assert torch.allclose(left, tail, rtol=1e-3), (
            "the factors are the best answer to the error of what the layer holds"
        )
        assert left < plain[path] * 0.97, f"{left} is no better than {plain[path]} without an answer"
    lk.detach(model)
    for path, value in before.items():
        assert torch.equal(storage_of(getattr(model, path), "weight").read(getattr(model, path), "weight"), value)


def error_of(layer: nn.Module, W: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(W - storage_of(layer, "weight").read(layer, "weight"))


def test_a_principal_start_leaves_less_to_quantise() -> None:
    """QPiSSA: the base is quantised without its leading part, which the adapter holds in floats."""
    torch.manual_seed(1)
    model = floats()
    with torch.no_grad():  # a spectrum that falls, as those of trained layers do
        model.one.weight.copy_(torch.randn(64, 4) @ torch.randn(4, 128) + 0.1 * torch.randn(64, 128))
    originals = copy.deepcopy(model.state_dict())
    model.one = FORMAT["nf4"].pack(model.one)
    plain = error_of(model.one, originals["one.weight"])
    adapter = lk.attach(
        model, lk.LoRA(rank=4, alpha=8), init=LoftQ(principal=True), originals=originals, target_modules=["one"]
    )
    ((_, _, delta),) = adapter.deltas()
    layer = adapter.layers["one"].base
    Q = storage_of(layer, "weight").read(layer, "weight")
    assert torch.linalg.matrix_norm(originals["one.weight"] - Q - delta.dense(Q)) < 0.2 * plain


def test_loftq_without_the_floats_is_refused() -> None:
    model = packed("nf4")
    with pytest.raises(
        LorakitError, match=r"stored as nf4, and needs the floats that it was quantised from.*originals="
    ):
        lk.attach(model, lk.LoRA(rank=4), init="loftq", target_modules=BOTH)
    assert not hasattr(model, "_lorakit")


def test_loftq_on_a_format_that_cannot_be_asked_is_refused() -> None:
    with pytest.raises(LorakitError, match="quantises by data or a search of its own"):
        lk.attach(
            packed("foreign"), lk.LoRA(rank=4), init="loftq", originals=floats().state_dict(), target_modules=BOTH
        )


# -- files -----------------------------------------------------------------------------------------------------------------


def test_another_way_of_holding_the_base_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lk.attach(packed("nf4"), lk.LoRA(rank=2), name="one", target_modules=BOTH).save(tmp_path / "one")
    with caplog.at_level(logging.WARNING, logger="lorakit"):
        lk.load(floats(), tmp_path / "one")
    assert "trained on a base held as nf4, and this one is held as float" in caplog.text
    with pytest.raises(LorakitError, match="another base model"):
        lk.load(packed("int8", seed=5), tmp_path / "one")


def test_an_adapter_whose_start_quantised_the_base_needs_it(tmp_path: Path) -> None:
    model = packed("nf4")
    adapter = lk.attach(
        model, lk.LoRA(rank=4), name="one", init=LoftQ(rounds=3), originals=floats().state_dict(), target_modules=BOTH
    )
    adapter.save(tmp_path / "one")
    with pytest.raises(LorakitError, match=r"another base model.*LoftQ"):
        lk.load(floats(), tmp_path / "one")
    lk.load(copy.deepcopy(packed("nf4")), tmp_path / "one", strict=False)


@pytest.mark.parametrize(
    "config", [NF4, {**NF4, "bnb_4bit_use_double_quant": True}, {"load_in_8bit": True}], ids=["nf4", "double", "int8"]
)
def test_peft_reads_what_was_trained_on_a_quantised_base(tmp_path: Path, config: dict[str, Any]) -> None:
    """PEFT on the same quantised base gives the same logits, and its own folder the same here."""
    from peft import PeftModel

    model = llama(tmp_path / "base", **config)
    adapter = lk.attach(model, lk.DoRA(inner=lk.LoRA(rank=4, alpha=8)), name="one")
    storages_random(adapter)
    adapter.save(tmp_path / "one")
    ids = torch.arange(12).reshape(2, 6)
    other = PeftModel.from_pretrained(llama(tmp_path / "base", **config), tmp_path / "one")
    with torch.no_grad():
        # in training mode, since bitsandbytes rounds to bfloat16 (4 bits) or inputs to 8 bits in the other
        ours, theirs = model.train()(ids).logits, other.train()(ids).logits
    assert torch.allclose(ours, theirs, atol=2e-4)
    other.save_pretrained(tmp_path / "theirs")
    again = lk.load(llama(tmp_path / "base", **config), tmp_path / "theirs")
    with torch.no_grad(), lk.use(again.model, again.name):
        assert torch.allclose(again.model.train()(ids).logits, ours, atol=1e-5)


def test_a_quantised_model_is_merged_saved_and_read_again(tmp_path: Path) -> None:
    model = llama(tmp_path / "base", **NF4)
    storages_random(lk.attach(model, lk.LoRA(rank=4), name="one"))
    report = merge(model, "one")
    assert all(0.01 < error < 0.2 for error in report.error.values()), "NF4's rounding, told for every layer"
    model.save_pretrained(tmp_path / "merged")
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        expected = model.train()(ids).logits
        again = LlamaForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).train()
        assert torch.allclose(again(ids).logits, expected, atol=1e-5)


def test_a_float_copy_is_an_ordinary_model(tmp_path: Path) -> None:
    model = llama(tmp_path / "base", **NF4)
    storages_random(lk.attach(model, lk.LoRA(rank=4), name="one"))
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        expected = model(ids).logits
    merge(model, "one", dtype=torch.float32)
    model.save_pretrained(tmp_path / "merged")
    again = llama(tmp_path / "merged")
    assert not getattr(again, "is_quantized", False)
    with torch.no_grad():
        assert torch.allclose(again(ids).logits, expected, atol=1e-4)


def test_qdylora_is_usable_at_every_rank() -> None:
    """DyLoRA on NF4: cut to a rank it is what the method itself gives at that rank."""
    model, x = packed("nf4"), torch.randn(3, 128)
    adapter = lk.attach(model, lk.DyLoRA(rank=4), name="one", target_modules=["one"])
    storages_random(adapter)
    ((_, _, delta),) = adapter.deltas()
    B, A = delta.truncated(2)
    layer = adapter.layers["one"]
    with lk.use(model, None):
        base = layer(x)
    W = storage_of(layer.base, "weight").read(layer.base, "weight")
    assert torch.allclose(base + x @ (B @ A).T, x @ (W + B @ A).T + layer.base.bias, atol=1e-4)


@pytest.mark.parametrize("kind", ["fp8", "mxfp4"])
def test_experts_that_a_library_packs_are_left_out_with_the_reason(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing can act beside a kernel that chooses, multiplies and sums by itself; the rest of the model is adapted."""
    from transformers.integrations.finegrained_fp8 import FP8Experts
    from transformers.integrations.mxfp4 import Mxfp4GptOssExperts

    model = MODELS["qwen3-moe" if kind == "fp8" else "gpt-oss"]()
    for block in model.model.layers:
        made: Any = FP8Experts(model.config, (16, 16)) if kind == "fp8" else Mxfp4GptOssExperts(model.config)
        block.mlp.experts = made
    adapter = lk.attach(model, lk.LoRA(rank=2), name="a")
    assert adapter.layers
    assert not any("experts" in path for path in adapter.layers)
    assert "holds its experts quantised" in caplog.text
    for target in (["experts"], ["experts.down_proj"], "model.layers.0.mlp.experts"):
        with pytest.raises(lk.LorakitError, match=r"dequantize=True|no layer matches|matches no layer"):
            lk.attach(model, lk.LoRA(rank=2), name="b", target_modules=target)


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_those_of_gguf_files(kind: str) -> None:
    """The very bytes that the package gguf, of llama.cpp's authors, writes, and the floats that it reads."""
    quants = pytest.importorskip("gguf.quants")
    torch.manual_seed(0)
    weight = torch.randn(6, 96) * torch.logspace(-6, 3, 6)[:, None]
    weight[2, 32:64] = 0
    theirs = {"q8_0": quants.Q8_0, "q4_0": quants.Q4_0}[kind]
    raw = torch.from_numpy(theirs.quantize_blocks(weight.view(-1, 32).numpy()))
    codes, scales = pack(weight, kind)
    assert torch.equal(scales.view(-1, 1).view(torch.uint8), raw[:, :2])
    assert torch.equal(codes.view(torch.uint8).view(18, -1), raw[:, 2:])
    floats = torch.from_numpy(theirs.dequantize_blocks(raw.numpy())).view(6, 96)
    assert torch.equal(unpack(codes, scales, kind, torch.float32), floats)


def test_rows_that_fill_no_blocks_stay_in_floats() -> None:
    model = nn.Sequential(nn.Linear(40, 64), nn.Linear(64, 8))
    quantisation.Q8().pack(model, torch.float32)
    assert type(model[0]) is nn.Linear
    assert isinstance(model[1], BlockLinear)
    with pytest.raises(LorakitError, match=r"multiple of 32 numbers, found 40"):
        pack(torch.randn(4, 40), "q8_0")
