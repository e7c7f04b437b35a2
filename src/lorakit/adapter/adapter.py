"""An adapter: a named set of deltas, or of edits, on a model, and its tensors by names that are stable."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lorakit.adapter.targets import Targets
from lorakit.core.delta import Delta, Pool
from lorakit.core.layer import Adapted
from lorakit.core.layout import Site
from lorakit.core.replacement import Replacement
from lorakit.core.state import ModelState, found_state
from lorakit.core.storage import Snapshot
from lorakit.edits.contract import Anatomy, Edit, Place
from lorakit.errors import LorakitError
from lorakit.methods.tokens import TokenRows, TrainableTokens


@dataclass
class Adapter:
    """One adapter on one model.

    Attributes:
        name: its name on this model.
        model: the model it is on.
        method: the spec all its deltas share, but for rank and alpha patterns; or that of its edits.
        targets: what it changes, as asked.
        pool: tensors shared by its deltas.
        layers: path -> adapted layer, for the layers that carry one of its deltas or replacements.
        saved: paths of the modules it replaces whole.
        originals: path -> the base's own weights, where the adapter's start has put others in their place (LoftQ).
        router: what weighs experts by token, where the adapter is a mixture or a router over others.
        handles: hooks on the model, which go with the adapter.
        edits: where each of its edits stands -> the edit; empty for an adapter of deltas.
        anatomy: what the model is made of, for an adapter of edits.
        prompt: the form in which the model is asked (`files.prompt.Prompt`), as its folder brought it; None: the base's own.
    """

    writer: ClassVar[Callable[..., Path] | None] = None
    """What `save` calls: `files.store.save`, which sets it, since an adapter does not know of files."""

    name: str
    model: nn.Module
    method: Any
    targets: Targets
    pool: Pool
    layers: dict[str, Adapted] = field(default_factory=dict, repr=False)
    saved: tuple[str, ...] = ()
    originals: dict[str, dict[str, Snapshot]] = field(default_factory=dict, repr=False)
    router: nn.Module | None = field(default=None, repr=False)
    handles: list[RemovableHandle] = field(default_factory=list, repr=False)
    edits: dict[Place, Edit] = field(default_factory=dict, repr=False)
    anatomy: Anatomy | None = field(default=None, repr=False)
    prompt: Any = field(default=None, repr=False)

    def deltas(self) -> Iterator[tuple[str, Site, Delta]]:
        """`(path, site, delta)` of every matrix it changes."""
        for path, layer in self.layers.items():
            for key, delta in layer.deltas_of(self.name).items():
                yield path, layer.sites[key], delta

    def beside(self, delta: Delta) -> bool:
        """Whether a delta of this adapter is rows of a table that train alone, beside what its method changes."""
        return isinstance(delta, TokenRows) and not isinstance(self.method, TrainableTokens)

    def replacements(self) -> Iterator[tuple[str, Replacement]]:
        """`(path, replacement)` of every layer in which it replaces tensors (biases, modules_to_save)."""
        for path, layer in self.layers.items():
            if self.name in layer.replacements:
                yield path, cast(Replacement, layer.replacements[self.name])

    def modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Everything that holds its tensors, by a name that is stable for this adapter."""
        for path, site, delta in self.deltas():
            yield site.place(path), delta
        for place, edit in self.edits.items():
            yield place.path or self.method.family, edit
        yield "pool", self.pool
        if self.router is not None:
            yield "router", self.router

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Its parameters, in the model's order."""
        for prefix, module in self.modules():
            for name, parameter in module.named_parameters():
                yield f"{prefix}.{name}", parameter
        for path, replacement in self.replacements():
            for name, tensor in replacement.tensors().items():
                if isinstance(tensor, nn.Parameter) and name not in replacement.shared:
                    yield f"{path}.{name}", tensor

    def parameters(self) -> Iterator[nn.Parameter]:
        """Its parameters, in the model's order."""
        return (parameter for _, parameter in self.named_parameters())

    def roles(self) -> dict[str, str]:
        """Parameter name -> what it is: the paper's letter ("A", "B"), "bias", "saved", "pool", "router"."""
        roles: dict[str, str] = {}
        for prefix, module in self.modules():
            own = module.roles() if isinstance(module, Delta) else {}
            shared = "pool" if module is self.pool else "router" if module is self.router else ""
            for name, _ in module.named_parameters():
                letter = name.rpartition(".")[2]
                roles[f"{prefix}.{name}"] = shared or own.get(letter, letter)
        whole = set(self.saved)
        for path, replacement in self.replacements():
            for name in replacement.names:
                if name in replacement.shared:
                    continue
                roles[f"{path}.{name}"] = "saved" if path in whole else "bias"
        return roles

    def num_parameters(self, trainable: bool = False) -> int:
        """How many numbers it holds in parameters; with `trainable`, how many of them train now."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not trainable)

    def requires_grad_(self, flag: bool = True) -> Self:
        """Make its floating parameters trainable or not."""
        for parameter in self.parameters():
            parameter.requires_grad_(flag)
        for _, _, delta in self.deltas():
            for frozen in delta.frozen():
                frozen.requires_grad_(False)
        return self

    def state_dict(self) -> dict[str, Tensor]:
        """All its tensors, buffers too, under lorakit's own names; the very tensors, detached."""
        state = {
            f"{prefix}.{name}": tensor.detach()
            for prefix, module in self.modules()
            for name, tensor in module.state_dict().items()
        }
        for path, replacement in self.replacements():
            for name, tensor in replacement.tensors().items():
                state[f"{path}.{name}"] = tensor.detach()
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy tensors in place; every name and shape must agree, otherwise nothing is changed."""
        own = self.state_dict()
        for kind, names in (("has no", set(own) - set(state)), ("has an unexpected", set(state) - set(own))):
            if names:
                raise LorakitError(
                    f"load_state_dict: the state {kind} tensor {sorted(names)[0]!r} (and {len(names) - 1} more); adapter "
                    f"{self.name!r} holds {len(own)} tensors."
                )
        for name, tensor in own.items():
            if tensor.shape != state[name].shape:
                raise LorakitError(
                    f"load_state_dict: {name} has shape {tuple(state[name].shape)}; this adapter needs {tuple(tensor.shape)}."
                )
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(state[name])

    def save(
        self, folder: str | Path, base: str | None = None, record: Mapping[str, Any] | None = None, prompt: Any = None
    ) -> Path:
        """Write it as a folder that PEFT, vLLM and lorakit read: `lorakit.save(adapter, folder)` as a method."""
        if Adapter.writer is None:
            raise LorakitError(
                "save: Adapter.save is there once lorakit.files is imported; use lorakit.save(adapter, folder)."
            )
        return Adapter.writer(self, folder, base=base, record=record, prompt=prompt)


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """The adapters on a model, by name; empty where none is."""
    state = found_state(model)
    return {} if state is None else dict(adapters_of(state))


def adapters_of(state: ModelState) -> dict[str, Adapter]:
    """The very table of a model's adapters, by name."""
    return cast("dict[str, Adapter]", state.adapters)
