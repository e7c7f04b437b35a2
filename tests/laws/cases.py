"""What the laws are run over: example specs of every method, layer kinds with their inputs, and pairs of the two.

Sizes are small, even (block-wise methods divide them) and distinct on all axes of one layer, so that a transposed or
swapped matrix cannot pass. Everything is float64.

Two methods that stand in no table, `Dense` and `Affine`, are here because they use what LoRA does not: the default
`act`, `call.y`, `call.gain`, a changed bias, a form with a gain.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lorakit as lk
from lorakit.adapter.adapter import Adapter
from lorakit.core.delta import Call, Card, Delta, Form, Method, Pool, Shape
from lorakit.core.layer import Adapted
from lorakit.core.sites import sites_of
from lorakit.errors import LorakitError
from lorakit.methods import (
    BOFT,
    C3A,
    IA3,
    METHODS,
    OFT,
    AdaLoRA,
    BDLoRA,
    BitFit,
    DoRA,
    DyLoRA,
    ElaLoRA,
    FourierFT,
    Full,
    HiRA,
    LoHa,
    LoKr,
    LoRA,
    LoRAFA,
    LoRAXS,
    MoRA,
    OneLoRA,
    RandLoRA,
    ReLoRA,
    SHiRA,
    TiedLoRA,
    TrainableTokens,
    VBLoRA,
    VeRA,
)

# -- two methods that exist for the laws alone -----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Dense(Method):
    """ΔW = P, a whole matrix, through the default `act`."""

    name: ClassVar[str] = "dense"
    card: ClassVar[Card] = Card("Dense", "ΔW = P", lambda shape, spec: shape.out * shape.in_, "none", "never")

    def build(self, shape: Shape, pool: Pool) -> Delta:
        return DenseDelta(self, shape, pool)


class DenseDelta(Delta):
    def __init__(self, spec: Method, shape: Shape, pool: Pool) -> None:
        super().__init__(spec, shape, pool)
        self.P = nn.Parameter(torch.zeros(shape.out, shape.in_))

    def dense(self, W: Tensor) -> Tensor:
        return self.P


@dataclass(frozen=True, kw_only=True)
class Affine(Method):
    """y' = (1 + g) · W x + b + c: a gain on the product and a shift of the bias."""

    name: ClassVar[str] = "affine"
    card: ClassVar[Card] = Card("Affine", "ΔW = diag(g) W, Δb = c", lambda shape, spec: 2 * shape.out, "none", "never")

    def build(self, shape: Shape, pool: Pool) -> Delta:
        return AffineDelta(self, shape, pool)


class AffineDelta(Delta):
    def __init__(self, spec: Method, shape: Shape, pool: Pool) -> None:
        super().__init__(spec, shape, pool)
        self.g = nn.Parameter(torch.zeros(shape.out))
        self.c = nn.Parameter(torch.zeros(shape.out))

    def dense(self, W: Tensor) -> Tensor:
        return self.g[:, None] * W

    def shift(self, b: Tensor | None, W: Callable[[], Tensor]) -> Tensor | None:
        return self.c

    def act(self, call: Call) -> Tensor:
        return call.gain(call.y, self.g)

    def form(self, W: Tensor, b: Tensor | None) -> Form:
        return Form(gain=1 + self.g, bias=self.c if b is None else self.c - self.g * b)


PROBES: tuple[Method, ...] = (Dense(), Affine())

# -- the methods -----------------------------------------------------------------------------------------------------------

