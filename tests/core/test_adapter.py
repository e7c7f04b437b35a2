"""Attach and detach, several adapters, shared layers, copies and pickles, models that look into their layers."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorakit as lk
from core import models
from core.models import IDS, randomise
from lorakit.core.layer import Adapted
from lorakit.errors import LorakitError

pytestmark = pytest.mark.usefixtures("one_thread")


def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


# -- attach and detach -----------------------------------------------------------------------------------------------------


def test_the_model_stays_the_object_and_class_it_was() -> None:
    model = models.llama()
    kind, before = type(model), logits(model)
    adapter = lk.attach(model, lk.LoRA(rank=2))
    assert type(model) is kind
    assert adapter.model is model
    assert torch.equal(logits(model), before)
    assert lk.adapters(model) == {"default": adapter}
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    assert trainable == {id(p) for p in adapter.parameters()}
    assert adapter.num_parameters() == sum(p.numel() for p in adapter.parameters()) > 0


def test_detach_gives_back_objects_flags_and_names() -> None:
    model = models.llama()
    model.model.embed_tokens.weight.requires_grad_(False)
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    flags = {name: p.requires_grad for name, p in parameters.items()}
    bits = {name: value.clone() for name, value in model.state_dict().items()}
    for name in ("one", "two"):
        randomise(lk.attach(model, lk.LoRA(rank=2), name=name, bias="all", modules_to_save=["lm_head"]))
    assert lk.detach(model) is model
    found = dict(model.named_modules())
    assert list(found) == list(modules)
    assert all(found[name] is module for name, module in modules.items())
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert all(torch.equal(value, bits[name]) for name, value in model.state_dict().items())
    assert not hasattr(model, "_lorakit")
    assert lk.adapters(model) == {}


def test_detach_one_of_two() -> None:
    model = models.llama()
    one = lk.attach(model, lk.LoRA(rank=2), name="one", target_modules=["q_proj", "k_proj"])
    two = lk.attach(model, lk.LoRA(rank=2), name="two", target_modules=["q_proj", "v_proj"])
    randomise(one)
    randomise(two)
    lk.activate(model, "one")
    alone = logits(model)
    lk.detach(model, "two")
    attention = model.model.layers[0].self_attn
    assert [type(m) for m in (attention.q_proj, attention.k_proj, attention.v_proj)] == [Adapted, Adapted, nn.Linear]
    assert torch.equal(logits(model), alone)
    with pytest.raises(LorakitError, match='"two"'):
        lk.detach(model, "two")
    lk.detach(model, "one")
    with pytest.raises(LorakitError, match="no adapter"):
        lk.detach(model)


def test_detaching_the_active_one_leaves_the_base() -> None:
    model = models.llama()
    before = logits(model)
    lk.attach(model, lk.LoRA(rank=2), name="one")
    randomise(lk.attach(model, lk.LoRA(rank=2), name="two"))
    lk.detach(model, "two")
    assert torch.equal(logits(model), before)


def test_a_name_is_taken_once() -> None:
    model = models.llama()
    lk.attach(model, lk.LoRA(rank=2))
    with pytest.raises(LorakitError, match="'default' is on this model already"):
        lk.attach(model, lk.LoRA(rank=2))


def test_attach_keeps_training_mode_and_dtype() -> None:
    model = models.llama().bfloat16().train()
    adapter = lk.attach(model, lk.LoRA(rank=2))
    assert all(layer.training and layer.base.training for layer in adapter.layers.values())
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    assert logits(model).dtype == torch.bfloat16
    model.eval()
    assert not any(m.training for m in model.modules())


def test_state_dict_round_trip_and_refusals() -> None:
    model = models.llama()
    adapter = lk.attach(model, lk.LoRA(rank=2), bias="all", modules_to_save=["lm_head"])
    randomise(adapter)
    state = {name: value.clone() for name, value in adapter.state_dict().items()}
    assert set(state) == {name for name, _ in adapter.named_parameters()}
    assert set(adapter.roles()) == set(state)
    randomise(adapter)
    adapter.load_state_dict(state)
    assert all(torch.equal(value, state[name]) for name, value in adapter.state_dict().items())
    some = next(iter(state))
    wrong: list[tuple[dict[str, Tensor], str]] = [
        ({**state, "stray": torch.ones(1)}, "stray"),
        ({name: value for name, value in state.items() if name != some}, some),
        ({**state, some: torch.ones(1, 1)}, some),
    ]
    for given, said in wrong:
        with pytest.raises(LorakitError, match=said):
            adapter.load_state_dict({name: value + 1 for name, value in given.items()})
        assert all(torch.equal(value, state[name]) for name, value in adapter.state_dict().items())


def test_roles_are_the_papers_letters() -> None:
    model = models.bert()
    adapter = lk.attach(model, lk.LoRA(rank=2), bias="lora_only", modules_to_save=["classifier"])
    roles = adapter.roles()
    assert set(roles.values()) == {"A", "B", "bias", "saved"}
    assert sorted(name for name, role in roles.items() if role == "saved") == ["classifier.bias", "classifier.weight"]


# -- shared layers ---------------------------------------------------------------------------------------------------------


def test_a_shared_embedding_is_adapted_in_every_place() -> None:
    """T5 as it shares its embedding: one object that the model, its encoder and its decoder refer to."""
    model = models.t5()
    original = model.shared
    model.encoder.embed_tokens = model.decoder.embed_tokens = original
    run = lambda: model(input_ids=IDS, decoder_input_ids=IDS).logits  # noqa: E731
    with torch.no_grad():
        before = run()
    adapter = lk.attach(model, lk.LoRA(rank=2), target_modules=["shared"])
    places = (model.shared, model.encoder.embed_tokens, model.decoder.embed_tokens)
    assert all(place is adapter.layers["shared"] for place in places)
    randomise(adapter)
    with torch.no_grad():
        assert not torch.allclose(run(), before)
        with lk.use(model, None):
            assert torch.equal(run(), before)
    lk.detach(model)
    assert all(place is original for place in (model.shared, model.encoder.embed_tokens, model.decoder.embed_tokens))


class Twice(nn.Module):
    """One layer object under two names, and one weight in two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.again = self.first
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.tied(self.again(self.first(x)))


