"""The loss: logits only at labelled tokens, and never all of them at once.

Hidden states are gathered at the targets, multiplied by the head in chunks, and the gradient of a chunk is formed
while its logits are there, so the backward pass only scales what was kept: one row per target. Softcapping, logit
scales, head bias, label smoothing and per-target weights are part of it; the count of right tokens comes for free. A
head that is more than a linear layer (an adapted one) is called as a module, chunk by chunk, and recomputed in the
backward pass. `causal_loss` is the whole step on a packed batch, `padded_loss` the plain one on a padded batch.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lorakit.adapter.adapter import adapters
from lorakit.core.storage import FLOAT, storage_of
from lorakit.core.using import counted, use
from lorakit.edits.hooks import prompts
from lorakit.errors import LorakitError
from lorakit.native.elementwise import wide
from lorakit.train.data.tokenise import IGNORED
from lorakit.train.step import fusion
from lorakit.train.step.attention import is_packed, packed_attention, packed_call, packed_hidden
from lorakit.train.step.balance import is_balanced, note_balance
from lorakit.train.step.batched_attention import to_logits
from lorakit.train.step.last_block import asked_rows
from lorakit.train.step.noise import tell_lengths
from lorakit.train.step.packing import PackedBatch, pack, pad

if TYPE_CHECKING:
    from lorakit.train.data.store import Example

logger = logging.getLogger(__name__)

CHUNK_LOGITS = 1 << 24
"""Logits held at once (32 MB in bf16)."""


@dataclass(frozen=True)
class LossStats:
    """Sums over targets (labelled tokens), so that batches and processes simply add: how many there are, of how many the label
    was the likeliest token, and the loss in nats."""

    targets: int = 0
    right: Tensor = field(default_factory=lambda: torch.zeros(()))
    total: Tensor = field(default_factory=lambda: torch.zeros(()))

    def __add__(self, other: LossStats) -> LossStats:
        def added(one: Tensor, two: Tensor) -> Tensor:
            return one.cpu().double() + two.cpu().double()

        targets = self.targets + other.targets
        return LossStats(targets, added(self.right, other.right), added(self.total, other.total))

    @property
    def mean(self) -> float:
        """Mean loss per target."""
        return float(self.total) / self.targets if self.targets else math.nan

    @property
    def perplexity(self) -> float:
        """e to the mean loss: infinite rather than an overflow for a hopeless model."""
        return math.exp(self.mean) if self.mean < 700 else math.inf

    @property
    def token_accuracy(self) -> float:
        """Share of targets that were the likeliest token."""
        return float(self.right) / self.targets if self.targets else math.nan

    def numbers(self) -> dict[str, float]:
        """What is reported of them, by name."""
        return {"loss": self.mean, "perplexity": self.perplexity, "token_accuracy": self.token_accuracy}


@dataclass(frozen=True)
class LossPath:
    """How the loss of a batch of examples is computed.

    `loss(model, examples, num_items=..., label_smoothing=...)` gives the summed loss divided by `num_items` (None: by its
    own targets) and its stats. `opened(model)` is held open around forward and backward. `name` is for logs and the model card.
    """

    name: str
    loss: Callable[..., tuple[Tensor, LossStats]]
    opened: Callable[[nn.Module], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext


@dataclass(frozen=True)
class Head:
    """How hidden states become logits: `softcap * tanh(scale * (W h + b) / softcap)`."""

    module: nn.Module
    scale: float
    softcap: float | None

    @property
    def is_linear(self) -> bool:
        """Is the module a linear layer of floats and nothing else, hooks included?"""
        module = self.module
        plain = type(module) is nn.Linear and "forward" not in vars(module)
        hooked = bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)
        return plain and not hooked and not hasattr(module, "parametrizations")

    def shape(self, logits: Tensor) -> Tensor:
        """Raw products to logits, in fp32 or wider."""
        return to_logits(logits, self.scale, self.softcap)


def read_head(model: Any) -> Head:
    """The head of a causal model, from its output embeddings and its configuration.

    Raises LorakitError for a model without one.
    """
    module = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if module is None:
        raise LorakitError(f"loss: {type(model).__name__} has no output embeddings; a causal language model has")
    storage = storage_of(module, "weight") if isinstance(getattr(module, "weight", None), Tensor) else FLOAT
    if storage is not FLOAT:
        raise LorakitError(
            f"loss: the output head of {type(model).__name__} is quantised ({storage.label(module, 'weight')}); logits "
            "need its float weights"
        )
    config = model.config.get_text_config()
    scale = 1.0
    if getattr(config, "logit_scale", None):
        scale = float(config.logit_scale)
    elif getattr(config, "logits_scaling", None):
        scale = 1.0 / float(config.logits_scaling)
    elif getattr(config, "lm_head_multiplier", None):
        scale = float(config.lm_head_multiplier)
    softcap = getattr(config, "final_logit_softcapping", None)
    return Head(module, scale, float(softcap) if softcap else None)


def decoder_of(model: Any) -> nn.Module:
    """A causal model without its head."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    if decoder is None or decoder is model:
        decoder = getattr(model, model.base_model_prefix, None)
    if not isinstance(decoder, nn.Module):
        raise LorakitError(f"loss: {type(model).__name__} has no decoder apart from its head; use padded_loss")
    return decoder