SPECS: dict[str, tuple[Method, ...]] = {
    "lora": (LoRA(rank=2, alpha=3.0), LoRA(rank=2, alpha=3.0, rslora=True), LoRA(rank=2, alpha=3.0, lora_bias=True)),
    "lora-fa": (LoRAFA(rank=2, alpha=3.0),),
    "dora": (DoRA(inner=LoRA(rank=2, alpha=3.0)),),
    "bd-lora": (BDLoRA(rank=2, alpha=3.0, side="A"), BDLoRA(rank=2, alpha=3.0, side="B"), BDLoRA(rank=2, strict=False)),
    "adalora": (AdaLoRA(rank=2, alpha=3.0),),
    "elalora": (ElaLoRA(rank=2, alpha=3.0),),
    "dylora": (DyLoRA(rank=2, alpha=3.0), DyLoRA(rank=2, alpha=3.0, frozen=True)),
    "relora": (ReLoRA(rank=2, alpha=3.0),),
    "vera": (VeRA(rank=3),),
    "vb-lora": (VBLoRA(rank=2, num_vectors=5, vector_length=2, topk=2),),
    "lora-xs": (LoRAXS(rank=2, alpha=3.0),),
    "tied-lora": (TiedLoRA(rank=2, alpha=3.0), TiedLoRA(rank=2, trained="Auv")),
    "1lora": (OneLoRA(),),
    "randlora": (RandLoRA(rank=3, alpha=6.0),),
    "fourierft": (FourierFT(n_frequency=7, scale=20.0),),
    "shira": (SHiRA(rank=1), SHiRA(rank=1, mask="magnitude")),
    "c3a": (C3A(block_size=2),),
    "mora": (MoRA(rank=2), MoRA(rank=2, kind="sharing")),
    "loha": (LoHa(rank=2, alpha=3.0), LoHa(rank=1, alpha=0.7), LoHa(rank=2, alpha=3.0, tucker=True)),
    "lokr": (
        LoKr(rank=1, alpha=1.5),
        LoKr(rank=1, alpha=1.5, decompose_both=True, factor=1),
        LoKr(rank=8, alpha=3.0, scale_rule="lycoris"),
        LoKr(rank=1, alpha=1.5, tucker=True),
    ),
    "oft": (
        OFT(block_size=2),
        OFT(blocks=2, exact=True),
        OFT(block_size=2, coft=True, eps=0.3, block_share=True),
    ),
    "boft": (BOFT(block_size=2), BOFT(blocks=2, factors=1)),
    "hira": (HiRA(rank=2),),
    "ia3": (IA3(feedforward_modules=()), IA3(feedforward_modules=("layer",))),
    "miss": (lk.MiSS(rank=4), lk.MiSS(rank=2, kind="mini", mini=2), lk.MiSS(rank=2, kind="bat")),
    "delora": (lk.DeLoRA(rank=2, strength=3.0),),
    "gralora": (lk.GraLoRA(rank=4, blocks=2, hybrid=1, alpha=3.0),),
    "hra": (lk.HRA(rank=2), lk.HRA(rank=3, orthogonal=True)),
    "road": (lk.RoAd(group=2), lk.RoAd(group=2, variant="road_2"), lk.RoAd(group=6, variant="road_4")),
    "supertuning": (lk.SuperTuning(sparsity=0.8), lk.SuperTuning(sparsity=0.8, rank=2, largest=False)),
    "pvera": (lk.PVeRA(rank=3, sample=False),),
    "waveft": (lk.WaveFT(n_frequency=7, scale=20.0), lk.WaveFT(n_frequency=7, wavelet="db3")),
    "osf": (lk.OSF(), lk.OSF(kept=0.3)),
    "psoft": (
        lk.PSOFT(rank=2, alpha=3.0),
        lk.PSOFT(rank=2, alpha=3.0, neumann=True, eps=0.5, split=True, scale_in=False),
        lk.PSOFT(rank=2, orthogonal=False, scale_out=False, svd="lowrank"),
    ),
    "peanut": (lk.PEANuT(rank=3), lk.PEANuT(rank=3, depth=2, activation="silu")),
    "deft": (lk.DEFT(rank=2), lk.DEFT(rank=2, decomposition="qr", alpha=3.0), lk.DEFT(rank=2, para=True)),
    "tinylora": (lk.TinyLoRA(count=3, tying=0.5), lk.TinyLoRA(count=3, start="uniform", save_projection=False)),
    "unilora": (lk.UniLoRA(rank=2, length=11), lk.UniLoRA(rank=2, length=11, save_indices=True)),
    "glora": (
        lk.GLoRA(rank=2),
        lk.GLoRA(matrices="vector", inputs="vector", biases="vector"),
        lk.GLoRA(matrices="constant"),
    ),
    "bitfit": (BitFit(),),
    "full": (Full(),),
    "trainable-tokens": (TrainableTokens(tokens=(3, 1, 0, 2)),),
}
"""Method name -> example specs; a test holds the keys to METHODS. Ranks are 2: every layer here is at least that wide."""

