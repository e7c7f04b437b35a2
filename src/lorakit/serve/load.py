"""A load of requests against a running server, and what came of it: tokens per second, times, errors.

The four popularities are those by which multi-adapter servers are compared (Punica, arXiv 2310.18547; S-LoRA, arXiv
2311.03285): how many adapters a load touches decides what the server can do with it.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from lorakit.errors import LorakitError, unknown

POPULARITIES: dict[str, str] = {
    "distinct": "every request another adapter, as far as there are enough",
    "uniform": "as many adapters as the root of the number of requests, all equally often",
    "zipf": "all adapters, the k-th most popular with a share of 1 / k^1.5",
    "identical": "one adapter",
    "base": "the base model alone",
}


@dataclass(frozen=True)
class Load:
    """What is asked.

    Attributes:
        url: of the server, such as http://127.0.0.1:8000.
        key: an API key, where the server needs one.
        requests: how many.
        concurrent: how many at once; a new one starts when one ends.
        prompt: tokens of a prompt; random ids, so that no two prompts begin alike.
        answer: tokens of an answer, which goes on after the model's own end.
        seed: of prompts and adapters.
    """

    url: str
    key: str = ""
    requests: int = 64
    concurrent: int = 32
    prompt: int = 64
    answer: int = 64
    seed: int = 0


@dataclass
class Sample:
    """One request: the model that was asked, seconds to its first token and to its end, tokens, and what went wrong."""

    model: str
    first: float = math.nan
    total: float = math.nan
    tokens: int = 0
    error: str = ""

    @property
    def token_time(self) -> float:
        """Seconds between two tokens of the answer, on average."""
        return (self.total - self.first) / max(1, self.tokens - 1)


@dataclass(frozen=True)
class Outcome:
    """What came of a load."""

    popularity: str
    seconds: float
    samples: Sequence[Sample] = field(repr=False)

    @property
    def good(self) -> list[Sample]:
        """The requests that were answered."""
        return [one for one in self.samples if not one.error]

    @property
    def distinct(self) -> int:
        """How many models were asked."""
        return len({one.model for one in self.samples})

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens of all answers over the time from the first request to the last answer."""
        return sum(one.tokens for one in self.good) / self.seconds

    @staticmethod
    def quantile(share: float, seconds: Sequence[float]) -> float:
        """The milliseconds that this share of the answers stays within."""
        place = min(len(seconds) - 1, int(share * len(seconds)))
        return round(1000 * sorted(seconds)[place], 1) if seconds else math.nan

    def row(self) -> dict[str, float | int | str]:
        """The outcome in numbers, for tables and files; times in milliseconds."""
        return {
            "popularity": self.popularity,
            "requests": len(self.samples),
            "errors": len(self.samples) - len(self.good),
            "distinct": self.distinct,
            "tokens_per_second": round(self.tokens_per_second, 1),
            "first_p50_ms": self.quantile(0.5, [one.first for one in self.good]),
            "first_p95_ms": self.quantile(0.95, [one.first for one in self.good]),
            "token_p50_ms": self.quantile(0.5, [one.token_time for one in self.good]),
            "total_p95_ms": self.quantile(0.95, [one.total for one in self.good]),
        }


def check_popularity(popularity: str) -> None:
    """LorakitError for a name that is none of the popularities."""
    if popularity != "base" and popularity not in POPULARITIES:
        raise unknown("popularity", popularity, ["base", *(name for name in POPULARITIES if name != "base")])


def choose(popularity: str, adapters: Sequence[str], count: int, rng: random.Random) -> list[str]:
    """Which model each of `count` requests asks for.

    Raises:
        LorakitError: a popularity that is not known, or one that needs adapters where there are none.
    """
    if popularity == "base":
        return ["base"] * count
    check_popularity(popularity)
    if not adapters:
        raise LorakitError(f'bench-serve: the server has no adapters, which "{popularity}" needs; "base" does not.')
    match popularity:
        case "distinct":
            return [adapters[index % len(adapters)] for index in range(count)]
        case "uniform":
            few = adapters[: max(1, math.isqrt(count))]
            return [few[index % len(few)] for index in range(count)]
        case "zipf":
            return rng.choices(adapters, [1 / (rank + 1) ** 1.5 for rank in range(len(adapters))], k=count)
    return [adapters[0]] * count


