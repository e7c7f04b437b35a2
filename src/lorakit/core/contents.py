"""What an adapted layer holds: its base, the base's matrices, and the deltas and replaced tensors of any number of adapters."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from lorakit.core.delta import Delta
from lorakit.core.layout import Expert, Site
from lorakit.core.replacement import Replacement
from lorakit.core.state import ModelState
from lorakit.core.storage import Snapshot, storage_of, value_of

OWN = "lorakit."
"""What the names of adapters' tensors begin with in the state dict of an adapted layer."""

_SIZES = ("num_embeddings", "out_features", "nf", "padding_idx")
"""What transformers writes into a layer that it gives more rows."""


def _has(base: nn.Module, name: str) -> bool:
    """Whether a layer has a child or tensor of the name's first part."""
    first = name.partition(".")[0]
    return any(first in held for held in (base._modules, base._parameters, base._buffers))


def _own_names(layer: nn.Module, found: Any) -> None:
    """Names what `load_state_dict` misses as `state_dict` does."""
    path = f"{layer.path}." if layer.path else ""
    for index, key in enumerate(found.missing_keys):
        for inner, outer in (("base.", ""), ("deltas.", f"{OWN}deltas."), ("replacements.", f"{OWN}replacements.")):
            if f"{path}{inner}" in key and f"{path}{OWN}" not in key:
                found.missing_keys[index] = key.replace(f"{path}{inner}", f"{path}{outer}", 1)
                break


class ByName(nn.ModuleDict):
    """Modules by names that users choose. torch refuses those that are also attributes of a module ("half", "type")."""

    def add_module(self, name: str, module: nn.Module | None) -> None:
        self._modules[name] = module  # type: ignore[assignment]

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: Any, unexpected: Any, errors: Any
    ) -> None:
        """There is nothing to load here. For torch a name has no dots, and an adapter's may have one."""
        known = tuple(f"{prefix}{name}." for name in self._modules)
        if strict:
            unexpected += [key for key in state_dict if key.startswith(prefix) and not key.startswith(known)]