FURTHER = frozenset(
    "miss delora gralora hra road supertuning pvera waveft osf psoft peanut deft tinylora unilora glora".split()  # noqa: SIM905
)
"""Methods that use nothing of a layer that the others do not: on other kinds than FEW they run in the slow tests."""
FEW = ("linear", "embedding", "experts")

# -- the layers ------------------------------------------------------------------------------------------------------------

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Kind:
    """One layer kind.

    Attributes:
        name: for test names.
        make: a new layer (parameters are drawn afterwards).
        inputs: batch -> calls to try; the first axis is the batch unless `row` says otherwise.
        options: more arguments for `attach`.
        core: run for every method; the others vary what methods do not see, and run for LoRA and the two probes.
        batched: how many of the calls, from the first, have a batch axis; all by default.
        row: call, index, batch -> the call for one row alone.
        join: the batch axis of the output.
        differentiable: False where torch's own gradient is no derivative: a padding index keeps the table's row from
            its gradient, so that substitution's gradient for B lacks the padding tokens (whose column of A stays zero).
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[int], list[Inputs]]
    options: Mapping[str, Any] = field(default_factory=dict)
    core: bool = False
    batched: int | None = None
    row: Callable[[Inputs, int, int], Inputs] = lambda call, i, n: (tuple(v[i : i + 1] for v in call[0]), call[1])
    join: int = 0
    differentiable: bool = True


def _floats(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def _features(width: int, strided: bool = True) -> Callable[[int], list[Inputs]]:
    """2-D, 3-D and 4-D inputs with this many features, and (`strided`) non-contiguous ones."""

    def inputs(batch: int) -> list[Inputs]:
        tensors = [
            _floats(batch, width),
            _floats(batch, 5, width),
            _floats(batch, 2, 1, width),
        ]
        if strided:
            tensors += [_floats(5, batch, width).transpose(0, 1), _floats(width, batch).T]
        return [((x,), {}) for x in tensors]

    return inputs


def _image(channels: int, *size: int) -> Callable[[int], list[Inputs]]:
    """Batched, channels-last and (last) unbatched inputs."""

    def inputs(batch: int) -> list[Inputs]:
        last = _floats(batch, *size, channels).movedim(-1, 1)
        return [((x,), {}) for x in (_floats(batch, channels, *size), last, _floats(channels, *size))]

    return inputs


def _tokens(vocabulary: int) -> Callable[[int], list[Inputs]]:
    def inputs(batch: int) -> list[Inputs]:
        tensors = [torch.randint(vocabulary, (batch, 5)), torch.randint(vocabulary, (batch,))]
        return [((ids,), {}) for ids in tensors]

    return inputs


def _attention(
    batch_first: bool, dim: int, kdim: int, vdim: int, queries: int, keys: int, heads: int = 2
) -> Callable[[int], list[Inputs]]:
    """Calls without masks, with a padding mask, with a mask for all rows and with one per row and head."""

    def inputs(batch: int) -> list[Inputs]:
        def sequence(length: int, width: int) -> Tensor:
            return _floats(batch, length, width) if batch_first else _floats(length, batch, width)

        q = sequence(queries, dim)
        k, v = sequence(keys, kdim), sequence(keys, vdim)
        padding = torch.zeros(batch, keys, dtype=torch.bool)
        padding[:, 0] = torch.arange(batch) % 2 == 0
        causal = torch.ones(queries, keys, dtype=torch.bool).tril().logical_not()
        own = _floats(batch * heads, queries, keys)
        masks: list[dict[str, Any]] = [
            {},
            {"key_padding_mask": padding},
            {"attn_mask": causal},
            {"attn_mask": own, "need_weights": False},
        ]
        return [((q, k, v), mask) for mask in masks]

    return inputs


def _attention_row(batch_first: bool, heads: int = 2) -> Callable[[Inputs, int, int], Inputs]:
    def row(call: Inputs, i: int, batch: int) -> Inputs:
        args = tuple(x[i : i + 1] if batch_first else x[:, i : i + 1] for x in call[0])
        kwargs = dict(call[1])
        if "key_padding_mask" in kwargs:
            kwargs["key_padding_mask"] = kwargs["key_padding_mask"][i : i + 1]
        if "attn_mask" in kwargs and kwargs["attn_mask"].ndim == 3:
            kwargs["attn_mask"] = kwargs["attn_mask"][i * heads : (i + 1) * heads]
        return args, kwargs

    return row


_QV = {"parts": {"layer": {"q": (0, 4), "v": [(6, 8), (10, 12)]}}}
_BATCHED_IMAGES = 2

KINDS: tuple[Kind, ...] = (
    Kind("linear", lambda: nn.Linear(8, 6), _features(8), core=True),
    Kind("linear-plain", lambda: nn.Linear(6, 10, bias=False), _features(6), core=True),
    Kind("linear-own-bias", lambda: nn.Linear(8, 6), _features(8), {"bias": "lora_only"}, core=True),
    Kind("transposed", lambda: Conv1D(10, 6), _features(6, strided=False), core=True),
    Kind(
        "conv1d",
        lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1),
        _image(4, 9),
        batched=_BATCHED_IMAGES,
    ),
    Kind(
        "conv2d-groups-circular",
        lambda: nn.Conv2d(4, 6, (2, 3), groups=2, dilation=(2, 1), padding=(1, 2), padding_mode="circular"),
        _image(4, 5, 7),
        core=True,
        batched=_BATCHED_IMAGES,
    ),
    Kind(
        "conv2d-reflect",
        lambda: nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(2, 1), padding_mode="reflect", bias=False),
        _image(4, 5, 7),
        batched=_BATCHED_IMAGES,
    ),
    Kind(
        "conv2d-replicate-own-bias",
        lambda: nn.Conv2d(4, 6, 2, padding="same", padding_mode="replicate"),
        _image(4, 3, 5),
        {"bias": "lora_only"},
        batched=_BATCHED_IMAGES,
    ),
    Kind(
        "conv2d-depthwise",
        lambda: nn.Conv2d(4, 8, (2, 3), groups=4),
        _image(4, 5, 6),
        batched=_BATCHED_IMAGES,
    ),
    Kind(
        "conv3d",
        lambda: nn.Conv3d(2, 6, (1, 2, 3), groups=2, stride=(1, 2, 1), padding=(0, 1, 1)),
        _image(2, 3, 4, 5),
        batched=_BATCHED_IMAGES,
    ),
    Kind("embedding", lambda: nn.Embedding(10, 6), _tokens(10), core=True),
    Kind("embedding-padded", lambda: nn.Embedding(10, 6, padding_idx=3), _tokens(10), differentiable=False),
    Kind("rows", lambda: nn.Linear(8, 12), _features(8), _QV, core=True),
    Kind("rows-plain", lambda: nn.Linear(8, 12, bias=False), _features(8), _QV),
    Kind("rows-transposed-own-bias", lambda: Conv1D(12, 8), _features(8, strided=False), {**_QV, "bias": "lora_only"}),
    Kind(
        "attention",
        lambda: nn.MultiheadAttention(4, 2, batch_first=True),
        _attention(True, 4, 4, 4, 5, 6),
        core=True,
        row=_attention_row(True),
    ),
    Kind(
        "attention-sequence-first",
        lambda: nn.MultiheadAttention(4, 2),
        _attention(False, 4, 4, 4, 5, 6),
        {"bias": "lora_only"},
        row=_attention_row(False),
        join=1,
    ),
    Kind(
        "attention-widths",
        lambda: nn.MultiheadAttention(4, 2, kdim=6, vdim=8, batch_first=True),
        _attention(True, 4, 6, 8, 5, 7),
        row=_attention_row(True),
    ),
    Kind(
        "attention-plain",
        lambda: nn.MultiheadAttention(4, 2, bias=False, add_zero_attn=True),
        _attention(False, 4, 4, 4, 3, 5),
        row=_attention_row(False),
        join=1,
    ),
    # As many tokens as rows: a mask's axes cannot be told from the batch by their size.
    Kind(
        "attention-square",
        lambda: nn.MultiheadAttention(4, 2, batch_first=True),
        _attention(True, 4, 4, 4, 4, 4),
        row=_attention_row(True),
    ),
    Kind(
        "attention-square-sequence-first",
        lambda: nn.MultiheadAttention(4, 2),
        _attention(False, 4, 4, 4, 4, 4),
        row=_attention_row(False),
        join=1,
    ),
)

# -- what has no layer of its own: stacks of experts, and layers whose forward is their own ---------------------------------


class ScaledLinear(nn.Linear):
    """A linear layer by its class alone: its forward does more."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.tanh(x)) * 3


