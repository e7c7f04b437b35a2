"""Keys, what they open, and what they may use up; on the file, on the ledger, and over HTTP."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from api.conftest import Served
from api.stub import StubEngine
from lorakit.errors import LorakitError
from lorakit.serve.http.faults import Fault
from lorakit.serve.http.tenants import Ledger, Tenant, Tenants, add_key, digest, make_key, read_tenants

Serve = Callable[..., Served]


class Clock:
    """Time that a test moves."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def ask(served: Served, key: str, model: str = "tiny", **options: Any) -> str:
    answer = served.client(key).completions.create(model=model, prompt="x", **{"max_tokens": 4, **options})
    return answer.choices[0].text


# -- the file ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["keys.yaml", "keys.json"])
def test_made_keys_open_and_the_file_holds_none(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    acme = add_key(file, Tenant("acme", adapters=("sql",), requests_per_minute=5))
    second = add_key(file, Tenant("acme"))  # a further key of the same tenant, whose limits stay
    root = add_key(file, Tenant("admin", admin=True))
    text = file.read_text()
    assert all(key not in text for key in (acme, second, root))
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    tenants = Tenants(file)
    for key in (acme, second):
        found = tenants.find(key)
        assert found is not None
        assert (found.name, found.adapters, found.requests_per_minute, found.admin) == ("acme", ("sql",), 5, False)
    admin = tenants.find(root)
    assert admin is not None
    assert admin.admin
    assert tenants.find(make_key()) is None
    assert tenants.find("") is None
    assert tenants.find(None) is None
    assert tenants.find(digest(acme)) is None, "a stolen file opens nothing"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("tenants: [{name: a, keys: [lk-secret]}]", "never a key"),
        ("tenants: [{name: a, quota: 3}]", 'unknown entry "quota"'),
        ("tenents: []", 'did you mean "tenants"'),
        ("tenants: [{keys: []}]", "no name"),
        ("tenants: [{name: a}, {name: a}]", "two tenants"),
        ("tenants: [{name: a, weight: 0}]", "weight"),
        ("tenants: [{name: a, concurrent: -1}]", "concurrent"),
        ("tenants: [{name: a, concurrent: true}]", "concurrent"),
        ("tenants: [{name: a, tokens_per_minute: 1.5}]", "tokens_per_minute"),
        ("tenants: [{name: a, base: 1}]", "true or false"),
        ("tenants: {a: 1}", "list of tenants"),
        ("- a", "object"),
        ("tenants: [", "is not YAML"),
        (f"tenants: [{{name: a, keys: ['{digest('k')}']}}, {{name: b, keys: ['{digest('k')}']}}]", "same key"),
    ],
)
def test_a_file_that_is_wrong_is_refused(keys: Callable[[str], Path], text: str, words: str) -> None:
    with pytest.raises(LorakitError, match=re.escape(words)):
        read_tenants(keys(text))


def test_hot_reload_keeps_the_old_keys_while_the_file_is_broken(tmp_path: Path, caplog: Any) -> None:
    clock, file = Clock(), tmp_path / "keys.yaml"
    first = add_key(file, Tenant("a"))
    tenants = Tenants(file, clock)
    second = add_key(file, Tenant("b"))
    assert tenants.find(second) is None, "looked at once a second at most"
    clock.now = 2
    assert tenants.find(second) is not None
    file.write_text("tenants: [")
    clock.now = 4
    assert tenants.find(first) is not None
    assert "stay in force" in caplog.text
    os.unlink(file)
    clock.now = 6
    assert tenants.find(first) is not None


# -- quotas ------------------------------------------------------------------------------------------------------------------


def test_requests_per_minute_come_back_evenly() -> None:
    ledger, tenant = Ledger(), Tenant("a", requests_per_minute=6)
    for _ in range(6):
        ledger.enter(tenant, 1, 10, now=0.0)
    with pytest.raises(Fault, match="6 requests per minute") as caught:
        ledger.enter(tenant, 1, 10, now=0.0)
    assert caught.value.status == 429
    assert caught.value.headers == {"Retry-After": "10"}
    ledger.enter(tenant, 1, 10, now=10.0)
    with pytest.raises(Fault):
        ledger.enter(tenant, 1, 10, now=10.1)


def test_generated_tokens_are_paid_afterwards_and_a_debt_delays() -> None:
    ledger, tenant = Ledger(), Tenant("a", tokens_per_minute=60)
    ledger.enter(tenant, 1, 10, now=0.0)
    ledger.leave(tenant, 1, 80, now=0.0)  # 60 - 10 - 80 = -30
    with pytest.raises(Fault) as caught:
        ledger.enter(tenant, 1, 10, now=0.0)
    assert caught.value.headers == {"Retry-After": "40"}
    ledger.enter(tenant, 1, 10, now=40.0)


def test_a_prompt_larger_than_the_quota_needs_a_full_minute_and_is_not_locked_out() -> None:
    ledger, tenant = Ledger(), Tenant("a", tokens_per_minute=60)
    ledger.enter(tenant, 1, 100, now=0.0)
    with pytest.raises(Fault):
        ledger.enter(tenant, 1, 100, now=60.0)
    ledger.leave(tenant, 1, 0, now=60.0)
    ledger.enter(tenant, 1, 100, now=101.0)


