"""Edits in the batch: prompts, prefixes, gated prompts, bottlenecks and LoReFT beside LoRA and the base, each as alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lorakit as lk
from lorakit.serve.engine import scheduler
from lorakit.serve.engine.engine import LocalEngine
from lorakit.serve.engine.scheduler import Limits
from lorakit.serve.model.around import Edited, Edits
from lorakit.serve.model.cache import PAGE
from lorakit.serve.request import Refused, TooLong
from serving.small import Oracle, greedy, model, prompt, write_adapter

METHODS: dict[str, Any] = {
    "prompt": lk.PromptTuning(tokens=21, start="random"),
    "p-tuning": lk.PTuning(tokens=3, width=5),
    "prefix": lk.PrefixTuning(tokens=19, width=None),
    "gated": lk.LLaMAAdapter(tokens=3, top=2),
    "houlsby": lk.Bottleneck(size=3),
    "parallel": lk.Bottleneck(size=3, placement="parallel", scale=4.0),
    "loreft": lk.LoReFT(rank=2, first=2, last=3),
    "lora": lk.LoRA(rank=3),
    "alora": lk.ALoRA(rank=3, invocation=(7, 8)),
    "gain": lk.IA3(feedforward_modules=("down_proj", "gate_proj")),
}
BLENDS: list[dict[str, float]] = [
    {},
    *({name: 1.0} for name in METHODS),
    {"houlsby": 0.5, "lora": 0.5},
    {"gain": 0.5},
    {"prompt": 1.0, "lora": 0.7, "parallel": -0.5},
    {"prompt": 1.0, "gated": -0.5},
    {"prefix": 1.0, "alora": 0.7, "loreft": 0.5},
]
TEXT = [*prompt(1, 37), 7, 8, *prompt(2, 20)]
PROMPTS = [TEXT, TEXT[:45], [*TEXT, *prompt(3, 9)]]
"""Prompts that begin alike and end elsewhere: what LoReFT does to one is nothing that the next may find."""


SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("gemma2", "gpt2")]


@pytest.fixture(scope="module", params=["llama", *SLOW])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, Oracle]:
    base, folder = model(request.param), tmp_path_factory.mktemp("edits")
    for seed, (name, method) in enumerate(METHODS.items()):
        if name == "gain" and request.param == "gpt2":
            method = lk.IA3(feedforward_modules=("mlp.c_proj",))
        write_adapter(base, folder / name, method, std=0.4, seed=seed)
    return base, folder, Oracle(base, folder)


@pytest.fixture(scope="module")
def blends(store: tuple[Any, Path, Oracle]) -> list[dict[str, float]]:
    """What can be asked for: a prefix is computed by itself where attention has a window, and then blends with none."""
    windows = store[0].config.model_type == "gemma2"
    return [blend for blend in BLENDS if not (windows and len(blend) > 1 and "prefix" in blend)]


@pytest.fixture(scope="module")
def answers(store: tuple[Any, Path, Oracle], blends: list[dict[str, float]]) -> list[list[int]]:
    return [store[2].answer(ids, blend, 4) for ids in PROMPTS for blend in blends]


def engine_over(store: tuple[Any, Path, Oracle], **options: Any) -> LocalEngine:
    engine = LocalEngine(store[0], store[1], Limits(batch=6, step_tokens=24, cache_bytes=2**21), **options)
    engine.pool.start()
    for name in engine.adapters.names():
        engine.adapters.load(name)
    return engine


def served(engine: LocalEngine, blends: list[dict[str, float]]) -> list[list[int]]:
    cases = [(ids, blend) for ids in PROMPTS for blend in blends]
    tickets = [engine.submit(greedy(n, ids, blend, 4)) for n, (ids, blend) in enumerate(cases)]
    while not all(ticket.ended for ticket in tickets):
        engine.step()
    return [ticket.tokens() for ticket in tickets]


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "torch"])
def test_any_mixture_is_as_each_alone(store: Any, blends: Any, answers: list[list[int]], compiled: bool) -> None:
    if not compiled and store[0].config.model_type != "llama":
        pytest.skip("the loops of torch are those of one model")
    engine = engine_over(store, compiled=compiled)
    assert served(engine, blends) == answers
    hows = {name: engine.adapters.info(name).how for name in METHODS}
    windows = store[0].config.model_type == "gemma2"
    assert hows == {name: "alone" if name == "prefix" and windows else "form" for name in METHODS}
    for number in range(1, len(METHODS) + 1) if store[0].config.model_type == "llama" else ():
        assert answers[number :: len(blends)] != answers[:: len(blends)], f"{blends[number]} has an effect"
    engine.stop()


@pytest.mark.parametrize("bug", ["pages of other prompts", "one prompt row short", "a change on all rows"])
def test_the_law_catches(
    store: Any, blends: Any, answers: list[list[int]], monkeypatch: pytest.MonkeyPatch, bug: str
) -> None:
    if store[0].config.model_type != "llama":
        pytest.skip("one model is enough")
    if bug == "pages of other prompts":
        monkeypatch.setattr(scheduler.Job, "page_key", lambda self, page: "")
    elif bug == "one prompt row short":
        monkeypatch.setattr(Edited, "before", None)
    else:
        monkeypatch.setattr(Edited, "tokens", slice(None))
    engine = engine_over(store)
    assert served(engine, blends) != answers
    engine.stop()


def test_what_stands_before_a_prompt_is_shared_and_counts(store: Any) -> None:
    """The pages of a prompt's rows are computed once; usage does not have them, the context does."""
    engine = engine_over(store)
    tickets = []
    for number in range(2):
        tickets.append(engine.submit(greedy(number, [*TEXT[:20], 5 + number], {"prompt": 1.0}, 2)))
        while not tickets[-1].ended:
            engine.step()
    assert [ticket.usage.cached for ticket in tickets] == [0, (21 + 20) // PAGE * PAGE - 21]
    assert tickets[1].usage.prompt == 21
    late = engine.submit(greedy("long", TEXT[:20], {"prompt": 1.0}, 256 - 20))
    engine.step()
    with pytest.raises(TooLong, match="the 21 tokens of the adapter before them are 277"):
        late.tokens()
    for words, blend in (
        ("has one such adapter, by the weight 1", {"prompt": 1.0, "p-tuning": 1.0}),
        ("has one such adapter, by the weight 1", {"prompt": 0.5}),
        ("scales inputs, which others", {"gain": 0.5, "lora": 0.5}),
        ("matrices, which another adapter of this blend changes", {"lora": 0.5, "gated": 0.5}),
    ):
        refused = engine.submit(greedy(words + str(blend), TEXT, blend, 2))
        engine.step()
        with pytest.raises(Refused, match=words):
            refused.tokens()
    engine.stop()


def test_steps_without_edits_know_nothing_of_them(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any) -> None:
        raise AssertionError("called in a step without edits")

    engine = engine_over(store)
    for kind, names in ((Edits, ("__init__", "on", "before", "beside")), (Edited, ("__init__",))):
        for name in names:
            monkeypatch.setattr(kind, name, never)
    hooks: list[int] = []
    forward = engine.model.forward

    def counted(*args: Any) -> torch.Tensor:
        hooks.append(sum(len(one._forward_hooks) + len(one._forward_pre_hooks) for one in store[0].modules()))
        return forward(*args)

    monkeypatch.setattr(engine.model, "forward", counted)
    served(engine, [{}, {"lora": 1.0}])
    assert hooks
    assert not any(hooks)
    engine.stop()