class Experts(nn.Module):
    """Four gated experts as transformers holds them, in two parameters, called with tokens, their experts and weights."""

    def __init__(self, turned: bool, biased: bool, how: str) -> None:
        super().__init__()
        self.num_experts, self.is_transposed, self.has_gate, self.how = 4, turned, True, how
        shapes = {"gate_up_proj": (12, 8), "down_proj": (8, 6)}
        for name, (out, in_) in shapes.items():
            size = (4, in_, out) if turned else (4, out, in_)
            setattr(self, name, nn.Parameter(torch.empty(size)))
            if biased:
                setattr(self, f"{name}_bias", nn.Parameter(torch.empty(4, out)))

    def _product(self, x: Tensor, name: str, expert: Tensor) -> Tensor:
        weight, bias = getattr(self, name), getattr(self, f"{name}_bias", None)
        W = weight[expert] if self.is_transposed else weight[expert].transpose(-2, -1)
        y = torch.bmm(x[:, None], W)[:, 0]
        return y if bias is None else y + bias[expert]

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        result = torch.zeros_like(hidden)
        for choice in range(top_k_index.shape[1]):
            expert = top_k_index[:, choice]
            gate, up = self._product(hidden, "gate_up_proj", expert).chunk(2, dim=-1)
            y = self._product(torch.sigmoid(gate) * up, "down_proj", expert)
            result = result + y * top_k_weights[:, choice, None]
        return result


