"""Engines that are elsewhere: vLLM, against a stub of the interface that is used, and what a lost replica does to a request."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from api.conftest import running
from lorakit.errors import LorakitError
from lorakit.serve.http.front import Front
from lorakit.serve.remote.vllm import Interface, VllmEngine, rank_for
from lorakit.serve.request import Failed, Refused, Request, Sampling


@dataclass(frozen=True)
class Lora:
    """As vLLM's LoRARequest."""

    lora_name: str
    lora_int_id: int
    lora_path: str


class Llm:
    """As vLLM's AsyncLLM, as far as it is used: answers the prompt's ids, each raised by the adapter's number."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.aborted: list[str] = []
        self.pinned: list[int] = []
        self.pause = 0.0
        self.over = False

    async def generate(self, **asked: Any) -> AsyncIterator[Any]:
        self.asked.append(asked)
        how, lora = asked["sampling_params"], asked["lora_request"]
        ids = [one + (lora.lora_int_id if lora else 0) for one in asked["prompt"]["prompt_token_ids"]]
        for place in range(how.max_tokens):
            await asyncio.sleep(self.pause)
            token = ids[place % len(ids)]
            logprobs = [{token: SimpleNamespace(logprob=-0.1), 9: SimpleNamespace(logprob=-2.0)}]
            reason = "length" if place == how.max_tokens - 1 else None
            piece = SimpleNamespace(token_ids=[token], logprobs=logprobs, finish_reason=reason)
            yield SimpleNamespace(outputs=[piece], num_cached_tokens=1)

    async def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)

    async def add_lora(self, lora: Lora) -> None:
        pass

    async def pin_lora(self, number: int) -> None:
        self.pinned.append(number)

    def shutdown(self) -> None:
        self.over = True


def write(folder: Path, rank: int, **config: Any) -> None:
    folder.mkdir(parents=True)
    entries = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": ["q_proj"],
        "bias": "none",
        **config,
    }
    (folder / "adapter_config.json").write_text(json.dumps(entries))
    path = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {f"{path}.lora_A.weight": torch.randn(rank, 12), f"{path}.lora_B.weight": torch.randn(10, rank)}
    save_file(tensors, folder / "adapter_model.safetensors")


@pytest.fixture
def vllm(tmp_path: Path, tokenizer: Any) -> Iterator[tuple[VllmEngine, Llm]]:
    write(tmp_path / "plain", 4)
    write(tmp_path / "large", 9)
    write(tmp_path / "dora", 4, use_dora=True)
    write(tmp_path / "saved", 4, modules_to_save=["lm_head"])
    write(tmp_path / "ia3", 4, peft_type="IA3")
    llm = Llm()
    interface = Interface(lambda **values: SimpleNamespace(**values), Lora, "delta")
    engine = VllmEngine(lambda: llm, interface, tmp_path, tokenizer, context=100, rank=rank_for(None), cut=True)
    yield engine, llm
    engine.stop()
    assert llm.over or not llm.asked


def request(name: str | None = None, **how: Any) -> Request:
    values = {"max_tokens": 3, "temperature": 0.0, **how}
    return Request(str(time.monotonic_ns()), (66, 67), {name: 1.0} if name else {}, sampling=Sampling(**values))


def test_vllm_is_asked_with_the_adapter_and_the_sampling(vllm: tuple[VllmEngine, Llm]) -> None:
    engine, llm = vllm
    engine.start()
    base = engine.submit(request(logprobs=1, stop_token_ids=(5,), seed=4))
    assert base.tokens(10) == [66, 67, 66]
    assert base.result()[0].top == ((66, -0.1),)
    assert base.usage.cached == 1
    how = llm.asked[0]["sampling_params"]
    assert (how.temperature, how.stop_token_ids, how.seed, how.detokenize, how.output_kind) == (
        0.0,
        [5],
        4,
        False,
        "delta",
    )
    assert llm.asked[0]["lora_request"] is None
    adapted = engine.submit(request("plain"))
    assert adapted.tokens(10) == [67, 68, 67]
    assert Path(llm.asked[1]["lora_request"].lora_path) == engine.folders.folder / "plain"  # type: ignore[operator]
    engine.adapters.reload("plain")
    assert engine.submit(request("plain")).tokens(10) == [68, 69, 68], "another version has another number"
    engine.adapters.pin("plain")
    assert llm.pinned == [2]
    assert engine.adapters.info("plain").using == 0, "counted from before it was prepared until its answer ended"
    assert engine.adapters.reload("plain").state == "pinned"
    assert llm.pinned == [2, 3], "another version is pinned anew"


def test_vllm_gets_what_it_accepts_or_the_operator_hears_why(vllm: tuple[VllmEngine, Llm]) -> None:
    engine, llm = vllm
    engine.start()
    for name, words in (("dora", "use_dora"), ("saved", "lm_head"), ("ia3", "IA3")):
        with pytest.raises(Refused, match=words):
            engine.submit(request(name)).result(10)
        assert engine.adapters.info(name).state == "refused"
        assert "lorakit extract" in engine.adapters.info(name).reason
    engine.submit(request("large")).result(10)
    info = engine.adapters.info("large")
    assert (info.how, info.rank) == ("svd", 8)
    assert 0 < info.error < 1
    folder = Path(llm.asked[-1]["lora_request"].lora_path)
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 8
    engine.cut = False  # nothing is cut unasked
    engine.adapters.unload("large")
    with pytest.raises(Refused, match=r"rank 9, and vLLM was started for ranks up to 8.*svd"):
        engine.submit(request("large")).result(10)
    assert rank_for(engine.folders.folder) == 16
    blend = Request("b", (66,), {"plain": 0.5, "large": 0.5}, sampling=Sampling(max_tokens=4))
    with pytest.raises(Refused, match="combine"):
        engine.submit(blend).result(10)


def test_vllm_behind_the_front_and_a_client_that_leaves(vllm: tuple[VllmEngine, Llm], tokenizer: Any) -> None:
    engine, llm = vllm
    with running(Front(engine, tokenizer, name="tiny")) as served:
        answer = served.client().completions.create(model="plain", prompt="ab", max_tokens=4)
        assert answer.choices[0].text == tokenizer.decode([1 + one for one in tokenizer("ab")["input_ids"]] * 2)
        llm.pause = 0.02
        stream = served.client().completions.create(model="plain", prompt="ab", max_tokens=90, stream=True)
        next(iter(stream))
        stream.close()
        for _ in range(500):
            if llm.aborted:
                break
            time.sleep(0.01)
        assert len(llm.aborted) == 1
        assert engine.drain(10)


def test_without_vllm_there_is_a_clear_message(tmp_path: Path) -> None:
    with pytest.raises(LorakitError, match="pip install vllm"):
        VllmEngine.over("nothing", tmp_path, {"batch": 1, "queue": 1, "context": None})


def test_a_stopped_engine_leaves_no_ticket_open(vllm: tuple[VllmEngine, Llm]) -> None:
    engine, llm = vllm
    llm.pause = 0.05
    engine.start()
    ticket = engine.submit(request(max_tokens=90))
    engine.stop()
    with pytest.raises(Failed):
        ticket.result(10)


def test_what_goes_on_elsewhere_and_what_does_not() -> None:
    pytest.importorskip("ray")
    from lorakit.serve.remote.cluster import continued

    greedy = Request("r", (1, 2), sampling=Sampling(max_tokens=10, temperature=0.0, seed=3))
    assert continued(greedy, [], 0) is greedy
    again = continued(greedy, [7, 8], 1)
    assert again is not None
    assert (again.prompt, again.sampling.max_tokens, again.id) == ((1, 2, 7, 8), 8, "r-1")
    for how in (Sampling(seed=1), Sampling(frequency_penalty=0.1), Sampling(repetition_penalty=1.1)):
        begun = Request("r", (1,), sampling=how)
        assert continued(begun, [7], 1) is None
        assert continued(begun, [], 1) is not None, "nothing of it has been given yet"
