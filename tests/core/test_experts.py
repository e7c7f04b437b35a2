"""Stacks of experts of real architectures: reached by the default, equal merged, row by row, and never built as W + ΔW."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as T
from torch import Tensor, nn

import lorakit as lk
from lorakit.adapter.coverage import coverage
from lorakit.core.lazy_sum import LazySum, Pairs
from lorakit.errors import LorakitError

SMALL: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2, "vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TOP2 = {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
SHARED = {"shared_expert_intermediate_size": 24, "decoder_sparse_step": 1}
DEEP: dict[str, Any] = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
}
LLAMA4 = {"head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 4, "interleave_moe_layer_step": 1}

MODELS: dict[str, Callable[[], nn.Module]] = {
    "mixtral": lambda: T.MixtralForCausalLM(T.MixtralConfig(**SMALL, num_local_experts=4)),
    "qwen3-moe": lambda: T.Qwen3MoeForCausalLM(T.Qwen3MoeConfig(**SMALL, **TOP2, num_experts=4)),
    "qwen2-moe": lambda: T.Qwen2MoeForCausalLM(T.Qwen2MoeConfig(**SMALL, **TOP2, **SHARED, num_experts=4)),
    "gpt-oss": lambda: T.GptOssForCausalLM(
        T.GptOssConfig(**SMALL, head_dim=8, num_local_experts=4, num_experts_per_tok=2)
    ),
    "deepseek-v3": lambda: T.DeepseekV3ForCausalLM(T.DeepseekV3Config(**{**SMALL, **DEEP})),
    "llama4": lambda: T.Llama4ForCausalLM(T.Llama4TextConfig(**SMALL, **LLAMA4, num_experts_per_tok=1)),
    "granite-moe": lambda: T.GraniteMoeForCausalLM(
        T.GraniteMoeConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2)
    ),
}
IDS = torch.arange(3, 27).reshape(3, 8)


def model_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)
    return model


def attached(model: nn.Module, name: str, **options: Any) -> lk.Adapter:
    return lk.attach(model, lk.LoRA(rank=2), name=name, **options)


def randomise(adapter: lk.Adapter) -> None:
    with torch.no_grad():
        for parameter in adapter.parameters():
            nn.init.normal_(parameter, std=0.2)


def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_start_gradient_and_merge(name: str, implementation: str) -> None:
    model = model_of(name)
    if name == "llama4" and implementation != "eager":
        pytest.skip("has one way to run its experts")
    if name != "llama4":
        model.set_experts_implementation(implementation)
    base = logits(model)
    adapter = attached(model, "a")
    assert coverage(model, adapter.layers).share > 0.95 or name == "llama4"
    assert torch.equal(logits(model), base)
    model.train()(IDS, labels=IDS).loss.backward()
    model.eval()
    assert all(parameter.grad is not None for parameter in adapter.parameters())
    randomise(adapter)
    beside = logits(model)
    assert (beside - base).abs().max() > 0.05
    with lk.merged(model, "a"):
        torch.testing.assert_close(logits(model), beside, rtol=1e-4, atol=2e-5)
    assert torch.equal(logits(lk.detach(model)), base)


@pytest.mark.parametrize("name", MODELS)
def test_rows_with_adapters_of_their_own(name: str) -> None:
    model = model_of(name)
    alone = {}
    for own in ("a", "b"):
        randomise(attached(model, own))
        with lk.use(model, own):
            alone[own] = logits(model)
    with lk.use(model, None):
        base = logits(model)
    with lk.use(model, ["b", None, "a"]):
        mixed = logits(model)
    torch.testing.assert_close(mixed, torch.stack([alone["b"][0], base[1], alone["a"][2]]), rtol=1e-4, atol=2e-5)
    with lk.use(model, {"a": 0.5, "b": 2.0}):
        blended = logits(model)
    with lk.merged(model, {"a": 0.5, "b": 2.0}):
        torch.testing.assert_close(logits(model), blended, rtol=1e-4, atol=5e-5)


def test_the_sum_is_never_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training and generating multiply by the factors; only what is no product asks for W + ΔW."""

    def built(self: LazySum) -> Tensor:
        raise AssertionError("W + ΔW was built")

    model = model_of("qwen3-moe")
    adapter = attached(model, "a")
    monkeypatch.setattr(LazySum, "whole", built)
    for implementation in ("eager", "grouped_mm", "batched_mm"):
        model.set_experts_implementation(implementation)
        model(IDS, labels=IDS).loss.backward()
    assert all(parameter.grad is not None for parameter in adapter.parameters())


