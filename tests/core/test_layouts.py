"""A layer's weight as a matrix: there and back, files' shapes, parts, embeddings with a scale or a padding index."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorakit as lk
from core.models import randomise
from laws.cases import KINDS, Kind
from lorakit.core.delta import Shape
from lorakit.core.layout import Expert, Linear, Rows
from lorakit.core.sites import sites_of, split
from lorakit.core.storage import STORAGES, storage_of
from lorakit.errors import LorakitError
from lorakit.files.packing import pack, unpack

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_matrix_there_and_back(kind: Kind) -> None:
    layer = kind.make()
    sites = sites_of(layer)
    assert sites
    for site in sites:
        stored = torch.randn_like(storage_of(layer, site.weight).read(layer, site.weight))
        M = site.layout.matrix(stored)
        assert M.shape == (site.layout.shape.out, site.layout.shape.in_)
        back = site.layout.weight(M, stored)
        if isinstance(site.layout, Expert):  # a change of one expert is a change of the stack that is zero elsewhere
            rest = [index for index in range(site.layout.count) if index != site.layout.index]
            assert not back[rest].any()
            back, stored = back[site.layout.index], stored[site.layout.index]
        assert torch.equal(back, stored)
        for axes, own in (
            ("in", torch.randn(2, M.shape[1])),
            ("out", torch.randn(M.shape[0], 2)),
            ("", torch.randn(3)),
        ):
            assert torch.equal(unpack(site.layout, pack(site.layout, own, axes), axes), own)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.options.get("parts")], ids=lambda kind: kind.name)
def test_the_layers_own_matrix_gives_the_layers_output(kind: Kind) -> None:
    layer = kind.make().double()
    (site,) = sites_of(layer)[:1]
    if not site.layout.beside:
        return
    for args, _ in kind.inputs(3):
        y = site.layout.linear(layer, args[0], site.layout.matrix(layer.weight))
        if site.bias is not None:
            y = y + site.layout.features(layer.bias, y)
        assert torch.allclose(y, layer(*args), atol=1e-12)


def test_shapes_of_convolutions_and_embeddings() -> None:
    (site,) = sites_of(nn.Conv2d(4, 6, (2, 3), groups=2))
    assert site.layout.shape == Shape(6, 12, taps=6)
    (site,) = sites_of(nn.Embedding(10, 6))
    assert site.layout.shape == Shape(6, 10, lookup=True, bias=False)


def test_sizes_that_a_model_computed_by_tensors_are_numbers() -> None:
    layer = nn.Linear(8, 4)
    layer.in_features, layer.out_features = torch.tensor(8), torch.tensor(4)  # type: ignore[assignment]
    assert type(sites_of(layer)[0].layout.shape.in_) is int
    lk.attach(nn.Sequential(layer))


def test_what_has_no_matrix() -> None:
    for layer in (nn.LayerNorm(4), nn.GRU(4, 4), nn.Dropout(), nn.ConvTranspose1d(4, 6, 3), nn.Bilinear(2, 3, 4)):
        assert sites_of(layer) == []


def test_an_embedding_that_rewrites_itself_is_refused() -> None:
    with pytest.raises(LorakitError, match="max_norm"):
        lk.attach(nn.ModuleDict({"e": nn.Embedding(9, 4, max_norm=1.0)}), lk.LoRA(rank=2), target_modules=["e"])


def test_a_weight_that_no_storage_reads_is_refused() -> None:
    model = nn.ModuleDict({"q": nn.Linear(4, 4)})
    model["q"].weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(LorakitError, match=r"no known storage"):
        lk.attach(model, lk.LoRA(rank=2), target_modules=["q"])
    assert next(storage.name for storage in STORAGES) == "float"


# -- parts -----------------------------------------------------------------------------------------------------------------


def test_parts_are_rows_in_their_order() -> None:
    (site,) = sites_of(nn.Linear(3, 8))
    q, v = split(site, {"q": (0, 2), "v": [(6, 8), (3, 4)]}, "qkv")
    assert isinstance(v.layout, Rows)
    W = torch.arange(24.0).reshape(8, 3)
    assert torch.equal(q.layout.matrix(W), W[:2])
    assert torch.equal(v.layout.matrix(W), torch.cat([W[6:8], W[3:4]]))
    whole = v.layout.weight(v.layout.matrix(W), W)
    expected = torch.zeros_like(W)
    expected[[6, 7, 3]] = W[[6, 7, 3]]
    assert torch.equal(whole, expected)


def test_parts_of_what_is_not_linear_are_refused() -> None:
    (site,) = sites_of(nn.Conv1d(4, 8, 3))
    with pytest.raises(LorakitError, match="only linear layers have row parts"):
        split(site, {"q": (0, 2)}, "conv")
    assert isinstance(sites_of(nn.Linear(4, 4))[0].layout, Linear)


def test_two_adapters_must_split_a_layer_alike() -> None:
    model = nn.ModuleDict({"qkv": nn.Linear(4, 12)})
    parts: dict[str, Any] = {"qkv": {"q": (0, 4), "v": (8, 12)}}
    lk.attach(model, lk.LoRA(rank=2), name="one", target_modules=["qkv"], parts=parts)
    lk.attach(model, lk.LoRA(rank=2), name="two", target_modules=["qkv"], parts=parts)
    with pytest.raises(LorakitError, match="other parts"):
        lk.attach(model, lk.LoRA(rank=2), name="three", target_modules=["qkv"])


def test_rows_outside_the_parts_stay() -> None:
    model = nn.ModuleDict({"qkv": nn.Linear(4, 12)})
    randomise(lk.attach(model, lk.LoRA(rank=2), target_modules=["qkv"], parts={"qkv": {"q": (0, 4), "v": (8, 12)}}))
    x = torch.randn(3, 4)
    change = model["qkv"](x) - model["qkv"].base(x)
    assert change[:, 4:8].abs().max() == 0
    assert change[:, :4].abs().min() > 0
    assert change[:, 8:].abs().min() > 0


# -- embeddings ------------------------------------------------------------------------------------------------------------


class Scaled(nn.Embedding):
    """An embedding that multiplies what it looks up, as Gemma's does."""

    def __init__(self, count: int, dim: int, scale: Any) -> None:
        super().__init__(count, dim)
        self.embed_scale = scale

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.embed_scale


@pytest.mark.parametrize("scale", [3.0, torch.tensor(3.0)], ids=["number", "tensor"])
def test_a_scaled_embedding_scales_the_change_too(scale: Any) -> None:
    model = nn.ModuleDict({"e": Scaled(9, 4, scale)}).double()
    randomise(lk.attach(model, lk.LoRA(rank=2), target_modules=["e"]))
    ids = torch.randint(9, (2, 3))
    acted = model["e"](ids)
    with lk.merged(model, "default"):
        assert torch.allclose(model["e"](ids), acted, atol=1e-12)


def test_the_padding_token_is_not_trained() -> None:
    """Its column of A starts at zero and gets no gradient, so the padding row of W + ΔW stays W's."""
    model = nn.ModuleDict({"e": nn.Embedding(9, 4, padding_idx=2)})
    adapter = lk.attach(model, lk.LoRA(rank=2), target_modules=["e"])
    optimiser = torch.optim.SGD(adapter.parameters(), lr=0.5)
    ids = torch.arange(9)[None]
    for _ in range(3):
        optimiser.zero_grad()
        (model["e"](ids) - 1).square().sum().backward()
        optimiser.step()
    change = model["e"](ids) - model["e"].base(ids)
    assert change[0, 2].abs().max() == 0
    assert change[0, [0, 1, 3, 8]].abs().max() > 0