# ---------------------------------------------------------------------------------------------------------------
# The loss of a chunk


def chunk_losses(
    raw: Tensor, targets: Tensor, *, scale: float, softcap: float | None, smoothing: float
) -> tuple[Tensor, Tensor, Tensor]:
    """raw [targets, vocabulary] -> (loss of each target, log of the sum, is the target the most likely token).

    Right is a target that no token beats, rather than the first of equals: a compiled maximum is far faster than the
    place of one.
    """
    logits = to_logits(raw, scale, softcap)
    top = logits.amax(-1, keepdim=True)
    log_sum = (logits - top).exp().sum(-1, keepdim=True).log() + top
    losses = log_sum[:, 0] - (1 - smoothing) * logits.gather(1, targets[:, None])[:, 0]
    if smoothing:
        losses = losses - smoothing * logits.mean(-1)
    return losses, log_sum, raw.gather(1, targets[:, None])[:, 0] >= raw.amax(-1)


def chunk_gradient(
    raw: Tensor,
    targets: Tensor,
    log_sum: Tensor,
    weights: Tensor,
    *,
    scale: float,
    softcap: float | None,
    smoothing: float,
) -> Tensor:
    """The gradient of the weighted sum of losses with respect to the raw products, in their dtype."""
    logits = to_logits(raw, scale, softcap)
    wanted = targets[:, None] == torch.arange(raw.shape[1], device=raw.device)[None]
    slope = (logits - log_sum).exp() - (1 - smoothing) * wanted.to(logits.dtype)
    if smoothing:
        slope = slope - smoothing / raw.shape[1]
    if softcap is not None:
        slope = slope * (1 - (logits / softcap) ** 2)
    return (slope * (weights[:, None] * scale)).to(raw.dtype)


