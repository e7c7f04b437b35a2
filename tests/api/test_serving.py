"""The whole of it: HTTP, front and the real engine on a small model; the command line; two replicas of which one is killed."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from api.conftest import Served, running
from api.small import Reference, write_adapters, write_base
from api.stub import StubEngine
from lorakit.cli import app
from lorakit.serve.engine.engine import LocalEngine
from lorakit.serve.engine.scheduler import Limits
from lorakit.serve.http.front import Front
from lorakit.serve.load import choose

RANKS = {"a": 4, "b": 8, "c": 3}
SMALL = {"batch": 8, "step_tokens": 64, "queue": 64, "cache_bytes": 4 << 20, "adapter_bytes": 4 << 20, "context": None}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def store(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapters(base, tmp_path_factory.mktemp("store"), RANKS)


@pytest.fixture(scope="module")
def reference(base: Path, store: Path) -> Reference:
    return Reference(base, store)


@pytest.fixture(scope="module")
def real(base: Path, store: Path, tokenizer: Any) -> Iterator[Served]:
    model = AutoModelForCausalLM.from_pretrained(base).float().eval()
    engine = LocalEngine(model, store, Limits(**SMALL), compiled=False)  # type: ignore[arg-type]
    with running(Front(engine, tokenizer, name="tiny")) as served:
        yield served


ROUTES: list[tuple[str, dict[str, float] | None, Any]] = [
    ("tiny", None, None), ("a", None, "a"), ("b", None, "b"), ("c", None, "c"),
    ("base", {"a": 0.7, "b": 0.3}, {"a": 0.7, "b": 0.3}),
]  # fmt: skip


async def ask(client: openai.AsyncOpenAI, prompt: list[int], model: str, blend: Any, tokens: int) -> list[str]:
    """The tokens of an answer, by their texts."""
    body = {"ignore_eos": True, "logit_bias": {"0": -100}} | ({"adapters": blend} if blend else {})
    answer = await client.completions.create(
        model=model, prompt=prompt, max_tokens=tokens, temperature=0, logprobs=0, extra_body=body
    )
    assert answer.choices[0].logprobs is not None
    return answer.choices[0].logprobs.tokens or []


def test_mixed_requests_answer_as_each_alone(real: Served, reference: Reference, tokenizer: Any) -> None:
    prompts = [[50 + (7 * index + 3 * place) % 150 for place in range(5 + index)] for index in range(10)]

    async def all_at_once() -> list[list[str]]:
        async with real.aclient() as client:
            return await asyncio.gather(
                *(ask(client, prompt, *ROUTES[index % 5][:2], 12) for index, prompt in enumerate(prompts))
            )

    for index, (prompt, got) in enumerate(zip(prompts, asyncio.run(all_at_once()), strict=True)):
        want = reference(prompt, ROUTES[index % 5][2], 12)
        assert got == [tokenizer.decode([one]) for one in want], (index, ROUTES[index % 5])


def test_admin_and_metrics_of_the_real_engine(real: Served) -> None:
    def call(method: str, path: str) -> Any:
        with urllib.request.urlopen(urllib.request.Request(real.url + path, method=method), timeout=30) as answer:
            return answer.read()

    assert json.loads(call("POST", "/admin/adapters/c/pin"))["state"] == "pinned"
    assert json.loads(call("POST", "/admin/adapters/c/reload"))["rank"] == RANKS["c"]
    assert json.loads(call("POST", "/admin/adapters/c/unload"))["pinned"] is False
    found = call("GET", "/metrics").decode()
    assert "lorakit_engine_adapters{" in found
    assert "lorakit_engine_ready 1.0" in found


# -- the command line ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["serve", "x", "--adapters", "/nowhere"], "not a folder"),
        (["serve", "x", "--keys", "/nowhere/keys.yaml"], "lorakit keys"),
        (["serve", "x", "--engine", "vlm"], "did you mean"),
        (["serve", "x", "--memory", "much"], "such as 2G"),
        (["keys", "/tmp/k.yaml"], "name a tenant"),
        (["bench-serve", "http://127.0.0.1:9"], "does not answer"),
    ],
)
def test_mistakes_are_one_clear_line(arguments: list[str], words: str) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert words in result.output.replace("\n", " ")


def test_bench_serve_drives_every_popularity(serve: Callable[..., Served], tmp_path: Path) -> None:
    served = serve(StubEngine([f"a{index}" for index in range(12)]))
    picture = tmp_path / "load.png"
    result = CliRunner().invoke(
        app,
        [
            "bench-serve",
            served.url,
            "--requests=16",
            "--concurrent=4",
            "--prompt=8",
            "--answer=5",
            "--json",
            f"--picture={picture}",
        ],
    )
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    assert {row["popularity"]: row["errors"] for row in rows} == dict.fromkeys(
        ["base", "distinct", "uniform", "zipf", "identical"], 0
    )
    distinct = {row["popularity"]: row["distinct"] for row in rows}
    assert (distinct["base"], distinct["distinct"], distinct["uniform"], distinct["identical"]) == (1, 12, 4, 1)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert len(served.engine.tickets) == 16 * 5
    assert all(ticket.usage.generated == 5 for ticket in served.engine.tickets)
    served.engine.limit = 0
    failed = CliRunner().invoke(app, ["bench-serve", served.url, "-p", "base", "--requests", "2"])
    assert failed.exit_code == 1
    assert "queue is full" in failed.output


def test_zipf_is_what_it_says() -> None:
    import random

    asked = choose("zipf", [str(index) for index in range(50)], 20_000, random.Random(0))
    share = [asked.count(str(rank)) / len(asked) for rank in range(3)]
    assert share[0] / share[1] == pytest.approx(2**1.5, rel=0.1)
    assert share[0] / share[2] == pytest.approx(3**1.5, rel=0.15)


@pytest.mark.slow
def test_lorakit_serve_from_start_to_sigterm(base: Path, store: Path, tmp_path: Path) -> None:
    """A line per adapter, keys, a reload by SIGHUP, and an answer in the middle of SIGTERM."""
    keys = tmp_path / "keys.yaml"
    key = CliRunner().invoke(app, ["keys", str(keys), "acme", "--adapter", "a"]).stdout.strip()
    command = [sys.executable, "-m", "lorakit.cli", "serve", str(base), "--adapters", str(store), "--keys", str(keys)]
    process = subprocess.Popen(
        [*command, "--port", "0", "--dtype", "fp32", "--cache", "4M"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        shown = []
        assert process.stderr is not None
        for line in process.stderr:
            shown.append(line)
            if "serving on" in line:
                break
        assert any("lora, rank 8" in line for line in shown), shown
        url = shown[-1].split()[2]
        client = openai.OpenAI(base_url=url, api_key=key, max_retries=0)
        assert [model.id for model in client.models.list()] == ["tiny", "a"]
        second = CliRunner().invoke(app, ["keys", str(keys), "other"]).stdout.strip()
        process.send_signal(signal.SIGHUP)
        other = openai.OpenAI(base_url=url, api_key=second, max_retries=20)
        for _ in range(100):
            try:
                assert len(list(other.models.list())) == 4
                break
            except openai.AuthenticationError:
                time.sleep(0.1)
        stream = client.completions.create(
            model="a", prompt="x", max_tokens=200, stream=True, extra_body={"ignore_eos": True}
        )
        got = [next(iter(stream))]
        process.send_signal(signal.SIGTERM)
        got += list(stream)
        assert got[-1].choices[0].finish_reason == "length"
        log, rest = process.communicate(timeout=60)
        assert process.returncode == 0, rest
        assert "stopped" in rest
        lines = [json.loads(line) for line in log.splitlines()]
        assert [line["tenant"] for line in lines if line.get("path") == "/v1/completions"] == ["acme"]
    finally:
        process.kill()


@pytest.mark.slow
def test_two_replicas_of_which_one_is_killed(base: Path, store: Path, reference: Reference, tokenizer: Any) -> None:
    """No answer is lost or wrong, whichever replica it was at; and the same API is in front."""
    pytest.importorskip("ray")
    from lorakit.serve.remote.cluster import ClusterEngine

    engine = ClusterEngine(str(base), store, 2, dtype="fp32", limits=SMALL)
    prompts = [[50 + (5 * index + place) % 150 for place in range(6)] for index in range(40)]
    with running(Front(engine, tokenizer, name="tiny")) as served:
        processes = {engine._handle.describe.remote().result()["process"] for _ in range(40)}
        assert len(processes) == 2

        async def all_at_once() -> list[list[str]]:
            async with served.aclient() as client:
                tasks = [
                    asyncio.create_task(ask(client, prompt, *ROUTES[index % 4][:2], 60))
                    for index, prompt in enumerate(prompts)
                ]
                while engine.stats().running and not any(ticket.usage.generated for ticket in list(engine._live)):
                    await asyncio.sleep(0.002)
                await asyncio.sleep(0.05)
                os.kill(next(iter(processes)), signal.SIGKILL)
                return await asyncio.gather(*tasks)

        for index, got in enumerate(asyncio.run(all_at_once())):
            want = reference(prompts[index], ROUTES[index % 4][2], 60)
            assert got == [tokenizer.decode([one]) for one in want], index
        assert (
            json.loads(
                urllib.request.urlopen(
                    urllib.request.Request(served.url + "/admin/adapters/a/load", method="POST")
                ).read()
            )["rank"]
            == RANKS["a"]
        )


@pytest.mark.slow
def test_a_second_replica_comes_with_the_load(base: Path, store: Path, reference: Reference, tokenizer: Any) -> None:
    """One replica while it is quiet, two when more requests than a batch are open, and every answer is right meanwhile."""
    pytest.importorskip("ray")
    from lorakit.serve.remote.cluster import NAME, ClusterEngine, serve

    def replicas() -> int:
        deployment = serve.status().applications[NAME].deployments["replica"]
        return int(deployment.replica_states.get("RUNNING", 0))

    engine = ClusterEngine(str(base), store, 1, most=2, dtype="fp32", limits=SMALL)
    prompts = [[50 + (5 * index + place) % 150 for place in range(6)] for index in range(24)]
    with running(Front(engine, tokenizer, name="tiny")) as served:
        assert replicas() == 1

        async def until_two() -> list[tuple[int, list[str]]]:
            found: list[tuple[int, list[str]]] = []
            end = time.monotonic() + 120

            async def go_on(index: int) -> None:
                while replicas() < 2 and time.monotonic() < end:
                    found.append((index, await ask(client, prompts[index], *ROUTES[index % 4][:2], 60)))

            async with served.aclient() as client:
                await asyncio.gather(*map(go_on, range(len(prompts))))
            return found

        answers = asyncio.run(until_two())
        assert replicas() == 2
        processes = {engine._handle.describe.remote().result()["process"] for _ in range(40)}
        assert len(processes) == 2
        wanted = {
            index: [tokenizer.decode([one]) for one in reference(prompts[index], ROUTES[index % 4][2], 60)]
            for index in {index for index, _ in answers}
        }
        assert all(got == wanted[index] for index, got in answers)
        assert len(answers) >= len(prompts)
