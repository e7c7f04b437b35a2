"""Every edit against a few independent lines of its paper, and its errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import lorakit as lk
from edits.laws import Case, assert_close
from edits.models import inputs, make
from lorakit.edits import Bottleneck, LLaMAAdapter, LoReFT, PrefixTuning, PTuning
from lorakit.errors import LorakitError
from lorakit.files.packing import edit_tensors
from lorakit.train.step.loss import PACKED, PADDED
from lorakit.train.step.support import choose_path
from training.tiny import llama as tiny_llama
from training.tiny import rows


def random(model: Any, spec: Any) -> lk.Adapter:
    return Case(spec, "llama").attach(model)


def output_of(model: Any, path: str, given: dict[str, Tensor], after: bool = True) -> list[Tensor]:
    """What a module gets or gives in a call of the model."""
    seen: list[Tensor] = []

    def look(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        value = output if after else (args[0] if args else kwargs["hidden_states"])
        seen.append(value if isinstance(value, Tensor) else value[0])

    handle = model.get_submodule(path).register_forward_hook(look, with_kwargs=True)
    model(**given)
    handle.remove()
    return seen


def test_bottlenecks_stand_where_their_papers_put_them() -> None:
    relu, given = torch.relu, inputs("llama")
    for placement, factor, path in (
        ("houlsby", 1.0, "self_attn.o_proj"),
        ("pfeiffer", 1.0, "mlp.down_proj"),
        ("parallel", 4.0, "mlp.down_proj"),
    ):
        model = make("llama")
        base = output_of(model, f"model.layers.0.{path}", given)[0]
        adapter = random(model, Bottleneck(size=3, placement=placement, scale=factor))
        D, d, U, u = list(adapter.parameters())[:4]
        found = output_of(model, f"model.layers.0.{path}", given)[0]
        h = output_of(model, "model.layers.0.mlp", given, after=False)[0] if placement == "parallel" else base
        assert_close(found, base + factor * (relu(h @ D.T + d) @ U.T + u), placement)
    counts = {
        p: len(random(make("llama"), Bottleneck(size=3, placement=p)).edits)
        for p in ("houlsby", "pfeiffer", "parallel")
    }
    assert counts == {"houlsby": 4, "pfeiffer": 2, "parallel": 2}
    assert (
        len(random(make("t5"), Bottleneck(size=3)).edits) == 10
    )  # two per block, and one for each look at the encoder


def test_bottleneck_starts_near_the_base() -> None:
    edit = next(iter(lk.attach(make("llama"), Bottleneck(size=64, spread=0.01)).edits.values()))
    U: Any = edit.get_parameter("U")
    assert 0.006 < U.std() < 0.01
    assert U.abs().max() <= 0.02


def attention(model: Any, layer: int, hidden: Tensor) -> tuple[Any, Tensor, Tensor, Tensor]:
    """A Llama layer's attention by hand: module, q, k, v (rows, heads, tokens, size), rotated, of equal heads."""
    module = model.model.layers[layer].self_attn
    shape = (*hidden.shape[:2], -1, module.head_dim)
    q, k, v = (one(hidden).view(shape).transpose(1, 2) for one in (module.q_proj, module.k_proj, module.v_proj))
    return module, q, k, v


def rotated(one: Tensor, start: int, size: int) -> Tensor:
    """Rotary positions by complex numbers, written apart from transformers: pairs (i, i + size / 2)."""
    angle = (start + torch.arange(one.shape[2]).double())[:, None] * 10000.0 ** (
        -torch.arange(0, size, 2).double() / size
    )
    low, high = one.chunk(2, dim=-1)
    return torch.cat([low * angle.cos() - high * angle.sin(), high * angle.cos() + low * angle.sin()], dim=-1)


def test_a_prefix_is_a_convex_combination() -> None:
    """λ Attn(q, P) + (1 - λ) Attn(q, K, V), positions behind the prefix."""
    model = make("llama")
    ids = inputs("llama")["input_ids"]
    adapter = random(model, PrefixTuning(tokens=3, width=None))
    K, V = (one.repeat_interleave(2, dim=0)[None] for one in list(adapter.parameters())[:2])
    hidden = output_of(model, "model.layers.0.self_attn", {"input_ids": ids}, after=False)[0]
    found = output_of(model, "model.layers.0.self_attn.o_proj", {"input_ids": ids}, after=False)[0]
    _, q, k, v = attention(model, 0, hidden)
    q, k = rotated(q, 3, 4), rotated(k, 3, 4).repeat_interleave(2, dim=1)
    v = v.repeat_interleave(2, dim=1)
    own = (q @ k.transpose(2, 3) / 2).masked_fill(torch.ones(7, 7, dtype=torch.bool).triu(1), -torch.inf)
    to_prefix = q @ K.transpose(2, 3) / 2
    share = (to_prefix.logsumexp(-1) - torch.cat([to_prefix, own], -1).logsumexp(-1)).exp()[..., None]
    expected = share * (to_prefix.softmax(-1) @ V) + (1 - share) * (own.softmax(-1) @ v)
    assert 0.05 < share.mean() < 0.95
    error = (found - expected.transpose(1, 2).flatten(2)).abs().max()
    assert error < 1e-6  # transformers computes angles in float32


