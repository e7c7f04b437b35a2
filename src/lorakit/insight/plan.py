"""What training will take: bytes for base, adapter, gradients, optimiser and activations, before anything is loaded.

Every number is counted from shapes. The model is built on torch's meta device, where tensors have shapes and no content:
its parameters give the first four parts, and what one forward pass keeps for its backward gives the last. That is counted
on one block and on two, since blocks are alike.

    way      base           trained                      per trained number
    full     floats         all of the base              gradient + two moments
    galore   floats         all of the base              gradient; moments in a space of `rank`, and its basis
    lora     floats         the adapter, in float32      gradient + two moments, all in float32
    qlora    quantised      the adapter, in float32      the same

    nf4: 4 bits, 8/64 for a block's scale, 32/(64 · 256) for the scale of these: 4.127 bits a number

What is not counted: the memory of the program itself, an allocator's slack, and what lives for a moment within one
operation (a layer's floats while a 4-bit weight is multiplied, logits of a chunk).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from lorakit.adapter.attachment import attach
from lorakit.adapter.construction import capped
from lorakit.adapter.coverage import Coverage, planned_coverage
from lorakit.adapter.targets import Targets
from lorakit.core.delta import Method, Shape
from lorakit.core.using import activate
from lorakit.errors import LorakitError, unknown
from lorakit.experts.context import decoder_of
from lorakit.insight.catalogue import matrices
from lorakit.methods import LoRA
from lorakit.models.attention import register
from lorakit.models.stored import on_meta

Way = Literal["full", "galore", "lora", "qlora"]
WAYS: tuple[Way, ...] = ("full", "galore", "lora", "qlora")

BLOCK, SUPER = 64, 256
"""Numbers that share a scale in 4-bit formats, and scales that share one when they are quantised too."""


@dataclass(frozen=True)
class Plan:
    """Bytes that training takes, by what for.

    Attributes:
        way: "full", "galore", "lora" or "qlora".
        numbers: of the base.
        trained: numbers that train.
        base, adapter, gradients, optimiser, activations: bytes.
        coverage: what the adapter reaches, where there is one.
    """

    way: Way
    numbers: int
    trained: int
    base: int
    adapter: int
    gradients: int
    optimiser: int
    activations: int
    coverage: Coverage | None = None

    @property
    def total(self) -> int:
        """All of it."""
        return self.base + self.adapter + self.gradients + self.optimiser + self.activations

    def parts(self) -> dict[str, int]:
        """The bytes by name, the total last."""
        names = ("base", "adapter", "gradients", "optimiser", "activations", "total")
        return {name: getattr(self, name) for name in names}


# -- formats ---------------------------------------------------------------------------------------------------------------


def packed_bytes(numbers: int, rows: int, form: str, double: bool = True) -> int:
    """Bytes of one weight of `numbers` in `rows` rows: codes, scales and code books, as bitsandbytes holds them."""
    if form == "int8":
        return numbers + 4 * rows
    if form not in ("nf4", "fp4"):
        raise unknown("format", form, ("nf4", "fp4", "int8"))
    blocks = -(-numbers // BLOCK)
    codes = -(-numbers // 2) + 4 * 16
    if not double:
        return codes + 4 * blocks
    return codes + blocks + 4 * -(-blocks // SUPER) + 4 * 256 + 4


def bits_per_weight(form: str = "nf4", double: bool = True) -> float:
    """Bits of a number in a large weight: 4.127 for NF4 with double quantisation."""
    if form == "int8":
        return 8.0
    if form not in ("nf4", "fp4"):
        raise unknown("format", form, ("nf4", "fp4", "int8"))
    return 4 + (8 / BLOCK + 32 / (BLOCK * SUPER) if double else 32 / BLOCK)


# -- shapes ----------------------------------------------------------------------------------------------------------------


def outline(config: Any, blocks: int | None = None, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A causal model of this transformers configuration on the meta device; with `blocks`, of so many blocks."""
    from transformers.integrations.moe import ExpertsInterface

    own = copy.deepcopy(config)
    if blocks is not None:
        text = own.get_text_config()
        text.num_hidden_layers = blocks
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:blocks]
    register("outline", _fused)
    where = getattr(config, "_name_or_path", "") or type(config).__name__
    model: Any = on_meta(own, "AutoModelForCausalLM", where, dtype=dtype, attn_implementation="outline").train()
    if model._can_set_experts_implementation():
        ExpertsInterface.register("outline", _experts)
        model.set_experts_implementation("outline")
    return model


