"""A file's tensors put into an adapter that was built for them: each taken once, every place filled, nothing left over."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorakit.adapter.adapter import Adapter
from lorakit.core.layout import Rows
from lorakit.core.storage.contract import finite
from lorakit.core.walking import walk
from lorakit.errors import LorakitError
from lorakit.files.bundle import CONFIG, OWN, TENSORS
from lorakit.files.formats import format_of
from lorakit.files.interchange import blocks, parts_of, replacement_key, site_prefix
from lorakit.files.packing import unpack, views

Complain = Callable[[str], None]
"""Raises or logs, as `load` was told to (`strict`)."""


def vocabulary_of(model: Any) -> int | None:
    """How many tokens the embedding of a model of transformers has; None for any other model."""
    try:
        return int(model.get_input_embeddings().weight.shape[0])
    except (AttributeError, NotImplementedError):
        return None


def resized(found: Sequence[int], needed: Sequence[int], vocabulary: int | None) -> str:
    """What to say where two shapes differ because the base's vocabulary was given another size; empty where they do not."""
    apart = [pair for pair in zip(found, needed, strict=False) if pair[0] != pair[1]]
    if len(found) != len(needed) or len(apart) != 1 or apart[0][1] != vocabulary:
        return ""
    return (
        f" The vocabulary was resized: the adapter was made for {apart[0][0]} tokens, and this model has {vocabulary}; "
        f"model.resize_token_embeddings({apart[0][0]}) before loading makes it fit."
    )


class Supply:
    """The tensors of the file `where`, each handed out once."""

    def __init__(self, tensors: Mapping[str, Tensor], where: Path, vocabulary: int | None = None) -> None:
        self.left = dict(tensors)
        self.where = where
        self.vocabulary = vocabulary
        """How many tokens the model's embedding has."""
        self.rank: int | None = None
        """The rank of the layer that is being filled, where its method has one."""
        self.copies: list[tuple[Tensor, Tensor]] = []
        """(tensor of the adapter, value) of all that was put."""

    def take(self, key: str) -> Tensor:
        """The file's tensor of this name."""
        if key not in self.left:
            example = f"; it holds for example {next(iter(self.left))!r}." if self.left else "."
            raise LorakitError(f"load: {self.where} lacks {key!r}, which this adapter needs{example}")
        return self.left.pop(key)

    def put(self, target: Tensor, value: Tensor, key: str) -> None:
        """Copy a value of the file into a tensor of the adapter."""
        if target.shape != value.shape:
            why = resized(value.shape, target.shape, self.vocabulary) or self._why(target, value)
            raise LorakitError(
                f"load: {key} in {self.where} has shape {tuple(value.shape)}; this model's layer needs "
                f"{tuple(target.shape)}.{why}"
            )
        if value.is_floating_point() and not finite(value):
            raise LorakitError(f"load: {key} in {self.where} holds a NaN or an infinity.")
        with torch.no_grad():
            target.copy_(value)
        self.copies.append((target, value))

    def _why(self, target: Tensor, value: Tensor) -> str:
        """What to say of two shapes where it can be told why they differ; empty where it cannot."""
        if not value.numel():
            return (
                " It is empty: the model was spread over processes (DeepSpeed ZeRO-3, FSDP) and saved without gathering its "
                "tensors. Save the adapter again from the training checkpoint, gathered."
            )
        apart = [pair for pair in zip(value.shape, target.shape, strict=False) if pair[0] != pair[1]]
        if value.ndim != target.ndim or len(apart) != 1 or apart[0][1] != self.rank:
            return ""
        return (
            f" The file's tensor has rank {apart[0][0]}, and {CONFIG} says {self.rank} for this layer (r, rank_pattern). "
            "Correct the entry that is wrong: a scale of alpha / r follows from it."
        )

    def finish(self, complain: Complain) -> None:
        """Complain about what nobody has taken."""
        if self.left:
            complain(
                f"load: {self.where} holds {next(iter(self.left))!r} and {len(self.left) - 1} more tensors that nothing "
                "in this model takes."
            )


class Same(Supply):
    """Copies nothing: `copies` are the places that hold the file's value to the bit."""

    def put(self, target: Tensor, value: Tensor, key: str) -> None:
        """Note an equal pair."""
        if target.shape == value.shape and target.dtype == value.dtype and torch.equal(target, value):
            self.copies.append((target, value))


