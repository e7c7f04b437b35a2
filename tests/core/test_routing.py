"""Who gets which adapter: routes as users write them, rows, tokens, beams, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorakit as lk
from core import models
from core.models import IDS, randomise
from lorakit.core.routing import Routing, parse
from lorakit.errors import LorakitError

NAMES = ("sql", "law")


pytestmark = pytest.mark.usefixtures("one_thread")


def adapted(model: nn.Module, **options: Any) -> Any:
    model = model.double()
    for name in NAMES:
        randomise(lk.attach(model, lk.LoRA(rank=2), name=name, **options))
    return model


def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


# -- reading a route -------------------------------------------------------------------------------------------------------


def test_routes_as_users_write_them() -> None:
    assert parse(None, NAMES) == Routing((), ())
    assert parse("sql", NAMES) == Routing(("sql",), (1.0,))
    assert parse({"law": 0.3, "sql": 1}, NAMES) == Routing(("law", "sql"), (0.3, 1.0))
    rows = parse(["law", None, {"sql": 0.5, "law": 2}], NAMES)
    assert (rows.names, rows.weights, rows.rows) == (("law", "sql"), None, 3)
    assert rows.table is not None
    assert rows.table.tolist() == [[1.0, 0.0], [0.0, 0.0], [2.0, 0.5]]
    assert parse((None, None), NAMES).rows == 2


WRONG: list[tuple[Any, str]] = [
    ("sqll", 'unknown adapter "sqll"; did you mean "sql"'),
    ({"lwa": 1.0}, 'did you mean "law"'),
    (["sql", "lwa"], 'did you mean "law"'),
    ({"sql": "much"}, "'much'"),
    ({"sql": float("nan")}, "nan"),
    ([], "empty list"),
    (3, "int"),
    (Routing(("tax",), (1.0,)), '"tax"'),
]


@pytest.mark.parametrize(("route", "said"), WRONG, ids=[said for _, said in WRONG])
def test_wrong_routes_are_named_and_change_nothing(route: Any, said: str) -> None:
    model = adapted(models.llama())
    lk.activate(model, "law")
    before = logits(model)
    for attempt in (lambda: lk.activate(model, route), lambda: lk.use(model, route).__enter__()):
        with pytest.raises(LorakitError, match=said):
            attempt()
    assert torch.equal(logits(model), before)


def test_a_model_without_adapters_says_so() -> None:
    with pytest.raises(LorakitError, match=r"no adapter; add one with lk\.attach"):
        lk.activate(models.llama(), "sql")


# -- a while, and back -----------------------------------------------------------------------------------------------------


def test_use_nests_and_restores_after_an_exception() -> None:
    model = adapted(models.llama())
    lk.activate(model, "law")
    law = logits(model)
    with lk.use(model, None):
        base = logits(model)
    assert torch.equal(base, logits(models.llama().double()))

    def fails() -> None:
        with lk.use(model, "sql"):
            with lk.use(model, {"sql": 0.5, "law": 0.5}):
                pass
            raise KeyError("anything")

    with pytest.raises(KeyError):
        fails()
    assert torch.equal(logits(model), law)
    assert not torch.equal(law, base)


# -- rows ------------------------------------------------------------------------------------------------------------------

ROUTE: list[Any] = ["sql", None, {"sql": 0.25, "law": 0.75}]


def alone(model: nn.Module, route: list[Any], run: Any) -> list[Tensor]:
    results = []
    for index, one in enumerate(route):
        with lk.use(model, one):
            results.append(run(index))
    return results


@pytest.mark.parametrize("make", [models.llama, models.gpt2, models.bert], ids=lambda make: make.__name__)
def test_each_row_its_own(make: Any) -> None:
    model = adapted(make())
    with lk.use(model, ROUTE):
        together = logits(model)
    apart = torch.cat(alone(model, ROUTE, lambda i: logits(model, IDS[i : i + 1])))
    assert torch.allclose(together, apart, atol=1e-12)


def test_each_row_its_own_with_everything_an_adapter_can_hold() -> None:
    model = adapted(
        models.llama(),
        target_modules=["embed_tokens", "q_proj", "down_proj", "v_proj"],
        parts={"q_proj": {"first": (0, 4), "last": [(4, 5), (6, 8)]}},
        modules_to_save=["lm_head", "norm"],
    )
    with lk.use(model, ROUTE):
        together = logits(model)
    apart = torch.cat(alone(model, ROUTE, lambda i: logits(model, IDS[i : i + 1])))
    assert torch.allclose(together, apart, atol=1e-12)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_wrong_number_of_rows_is_refused(count: int) -> None:
    model = adapted(models.llama())
    with pytest.raises(LorakitError, match=f"{count} rows.*batch of 3"), lk.use(model, ["sql"] * count):
        logits(model)


def test_repeated_rows_are_hinted_at() -> None:
    model = adapted(models.llama())
    with pytest.raises(LorakitError, match="copies=2"), lk.use(model, ROUTE):
        logits(model, IDS.repeat_interleave(2, 0))
    with lk.use(model, ROUTE, copies=2):
        together = logits(model, IDS.repeat_interleave(2, 0))
    with lk.use(model, ROUTE):
        assert torch.allclose(together[::2], logits(model), atol=1e-12)


@pytest.mark.parametrize("make", [models.llama, models.t5])
@pytest.mark.parametrize("options", [{"num_beams": 2}, {"num_beams": 4, "num_return_sequences": 2}, {}])
def test_generation_with_one_adapter_per_row(options: dict[str, int], make: Callable[[], nn.Module]) -> None:
    """An encoder reads each row once, before the beams are made of it."""
    model = adapted(make())
    returned = options.get("num_return_sequences", 1)

    def generate(ids: Tensor) -> Tensor:
        return model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=5,
            min_new_tokens=5,
            do_sample=False,
            **options,
        )

    with lk.use(model, ROUTE, copies=options.get("num_beams", 1)):
        together = generate(IDS)
    apart = torch.cat(alone(model, ROUTE, lambda i: generate(IDS[i : i + 1])))
    given = 1 if model.config.is_encoder_decoder else IDS.shape[1]
    assert together.shape == (3 * returned, given + 5)
    assert torch.equal(together, apart)
    with lk.use(model, None):
        assert not torch.equal(generate(IDS), together)


def test_copies_of_rows_in_an_encoder_decoder_need_a_block() -> None:
    model = adapted(models.t5())
    with pytest.raises(LorakitError, match=r"T5ForConditionalGeneration encodes each row once and decodes 2 copies"):
        lk.activate(model, ROUTE, copies=2)
    lk.activate(model, "sql", copies=2)
    handle = model.get_encoder().block[0].register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError, match="broken"), lk.use(model, ROUTE, copies=2):
        model.generate(IDS, num_beams=2, max_new_tokens=1)
    handle.remove()
    alone = model.generate(IDS, max_new_tokens=3)
    with lk.use(model, "sql"):
        assert torch.equal(model.generate(IDS, max_new_tokens=3), alone), "the route from before is back"
    assert not model.get_encoder()._forward_hooks


def broken(*_: Any) -> None:
    raise RuntimeError("broken")


# -- tokens ----------------------------------------------------------------------------------------------------------------


def test_each_token_its_own_in_a_flat_batch() -> None:
    """Several rows laid end to end as one, as packed training and serving have them."""
    kinds = nn.ModuleDict({"fc": nn.Linear(4, 6), "embed": nn.Embedding(9, 4)})
    model = adapted(kinds, target_modules=["fc", "embed"])
    tokens = torch.randint(9, (1, 5))
    table = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 0.0], [0.0, 1.0], [0.5, 0.5]])
    route = Routing(NAMES, None, table, axis=1)
    with lk.use(model, route):
        flat = model["fc"](model["embed"](tokens))
    for index, weights in enumerate(table.tolist()):
        with lk.use(model, dict(zip(NAMES, weights, strict=True))):
            one = model["fc"](model["embed"](tokens[:, index : index + 1]))
        assert torch.allclose(flat[:, index : index + 1], one, atol=1e-12)
    with pytest.raises(LorakitError, match="5 rows"), lk.use(model, route):
        model["embed"](tokens[:, :4])


def test_tokens_of_a_substituted_layer_are_refused() -> None:
    model = adapted(nn.ModuleDict({"a": nn.MultiheadAttention(4, 2, batch_first=True)}), target_modules=["a"])
    x = torch.randn(1, 2, 4, dtype=torch.float64)
    with (
        pytest.raises(LorakitError, match="route whole rows"),
        lk.use(model, Routing(NAMES, None, torch.eye(2), axis=1)),
    ):
        model["a"](x, x, x)


# -- attention -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("average", [True, False])
def test_attention_weights_of_rows_routed_apart(batch_first: bool, average: bool) -> None:
    """Outputs and weights, with all arguments given by position, and as many tokens as rows."""
    attention = nn.MultiheadAttention(4, 2, batch_first=batch_first)
    model = adapted(nn.ModuleDict({"a": attention}), target_modules=["a"])
    x = torch.randn(3, 3, 4, dtype=torch.float64)
    padding = torch.tensor([[False, False, True], [False, False, False], [True, False, False]])
    causal = torch.ones(3, 3, dtype=torch.bool).triu(1)
    causal[0, 1] = False
    with lk.use(model, ROUTE):
        y, weights = model["a"](x, x, x, padding, True, causal, average)
    for index, route in enumerate(ROUTE):
        one = x[index : index + 1] if batch_first else x[:, index : index + 1]
        with lk.use(model, route):
            own_y, own_weights = model["a"](one, one, one, padding[index : index + 1], True, causal, average)
        assert torch.allclose(
            y[index] if batch_first else y[:, index], own_y.squeeze(0 if batch_first else 1), atol=1e-12
        )
        assert torch.allclose(weights[index], own_weights[0], atol=1e-12)


def test_attention_without_a_batch_axis_has_no_rows() -> None:
    model = adapted(nn.ModuleDict({"a": nn.MultiheadAttention(4, 2)}), target_modules=["a"])
    x = torch.randn(3, 4, dtype=torch.float64)
    with lk.use(model, "sql"):
        assert model["a"](x, x, x)[0].shape == (3, 4)
    with pytest.raises(LorakitError, match="batch axis"), lk.use(model, ROUTE):
        model["a"](x, x, x)


# -- whole modules ---------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A module with several arguments, some of them in containers, and a tuple of results."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(4, 4)

    def forward(self, x: Tensor, pair: tuple[Tensor, Tensor], *, extra: dict[str, Any]) -> tuple[Tensor, None]:
        return self.mix(x) * pair[0] + pair[1] + extra["bias"], None


class WithBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 4)
        self.block = Block()

    def forward(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return self.block(self.body(x), (a, b), extra={"bias": a * b, "flag": 3})[0]


def test_rows_of_a_module_that_is_saved_whole() -> None:
    """Whatever has the batch as its first axis is taken apart, within containers too."""
    model = adapted(WithBlock(), target_modules=["body"], modules_to_save=["block"])
    x, a, b = (torch.randn(3, 5, 4, dtype=torch.float64) for _ in range(3))
    with lk.use(model, ROUTE):
        together = model(x, a, b)
    own = lambda i: model(*(t[i : i + 1] for t in (x, a, b)))  # noqa: E731
    assert torch.allclose(together, torch.cat(alone(model, ROUTE, own)), atol=1e-12)
