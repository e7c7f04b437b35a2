"""`lorakit serve`: a base model and a folder of adapters behind OpenAI's API."""

from __future__ import annotations

import contextlib
import inspect
import os
import re
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorakit.cli.screen import err, show_log

if TYPE_CHECKING:
    from lorakit.serve.http.front import Front
    from lorakit.serve.request import Engine

HELP = "Serve a base model and a folder of adapters over HTTP with OpenAI's API."

LOOPBACK = ("127.0.0.1", "localhost", "::1")
SHOWN = 20
LAST = 10.0
"""Seconds beyond the grace after which a process that was told to end is ended, whatever still hangs in it."""
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}


@dataclass(frozen=True)
class Settings:
    """What `lorakit serve` is asked for; each field is a flag."""

    base: Annotated[str, typer.Argument(help="The base model: a hub name, a local folder or a GGUF file.")]
    adapters: Annotated[
        Path | None,
        typer.Option("--adapters", "-a", help="A folder of adapter folders; requests name one as their model."),
    ] = None
    keys: Annotated[Path | None, typer.Option(help="The file of API keys that `lorakit keys` makes.")] = None
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1"
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port; 0 takes a free one.")] = 8000
    name: Annotated[str, typer.Option(help="What requests call the base model; default: its own name.")] = ""
    memory: Annotated[str, typer.Option(help="Memory for adapters, such as 2G or 500M.")] = "2G"
    cache: Annotated[str, typer.Option(help="Memory for the key-value cache, such as 2G or 500M.")] = "2G"
    batch: Annotated[int, typer.Option(min=1, help="Batch size: requests that run at once.")] = 32
    queue: Annotated[int, typer.Option(min=1, help="Waiting requests at most; further ones are answered 429.")] = 1024
    context: Annotated[
        int | None, typer.Option(min=2, help="Tokens of prompt and answer together; default: the model's.")
    ] = None
    formless: Annotated[
        str,
        typer.Option(help="Adapters that cannot be batched: alone (by forwards of their own), refuse, dense or svd."),
    ] = "alone"
    pin: Annotated[list[str] | None, typer.Option(help="An adapter to keep in memory; may be repeated.")] = None
    max_prompt: Annotated[int | None, typer.Option(min=1, help="Tokens of a prompt at most.")] = None
    max_output: Annotated[int | None, typer.Option(min=1, help="Tokens of an answer at most.")] = None
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds until an answer must be complete.")] = 600.0
    grace: Annotated[float, typer.Option(min=1, help="Seconds for running answers after SIGTERM.")] = 30.0
    dtype: Annotated[str, typer.Option(help="Precision of the base model: auto, bf16, fp32.")] = "auto"
    quantize: Annotated[
        str | None, typer.Option(help="Quantise the base: q8_0, q4_0 (multiplied as they are), nf4, int8, ...")
    ] = None
    engine: Annotated[str, typer.Option(help="The engine: lorakit, or vllm where it is installed.")] = "lorakit"
    cluster: Annotated[int, typer.Option(min=0, help="Replicas on Ray Serve; 0 serves from this process.")] = 0
    cluster_max: Annotated[
        int, typer.Option(min=0, help="Scale up to this many replicas under load; 0: always --cluster.")
    ] = 0

    @property
    def store(self) -> Path | None:
        """The folder of adapters."""
        return None if self.adapters is None else self.adapters.expanduser()

    @property
    def outside(self) -> bool:
        """Whether other machines can reach the server."""
        return self.host not in LOOPBACK

    def limits(self) -> dict[str, Any]:
        """The fields of the engine's `Limits`."""
        return {
            "batch": self.batch,
            "step_tokens": max(512, self.batch),
            "queue": self.queue,
            "cache_bytes": read_size(self.cache, "--cache"),
            "adapter_bytes": read_size(self.memory, "--memory"),
            "context": self.context,
        }


