"""Blocks of the usual form as one function.

A block of a small model is thirty calls of modules and views, which take as long as a fifth of its numbers. The form is
`h = x + o(attention(norm(x)))`, `h + down(act(gate(n)) * up(n))` with `n = norm(h)`, of parts that are replaced already:
linear layers (`linear_layers.py`), a norm and a gate of `fused.py`. The logits of the trial must stay the same to the bit, or
the blocks stay as they are (`serving_model.py`).

Blocks whose products are all our own loops go through one C++ call together (`stack.cpp`): the first that the model calls
computes all that follow, which hand on what they are given.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.native import INTEGER, POINTER, elementwise
from lorakit.serve.model import native
from lorakit.serve.model.attention import ForwardContext
from lorakit.serve.model.batch import Batch
from lorakit.serve.model.cache import Cache
from lorakit.serve.model.fused import Gate, Norm
from lorakit.serve.model.linear_layers import Group, LinearForward, Panels

PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}


class Block:
    """The forward of one block."""

    def __init__(
        self, module: nn.Module, context: ForwardContext, norms: tuple[Norm, Norm], kind: str, groups: tuple[Group, ...]
    ) -> None:
        self.original: Callable[..., Any] = module.forward
        self.context, self.norms = context, norms
        self.qkv, self.o, self.gated, self.down = groups
        self.kind = kind
        self.layer: int = module.self_attn.layer_idx  # type: ignore[union-attr, assignment]
        shape = context.seen[self.layer]
        self.key_heads, self.d, self.dv = shape.heads, shape.key, shape.value
        self.heads = self.qkv.outs[0] // self.d
        attend = native.find("attend", torch.bfloat16)
        assert attend is not None
        self.attend = attend
        self.stack: Stack | None = None

    def __call__(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        batch, cache, asked = self.context.batch, self.context.cache, self.context.asked.get(self.layer)
        if (
            batch is None
            or cache is None
            or asked is None
            or past_key_values is not None
            or position_embeddings is None
            or batch.edits is not None
        ):
            return self.original(
                hidden_states,
                attention_mask=attention_mask,
                position_embeddings=position_embeddings,
                past_key_values=past_key_values,
                **kwargs,
            )
        if (stack := self.stack) is not None:
            if stack.result is hidden_states:  # a block before this one has computed it too
                return hidden_states
            if self is stack.blocks[0]:
                return stack.compute(hidden_states, position_embeddings, batch, cache)
        x = hidden_states[0]
        tokens, heads, key_heads, d, dv = x.shape[0], self.heads, self.key_heads, self.d, self.dv
        cosine, sine = position_embeddings[0][0], position_embeddings[1][0]
        block = self.qkv.compute(self._norm(0, x), batch)
        q, k, v = block.split([tokens * heads * d, tokens * key_heads * d, tokens * key_heads * dv])
        q = elementwise.turn(q.view(1, tokens, heads, d).transpose(1, 2), cosine, sine)
        k = elementwise.turn(k.view(1, tokens, key_heads, d).transpose(1, 2), cosine, sine)
        mixed = x.new_empty(tokens, heads * dv)
        # fmt: off
        self.attend(
            q.data_ptr(), d, heads * d, k.data_ptr(), d, key_heads * d, v.data_ptr(), dv, key_heads * dv, mixed.data_ptr(),
            cache.keys[self.layer].data_ptr(), cache.values[self.layer].data_ptr(), *batch.addresses,
            heads, key_heads, d, dv, asked.scale, asked.softcap, asked.window, asked.address,
        )
        # fmt: on
        h = x + self.o.compute(mixed, batch).view(tokens, -1)
        gate, up = self.gated.compute(self._norm(1, h), batch).view(2, tokens, -1)
        return (h + self.down.compute(elementwise.gate(self.kind, gate, up), batch).view(tokens, -1))[None]

    def _norm(self, number: int, x: Tensor) -> Tensor:
        norm = self.norms[number]
        return elementwise.norm(x, norm.weight, norm.eps, norm.shift)


_FUNCTIONS = (
    (elementwise.LIBRARY, "norm"), (elementwise.LIBRARY, "turn"), (native.LOOPS, "attend"), (native.LINEAR, "linear"),
    (elementwise.LIBRARY, "gate"),
)  # fmt: skip


class _Block(ctypes.Structure):
    _fields_ = [
        *((name, POINTER) for name in ["norm", "second_norm", "qkv", "o", "gated", "down", "keys", "values", "sinks"]),
        *((name, INTEGER) for name in ["heads", "key_heads", "d", "dv", "inner", "tanh", "window"]),
        *((name, ctypes.c_double) for name in ["eps", "shift", "second_eps", "second_shift", "scale", "softcap"]),
    ]


class Stack:
    """Blocks one after the other, as one call.

    Attributes:
        result: the output of the last one in the present step, by which the blocks after the first know that it is theirs.
    """

    def __init__(self, blocks: Sequence[Block], context: ForwardContext) -> None:
        self.blocks, self.context = blocks, context
        self.result: Tensor | None = None
        self.cache: Cache | None = None
        functions = [library.find(name, torch.bfloat16) for library, name in _FUNCTIONS]
        self.functions = (POINTER * len(functions))(*(ctypes.cast(one, POINTER).value for one in functions))  # type: ignore[arg-type]
        self.few, self.many = (library.find("stack", torch.bfloat16) for library in (native.STACK, native.LONG_STACK))

    def compute(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], batch: Batch, cache: Cache
    ) -> Tensor:
        """The output of the last block for the input (1, tokens, hidden) of the first."""
        if self.cache is not cache:
            self.rows = (_Block * len(self.blocks))(*(self._row(block, cache) for block in self.blocks))
            self.cache = cache
        x = hidden_states if hidden_states.is_contiguous() else hidden_states.contiguous()
        y = torch.empty_like(x)
        cosine, sine = (angles.contiguous() for angles in position_embeddings)
        function = self.few if x.shape[1] <= FEW else self.many
        assert function is not None
        function(
            ctypes.addressof(self.functions), ctypes.addressof(self.rows), len(self.blocks), x.data_ptr(), y.data_ptr(),
            x.shape[2], cosine.data_ptr(), sine.data_ptr(), *batch.structures,
        )  # fmt: skip
        self.result = y
        return y

    def _row(self, block: Block, cache: Cache) -> _Block:
        asked, (first, second) = self.context.asked[block.layer], block.norms
        layers = (group.product.address for group in (block.qkv, block.o, block.gated, block.down))  # type: ignore[attr-defined]
        return _Block(
            first.weight.data_ptr(), second.weight.data_ptr(), *layers,
            cache.keys[block.layer].data_ptr(), cache.values[block.layer].data_ptr(), asked.address,
            block.heads, block.key_heads, block.d, block.dv, block.gated.outs[0], block.kind == "gelu_tanh", asked.window,
            first.eps, first.shift, second.eps, second.shift, asked.scale, asked.softcap,
        )  # fmt: skip


FEW = 64
"""Tokens of a step up to which the interpreter's lock is kept while a stack is computed."""


