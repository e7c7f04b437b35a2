"""Every method of the tables is served: adapters of all of them in one batch, each token for token as by `generate` alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lorakit as lk
from edits.test_laws import FIRST
from laws.cases import SPECS
from lorakit.experts import MIXTURES, ROUTERS
from lorakit.serve.engine.engine import LocalEngine
from lorakit.serve.engine.scheduler import Limits
from lorakit.serve.model.alone import Alone
from serving.small import Oracle, greedy, model, prompt, write_adapter

OWN: dict[str, Any] = {
    "ia3": lk.IA3(feedforward_modules=("down_proj",)),
    "trainable-tokens": lk.TrainableTokens(tokens=(7, 8)),
    "alora": lk.ALoRA(rank=2, invocation=(7, 7, 8)),
    "mixlora": lk.MixLoRA(experts=3, top_k=2, inner=lk.LoRA(rank=2)),
    "unilora": lk.UniLoRA(rank=4, length=200),
}
"""Specs in place of the laws', whose layers have other names."""
TARGETS: dict[str, Any] = {
    "bitfit": {"target_modules": ["q_proj", "k_proj"]},
    "trainable-tokens": {"target_modules": ["embed_tokens"]},
}
METHODS = {name: OWN[name] if name in OWN else SPECS[name][0] for name in [*SPECS, *MIXTURES]}
ALL = [*METHODS, *FIRST, *ROUTERS]
FEW = [*FIRST, "lora", "alora", "ia3", "oft", "mixlora", "trainable-tokens", "arrow", "xlora"]
"""One of each kind, which is what the fast tests have."""
ASKED = [*prompt(1, 21), 7, 7, 7, 8, 11, 12]
"""A prompt longer than a page, with the invocation of the activated LoRA, which overlaps itself."""


def write_router(base: nn.Module, folder: Path, name: str) -> None:
    torch.manual_seed(3)
    for member in ("one", "two"):
        adapter = lk.attach(base, lk.LoRA(rank=2), name=member)
        for parameter in adapter.parameters():
            nn.init.normal_(parameter, std=0.15)
    batch = {"input_ids": torch.tensor([prompt(4, 9)]), "labels": torch.tensor([prompt(4, 9)])}
    examples: Any = {"retrieval": {"one": [batch], "two": [{"input_ids": batch["input_ids"] + 1}]}, "lorahub": [batch]}
    spec = lk.LoRAHub(evaluations=9) if name == "lorahub" else ROUTERS[name]()
    router = lk.route(base, spec, ["one", "two"], name="router", batches=examples.get(name))
    for parameter in router.parameters():
        nn.init.normal_(parameter, std=0.3)
    router.save(folder)
    lk.detach(base)


Store = tuple[Any, Path, dict[str, list[int]]]


@pytest.fixture(scope="module", params=[FEW, pytest.param(ALL, marks=pytest.mark.slow)], ids=["few", "all"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A model with biases, an adapter folder of every method, and what each answers alone."""
    base, folder = model("qwen2"), tmp_path_factory.mktemp("every")
    for seed, name in enumerate(request.param):
        if name in ROUTERS:
            write_router(base, folder / name, name)
        else:
            method = METHODS.get(name) or FIRST[name]
            write_adapter(
                base,
                folder / name,
                method,
                std=2.0 if name == "prefix-tuning" else 0.5,
                seed=seed,
                **TARGETS.get(name, {}),
            )
    return base, folder, {name: Oracle(base, folder).answer(ASKED, {name: 1.0}, 6) for name in request.param}


@pytest.fixture(scope="module")
def engine(store: Store) -> Iterator[LocalEngine]:
    base, folder, answers = store
    made = LocalEngine(base, folder, Limits(batch=128, step_tokens=4096, cache_bytes=64 << 20))
    made.pool.start()
    for name in answers:
        made.adapters.load(name)
    yield made
    made.stop()


def served(engine: LocalEngine, names: Iterable[str]) -> dict[str, list[int]]:
    """The answers of one mixed batch."""
    tickets = {name: engine.submit(greedy(name, ASKED, {name: 1.0}, 6)) for name in names}
    while not all(ticket.ended for ticket in tickets.values()):
        engine.step()
    return {name: ticket.tokens() for name, ticket in tickets.items()}


def different(found: dict[str, list[int]], answers: dict[str, list[int]]) -> set[str]:
    """The law: nobody's answer is another than alone."""
    return {name for name, answer in found.items() if answer != answers[name]}


def test_every_method_in_one_batch_is_as_alone(engine: LocalEngine, store: Store) -> None:
    base, folder, answers = store
    assert different(served(engine, answers), answers) == set()
    plain = Oracle(base, folder).answer(ASKED, {}, 6)
    assert {name for name, answer in answers.items() if answer == plain} == set(), "each has an effect"


def test_the_law_catches_a_row_without_its_cache(engine: LocalEngine, store: Store, monkeypatch: Any) -> None:
    _, _, answers = store
    forward = Alone.forward
    monkeypatch.setattr(Alone, "forward", lambda self, tokens, cache, *rest: forward(self, tokens, self.cache(), *rest))
    assert different(served(engine, ["xlora", "oft"]), answers) == {"xlora", "oft"}
