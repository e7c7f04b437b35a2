"""What the operator sees and does: admin endpoints, metrics, logs, readiness, an end that drains, the API's description."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from prometheus_client.parser import text_string_to_metric_families
from schemathesis import GenerationMode

from api.conftest import Served, running
from api.stub import StubEngine
from lorakit.serve.http.api import application, build
from lorakit.serve.http.front import Front
from lorakit.serve.http.logs import JsonLines
from lorakit.serve.http.metrics import Metrics

Serve = Callable[..., Served]


def call(served: Served, method: str, path: str) -> Any:
    request = urllib.request.Request(served.url + path, method=method)
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.loads(answer.read())


def test_admin_moves_adapters(serve: Serve) -> None:
    served = serve(StubEngine(["sql", "law"]))
    assert [one["state"] for one in call(served, "GET", "/admin/adapters")["adapters"]] == ["on disk", "on disk"]
    assert call(served, "POST", "/admin/adapters/sql/load")["state"] == "resident"
    assert call(served, "POST", "/admin/adapters/sql/pin")["pinned"] is True
    assert call(served, "POST", "/admin/adapters/sql/unpin")["pinned"] is False
    assert call(served, "POST", "/admin/adapters/sql/reload")["loads"] == 2
    assert call(served, "POST", "/admin/adapters/sql/unload")["state"] == "on disk"
    assert call(served, "GET", "/admin/adapters/sql")["bytes"] == 0


def test_an_adapter_that_cannot_be_used_says_why(serve: Serve) -> None:
    served = serve(StubEngine(bad={"broken": "no safetensors in it"}))
    with pytest.raises(urllib.error.HTTPError) as caught:
        call(served, "POST", "/admin/adapters/broken/load")
    assert caught.value.code == 400
    assert "no safetensors" in json.loads(caught.value.read())["error"]["message"]
    assert call(served, "GET", "/admin/adapters/broken")["reason"] == "no safetensors in it"


def test_a_new_folder_is_found_when_it_is_asked_for(serve: Serve) -> None:
    engine = StubEngine(["sql"])
    served = serve(engine)
    engine.adapters.new = ["fresh"]
    assert served.client().completions.create(model="fresh", prompt="x", max_tokens=2).choices[0].text
    engine.adapters.new = ["fresh", "later"]
    assert [one["name"] for one in call(served, "POST", "/admin/adapters/scan")["adapters"]] == [
        "fresh",
        "later",
        "sql",
    ]


def samples(served: Served) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    with urllib.request.urlopen(served.url + "/metrics") as answer:
        text = answer.read().decode()
    return {
        (one.name, tuple(sorted(one.labels.items()))): one.value
        for family in text_string_to_metric_families(text)
        for one in family.samples
    }


def test_metrics_count_what_happened(serve: Serve) -> None:
    served = serve(StubEngine(["sql", "law"]))
    client = served.client()
    client.completions.create(model="sql", prompt="x", max_tokens=5)
    client.completions.create(model="tiny", prompt="x", max_tokens=3, n=2)
    with pytest.raises(Exception, match="nope"):
        client.completions.create(model="nope", prompt="x")
    found = samples(served)
    endpoint = ("endpoint", "/v1/completions")
    assert found["lorakit_requests_total", (("code", "200"), endpoint)] == 2
    assert found["lorakit_requests_total", (("code", "404"), endpoint)] == 1
    assert found["lorakit_refused_total", (("reason", "model_not_found"),)] == 1
    assert found["lorakit_adapter_tokens_total", (("adapter", "sql"),)] == 5
    assert found["lorakit_adapter_tokens_total", (("adapter", "base"),)] == 6
    assert found["lorakit_first_token_seconds_count", ()] == 3
    assert found["lorakit_engine_generated_tokens_total", ()] == 11
    assert found["lorakit_engine_ready", ()] == 1
    assert found["lorakit_engine_adapters", (("state", "on disk"),)] == 2
    assert found["lorakit_adapter_hits_total", (("adapter", "sql"),)] == 0


def test_label_values_are_bounded(serve: Serve) -> None:
    served = serve(StubEngine([f"a{index}" for index in range(30)]), metrics=Metrics(names=5))
    client = served.client()
    for index in range(30):
        client.completions.create(model=f"a{index}", prompt="x", max_tokens=2)
    for index in range(20):
        with pytest.raises(Exception, match="model"):
            client.completions.create(model=f"guess-{index}", prompt="x")
        with pytest.raises(urllib.error.HTTPError):
            call(served, "GET", f"/path/{index}")
    found = samples(served)
    adapters = {dict(labels).get("adapter") for _, labels in found} - {None}
    assert adapters == {"a0", "a1", "a2", "a3", "a4", "other"}
    assert found["lorakit_adapter_tokens_total", (("adapter", "other"),)] == 50
    assert {dict(labels).get("endpoint") for _, labels in found} - {None} == {"/v1/completions", "none"}


def test_logs_are_json_with_the_request_id(serve: Serve) -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonLines())
    logger = logging.getLogger("lorakit.serve")
    logger.addHandler(handler)
    before = logger.level
    logger.setLevel(logging.INFO)
    try:
        served = serve(StubEngine())
        served.client().completions.create(
            model="sql", prompt="a private prompt", max_tokens=4, extra_headers={"X-Request-Id": "req-7"}
        )
        stream_of = served.client().completions.create(model="sql", prompt="x", max_tokens=4, stream=True)
        assert list(stream_of)
        for _ in range(200):
            if stream.getvalue().count("\n") >= 2:
                break
            time.sleep(0.01)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
    first, second = (json.loads(line) for line in stream.getvalue().splitlines())
    assert first["request_id"] == "req-7"
    assert (first["event"], first["status"], first["tenant"]) == ("request", 200, "anyone")
    assert (first["model"], first["adapters"]) == ("sql", {"sql": 1.0})
    assert (first["prompt_tokens"], first["generated_tokens"]) == (16, 4)
    assert second["generated_tokens"] == 4
    assert "private" not in stream.getvalue()


def test_ready_follows_the_engine(serve: Serve) -> None:
    engine = StubEngine()
    served = serve(engine)
    assert call(served, "GET", "/ready") == {"status": "ready"}
    engine.drain(0)
    with pytest.raises(urllib.error.HTTPError) as caught:
        call(served, "GET", "/ready")
    assert caught.value.code == 503
    assert call(served, "GET", "/health") == {"status": "ok"}


def test_an_end_lets_answers_finish(tokenizer: Any) -> None:
    engine = StubEngine(pause=0.005)
    with running(Front(engine, tokenizer, name="tiny")) as served:
        got: list[str] = []

        def read() -> None:
            stream = served.client().completions.create(model="tiny", prompt="x", max_tokens=60, stream=True)
            got.extend(chunk.choices[0].text for chunk in stream)

        reader = threading.Thread(target=read)
        reader.start()
        while not got:
            time.sleep(0.002)
    reader.join(10)
    assert len("".join(got)) == 60


@pytest.mark.slow
@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.name.lower())
def test_the_api_as_it_is_described(tokenizer: Any, mode: GenerationMode) -> None:
    """Every endpoint against its own description, with requests that it describes and with others."""
    engine = StubEngine()
    engine.start()
    front = Front(engine, tokenizer, name="tiny")
    described = application(front).openapi()
    for path in described["paths"].values():
        for one in path.values():
            one.pop("security", None)  # nothing needs a key here; that keys are asked for is tested with keys
    schema = schemathesis.openapi.from_dict(described)
    schema.app = build(front)
    answered: Counter[tuple[str, int]] = Counter()
    for result in schema.get_all_operations():
        operation = result.ok()

        @settings(
            max_examples=6 if operation.path.startswith("/v1") else 2,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
            database=None,
        )
        @given(case=operation.as_strategy(mode))
        def check(case: schemathesis.Case) -> None:
            # what fits together, and into the model, cannot be described: a valid shape may be refused
            response = case.call_and_validate(
                excluded_checks=[schemathesis.checks.CHECKS.get_one("positive_data_acceptance")]
            )
            answered[case.operation.path, response.status_code] += 1

        with contextlib.suppress(Unsatisfiable):  # an endpoint without parameters cannot be asked wrongly
            check()
    engine.stop()
    paths = {path for path, _ in answered}
    assert paths >= {"/v1/chat/completions", "/v1/completions", "/admin/adapters/{name}/load"}
    assert not [path for path, status in answered if status >= 500]
