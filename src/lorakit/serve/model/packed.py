"""A packed adapter: all of its tensors in one buffer, and per layer the addresses of `A`, `B`, `gain` and `bias` within it.

Any method that has a `Form` is served exactly, whatever the method. A delta without one is refused, or kept as the whole ΔW,
or replaced by its best low-rank approximation at a stated error, as the operator chose.

Adapters are read on a skeleton: a copy of the model's modules that shares all of its tensors. So reading one never touches
the serving model, and everything that `files.store.load` checks is checked.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn

from lorakit.adapter.adapter import Adapter, adapters
from lorakit.adapter.attachment import detach
from lorakit.core.delta import Delta, Form
from lorakit.core.layer import Adapted
from lorakit.core.layout import Expert, Linear, Rows, Site, Transposed
from lorakit.core.sites import adaptable_sites
from lorakit.core.spectrum import triplets
from lorakit.core.stacks import stacked_sites
from lorakit.core.storage import storage_of
from lorakit.core.storage.contract import finite
from lorakit.core.uniform import is_product
from lorakit.errors import LorakitError, unknown
from lorakit.files import store
from lorakit.files.bundle import CONTENT, TENSORS, Bundle, read_bundle, read_config, read_own
from lorakit.files.vocabulary import tokens_trained
from lorakit.serve.limits import check_files, without_path
from lorakit.serve.model.alone import Alone, sharing
from lorakit.serve.model.around import Around, around
from lorakit.serve.model.native import large_pages, padded
from lorakit.serve.request import Refused
from lorakit.serve.store import signature

log = logging.getLogger("lorakit")

Formless = Literal["alone", "refuse", "dense", "svd"]
"""What becomes of a delta without a form: a forward of its own, with whatever else no batch can share; nothing; ΔW itself, as
large as the layer; a low-rank stand-in at a stated error."""

FRAMES = 4
"""Adapters kept on the skeleton, to be filled with the numbers of others that are built alike."""


class LayerTensors(NamedTuple):
    """What an adapter adds to one layer, `y += gain · y + bias + B A x`, with scales folded in.

    `gain` is what multiplies y in addition to the 1 of the layer itself. B is stored rank first, (rank, out). A dense
    change has no A: its B is ΔWᵀ, (in, out). Of a stack of experts there are A (experts, rank, in) and B (experts, rank, out)
    alone.
    """

    A: Tensor | None
    B: Tensor | None
    gain: Tensor | None
    bias: Tensor | None

    def tensors(self) -> Iterator[tuple[int, Tensor]]:
        """`(column of PackedAdapter.parts, tensor)` of those that there are."""
        return ((column, tensor) for column, tensor in enumerate(self) if tensor is not None)


@dataclass(frozen=True, eq=False)
class PackedAdapter:
    """One adapter, ready to serve.

    Attributes:
        name: in the store.
        content: digest of its files.
        buffer: all its numbers, one after the other, in the model's dtype.
        parts: (layers, 5) int64: addresses of A (rank, in), B (rank, out), gain, bias within `buffer` (0: none), and the rank.
        layers: layer -> the same as tensors, views of `buffer`.
        method: its method's name.
        how: "form", "dense" or "svd", the least exact over its layers; "alone".
        error: the largest relative Frobenius error over its layers.
        rank: the largest rank of a layer.
        alone: what computes its rows where they take no part in the batch.
        why: why they do not.
        around: its edits, where it has some.
        invocation: the tokens from whose last occurrence in a prompt on it acts; none: it acts from the first token on.
    """

    name: str
    content: str
    buffer: Tensor
    parts: Tensor
    layers: Mapping[int, LayerTensors]
    method: str
    how: str
    error: float
    rank: int
    alone: Alone | None = None
    why: str = ""
    invocation: tuple[int, ...] = ()
    around: Around | None = None

    @property
    def bytes(self) -> int:
        """Memory that it takes."""
        own = self.buffer.numel() * self.buffer.element_size() + self.parts.numel() * 8
        return own + sum(one.bytes for one in (self.alone, self.around) if one is not None)

    def start(self, prompt: Sequence[int]) -> int | None:
        """The position in a prompt from which on it acts (PEFT's rule for activated LoRA); None where it is not invoked."""
        wanted = self.invocation
        places = range(len(prompt) - len(wanted), -1, -1) if wanted else (0,)
        return next((place for place in places if tuple(prompt[place : place + len(wanted)]) == wanted), None)

    def facts(self) -> dict[str, Any]:
        """What `AdapterInfo` says of its content."""
        known = {name: getattr(self, name) for name in ("method", "how", "error", "rank", "content")}
        return {**known, "reason": self.why}


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers in which adapters can be served: path -> linear layer (or transformers' Conv1D), in the model's order."""
    return {
        path: module
        for path, module in model.named_modules()
        if len(sites := adaptable_sites(module)) == 1 and type(sites[0].layout) in (Linear, Transposed)
    }


def served_stacks(module: nn.Module) -> dict[str, Expert]:
    """Parameter -> one of its experts, for a module that is called with all tokens in order; empty for any other."""
    found = {site.weight: site.layout for site in stacked_sites(module)}
    fits = all(type(layout) is Expert and layout.order for layout in found.values())
    return cast("dict[str, Expert]", found) if fits else {}


def expert_stacks(model: nn.Module) -> dict[str, nn.Module]:
    """The stacks of experts in which adapters can be served: name of the parameter -> its module, in the model's order."""
    return {f"{path}.{name}": module for path, module in model.named_modules() for name in served_stacks(module)}


@dataclass
class _Built:
    """An adapter on the skeleton, and where the tensors of a file of its frame go in it, once that is known."""

    adapter: Adapter
    places: store.Places | None = None


class AdapterReader:
    """Reads adapter folders for one model. Calls from several threads wait for each other."""

    def __init__(self, model: nn.Module, formless: Formless = "refuse", rank: int = 32, error: float = 0.1) -> None:
        if formless not in get_args(Formless):
            raise unknown("value of formless", formless, get_args(Formless))
        self.formless, self.rank, self.error = formless, rank, error
        self.skeleton, self.bare = sharing(model), sharing(model)
        first = next(model.parameters())
        self.device = first.device
        self.dtype = first.dtype if first.is_floating_point() else torch.bfloat16
        self.index = {path: number for number, path in enumerate([*linear_layers(model), *expert_stacks(model)])}
        self.unfit: frozenset[str] = frozenset()
        self.windows = False
        # layers that see only the tokens whose logits are wanted
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
        self.heads = {path for path, module in model.named_modules() if module is head}
        self._lock = threading.Lock()
        self._built: dict[str, _Built] = {}
        self._number = 0

    def read(self, name: str, folder: Path) -> PackedAdapter:
        """One adapter from its folder.

        Raises:
            Refused: it cannot be read, does not fit the model, or cannot be served; the reason says what would work.
        """
        with self._lock:
            for _ in range(3):
                before = signature(folder)
                try:
                    packed = self._read(name, folder)
                except (
                    Exception
                ) as problem:  # a stranger's files; clients read why, no path of the server and no Python
                    if signature(folder) != before:
                        continue
                    if isinstance(problem, Refused):
                        raise
                    if not isinstance(problem, LorakitError):
                        log.warning("serve: reading adapter %s failed", name, exc_info=True)
                        raise Refused(
                            f"adapter {name!r} could not be read; the server's log has the details."
                        ) from problem
                    raise Refused(f"adapter {name!r}: {without_path(str(problem), folder)}") from problem
                if signature(folder) == before:
                    return packed
        raise Refused(
            f"adapter {name!r}: its files changed three times while they were read; load it again when it is whole."
        )

    def look(self, name: str, folder: Path) -> str:
        """Why an adapter cannot be served, as far as its configuration alone says; "" where it says nothing against it."""
        try:
            check_files(folder)
            self._kind(name, Bundle(folder, read_config(folder), read_own(folder), {}))
        except Refused as refusal:
            return "" if self.formless == "alone" else refusal.reason
        except LorakitError as problem:
            return f"adapter {name!r}: {without_path(str(problem), folder)}"
        return ""

    def _kind(self, name: str, bundle: Bundle) -> str:
        """What an adapter is; Refused where no batch takes that."""
        kind = store.kind_of(bundle)
        if kind == "delta" or (kind == "edit" and self.formless != "refuse"):
            return kind
        raise Refused(
            f"adapter {name!r} is {'an edit' if kind == 'edit' else 'a mixture whose experts are weighed token by token'}, "
            "no change of a linear layer. The operator can serve it with formless alone."
        )

    @torch.no_grad()
    def _read(self, name: str, folder: Path) -> PackedAdapter:
        check_files(folder)
        bundle = read_bundle(folder, later=True)  # `read` looks whether the files have stayed the same
        try:
            packed = self._in_batch(name, folder, bundle)
        except Refused as refusal:
            if self.formless != "alone":
                raise
            alone = Alone(self.bare, folder)
            nothing = torch.zeros(len(self.index), 5, dtype=torch.int64)
            packed = PackedAdapter(
                name,
                "",
                torch.empty(0, dtype=self.dtype),
                nothing,
                {},
                alone.method,
                "alone",
                0.0,
                0,
                alone,
                refusal.reason,
            )
        if bundle.stale:
            raise LorakitError(bundle.stale)
        return replace(packed, content=digest(bundle))

    def _in_batch(self, name: str, folder: Path, bundle: Bundle) -> PackedAdapter:
        """An adapter as the batch reads it; Refused where no batch can share it."""
        if self._kind(name, bundle) == "edit":
            return self._edited(name, folder)
        if tokens_trained(folder):
            raise Refused(
                f"adapter {name!r} has rows of its own in the embedding for tokens that it has trained; adapters are served in "
                "linear layers. Merge it into a base of its own."
            )
        frame = store.frame(bundle)
        built = self._built.get(frame)
        if built is None:
            if len(self._built) == FRAMES:
                detach(self.skeleton, self._built.pop(next(iter(self._built))).adapter.name)
            self._number += 1
            adapter = store.load(self.skeleton, folder, name=f"served_{self._number}", active=False)
            built = self._built[frame] = _Built(adapter)
        else:
            built.places = store.refill(built.adapter, bundle, built.places)
        return self._packed(name, built.adapter)

    def _edited(self, name: str, folder: Path) -> PackedAdapter:
        """An adapter of edits as the batch reads it."""
        adapter = store.load(self.skeleton, folder, name="served", active=False)
        try:
            edits = around(adapter, self.dtype)
        finally:
            for added in set(adapters(self.skeleton)) - {one.adapter.name for one in self._built.values()}:
                detach(self.skeleton, added)
        if edits.prefix and self.windows:
            raise Refused(f"adapter {name!r} has a prefix, and this model's attention sees a window of its tokens.")
        return replace(self._pack(name, {}, adapter.method.name, "form", 0.0), around=edits)

    def _packed(self, name: str, adapter: Adapter) -> PackedAdapter:
        for path, replacement in adapter.replacements():
            raise Refused(
                f"adapter {name!r} replaces {path}.{next(iter(replacement.tensors()))} whole, which rows of one batch cannot "
                "share a forward with. Serve it from a base into which it is merged, or train it without modules_to_save."
            )
        layers: dict[int, LayerTensors] = {}
        gains: dict[str, Tensor] = {}
        exactness, error = "form", 0.0
        for path, layer in adapter.layers.items():
            if layer.stack is not None:
                layers |= self._experts(name, path, layer, adapter.name)
                continue
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
            parts: list[LayerTensors] = []
            for site_name, delta in layer.deltas_of(adapter.name).items():
                site = layer.sites[site_name]
                gain = delta.input_gain() if path not in self.heads and not isinstance(site.layout, Rows) else None
                if gain is not None:
                    gains[path] = gain.detach().clone()
                    continue
                W = torch.empty(0)  # factors are served as they are; quantised weights cost time to read
                if not is_product(delta):
                    W = site.layout.matrix(storage_of(layer.base, site.weight, path).read(layer.base, site.weight))
                bias = None if site.bias is None else cast(Tensor, getattr(layer.base, site.bias))
                if bias is not None and isinstance(site.layout, Rows):
                    bias = site.layout.part(bias)
                form, how, lost = self._form(name, path, delta, W, bias)
                parts.append(_whole(form, site))
                exactness = max(exactness, how, key=("form", "dense", "svd").index)
                error = max(error, lost)
            if parts:
                layers[self.index[path]] = _joined(parts)
        if not layers and not gains:
            raise Refused(f"adapter {name!r} changes no layer's weight, so there is nothing to serve in a batch.")
        packed = self._pack(name, layers, adapter.method.name, exactness, error)
        size = sum(gain.numel() * gain.element_size() for gain in gains.values())
        edits = Around(None, {}, {}, {}, 0, size, gains) if gains else None
        return replace(packed, invocation=getattr(adapter.method, "invocation", ()), around=edits)

    def _experts(self, name: str, path: str, layer: Adapted, adapter: str) -> dict[int, LayerTensors]:
        """What an adapter adds to the stacks of one module of experts; an expert that it leaves alone gets zeros."""
        found: dict[int, LayerTensors] = {}
        stacks: dict[str, dict[int, Form]] = {}
        for key, delta in layer.deltas_of(adapter).items():
            site = layer.sites[key]
            place, layout = f"{path}.{site.weight}", cast(Expert, site.layout)
            if place not in self.index or path in self.unfit:
                raise Refused(
                    f"adapter {name!r} changes the experts {path}, a {type(layer.base).__name__}, which is given its tokens "
                    "sorted by expert or all stacks in one, so that rows of one batch cannot have adapters of their own there. "
                    "Merge it into a base of its own."
                )
            if not is_product(delta):
                raise Refused(
                    f"adapter {name!r} changes the experts {path} by {delta.spec.name}, and experts are served with low-rank "
                    "changes only. Merge it into a base of its own, or make a LoRA of it (lorakit resize, with --base)."
                )
            stacks.setdefault(site.weight, {})[layout.index] = delta.form(torch.empty(0), None)
        for weight, forms in stacks.items():
            count = cast(Expert, layer.stack).count
            rank = max(len(cast(Tensor, form.A)) for form in forms.values())
            first = next(iter(forms.values()))
            A = torch.zeros(count, rank, cast(Tensor, first.A).shape[1])
            B = torch.zeros(count, rank, cast(Tensor, first.B).shape[0])
            for index, form in forms.items():
                own_A, own_B = cast(Tensor, form.A), cast(Tensor, form.B)
                A[index, : len(own_A)], B[index, : len(own_A)] = own_A, own_B.T
            found[self.index[f"{path}.{weight}"]] = LayerTensors(A, B, None, None)
        return found

    def _form(self, name: str, path: str, delta: Delta, W: Tensor, bias: Tensor | None) -> tuple[Form, str, float]:
        """A delta's form, how it came to be, and its relative error."""
        try:
            return delta.form(W, bias), "form", 0.0
        except LorakitError:
            if self.formless in ("refuse", "alone"):
                raise Refused(
                    f"adapter {name!r}: {delta.spec.name} cannot be written as `gain · y + bias + B A x`, which a batch can "
                    "share. The operator can serve it with formless dense (exact, as large as the base) or formless svd (a "
                    "low-rank stand-in at a stated error); `lorakit extract` makes a LoRA of it."
                ) from None
        change = delta.dense(W).detach()
        shift = delta.shift(bias, lambda: W)
        if self.formless == "dense":
            return Form(bias=shift, B=change), "dense", 0.0
        whole = change.float()
        U, S, V = triplets(whole, min(self.rank, *whole.shape), iterations=4)
        size = float(torch.linalg.vector_norm(whole))
        lost = max(size**2 - float(S.square().sum()), 0.0) ** 0.5 / size if size else 0.0
        if lost > self.error:
            raise Refused(
                f"adapter {name!r}: the rank-{self.rank} stand-in for {delta.spec.name} in {path} differs by "
                f"{lost:.1%} of the change's norm; {self.error:.1%} is allowed. Formless dense serves it exactly."
            )
        return Form(bias=shift, B=U * S, A=V.T), "svd", lost

    def _pack(
        self, name: str, layers: Mapping[int, LayerTensors], method: str, how: str, error: float
    ) -> PackedAdapter:
        count = sum(padded(tensor.numel()) for change in layers.values() for _, tensor in change.tensors())
        buffer = torch.empty(count, dtype=self.dtype, device=self.device)
        large_pages(buffer)
        parts = [[0] * 5 for _ in self.index]
        rank, start = 0, 0
        views: dict[int, LayerTensors] = {}
        for layer, change in layers.items():
            own: list[Tensor | None] = [None] * 4
            for column, tensor in change.tensors():
                size, room = tensor.numel(), padded(tensor.numel())
                view = buffer[start : start + size].view(tensor.shape)
                view.copy_(tensor)
                if room > size:
                    buffer[start + size : start + room] = 0
                own[column] = view
                parts[layer][column] = view.data_ptr()
                start += room
            if change.B is not None:
                parts[layer][4] = change.B.shape[-2]
                rank = max(rank, change.B.shape[-2])
            views[layer] = LayerTensors(*own)
        if not finite(buffer):
            raise Refused(f"adapter {name!r} holds numbers that are not finite in {self.dtype}.")
        return PackedAdapter(name, "", buffer, torch.tensor(parts), views, method, how, error, rank)


def _whole(form: Form, site: Site) -> LayerTensors:
    """A form of some rows of a layer as a change of the whole layer, with B rank first."""
    A, B, bias = form.A, form.B, form.bias
    gain = None if form.gain is None else form.gain - 1
    if isinstance(site.layout, Rows):
        rows, out = site.layout.index(), site.layout.inner.shape.out

        def spread(part: Tensor | None) -> Tensor | None:
            return None if part is None else part.new_zeros(out, *part.shape[1:]).index_copy(0, rows, part)

        B, gain, bias = spread(B), spread(gain), spread(bias)
    return LayerTensors(A, None if B is None else B.T, gain, bias)


def _joined(parts: Sequence[LayerTensors]) -> LayerTensors:
    """What changes different rows of one layer, as one change."""
    if len(parts) == 1:
        return parts[0]
    As, Bs, gains, biases = ([tensor for tensor in column if tensor is not None] for column in zip(*parts, strict=True))
    if As and len(As) < len(Bs):
        raise Refused("parts of one layer are partly low-rank and partly dense.")

    def total(tensors: list[Tensor]) -> Tensor | None:
        return sum(tensors[1:], tensors[0]) if tensors else None

    return LayerTensors(torch.cat(As) if As else None, torch.cat(Bs) if As else total(Bs), total(gains), total(biases))


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