class LayerContents(nn.Module):
    """An adapted layer without its forward.

    Attributes that this class lacks are those of the base layer, so that models which read `layer.weight.dtype` and the
    like keep working.
    """

    base: nn.Module
    deltas: ByName
    """adapter -> site -> Delta; the site's empty name is written "self", its dots ":", since modules' names have none."""
    replacements: ByName
    sites: dict[str, Site]
    path: str
    state: ModelState
    tokens: bool
    """Whether it stands in a mixture of experts, where a call may have the tokens of all rows on one axis."""
    read: frozenset[str]
    """Which of its weight and bias the model reads by itself, besides calling it or instead."""
    unmerged: dict[str, Snapshot]
    """Within `merged`: tensors as they were before it wrote into them. What adapters add is about these."""

    def __init__(self, base: nn.Module, sites: list[Site], state: ModelState, path: str) -> None:
        super().__init__()
        own = {site.name: site for site in sites}
        # Past a module's own __setattr__, which is most of the time that attaching takes.
        self._modules.update(base=base, deltas=ByName(), replacements=ByName())
        self.__dict__.update(sites=own, path=path, state=state, tokens=False, read=frozenset(), unmerged={})
        self.register_load_state_dict_post_hook(_own_names)  # type: ignore[no-untyped-call]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        """A parameter of the base that is given anew (transformers ties and resizes weights so) goes to the base."""
        base = self.__dict__.get("_modules", {}).get("base")
        if base is not None and (name in base._parameters or (name in _SIZES and hasattr(base, name))):
            setattr(base, name, value)
        else:
            super().__setattr__(name, value)

    # -- its tensors by name: the base's as if no adapter were here, the adapters' behind OWN -----------------------------

    def state_dict(self, *, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """The base's tensors by the base's own names; those of adapters as "lorakit.deltas.NAME…" and
        "lorakit.replacements.NAME…", but within `base_alone`."""
        own: Any = super().state_dict(prefix=prefix, keep_vars=keep_vars)
        destination = type(own)() if destination is None else destination
        destination._metadata = getattr(destination, "_metadata", type(own)())
        for key, tensor in own.items():
            name = key[len(prefix) :]
            if name.startswith("base."):
                destination[prefix + name.removeprefix("base.")] = tensor
            elif not self.state.base_alone:
                destination[f"{prefix}{OWN}{name}"] = tensor
        for key, about in own._metadata.items():
            name = f"{key}."[len(prefix) :]
            if name.startswith("base."):
                destination._metadata[(prefix + name.removeprefix("base.")).removesuffix(".")] = about
        return destination

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Takes the names that `state_dict` gives, and those of the modules ("base.…", "deltas.…")."""
        for key in [key for key in state_dict if key.startswith(prefix)]:
            name = key[len(prefix) :]
            if name.startswith(OWN):
                state_dict[prefix + name.removeprefix(OWN)] = state_dict.pop(key)
            elif name.partition(".")[0] not in ("base", "deltas", "replacements") or _has(self.base, name):
                state_dict[f"{prefix}base.{name}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def deltas_of(self, adapter: str) -> dict[str, Delta]:
        """This layer's deltas of one adapter, by site name."""
        # Past a module's own __getattr__, which this is asked most often through.
        held = cast(nn.Module, self._modules["deltas"])._modules.get(adapter)
        found = {} if held is None else held._modules
        return {"" if key == "self" else key.replace(":", "."): cast(Delta, one) for key, one in found.items()}

    def replaced_by(self, adapter: str) -> dict[str, Tensor]:
        """The tensors of the base that an adapter replaces: name -> its own values."""
        return cast(Replacement, self.replacements[adapter]).tensors() if adapter in self.replacements else {}

    def add(self, adapter: str, deltas: dict[str, Delta], replacement: Replacement | None) -> None:
        """Give this layer an adapter's deltas (by site name) and replaced tensors."""
        if deltas:
            self.deltas[adapter] = ByName({name.replace(".", ":") or "self": delta for name, delta in deltas.items()})
        if replacement is not None:
            self.replacements[adapter] = replacement

    def remove(self, adapter: str) -> bool:
        """Forget an adapter; True where none is left and the base can go back in its place."""
        for held in (self.deltas, self.replacements):
            if adapter in held:
                del held[adapter]
        return not len(self.deltas) and not len(self.replacements)

    @property
    def beside(self) -> bool:
        """Whether changes act beside this layer; else it is called with its weights substituted."""
        return all(site.layout.beside for site in self.sites.values())

    def stored(self, site: Site) -> Tensor:
        """The frozen weight of a site as floats in its stored shape, whatever is merged into it just now."""
        if site.weight in self.unmerged:
            return self.unmerged[site.weight].read()
        return storage_of(self.base, site.weight, self.path).read(self.base, site.weight)

    def frozen(self, name: str) -> Tensor:
        """One of the base's own tensors, whatever is merged into it just now."""
        return self.unmerged[name].read() if name in self.unmerged else value_of(self.base, name).detach()

    def bias_of(self, site: Site) -> Tensor | None:
        """The frozen bias of a site's rows."""
        if site.bias is None:
            return None
        return site.layout.own_bias(self.frozen(site.bias))

    def shift_of(self, site: Site, delta: Delta) -> Tensor | None:
        """What a delta adds to the bias of a site's rows; None: nothing."""
        return delta.shift(self.bias_of(site), lambda: site.layout.matrix(self.stored(site)))

    @property
    def stack(self) -> Expert | None:
        """One expert of a layer that is a stack of them; None for any other layer."""
        layouts = [site.layout for site in self.sites.values()]
        return next((layout for layout in layouts if isinstance(layout, Expert)), None)
