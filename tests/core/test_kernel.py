"""The gated low-rank product: values, gradients, what it keeps, dropout, number formats, odd inputs.

Numbers are compared in float64 to 2^10 eps of the largest one unless a test derives another bound.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lorakit as lk
from lorakit.core.kernel import gained, product, small_functions

IN, OUT, RANK, BATCH, TOKENS = 7, 5, 3, 2, 4

GATES: dict[str, tuple[int, ...] | None] = {
    "none": None,
    "vector": (RANK,),
    "one": (1,),
    "row": (BATCH, 1, RANK),
    "token": (BATCH, TOKENS, RANK),
    "position": (TOKENS, RANK),
}


pytestmark = pytest.mark.usefixtures("one_thread")


def tensors(gate: tuple[int, ...] | None = None, base: bool = True, **options: Any) -> dict[str, Tensor | None]:
    options = {"dtype": torch.float64, **options}
    draw = lambda *shape: torch.randn(*shape, **options)  # noqa: E731
    return {
        "x": draw(BATCH, TOKENS, IN).requires_grad_(),
        "B": draw(OUT, RANK).requires_grad_(),
        "A": draw(RANK, IN).requires_grad_(),
        "gate": None if gate is None else draw(*gate).requires_grad_(),
        "W": draw(OUT, IN) if base else None,
        "b": draw(OUT).requires_grad_() if base else None,
    }


def reference(
    x: Tensor, B: Tensor, A: Tensor, gate: Any = None, scale: float = 1.0, W: Any = None, b: Any = None
) -> Tensor:
    h = x @ A.T
    y = (h if gate is None else h * gate) @ B.T * scale
    return y if W is None else y + x @ W.T + (0 if b is None else b)


def assert_close(found: Tensor, expected: Tensor, factor: float = 2**10) -> None:
    assert found.shape == expected.shape
    bound = factor * torch.finfo(torch.float64).eps * max(1.0, expected.abs().max().item() if expected.numel() else 0)
    assert found.numel() == 0 or (found - expected).abs().max().item() <= bound


@pytest.mark.parametrize("base", [True, False], ids=["with-base", "alone"])
@pytest.mark.parametrize("gate", GATES.values(), ids=GATES)
def test_values_and_gradients_are_autograds(gate: tuple[int, ...] | None, base: bool) -> None:
    given = tensors(gate, base)
    wanted = [t for t in given.values() if t is not None and t.requires_grad]
    y, expected = product(**given, scale=0.7), reference(**given, scale=0.7)
    assert_close(y, expected)
    towards = torch.randn_like(y)
    ours = torch.autograd.grad(y, wanted, towards)
    theirs = torch.autograd.grad(expected, wanted, towards)
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("base", [True, False], ids=["with-base", "alone"])
@pytest.mark.parametrize("gate", GATES.values(), ids=GATES)
def test_gradcheck(gate: tuple[int, ...] | None, base: bool, dropout: float) -> None:
    """With dropout too: the seed is drawn from torch's generator, so fixing that fixes the mask."""
    given = tensors(gate, base)

    def run(x: Tensor, B: Tensor, A: Tensor, *rest: Tensor) -> Tensor:
        torch.manual_seed(3)
        left = list(rest)
        own_gate = None if gate is None else left.pop(0)
        b = left.pop(0) if base else None
        return product(x, B, A, own_gate, 1.3, dropout, given["W"], b)

    inputs = tuple(t for t in given.values() if t is not None and t.requires_grad)
    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize("wanted", ["x", "B", "A", "gate", "b"])
def test_each_gradient_alone(wanted: str) -> None:
    """Whatever else is frozen, the one gradient asked for is right."""
    given = {name: t if t is None else t.detach() for name, t in tensors(GATES["row"]).items()}
    given[wanted].requires_grad_()
    y, expected = product(**given, scale=0.7), reference(**given, scale=0.7)
    towards = torch.randn_like(y)
    (ours,) = torch.autograd.grad(y, given[wanted], towards)
    (theirs,) = torch.autograd.grad(expected, given[wanted], towards)
    assert_close(ours, theirs)


