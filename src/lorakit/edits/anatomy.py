"""What a transformer is made of: its stacks, blocks, attentions and feed-forward parts, found by their shapes and order.

There is no table of architectures. A block is an element of a numbered list that holds an attention; an attention has it in its
name; the last matrix of an attention, and the last outside of it, that give `hidden` numbers are what a sub-layer adds to
the stream. What is not found is left out, and an edit that needs it raises.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorakit.core.layout import Linear
from lorakit.core.sites import sites_of
from lorakit.core.walking import walk
from lorakit.edits.contract import Anatomy, Block
from lorakit.errors import LorakitError

_CROSS = re.compile(r"cross|encoder_attn|EncDec|encdec", re.IGNORECASE)
_KEYS = (("k_proj", "v_proj"), ("key", "value"), ("k", "v"), ("k_lin", "v_lin"), ("key_proj", "value_proj"))


def transformer_of(model: nn.Module) -> Any:
    """The transformers model in a model (itself, or what torch.compile's and other wrappers hold)."""
    for module in model.modules():
        if hasattr(module, "config") and hasattr(module, "get_input_embeddings"):
            return module
    raise LorakitError(
        f"attach: edits need a transformers model, and {type(model).__name__} is none; deltas (LoRA and "
        "similar methods) work on any "
        "torch model."
    )


def stacks_of(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that read embeddings: {"input": …}, of an encoder-decoder {"input": its encoder, "decoder": …}."""
    whole = transformer_of(model)
    if getattr(whole.config, "is_encoder_decoder", False):
        encoder, decoder = whole.get_encoder(), whole.get_decoder()
        if encoder is whole or decoder is whole:
            raise LorakitError(f"attach: the encoder and decoder of {type(whole).__name__} were not found.")
        return {"input": encoder, "decoder": decoder}
    return {"input": whole.base_model}


def anatomy_of(model: nn.Module) -> Anatomy:
    """The anatomy of a transformers model, adapters looked through; LorakitError where it is none or has no blocks."""
    whole = transformer_of(model)
    config = whole.config.get_text_config() if hasattr(whole.config, "get_text_config") else whole.config
    hidden = int(config.hidden_size)
    heads = int(config.num_attention_heads)
    stacks = stacks_of(model)
    modules = dict(walk(model))
    paths = {id(module): path for path, module in modules.items()}
    head_size = getattr(config, "head_dim", None) or getattr(config, "d_kv", None) or hidden // heads
    if getattr(whole.config, "is_encoder_decoder", False):
        kind = "encoder-decoder"
    else:
        kind = "causal" if _is_causal(whole, config) else "encoder"
    blocks = {name: _blocks(modules, paths[id(stack)], hidden) for name, stack in stacks.items()}
    if not blocks["input"]:
        raise LorakitError(f"attach: no blocks with an attention were found in {type(whole).__name__}.")
    return Anatomy(
        hidden=hidden,
        heads=heads,
        key_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        head_size=int(head_size),
        vocabulary=int(config.vocab_size),
        blocks=blocks["input"],
        decoder_blocks=blocks.get("decoder", ()),
        kind=kind,
        model_type=str(config.model_type),
        embed=functools.partial(_embed, whole.get_input_embeddings()),
    )


def _embed(embedding: nn.Module, ids: Sequence[int]) -> Tensor:
    weight = next(embedding.parameters())
    with torch.no_grad():
        return cast(Tensor, embedding(torch.tensor(list(ids), device=weight.device)))


def _is_causal(model: Any, config: Any) -> bool:
    """Whether tokens see only those before them, by the attentions' own `is_causal`."""
    said = [module.is_causal for module in model.modules() if isinstance(getattr(module, "is_causal", None), bool)]
    return any(said) if said else bool(getattr(config, "is_decoder", True))


def _blocks(modules: dict[str, nn.Module], stack: str, hidden: int) -> tuple[Block, ...]:
    inside = f"{stack}." if stack else ""
    found: list[Block] = []
    for path, module in modules.items():
        if not isinstance(module, nn.ModuleList) or not path.startswith(inside):
            continue
        if any(path.startswith(f"{block.path}.") for block in found):
            continue
        for name, _ in module.named_children():
            block = _block(modules, f"{path}.{name}", int(name), hidden)
            if block is not None:
                found.append(block)
    return tuple(found)


def _block(modules: dict[str, nn.Module], path: str, number: int, hidden: int) -> Block | None:
    matrices: dict[str, tuple[int, int]] = {}
    for name, module in modules.items():
        if name.startswith(f"{path}."):
            with contextlib.suppress(LorakitError):
                sites = sites_of(module)
                if len(sites) == 1 and isinstance(sites[0].layout, Linear):
                    matrices[name] = (sites[0].layout.shape.out, sites[0].layout.shape.in_)
    attentions: dict[str, list[str]] = {}
    others: list[str] = []
    for name in matrices:
        match = re.search(rf"^{re.escape(path)}((?:\.[^.]+)*?\.[^.]*att(?:n|ention)[^.]*)\.", name, re.IGNORECASE)
        if match:
            attentions.setdefault(match[1], []).append(name)
        else:
            others.append(name)
    if not attentions:
        return None
    last = [next((m for m in reversed(own) if matrices[m][0] == hidden), None) for own in attentions.values()]
    own_tokens = [names for key, names in attentions.items() if not _CROSS.search(key)]
    attention = None
    if own_tokens:
        keys = [name for name in own_tokens[0] if _is_key(name)] or own_tokens[0][:1]
        attention = keys[0].rpartition(".")[0]
    ends = [name for name in others if matrices[name][0] == hidden]
    starts = [name for name in others if matrices[name][1] == hidden]
    return Block(
        path=path,
        number=number,
        attention=attention,
        projections=tuple(name for name in last if name is not None),
        feed_forward=(starts[0], ends[-1]) if starts and ends else None,
    )


def _is_key(name: str) -> bool:
    return name.rpartition(".")[2] in {key for key, _ in _KEYS} | {"c_attn"}


def keys_and_values(attention: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """What an attention makes of hidden states `x` (tokens, hidden): keys and values (tokens, …) before any position.

    Raises LorakitError where its projections are not found.
    """
    parts = {name: part for name, part in attention._modules.items() if part is not None}
    for key, value in _KEYS:
        if key in parts and value in parts:
            return parts[key](x), parts[value](x)
    if "c_attn" in parts:  # GPT-2: queries, keys and values in one
        _, keys, values = parts["c_attn"](x).chunk(3, dim=-1)
        return keys, values
    raise LorakitError(
        f"attach: the keys and values of {type(attention).__name__} were not found among its parts; known are "
        f"{', '.join('/'.join(pair) for pair in _KEYS)} and c_attn."
    )