def test_gradients_are_those_of_the_sum() -> None:
    model = model_of("gpt-oss")
    adapter = attached(model, "a", target_modules=["experts"])
    randomise(adapter)
    model(IDS, labels=IDS).loss.backward()
    found = {name: parameter.grad.clone() for name, parameter in adapter.named_parameters()}
    for layer in adapter.layers.values():
        for site, delta in layer.deltas_of("a").items():
            layout = layer.sites[site].layout
            assert layout.kind == "expert"
            assert delta.shape.out * delta.shape.in_ == layout.matrix(layer.stored(layer.sites[site])).numel()
    model.zero_grad()
    # by hand: the sums as parameters of a plain copy, and the chain rule
    plain = model_of("gpt-oss")
    sums: dict[str, Tensor] = {}
    for path, layer in adapter.layers.items():
        for name in ("gate_up_proj", "down_proj"):
            W = plain.get_parameter(f"{path}.{name}").detach()
            own = [layer.deltas_of("a")[f"{name}.{index}"] for index in range(4)]
            sums[f"{path}.{name}"] = W + torch.stack([delta.dense(W[0].mT) for delta in own]).mT
    loss = torch.func.functional_call(plain, sums, (IDS,), {"labels": IDS}).loss
    expected = torch.autograd.grad(loss, list(adapter.parameters()))
    for own, (name, _) in zip(expected, adapter.named_parameters(), strict=True):
        torch.testing.assert_close(found[name], own, rtol=1e-3, atol=1e-5)


def test_the_balance_loss_is_the_models_own() -> None:
    model = model_of("mixtral")
    before = model(IDS, labels=IDS, output_router_logits=True)
    adapter = attached(model, "a", target_modules=["experts"])
    after = model(IDS, labels=IDS, output_router_logits=True)
    assert torch.equal(before.aux_loss, after.aux_loss)
    assert torch.equal(before.loss, after.loss)
    randomise(adapter)
    model(IDS, labels=IDS, output_router_logits=True).loss.backward()


def test_experts_sorted_by_expert_are_refused_by_row() -> None:
    sizes = {**SMALL, "kv_channels": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2}
    sizes.pop("num_attention_heads")
    torch.manual_seed(0)
    model = T.JetMoeForCausalLM(T.JetMoeConfig(**sizes)).eval()
    randomise(attached(model, "a"))
    beside = logits(model)
    with lk.merged(model, "a"):
        torch.testing.assert_close(logits(model), beside, rtol=1e-4, atol=2e-5)
    with pytest.raises(LorakitError, match="sorted by expert"), lk.use(model, ["a", None, "a"]):
        logits(model)


def test_bare_matrices() -> None:
    torch.manual_seed(0)
    model = T.XLNetLMHeadModel(T.XLNetConfig(d_model=32, n_layer=2, n_head=4, d_inner=48, vocab_size=64)).eval()
    adapter = attached(model, "a")
    assert {site.layout.kind for _, site, _ in adapter.deltas()} == {"bare", "linear"}
    randomise(adapter)
    beside = logits(model)
    with lk.merged(model, "a"):
        torch.testing.assert_close(logits(model), beside, rtol=1e-4, atol=2e-5)


E, OUT, IN, RANK = 4, 12, 16, 3


def lazy() -> tuple[LazySum, Tensor]:
    torch.manual_seed(0)
    W, U, V = torch.randn(E, OUT, IN), torch.randn(E, OUT, RANK), torch.randn(E, RANK, IN)
    return LazySum(W, (U, V)), W + U @ V


CHOICE = torch.tensor([0, 2, 2, 3, 1])
OPERATIONS: dict[str, Callable[[Any], Any]] = {
    "linear": lambda W: F.linear(torch.ones(5, IN), W[2]),
    "matmul": lambda W: torch.ones(E, 5, IN) @ W.mT,
    "bmm": lambda W: torch.bmm(torch.ones(E, 5, IN), W.transpose(1, 2)),
    "gathered from the left": lambda W: torch.bmm(W[CHOICE], torch.ones(5, IN, 1)),
    "gathered": lambda W: torch.ones(5, 1, IN) @ W[CHOICE].mT,
    "addmm": lambda W: torch.addmm(torch.ones(OUT), torch.ones(5, IN), W[1].T),
    "grouped": lambda W: F.grouped_mm(torch.ones(9, IN), W.transpose(-2, -1), offs=torch.tensor([2, 2, 7, 9]).int()),
    "another dtype": lambda W: torch.ones(5, IN) @ W.to(torch.float32)[0].T,
    "einsum": lambda W: torch.einsum("si,eoi->seo", torch.ones(5, IN), W),
    "slice": lambda W: torch.ones(5, IN) @ W[1, :6].T,
    "chunk": lambda W: torch.ones(5, IN) @ W[1].chunk(2)[1].T,
    "elementwise": lambda W: W * 2,
    "view": lambda W: W.view(E * OUT, IN) @ torch.ones(IN),
    "sum": lambda W: W.sum(),
}


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_a_lazy_sum_is_the_sum(operation: Callable[[Any], Any]) -> None:
    own, whole = lazy()
    result = operation(own)
    assert type(result) is Tensor
    torch.testing.assert_close(result, operation(whole), rtol=1e-4, atol=1e-4)


