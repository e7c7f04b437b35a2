"""`lorakit serve`: a base model and a folder of adapters behind OpenAI's API."""

from __future__ import annotations

import contextlib
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorakit.cli.screen import err, show_log

if TYPE_CHECKING:
    from lorakit.serve.http.front import Front
    from lorakit.serve.request import Engine

HELP = "Serve a base model and a folder of adapters over HTTP, as OpenAI's API has it."

LOOPBACK = ("127.0.0.1", "localhost", "::1")
SHOWN = 20
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}


def serve(
    base: Annotated[str, typer.Argument(help="The base model: a hub name, a local folder or a GGUF file.")],
    adapters: Annotated[
        Path | None, typer.Option("--adapters", "-a", help="A folder of adapter folders; their names are the models.")
    ] = None,
    keys: Annotated[Path | None, typer.Option(help="The file of API keys that `lorakit keys` makes.")] = None,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port; 0 takes a free one.")] = 8000,
    name: Annotated[str, typer.Option(help="What requests call the base model; by default its own name.")] = "",
    memory: Annotated[str, typer.Option(help="Memory for adapters, such as 2G or 500M.")] = "2G",
    cache: Annotated[str, typer.Option(help="Memory for keys and values of running requests.")] = "2G",
    batch: Annotated[int, typer.Option(min=1, help="Requests that run at once.")] = 32,
    queue: Annotated[int, typer.Option(min=1, help="Requests that wait at most; more are answered 429.")] = 1024,
    context: Annotated[
        int | None, typer.Option(min=2, help="Tokens of prompt and answer; default the model's.")
    ] = None,
    formless: Annotated[
        str, typer.Option(help="Adapters whose method has no batched form: refuse, dense (exact, slower) or svd.")
    ] = "refuse",
    pin: Annotated[list[str] | None, typer.Option(help="An adapter to keep in memory; several.")] = None,
    max_prompt: Annotated[int | None, typer.Option(min=1, help="Tokens of a prompt at most.")] = None,
    max_output: Annotated[int | None, typer.Option(min=1, help="Tokens of an answer at most.")] = None,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds until an answer must have ended.")] = 600.0,
    grace: Annotated[float, typer.Option(min=1, help="Seconds for running answers after SIGTERM.")] = 30.0,
    dtype: Annotated[str, typer.Option(help="Number format: auto, bf16, fp32.")] = "auto",
    engine: Annotated[str, typer.Option(help="What generates: lorakit, or vllm where it is installed.")] = "lorakit",
    cluster: Annotated[int, typer.Option(min=0, help="Replicas on Ray Serve; 0 serves from this process.")] = 0,
    cluster_max: Annotated[
        int, typer.Option(min=0, help="Replicas at most, as requests come; 0: always --cluster.")
    ] = 0,
) -> None:
    """Load, say what is there, and serve until SIGTERM."""
    from lorakit.errors import LorakitError, unknown

    show_log(err)
    if engine not in ("lorakit", "vllm"):
        raise unknown("engine", engine, ["lorakit", "vllm"])
    if adapters is not None and not adapters.expanduser().is_dir():
        raise LorakitError(f"serve: --adapters {adapters} is no folder. It is a folder whose folders are adapters.")
    try:
        from lorakit.serve.http.front import Bounds, Front
        from lorakit.serve.http.server import run
        from lorakit.serve.http.tenants import Tenants
    except ModuleNotFoundError as missing:
        raise LorakitError(f'serve: {missing.name} is not installed; pip install "lorakit[serve]" has it.') from missing

    tenants = Tenants(keys.expanduser() if keys is not None else None)  # before anything that takes long
    limits: dict[str, Any] = {
        "batch": batch,
        "step_tokens": max(512, batch),
        "queue": queue,
        "cache_bytes": read_size(cache, "--cache"),
        "adapter_bytes": read_size(memory, "--memory"),
        "context": context,
    }
    began = time.monotonic()
    served, tokenizer = start(base, adapters, engine, (cluster, cluster_max), dtype, formless, limits)
    outside = host not in LOOPBACK
    front = Front(
        served,
        tokenizer,
        name=name or model_name(base),
        tenants=tenants,
        bounds=Bounds(prompt=max_prompt, output=max_output, seconds=timeout),
        admin=not (tenants.open and outside),
        # without keys, a web page could have a browser on this machine send requests here under a name of its own
        hosts=frozenset({*LOOPBACK, "[::1]"}) if tenants.open and not outside else frozenset(),
    )
    for one in pin or ():
        served.adapters.pin(one)
    introduce(front, adapters)
    if tenants.open:
        reach = f"anyone who can reach {host}" if outside else "anyone on this machine"
        admin = "; the admin endpoints are closed" if outside else ", the admin endpoints included"
        err.print(f"no --keys: {reach} may use this server{admin}.", style="bold yellow", markup=False)

    def started(url: str) -> None:
        from lorakit.serve.http.logs import log_to

        err.print(f"serving on {url}/v1 after {time.monotonic() - began:.1f} s (SIGTERM ends it)", markup=False)
        log_to(sys.stdout)

    run(front, host, port, grace, started)
    err.print("ended", markup=False)


