"""Other servers' ways to load, list and choose adapters; a key's default adapter; what tenants have used."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest

from api.conftest import Served
from api.stub import StubEngine
from lorakit.serve.http.tenants import Tenants, digest


def ask(served: Served, path: str, body: Any = None, key: str = "none") -> tuple[int, Any]:
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    try:
        with urllib.request.urlopen(urllib.request.Request(served.url + path, data, headers), timeout=30) as answer:
            status, text = answer.status, answer.read()
    except urllib.error.HTTPError as error:
        status, text = error.code, error.read()
    try:
        return status, json.loads(text)
    except ValueError:
        return status, text.decode()


def test_vllm_and_sglang_load_and_unload(serve: Callable[..., Served], tmp_path: Path) -> None:
    served = serve(StubEngine())
    served.front.store = tmp_path / "store"
    own = str(tmp_path / "store" / "sql")
    status, text = ask(served, "/v1/load_lora_adapter", {"lora_name": "sql", "lora_path": own})
    assert (status, text[:8]) == (200, "Success:")
    assert served.engine.adapters.info("sql").state == "resident"
    for body, code, param in [
        ({"lora_name": "sql", "lora_path": own}, 400, "lora_name"),
        ({"lora_name": "tiny", "lora_path": "x"}, 400, "lora_name"),
        ({"lora_name": "no", "lora_path": "no"}, 404, "lora_name"),
        ({"lora_name": "law", "lora_path": own}, 400, "lora_path"),
        ({"lora_name": "law", "lora_path": "/etc/passwd"}, 400, "lora_path"),
        ({"lora_name": "law", "lora_path": own + "/../law"}, 400, "lora_path"),
        ({"lora_name": "law", "lora_path": "someone/law"}, 400, "lora_path"),
        ({"lora_name": "law"}, 400, "lora_path"),
    ]:
        status, answer = ask(served, "/v1/load_lora_adapter", body)
        assert (status, answer["error"]["param"]) == (code, param)
        assert str(tmp_path) not in answer["error"]["message"]
    assert (
        ask(served, "/v1/load_lora_adapter", {"lora_name": "sql", "lora_path": "sql", "load_inplace": True})[0] == 200
    )
    assert ask(served, "/v1/unload_lora_adapter", {"lora_name": "sql"})[0] == 200
    assert served.engine.adapters.info("sql").state == "on disk"
    status, answer = ask(served, "/load_lora_adapter", {"lora_name": "law", "lora_path": "law", "pinned": True})
    assert answer == {"success": True, "error_message": "", "loaded_adapters": ["law"]}
    status, answer = ask(served, "/unload_lora_adapter", {"lora_name": "no"})
    assert not answer["success"]
    assert "no adapter" in answer["error_message"]


def test_requests_choose_an_adapter_in_every_dialect(serve: Callable[..., Served]) -> None:
    served = serve(StubEngine())
    client = served.client()
    listed = {one["path"]: one["id"] for one in ask(served, "/lora-adapters")[1]}

    def blend(**extra: Any) -> dict[str, float]:
        client.completions.create(model="tiny", prompt="x", extra_body=extra)
        return dict(served.engine.tickets[-1].request.blend)  # type: ignore[attr-defined]

    assert blend(lora_path="sql") == {"sql": 1.0}
    assert blend(adapter_id="law", adapter_source="local") == {"law": 1.0}
    assert blend(lora=[{"id": listed["sql"], "scale": 0.5}, {"id": listed["law"], "scale": 0.25}]) == {
        "sql": 0.5,
        "law": 0.25,
    }
    for extra, param in [
        ({"lora_path": "no"}, "lora_path"),
        ({"adapter_id": "../sql"}, "adapter_id"),
        ({"adapter_id": "sql", "adapter_source": "hub"}, "adapter_source"),
        ({"lora": [{"id": 1, "scale": 1.0}]}, "lora"),
        ({"lora_path": "sql", "adapters": {"law": 1.0}}, "lora_path"),
        ({"merged_adapters": {}}, "merged_adapters"),
    ]:
        with pytest.raises(openai.APIStatusError) as caught:
            blend(**extra)
        assert caught.value.param == param  # type: ignore[attr-defined]
    assert ask(served, "/lora-adapters", [{"id": 1, "scale": 1.0}])[0] == 400


def test_rights_default_adapter_and_usage(serve: Callable[..., Served], keys: Callable[[str], Path]) -> None:
    names = {"admin": "lk-admin", "acme": "lk-acme", "other": "lk-other"}
    file = keys(
        f"admin: {digest(names['admin'])}\n"
        "tenants:\n"
        f"- {{name: acme, keys: '{digest(names['acme'])}', adapters: [sql], base: false, default: sql}}\n"
        f"- {{name: other, keys: '{digest(names['other'])}', adapters: [law], default: sql}}\n"
    )
    served = serve(StubEngine(), tenants=Tenants(file))
    for path in ("/v1/load_lora_adapter", "/load_lora_adapter", "/v1/unload_lora_adapter", "/unload_lora_adapter"):
        assert ask(served, path, {"lora_name": "sql", "lora_path": "sql"}, names["acme"])[0] == 403
    assert [one["path"] for one in ask(served, "/lora-adapters", key=names["acme"])[1]] == ["sql"]
    client = served.client(names["acme"])
    client.completions.create(model="default", prompt="x", max_tokens=5)
    assert served.engine.tickets[-1].request.blend == {"sql": 1.0}  # type: ignore[attr-defined]
    with pytest.raises(openai.NotFoundError):
        served.client(names["other"]).completions.create(model="default", prompt="x")
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="tiny", prompt="x", extra_body={"lora_path": "law"})
    assert [ask(served, p, {"prompt": "x"}, names["acme"])[0] for p in ("/tokenize",)] == [404]  # the base is not its
    mine = ask(served, "/v1/usage", key=names["acme"])[1]
    assert mine == {
        "tenant": "acme", "requests": 1, "answers": 1, "prompt_tokens": 1, "cached_tokens": 0, "completion_tokens": 5
    }  # fmt: skip
    assert ask(served, "/admin/usage", key=names["acme"])[0] == 403
    everybody = ask(served, "/admin/usage", key=names["admin"])[1]
    assert everybody["acme"]["completion_tokens"] == 5
    assert everybody["other"] == {}
    found = ask(served, "/v1/models", key=names["acme"])[1]["data"]
    assert [(one["id"], one["parent"], one["root"]) for one in found] == [("sql", "tiny", "tiny")]


def test_the_dashboard_shows_metrics_that_there_are(serve: Callable[..., Served]) -> None:
    served = serve(StubEngine())
    served.client().completions.create(model="sql", prompt="x", max_tokens=3)
    with pytest.raises(openai.BadRequestError):
        served.client().completions.create(model="sql", prompt="x", max_tokens=10_000)
    shown = set(re.findall(r"\blorakit_\w+", ask(served, "/metrics")[1]))
    board = json.loads((Path(__file__).parents[2] / "examples" / "serving" / "grafana.json").read_text())
    asked = {
        name for panel in board["panels"] for t in panel["targets"] for name in re.findall(r"lorakit_\w+", t["expr"])
    }
    assert asked
    assert asked <= shown


def test_an_alias_its_shares_and_the_way_back(serve: Callable[..., Served]) -> None:
    served = serve(StubEngine(["v1", "v2"]))
    client = served.client()

    def adapter(user: str) -> str:
        client.completions.create(model="sql", prompt="x", max_tokens=1, user=user)
        return next(iter(served.engine.tickets[-1].request.blend))  # type: ignore[attr-defined]

    users = [f"user {number}" for number in range(60)]
    assert ask(served, "/admin/aliases/sql", {"adapters": {"v1": 1.0}}) == (200, {"sql": {"v1": 1.0}})
    assert {adapter(one) for one in users[:5]} == {"v1"}
    ask(served, "/admin/aliases/sql", {"adapters": {"v1": 0.8, "v2": 0.2}})
    few = {one for one in users if adapter(one) == "v2"}
    assert 2 <= len(few) <= 25
    assert {one for one in users if adapter(one) == "v2"} == few
    ask(served, "/admin/aliases/sql", {"adapters": {"v1": 0.4, "v2": 0.6}})
    assert few < {one for one in users if adapter(one) == "v2"}
    assert ask(served, "/admin/aliases/sql/rollback", {})[1] == {"sql": {"v1": 0.8, "v2": 0.2}}
    assert {one for one in users if adapter(one) == "v2"} == few
    for path, body, status, param in [
        ("/admin/aliases/v1", {"adapters": {"v2": 1.0}}, 400, "name"),
        ("/admin/aliases/base", {"adapters": {"v2": 1.0}}, 400, "name"),
        ("/admin/aliases/x", {"adapters": {"no": 1.0}}, 404, "adapters.no"),
        ("/admin/aliases/x", {"adapters": {"v1": 0.5}}, 400, "adapters"),
        ("/admin/aliases/x/rollback", {}, 404, "name"),
    ]:
        found, answer = ask(served, path, body)
        assert (found, answer["error"]["param"]) == (status, param)
    for _ in range(2):
        ask(served, "/admin/aliases/sql/rollback", {})
    with pytest.raises(openai.NotFoundError):
        adapter("anybody")