def test_one_object_under_two_names() -> None:
    model = Twice()
    original = model.first
    adapter = lk.attach(model, lk.LoRA(rank=2), target_modules=["first"])
    randomise(adapter)
    assert model.first is model.again
    assert isinstance(model.first, Adapted)
    x = torch.randn(3, 4)
    y = model(x)
    assert model.first(x).equal(model.again(x))
    assert y.equal(model.tied(model.first(model.first(x))))
    lk.detach(model)
    assert model.first is model.again is original


def test_attaching_to_a_tied_weight_warns(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", logger="lorakit"):
        lk.attach(Twice(), lk.LoRA(rank=2), target_modules=["first"])
    assert "shares its weight with tied" in caplog.text


# -- copies ----------------------------------------------------------------------------------------------------------------


def _pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def _torch_saved(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, _pickled, _torch_saved])
def test_a_copy_is_whole_and_apart(duplicate: Any) -> None:
    model = models.llama()
    for name in ("one", "two"):
        randomise(lk.attach(model, lk.LoRA(rank=2), name=name, parts={"q_proj": {"a": (0, 4), "b": (4, 8)}}))
    lk.activate(model, {"one": 0.5, "two": 0.5})
    twin = duplicate(model)
    assert torch.equal(logits(twin), logits(model))
    adapters = lk.adapters(twin)
    assert list(adapters) == ["one", "two"]
    assert adapters["one"].model is twin
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in model.parameters()}
    assert {id(p) for p in adapters["one"].parameters()} <= {id(p) for p in twin.parameters()}
    before = logits(model)
    lk.activate(twin, None)
    randomise(adapters["two"])
    assert torch.equal(logits(model), before)
    lk.detach(twin)
    assert torch.equal(logits(model), before)


# -- models that look into their layers ------------------------------------------------------------------------------------


