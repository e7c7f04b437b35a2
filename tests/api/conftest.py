"""A server on the loopback in a thread of this process, and clients for it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest

from api.stub import StubEngine, bytes_tokenizer
from lorakit.serve.http.api import build
from lorakit.serve.http.front import Front
from lorakit.serve.http.server import server_for


class Served:
    """A running server."""

    def __init__(self, front: Front, port: int) -> None:
        self.front, self.engine, self.port = front, front.engine, port
        self.url = f"http://127.0.0.1:{port}"

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url + "/v1", api_key=key, max_retries=0)

    def aclient(self, key: str = "none") -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=self.url + "/v1", api_key=key, max_retries=0)


@contextmanager
def running(front: Front) -> Iterator[Served]:
    """Serve until the block ends."""
    front.engine.start()
    server = server_for(build(front), front, "127.0.0.1", 0, grace=2)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    while not server.started:
        thread.join(0.005)
        assert thread.is_alive()
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield Served(front, port)
    finally:
        server.should_exit = True
        thread.join(10)
        front.engine.stop()


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return bytes_tokenizer()


@pytest.fixture
def serve(tokenizer: Any) -> Iterator[Callable[..., Served]]:
    """Start a server over a stub: `serve(engine, tenants=..., bounds=...)`; all are stopped after the test."""
    from contextlib import ExitStack

    with ExitStack() as stack:

        def start(engine: StubEngine | None = None, **options: Any) -> Served:
            front = Front(engine or StubEngine(), tokenizer, name="tiny", **options)
            return stack.enter_context(running(front))

        yield start


@pytest.fixture(scope="module")
def shared(tokenizer: Any) -> Iterator[Served]:
    """One open server for tests that leave nothing behind."""
    with running(Front(StubEngine(), tokenizer, name="tiny")) as served:
        yield served


@pytest.fixture
def keys(tmp_path: Path) -> Callable[[str], Path]:
    """Write a file of keys."""

    def write(text: str) -> Path:
        file = tmp_path / "keys.yaml"
        file.write_text(text)
        return file

    return write
