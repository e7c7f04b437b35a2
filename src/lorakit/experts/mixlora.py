"""MixLoRA: every feed-forward becomes a sparse mixture whose experts share its frozen weights and have a LoRA each.

    z = G x (experts,)      p = softmax(z)      the top_k largest are kept, their p divided by their sum
    y = Σ_e p_e FFN_e(x),   FFN_e: the frozen feed-forward with expert e's change in each of its matrices

G (experts, in) is one router per feed-forward, in float32, drawn from N(0, 0.02²); attention gets the plain inner method.
The loss of each router has `balance · E Σ_e f_e P_e` added (`gates.balance`), and `z · z-loss`, both meant over the feed-
forwards; padding does not count. With `mix="block"`, the paper's, a token runs through the feed-forward once for each expert
that it keeps, each time with that expert alone open in the gate of the product: top_k times the base's work there. With
`mix="layer"` it runs once and every matrix adds its experts' changes by the same weights: cheaper, and another function
wherever something nonlinear lies between two matrices. With top_k=1 the kept weight is 1, so that the router learns from its
balance alone. Li et al. 2024, arXiv 2404.15159.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lorakit.core.combinator import Combinator, inner_option
from lorakit.core.delta import Call, Card, Delta, LowRank, Method, Pool, Shape
from lorakit.core.hooks import CallHooks
from lorakit.core.layer import Adapted
from lorakit.core.mixed import joint_gate
from lorakit.core.options import option
from lorakit.core.routing import Routing
from lorakit.core.state import ModelState
from lorakit.core.uniform import is_product
from lorakit.core.walking import in_attention
from lorakit.errors import LorakitError
from lorakit.experts.context import decoder_of
from lorakit.experts.gates import balance, top_mask, z_loss
from lorakit.methods import LoRA


@dataclass(frozen=True, kw_only=True)
class MixLoRA(Combinator):
    """The options of MixLoRA."""

    name = "mixlora"
    card = Card(
        title="MixLoRA",
        formula="y = Σ_e p_e FFN_e(x), FFN_e with a LoRA of its own; p the renormalised top-k of softmax(G x)",
        parameters=lambda shape, spec: spec.experts * spec.inner.card.parameters(shape, spec.inner),
        paper="arXiv 2404.15159",
        use="Several kinds of data in one training, where one adapter of the whole size mixes them up.",
        limits="A weight per token: cannot be merged.",
    )
    experts: int = option(8, "changes per matrix of a feed-forward", minimum=1)
    top_k: int = option(2, "experts per token", minimum=1)
    inner: Method = inner_option(LoRA, "method of every expert, and of the layers outside feed-forwards")
    balance: float = option(0.01, "coefficient of the load-balance loss")
    z: float = option(0.0, "coefficient of the router z-loss")
    mix: Literal["block", "layer"] = option(
        "block", "block: experts are whole feed-forwards; layer: experts are changes of single matrices"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top_k > self.experts:
            raise LorakitError(
                f"mixlora: top_k was given as {self.top_k!r}; it is at least 1 and at most the {self.experts} experts."
            )

    def at(self, path: str) -> Method:
        return self.inner.at(path) if in_attention(path) else super().at(path)

    def build(self, shape: Shape, pool: Pool) -> Delta:
        made = [self.inner.build(shape, pool) for _ in range(self.experts)]
        return Mixture(self, shape, pool, made) if all(map(is_product, made)) else Blend(self, shape, pool, made)

    def check_layers(self, paths: Sequence[str]) -> None:
        _blocks(paths)

    def install(
        self, name: str, model: nn.Module, layers: Mapping[str, nn.Module]
    ) -> tuple[nn.Module | None, list[RemovableHandle]]:
        mixed = {path: cast(Adapted, layer) for path, layer in layers.items() if not in_attention(path)}
        mixed = {path: layer for path, layer in mixed.items() if layer.deltas_of(name)}
        gates = Gates(self, name, mixed, next(iter(mixed.values())).state)
        gates.to(next(model.parameters()).device)
        handles = []
        modules = dict(model.named_modules())
        for index, block in enumerate(_blocks(list(mixed))):
            handles += CallHooks(functools.partial(gates.enter_block, index), gates.leave_block).on(modules[block])
        # where the decoder is the model itself, that is what is called with the mask
        decoder = cast(Any, model).get_decoder() if hasattr(model, "get_decoder") else decoder_of(model)
        if isinstance(decoder, nn.Module):
            handles += CallHooks(gates.enter_model, gates.leave_model).on(decoder)
        return gates, handles


def _blocks(paths: Sequence[str]) -> dict[str, list[str]]:
    """Feed-forward module -> its adapted layers."""
    blocks: dict[str, list[str]] = {}
    for path in paths:
        if not in_attention(path):
            blocks.setdefault(path.rpartition(".")[0], []).append(path)
    if not blocks:
        raise LorakitError(
            "attach: mixlora needs feed-forward layers, and only attention layers were chosen; "
            'target_modules="mlp" or "all-linear" includes them.'
        )
    for block, inside in blocks.items():
        mingled = (
            [path for path in paths if path.startswith(f"{block}.") and path not in inside] if block else list(paths)
        )
        if len(inside) < 2 or mingled:
            raise LorakitError(
                f"attach: mixlora routes feed-forwards that are modules of their own with two matrices or more; {inside[0]} "
                f"stands in {block or 'the model itself'}, which "
                + (f"holds {mingled[0]} too." if mingled else "has no second one that is adapted.")
            )
    return blocks


class Experts(Delta):
    """Several deltas of one matrix, and where the present call's weights for them come from."""

    def __init__(self, spec: MixLoRA, shape: Shape, pool: Pool, made: Sequence[Delta]) -> None:
        super().__init__(spec, shape, pool)
        self.experts = nn.ModuleList(made)
        for delta in made:
            if (
                delta.shift(torch.zeros(self.shape.out), lambda: torch.zeros(self.shape.out, self.shape.in_))
                is not None
            ):
                raise LorakitError(
                    f"mixlora: {delta.spec.name} changes biases, which cannot be weighed token by token; choose an inner "
                    "method that changes matrices alone."
                )
        self.gates: tuple[Gates, ...] = ()

    def weights(self) -> Tensor:
        """(…, experts): what the router of this matrix's feed-forward has found for the present call."""
        found = self.gates[0].state.routing.found.get(self.gates[0].name) if self.gates else None
        if found is None:
            raise LorakitError(
                f"{self.spec.name}: a layer of a feed-forward was called by itself, so no router has seen its tokens; call the "
                "feed-forward or the model."
            )
        return found

    def begin(self, W: Tensor) -> None:
        for delta in self.experts:
            cast(Delta, delta).begin(W)

    def dense(self, W: Tensor) -> Tensor:
        raise LorakitError(
            f"{self.spec.name} weights its experts differently for every token, so there is no one ΔW to "
            "merge, combine or extract."
        )

    def roles(self) -> dict[str, str]:
        return cast(Delta, self.experts[0]).roles()

    def frozen(self) -> list[nn.Parameter]:
        return [parameter for delta in self.experts for parameter in cast(Delta, delta).frozen()]