def test_a_prefix_through_its_network_is_the_table_that_is_saved() -> None:
    adapter = random(make("llama"), PrefixTuning(tokens=3, width=5))
    table = edit_tensors(adapter)["", "prompt_embeddings"]
    edits: list[Any] = list(adapter.edits.values())
    E, first = edits[0].shared.E, edits[0].shared.first
    inner = torch.tanh(E @ first.weight.T + first.bias)
    expected = torch.cat([inner @ one.second.weight.T + one.second.bias for one in edits], dim=1)
    assert_close(table, expected.detach(), "the table")


def test_llama_adapter_is_two_softmaxes() -> None:
    model = make("llama")
    ids = inputs("llama")["input_ids"]
    adapter = random(model, LLaMAAdapter(tokens=3, top=2))
    P, g = list(adapter.parameters())[:2]
    hidden = output_of(model, "model.layers.0.self_attn", {"input_ids": ids}, after=False)[0]
    found = output_of(model, "model.layers.0.self_attn.o_proj", {"input_ids": ids}, after=False)[0]
    with lk.use(model, None):
        base = output_of(model, "model.layers.0.self_attn.o_proj", {"input_ids": ids}, after=False)[0]
    module, q, _, _ = attention(model, 0, hidden)
    keys, values = (
        one(P).view(3, 2, 4).transpose(0, 1).repeat_interleave(2, dim=0) for one in (module.k_proj, module.v_proj)
    )
    shares = (rotated(q, 0, 4) @ keys.transpose(1, 2) / 2).softmax(-1)
    added = torch.tanh(g)[:, None, None] * (shares @ values)
    assert (found - base - added.transpose(1, 2).flatten(2)).abs().max() < 1e-6


def test_llama_adapters_first_step_moves_the_gates_alone() -> None:
    model, given = make("llama"), inputs("llama")
    adapter = lk.attach(model, LLaMAAdapter(tokens=3, top=1))
    model(**given).logits.square().mean().backward()
    P, g = adapter.parameters()
    assert next(iter(adapter.edits)).path == "model.layers.1.self_attn"
    assert P.grad is not None
    assert g.grad is not None
    assert P.grad.abs().max() == 0
    assert g.grad.abs().min() > 0


def test_loreft_edits_a_subspace_at_the_prompts_ends() -> None:
    given = inputs("llama", left=True)
    model = make("llama")
    base = output_of(model, "model.layers.0", given)[0]
    adapter = random(model, LoReFT(rank=2, first=1, last=2))
    R, W, b = list(adapter.parameters())[:3]
    found = output_of(model, "model.layers.0", given)[0]
    rows_of_R = torch.linalg.qr(R.T)[0].T
    projector = rows_of_R.T @ rows_of_R  # the same for any orthonormal basis of the rows
    for row, real in enumerate(([0, 5, 6], [2, 5, 6], [4, 5, 6])):
        changed = (found[row] - base[row]).abs().max(dim=1).values.nonzero().flatten().tolist()
        assert changed == real
        delta = found[row, real] - base[row, real]
        assert_close(delta, delta @ projector, "outside of the subspace")
    edit: Any = next(iter(adapter.edits.values()))
    turned = edit.rotation()
    assert_close(turned @ turned.T, torch.eye(2, dtype=torch.float64), "orthonormal rows")
    h = base[0, 5]
    assert_close(found[0, 5], h + turned.T @ (W @ h + b - turned @ h), "the formula")


def test_loreft_is_told_where_prompts_end() -> None:
    given = inputs("llama")
    model = make("llama")
    base = output_of(model, "model.layers.0", given)[0]
    random(model, LoReFT(rank=2, first=0, last=1))
    with lk.prompts(model, [4, 2, 1]):
        found = output_of(model, "model.layers.0", given)[0]
    assert [(found[row] - base[row]).abs().max(dim=1).values.nonzero().tolist() for row in range(3)] == [
        [[3]],
        [[1]],
        [[0]],
    ]
    with lk.prompts(model, [4, 2]), pytest.raises(LorakitError, match="2 lengths were given for a batch of 3 rows"):
        model(**given)
    with pytest.raises(LorakitError, match="was called outside of its model"):
        model.model.layers[0](
            torch.zeros(1, 2, 16).double(),
            position_embeddings=model.model.rotary_emb(torch.zeros(1, 2, 16), torch.arange(2)[None]),
        )


