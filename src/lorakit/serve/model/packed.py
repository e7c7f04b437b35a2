"""An adapter as the server holds it: one block of numbers, and per layer where in it `gain`, `bias`, `B` and `A` lie.

Any method that has a `Form` is served exactly; which methods these are, nothing here knows. A delta without one is refused,
or kept whole, or replaced by its best low-rank approximation at a stated error, as the operator chose.

Adapters are read on a skeleton: a copy of the model's modules that shares all of its tensors. So a load never touches the
model that is serving, and everything that `store.load` checks is checked.
"""

from __future__ import annotations

import copy
import hashlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor, nn

from lorakit.adapter.adapter import Adapter
from lorakit.adapter.attachment import detach
from lorakit.core.delta import Delta, Form
from lorakit.core.layout import Linear, Rows, Site, Transposed, sites_of
from lorakit.core.storage import storage_of
from lorakit.errors import LorakitError
from lorakit.files import store
from lorakit.files.bundle import CONTENT, TENSORS, Bundle, read_bundle
from lorakit.files.filling import finite
from lorakit.init.decomposition import triplets
from lorakit.serve.model.native import large_pages, padded
from lorakit.serve.request import Refused

Formless = Literal["refuse", "dense", "svd"]
"""What becomes of a delta without a form: nothing; ΔW itself, as large as the layer; a low-rank stand-in at a stated error."""

FRAMES = 4
"""Adapters kept on the skeleton, to be filled with the numbers of others that are built alike."""

CHOICES: tuple[Formless, ...] = ("refuse", "dense", "svd")


@dataclass(frozen=True)
class Piece:
    """What an adapter adds to one layer, `y += gain · y + bias + B A x`, with scales folded in.

    `gain` here is what multiplies y beside the 1 that is there already. B is stored rank first, (rank, out). A dense
    change has no A: its B is ΔWᵀ, (in, out).
    """

    A: Tensor | None
    B: Tensor | None
    gain: Tensor | None
    bias: Tensor | None

    def tensors(self) -> Iterator[tuple[int, Tensor]]:
        """`(column of Lowered.parts, tensor)` of those that there are."""
        for column, tensor in enumerate((self.A, self.B, self.gain, self.bias)):
            if tensor is not None:
                yield column, tensor


@dataclass(frozen=True)
class Lowered:
    """One adapter, ready to serve.

    Attributes:
        name: in the store.
        content: digest of its files.
        flat: all its numbers, one after the other, in the model's dtype.
        parts: (layers, 5) int64: addresses of A (rank, in), B (rank, out), gain, bias within `flat` (0 for none), and the rank.
        pieces: layer -> the same as tensors, views of `flat`.
        method: its method's name.
        how: "form", "dense" or "svd", the least exact over its layers.
        error: the largest relative Frobenius error over its layers.
        rank: the largest rank of a layer.
    """

    name: str
    content: str
    flat: Tensor
    parts: Tensor
    pieces: Mapping[int, Piece]
    method: str
    how: str
    error: float
    rank: int

    @property
    def bytes(self) -> int:
        """Memory that it takes."""
        return self.flat.numel() * self.flat.element_size() + self.parts.numel() * 8