# -- what is kept for the backward -----------------------------------------------------------------------------------------


def kept(run: Any) -> list[Tensor]:
    """What a forward pass keeps, one tensor per storage."""
    found: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return list(found.values())


def test_frozen_A_keeps_nothing_as_wide_as_the_input() -> None:
    given = tensors(GATES["vector"])
    given["A"] = given["A"].detach()
    for dropout in (0.0, 0.5):
        shapes = {tuple(t.shape) for t in kept(lambda d=dropout: product(**given, dropout=d))}
        tokens = BATCH * TOKENS
        assert shapes == {(tokens, RANK), (OUT, IN), (OUT, RANK), (RANK, IN), (RANK,)}


def test_trained_A_keeps_x_itself_and_no_copy() -> None:
    given = tensors()
    for dropout in (0.0, 0.5):
        storages = {t.untyped_storage().data_ptr() for t in kept(lambda d=dropout: product(**given, dropout=d))}
        assert given["x"].untyped_storage().data_ptr() in storages
        wide = [
            t for t in kept(lambda d=dropout: product(**given, dropout=d)) if t.shape[-1] == IN and t.numel() > OUT * IN
        ]
        assert [t.data_ptr() for t in wide] == [given["x"].data_ptr()]


def test_projections_of_one_input_keep_it_once() -> None:
    x = torch.randn(BATCH, TOKENS, IN, requires_grad=True)
    layers = [nn.Linear(IN, out, bias=False) for out in (5, 6, 8)]
    model = nn.ModuleDict(dict(zip("qkv", layers, strict=True)))
    lk.attach(model, lk.LoRA(rank=RANK), target_modules=["q", "k", "v"])
    inputs = [t for t in kept(lambda: [model[name](x) for name in "qkv"]) if t.shape == x.shape]
    assert len(inputs) == 1
    assert inputs[0].data_ptr() == x.data_ptr()


def test_an_adapted_layer_keeps_no_more_than_the_product() -> None:
    """Beside x: per layer h (tokens, rank), and the weights."""
    x = torch.randn(BATCH, TOKENS, IN, requires_grad=True)
    model = nn.ModuleDict({"q": nn.Linear(IN, OUT)})
    lk.attach(model, lk.LoRA(rank=RANK), target_modules=["q"])
    shapes = sorted(tuple(t.shape) for t in kept(lambda: model["q"](x)))
    assert shapes == sorted([(BATCH, TOKENS, IN), (BATCH * TOKENS, RANK), (OUT, IN), (OUT, RANK), (RANK, IN)])


# -- dropout ---------------------------------------------------------------------------------------------------------------


def test_dropout_keeps_the_stated_fraction_and_the_mean() -> None:
    """With A and B the identity the output is the dropped input itself.

    Kept entries are binomial: n = 40,000, p = 0.7. The bound is five standard deviations, √(n p (1 - p)) = 92 each.
    """
    n, keep = 200, 0.7
    eye = torch.eye(n, dtype=torch.float64)
    x = torch.ones(n, n, dtype=torch.float64)
    torch.manual_seed(11)
    y = product(x, eye, eye, dropout=1 - keep)
    kept_count = int((y != 0).sum())
    assert abs(kept_count - keep * n * n) <= 5 * math.sqrt(n * n * keep * (1 - keep))
    assert_close(y[y != 0], torch.full((kept_count,), 1 / keep, dtype=torch.float64))


def test_dropout_draws_anew_each_time_and_again_under_one_seed() -> None:
    given = tensors()
    torch.manual_seed(5)
    first, second = product(**given, dropout=0.5), product(**given, dropout=0.5)
    torch.manual_seed(5)
    assert torch.equal(product(**given, dropout=0.5), first)
    assert not torch.equal(first, second)