class Mixture(Experts, LowRank):
    """Experts with factors: side by side, and the token's weights are the gate of their one product."""

    def factors(self) -> tuple[Tensor, Tensor]:
        pairs = [cast(LowRank, delta).factors() for delta in self.experts]
        return torch.cat([B for B, _ in pairs], dim=1), torch.cat([A for _, A in pairs], dim=0)

    def gate(self) -> Tensor:
        weights = self.weights()
        deltas = [cast(LowRank, delta) for delta in self.experts]
        ranks = [delta.factors()[1].shape[0] for delta in deltas]
        return joint_gate([(delta, weights[..., e : e + 1]) for e, delta in enumerate(deltas)], ranks)


class Blend(Experts):
    """Experts of any other method: each one's change times its weight."""

    def act(self, call: Call) -> Tensor:
        weights = self.weights()
        changes = [cast(Delta, delta).act(call) for delta in self.experts]
        weighed = [change * weights[..., e : e + 1].to(change.dtype) for e, change in enumerate(changes)]
        return sum(weighed[1:], weighed[0])


class Gates(nn.Module):
    """The routers of all feed-forwards, `G0`, `G1`, … (experts, in), in the model's order (`blocks`)."""

    def __init__(self, spec: MixLoRA, name: str, layers: Mapping[str, Adapted], state: ModelState) -> None:
        super().__init__()
        self.spec, self.name, self._state = spec, name, (state,)
        self.blocks: list[str] = []
        for index, (block, inside) in enumerate(_blocks(list(layers)).items()):
            self.blocks.append(block)
            first = next(iter(layers[inside[0]].sites.values())).layout.shape.in_
            self.register_parameter(f"G{index}", nn.Parameter(0.02 * torch.randn(spec.experts, first)))
            for path in inside:
                for delta in layers[path].deltas_of(name).values():
                    cast(Experts, delta).gates = (self,)

    @property
    def state(self) -> ModelState:
        return self._state[0]

    def route(self, index: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`(logits, weights, kept)` of one feed-forward's router for its inputs (…, in): each (…, experts)."""
        G = cast(Tensor, getattr(self, f"G{index}"))
        precise = torch.promote_types(x.dtype, torch.float32)
        logits = F.linear(x.to(precise), G.to(precise))
        p = logits.softmax(dim=-1)
        kept = top_mask(logits, self.spec.top_k)
        p = p * kept
        return logits, p / p.sum(dim=-1, keepdim=True), kept

    def note(self, block: str, logits: Tensor, weights: Tensor, kept: Tensor) -> None:
        """Record what this call adds to the training loss and which experts it chose, where that is asked for. The loss is
        worked out by whoever asked: within the model gradient checkpointing might run it again."""
        notes = self.state.notes
        notes.add_weights(block, weights, weights.shape[:-1])
        if notes.losses is None:
            return
        counts = notes.counts
        if counts is not None and counts.numel() != kept.shape[:-1].numel():
            raise LorakitError(
                f"mixlora: counts were given for {counts.numel()} tokens, and a feed-forward was called with "
                f"{kept.shape[:-1].numel()}; the model drops or adds tokens, so its balance cannot be kept."
            )
        notes.losses.append(functools.partial(self.loss, logits, kept, counts))

    def loss(self, logits: Tensor, kept: Tensor, counts: Tensor | None) -> Tensor:
        """One router's share of what is added to the training loss."""
        loss = self.spec.balance * balance(logits.softmax(dim=-1), kept, counts)
        if self.spec.z:
            loss = loss + self.spec.z * z_loss(logits, counts)
        return loss / len(self.blocks)

    def enter_block(self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A feed-forward is called: its router weighs the experts, and the tokens come once for each that they keep."""
        before, block = self.state.routing, self.blocks[index]
        if self.name not in before.names:
            return None
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if len(tensors) != 1:
            raise LorakitError(f"mixlora: {block} was called with {len(tensors)} tensors; a feed-forward takes one.")
        logits, weights, kept = self.route(index, tensors[0])
        self.note(block, logits, weights, kept)
        if self.spec.mix == "layer":
            self.state.routing = dataclasses.replace(before, found={**before.found, self.name: weights})
            return args, kwargs, (before, None)
        # One copy of all tokens for each kept expert, in which that expert alone is open.
        k = self.spec.top_k
        order = logits.argsort(dim=-1, descending=True, stable=True)[..., :k].movedim(-1, 0)
        one_hot = F.one_hot(order, self.spec.experts).to(weights.dtype).flatten(0, 1)
        table = before.table
        if table is not None and before.axis == 0:
            table = table.repeat(k, 1)
        found = {**before.found, self.name: one_hot}
        self.state.routing = Routing(before.names, before.weights, table, before.axis, found)

        def copies(value: Any) -> Any:
            return value.repeat(k, *[1] * (value.ndim - 1)) if isinstance(value, Tensor) else value

        args = tuple(copies(value) for value in args)
        kwargs = {key: copies(value) for key, value in kwargs.items()}
        return args, kwargs, (before, torch.stack([weights.gather(-1, own[..., None])[..., 0] for own in order]))

    def leave_block(self, kept: tuple[Routing, Tensor | None], output: Any) -> Any:
        """A feed-forward has run: its copies are added up by their weights."""
        self.state.routing, weights = kept
        if weights is None or output is None:
            return None
        if not isinstance(output, Tensor):
            raise LorakitError(
                f"mixlora: a feed-forward returned {type(output).__name__} and not one tensor, so what its experts gave cannot "
                'be added up; mix="layer" does not need to.'
            )
        slots = output.unflatten(0, (len(weights), -1))
        return (slots * weights[..., None].to(slots.dtype)).sum(dim=0)

    def enter_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The model is called: padding, as its mask says, counts in no balance."""
        mask, notes = kwargs.get("attention_mask"), self.state.notes
        if notes.losses is None or notes.counts is not None or not isinstance(mask, Tensor) or mask.ndim != 2:
            return None
        notes.counts = mask
        return args, kwargs, self

    def leave_model(self, kept: Any, output: Any) -> None:
        """The model has run."""
        self.state.notes.counts = None