def kept_bytes(run: Any, but: Sequence[Tensor]) -> int:
    """Bytes that autograd keeps of what `run()` computes, each storage once; the tensors `but` are there anyway."""
    there = {tensor.untyped_storage()._cdata for tensor in but}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in there and tensor.is_floating_point():
            kept[storage._cdata] = storage.nbytes()
            alive.append(tensor)  # so that no other storage gets its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    del result
    return sum(kept.values())


def activations(
    config: Any,
    method: Method | None,
    *,
    batch: int,
    length: int,
    dtype: torch.dtype = torch.bfloat16,
    recompute: bool = False,
) -> int:
    """Bytes that one forward pass keeps for its backward; with `recompute`, of every block its input, and one block whole.

    Args:
        config: of a causal model of transformers.
        method: what is trained beside the frozen base; None trains the base.
        batch, length: rows and tokens of each.
        dtype: of the activations.
        recompute: blocks are computed again in the backward pass.
    """
    one, two = (_kept(config, blocks, method, batch, length, dtype) for blocks in (1, 2))
    text = config.get_text_config()
    blocks, block = text.num_hidden_layers, two - one
    rest = one - block
    if not recompute:
        return int(rest + blocks * block)
    entry = batch * length * text.hidden_size * dtype.itemsize
    return int(rest + blocks * entry + block)


def _kept(config: Any, blocks: int, method: Method | None, batch: int, length: int, dtype: torch.dtype) -> int:
    model = outline(config, blocks, dtype)
    if method is not None:
        adapter = attach(model, method, name="plan")
        activate(model, adapter.name)
        if dtype is not torch.float32:
            for parameter in adapter.parameters():
                parameter.data = parameter.data.float()
    else:
        model.requires_grad_(True)
    body: Any = decoder_of(model) or model
    call = {"input_ids": torch.zeros(batch, length, dtype=torch.long, device="meta"), "use_cache": False}
    # a mask that is ready: transformers would look into one that it makes, and there is nothing to see on the meta device
    mask = torch.zeros(batch, 1, length, length, dtype=dtype, device="meta")
    there = [*model.parameters(), *model.buffers(), mask]
    problem: Exception
    for masked in ({"attention_mask": mask}, {}):  # XLNet has a mask of its own shape
        arguments: dict[str, Any] = {**call, **masked}
        try:
            return kept_bytes(lambda: body(**arguments)[0], there)  # noqa: B023
        except (RuntimeError, ValueError, TypeError) as one:
            problem = one
    raise LorakitError(
        f"plan: the activations of {type(model).__name__} cannot be counted from shapes: it computes by numbers, of which the "
        f"meta device has none ({next(iter(str(problem).splitlines()), type(problem).__name__)[:120]}). Mixtures that "
        "transformers runs by its own interface for experts, and dense models, can be counted."
    ) from problem