def test_dropout_leaves_the_base_alone() -> None:
    given = tensors()
    given["B"] = torch.zeros_like(given["B"])
    assert_close(product(**given, dropout=0.9), reference(**given))


def test_everything_dropped_is_the_base() -> None:
    given = tensors()
    assert torch.equal(product(**given, dropout=1.0), F.linear(given["x"], given["W"], given["b"]))
    alone = tensors(base=False)
    assert torch.equal(product(**alone, dropout=1.0), torch.zeros(BATCH, TOKENS, OUT, dtype=torch.float64))


def test_layer_drops_in_training_only() -> None:
    model = nn.ModuleDict({"q": nn.Linear(IN, OUT)})
    adapter = lk.attach(model, lk.LoRA(rank=RANK, dropout=0.5), target_modules=["q"])
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_()
    x = torch.randn(BATCH, IN)
    model.train()
    assert not torch.equal(model["q"](x), model["q"](x))
    model.eval()
    assert torch.equal(model["q"](x), model["q"](x))


# -- odd inputs ------------------------------------------------------------------------------------------------------------

STRIDED = {
    "transposed": lambda: torch.randn(IN, BATCH * TOKENS, dtype=torch.float64).T,
    "sliced": lambda: torch.randn(BATCH, TOKENS, 2 * IN, dtype=torch.float64)[..., ::2],
    "swapped": lambda: torch.randn(TOKENS, BATCH, IN, dtype=torch.float64).transpose(0, 1),
    "expanded": lambda: torch.randn(1, 1, IN, dtype=torch.float64).expand(BATCH, TOKENS, IN),
}


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("make", STRIDED.values(), ids=STRIDED)
def test_non_contiguous_input(make: Any, dropout: float) -> None:
    """The same result and gradients as of a contiguous copy, with the same dropout mask."""
    x, given = make(), tensors()
    assert not x.is_contiguous()
    results = []
    for own in (x, x.contiguous()):
        given["x"] = own.detach().requires_grad_()
        torch.manual_seed(1)
        y = product(**given, dropout=dropout)
        results.append((y, *torch.autograd.grad(y.square().sum(), [given["x"], given["A"], given["B"]])))
    for strided, contiguous in zip(*results, strict=True):
        assert_close(strided, contiguous)


@pytest.mark.parametrize("shape", [(0, IN), (0, TOKENS, IN), (BATCH, 0, IN)])
@pytest.mark.parametrize("gate", [None, (RANK,)], ids=["none", "vector"])
def test_empty_batch(shape: tuple[int, ...], gate: tuple[int, ...] | None) -> None:
    given = tensors(gate)
    given["x"] = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    for dropout in (0.0, 0.5):
        y = product(**given, dropout=dropout)
        assert y.shape == (*shape[:-1], OUT)
        wanted = [t for t in given.values() if t is not None and t.requires_grad]
        for gradient, tensor in zip(torch.autograd.grad(y.sum(), wanted), wanted, strict=True):
            assert torch.equal(gradient, torch.zeros_like(tensor))


def test_one_vector_without_a_batch() -> None:
    given = tensors()
    given["x"] = torch.randn(IN, dtype=torch.float64, requires_grad=True)
    y = product(**given)
    assert_close(y, reference(**given))
    assert torch.autograd.grad(y.sum(), given["x"])[0].shape == (IN,)


