"""What to do around a call: the contract of every edit.

A delta changes a matrix and can be merged into it; an edit cannot. As a delta's method, an edit is two small classes in one
file: a frozen spec (`EditMethod`) that is the configuration, and a module (`Edit`) with the trained tensors, one for each
place. There are three kinds, by the call that they stand around:

    Prompt      prompt rows (a soft prompt) before a model's input; the output is cut back to the user's own tokens
    Change      something added to a layer's output, token by token: y + f(x, y)
    Attention   further keys and values in an attention: in the same softmax (a prefix), or in one apart, gated

An edit knows tensors, never models: `anatomy.py` says what a model is made of, `hooks.py` where its calls are, and `rows.py`
which rows get which edit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from lorakit.core.delta import Spec
from lorakit.core.walking import AdapterModules
from lorakit.errors import LorakitError


@dataclass(frozen=True)
class Block:
    """One block of a transformer, by the paths of its parts.

    Attributes:
        path: of the block.
        number: its place in its stack, from 0.
        attention: the module that looks at its own tokens, if it was found.
        projections: the last matrix of each attention (of the block's own tokens, then of an encoder's).
        feed_forward: the first and the last matrix of the feed-forward part, if it was found.
    """

    path: str
    number: int
    attention: str | None
    projections: tuple[str, ...]
    feed_forward: tuple[str, str] | None


@dataclass(frozen=True)
class Anatomy:
    """What a transformer is made of, as plain data.

    Attributes:
        hidden: numbers per token between blocks.
        heads, key_heads, head_size: of attention; `key_heads` is smaller where heads share keys.
        vocabulary: tokens that it knows.
        blocks: of the stack that reads the input: a decoder's, an encoder's, of an encoder-decoder its encoder's.
        decoder_blocks: of an encoder-decoder its decoder's; else empty.
        key_blocks: the blocks whose attention takes a prefix: those of the decoder where there is one.
        kind: "causal", "encoder" or "encoder-decoder".
        model_type: transformers' name of the architecture.
        embed: token ids (tokens,) -> their embeddings (tokens, hidden), as the model itself makes them.
    """

    hidden: int
    heads: int
    key_heads: int
    head_size: int
    vocabulary: int
    blocks: tuple[Block, ...]
    decoder_blocks: tuple[Block, ...] = ()
    kind: str = "causal"
    model_type: str = ""
    embed: Callable[[Sequence[int]], Tensor] | None = None

    @property
    def key_blocks(self) -> tuple[Block, ...]:
        return self.decoder_blocks or self.blocks


@dataclass(frozen=True)
class Place:
    """Where one edit stands.

    Attributes:
        path: of the layer whose output it changes, or of the attention it stands beside; empty for the model's input.
        source: of the layer whose input a `Change` sees as x, where that is another one.
    """

    path: str
    source: str = ""


INPUT = Place("")
"""Before the model's input."""


class EditMethod(Spec):
    """The spec of an edit."""

    blends: ClassVar[bool] = True
    """Whether several may act on one row with any weights. Prompts and prefixes may not."""
    family: ClassVar[str] = ""
    """Where `blends` is False: a row has one of a family at most."""
    reason: ClassVar[str] = "it acts around calls and is no change of a weight"
    """Why it cannot be merged."""
    needs_padding: ClassVar[str | None] = None
    """Why it cannot act in a padding-free batch of training, or None where it acts there exactly."""

    @abstractmethod
    def places(self, anatomy: Anatomy, layers: Sequence[int] | None) -> list[Place]:
        """Where its edits stand in a model of this anatomy; `layers` are numbers of blocks, None for the spec's own choice.

        Raises LorakitError where the model has no such places.
        """

    @abstractmethod
    def build(self, place: Place, anatomy: Anatomy, folded: bool = False) -> Edit:
        """A new edit for one place, with the initial values of the paper; `folded`: to be filled from a file."""

    def build_all(self, places: Sequence[Place], anatomy: Anatomy, folded: bool = False) -> dict[Place, Edit]:
        """The edits of all places; by default each for itself."""
        return {place: self.build(place, anatomy, folded) for place in places}

    def with_tokenizer(self, tokenizer: Any) -> Self:
        """The spec with what only a tokenizer can tell; called before training by the command."""
        return self


class Edit(nn.Module, ABC):
    """What one adapter does around one call. Trained tensors are attributes with the paper's letters."""

    def __init__(self, spec: EditMethod, place: Place) -> None:
        super().__init__()
        self.spec = spec
        self.place = place

    def kept(self) -> dict[str, Tensor]:
        """What is left of it once it is trained, by letter; by default all its tensors."""
        return {name: tensor.detach() for name, tensor in self.state_dict().items()}


class Edits(AdapterModules):
    """Adapter -> its edits: the one module of a model in which the tensors of all edits live."""


class Prompt(Edit):
    """Prompt rows before the input."""

    @abstractmethod
    def rows(self) -> Tensor:
        """(tokens, hidden)"""


class Change(Edit):
    """Something added to what a layer gives."""

    chosen: ClassVar[bool] = False
    """Whether it acts at chosen positions alone; `select` then says where, and `change` sees these tokens only."""

    @abstractmethod
    def change(self, x: Tensor, y: Tensor) -> Tensor:
        """What to add to the output `y` (..., hidden) for the input `x` (..., in), in their dtype."""

    def select(self, prompt: Tensor) -> Tensor:
        """Which tokens are changed, (rows, tokens) of bool, where `prompt` (rows, tokens) marks the prompt's own tokens."""
        return prompt


class Attention(Edit):
    """Keys and values beside a layer's own."""

    joint: ClassVar[bool] = True
    """Whether they stand in the same softmax as the layer's own keys (to the left of them), or in one of their own."""

    @abstractmethod
    def keys_values(self, project: Callable[[Tensor], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """(keys, values), each (key heads, tokens, head size), without a position. `project` is the layer's own way from
        hidden states (tokens, hidden) to keys and values of this shape. Computed at each call, never kept."""

    def gate(self) -> Tensor | None:
        """(heads,) or (1,): the factor of what a softmax of its own gives; None where the softmax is joint."""
        return None


def in_blocks(blocks: Sequence[Block], layers: Sequence[int] | None, name: str) -> list[Block]:
    """The blocks of these numbers (of each stack), all where none are given; LorakitError for a number that is not there."""
    if layers is None:
        return list(blocks)
    present = {block.number for block in blocks}
    missing = [number for number in layers if number not in present]
    if missing:
        raise LorakitError(
            f"attach: layers names block {missing[0]}, but {name} can act in blocks {min(present)} to {max(present)}."
        )
    return [block for block in blocks if block.number in layers]


def attention_places(blocks: Sequence[Block], name: str) -> list[Place]:
    """The attention of each of these blocks; LorakitError where one was not found."""
    for block in blocks:
        if block.attention is None:
            raise LorakitError(f"attach: {name} acts in the attention of {block.path}, which was not found.")
    return [Place(str(block.attention)) for block in blocks]
