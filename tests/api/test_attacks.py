"""What must not get through: names that are paths, bodies that are too long, too slow or too strange, clients that stall or
leave, failures inside; and that the server serves on after each."""

from __future__ import annotations

import http.client
import json
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest

from api.conftest import Served
from api.stub import StubEngine
from lorakit.serve.http.front import Bounds
from lorakit.serve.http.tenants import Tenants

Serve = Callable[..., Served]


def raw(served: Served, body: bytes, path: str = "/v1/completions", **headers: str) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=20)
    connection.request("POST", path, body, {"Content-Type": "application/json", **headers})
    answer = connection.getresponse()
    read = answer.read()
    connection.close()
    return answer.status, json.loads(read) if read else None


def works(served: Served) -> bool:
    return bool(served.client().completions.create(model="tiny", prompt="x", max_tokens=2).choices[0].text)


ESCAPES = [
    "../sql", "./sql", "sql/../law", "/etc/passwd", "sql\x00", "..", ".", "~", "C:\\x", "\\\\host\\share", "a" * 200,
    "file:///etc/passwd", "https://example.invalid/adapter", "user/repository", "%2e%2e%2fsql", "sql\n", "s3://x", "${HOME}",
]  # fmt: skip


@pytest.mark.parametrize("name", ESCAPES)
def test_names_resolve_in_the_store_alone(shared: Served, name: str) -> None:
    asked = len(shared.engine.tickets)
    status, body = raw(shared, json.dumps({"model": name, "prompt": "x"}).encode())
    assert (status, body["error"]["code"]) == (404, "model_not_found")
    status, body = raw(shared, json.dumps({"model": "base", "prompt": "x", "adapters": {name: 1.0}}).encode())
    assert (status, body["error"]["code"]) == (404, "model_not_found")
    from urllib.parse import quote

    status, body = raw(shared, b"", "/admin/adapters/" + quote(name, safe="") + "/load")
    assert status in (404, 405), body
    assert len(shared.engine.tickets) == asked
    assert sorted(shared.engine.adapters.known) == ["law", "sql"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"x"',
        b"[" * 200_000,
        b'{"model": "tiny", "prompt": "x", "temperature": NaN}',
        b'{"model": "tiny", "prompt": "x", "temperature": Infinity}',
        b'{"model": "base", "prompt": "x", "adapters": {"sql": 1e999}}',
        b'{"model": "tiny", "prompt": "x", "max_tokens": ' + b"9" * 6000 + b"}",
        b'{"model": "tiny", "prompt": "\\ud800"}',
        b'{"model": "\\ud800", "prompt": "x"}',
        b'{"model": "tiny", "prompt": []}',
        b'{"model": "tiny", "prompt": [[]]}',
        b'{"model": "tiny", "prompt": ""}',
        b'{"model": "tiny", "prompt": [1, "x"]}',
        b'{"model": "tiny", "prompt": [100000]}',
        b'{"model": "tiny", "prompt": [-1]}',
        b'{"model": "tiny", "prompt": "x", "n": "2"}',
        b'{"model": "tiny", "prompt": "x", "stream": 1}',
        b'{"model": "tiny", "prompt": "x", "\\ud800": 1}',
        b'{"model": "tiny", "prompt": "x", "stop": ["a","b","c","d","e","f","g","h","i","j","k","l","m","n","o","p","q"]}',
        b"\xff\xfe\x00",
    ],
    ids=lambda body: body[-40:].decode("latin-1"),
)
def test_strange_bodies_are_400_in_openais_shape(shared: Served, body: bytes) -> None:
    status, answer = raw(shared, body)
    assert status == 400, answer
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert answer["error"]["type"] == "invalid_request_error"


def test_a_body_that_is_no_json_by_its_type_is_refused(shared: Served) -> None:
    """What a web page may send to this machine without being asked has another type."""
    body = json.dumps({"model": "tiny", "prompt": "x"}).encode()
    assert raw(shared, body, **{"Content-Type": "text/plain"})[0] == 400