def _experts(module: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """What a grouped product of experts keeps: every pair of token and expert as a row, through one expert's matrices. Which
    expert it is needs numbers, and all are of one size."""

    def product(x: Tensor, name: str) -> Tensor:
        W: Tensor = getattr(module, name)[0]
        y = x @ (W if module.is_transposed else W.T)
        return y + cast(Tensor, getattr(module, f"{name}_bias"))[0] if module.has_bias else y

    h: Tensor = product(hidden.repeat_interleave(index.shape[-1], 0), "gate_up_proj" if module.has_gate else "up_proj")
    y: Tensor = product(module._apply_gate(h) if module.has_gate else module.act_fn(h), "down_proj")
    pairs = (y * weights.reshape(-1, 1)).view(*index.shape, -1)
    return pairs.sum(1).to(hidden.dtype)


class _Attention(torch.autograd.Function):
    """What a fused attention keeps: its three inputs, its output, and one number per query and head. On the meta device torch
    has none, and would count the probabilities."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows, heads, length, _ = q.shape
        y = q.new_empty(rows, length, heads, v.shape[-1]).transpose(1, 2)
        ctx.save_for_backward(q, k, v, y, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return y


def _fused(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **options: Any) -> tuple[Tensor, None]:
    y: Tensor = _Attention.apply(q, k, v)  # type: ignore[no-untyped-call]
    return y.transpose(1, 2), None


# -- the plan --------------------------------------------------------------------------------------------------------------


def plan(
    config: Any,
    way: Way,
    *,
    method: Method | None = None,
    batch: int = 1,
    length: int = 512,
    dtype: torch.dtype = torch.bfloat16,
    moments: torch.dtype | None = None,
    form: str = "nf4",
    double: bool = True,
    rank: int = 128,
    recompute: bool = False,
) -> Plan:
    """What one way of training a causal model takes.

    Args:
        config: the model's transformers configuration.
        way: one of `WAYS`.
        method: of the adapter, LoRA() by default; asked for "lora" and "qlora".
        batch, length: rows of a step, and tokens of a row.
        dtype: of the base's floats and of what is computed.
        moments: of the optimiser's two moments; by default that of the trained numbers, as torch has it.
        form, double: the base's format for "qlora", and whether scales are quantised too.
        rank: of GaLore's space.
        recompute: blocks are computed again in the backward pass.
    """
    if way not in WAYS:
        raise unknown("way", way, WAYS)
    model = outline(config, None, dtype)
    shapes = list(matrices(model).values())
    held = {id(parameter): parameter for parameter in model.parameters()}.values()
    numbers = sum(parameter.numel() for parameter in held)
    base = numbers * dtype.itemsize
    if way in ("full", "galore"):
        kept = activations(config, None, batch=batch, length=length, dtype=dtype, recompute=recompute)
        state = (moments or dtype).itemsize
        moved = sum(_moments(parameter, rank if way == "galore" else None) * state for parameter in held)
        basis = sum(_basis(parameter, rank) for parameter in held) * dtype.itemsize if way == "galore" else 0
        return Plan(way, numbers, numbers, base, 0, numbers * dtype.itemsize, moved + basis, kept)
    spec = method or LoRA()
    specs = {max(shapes, key=lambda shape: min(shape.out, shape.in_)): spec}  # no layer is large enough: refused
    specs = {**{shape: capped(spec, shape) for shape in shapes}, **specs}
    for shape, own in specs.items():
        own.check(shape, f"a layer of {shape.out} × {shape.in_}")
    trained = sum(specs[shape].card.parameters(shape, specs[shape]) for shape in shapes)
    trained += spec.card.pooled(shapes, spec) if spec.card.pooled else 0
    if way == "qlora":
        base += sum(
            packed_bytes(shape.out * shape.in_, shape.out, form, double) - _floats(shape, dtype) for shape in shapes
        )
    kept = activations(config, spec, batch=batch, length=length, dtype=dtype, recompute=recompute)
    state = 2 * trained * (moments or torch.float32).itemsize
    reached = planned_coverage(model, spec, Targets())
    return Plan(way, numbers, trained, base, 4 * trained, 4 * trained, state, kept, reached)


def _floats(shape: Shape, dtype: torch.dtype) -> int:
    return shape.out * shape.in_ * dtype.itemsize


def _moments(parameter: nn.Parameter, rank: int | None) -> int:
    """Numbers of both moments of a parameter."""
    if rank is None or parameter.ndim != 2 or min(parameter.shape) <= rank:
        return 2 * parameter.numel()
    return 2 * rank * max(parameter.shape)


def _basis(parameter: nn.Parameter, rank: int) -> int:
    if parameter.ndim != 2 or min(parameter.shape) <= rank:
        return 0
    return rank * min(parameter.shape)


def gigabytes(count: int) -> str:
    """Bytes for people, in units of 10⁹ or 10⁶."""
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