def _routed_tokens(tokens: int) -> Callable[[int], list[Inputs]]:
    """Tokens of all rows on one axis, with two experts each; in the second call expert 2 gets no token."""

    def inputs(batch: int) -> list[Inputs]:
        calls = []
        for experts in (4, 2):
            index = torch.stack([torch.randperm(experts)[:2] for _ in range(batch * tokens)])
            calls.append(((_floats(batch * tokens, 8), index, torch.rand(batch * tokens, 2).double()), {}))
        return calls

    return inputs


def _tokens_of_row(tokens: int) -> Callable[[Inputs, int, int], Inputs]:
    return lambda call, i, n: (tuple(value[i * tokens : (i + 1) * tokens] for value in call[0]), call[1])


KINDS += (
    Kind("own-forward", lambda: ScaledLinear(8, 6), _features(8), core=True),
    Kind("experts", lambda: Experts(False, False, "bmm"), _routed_tokens(3), core=True, row=_tokens_of_row(3)),
    Kind("experts-turned-biased", lambda: Experts(True, True, "bmm"), _routed_tokens(2), row=_tokens_of_row(2)),
)

# -- a method on a layer ---------------------------------------------------------------------------------------------------


class Model(nn.Module):
    """The layer under test, and one that nobody adapts."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.other = nn.Linear(2, 4)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        y = self.layer(*args, **kwargs)
        return y[0] if isinstance(y, tuple) else y


@dataclass
class Subject:
    """A model with adapters, ready to be asked."""

    model: Model
    adapters: dict[str, Adapter]
    calls: list[Inputs]
    kind: Kind

    @property
    def layer(self) -> Adapted:
        assert isinstance(self.model.layer, Adapted)
        return self.model.layer

    def run(self, route: Any, call: Inputs) -> Tensor:
        with lk.use(self.model, route):
            return self.model(*call[0], **call[1])


@dataclass(frozen=True)
class Case:
    """A method's spec on a layer kind."""

    spec: Method
    kind: Kind

    def model(self) -> Model:
        """The base model, the same at each call."""
        torch.default_generator.manual_seed(zlib.crc32(self.kind.name.encode()))
        model = Model(self.kind.make()).double()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.5)
        return model

    def attach(self, model: Model, name: str, **options: Any) -> Adapter:
        return lk.attach(model, self.spec, name=name, target_modules=["layer"], **{**self.kind.options, **options})

    def subject(self, *names: str, fresh: bool = False, batch: int = 3, **options: Any) -> Subject:
        """A model with these adapters; every tensor of theirs random and not zero, unless `fresh`."""
        model = self.model()
        made = {name: self.attach(model, name, **options) for name in names}
        if not fresh:
            for adapter in made.values():
                randomise(adapter)
        return Subject(model, made, self.kind.inputs(batch), self.kind)

    @property
    def slow(self) -> bool:
        """Whether it is left to the slow tests."""
        return self.spec.name in FURTHER and self.kind.name not in FEW

    def beside(self) -> bool:
        """Whether the kind's deltas act beside the layer, or by substitution alone."""
        return all(site.layout.beside for site in sites_of(self.kind.make()))

    def refusal(self) -> str | None:
        """Why the method's own check refuses this layer, or None."""
        try:
            for site in sites_of(self.kind.make()):
                self.spec.check(site.layout.shape, "layer")
        except LorakitError as problem:
            return str(problem)
        return None

    def homeless(self) -> bool:
        """Whether the method changes a bias that the layer does not have."""
        key = (self.spec, self.kind.name)
        if key not in _HOMELESS:
            deltas = self.subject("one").adapters["one"].deltas()
            _HOMELESS[key] = any(
                site.bias is None and delta.shift(None, lambda: torch.empty(0)) is not None for _, site, delta in deltas
            )
        return _HOMELESS[key]


_HOMELESS: dict[tuple[Method, str], bool] = {}
"""What `homeless` found, since several laws of a case ask."""


def randomise(adapter: Adapter) -> None:
    """Give every parameter of an adapter random values, so that no term of any product is zero."""
    with torch.no_grad():
        for parameter in adapter.parameters():
            if parameter.is_floating_point():
                parameter.copy_(torch.randn_like(parameter) * 0.5)


def cases() -> Iterator[Case]:
    """Each method's first example on the core kinds, its others on two of them; LoRA and the probes on all kinds."""
    thorough = (SPECS["lora"][0], *PROBES)
    for name in METHODS:
        for index, spec in enumerate(SPECS.get(name, ())):
            for kind in KINDS:
                wanted = kind.core if index == 0 else kind.name in ("linear", "conv2d-groups-circular")
                if wanted and spec not in thorough:
                    yield Case(spec, kind)
    for spec in thorough:
        for kind in KINDS:
            yield Case(spec, kind)


def label(spec: Method) -> str:
    """A readable name of an example for tests."""
    given = SPECS.get(spec.name, ())
    return f"{spec.name}{given.index(spec)}" if len(given) > 1 else spec.name
