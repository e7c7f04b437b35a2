"""IA3: activations are rescaled, feature by feature; nothing is added.

    y = l ⊙ (W x + b)        most layers (keys and values): l (out,)
    y = W (l ⊙ x) + b        feed-forward layers' last product: l (in,)          l starts at one

Which layers are of the second kind is the option feedforward_modules; there is no telling from a matrix. The paper takes
keys, values and the input of the feed-forward layer's second product: for LLaMA's names target_modules=["k_proj", "v_proj",
"down_proj"] with feedforward_modules=["down_proj"]. 576 → 1536 trains 1536 numbers, or 576. Decay l toward 1 or not
at all: toward 0 it would switch the layer off. For a convolution the second kind has one number per input channel (per
group the same ones). Liu et al. 2022, arXiv 2205.05638.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.core.delta import Call, Card, Delta, Form, Method, Pool, Shape
from lorakit.core.options import option
from lorakit.core.patterns import matches, mistake
from lorakit.errors import LorakitError


@dataclass(frozen=True, kw_only=True)
class IA3(Method):
    """The options of IA3."""

    name = "ia3"
    card = Card(
        title="IA3",
        formula="y = l ⊙ (W x + b), or W (l ⊙ x) + b for feed-forward layers",
        parameters=lambda shape, spec: shape.in_ // shape.taps if spec.side == "input" else shape.out,
        paper="arXiv 2205.05638",
        use="When adapters must be tiny and many: a few numbers per feature, few-shot.",
    )

    feedforward_modules: tuple[str, ...] | str | None = option(
        None,
        "layers whose input is scaled: name endings, or one regular expression over whole names; [] if none; required",
        shown="a list of names or one string, a regular expression over whole names; [] if none",
        peft="feedforward_modules",
        from_peft=lambda value: value or (),
    )
    side: Literal["output", "input"] = option(
        "output", "what is scaled in layers that feedforward_modules does not name"
    )

    def __post_init__(self) -> None:
        given: Any = self.feedforward_modules
        if isinstance(given, Iterable) and not isinstance(given, str):
            object.__setattr__(self, "feedforward_modules", tuple(given))
        super().__post_init__()
        if isinstance(given, str) and (wrong := mistake(given)):
            raise LorakitError(
                f"ia3: feedforward_modules was given as {given!r}, one string, which is read as a regular expression over "
                f"whole names and is not one ({wrong}). A list of endings would work too."
            )

    def _scales_input(self, path: str) -> bool:
        given = self.feedforward_modules or ()
        if isinstance(given, str):
            return matches(given, path)
        return any(path == ending or path.endswith("." + ending) for ending in given)

    def at(self, path: str) -> Method:
        return self.replace(side="input") if self._scales_input(path) else self

    def check_layers(self, paths: Sequence[str]) -> None:
        given = self.feedforward_modules
        if given is None:
            raise LorakitError(
                "attach: ia3 was given no feedforward_modules: which of the layers have their input scaled, such as "
                '["down_proj"] for LLaMA, ["mlp.c_proj"] for GPT-2, ["output.dense"] for BERT, ["wo"] for T5; [] if none.'
            )
        for pattern in (given,) if isinstance(given, str) else given:
            one = self.replace(feedforward_modules=pattern if isinstance(given, str) else (pattern,))
            if not any(one._scales_input(path) for path in paths):
                endings = sorted({path.rpartition(".")[2] for path in paths})
                raise LorakitError(
                    f"attach: feedforward_modules names {pattern!r}, which is none of the {len(paths)} adapted layers; their "
                    f"names end in {', '.join(endings)}. It selects among them, so name it in target_modules too."
                )

    def build(self, shape: Shape, pool: Pool) -> Delta:
        return (InputGain if self.side == "input" else OutputGain)(self, shape, pool)


class OutputGain(Delta):
    """l (out,): scales what the layer gives, bias and all."""

    def __init__(self, spec: IA3, shape: Shape, pool: Pool) -> None:
        super().__init__(spec, shape, pool)
        self.l = nn.Parameter(torch.ones(shape.out))

    def dense(self, W: Tensor) -> Tensor:
        return (self.l - 1)[:, None] * W

    def shift(self, b: Tensor | None, W: Callable[[], Tensor]) -> Tensor | None:
        return None if b is None else (self.l - 1) * b

    def act(self, call: Call) -> Tensor:
        return call.gain(call.y, self.l - 1)

    def output(self, call: Call) -> Tensor | None:
        return call.gain(call.y, self.l)

    def form(self, W: Tensor, b: Tensor | None) -> Form:
        return Form(gain=self.l)


class InputGain(Delta):
    """l (channels,): scales what the layer is given."""

    def __init__(self, spec: IA3, shape: Shape, pool: Pool) -> None:
        super().__init__(spec, shape, pool)
        self.l = nn.Parameter(torch.ones(shape.in_ // shape.taps))

    def dense(self, W: Tensor) -> Tensor:
        return W * (self.l - 1).repeat_interleave(self.shape.taps)

    def input_gain(self) -> Tensor | None:
        return self.l if self.shape.taps == 1 else None

    def act(self, call: Call) -> Tensor:
        return self._scaled(call, self.l - 1)

    def output(self, call: Call) -> Tensor | None:
        return self._scaled(call, self.l)

    def _scaled(self, call: Call, gain: Tensor) -> Tensor:
        return call.through(
            lambda x: F.linear(x * gain.to(x.dtype), call.W.to(x.dtype)),
            lambda: call.W * gain.repeat_interleave(self.shape.taps),
        )