class _LinearLoss(torch.autograd.Function):
    """Summed loss of gathered hidden states `[targets, hidden]` under a linear head; gradients made in the forward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        weights: Tensor,
        scale: float,
        softcap: float | None,
        smoothing: float,
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        total = torch.zeros((), dtype=dtype, device=hidden.device)
        right = torch.zeros((), dtype=torch.float32, device=hidden.device)
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        of_hidden = torch.empty_like(hidden) if need_hidden else None
        of_weight = torch.zeros_like(weight, dtype=dtype) if need_weight else None
        of_bias = torch.zeros_like(bias, dtype=dtype) if bias is not None and need_bias else None
        weights = weights.to(dtype)
        constants: dict[str, Any] = {"scale": scale, "softcap": softcap, "smoothing": smoothing}
        for begin, end in _chunks(len(targets), weight.shape[0]):
            part = slice(begin, end)
            rows = hidden[part]
            raw = nn.functional.linear(rows, weight, bias)
            losses, log_sum, hit = fusion.call(chunk_losses, raw, targets[part], **constants)
            total += (losses * weights[part]).sum()
            right += (hit * weights[part]).sum()
            if not any((need_hidden, need_weight, need_bias)):
                continue
            slope = fusion.call(chunk_gradient, raw, targets[part], log_sum, weights[part], **constants)
            if of_hidden is not None:
                torch.mm(slope, weight, out=of_hidden[part])
            if of_weight is not None:
                of_weight += slope.t() @ rows
            if of_bias is not None:
                of_bias += slope.sum(0)
        ctx.save_for_backward(of_hidden, of_weight, of_bias)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(right)
        return total, right

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        of_hidden, of_weight, of_bias = (
            None if kept is None else kept * grads[0].to(kept.dtype) for kept in ctx.saved_tensors
        )
        if of_weight is not None:
            of_weight = of_weight.to(ctx.weight_dtype)
        if of_bias is not None:
            of_bias = of_bias.to(ctx.weight_dtype)
        return of_hidden, of_weight, of_bias, None, None, None, None, None


def _chunks(targets: int, vocabulary: int) -> list[tuple[int, int]]:
    """Equal parts of at most CHUNK_LOGITS logits."""
    size = max(16, CHUNK_LOGITS // max(1, vocabulary))
    count = -(-targets // size)
    edges = [targets * i // count for i in range(count + 1)] if count else [0]
    return list(itertools.pairwise(edges))


def _module_losses(head: Head, hidden: Tensor, targets: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    raw = head.module(hidden)
    losses, _, hit = chunk_losses(raw, targets, scale=head.scale, softcap=head.softcap, smoothing=smoothing)
    return losses, hit


def target_loss(
    head: Head, hidden: Tensor, targets: Tensor, weights: Tensor, *, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The weighted sum of losses of hidden states `[targets, hidden]`, and the weighted count of right tokens."""
    module = head.module
    if head.is_linear and isinstance(module, nn.Linear):
        arguments = (targets, weights, head.scale, head.softcap, label_smoothing)
        rows = hidden.to(module.weight.dtype)
        total, right = _LinearLoss.apply(rows, module.weight, module.bias, *arguments)  # type: ignore[no-untyped-call]
        return total, right
    from torch.utils.checkpoint import checkpoint

    total = torch.zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
    right = torch.zeros((), dtype=torch.float32, device=hidden.device)
    vocabulary = getattr(module, "out_features", None) or 1 << 17
    for begin, end in _chunks(len(targets), int(vocabulary)):
        losses, hit = checkpoint(
            _module_losses, head, hidden[begin:end], targets[begin:end], label_smoothing, use_reentrant=False
        )
        total = total + (losses * weights[begin:end].to(losses.dtype)).sum()
        right = right + (hit * weights[begin:end]).sum()
    return total, right


# ---------------------------------------------------------------------------------------------------------------
# Whole steps


