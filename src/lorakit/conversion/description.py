"""One neutral description of an adapter's tensors, which every format is read into and written from.

A layer has a method's spec with its own rank and alpha, a layout, and matrices under the paper's letters. Formats differ in
three things only: how they call a layer, how they call and turn a matrix, and where they keep the scale. So a format is a
pair of functions to and from this, and what is computed (folding, checks) is computed here once.

Words for a layer's tensors are PEFT's, which are lorakit's own file's: `lora_A.weight`, `hada_w1_a`, `lokr_w2`, `full_P`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from lorakit.core.delta import Delta, Method, Pool, Shape
from lorakit.core.layout import Convolution, Embedding, Layout, Linear
from lorakit.errors import LorakitError, plural
from lorakit.files.packing import names_of, pack, unpack
from lorakit.methods import DoRA, Full, LoHa, LoKr, LoRA

MAGNITUDE = "lora_magnitude_vector"
EVERY = ("lora", "dora", "loha", "lokr", "full", "dora over loha", "dora over lokr", "dora over full")
"""Methods that other tools have a file for, by `method_name`."""
_FAMILIES = {"lora_": "lora", "hada_": "loha", "lokr_": "lokr", "full_": "full"}


@dataclass(frozen=True)
class Layer:
    """What an adapter adds to one matrix.

    Attributes:
        method: the spec, with this layer's own rank and alpha.
        layout: how the layer's weight is that matrix; from the base where it is known, else as the tensors' shapes tell.
        tensors: matrices and vectors by the paper's letters: A (rank, in), B (out, rank), m (out,), …
    """

    method: Method
    layout: Layout
    tensors: dict[str, Tensor]

    def delta(self) -> Delta:
        """The delta with these tensors; no base weight is in it."""
        delta = _blank(self.method, self.layout.shape)
        for letter, tensor in self.tensors.items():
            setattr(_owner(delta, letter), letter, nn.Parameter(tensor, requires_grad=False))
        return delta

    def words(self) -> dict[str, Tensor]:
        """The tensors under PEFT's words and in PEFT's shapes."""
        return {
            word: pack(self.layout, self.tensors[letter], axes).contiguous()
            for letter, (word, axes) in _letters(self.method, self.layout).items()
        }

    @property
    def inner(self) -> Method:
        """The spec of what is added, below DoRA's magnitudes."""
        return inner_of(self.method)

    @property
    def rank(self) -> int:
        """Of its factors; 0 for a whole matrix."""
        return int(getattr(self.inner, "rank", 0))

    @property
    def alpha(self) -> float:
        """What the scale is by the plain rule alpha / rank, whatever the spec's own rule."""
        return self.scale * self.rank

    @property
    def scale(self) -> float:
        """The factor of the low-rank product."""
        spec: Any = self.inner
        if isinstance(spec, LoRA):
            return spec.scale
        return float(spec.alpha / spec.rank) if isinstance(spec, LoHa | LoKr) else 1.0

    def over(self, inner: Method, **tensors: Tensor) -> Layer:
        """The same with another spec below DoRA's magnitudes, and these tensors in the place of its own."""
        method = self.method.replace(inner=inner) if isinstance(self.method, DoRA) else inner
        return replace(self, method=method, tensors={**self.tensors, **tensors})

    def scaled(self, scale: float) -> Layer:
        """The same change with another scale in the spec, B multiplied so that nothing else changes.

        Exact where the quotient of the scales is a power of two, else to the rounding of B (in float32 or wider).
        """
        quotient = self.scale / scale
        inner = cast(Any, self.inner).replace(alpha=scale * self.rank, rslora=False)
        if quotient == 1.0:
            return self.over(inner)
        B = self.tensors["B"]
        if math.frexp(quotient)[0] != 0.5 and B.dtype in (torch.float16, torch.bfloat16):
            B = B.float()
        return self.over(inner, B=B * quotient)

    def as_lora(self) -> Layer | None:
        """The same change as a plain LoRA, exactly, or None where it is none of a smaller rank than the matrix."""
        if self.method.name in ("dora", "full"):
            return None
        if self.method.name == "lora":
            return self
        with torch.no_grad():
            form = self.delta().form(torch.empty(0), None)
        assert form.B is not None
        assert form.A is not None
        rank = form.A.shape[0]
        if rank >= min(self.layout.shape.out, self.layout.shape.in_):
            return None
        return Layer(LoRA(rank=rank, alpha=float(rank)), self.layout, {"A": form.A, "B": form.B})