def test_second_derivatives_are_refused_not_wrong() -> None:
    given = tensors()
    (gradient,) = torch.autograd.grad(product(**given).square().sum(), given["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()


# -- number formats --------------------------------------------------------------------------------------------------------


def _bfloat16_bound(x: Tensor, W: Tensor, b: Tensor, B: Tensor, A: Tensor) -> Tensor:
    """An elementwise bound of bfloat16's error, u = 2^-8, for exactly representable inputs.

    Rounded are: h (u of Σ|x||A|), its scaled copy (u), the base's product (u), the sum of both (u); sums run in float32
    or at worst in bfloat16 pieces, for which one more u of the sum of magnitudes is allowed each.
    """
    u = 2.0**-8
    low = (x.abs() @ A.abs().T) @ B.abs().T
    base = x.abs() @ W.abs().T + b.abs()
    return u * (4 * low + 3 * base)


def test_bfloat16_within_a_derived_bound() -> None:
    given = {name: None if t is None else t.detach().bfloat16() for name, t in tensors().items()}
    y = product(**given)
    assert y.dtype == torch.bfloat16
    wide = {name: None if t is None else t.double() for name, t in given.items()}
    bound = _bfloat16_bound(wide["x"], wide["W"], wide["b"], wide["B"], wide["A"])
    assert ((y.double() - reference(**wide)).abs() <= bound).all()


def test_bfloat16_layer_with_float32_masters() -> None:
    """Masters stay float32 and get float32 gradients; output and input gradient have the base's format."""
    model = nn.ModuleDict({"q": nn.Linear(IN, OUT)}).bfloat16()
    adapter = lk.attach(model, lk.LoRA(rank=RANK), target_modules=["q"])
    x = torch.randn(BATCH, IN, dtype=torch.bfloat16, requires_grad=True)
    y = model["q"](x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad.dtype == torch.bfloat16
    for parameter in adapter.parameters():
        assert parameter.dtype == torch.float32
        assert parameter.grad.dtype == torch.float32


@pytest.mark.parametrize("route", ["one", {"one": 0.5, "two": 0.5}, ["one", None]], ids=["one", "blend", "rows"])
@pytest.mark.parametrize("kind", ["linear", "convolution", "embedding", "attention"])
def test_autocast_forward_and_backward(kind: str, route: Any) -> None:
    """Under autocast float32 models compute in bfloat16, on every route and layer kind, forward and backward."""
    make = {
        "linear": lambda: (nn.Linear(8, 6), (torch.randn(2, 8),)),
        "convolution": lambda: (nn.Conv1d(4, 6, 3), (torch.randn(2, 4, 5),)),
        "embedding": lambda: (nn.Embedding(9, 6), (torch.randint(9, (2, 5)),)),
        "attention": lambda: (nn.MultiheadAttention(4, 2, batch_first=True), (torch.randn(2, 5, 4),) * 3),
    }
    layer, args = make[kind]()
    model = nn.ModuleDict({"q": layer})
    for name in ("one", "two"):
        adapter = lk.attach(model, lk.LoRA(rank=2), name=name, target_modules=["q"])
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.normal_()
    base = layer(*args)
    with lk.use(model, route), torch.autocast("cpu", torch.bfloat16):
        y = model["q"](*args)
        with lk.use(model, None):
            plain = model["q"](*args)
    y, plain, base = (t[0] if isinstance(t, tuple) else t for t in (y, plain, base))
    assert y.dtype == plain.dtype
    y.float().square().sum().backward()
    assert all(parameter.grad is not None for parameter in lk.adapters(model)["one"].parameters())
    with lk.use(model, route):
        exact = model["q"](*args)
    exact = exact[0] if isinstance(exact, tuple) else exact
    # bfloat16 keeps 8 bits; six roundings and sums of up to 8 terms of like size stay within 2^-8 · 6 · √8 · magnitude
    assert (y.float() - exact).abs().max() <= 2**-8 * 6 * math.sqrt(8) * exact.abs().max()


def test_autocast_of_the_product_alone() -> None:
    given = tensors(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = product(**given)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert given["x"].grad.dtype == given["A"].grad.dtype == torch.float32


# -- under torch's own machinery -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gradient_checkpointing(reentrant: bool, dropout: float) -> None:
    given = tensors()
    results = []
    for again in (False, True):
        torch.manual_seed(2)
        run = lambda x: product(**{**given, "x": x}, dropout=dropout)  # noqa: E731
        y = checkpoint(run, given["x"], use_reentrant=reentrant) if again else run(given["x"])
        for tensor in given.values():
            if tensor is not None:
                tensor.grad = None
        y.square().sum().backward()
        results.append([y, *(given[name].grad.clone() for name in ("x", "A", "B", "b"))])
    for plain, checkpointed in zip(*results, strict=True):
        assert torch.equal(plain, checkpointed)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_of_a_model(reentrant: bool) -> None:
    """A frozen base with frozen inputs: the reentrant kind needs an input that requires gradients, as in transformers."""
    model = nn.Sequential(nn.Linear(IN, OUT), nn.Tanh())
    adapter = lk.attach(model, lk.LoRA(rank=RANK, dropout=0.5), target_modules=["0"])
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_()
    x = torch.randn(BATCH, IN, requires_grad=True)
    results = []
    for again in (False, True):
        torch.manual_seed(2)
        y = checkpoint(model, x, use_reentrant=reentrant) if again else model(x)
        results.append(torch.autograd.grad(y.sum(), list(adapter.parameters())) if not (again and reentrant) else None)
        if again and reentrant:
            y.sum().backward()
            results[-1] = tuple(parameter.grad for parameter in adapter.parameters())
    for plain, checkpointed in zip(*results, strict=True):
        assert torch.equal(plain, checkpointed)


def test_compiled_is_equal() -> None:
    """torch.compile traces the layer, breaks its graph where it must, and gives the same; no code is generated here."""
    model = nn.Sequential(nn.Linear(IN, OUT), nn.Tanh(), nn.Linear(OUT, IN)).double()
    adapter = lk.attach(model, lk.LoRA(rank=RANK), target_modules=["0", "2"])
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_()
    x = torch.randn(BATCH, IN, dtype=torch.float64, requires_grad=True)
    compiled = torch.compile(model, backend="aot_eager")
    wanted = [x, *adapter.parameters()]
    for run in (lambda: compiled(x), lambda: model(x)):
        assert_close(run(), model(x))
    for ours, theirs in zip(
        torch.autograd.grad(compiled(x).sum(), wanted), torch.autograd.grad(model(x).sum(), wanted), strict=True
    ):
        assert_close(ours, theirs)
    with lk.use(model, None):
        assert_close(compiled(x), model(x))


def test_gained() -> None:
    y = torch.randn(BATCH, TOKENS, OUT, dtype=torch.float64, requires_grad=True)
    g = torch.randn(OUT, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(gained, (y, g))
    torch.testing.assert_close(gained(y, g), y * g)


def test_small_functions_take_the_way_that_is_given() -> None:
    y, g = torch.randn(TOKENS, OUT, requires_grad=True), torch.randn(OUT, requires_grad=True)
    ran: list[str] = []

    def run(function: Any, *tensors: Tensor) -> Any:
        ran.append(function.__name__)
        return function(*tensors)

    with small_functions(run):
        gained(y, g).sum().backward()
    assert ran == ["gain_backward"]
    gained(y, g).sum().backward()
    assert ran == ["gain_backward"]  # put back


def test_masters_keep_their_dtype() -> None:
    """Factors wider than x are cast inside, and their gradients come in their own dtype: no sum of them is rounded."""
    x = torch.randn(BATCH, TOKENS, IN, dtype=torch.bfloat16)
    B, A = torch.randn(OUT, RANK, requires_grad=True), torch.randn(RANK, IN, requires_grad=True)
    y = product(x, B, A)
    y.sum().backward()
    assert y.dtype is torch.bfloat16
    assert B.grad is not None
    assert A.grad is not None
    assert B.grad.dtype is A.grad.dtype is torch.float32
    b, a = B.detach().bfloat16().requires_grad_(), A.detach().bfloat16().requires_grad_()
    product(x, b, a).sum().backward()
    assert b.grad is not None
    assert a.grad is not None
    assert torch.equal(B.grad, b.grad.float())
    assert torch.equal(A.grad, a.grad.float())