def causal_loss(
    model: Any, packed: PackedBatch, *, num_items: Tensor | float | None = None, label_smoothing: float = 0.0
) -> tuple[Tensor, LossStats]:
    """Mean loss over the labels of a packed batch, and its stats.

    The sum is divided by `num_items` (all labels of an accumulated step) or by the labels of this batch. The model's
    packed attention is switched on for the call if it is not already; with gradient checkpointing it must be open around
    backward too, so then LorakitError is raised.
    """
    head = read_head(model)
    decoder = decoder_of(model)
    is_open = is_packed(model)
    if is_open and model.training and torch.is_grad_enabled() and not is_balanced(model):
        packed = asked_rows(decoder, packed, packed_hidden)
    if (
        not is_open
        and model.training
        and any(getattr(part, "gradient_checkpointing", False) for part in model.modules())
    ):
        raise LorakitError(
            "causal_loss: gradient checkpointing runs layers again in backward, when this call has put the model's own "
            "attention back; open `with packed_attention(model):` around forward and backward"
        )
    with contextlib.nullcontext() if is_open else packed_attention(model), counted(model, packed.counts):
        found = packed_call(decoder, packed, use_cache=False)
    note_balance(model, found, packed.counts)
    rows = found.last_hidden_state[0].index_select(0, packed.hidden_index)
    total, right = target_loss(head, rows, packed.targets, packed.weights, label_smoothing=label_smoothing)
    divisor = packed.num_targets if num_items is None else num_items
    stats = LossStats(packed.num_targets, right, total.detach())
    return total / _at_least_one(divisor), stats


def padded_loss(
    model: Any,
    examples: Sequence[Example],
    *,
    num_items: Tensor | float | None = None,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, LossStats]:
    """The same on a right-padded batch, through the model's own forward and logits: slower, and right for any causal
    model. The padding-free path is tested against it."""
    device = next(model.parameters()).device
    padded = pad(examples)
    labels = padded.pop("labels").roll(-1, 1)
    labels[:, -1] = IGNORED
    labels = labels.flatten()
    chosen = (labels != IGNORED).nonzero()[:, 0]  # on the host, where sizes are known
    batch = {name: tensor.to(device) for name, tensor in padded.items()}
    tell_lengths(model, lambda: batch["attention_mask"].sum(1, keepdim=True).float())
    with prompts_known(model, [prompt_length(example.labels) for example in examples]):
        outputs = model(**batch, use_cache=False)
    note_balance(model, outputs)
    logits = outputs.logits.flatten(0, 1).index_select(0, chosen.to(device))
    return class_loss(logits, labels[chosen].to(device), num_items=num_items, label_smoothing=label_smoothing)


def class_loss(
    logits: Tensor, labels: Tensor, *, num_items: Tensor | float | None = None, label_smoothing: float = 0.0
) -> tuple[Tensor, LossStats]:
    """Cross entropy of logits `[targets, classes]`, summed and divided by `num_items`, and its stats."""
    total = nn.functional.cross_entropy(wide(logits), labels, reduction="sum", label_smoothing=label_smoothing)
    stats = LossStats(len(labels), (logits.detach().argmax(-1) == labels).sum().float(), total.detach())
    return total / _at_least_one(stats.targets if num_items is None else num_items), stats


def packed_loss(
    model: Any, examples: Sequence[Example], *, num_items: float | None = None, label_smoothing: float = 0.0
) -> tuple[Tensor, LossStats]:
    """`causal_loss` of examples that are packed first."""
    batch = pack(examples).to(next(model.parameters()).device)
    tell_lengths(model, batch.lengths)
    return causal_loss(model, batch, num_items=num_items, label_smoothing=label_smoothing)


PADDED = LossPath("off: padded batches", padded_loss)
PACKED = LossPath(
    "no padding, shared prefixes computed once, logits only at labelled tokens", packed_loss, packed_attention
)


def base_alone(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """The model without its adapters, where it has some: what a model can do is asked of the base."""
    return use(model, None) if adapters(model) else contextlib.nullcontext()


def prompt_length(labels: Sequence[int]) -> int:
    """How many tokens of an example are its prompt: those before the first that is learned."""
    return next((place for place, label in enumerate(labels) if label != IGNORED), len(labels))


def prompts_known(model: nn.Module, lengths: Sequence[int]) -> contextlib.AbstractContextManager[None]:
    """Says to a model's edits how many tokens of each row are its prompt, where the model has adapters."""
    return prompts(model, lengths) if adapters(model) else contextlib.nullcontext()


def _at_least_one(count: Tensor | float) -> Tensor | float:
    return count.clamp_min(1) if isinstance(count, Tensor) else max(1, count)