def test_one_quota_refused_takes_nothing_of_the_other() -> None:
    ledger, tenant = Ledger(), Tenant("a", requests_per_minute=1, tokens_per_minute=60)
    ledger.enter(tenant, 1, 60, now=0.0)
    with pytest.raises(Fault):
        ledger.enter(tenant, 1, 1, now=0.0)
    ledger.enter(tenant, 1, 60, now=60.0)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 50), st.floats(0, 5)), max_size=40))
def test_concurrency_never_exceeds_its_limit_and_ends_at_none(events: list[tuple[int, int, float]]) -> None:
    ledger, tenant, open_, now = Ledger(), Tenant("a", concurrent=5), [], 0.0
    for answers, generated, passed in events:
        now += passed
        try:
            ledger.enter(tenant, answers, 1, now)
            open_.append(answers)
        except Fault:
            if open_:
                ledger.leave(tenant, open_.pop(), generated, now)
        assert 0 <= ledger.running == sum(open_) <= 5
    for answers in open_:
        ledger.leave(tenant, answers, 0, now)
    assert ledger.running == 0


# -- over HTTP ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def two(serve: Serve, tmp_path: Path) -> tuple[Served, str, str, str]:
    """A server with a tenant of one adapter, a tenant of everything, and an admin."""
    file = tmp_path / "keys.yaml"
    narrow = add_key(file, Tenant("narrow", adapters=("sql",), base=False, weight=2.0))
    wide = add_key(file, Tenant("wide"))
    admin = add_key(file, Tenant("admin", admin=True))
    return serve(StubEngine(), tenants=Tenants(file)), narrow, wide, admin


def test_adapters_of_others_are_not_there(two: tuple[Served, str, str, str]) -> None:
    served, narrow, wide, _ = two
    assert ask(served, narrow, "sql") == ask(served, wide, "sql")
    request = served.engine.tickets[0].request
    assert (request.tenant, request.weight) == ("narrow", 2.0)
    told = []
    for name in ("law", "nothing-at-all"):
        with pytest.raises(openai.NotFoundError) as caught:
            ask(served, narrow, name)
        told.append(caught.value.message.replace(name, "NAME"))
    assert told[0] == told[1], "one that is another's and one that is nobody's get the same answer"
    assert "law" not in told[1]
    with pytest.raises(openai.NotFoundError):
        ask(served, narrow, "tiny")
    with pytest.raises(openai.NotFoundError):
        ask(served, narrow, "base", extra_body={"adapters": {"sql": 1.0, "law": 0.1}})
    assert ask(served, narrow, "base", extra_body={"adapters": {"sql": 1.0}}) == ask(served, wide, "sql")
    assert [model.id for model in served.client(narrow).models.list()] == ["sql"]
    assert [model.id for model in served.client(wide).models.list()] == ["tiny", "law", "sql"]


@pytest.mark.parametrize("key", ["wrong", "lk-" + "a" * 43, "lk-ключ"])
def test_wrong_keys_are_refused_everywhere(two: tuple[Served, str, str, str], key: str) -> None:
    import http.client

    served = two[0]
    for path in ("/v1/models", "/v1/completions", "/admin/adapters", "/metrics", "/anything"):
        connection = http.client.HTTPConnection("127.0.0.1", served.port)
        connection.putrequest("GET", path)
        connection.putheader("Authorization", f"Bearer {key}".encode())
        connection.endheaders()
        answer = connection.getresponse()
        body = json.loads(answer.read())
        assert answer.status == 401, path
        assert answer.getheader("WWW-Authenticate") == "Bearer"
        assert body["error"]["code"] == "invalid_api_key"
        connection.close()
    with pytest.raises(openai.AuthenticationError):
        ask(served, "wrong")


def test_the_admin_key_alone_opens_the_admin_endpoints(two: tuple[Served, str, str, str]) -> None:
    served, _, wide, admin = two
    for path in ("/adapters", "/keys/reload"):
        with pytest.raises(openai.PermissionDeniedError):
            served.client(wide).with_options(base_url=served.url + "/admin").get(path, cast_to=object)
    found = served.client(admin).with_options(base_url=served.url + "/admin").get("/adapters", cast_to=object)
    assert [one["name"] for one in found["adapters"]] == ["law", "sql"]  # type: ignore[index]


def test_quotas_answer_429_and_let_go_when_requests_end(serve: Serve, tmp_path: Path) -> None:
    file, engine = tmp_path / "keys.yaml", StubEngine()
    key = add_key(file, Tenant("a", concurrent=2, requests_per_minute=100))
    served = serve(engine, tenants=Tenants(file))
    engine.held.set()
    with served.client(key).with_options(timeout=0.2) as impatient, pytest.raises(openai.APITimeoutError):
        impatient.completions.create(model="tiny", prompt="x", n=2)
    # the client has left: its two answers are cancelled, and the quota is free again
    for ticket in engine.tickets:
        ticket.result(timeout=5)
    ledger = served.front.tenants.ledger(served.front.tenants.tenants["a"])
    wait_for(lambda: ledger.running == 0)
    with pytest.raises(openai.BadRequestError, match="may have 2"):
        ask(served, key, n=3)
    engine.held.clear()
    assert ask(served, key, n=2)
    assert ledger.running == 0


def wait_for(holds: Callable[[], bool]) -> None:
    import time

    for _ in range(1000):
        if holds():
            return
        time.sleep(0.005)
    pytest.fail("it never came to be")
