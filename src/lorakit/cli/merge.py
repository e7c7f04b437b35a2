"""`lorakit merge`: a base and an adapter become one model folder that transformers loads like any other.

An adapter that was trained on a quantised base is merged with that base, made again from the floats as it was. By default
the result is quantised too, and what that rounds is printed as a number; with --dtype it is a float model, off by one
rounding only.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from lorakit.cli.arguments import Adapter, Model, Overwrite
from lorakit.cli.screen import err, out, show_log
from lorakit.errors import plural

SETTINGS = ("config.json", "generation_config.json", "model.safetensors.index.json")
WEIGHTS = r"model(-\d+-of-\d+)?\.safetensors"

HELP = "Merge an adapter into its base model's weights and save the result as a model folder."


def merge(
    base: Model,
    adapter: Adapter,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    dtype: Annotated[str, typer.Option(help="Dtype to save in: bf16, fp16, fp32; auto keeps the base's own.")] = "auto",
    untie: Annotated[
        bool, typer.Option(help="Give an adapted layer that shares its weight (tied embeddings) a weight of its own.")
    ] = False,
    gguf: Annotated[
        str | None,
        typer.Option(
            help="Also write a GGUF file of this format (f16, q8_0, q4_k_m, ...) and an Ollama Modelfile, by llama.cpp."
        ),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Merge and save."""
    show_log(err)
    import torch

    import lorakit as lk
    from lorakit.cli.conversation import check_adapters
    from lorakit.files.bundle import read_own
    from lorakit.files.folder import claim, replace_folder
    from lorakit.files.prompt import PROMPT, Prompter
    from lorakit.files.vocabulary import make_room
    from lorakit.models.loading import load_model, resolve_dtype
    from lorakit.models.quantisation import as_config, existing, holding
    from lorakit.models.stored import stored_config, stored_dtype
    from lorakit.train.tasks.record import recorded

    tools = None
    if gguf is not None:
        from lorakit.conversion.model_gguf import find_tools

        tools = find_tools(gguf)  # before anything is read
    earlier = [entry.name for entry in output.iterdir()] if output.is_dir() else []
    check_adapters([adapter], base)
    claim(output, earlier or ["config.json"], overwrite, "merge", marks=("config.json",))
    wanted = stored_dtype(base) if dtype == "auto" else resolve_dtype(dtype)[0]
    config = stored_config(base)
    quantised = None if config is None else existing(config)
    trained = read_own(adapter).get("base", {}).get("quantization")
    options: dict[str, Any] = {"dtype": wanted}
    if trained and not quantised:
        err.print(f"{adapter} was trained on a quantised base; quantising {base} the same way", markup=False)
        told = {"dtype": "auto", **trained}
        options = {"dtype": told.pop("dtype"), "quantization_config": as_config(told)}
    elif not quantised:
        # The sum is made in float32 and rounded once; adding in bf16 would round it to the grid of the base's weights.
        options = {"dtype": torch.float32}
    task, _, classes = recorded(adapter, base)
    model, tokenizer = load_model(base, task=task.name, **options, **task.model_options(classes))
    task.settle(model)
    make_room(model, [adapter])
    loaded = lk.load(model, adapter, active=False)
    prompt = loaded.prompt
    few = holding(model).words()
    if few and dtype == "auto":
        report = lk.merge(model, loaded.name, untie=untie)
        worst = max(report.error, key=lambda path: report.error[path])
        mean = sum(report.error.values()) / len(report.error)
        form = f"{few}; quantising the merged weights again changes them by {mean:.2%} on average, at most "
        form += f"{report.error[worst]:.2%} ({worst})"
    else:
        report = lk.merge(model, loaded.name, untie=untie, dtype=wanted)
        form = str(wanted).removeprefix("torch.") + (f", dequantised from {few}" if few else "")
    if prompt is not None:
        form += f"; asked by {prompt.place}"
    tokenizer = Prompter(tokenizer, prompt).settle(model)

    def write(folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        task.export(model, folder)
        if tools is not None and gguf is not None:
            from lorakit.conversion.model_gguf import modelfile, write_gguf

            file = f"{output.name}-{gguf.lower()}.gguf"
            write_gguf(folder, folder / file, gguf, tools, "bf16" if wanted is torch.bfloat16 else "f16")
            (folder / "Modelfile").write_text(modelfile(file, Prompter(tokenizer, prompt), model), encoding="utf-8")

    replace_folder(
        output,
        write,
        [
            name
            for name in earlier
            if name in PROMPT
            or name in (*SETTINGS, "Modelfile")
            or re.fullmatch(rf"{WEIGHTS}|{re.escape(output.name)}-\w+\.gguf", name)
        ],
    )
    if gguf is not None:
        out.print(
            f"GGUF: {output}/{output.name}-{gguf.lower()}.gguf; ollama create NAME -f {output}/Modelfile", markup=False
        )
    layers = plural(len(report.layers), "layer")
    out.print(f"Merged {adapter} into {layers} of {base}; saved to {output} ({form})", markup=False)
