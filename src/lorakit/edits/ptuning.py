"""P-tuning: prompt tuning whose rows come out of a small network, which trains better and is dropped afterwards.

    P = f(E)        E (tokens, hidden); f: three Linear with ReLU ("mlp"), or a two-way LSTM and two Linear ("lstm")

The file holds the rows that came out, as PEFT's does: a plain prompt, which loads and trains on as one. (Checkpoints of a
run hold the network too.) The paper also puts rows between parts of a template; here, as in PEFT, they stand in front. 20
tokens at width 576 train 11,520 numbers and the network's million. Liu et al. 2021, arXiv 2103.10385.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

from lorakit.core.delta import Card
from lorakit.core.options import option
from lorakit.edits.contract import Anatomy, Place, Prompt
from lorakit.edits.prompt import PromptMethod, PromptRows


@dataclass(frozen=True, kw_only=True)
class PTuning(PromptMethod):
    """The options of P-tuning."""

    name = "p-tuning"
    card = Card(
        title="P-tuning",
        formula="input = [f(E); Emb(x)]",
        parameters=lambda anatomy, spec: spec.numbers(anatomy.hidden),
        paper="arXiv 2103.10385",
        use="Where prompt tuning trains too slowly: same file, steadier training.",
        limits="Takes positions of every input; prompts do not blend.",
        identity=False,
    )

    encoder: Literal["mlp", "lstm"] = option(
        "mlp",
        "network that the rows come out of",
        peft="encoder_reparameterization_type",
        peft_default="MLP",
        from_peft=str.lower,
        to_peft=str.upper,
    )
    width: int | None = option(
        None, "inner width of the network; the model's own by default", minimum=1, peft="encoder_hidden_size"
    )
    depth: int = option(2, "layers of the LSTM; the MLP has three always", minimum=1, peft="encoder_num_layers")

    def network(self, hidden: int) -> nn.Module:
        """The network f over rows (tokens, hidden)."""
        width = self.width or hidden
        if self.encoder == "lstm":
            return Recurrent(hidden, width, self.depth)
        layers = (nn.Linear(hidden, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, hidden))
        return nn.Sequential(*layers)

    def numbers(self, hidden: int) -> int:
        """Trained numbers at a model's width."""
        with torch.device("meta"):
            return self.tokens * hidden + sum(one.numel() for one in self.network(hidden).parameters())

    def build(self, place: Place, anatomy: Anatomy, folded: bool = False) -> Prompt:
        if folded:
            return PromptRows(self, place, torch.empty(self.tokens, anatomy.hidden))
        return EncodedRows(self, place, anatomy.hidden)


class Recurrent(nn.Module):
    """The network "lstm"."""

    def __init__(self, hidden: int, width: int, depth: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(hidden, width, num_layers=depth, bidirectional=True, batch_first=True)
        self.head = nn.Sequential(nn.Linear(2 * width, 2 * width), nn.ReLU(), nn.Linear(2 * width, hidden))

    def forward(self, rows: Tensor) -> Tensor:
        return cast(Tensor, self.head(self.lstm(rows[None])[0][0]))


class EncodedRows(Prompt):
    """E (tokens, hidden) and the network that makes rows of it."""

    def __init__(self, spec: PTuning, place: Place, hidden: int) -> None:
        super().__init__(spec, place)
        self.E = nn.Parameter(torch.randn(spec.tokens, hidden))
        self.network = spec.network(hidden)

    def rows(self) -> Tensor:
        return cast(Tensor, self.network(self.E))

    def kept(self) -> dict[str, Tensor]:
        return {"P": self.rows().detach()}