class Peeking(nn.Module):
    """Reads attributes of its layers, as many models do for dtypes and devices."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 6)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.embed = nn.Embedding(5, 4, padding_idx=1)

    def forward(self, ids: Tensor) -> Tensor:
        assert self.embed.padding_idx == 1
        assert self.embed.num_embeddings == 5
        x = self.embed(ids).to(self.fc.weight.dtype)
        assert self.fc.in_features == x.shape[-1]
        y = self.fc(x) + self.fc.bias.sum() * 0
        return self.attention(y, y, y, need_weights=False)[0] * (1 if self.attention.batch_first else 0)


def test_attributes_of_the_base_are_there() -> None:
    model = Peeking().bfloat16()
    adapter = lk.attach(model, lk.LoRA(rank=2), target_modules=["fc", "attention", "embed"])
    randomise(adapter)
    y = model(torch.tensor([[0, 1, 2]]))
    assert y.dtype == torch.bfloat16
    assert y.abs().sum() > 0
    assert model.fc.weight is model.fc.base.weight
    with pytest.raises(AttributeError, match="nothing_here"):
        model.fc.nothing_here  # noqa: B018
    assert "weight" not in dict(model.fc.named_parameters(recurse=False))


# -- torch's fused encoder -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["self_attn", "linear1", "linear2"])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("stacked", [False, True])
def test_the_fused_encoder_does_not_pass_the_adapter_by(target: str, grad: bool, padded: bool, stacked: bool) -> None:
    """In eval mode torch computes an encoder layer from its weights and calls none of its parts."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    model = nn.TransformerEncoder(layer, 2) if stacked else nn.ModuleDict({"only": layer})
    encoder = model if stacked else model["only"]
    model.double().eval()
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    mask = torch.arange(5).expand(3, 5) >= torch.tensor([5, 3, 4])[:, None] if padded else None
    with torch.no_grad():
        before = encoder(x, src_key_padding_mask=mask)
    randomise(lk.attach(model, lk.LoRA(rank=2), target_modules=[target]))
    if stacked and padded and grad and target != "self_attn":
        # Torch packs the padded batch, and then its own attention of the second layer takes no packed gradients.
        with pytest.raises(AssertionError, match="NestedTensor"):
            encoder(x, src_key_padding_mask=mask)
        return
    with torch.set_grad_enabled(grad):
        eval_mode = encoder(x, src_key_padding_mask=mask)
    for dropout in (m for m in model.modules() if isinstance(m, nn.Dropout)):
        dropout.p = 0.0
    for attention in (m for m in model.modules() if isinstance(m, nn.MultiheadAttention)):
        attention.dropout = 0.0
    trained = encoder.train()(x, src_key_padding_mask=mask)
    keep = torch.ones(3, 5, dtype=torch.bool) if mask is None else ~mask
    assert not torch.allclose(eval_mode[keep], before[keep])
    assert torch.allclose(eval_mode[keep], trained[keep], atol=1e-12)
    with torch.no_grad(), lk.use(model, None):
        assert torch.allclose(encoder.eval()(x, src_key_padding_mask=mask)[keep], before[keep], atol=1e-12)


# -- biases and whole modules ----------------------------------------------------------------------------------------------


def test_trained_biases() -> None:
    counts = {}
    for bias in ("none", "lora_only", "all"):
        model = models.bert()
        adapter = lk.attach(model, lk.LoRA(rank=2), target_modules=["query"], bias=bias)
        counts[bias] = sum(role == "bias" for role in adapter.roles().values())
        total = sum(name.endswith("bias") for name, _ in models.bert().named_parameters())
    assert counts == {"none": 0, "lora_only": 2, "all": total}


def test_two_adapters_keep_their_own_biases_and_saved_modules() -> None:
    model = models.bert()
    expected = {}
    for name in ("one", "two"):
        adapter = lk.attach(
            model, lk.LoRA(rank=2), name=name, target_modules=["query"], bias="all", modules_to_save=["classifier"]
        )
        randomise(adapter)
        expected[name] = logits(model)
    base = models.bert()
    for name in ("one", "two"):
        with lk.use(model, name):
            assert torch.equal(logits(model), expected[name])
    with lk.use(model, None):
        assert torch.equal(logits(model), logits(base))
    with lk.use(model, ["one", None, "two"]):
        mixed = logits(model)
    apart = torch.stack([expected["one"][0], logits(base)[1], expected["two"][2]])
    assert torch.allclose(mixed, apart, atol=1e-5)