def test_p_tunings_rows_are_its_networks() -> None:
    adapter = random(make("llama"), PTuning(tokens=3, width=5))
    edit: Any = next(iter(adapter.edits.values()))
    first, second, third = (edit.network[place] for place in (0, 2, 4))
    expected = third(torch.relu(second(torch.relu(first(edit.E)))))
    assert_close(edit.rows(), expected, "rows")
    assert_close(edit.kept()["P"], expected, "what is saved")


@pytest.mark.parametrize(
    "spec",
    [
        Bottleneck(size=4),
        Bottleneck(size=4, placement="parallel"),
        LLaMAAdapter(tokens=3, top=1),
        PTuning(tokens=3, width=4),
        PrefixTuning(tokens=3, width=4),
        PrefixTuning(tokens=3, width=None),
    ],
    ids=lambda s: s.name,
)
def test_flat_rows_are_the_padded_batch(spec: Any) -> None:
    model = tiny_llama(torch.float64)
    adapter = lk.attach(model, spec)
    model.double()
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    assert choose_path(model) is PACKED
    examples, found = rows(4, prefix=18), []
    for path in (PACKED, PADDED):
        with path.opened(model):
            path.loss(model, examples, num_items=7.0)[0].backward()
        found.append([p.grad.clone() for p in adapter.parameters() if p.grad is not None])
        model.zero_grad()
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-8)
    assert max(grad.abs().max() for grad in found[0]) > 1e-3


@pytest.mark.parametrize("spec", [LoReFT(rank=2)], ids=lambda s: s.name)
def test_what_cannot_be_flat_is_padded_and_says_so(spec: Any, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_llama()
    lk.attach(model, spec)
    with caplog.at_level("INFO", logger="lorakit"):
        assert choose_path(model) is PADDED
    assert f"padded batches ({spec.name} does not support packing: {spec.needs_padding})" in caplog.text


def test_two_prefixes_are_refused_in_a_packed_batch() -> None:
    model = tiny_llama()
    for name in ("one", "two"):
        lk.attach(model, PrefixTuning(tokens=3), name=name)
    with PACKED.opened(model), lk.use(model, ["one"]), pytest.raises(LorakitError, match="use the padded path"):
        PACKED.loss(model, rows(2), num_items=1.0)


@pytest.mark.parametrize(
    ("make_spec", "says"),
    [
        (lambda: Bottleneck(size=0), "size was given as 0"),
        (lambda: Bottleneck(placement="parallell"), "houlsby, pfeiffer, parallel"),
        (lambda: Bottleneck(activation="swish"), "relu, gelu, silu, tanh"),
        (lambda: PTuning(encoder="gru"), "one of mlp, lstm"),
        (lambda: PrefixTuning(tokens=-1), "an integer of at least 1"),
        (lambda: PrefixTuning(width=0), "an integer of at least 1, or None"),
        (lambda: LLaMAAdapter(gate="token"), "one of head, layer"),
        (lambda: LoReFT(rank=0), "rank was given as 0"),
        (lambda: LoReFT(first=0, last=0), "edits no token"),
        (lambda: LoReFT(start="zero"), "one of identity, random"),
    ],
)
def test_options_that_cannot_be(make_spec: Any, says: str) -> None:
    with pytest.raises(LorakitError, match=says):
        make_spec()


def test_places_that_cannot_be() -> None:
    model = make("llama")
    for spec, options, says in (
        (Bottleneck(), {"layers": [5]}, "layers names block 5, but bottleneck can act in blocks 0 to 1"),
        (PrefixTuning(), {"layers": [0]}, "acts in every layer"),
        (LLaMAAdapter(top=3), {}, "this model has 2 layers"),
        (LLaMAAdapter(top=1), {"layers": [0]}, "both layers and top"),
        (LoReFT(rank=17), {}, "have 16 numbers"),
    ):
        with pytest.raises(LorakitError, match=says):
            lk.attach(model, spec, **options)
    assert not lk.adapters(model)
    placed = lk.attach(model, Bottleneck(size=2, placement="pfeiffer"), layers=[1]).edits
    assert [place.path for place in placed] == ["model.layers.1.mlp.down_proj"]