def fill(
    adapter: Adapter,
    tensors: Mapping[str, Tensor],
    plain: Mapping[str, str],
    folder: Path,
    complain: Complain,
    supply: Supply | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """Copy the file's tensors into a built adapter; every tensor must be taken and every place filled.

    Returns what was copied: a tensor of the adapter, and the file's tensor or a part of it. `supply` takes the tensors
    another way (`Same`).
    """
    vocabulary = vocabulary_of(adapter.model)
    supply = supply or Supply({}, folder / TENSORS, vocabulary)
    supply.left = dict(tensors)
    for path, layer in adapter.layers.items():
        if parts_of(layer, adapter.name):
            _fill_parts(adapter, path, plain[path], supply)
            continue
        for site_name, delta in layer.deltas_of(adapter.name).items():
            if adapter.beside(delta) and delta.leader:
                continue  # its rows are those of the layer that it is tied to
            site, supply.rank = layer.sites[site_name], getattr((delta.low_rank() or delta).spec, "rank", None)
            for name, view in views(delta, site.layout.kind).items():
                key = f"{plain[path]}.{site_prefix(adapter, site, delta)}{name}"
                for tensor, piece in view.pieces(unpack(site.layout, supply.take(key), view.axes)):
                    supply.put(tensor, piece, key)
    supply.rank = None
    fill_replacements(adapter, plain, supply)
    for name, tensor in adapter.pool.state_dict().items():
        supply.put(tensor, supply.take(name), name)
    for name, tensor in adapter.router.state_dict().items() if adapter.router is not None else ():
        key = f"{format_of(adapter.method.name).router}{name}"
        supply.put(tensor, supply.take(key), key)
    modules = {plain[path]: module for path, module in walk(adapter.model)} if supply.left else {}
    for key in list(supply.left):
        if _is_copy(key, supply.left[key], modules, vocabulary, complain):
            del supply.left[key]
    supply.finish(complain)
    return supply.copies


def fill_replacements(adapter: Adapter, plain: Mapping[str, str], supply: Supply) -> None:
    """Copy what the adapter has whole: trained biases and modules_to_save."""
    for path, replacement in adapter.replacements():
        for name, tensor in replacement.tensors().items():
            key = replacement_key(adapter, path, plain[path], name)
            if name == "in_proj_bias" and key not in supply.left:
                continue  # PEFT neither trains nor saves this bias of nn.MultiheadAttention
            supply.put(tensor, supply.take(key), key)


def _fill_parts(adapter: Adapter, path: str, plain: str, supply: Supply) -> None:
    """The parts of a fused layer from one pair of factors; outside its block a part's B must be zero."""
    parts = parts_of(adapter.layers[path], adapter.name)
    own, width = blocks(parts), cast(Rows, parts[0][0].layout).inner.shape
    key_A, key_B = f"{plain}.lora_A.weight", f"{plain}.lora_B.weight"
    A, B = supply.take(key_A), supply.take(key_B)
    rank = own[-1][3].stop
    for key, tensor, shape in ((key_A, A, (rank, width.in_)), (key_B, B, (width.out, rank))):
        if tensor.shape != shape:
            raise LorakitError(
                f"load: {key} in {supply.where} has shape {tuple(tensor.shape)}; the parts of this layer need {shape}."
            )
    rest = B.clone()
    for own_B, own_A, rows, columns, factor in own:
        rows = rows.to(B.device)
        supply.put(own_A, A[columns], key_A)
        supply.put(own_B, B[rows, columns] / factor, key_B)
        rest[rows, columns] = 0
    if rest.any():
        raise LorakitError(f"load: {key_B} in {supply.where} is not made of the parts that {OWN} names.")


def _is_copy(
    key: str, value: Tensor, modules: Mapping[str, nn.Module], vocabulary: int | None, complain: Complain
) -> bool:
    """Whether a tensor is PEFT's copy of a base weight (it writes embeddings whole); it must be the weight that is here."""
    path = key.removesuffix(".weight").removesuffix(".base_layer")
    module = modules.get(path)
    weight = getattr(module, "weight", None)
    if not key.endswith(".weight") or not isinstance(weight, Tensor):
        return False
    if weight.shape != value.shape or not torch.allclose(
        weight.detach().float().cpu(), value.float(), rtol=2**-7, atol=1e-6
    ):
        complain(
            f"load: the file carries its own copy of {path}.weight, which is not the weight of this model."
            f"{resized(value.shape, weight.shape, vocabulary)}"
        )
    return True