def serve(**given: Any) -> None:
    """Load, say what is there, and serve until SIGTERM."""
    from lorakit.errors import LorakitError, unknown

    settings = Settings(**given)
    show_log(err)
    if settings.engine not in ("lorakit", "vllm"):
        raise unknown("engine", settings.engine, ["lorakit", "vllm"])
    if settings.store is not None and not settings.store.is_dir():
        raise LorakitError(
            f"serve: --adapters {settings.adapters} is not a folder; give one whose folders are adapters."
        )
    try:
        from lorakit.serve.http.front import Bounds, Front
        from lorakit.serve.http.server import run
        from lorakit.serve.http.tenants import Tenants
    except ModuleNotFoundError as missing:
        raise LorakitError(f'serve: {missing.name} is not installed: pip install "lorakit[serve]".') from missing

    tenants = Tenants(None if settings.keys is None else settings.keys.expanduser())  # before anything that takes long
    began = time.monotonic()
    engine, tokenizer = start(settings)
    front = Front(
        engine,
        tokenizer,
        store=settings.store,
        name=settings.name or model_name(settings.base),
        also=frozenset() if Path(settings.base).expanduser().exists() else frozenset({settings.base}),
        tenants=tenants,
        bounds=Bounds(prompt=settings.max_prompt, output=settings.max_output, seconds=settings.timeout),
        admin=not (tenants.open and settings.outside),
        # without keys, a web page could have a browser on this machine send requests here under a name of its own
        hosts=frozenset({*LOOPBACK, "[::1]"}) if tenants.open and not settings.outside else frozenset(),
    )
    for one in settings.pin or ():
        engine.adapters.pin(one)
    introduce(front, settings.store)
    if tenants.open:
        reach = f"anyone who can reach {settings.host}" if settings.outside else "anyone on this machine"
        admin = "; the admin endpoints are closed" if settings.outside else ", the admin endpoints included"
        err.print(f"no --keys: {reach} may use this server{admin}.", style="bold yellow", markup=False)

    def started(url: str) -> None:
        from lorakit.serve.http.logs import log_to

        err.print(f"serving on {url}/v1 after {time.monotonic() - began:.1f} s; SIGTERM stops it", markup=False)
        log_to(sys.stdout)

    def ending() -> None:
        end = threading.Timer(settings.grace + LAST, os._exit, [1])
        end.daemon = True
        end.start()

    run(front, settings.host, settings.port, settings.grace, started, ending)
    err.print("stopped", markup=False)


serve.__signature__ = inspect.signature(Settings, eval_str=True)  # type: ignore[attr-defined]
serve.__annotations__ = {name: one.annotation for name, one in serve.__signature__.parameters.items()}  # type: ignore[attr-defined]


def start(settings: Settings) -> tuple[Engine, Any]:
    """The engine that was asked for, running, and the base model's tokenizer."""
    base, limits = settings.base, settings.limits()
    if settings.quantize and (settings.cluster or settings.engine == "vllm"):
        from lorakit.errors import LorakitError

        other = "--cluster" if settings.cluster else "--engine vllm"
        raise LorakitError(
            f"serve: --quantize {settings.quantize} is for lorakit's own engine; leave it or {other} out."
        )
    if settings.engine == "vllm":
        from lorakit.serve.remote.vllm import VllmEngine

        remote = VllmEngine.over(base, settings.store, limits, cut=settings.formless == "svd")
        remote.start()
        return remote, remote.tokenizer
    if settings.cluster:
        from lorakit.models.loading import load_tokenizer
        from lorakit.serve.remote.cluster import ClusterEngine

        with err.status(f"starting {settings.cluster} replicas"):
            replicas = ClusterEngine(
                base,
                settings.store,
                settings.cluster,
                most=settings.cluster_max,
                dtype=settings.dtype,
                formless=settings.formless,
                limits=limits,
            )
            replicas.start()
        return replicas, load_tokenizer(base, {})
    from lorakit.models.loading import load_model
    from lorakit.models.quantisation import for_serving
    from lorakit.serve.engine.engine import LocalEngine
    from lorakit.serve.engine.scheduler import Limits

    with err.status(f"loading {base}"):
        model, tokenizer = load_model(base, dtype=settings.dtype, quantize=for_serving(settings.quantize))
        local = LocalEngine(model, settings.store, Limits(**limits), formless=settings.formless)  # type: ignore[arg-type]
        local.start()
    return local, tokenizer


def introduce(front: Front, store: Path | None) -> None:
    """A line for the base and for each adapter, from its folder's configuration alone."""
    names = [name for name in front.engine.adapters.names() if name not in front.reserved]
    err.print(
        f"{front.name}: {front.engine.context:,} tokens, {len(names)} adapter{'s' * (len(names) != 1)}", markup=False
    )
    width = max((len(one) for one in names[:SHOWN]), default=0)
    for one in names[:SHOWN]:
        err.print(f"  {one.ljust(width)}  {describe(store / one) if store else ''}", markup=False)
    if len(names) > SHOWN:
        err.print(f"  and {len(names) - SHOWN} more", markup=False)


def describe(folder: Path) -> str:
    """An adapter in a few words, or what is wrong with it."""
    from lorakit.errors import LorakitError
    from lorakit.files import store
    from lorakit.serve.limits import check_files, without_path

    try:
        check_files(folder)
        config = store.read_config(folder)
    except LorakitError as problem:
        return f"unusable: {without_path(str(problem), folder)}"
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
        raise LorakitError(f'serve: {option} was given as "{text}"; give a number with K, M or G, such as 2G.')
    return int(float(found[1]) * _UNITS[found[2].upper()])
