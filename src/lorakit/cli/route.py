"""`lorakit route`: which expert a mixture or a router gave each token of some prompts to, as a table and a picture."""

from __future__ import annotations

from typing import Annotated

import typer

from lorakit.cli.arguments import Adapter, Dtype, Model, Picture, Raw
from lorakit.cli.screen import err, out, show_log
from lorakit.cli.tables import table
from lorakit.errors import LorakitError

HELP = "Show which experts each token is routed to: shares per prompt, and a picture."


def route(
    base: Model,
    adapter: Adapter,
    prompt: Annotated[list[str], typer.Option("--prompt", "-p", help="Prompt; repeat for several.")],
    picture: Picture = None,
    raw: Raw = False,
    dtype: Dtype = "auto",
) -> None:
    """Run the prompts and print what share of the weight each expert got."""
    show_log(err)
    import torch

    import lorakit as lk
    from lorakit.cli.conversation import Speaker
    from lorakit.core.using import routes
    from lorakit.experts import MIXTURES, ROUTERS
    from lorakit.files.folder import check_writable
    from lorakit.insight.picture import draw_routes

    if picture is not None:
        check_writable(picture, "route")
    speaker = Speaker(base, [adapter], dtype)
    loaded = lk.adapters(speaker.model)[speaker.names[-1]]
    if loaded.router is None:
        raise LorakitError(
            f"route: {adapter} ({loaded.method.name}) has no router; {', '.join([*MIXTURES, *ROUTERS])} have one."
        )
    experts: list[str] = list(getattr(loaded.router, "members", ()))
    drawn, rows = [], []
    for text in prompt:
        ids = speaker.encode([{"role": "user", "content": text}], loaded.name, raw=raw)
        with torch.no_grad(), lk.use(speaker.model, loaded.name), routes(speaker.model) as seen:
            speaker.model(input_ids=torch.tensor([ids], device=speaker.model.device), use_cache=False)
        layers = {name: weights.float().reshape(len(ids), -1).cpu() for name, weights in seen}
        shares = torch.stack(list(layers.values())).mean((0, 1)).tolist()  # over layers and tokens
        experts = experts or [f"expert {e}" for e in range(len(shares))]
        rows.append((text if len(text) <= 48 else f"{text[:47]}…", *(f"{share:.3f}" for share in shares)))
        drawn.append((text, layers, [speaker.prompter(loaded.name).tokenizer.decode([token]) for token in ids]))
    out.print(table("prompt", *experts, rows=rows))
    if picture is not None:
        picture.write_bytes(draw_routes(drawn, experts, f"{loaded.name} ({loaded.method.name}): weight of each expert"))