def start(
    base: str,
    adapters: Path | None,
    engine: str,
    cluster: tuple[int, int],
    dtype: str,
    formless: str,
    limits: dict[str, Any],
) -> tuple[Engine, Any]:
    """The engine that was asked for, running, and the base model's tokenizer."""
    store = adapters.expanduser() if adapters is not None else None
    if engine == "vllm":
        from lorakit.serve.remote.vllm import VllmEngine

        remote = VllmEngine.over(base, store, limits)
        remote.start()
        return remote, remote.tokenizer
    least, most = cluster
    if least:
        from lorakit.models.loading import load_tokenizer
        from lorakit.serve.remote.cluster import ClusterEngine

        with err.status(f"starting {least} replicas"):
            replicas = ClusterEngine(base, store, least, most=most, dtype=dtype, formless=formless, limits=limits)
            replicas.start()
        return replicas, load_tokenizer(base, {})
    from lorakit.models.loading import load_model
    from lorakit.serve.engine.engine import LocalEngine
    from lorakit.serve.engine.scheduler import Limits

    with err.status(f"loading {base}"):
        model, tokenizer = load_model(base, dtype=dtype)
        local = LocalEngine(model, store, Limits(**limits), formless=formless)  # type: ignore[arg-type]
        local.start()
    return local, tokenizer


def introduce(front: Front, store: Path | None) -> None:
    """A line for the base and for each adapter, from its folder's configuration alone."""
    names = front.engine.adapters.names()
    err.print(f"{front.name}: {front.engine.context:,} tokens, {len(names)} adapters", markup=False)
    width = max((len(one) for one in names[:SHOWN]), default=0)
    for one in names[:SHOWN]:
        err.print(f"  {one.ljust(width)}  {describe(store / one) if store else ''}", markup=False)
    if len(names) > SHOWN:
        err.print(f"  and {len(names) - SHOWN} more", markup=False)


def describe(folder: Path) -> str:
    """An adapter in a few words, or what is wrong with it."""
    from lorakit.errors import LorakitError
    from lorakit.files import store

    try:
        config = store.read_config(folder)
    except LorakitError as problem:
        return str(problem)
    kind = str(config.get("peft_type", "?")).lower()
    rank = f", rank {config['r']}" if "r" in config else ""
    size = 0
    with contextlib.suppress(OSError):
        size = (folder / store.TENSORS).stat().st_size
    return f"{kind}{rank}, {size / 2**20:.1f} MB"


def model_name(base: str) -> str:
    """The last part of a model's place."""
    return re.sub(r"\.gguf$", "", base.rstrip("/").rpartition("/")[2]) or "base"


def read_size(text: str, option: str) -> int:
    """Bytes of "2G", "500M", "100000"."""
    from lorakit.errors import LorakitError

    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)i?B?", text.strip(), re.IGNORECASE)
    if found is None:
        raise LorakitError(f'serve: {option} was given as "{text}"; a size is a number with K, M or G, such as 2G.')
    return int(float(found[1]) * _UNITS[found[2].upper()])
