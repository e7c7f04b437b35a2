"""A row's fault is that row's alone; an engine that gave up says so; and what shares pages is one tenant's."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorakit.serve.engine.engine import ATTEMPTS, LocalEngine
from lorakit.serve.engine.sampling import LEAST_LOGPROB, Choice, Chooser, NoChoice, choose
from lorakit.serve.engine.scheduler import Limits
from lorakit.serve.request import Failed, Refused, Request, Sampling
from serving.hostile import HOSTILE, make
from serving.small import Oracle, greedy, model, prompt, write_adapter

STRANGE = [
    {"temperature": 1e-40},
    {"temperature": 5e-324},
    {"temperature": 1e-40, "top_p": 1e-6},
    {"temperature": 1e-12, "top_k": 1},
    {"temperature": 1e-12, "min_p": 1.0},
    {"temperature": 1e-30, "logprobs": 20},
    {"temperature": 100.0, "top_p": 1e-6, "min_p": 1.0},
    {"repetition_penalty": 100.0, "presence_penalty": -2.0, "frequency_penalty": -2.0},
    {"repetition_penalty": 0.01, "temperature": 1e-9},
    {"logit_bias": {5: 1000.0}, "temperature": 1e-40},
    {"logit_bias": dict.fromkeys(range(40), -1000.0), "min_tokens": 3},
]


def _chooser(**given: Any) -> Chooser:
    return Chooser(Sampling(**{"seed": 0} | given), (1, 2, 3), frozenset({0}), [7, 7, 9])


@pytest.mark.parametrize("given", STRANGE, ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e30, 0.0])
def test_every_sampling_that_is_accepted_gives_a_token(given: dict[str, Any], scale: float) -> None:
    logits = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)) * scale
    alone = choose(logits[2:], [_chooser(temperature=0.0)])
    found = choose(logits, [_chooser(**given), _chooser(temperature=1.0), _chooser(temperature=0.0)])
    assert found[2] == alone[0]
    for one in found[1:]:
        assert isinstance(one, Choice)
    if isinstance(found[0], Choice):
        assert 0 <= found[0].token < 64
        assert all(LEAST_LOGPROB <= logprob <= 0 for _, logprob in found[0].top)
    else:  # a penalty of 100 on logits of 1e30 and more
        assert scale > 1
        assert found[0].finite


def test_the_least_temperature_is_the_most_probable_token() -> None:
    logits = torch.randn(1, 64, generator=torch.Generator().manual_seed(1))
    found = choose(logits, [_chooser(temperature=1e-40)])[0]
    assert isinstance(found, Choice)
    assert found.token == int(logits.argmax())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("given", [{"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 0.0, "logprobs": 2}])
def test_numbers_that_are_not_finite_end_their_row(bad: float, dtype: torch.dtype, given: dict[str, Any]) -> None:
    logits = torch.randn(3, 64, generator=torch.Generator().manual_seed(2)).to(dtype)
    expected = choose(logits[::2].contiguous(), [_chooser(**given), _chooser(**given)])
    logits[1] = bad
    found = choose(logits, [_chooser(**given) for _ in range(3)])
    assert isinstance(found[1], NoChoice)
    assert not found[1].finite
    assert [found[0], found[2]] == expected


def test_an_adapter_whose_numbers_overflow_ends_its_own_answers_alone(tmp_path: Path) -> None:
    """Its pages go to others afterwards, who must not read what it has left in them."""
    base = model()
    write_adapter(base, tmp_path / "good", seed=1)
    write_adapter(base, tmp_path / "huge", seed=2)
    bundle = tmp_path / "huge" / "adapter_model.safetensors"
    save_file({key: torch.full_like(value, 3e37) for key, value in load_file(bundle).items()}, bundle)
    (tmp_path / "huge" / "lorakit.json").unlink()
    oracle = Oracle(model(), tmp_path)
    asked = {name: prompt(seed, 20) for seed, name in enumerate(("first", "second", "third"))}
    expected = {name: oracle.answer(ids, {"good": 1.0}, 8) for name, ids in asked.items()}
    engine = LocalEngine(base, tmp_path, Limits(cache_bytes=2**14 * 5))
    engine.start()
    try:
        first = engine.submit(greedy("first", asked["first"], {"good": 1.0}, 8))
        bad = [engine.submit(greedy(f"bad{n}", prompt(9 + n, 20), {"huge": 1.0}, 8)) for n in range(2 * ATTEMPTS)]
        for ticket in bad:
            with pytest.raises(Failed, match=r"adapter 'huge' gives numbers that are not finite"):
                ticket.tokens(60)
        second = engine.submit(greedy("second", asked["second"], {"good": 1.0}, 8))
        third = engine.submit(greedy("third", asked["third"], {"good": 1.0}, 8))
        assert [one.tokens(60) for one in (first, second, third)] == list(expected.values())
        assert engine.ready()
        assert engine.failure == ""
        assert engine.adapters.info("huge").faults == 2 * ATTEMPTS
        assert engine.adapters.info("good").faults == 0
    finally:
        engine.stop()


def test_an_engine_whose_forwards_fail_gives_up_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = LocalEngine(model(), limits=Limits(cache_bytes=2**20))

    def failing(*_: Any) -> Any:
        raise RuntimeError("planted")

    monkeypatch.setattr(engine.model, "forward", failing)
    engine.start()
    try:
        for number in range(ATTEMPTS):
            with pytest.raises(Failed, match="planted"):
                engine.submit(greedy(str(number), prompt(1, 4), {}, 4)).tokens(30)
        assert "planted" in engine.failure
        assert not engine.ready()
        with pytest.raises(Failed, match="has failed"):
            engine.submit(greedy("next", prompt(1, 4), {}, 4))
    finally:
        engine.stop()


def test_pages_are_found_within_their_domain_alone(tmp_path: Path) -> None:
    base = model()
    engine = LocalEngine(base, limits=Limits(cache_bytes=2**22))
    ids = prompt(3, 40)

    def cached(name: str, domain: str) -> int:
        ticket = engine.submit(Request(name, tuple(ids), domain=domain, sampling=Sampling(max_tokens=2, temperature=0)))
        while not ticket.ended:
            engine.step()
        return ticket.usage.cached

    assert cached("1", "acme") == 0
    assert cached("2", "beta") == 0
    assert cached("3", "acme") == 32
    assert cached("4", "beta") == 32
    assert cached("5", "") == 0
    engine.stop()  # the rotary function of all models of its kind is given back


def test_what_the_store_holds_is_looked_at_before_it_is_read(tmp_path: Path) -> None:
    """Each hostile folder is refused in words, and the good one is served as before. FIFOs would hang for ever."""
    base = model()
    write_adapter(base, tmp_path / "good", seed=1)
    for name in HOSTILE:
        make(tmp_path, name)
    ids = prompt(1, 12)
    expected = Oracle(model(), tmp_path).answer(ids, {"good": 1.0}, 4)
    engine = LocalEngine(base, tmp_path, Limits(cache_bytes=2**20, adapter_bytes=2**26))
    engine.start()
    threads = list(engine.pool._threads)
    try:
        names = set(engine.adapters.names())
        for name, (words, _) in HOSTILE.items():
            assert name in names, name
            with pytest.raises(Refused, match=words or None) as told:
                engine.submit(greedy(f"bad {name}", ids, {name: 1.0}, 4)).tokens(60)
            text = str(told.value)
            assert str(tmp_path) not in text, text
            assert not any(word in text for word in ("Traceback", "object has no", "Error:")), text
        assert engine.submit(greedy("good", ids, {"good": 1.0}, 4)).tokens(60) == expected
        assert all(thread.is_alive() for thread in threads)
    finally:
        engine.stop()
    assert not any(thread.is_alive() for thread in threads)


def test_names_that_no_request_can_hold_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_adapter(model(), tmp_path / "good", seed=1)
    for name in (b"bad\xff\xfe", b"a\x1b[31m", b"n" * 220):
        shutil.copytree(tmp_path / "good", os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
    engine = LocalEngine(model(), tmp_path, Limits(cache_bytes=2**20))
    assert list(engine.adapters.names()) == ["good"]
    assert caplog.text.count("is not served") == 3
    engine.adapters.scan()
    assert caplog.text.count("is not served") == 3  # said once
    write_adapter(model(), tmp_path / "late", seed=2)
    assert engine.adapters.info("late").state == "on disk"  # found at once
    engine.stop()