def test_oversize_bodies_said_and_unsaid(serve: Serve) -> None:
    served = serve(StubEngine(), bounds=Bounds(body=10_000))
    body = json.dumps({"model": "tiny", "prompt": "x" * 20_000}).encode()
    status, answer = raw(served, body)
    assert (status, answer["error"]["code"]) == (413, "body_too_large")
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=20)
    pieces = (b"x" * 1000 for _ in range(30))  # chunked: no length is said beforehand
    connection.request("POST", "/v1/completions", pieces, {"Content-Type": "application/json"}, encode_chunked=True)
    assert connection.getresponse().status == 413
    assert not served.engine.tickets
    assert works(served)


def test_prompts_and_answers_have_their_limits(serve: Serve) -> None:
    served = serve(StubEngine(context=300), bounds=Bounds(prompt=50, output=20, answers=4))
    client = served.client()
    for options, words in (
        ({"prompt": "x" * 51}, "50"),
        ({"prompt": "x" * 30_000}, "characters"),
        ({"prompt": "x", "max_tokens": 21}, "20 at most"),
        ({"prompt": ["x"] * 5}, "4 in one request"),
        ({"prompt": ["x", "y"], "n": 3}, "4 in one request"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(**{"model": "tiny", **options})  # type: ignore[call-overload]
        assert words in caught.value.message
    assert not served.engine.tickets


def test_slow_headers_and_slow_bodies_are_given_up(serve: Serve) -> None:
    served = serve(StubEngine(), bounds=Bounds(upload=0.3))
    with socket.create_connection(("127.0.0.1", served.port), timeout=10) as silent:
        silent.sendall(b"POST /v1/comple")
        assert silent.recv(100) == b"", "the connection is closed"
    with socket.create_connection(("127.0.0.1", served.port), timeout=10) as slow:
        head = (
            "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
        )
        slow.sendall(head.encode())
        answer = b""
        while piece := slow.recv(4096):
            answer += piece
        assert answer.startswith(b"HTTP/1.1 408")
        assert b'"slow_body"' in answer
    assert works(served)


def stream_from(served: Served, **options: Any) -> socket.socket:
    """A client that has sent a request for a stream and reads nothing of it."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(("127.0.0.1", served.port))
    body = json.dumps({"model": "tiny", "prompt": "x", "stream": True, **options}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    client.sendall(head.encode() + body)
    return client


def until(holds: Callable[[], bool]) -> None:
    for _ in range(2000):
        if holds():
            return
        time.sleep(0.005)
    pytest.fail("it never came to be")


def test_a_stream_left_unread_is_cancelled(serve: Serve) -> None:
    engine = StubEngine(context=200_000)
    engine.answer = lambda request: [70] * request.sampling.max_tokens
    served = serve(engine, bounds=Bounds(stall=0.3))
    with stream_from(served, max_tokens=100_000, logprobs=20):
        until(lambda: bool(engine.tickets) and engine.tickets[0].cancelled)
        assert engine.tickets[0].result(timeout=10)[-1].finish == "cancelled"
    assert works(served)


@pytest.mark.parametrize("begun", [True, False])
def test_a_client_that_leaves_cancels_its_request(serve: Serve, begun: bool) -> None:
    engine = StubEngine(context=200_000, pause=0.01)
    served = serve(engine)
    if not begun:
        engine.held.set()
    client = stream_from(served, max_tokens=100_000)
    if begun:
        assert client.recv(10)
    else:
        until(lambda: bool(engine.tickets))
    client.close()
    until(lambda: engine.tickets[0].cancelled)
    assert engine.tickets[0].result(timeout=10)[-1].finish == "cancelled"
    engine.held.clear()
    assert works(served)


def test_what_the_engine_says_is_answered_with_its_status(serve: Serve) -> None:
    engine = StubEngine(["sql"], bad={"broken": "broken: rank 3 of q_proj does not fit"})
    served = serve(engine, bounds=Bounds(seconds=0.2))
    client = served.client()
    for stream in (False, True):  # a stream too begins with a status, as nothing was sent before the failure
        with pytest.raises(openai.BadRequestError, match="rank 3"):
            client.completions.create(model="broken", prompt="x", stream=stream)
        engine.held.set()
        with pytest.raises(openai.APIStatusError) as timeout:
            client.completions.create(model="sql", prompt="x", stream=stream)
        engine.held.clear()
        assert timeout.value.status_code == 504
        engine.limit = 0
        with pytest.raises(openai.RateLimitError) as overloaded:
            client.completions.create(model="sql", prompt="x", stream=stream)
        assert overloaded.value.response.headers["Retry-After"] == "3"
        engine.limit = 64
        engine.fails = "out of memory"
        with pytest.raises(openai.InternalServerError, match="out of memory"):
            client.completions.create(model="sql", prompt="x", stream=stream)
        engine.fails = ""
        assert works(served)


def test_of_several_answers_all_are_taken_or_none(serve: Serve) -> None:
    engine = StubEngine()
    engine.limit = 3
    served = serve(engine)
    engine.held.set()
    with pytest.raises(openai.RateLimitError):
        served.client().completions.create(model="tiny", prompt="x", n=4)
    assert [ticket.result(timeout=5)[-1].finish for ticket in engine.tickets] == ["cancelled"] * 3


def test_a_failure_in_the_middle_of_a_stream_is_an_error_event(serve: Serve) -> None:
    engine = StubEngine(context=10_000, pause=0.005)
    served = serve(engine)
    stream = served.client().completions.create(model="tiny", prompt="x", max_tokens=5000, stream=True)
    next(iter(stream))
    engine.fails = "a worker died"
    with pytest.raises(openai.APIError, match="a worker died"):
        list(stream)
    engine.fails = ""
    assert works(served)


def test_an_exception_inside_says_nothing_of_the_inside(serve: Serve, caplog: Any) -> None:
    engine = StubEngine()
    served = serve(engine)
    engine.answer = lambda request: (_ for _ in ()).throw(RuntimeError("secret detail"))  # type: ignore[assignment,return-value]
    with pytest.raises(openai.InternalServerError) as caught:
        works(served)
    assert "secret" not in caught.value.message
    end = time.monotonic() + 5
    while "secret detail" not in caplog.text and time.monotonic() < end:
        time.sleep(0.01)  # the client has its answer before the server's own log has the story
    assert "secret detail" in caplog.text
    engine.answer = lambda request: [70]
    assert works(served)


def test_other_hosts_and_open_admin(serve: Serve) -> None:
    served = serve(StubEngine(), hosts=frozenset({"127.0.0.1", "localhost"}), admin=False)
    assert works(served)
    status, answer = raw(served, b"{}", Host="evil.example")
    assert (status, answer["error"]["code"]) == (421, "wrong_host")
    status, answer = raw(served, b"", "/admin/adapters/sql/load")
    assert (status, answer["error"]["code"]) == (403, "admin_closed")
    assert "--keys" in answer["error"]["message"]


def test_unknown_endpoints_and_methods(shared: Served) -> None:
    assert raw(shared, b"", "/v1/nothing")[1]["error"]["code"] == "no_such_endpoint"
    connection = http.client.HTTPConnection("127.0.0.1", shared.port)
    connection.request("DELETE", "/v1/models")
    answer = connection.getresponse()
    assert answer.status == 405
    assert json.loads(answer.read())["error"]["type"] == "invalid_request_error"
    connection.close()


def test_request_ids_come_back_and_strange_ones_do_not(shared: Served) -> None:
    for given, kept in (("abc-1", True), ("a\tb", False), ("x" * 500, False)):
        connection = http.client.HTTPConnection("127.0.0.1", shared.port)
        connection.request("GET", "/health", headers={"X-Request-Id": given})
        found = connection.getresponse().getheader("X-Request-Id")
        assert found
        assert (found == given) == kept
        connection.close()


def test_a_missing_file_of_keys_is_no_open_server(tmp_path: Path) -> None:
    from lorakit.errors import LorakitError

    with pytest.raises(LorakitError, match="lorakit keys"):
        Tenants(tmp_path / "keys.yaml")