async def drive(load: Load, popularity: str, done: Callable[[Sample], None] = lambda sample: None) -> Outcome:
    """Run one load to its end. `done` is told of every request that ends."""
    rng = random.Random(load.seed)
    models = choose(popularity, await adapters_of(load), load.requests, rng)
    prompts = [[rng.randrange(50, 250) for _ in range(load.prompt)] for _ in models]
    left = list(zip(models, prompts, strict=True))[::-1]
    samples: list[Sample] = []

    async def worker() -> None:
        while left:
            model, prompt = left.pop()
            sample = await ask(load, model, prompt)
            samples.append(sample)
            done(sample)

    began = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(load.concurrent)))
    return Outcome(popularity, time.perf_counter() - began, samples)


async def ask(load: Load, model: str, prompt: Sequence[int]) -> Sample:
    """One request, streamed; whatever goes wrong is in the sample."""
    body = {
        "model": model, "prompt": list(prompt), "max_tokens": load.answer, "temperature": 0, "ignore_eos": True,
        "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    sample = Sample(model)
    began = time.perf_counter()
    try:
        async for event in events(load, "/v1/completions", body):
            if "error" in event:
                raise LorakitError(str(event["error"]["message"]))
            if event.get("choices") and math.isnan(sample.first):
                sample.first = time.perf_counter() - began
            if event.get("usage"):
                sample.tokens = event["usage"]["completion_tokens"]
        sample.total = time.perf_counter() - began
        if sample.tokens == 0:
            sample.error = "the stream ended early"
    except (OSError, LorakitError, asyncio.IncompleteReadError, ValueError) as problem:
        sample.error = f"{type(problem).__name__}: {problem}"
    return sample


async def adapters_of(load: Load) -> list[str]:
    """The adapters that the server offers this key."""
    try:
        found = [event async for event in events(load, "/v1/models", None)]
    except OSError as problem:
        raise LorakitError(
            f"bench-serve: {load.url} does not answer ({problem}). Is `lorakit serve` running?"
        ) from None
    if not found or "data" not in found[0]:
        raise LorakitError(f"bench-serve: {load.url}/v1/models answered {found}; is a key missing (--key)?")
    return [one["id"] for one in found[0]["data"] if one.get("parent")]


# -- HTTP ----------------------------------------------------------------------------------------------------------------------


async def events(load: Load, path: str, body: object | None) -> AsyncIterator[dict[str, Any]]:
    """The JSON objects of an answer: those of its events, or the one that it is.

    Plain HTTP/1.1 over asyncio's streams: the load generator should cost next to nothing compared with the server.
    """
    place = urlsplit(load.url)
    reader, writer = await asyncio.open_connection(place.hostname, place.port or 80)
    try:
        data = b"" if body is None else json.dumps(body).encode()
        head = [
            f"{'GET' if body is None else 'POST'} {path} HTTP/1.1",
            f"Host: {place.hostname}",
            "Connection: close",
            *([f"Authorization: Bearer {load.key}"] if load.key else []),
            *([] if body is None else ["Content-Type: application/json", f"Content-Length: {len(data)}"]),
        ]
        writer.write("\r\n".join([*head, "", ""]).encode() + data)
        await writer.drain()
        headers = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        pieces = _chunks(reader) if "transfer-encoding: chunked" in headers else _rest(reader)
        if "text/event-stream" not in headers:
            whole = b"".join([piece async for piece in pieces])
            yield json.loads(whole)
            return
        buffer = b""
        async for piece in pieces:
            buffer += piece
            *complete, buffer = buffer.split(b"\n\n")
            for event in complete:
                text = event.removeprefix(b"data: ")
                if text != b"[DONE]":
                    yield json.loads(text)
    finally:
        writer.close()


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while size := int(await reader.readline(), 16):
        yield (await reader.readexactly(size + 2))[:-2]


async def _rest(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    yield await reader.read()
