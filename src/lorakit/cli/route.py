"""`lorakit route`: which expert a mixture or a router gave each token of some prompts to, as a table and a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorakit.cli.screen import err, out, show_log

HELP = "Show which experts a mixture or router gives the tokens of prompts to: shares per prompt, and a picture."


def route(
    base: Annotated[str, typer.Argument(help="The base model: a hub name, a local folder or a GGUF file.")],
    adapter: Annotated[Path, typer.Argument(help="The folder of a mixture or router.")],
    prompt: Annotated[list[str], typer.Option("--prompt", "-p", help="A prompt; give several to compare.")],
    picture: Annotated[
        Path | None, typer.Option(help="Also draw layers × experts and tokens × experts into this PNG file.")
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="The prompt as it is, without the model's chat template.")] = False,
    dtype: Annotated[str, typer.Option(help="Number format: auto, bf16, fp16, fp32.")] = "auto",
) -> None:
    """Run the prompts and print what share of the weight each expert got."""
    import torch
    from rich.table import Table

    import lorakit as lk
    from lorakit.cli.conversation import Speaker
    from lorakit.cli.picture import draw_routes
    from lorakit.core.using import routes
    from lorakit.errors import LorakitError

    show_log(err)
    speaker = Speaker(base, [adapter], dtype)
    loaded = lk.adapters(speaker.model)[speaker.names[-1]]
    if loaded.router is None:
        raise LorakitError(
            f"route: {adapter} ({loaded.method.name}) routes nothing; mixlora, arrow, xlora, mole, lorahub and retrieval do."
        )
    experts = list(getattr(loaded.router, "members", ()))
    drawn = []
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("prompt", overflow="ellipsis", max_width=48, no_wrap=True)
    for text in prompt:
        ids = speaker.encode([{"role": "user", "content": text}], raw=raw)
        with torch.no_grad(), lk.use(speaker.model, loaded.name), routes(speaker.model) as seen:
            speaker.model(input_ids=torch.tensor([ids], device=speaker.model.device), use_cache=False)
        layers = {name: weights.float().reshape(len(ids), -1).cpu() for name, weights in seen}
        mean = torch.stack(list(layers.values())).mean(0)  # (tokens, experts)
        if not experts:
            experts = [f"expert {e}" for e in range(mean.shape[1])]
        if len(table.columns) == 1:
            for name in experts:
                table.add_column(name, justify="right")
        table.add_row(text, *(f"{share:.3f}" for share in mean.mean(0).tolist()))
        drawn.append((text, layers, [speaker.tokenizer.decode([token]) for token in ids]))
    out.print(table)
    if picture is not None:
        picture.write_bytes(draw_routes(drawn, experts, f"{loaded.name} ({loaded.method.name}): weight of each expert"))
