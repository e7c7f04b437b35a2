"""Attention edits: keys and values beside a model's own, in a function over the model's attention function.

While a model carries an edit of this kind, `ATTENTION_EDITS` is over its attention. It looks at the module that calls: the
`AttentionEdits` set on that module add what the routing asks for, and other modules get what they had. Keys and values are
made at each call and never put into a cache, so a cache holds the user's tokens alone, gradient checkpointing may compute a
layer twice, and encoders, which have no cache, are no special case.

    joint       softmax(q [P_K; K]ᵀ s) [P_V; V]                         prefix tuning
    apart       softmax(q Kᵀ s) V + gate ⊙ softmax(q P_Kᵀ s) P_V         LLaMA-Adapter
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorakit.core.rows import check_rows
from lorakit.core.state import ModelState
from lorakit.edits.anatomy import keys_and_values
from lorakit.edits.contract import Anatomy, Attention
from lorakit.edits.rows import RowChoice, active, choose, weigh
from lorakit.errors import LorakitError
from lorakit.models.attention import Override

_EDITS = "lorakit_attention_edits"


class AttentionEdits:
    """The edits of any number of adapters at one attention module."""

    def __init__(self, state: ModelState, model: nn.Module, path: str, anatomy: Anatomy) -> None:
        self.state, self.path, self.key_heads = state, path, anatomy.key_heads
        self.edits: dict[str, Attention] = {}
        self.relative: Any = None
        """The attention of the same stack that computes relative position scores (T5), if there is one."""
        for block in (*anatomy.blocks, *anatomy.decoder_blocks):
            if block.attention == path:
                for module in model.get_submodule(block.path.rpartition(".")[0]).modules():
                    if getattr(module, "has_relative_attention_bias", False) and hasattr(module, "compute_bias"):
                        self.relative = self.relative or module

    def attend(
        self, inner: Callable[..., Any], module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], packed: bool
    ) -> Any:
        """One call of the attention function `inner` with the edits that the routing asks for."""
        names = active(self.state.routing, self.edits)
        if not names:
            return inner(module, *args, **kwargs)
        query, key, value, mask, *rest = args if len(args) > 3 else (*args, kwargs.pop("attention_mask", None))
        prefixes = choose(self.state.routing, {name: edit for name, edit in self.edits.items() if edit.joint})
        if prefixes.names:
            if packed:
                raise LorakitError(
                    f"{self.path}: a prefix cannot act in a padding-free batch; use the padded path (train.fast_path: off)."
                )
            own = key.shape[2]
            key, value, mask = self._prefixed(prefixes, module, query, key, value, mask, kwargs)
            if kwargs.get("position_bias") is not None:
                kwargs["position_bias"] = self._biased(kwargs["position_bias"], query.shape[2], own, key.shape[2] - own)
        result = inner(module, query, key, value, mask, *rest, **kwargs)
        apart = [name for name in names if not self.edits[name].joint]
        extra = self._apart(apart, module, query, kwargs.get("scaling")) if apart else None
        return result if extra is None else (result[0] + extra.to(result[0].dtype), *result[1:])

    def tensors(self, edit: Attention, module: Any, like: Tensor) -> tuple[Tensor, Tensor]:
        """An edit's keys and values at this attention, (key heads, tokens, head size) twice, in the dtype of `like`."""

        def project(hidden: Tensor) -> tuple[Tensor, Tensor]:
            keys, values = keys_and_values(module, hidden.to(like.dtype))
            shaped = [one.view(one.shape[0], self.key_heads, -1).transpose(0, 1) for one in (keys, values)]
            if isinstance(getattr(module, "k_norm", None), nn.Module):  # Qwen3 and others norm each head's keys
                shaped[0] = module.k_norm(shaped[0])
            return shaped[0], shaped[1]

        keys, values = edit.keys_values(project)
        return keys.to(like.dtype), values.to(like.dtype)

    # -- one softmax for both ------------------------------------------------------------------------------------------
    def _prefixed(
        self,
        who: RowChoice,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        pairs = [self.tensors(self.edits[name], module, key) for name in who.names]
        columns = who.columns(
            {name: one[0].shape[1] for name, one in zip(who.names, pairs, strict=True)}, key.device, True
        )
        if who.index is not None:
            check_rows(query, who.index.shape[0], 0, self.path)
        if mask is None and (columns.lengths is not None or _is_causal(module, query, kwargs)):
            queries, own = query.shape[2], key.shape[2]
            seen = torch.ones(queries, own, dtype=torch.bool, device=query.device)
            mask = (seen.tril(own - queries) if _is_causal(module, query, kwargs) else seen)[None, None]
        if mask is not None:
            mask = columns.grow_mask(mask, key, key.shape[2], enters=False)
        keys, values = (
            columns.per_row([pair[side] for pair in pairs], who.index, key.shape[0], axis=1) for side in range(2)
        )
        return torch.cat([keys, key], dim=2), torch.cat([values, value], dim=2), mask

    def _biased(self, bias: Tensor, queries: int, own: int, width: int) -> Tensor:
        """Relative position scores (1, heads, queries, own keys) with those of a prefix, which stands right before the text."""
        if self.relative is None:
            added = bias.new_zeros(*bias.shape[:-1], width)
        else:
            added = self.relative.compute_bias(
                queries, width, device=bias.device, past_seen_tokens=width + own - queries
            )
        return torch.cat([added.to(bias.dtype).expand(*bias.shape[:-1], width), bias], dim=-1)

    # -- a softmax of its own ------------------------------------------------------------------------------------------
    def _apart(self, names: list[str], module: Any, query: Tensor, scaling: float | None) -> Tensor | None:
        """What gated edits add, (rows, tokens, heads, head size)."""
        total: Tensor | None = None
        scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
        for name in names:
            edit = self.edits[name]
            keys, values = self.tensors(edit, module, query)
            groups = query.shape[1] // keys.shape[0]
            keys, values = (one.repeat_interleave(groups, dim=0) for one in (keys, values))
            scores = torch.matmul(query, keys.transpose(1, 2)) * scale
            shares = scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
            gate = cast(Tensor, edit.gate()).to(query.dtype)
            added = (torch.matmul(shares, values) * gate[:, None, None]).transpose(1, 2)
            added = weigh(self.state.routing, name, added, self.path)
            total = added if total is None else total + added
        return total


def _is_causal(module: Any, query: Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether a call without a mask hides later tokens from earlier ones."""
    said = kwargs.get("is_causal")
    return bool(getattr(module, "is_causal", True) if said is None else said) and query.shape[2] > 1


# -- transformers' attention function --------------------------------------------------------------------------------------


def set_edits(module: nn.Module, edits: AttentionEdits | None) -> None:
    """Let an attention module be called with these edits; None takes them off."""
    if edits is not None:
        object.__setattr__(module, _EDITS, edits)
    elif _EDITS in module.__dict__:
        object.__delattr__(module, _EDITS)


def with_edits(
    inner: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], packed: bool = False
) -> Any:
    """An attention function called for a module, with the edits that are set on it."""
    edits = cast("AttentionEdits | None", module.__dict__.get(_EDITS))
    return inner(module, *args, **kwargs) if edits is None else edits.attend(inner, module, args, kwargs, packed)


def _attention(inner: Callable[..., Any], module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return with_edits(inner, module, args, kwargs)


ATTENTION_EDITS = Override("edits", _attention)
"""Over the attention function of every model that carries attention edits."""
