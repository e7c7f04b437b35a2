"""The one adapted layer: a frozen base layer, the deltas of any number of adapters beside it, and their routing.

There is one such class for every method, layer kind and storage. Its forward writes nothing: it asks who acts in this call
and hands it to `uniform.py` (the whole batch has the same adapters) or `mixed.py` (rows or tokens have their own).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lorakit.core.contents import LayerContents
from lorakit.core.mixed import run_mixed, run_nested
from lorakit.core.rows import first_tensor
from lorakit.core.uniform import Weighted, run_uniform, substitutes
from lorakit.errors import LorakitError


class Adapted(LayerContents):
    """A base layer with deltas and replacements of any number of adapters; calls go by the state's routing."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        state, routing = self.state, self.state.routing
        here = [name for name in state.members(routing) if name in self.deltas or name in self.replacements]
        if not here:
            if not state.decided and not routing.names:
                state.say_idle()
            return self.base(*args, **kwargs)
        if first_tensor(args, kwargs).is_nested:
            return run_nested(self, args, kwargs)
        if routing.weights is None or any(name in state.routers for name in routing.names):
            return run_mixed(self, routing, here, args, kwargs)
        weights = dict(zip(routing.names, routing.weights, strict=True))
        return run_uniform(self, [(name, weights[name]) for name in here], args, kwargs)

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        return self._changed(name, value) if name in self.__dict__.get("read", ()) else value

    def _changed(self, name: str, value: Any) -> Any:
        """What a model that reads a layer's weight by itself gets: `W + ΔW` of the adapters that act just now."""
        routing = self.state.routing
        here = [one for one in self.state.members(routing) if one in self.deltas or one in self.replacements]
        if not here:
            return value
        if routing.weights is None or any(name in self.state.routers for name in routing.names):
            raise LorakitError(
                f"{self.path}: the model reads the {name} of this layer by itself, so that it is one for the whole batch; rows "
                "or tokens with adapters of their own cannot have it. Give the batch one adapter or blend, or leave the layer "
                f'out by exclude_modules=["{self.path.rpartition(".")[2]}"].'
            )
        weights = dict(zip(routing.names, routing.weights, strict=True))
        changed = substitutes(self, [(one, weights[one]) for one in here]).get(name)
        return value if changed is None else changed.to(value.dtype)

    def substitutes(self, blend: Weighted) -> dict[str, Tensor]:
        """The layer's tensors under a blend, to be merged or substituted."""
        return substitutes(self, blend)