def stack(model: nn.Module, context: ForwardContext) -> Callable[[], None] | None:
    """Let the blocks of a model be computed together where all their products are our own loops; returns what lets each be
    computed alone again, or None where nothing was changed."""
    found = [vars(module).get("forward") for module in model.modules()]
    blocks = [block for block in found if isinstance(block, Block)]
    ours = all(isinstance(group.product, Panels) for one in blocks for group in (one.qkv, one.o, one.gated, one.down))
    in_order = [block.layer for block in blocks] == sorted(context.asked)
    if not blocks or not ours or not in_order or native.STACK.obstacle is not None:
        return None
    made = Stack(blocks, context)
    for block in blocks:
        block.stack = made

    def restore() -> None:
        for block in blocks:
            block.stack = None

    return restore


def fuse(model: nn.Module, context: ForwardContext) -> Callable[[], None] | None:
    """Turn every block of the form to its `Block`; returns what takes them out again, or None where there is none."""
    changed = []
    for module in model.modules():
        block = None if "forward" in vars(module) else _block(module, context)
        if block is not None:
            module.forward = block
            changed.append(module)

    def restore() -> None:
        for module in changed:
            module.__dict__.pop("forward", None)

    return restore if changed else None


def _block(module: nn.Module, context: ForwardContext) -> Block | None:
    """A block for a module that is of the form, by its parts' names and their forwards."""
    if {name for name, _ in module.named_children()} != PARTS:
        return None
    attention: Any = module.self_attn
    mlp: Any = module.mlp
    if {name for name, _ in attention.named_children()} != {"q_proj", "k_proj", "v_proj", "o_proj"}:
        return None
    norms = [vars(part).get("forward") for part in (module.input_layernorm, module.post_attention_layernorm)]
    gate = vars(mlp).get("forward")
    if not isinstance(gate, Gate) or getattr(attention, "layer_idx", None) not in context.asked:
        return None
    groups = [
        _group([getattr(owner, f"{name}_proj") for name in names.split()])
        for owner, names in ((attention, "q k v"), (attention, "o"), (mlp, "gate up"), (mlp, "down"))
    ]
    first, second = norms
    if not isinstance(first, Norm) or not isinstance(second, Norm) or None in groups:
        return None
    return Block(module, context, (first, second), gate.kind, tuple(group for group in groups if group is not None))


def _group(layers: list[nn.Module]) -> Group | None:
    """The group that is these layers, in this order."""
    forwards = [vars(layer).get("forward") for layer in layers]
    linear = [forward for forward in forwards if isinstance(forward, LinearForward)]
    if len(linear) < len(layers) or (group := linear[0].group) is None:
        return None
    return group if group.numbers == [forward.number for forward in linear] else None