def served_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers in which adapters can be served: path -> linear layer (or transformers' Conv1D), in the model's order."""
    return {
        path: module
        for path, module in model.named_modules()
        if len(sites := _sites(module)) == 1 and type(sites[0].layout) in (Linear, Transposed)
    }


def _sites(module: nn.Module) -> Sequence[Site]:
    try:
        return sites_of(module)
    except LorakitError:
        return ()


@dataclass
class _Built:
    """An adapter on the skeleton, and where the tensors of a file of its frame go in it, once that is known."""

    adapter: Adapter
    places: store.Places | None = None


class Lowering:
    """Reads adapter folders for one model. Calls from several threads wait for each other."""

    def __init__(self, model: nn.Module, formless: Formless = "refuse", rank: int = 32, error: float = 0.1) -> None:
        if formless not in CHOICES:
            raise LorakitError(f"serve: formless was given as {formless!r}; it is one of {', '.join(CHOICES)}.")
        self.formless, self.rank, self.error = formless, rank, error
        shared = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
        config = getattr(model, "config", None)
        if config is not None:
            shared[id(config)] = config
        self.skeleton = copy.deepcopy(model, shared)
        first = next(model.parameters())
        self.dtype = first.dtype if first.is_floating_point() else torch.bfloat16
        self.index = {path: number for number, path in enumerate(served_layers(model))}
        self.unfit: frozenset[str] = frozenset()
        self._lock = threading.Lock()
        self._built: dict[str, _Built] = {}
        self._number = 0

    def read(self, name: str, folder: Path) -> Lowered:
        """One adapter from its folder.

        Raises:
            Refused: it cannot be read, does not fit the model, or cannot be served; the reason says what would work.
        """
        with self._lock:
            for _ in range(3):
                before = signature(folder)
                try:
                    lowered = self._read(name, folder)
                except (LorakitError, OSError, KeyError, TypeError, ValueError, RuntimeError) as problem:
                    if signature(folder) != before:
                        continue
                    raise (
                        problem if isinstance(problem, Refused) else Refused(f"adapter {name!r}: {problem}")
                    ) from problem
                if signature(folder) == before:
                    return lowered
        raise Refused(
            f"adapter {name!r}: its files changed three times while they were read; load it again when it is whole."
        )

    @torch.no_grad()
    def _read(self, name: str, folder: Path) -> Lowered:
        bundle = read_bundle(folder, later=True)  # `read` looks whether the files have stayed the same
        frame = store.frame(bundle)
        built = self._built.get(frame)
        if built is None:
            if len(self._built) == FRAMES:
                detach(self.skeleton, self._built.pop(next(iter(self._built))).adapter.name)
            self._number += 1
            built = self._built[frame] = _Built(store.load(self.skeleton, folder, name=f"served_{self._number}"))
        else:
            built.places = store.refill(built.adapter, bundle, built.places)
        lowered = self._lower(name, built.adapter)
        if bundle.stale:
            raise LorakitError(bundle.stale)
        return replace(lowered, content=digest(bundle))

    def _lower(self, name: str, adapter: Adapter) -> Lowered:
        for path, replacement in adapter.replacements():
            raise Refused(
                f"adapter {name!r} replaces {path}.{next(iter(replacement.tensors()))} whole, which rows of one batch cannot "
                "share a forward with. Serve it from a base into which it is merged, or train it without modules_to_save."
            )
        pieces: dict[int, Piece] = {}
        exactness, error = "form", 0.0
        for path, layer in adapter.layers.items():
            if path not in self.index:
                raise Refused(
                    f"adapter {name!r} changes {path}, a {type(layer.base).__name__}; adapters are served in linear layers. "
                    "Merge it into a base of its own."
                )
            if path in self.unfit:
                raise Refused(
                    f"adapter {name!r} changes {path}, which does not see every token of a batch (an expert), so that "
                    "it cannot tell whose they are. Merge it into a base of its own."
                )
            parts = []
            for site_name, delta in layer.deltas_of(adapter.name).items():
                site = layer.sites[site_name]
                W = site.layout.matrix(storage_of(layer.base, site.weight, path).read(layer.base, site.weight))
                bias = None if site.bias is None else cast(Tensor, getattr(layer.base, site.bias))
                if bias is not None and isinstance(site.layout, Rows):
                    bias = site.layout.part(bias)
                form, how, lost = self._form(name, path, delta, W, bias)
                parts.append(_whole(form, site))
                exactness = max(exactness, how, key=("form", "dense", "svd").index)
                error = max(error, lost)
            pieces[self.index[path]] = _joined(parts)
        if not pieces:
            raise Refused(f"adapter {name!r} changes no layer's weight, so there is nothing to serve in a batch.")
        return self._pack(name, pieces, adapter.method.name, exactness, error)

    def _form(self, name: str, path: str, delta: Delta, W: Tensor, bias: Tensor | None) -> tuple[Form, str, float]:
        """A delta's form, how it came to be, and its relative error."""
        try:
            return delta.form(W, bias), "form", 0.0
        except LorakitError:
            if self.formless == "refuse":
                raise Refused(
                    f"adapter {name!r}: {delta.spec.name} has no form `gain · y + bias + B A x` that a batch can share. "
                    "Start the server with formless='dense' (exact, as large as the base) or formless='svd' (a low-rank "
                    "stand-in at a stated error), or save the adapter as_='lora'."
                ) from None
        change = delta.dense(W).detach()
        shift = delta.shift(bias)
        if self.formless == "dense":
            return Form(bias=shift, B=change), "dense", 0.0
        whole = change.float()
        U, S, V = triplets(whole, min(self.rank, *whole.shape), iterations=4)
        size = float(torch.linalg.vector_norm(whole))
        lost = max(size**2 - float(S.square().sum()), 0.0) ** 0.5 / size if size else 0.0
        if lost > self.error:
            raise Refused(
                f"adapter {name!r}: the rank-{self.rank} stand-in for {delta.spec.name} in {path} differs by "
                f"{lost:.1%} of the change's norm; {self.error:.1%} is allowed. Raise the rank, or choose formless='dense'."
            )
        return Form(bias=shift, B=U * S, A=V.T), "svd", lost

    def _pack(self, name: str, pieces: Mapping[int, Piece], method: str, how: str, error: float) -> Lowered:
        count = sum(padded(tensor.numel()) for piece in pieces.values() for _, tensor in piece.tensors())
        flat = torch.empty(count, dtype=self.dtype)
        large_pages(flat)
        parts = [[0] * 5 for _ in self.index]
        rank, start = 0, 0
        views: dict[int, Piece] = {}
        for layer, piece in pieces.items():
            own: list[Tensor | None] = [None] * 4
            for column, tensor in piece.tensors():
                size, room = tensor.numel(), padded(tensor.numel())
                view = flat[start : start + size].view(tensor.shape)
                view.copy_(tensor)
                if room > size:
                    flat[start + size : start + room] = 0
                own[column] = view
                parts[layer][column] = view.data_ptr()
                start += room
            if piece.B is not None:
                parts[layer][4] = piece.B.shape[0]
                rank = max(rank, piece.B.shape[0])
            views[layer] = Piece(*own)
        if not finite(flat):
            raise Refused(f"adapter {name!r} holds numbers that are not finite in {self.dtype}.")
        return Lowered(name, "", flat, torch.tensor(parts), views, method, how, error, rank)


def _whole(form: Form, site: Site) -> Piece:
    """A form of some rows of a layer as a piece of the whole layer, with B rank first."""
    A, B, bias = form.A, form.B, form.bias
    gain = None if form.gain is None else form.gain - 1
    if isinstance(site.layout, Rows):
        rows, out = site.layout.index(), site.layout.inner.shape.out
        B = None if B is None else B.new_zeros(out, B.shape[1]).index_copy(0, rows, B)
        gain = None if gain is None else gain.new_zeros(out).index_copy(0, rows, gain)
        bias = None if bias is None else bias.new_zeros(out).index_copy(0, rows, bias)
    return Piece(A, None if B is None else B.T, gain, bias)


def _joined(parts: Sequence[Piece]) -> Piece:
    """The pieces of one layer's parts, which change different rows, as one."""
    if len(parts) == 1:
        return parts[0]
    low = [(part.A, part.B) for part in parts if part.A is not None and part.B is not None]
    dense = [part.B for part in parts if part.A is None and part.B is not None]
    if low and dense:
        raise Refused("parts of one layer are partly low-rank and partly dense.")
    B = torch.cat([B for _, B in low]) if low else sum(dense[1:], dense[0]) if dense else None
    A = torch.cat([A for A, _ in low]) if low else None
    gains = [part.gain for part in parts if part.gain is not None]
    biases = [part.bias for part in parts if part.bias is not None]
    return Piece(A, B, sum(gains[1:], gains[0]) if gains else None, sum(biases[1:], biases[0]) if biases else None)


def signature(folder: Path) -> tuple[tuple[int, int, int], ...]:
    """What the file system says of an adapter's files: another signature, another content (the other way round not)."""
    found = []
    for name in CONTENT:
        try:
            status = (folder / name).stat()
            found.append((status.st_ino, status.st_mtime_ns, status.st_size))
        except OSError:
            found.append((0, 0, 0))
    return tuple(found)


def digest(bundle: Bundle) -> str:
    """A digest of the content of an adapter's files."""
    total = hashlib.sha256()
    # A lorakit.json that belongs to its tensors holds their digest, which reading has just compared.
    known = bool(bundle.own) and not bundle.stale
    for name in CONTENT:
        try:
            content = b"" if known and name == TENSORS else (bundle.folder / name).read_bytes()
        except OSError:
            content = b""
        total.update(len(content).to_bytes(8, "little"))
        total.update(content)
    return total.hexdigest()