@dataclass(frozen=True)
class Description:
    """An adapter as no format has it.

    Attributes:
        components: component of a pipeline ("unet", "text_encoder", …; "" for a model by itself) -> path -> layer.
        base: the base model's name, where the source knows it.
        notes: what was done to the numbers on the way, in sentences.
    """

    components: dict[str, dict[str, Layer]]
    base: str | None = None
    notes: tuple[str, ...] = field(default=())

    def layers(self) -> Iterator[tuple[str, str, Layer]]:
        """`(component, path, layer)` of every layer."""
        for component, layers in self.components.items():
            for path, layer in layers.items():
                yield component, path, layer

    def noting(self, *notes: str) -> Description:
        """The same with more notes."""
        return replace(self, notes=(*self.notes, *notes))

    def mapped(self, change: Callable[[str, str, Layer], Layer]) -> Description:
        """The same with every layer put through `change`."""
        return replace(
            self,
            components={
                component: {path: change(component, path, layer) for path, layer in layers.items()}
                for component, layers in self.components.items()
            },
        )


def inner_of(method: Method) -> Method:
    """The spec of what is added, below DoRA's magnitudes."""
    return method.inner if isinstance(method, DoRA) else method


def _owner(delta: Delta, letter: str) -> nn.Module:
    """The module that has one of a delta's tensors: DoRA has the magnitudes itself."""
    return delta.get_submodule("inner") if isinstance(delta.spec, DoRA) and letter != "m" else delta