def test_a_lazy_sum_says_its_shape() -> None:
    own, whole = lazy()
    assert (own.shape, own.dtype, own.ndim, len(own)) == (whole.shape, whole.dtype, whole.ndim, len(whole))


def pairs_of(turned: bool, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Pairs, list[Tensor]]:
    """A stack of experts of unequal ranks and scales, one without any."""
    torch.manual_seed(0)
    W = torch.randn(E, IN, OUT) if turned else torch.randn(E, OUT, IN)
    factors = [(torch.randn(OUT, rank), torch.randn(rank, IN)) for rank in (3, 0, 1, 4)]
    flat = [tensor.to(dtype).requires_grad_() for pair in factors for tensor in pair]
    held = tuple(zip(flat[::2], flat[1::2], strict=True))
    return W.to(dtype), Pairs(held, (1.0, 2.0, 0.5, -1.0), turned), flat


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "base trained too"])
@pytest.mark.parametrize("ends", [(2, 2, 7, 9), (0, 5, 5, 11), (0, 0, 0, 0), (40, 41, 60, 61)], ids=str)
@pytest.mark.parametrize("turned", [False, True])
def test_beside_is_substituted_with_gradients(turned: bool, ends: tuple[int, ...], trained: bool) -> None:
    """Rows of each expert, an expert without rows, rows behind the last: outputs and gradients of x, W and all factors."""
    W, pairs, factors = pairs_of(turned)
    W.requires_grad_(trained)
    rows = ends[-1] + 2
    x = torch.randn(rows, IN, requires_grad=True)
    own = LazySum(W, pairs)
    whole = W + torch.stack([U @ V for U, V in map(pairs.one, range(E))])
    offs = torch.tensor(ends, dtype=torch.int32)
    above = torch.randn(ends[-1], OUT)
    inputs = [x, *factors, *([W] if trained else [])]
    found, expected = [], []
    for weight, results in ((own, found), (whole, expected)):
        y = F.grouped_mm(x, weight if turned else weight.transpose(-2, -1), offs=offs)[: ends[-1]]
        with torch.no_grad():
            results.append(F.grouped_mm(x, weight if turned else weight.transpose(-2, -1), offs=offs)[: ends[-1]])
        results.append(y)
        of_x, *rest = torch.autograd.grad((y * above).sum(), inputs)
        results += [of_x[: ends[-1]], *rest]  # torch leaves what is behind the last as it was in memory
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


def test_dropout_acts_on_the_way_to_the_factors_alone() -> None:
    W, pairs, factors = pairs_of(turned=True)
    x = torch.randn(9, IN, requires_grad=True)
    offs = torch.tensor([2, 2, 7, 9], dtype=torch.int32)
    torch.manual_seed(1)
    y = F.grouped_mm(x, LazySum(W, pairs, 0.5), offs=offs)
    torch.manual_seed(1)
    U, V = pairs.stacked()
    expected = F.grouped_mm(x, W, offs=offs) + F.grouped_mm(F.grouped_mm(F.dropout(x, 0.5), U, offs=offs), V, offs=offs)
    above = torch.randn_like(y)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    for one, two in zip(
        torch.autograd.grad(y, [x, *factors], above), torch.autograd.grad(expected, [x, *factors], above), strict=True
    ):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("of_factors", [torch.bfloat16, torch.float32])
def test_bfloat16_stays_within_its_roundings(of_factors: torch.dtype) -> None:
    W, pairs, factors = pairs_of(turned=True)
    offs, x = torch.tensor([2, 2, 7, 21], dtype=torch.int32), torch.randn(21, IN)
    exact = F.grouped_mm(x, LazySum(W, pairs), offs=offs)
    gradients = torch.autograd.grad(exact.sum(), factors)
    low = [tensor.detach().to(of_factors).requires_grad_() for tensor in factors]
    own = Pairs(tuple(zip(low[::2], low[1::2], strict=True)), pairs.scales, turned=True)
    y = F.grouped_mm(x.bfloat16(), LazySum(W.bfloat16(), own), offs=offs)
    assert y.dtype == torch.bfloat16
    found = torch.autograd.grad(y.sum(), low)
    for one, two in zip((y, *found), (exact, *gradients), strict=True):
        assert (one.double() - two).norm() <= 0.02 * two.norm()
    assert {tensor.dtype for tensor in found} == {of_factors}


def test_attaching_to_every_expert_of_a_large_mixture_takes_seconds() -> None:
    """The shape of Qwen3-30B-A3B with an eighth of its layers, on the meta device: 3 s of one core at the very most."""
    sizes = {"hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 128, "num_hidden_layers": 6}
    with torch.device("meta"):
        model = T.Qwen3MoeForCausalLM(T.Qwen3MoeConfig(**sizes))
    begin = time.process_time()
    adapter = lk.attach(model, lk.LoRA(rank=16), target_modules=["experts"])
    assert time.process_time() - begin < 3
    assert sum(1 for _ in adapter.deltas()) == 6 * 2 * 128