def test_an_adapter_of_biases_alone_blends_with_one_of_attention() -> None:
    """One replaces the bias, the other adapts the weights and the bias; the layer is reached by substitution."""
    model = nn.ModuleDict({"a": nn.MultiheadAttention(4, 2, batch_first=True), "fc": nn.Linear(4, 4)}).double()
    randomise(lk.attach(model, lk.LoRA(rank=2), name="biases", target_modules=["fc"], bias="all"))
    randomise(lk.attach(model, lk.LoRA(rank=2), name="both", target_modules=["a"], bias="lora_only"))
    x = torch.randn(3, 5, 4, dtype=torch.float64)
    blend = {"biases": 0.5, "both": 0.25}
    with lk.use(model, blend):
        acted = model["a"](x, x, x)[0]
    with lk.merged(model, blend):
        assert torch.allclose(model["a"](x, x, x)[0], acted, atol=1e-12)
    base = model["a"].base
    own = {name: adapter.state_dict() for name, adapter in lk.adapters(model).items()}
    bias = base.in_proj_bias.detach()
    expected = bias + sum(weight * (own[name]["a.in_proj_bias"] - bias) for name, weight in blend.items())
    assert torch.allclose(model["a"].substitutes(list(blend.items()))["in_proj_bias"], expected, atol=1e-12)


class Nested(nn.Module):
    """A head with layers inside, which one adapter may save whole and another adapt from within."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 4)
        self.head = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


@pytest.mark.parametrize("inner_first", [True, False])
def test_one_saves_whole_what_another_adapts_within(inner_first: bool) -> None:
    """Both act, or the second is refused; neither is ignored."""

    def inner(model: nn.Module) -> Any:
        return lk.attach(model, lk.LoRA(rank=2), name="inner", target_modules=["head.0"])

    def whole(model: nn.Module) -> Any:
        return lk.attach(model, lk.LoRA(rank=2), name="whole", target_modules=["body"], modules_to_save=["head"])

    model = Nested()
    x = torch.randn(3, 4)
    base = model(x)
    first, second = (inner, whole) if inner_first else (whole, inner)
    first(model)
    try:
        second(model)
    except LorakitError:
        return
    for adapter in lk.adapters(model).values():
        randomise(adapter)
    names = {name for name, _ in lk.adapters(model)["whole"].named_parameters()}
    assert names == {"body.A", "body.B", "head.0.weight", "head.0.bias", "head.2.weight", "head.2.bias"}
    alone = {}
    for name in ("inner", "whole"):
        with lk.use(model, name):
            alone[name] = model(x)
        assert not torch.allclose(alone[name], base)
    with lk.use(model, "whole"):
        own = dict(lk.adapters(model)["whole"].named_parameters())
        hidden = model.body(x)
        expected = torch.tanh(hidden @ own["head.0.weight"].T + own["head.0.bias"]) @ own["head.2.weight"].T
        assert torch.allclose(alone["whole"], expected + own["head.2.bias"], atol=1e-6)


# -- training loops --------------------------------------------------------------------------------------------------------


def test_a_plain_loop_learns_and_touches_nothing_else() -> None:
    model = models.llama().train()
    adapter = lk.attach(model, lk.LoRA(rank=2))
    kept = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimiser = torch.optim.Adam(adapter.parameters(), lr=0.1)
    losses = []
    for _ in range(40):
        loss = model(input_ids=IDS, labels=IDS).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert all(torch.equal(p, kept[name]) for name, p in model.named_parameters() if name in kept)


def test_transformers_gradient_checkpointing_gives_the_same_gradients() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = models.llama().train()
        adapter = lk.attach(model, lk.LoRA(rank=2))
        torch.manual_seed(1)
        randomise(adapter)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append([p.grad for p in adapter.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("name", ["half", "type", "train", "keys", "forward", "_modules"])
def test_an_adapter_may_have_the_name_of_an_attribute(name: str) -> None:
    model = nn.Sequential(nn.Linear(6, 4))
    before = model(torch.ones(2, 6))
    adapter = lk.attach(model, lk.LoRA(rank=2), name=name, target_modules=["0"])
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.fill_(0.5)
    assert not torch.equal(model(torch.ones(2, 6)), before)
    with lk.use(model, None):
        assert torch.equal(model(torch.ones(2, 6)), before)
    assert {p.data_ptr() for p in adapter.parameters()} <= {p.data_ptr() for p in model.parameters()}
    model.half().float()
    lk.detach(model)
    assert type(model[0]) is nn.Linear
