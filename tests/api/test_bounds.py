"""What a request may cost before it is refused, what a connection may hold, and whose prompts are whose."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from api.conftest import Served
from api.stub import StubEngine
from lorakit.serve.http import server as http_server
from lorakit.serve.http.front import Bounds
from lorakit.serve.http.tenants import Tenant, Tenants, add_key
from lorakit.serve.http.text import limited

Serve = Callable[..., Served]


def raw(served: Served, data: bytes, wait: float = 3.0) -> bytes:
    """What the server answers to these bytes, until it closes or is silent."""
    found = b""
    with socket.create_connection(("127.0.0.1", served.port)) as connection:
        connection.settimeout(wait)
        try:
            connection.sendall(data)
            while piece := connection.recv(65536):
                found += piece
        except (TimeoutError, ConnectionError):
            pass
    return found


GET = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"


# -- headers and connections -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [b"", GET + b"\r\n"], ids=["first", "second request"])
@pytest.mark.parametrize(
    "head",
    [
        GET + b"X: " + b"a" * 80_000,
        GET + b"a:b\r\n" * 200 + b"\r\n",
        GET + b"a:b\r\n" * 40_000,
        b"GET /" + b"a" * 80_000 + b" HTTP/1.1\r\n\r\n",
        GET + b"X: " + b"a" * 70_000 + b"\r\n\r\n",
    ],
    ids=["an endless field", "many fields", "endless fields", "an endless path", "a long field that ends"],
)
def test_what_comes_before_a_body_has_a_size(shared: Served, before: bytes, head: bytes) -> None:
    answers = raw(shared, before + head)
    assert answers.count(b"HTTP/1.1 200") <= bool(before)
    # a connection that is closed while its client still sends may be reset before the client reads why
    assert answers.count(b"HTTP/1.1") == bool(before) + answers.count(b"HTTP/1.1 431") or not answers
    assert raw(shared, GET + b"Connection: close\r\n\r\n").startswith(b"HTTP/1.1 200")


def test_headers_and_bodies_of_a_usual_size_pass_however_they_are_cut(shared: Served) -> None:
    body = json.dumps({"model": "sql", "prompt": "x" * 90_000, "max_tokens": 1}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += b"X: " + b"a" * 30_000 + b"\r\nContent-Length: %d\r\n\r\n" % len(body)
    with socket.create_connection(("127.0.0.1", shared.port)) as connection:
        for _ in range(2):
            for start in range(0, len(head + body), 1000):
                connection.sendall((head + body)[start : start + 1000])
            answer = b""
            while not answer.endswith(b"}}") and (piece := connection.recv(65536)):
                answer += piece
            assert b"context_length_exceeded" in answer  # read whole, and refused for what it says


def test_headers_have_their_time_also_on_a_connection_that_was_used(serve: Serve) -> None:
    served = serve(bounds=Bounds(upload=0.4))
    with socket.create_connection(("127.0.0.1", served.port)) as connection:
        connection.sendall(GET + b"\r\n")
        assert connection.recv(4096).startswith(b"HTTP/1.1 200")
        time.sleep(0.6)  # between two requests it may be idle for longer
        began = time.monotonic()
        connection.sendall(GET + b"X-Slow: ")
        connection.settimeout(0.05)
        gone = False
        while not gone and time.monotonic() - began < 10:
            try:
                connection.sendall(b"a")
                gone = connection.recv(10) == b""
            except TimeoutError:
                continue
            except OSError:
                gone = True
        assert gone
        assert 0.3 < time.monotonic() - began < 8


def test_idle_connections_cannot_take_the_last_place(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "CONNECTIONS", 12)
    served = serve(StubEngine(pause=0.05))
    busy = socket.create_connection(("127.0.0.1", served.port))
    body = b'{"model":"sql","prompt":"x","max_tokens":40,"stream":true,"ignore_eos":true}'
    busy.sendall(
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n" % len(body) + body
    )
    assert busy.recv(4096).startswith(b"HTTP/1.1 200")
    idle = [socket.create_connection(("127.0.0.1", served.port)) for _ in range(40)]
    time.sleep(0.2)
    for _ in range(3):
        assert raw(served, GET + b"Connection: close\r\n\r\n").startswith(b"HTTP/1.1 200")
    told = b""
    busy.settimeout(10)
    while b"[DONE]" not in told and (piece := busy.recv(65536)):
        told += piece
    assert b"[DONE]" in told  # who is being answered is left alone
    for one in [busy, *idle]:
        one.close()


# -- bodies ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b'{"model":"sql","prompt":[' + b'"a",' * 150_000 + b'"a"]}', "prompt"),
        (b'{"model":"sql","prompt":[' + b"[1]," * 150_000 + b"[1]]}", "prompt"),
        (b'{"model":"sql","prompt":["a","b","c"],"n":20}', "n"),
        (b'{"model":"sql","messages":[' + b"1," * 300_000 + b"1]}", "messages.0"),
    ],
    ids=["texts", "ids", "n", "messages"],
)
def test_counts_are_looked_at_before_anything_dear(
    shared: Served, chunked: bool, body: bytes, param: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    monkeypatch.setattr("lorakit.serve.http.api.encode_prompt", lambda *_: read.append(1))
    path = "chat/completions" if b"messages" in body else "completions"
    content: Any = iter([body[:300_000], body[300_000:]]) if chunked else body
    answer = httpx.post(
        f"{shared.url}/v1/{path}", content=content, headers={"Content-Type": "application/json"}, timeout=60
    )
    assert answer.status_code == 400, answer.text[:300]
    assert answer.json()["error"]["param"] == param
    assert read == []


def test_a_long_body_without_a_stated_length_is_read_beside_the_loop(shared: Served, monkeypatch: Any) -> None:
    where: list[str] = []

    def encode(prompter: Any, prompt: str, window: int) -> list[int]:
        where.append(threading.current_thread().name)
        return [65]

    monkeypatch.setattr("lorakit.serve.http.api.encode_prompt", encode)
    body = json.dumps({"model": "base", "prompt": "x" * 30_000, "max_tokens": 1}).encode()
    headers = {"Content-Type": "application/json"}
    for content in (body, iter([body[:10_000], body[10_000:]])):
        answer = httpx.post(f"{shared.url}/v1/completions", content=content, headers=headers, timeout=60)
        assert answer.status_code == 200, answer.text
    assert all(name.startswith("AnyIO") for name in where), where


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_completion_tokens"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"),
        ({"min_tokens": 20, "max_tokens": 10}, "min_tokens"),
        ({"max_tokens": 10_000}, "max_tokens"),
        ({"logit_bias": {"999999": 1}}, "logit_bias"),
        ({"model": "nobody"}, "model"),
        ({"adapters": {"nobody": 1.0}, "model": "base"}, "adapters.nobody"),
        ({"adapters": {"sql": 5000.0}, "model": "base"}, "adapters.sql"),
        ({"cache_salt": ""}, "cache_salt"),
        ({"temperature": 3}, "temperature"),
    ],
    ids=str,
)
def test_every_refusal_names_its_parameter(shared: Served, body: dict[str, Any], param: str) -> None:
    asked = {"model": "sql", "messages": [{"role": "user", "content": "x"}]} | body
    answer = httpx.post(f"{shared.url}/v1/chat/completions", json=asked, timeout=60)
    assert answer.status_code in (400, 404), answer.text
    assert answer.json()["error"]["param"] == param, answer.text


def test_a_template_that_does_not_end_is_given_up() -> None:
    import jinja2.sandbox

    # ranges of ranges: each is allowed, together they run for years
    rounds = "".join(f"{{% for x{n} in range(9999) %}}" for n in range(4))
    template = jinja2.sandbox.ImmutableSandboxedEnvironment().from_string(rounds + "x" + "{% endfor %}" * 4)
    began = time.monotonic()
    with pytest.raises(TimeoutError, match="takes more than"):
        limited(0.2, template.render)
    assert time.monotonic() - began < 10
    assert limited(5, lambda: 3) == 3


# -- health ------------------------------------------------------------------------------------------------------------------


def test_health_fails_with_the_engine(serve: Serve) -> None:
    served = serve()
    assert httpx.get(f"{served.url}/health").status_code == 200
    served.engine.failure = "planted"  # type: ignore[misc]
    answer = httpx.get(f"{served.url}/health")
    assert answer.status_code == 503
    assert "planted" not in answer.text


def test_a_process_whose_engine_gave_up_ends(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from lorakit.errors import LorakitError
    from lorakit.serve.http.front import Front

    monkeypatch.setattr("signal.signal", lambda *_: None)  # not the main thread
    engine = StubEngine()
    engine.start()
    front, told, ended = Front(engine, tokenizer), [], threading.Event()

    def serve() -> None:
        try:
            http_server.run(front, port=0, grace=1, started=told.append, ending=ended.set)
        except LorakitError as problem:
            told.append(str(problem))

    monkeypatch.setattr("uvicorn.Server.capture_signals", _nothing)
    monkeypatch.setattr("asyncio.unix_events._UnixSelectorEventLoop.add_signal_handler", lambda *_: None)
    thread = threading.Thread(target=serve)
    thread.start()
    until = time.monotonic() + 20
    while not told and time.monotonic() < until:
        time.sleep(0.01)
    engine.failure = "planted"
    thread.join(20)
    assert not thread.is_alive()
    assert ended.is_set()
    assert "the engine has given up: planted" in told[-1]


class _nothing:  # noqa: N801 - stands for a context manager
    def __init__(self, *_: Any) -> None: ...
    def __enter__(self) -> None: ...
    def __exit__(self, *_: Any) -> None: ...


# -- tenants -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def tenants(serve: Serve, tmp_path: Path) -> tuple[Served, dict[str, str]]:
    file = tmp_path / "keys.yaml"
    known = {
        "acme": Tenant("acme", adapters=("sql",), tokens_per_minute=200),
        "beta": Tenant("beta", adapters=("sql",), base=False),
        "one": Tenant("one", cache="shared"),
        "two": Tenant("two", cache="shared"),
    }
    made = {name: add_key(file, tenant) for name, tenant in known.items()}
    return serve(StubEngine(names=("sql", "law", "base", "tiny")), tenants=Tenants(file)), made


def _ask(served: Served, key: str, **body: Any) -> httpx.Response:
    asked = {"model": "sql", "prompt": "x", "max_tokens": 1} | body
    return httpx.post(
        f"{served.url}/v1/completions", json=asked, headers={"Authorization": f"Bearer {key}"}, timeout=60
    )


def test_pages_are_the_tenants_and_the_salts(tenants: tuple[Served, dict[str, str]]) -> None:
    served, key = tenants
    for name in key:
        for salt in ({}, {"cache_salt": "a"}):
            assert _ask(served, key[name], **salt).status_code == 200
    domains = [ticket.request.domain for ticket in served.engine.tickets]  # type: ignore[attr-defined]
    acme, acme_salted, beta, _, one, one_salted, two, two_salted = domains
    assert len({acme, acme_salted, beta, one, one_salted}) == 5
    assert (one, one_salted) == (two, two_salted)


def test_a_blend_of_nothing_is_the_base_for_rights(tenants: tuple[Served, dict[str, str]]) -> None:
    served, key = tenants
    for blend in ({"sql": 0.0}, {"sql": 1e-30}, {"sql": -0.0}):
        refused = _ask(served, key["beta"], model="base", adapters=blend)
        assert refused.status_code == 404, refused.text
        assert refused.json()["error"]["param"] == "adapters"
        assert _ask(served, key["one"], model="base", adapters=blend).status_code == 200
    assert _ask(served, key["beta"], model="base", adapters={"sql": 1.0, "law": 0.0}).status_code == 404
    assert _ask(served, key["beta"], model="base", adapters={"sql": 1.0}).status_code == 200
    assert served.engine.tickets[-1].request.blend == {"sql": 1.0}  # type: ignore[attr-defined]


def test_an_adapter_that_is_named_like_the_base_is_not_served(
    tenants: tuple[Served, dict[str, str]], caplog: pytest.LogCaptureFixture
) -> None:
    served, key = tenants
    listed = httpx.get(f"{served.url}/v1/models", headers={"Authorization": f"Bearer {key['one']}"}).json()["data"]
    assert sorted(one["id"] for one in listed) == ["law", "sql", "tiny"]
    assert next(one for one in listed if one["id"] == "tiny")["parent"] is None
    for name in ("base", "tiny"):
        assert _ask(served, key["one"], model=name).status_code == 200
        assert served.engine.tickets[-1].request.blend == {}  # type: ignore[attr-defined]


def test_quotas_set_aside_what_is_asked_for_and_give_back_the_rest(tenants: tuple[Served, dict[str, str]]) -> None:
    served, key = tenants
    engine: Any = served.engine
    engine.held.set()
    engine.answer = lambda request: [65] * 3 + [256]
    answers: list[httpx.Response] = []

    def ask() -> None:
        answers.append(_ask(served, key["acme"], max_tokens=150))

    threads = [threading.Thread(target=ask) for _ in range(12)]
    for thread in threads:
        thread.start()
    while len(answers) < 11:  # all but the one that is being answered
        time.sleep(0.01)
    engine.held.clear()
    for thread in threads:
        thread.join(20)
    statuses = sorted(answer.status_code for answer in answers)
    assert statuses == [200] + [429] * 11
    assert _ask(served, key["acme"], max_tokens=150).status_code == 200  # 146 of 150 came back


def test_the_files_of_an_adapter_are_looked_at_once_and_again_when_they_change(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[str] = []
    monkeypatch.setattr("lorakit.serve.http.front.check_files", lambda folder: looked.append(folder.name))
    (tmp_path / "sql").mkdir()
    (tmp_path / "sql" / "lorakit.json").write_text("{}")
    served = serve(store=tmp_path)
    for _ in range(3):
        assert _ask(served, "none").status_code == 200
    assert looked == ["sql"]
    (tmp_path / "sql" / "lorakit.json").write_text('{"prompt": {"stop": ["x"]}}')
    assert _ask(served, "none").status_code == 200
    assert looked == ["sql", "sql"]


def test_an_adapter_whose_files_are_refused_is_offered_no_more(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "sql").mkdir()
    (tmp_path / "sql" / "lorakit.json").write_text("[" * 100_000)
    served = serve(StubEngine(bad={"sql": "planted"}, names=("law",)), store=tmp_path)

    def offered() -> list[str]:
        return [one["id"] for one in httpx.get(f"{served.url}/v1/models").json()["data"]]

    assert offered() == ["tiny", "law", "sql"]
    for _ in range(2):
        refused = _ask(served, "none")
        assert refused.status_code == 400
        assert refused.json()["error"]["message"].startswith("adapter 'sql': ")
        assert str(tmp_path) not in refused.text
    assert offered() == ["tiny", "law"]
    assert httpx.get(f"{served.url}/v1/models").json()["refused"] == {"sql": "planted"}