def as_embedding(words: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A linear layer's words as those of an embedding."""
    return {word.replace("lora_", "lora_embedding_").removesuffix(".weight"): value for word, value in words.items()}


def _blank(method: Method, shape: Shape) -> Delta:
    """A delta of this spec without memory: for the names and sizes of its tensors."""
    with torch.device("meta"):
        return method.build(shape, Pool([shape]))


def _letters(method: Method, layout: Layout) -> dict[str, tuple[str, str]]:
    """The paper's letter -> (PEFT's word, axes) for a layer."""
    letters = names_of(_blank(inner_of(method), layout.shape), layout.kind)
    return {**letters, "m": (MAGNITUDE, "features")} if isinstance(method, DoRA) else letters


def with_one_factor(layers: Mapping[str, Layer]) -> dict[str, Layer] | None:
    """LoKr layers under one factor and one decompose_both, or None where no such pair gives all their sizes.

    A file keeps sizes and no factor, and several factors may give a layer's; PEFT's configuration has one for all layers.
    """
    for factor in dict.fromkeys(cast(LoKr, layer.inner).factor for layer in layers.values()):
        for both in (False, True):
            changed = {path: _refactored(layer, factor, both) for path, layer in layers.items()}
            if all(changed.values()):
                return cast(dict[str, Layer], changed)
    return None


def _refactored(layer: Layer, factor: int, both: bool) -> Layer | None:
    """The layer under another factor, None where its tensors would have other sizes."""
    inner = cast(LoKr, layer.inner).replace(factor=factor, decompose_both=both)
    blank = _blank(inner, layer.layout.shape)
    sizes = {name: tuple(parameter.shape) for name, parameter in blank.named_parameters()}
    if sizes != {name: tuple(tensor.shape) for name, tensor in layer.tensors.items() if name != "m"}:
        return None
    return layer.over(inner)


# -- from a file's words to a layer ----------------------------------------------------------------------------------------


def assemble(method: Method, words: Mapping[str, Tensor], where: str, layout: Layout | None = None) -> Layer:
    """The layer of these words (PEFT's names and shapes).

    Raises:
        LorakitError: a word is missing or unknown, a shape does not fit the spec or its partner, a number is not finite.
    """
    if layout is None:
        layout = layout_of(method, words, where)
    letters = _letters(method, layout)
    expected = {word for word, _ in letters.values()}
    for word in sorted(expected):
        need(words, word, where)
    for word in sorted(set(words) - expected):
        raise LorakitError(
            f"convert: {where} has {word!r} ({tuple(words[word].shape)}), which {method.name} with these sizes does not "
            f"have; it has {', '.join(sorted(expected))}."
        )
    blank = _blank(method, layout.shape)
    tensors: dict[str, Tensor] = {}
    for letter, (word, axes) in letters.items():
        value = unpack(layout, words[word], axes)
        size = tuple(getattr(_owner(blank, letter), letter).shape)
        if tuple(value.shape) != size:
            rank = f"of rank {method.rank} " if hasattr(method, "rank") else ""
            raise LorakitError(
                f"convert: {where}.{word} is {tuple(value.shape)}, where {size} would fit: {method.name} {rank}on a matrix of "
                f"{layout.shape.out} × {layout.shape.in_}."
            )
        if not torch.isfinite(value).all():
            raise LorakitError(f"convert: {where}.{word} holds a NaN or an infinity; nothing was written.")
        tensors[letter] = value
    return Layer(method, layout, tensors)


def recognise(words: Mapping[str, Tensor], alpha: float | None, where: str, whole_is_one: bool = False) -> Method:
    """The spec that a layer's tensors tell, with the alpha that the file has for it.

    Args:
        words: PEFT's words for this layer's tensors.
        alpha: the scale's numerator; None: as large as the rank, which is a scale of 1.
        where: the layer, for messages.
        whole_is_one: LyCORIS's rule: a LoKr whose two matrices are both whole has scale 1, whatever its alpha.

    Raises:
        LorakitError: they are of no method, or of several.
    """
    plain = {word for word in words if word != MAGNITUDE}
    families = {family for start, family in _FAMILIES.items() if any(word.startswith(start) for word in plain)}
    if len(families) != 1:
        raise LorakitError(
            f"convert: {where} holds {', '.join(sorted(words))}, which is of {'no one' if not families else 'more than one'} "
            "method that lorakit knows."
        )
    family = families.pop()
    method: Method = Full()
    if family == "lokr":
        method = _kronecker(words, alpha, where, whole_is_one)
    elif family != "full":
        rank = need(words, _pair(family, words)[1], where).shape[0]
        method = {"lora": LoRA, "loha": LoHa}[family](rank=rank, alpha=float(rank if alpha is None else alpha))
    return DoRA(inner=method) if MAGNITUDE in words else method


def _pair(family: str, words: Iterable[str]) -> tuple[str, str]:
    """The words for a method's B (out, rank) and A (rank, in); for a whole matrix twice the same."""
    if family == "lora" and any(word.startswith("lora_embedding") for word in words):
        return "lora_embedding_B", "lora_embedding_A"
    pairs = {"lora": ("lora_B.weight", "lora_A.weight"), "loha": ("hada_w1_a", "hada_w1_b")}
    return pairs.get(family, ("full_P", "full_P"))


def need(words: Mapping[str, Tensor], word: str, where: str) -> Tensor:
    """The tensor of a word that must be there."""
    if word not in words:
        raise LorakitError(f"convert: {where} has {', '.join(sorted(words))} and lacks {word}.")
    return words[word]


def _kronecker(words: Mapping[str, Tensor], alpha: float | None, where: str, whole_is_one: bool) -> LoKr:
    """The LoKr whose sizes are those of the tensors; its factor is found, since files do not keep it."""
    C, D = (o1, i1), (o2, i2) = _sides(words, where)
    low = [words[name].shape[1] for name in ("lokr_w2_a", "lokr_w1_a") if name in words]
    rank = low[0] if low else max(o2, i2) + 1
    if alpha is None or (not low and whole_is_one):
        alpha = float(rank)
    elif not low:
        raise LorakitError(
            f"convert: {where} is a LoKr with both matrices whole, and nothing says the rank by which its alpha {alpha} is "
            "divided."
        )
    for factor in dict.fromkeys((-1, o1, i1, max(o1, i1), min(o1, i1), o2, i2)):
        spec = LoKr(rank=rank, alpha=float(alpha), factor=factor, decompose_both="lokr_w1_a" in words)
        if _taps(spec, words, C, D) is not None:
            return spec
    raise LorakitError(
        f"convert: {where} is a LoKr of ({o1} × {i1}) ⊗ ({o2} × {i2}) with {', '.join(sorted(words))}: no factor of lorakit's "
        "LoKr gives these sizes. If it is a convolution, name its base model, so that the kernel is known."
    )


def _sides(words: Mapping[str, Tensor], where: str) -> tuple[tuple[int, int], tuple[int, int]]:
    """The sizes of C and D; for a convolution D's columns are channels times taps."""

    def size(name: str) -> tuple[int, int]:
        if name in words:
            return words[name].shape[0], words[name][0].numel()
        return need(words, f"{name}_a", where).shape[0], need(words, f"{name}_b", where).shape[1]

    return size("lokr_w1"), size("lokr_w2")


def _taps(spec: LoKr, words: Mapping[str, Tensor], C: tuple[int, int], D: tuple[int, int]) -> int | None:
    """The size of the kernel for which this spec gives these tensors, None where it never does. Only a whole D says the
    size; else those that occur are tried."""
    whole = "lokr_w2" in words
    for taps in (math.prod(words["lokr_w2"].shape[2:]),) if whole else (1, 9, 25, 49, 3, 5, 7, 4, 16, 27):
        shape = Shape(C[0] * D[0], C[1] * D[1], taps=taps)
        if shape.in_ % taps:
            continue
        delta = _blank(spec, shape)
        keys = names_of(delta, "linear")
        if {word for word, _ in keys.values()} == set(words) - {MAGNITUDE} and all(
            getattr(delta, letter).numel() == words[word].numel()
            and getattr(delta, letter).shape[0] == words[word].shape[0]
            for letter, (word, _) in keys.items()
        ):
            return taps
    return None


def layout_of(method: Method, words: Mapping[str, Tensor], where: str) -> Layout:
    """The layout that the tensors themselves tell; a grouped convolution looks like a smaller one, which changes nothing."""
    inner = inner_of(method)
    if isinstance(inner, LoKr):
        return _kronecker_layout(inner, words, where)
    family = "lora" if isinstance(inner, LoRA) else inner.name
    names = _pair(family, words)
    B, A = (need(words, name, where) for name in names)
    if names[0].startswith("lora_embedding") and B.ndim == A.ndim == 2:
        return Embedding(Shape(B.shape[0], A.shape[1], lookup=True, bias=False))
    if names[0] == "lora_B.weight" and A.ndim > 2 and B.ndim == A.ndim:
        return convolution(B.shape[0], tuple(A.shape[1:]))
    if B.ndim != 2 or A.ndim != 2:
        raise LorakitError(
            f"convert: {where} has factors of {tuple(B.shape)} and {tuple(A.shape)}, which are no matrices of one product."
        )
    m = words.get(MAGNITUDE)
    if m is not None and m.ndim > 1:  # a convolution's, whose kernel is none of the matrices' concern
        return convolution(B.shape[0], (A.shape[1], *[1] * (m.ndim - 2)))
    return Linear(Shape(B.shape[0], A.shape[1]))


def _kronecker_layout(spec: LoKr, words: Mapping[str, Tensor], where: str) -> Layout:
    C, D = _sides(words, where)
    taps, out, columns = _taps(spec, words, C, D), C[0] * D[0], C[1] * D[1]
    if taps is None:
        raise LorakitError(
            f"convert: {where} is a LoKr of ({C[0]} × {C[1]}) ⊗ ({D[0]} × {D[1]}), and its configuration (rank {spec.rank}, "
            f"factor {spec.factor}) gives other sizes."
        )
    kernel = tuple(words["lokr_w2"].shape[2:]) if "lokr_w2" in words else (taps,)
    if MAGNITUDE in words:
        kernel += (1,) * (words[MAGNITUDE].ndim - 2 - len(kernel))
    return Linear(Shape(out, columns)) if kernel in ((), (1,)) else convolution(out, (columns // taps, *kernel))


def convolution(out: int, window: tuple[int, ...]) -> Convolution:
    """The layout of a convolution with `out` channels and a window (in, *kernel)."""
    taps = math.prod(window[1:])
    return Convolution(Shape(out, math.prod(window), taps=taps), window, 1)


# -- what a target cannot hold -------------------------------------------------------------------------------------------------


def fitted(description: Description, holds: tuple[str, ...], target: str) -> Description:
    """The description in methods that a target has, folded exactly where that can be.

    Raises:
        LorakitError: a layer's method has neither a place there nor an exact form as LoRA.
    """
    folded: Counter[str] = Counter()

    def change(component: str, path: str, layer: Layer) -> Layer:
        name = method_name(layer.method)
        if name in holds:
            return layer
        plain = layer.as_lora() if "lora" in holds else None
        if plain is not None:
            folded[f"{name} of rank {layer.rank} as lora of rank {plain.rank}"] += 1
            return plain
        raise LorakitError(
            f"convert: {target} has no place for {name} ({component}{component and '.'}{path}); it holds {', '.join(holds)}. "
            f"`lorakit resize {'--energy 1.0' if name.startswith('dora') else '--rank R'}` (with the base model) makes a LoRA "
            "of it, and says how much is lost."
        )

    changed = description.mapped(change)
    return changed.noting(*(f"{plural(count, 'layer')}: {what}, which is exact" for what, count in folded.items()))


def method_name(method: Method) -> str:
    """The method's name; a DoRA over something else than LoRA says over what."""
    if isinstance(method, DoRA) and not isinstance(method.inner, LoRA):
        return f"dora over {method.inner.name}"
    return method.name


def one_number(description: Description, target: str, word: Literal["alpha", "scale"]) -> tuple[Description, float]:
    """The same with one alpha (a layer's scale is alpha / its own rank) or one scale for all layers, as a target needs it that
    has one number."""
    numbers = Counter(getattr(layer, word) for _, _, layer in description.layers())
    number, count = numbers.most_common(1)[0]
    changed = description.mapped(lambda c, p, layer: layer.scaled(number / layer.rank if word == "alpha" else number))
    if len(numbers) == 1:
        return changed, number
    others = plural(numbers.total() - count, "layer")
    note = f"{target} has one {word}: {number:g}; in {others} of another scale B is multiplied by it"
    return changed.noting(note), number
