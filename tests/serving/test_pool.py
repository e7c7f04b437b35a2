"""Adapters come and go without a running request noticing; what is unusable never reaches a forward."""

from __future__ import annotations

import gc
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lorakit as lk
from lorakit.serve.engine.engine import LocalEngine
from lorakit.serve.engine.pool import Pool
from lorakit.serve.engine.scheduler import Limits
from lorakit.serve.model.packed import AdapterReader
from lorakit.serve.request import Adapters, Engine, Refused, UnknownAdapter
from serving.small import Oracle, greedy, model, prompt, write_adapter


@pytest.fixture
def base() -> Any:
    return model()


def pool_of(base: Any, store: Path, budget: int = 2**24, **options: Any) -> Pool:
    pool = Pool([AdapterReader(base, **options)], store, budget)
    pool.start()
    return pool


def test_the_contract_is_kept(base: Any, tmp_path: Path) -> None:
    engine = LocalEngine(base, tmp_path, Limits(cache_bytes=2**20))
    assert isinstance(engine, Engine)
    assert isinstance(engine.adapters, Adapters)
    engine.stop()


def test_states_and_counts(base: Any, tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_adapter(base, tmp_path / name)
    (tmp_path / "no_adapter").mkdir()
    pool = pool_of(base, tmp_path)
    assert pool.names() == ["a", "b"]
    assert [info.state for info in pool.all()] == ["on disk", "on disk"]
    info = pool.load("a")
    assert (info.state, info.method, info.how, info.rank, info.loads) == ("resident", "lora", "form", 4, 1)
    assert info.bytes > 0
    assert pool.pin("b").state == "pinned"
    assert pool.unpin("b").state == "resident"
    assert pool.unload("a").state == "on disk"
    assert pool.bytes == pool.info("b").bytes
    write_adapter(base, tmp_path / "c")
    assert pool.scan() == ["a", "b", "c"]
    shutil.rmtree(tmp_path / "c")
    assert pool.scan() == ["a", "b"]
    with pytest.raises(UnknownAdapter, match=r"unknown adapter 'c'\. Known: a, b"):
        pool.info("c")
    pool.stop()


def test_the_longest_unused_goes_first_and_ranks_count(base: Any, tmp_path: Path) -> None:
    for name, rank in (("a", 4), ("b", 4), ("c", 4), ("wide", 9)):
        write_adapter(base, tmp_path / name, lk.LoRA(rank=rank))
    size = pool_of(base, tmp_path).load("a").bytes
    wide = pool_of(base, tmp_path).load("wide").bytes
    assert 2 * size < wide
    pool = pool_of(base, tmp_path, budget=int(2.5 * size))
    for name in ("a", "b", "a"):
        pool.release(pool.claim(name))
        pool.load(name)
    pool.release(pool.claim("a"))
    pool.load("c")
    assert {info.name: info.state for info in pool.all() if info.state == "resident"} == {
        "a": "resident",
        "c": "resident",
    }
    assert pool.info("b").evictions == 1
    pool.pin("a")
    with pytest.raises(Refused, match="finds no room"):
        pool.load("wide")
    assert pool.info("a").state == "pinned"


def test_an_adapter_in_use_stays_until_its_requests_end(base: Any, tmp_path: Path) -> None:
    """Unloaded, changed and reloaded while it runs: the running answer is the old adapter's, the next the new one's."""
    write_adapter(base, tmp_path / "a", seed=1)
    old = Oracle(base, tmp_path)
    ids = prompt(1, 10)
    expected_old = old.answer(ids, {"a": 1.0}, 12)
    engine = LocalEngine(base, tmp_path, Limits(cache_bytes=2**20))
    engine.pool.start()
    engine.adapters.load("a")
    first = engine.submit(greedy("first", ids, {"a": 1.0}, 12))
    for _ in range(3):
        engine.step()
    assert engine.adapters.unload("a").state == "draining"
    write_adapter(model(), tmp_path / "a", seed=2)
    expected_new = Oracle(model(), tmp_path).answer(ids, {"a": 1.0}, 12)
    assert expected_new != expected_old
    second = engine.submit(greedy("second", ids, {"a": 1.0}, 12))
    while not (first.ended and second.ended):
        engine.step()
    assert first.tokens() == expected_old
    assert second.tokens() == expected_new
    assert engine.adapters.info("a").bytes == engine.adapters.bytes  # the old one has gone
    write_adapter(model(), tmp_path / "a", seed=1)  # changed files are noticed without being told
    third = engine.submit(greedy("third", ids, {"a": 1.0}, 12))
    while not third.ended:
        engine.step()
    assert third.tokens() == expected_old
    engine.stop()


def break_tensors(folder: Path, change: Any) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def _nan(tensors: dict[str, torch.Tensor]) -> None:
    next(iter(tensors.values()))[0] = float("nan")


def _shape(tensors: dict[str, torch.Tensor]) -> None:
    name = next(iter(tensors))
    tensors[name] = tensors[name][:, :-1].contiguous()


def _missing(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[next(iter(tensors))]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: break_tensors(folder, _nan), "NaN"),
        (lambda folder: break_tensors(folder, _shape), "shape"),
        (lambda folder: break_tensors(folder, _missing), "lacks"),
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"\0" * 100), "adapter_model.safetensors"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "adapter_model"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "adapter_config.json"),
        (lambda folder: (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "X"})), "X"),
    ],
    ids=["nan", "shape", "missing", "garbage", "no file", "json", "method"],
)
def test_a_corrupt_adapter_is_refused_with_its_reason(base: Any, tmp_path: Path, damage: Any, reason: str) -> None:
    """And heals when its files do; meanwhile others are served."""
    write_adapter(base, tmp_path / "bad")
    write_adapter(base, tmp_path / "good", seed=3)
    (tmp_path / "bad" / "lorakit.json").unlink()
    damage(tmp_path / "bad")
    engine = LocalEngine(base, tmp_path, Limits(cache_bytes=2**20))
    engine.start()
    good = engine.submit(greedy("good", prompt(1, 5), {"good": 1.0}, 3))
    with pytest.raises(Refused, match=reason):
        engine.submit(greedy("bad", prompt(1, 5), {"bad": 1.0}, 3)).tokens(60)
    assert good.tokens(60) == Oracle(model(), tmp_path).answer(prompt(1, 5), {"good": 1.0}, 3)
    info = engine.adapters.info("bad")
    assert info.state == "refused"
    assert reason in info.reason
    assert str(tmp_path) not in info.reason, "clients see it"
    with pytest.raises(Refused, match=reason):  # at once now
        engine.submit(greedy("again", prompt(1, 5), {"bad": 1.0}, 3))
    shutil.rmtree(tmp_path / "bad")
    write_adapter(model(), tmp_path / "bad")
    assert len(engine.submit(greedy("healed", prompt(1, 5), {"bad": 1.0}, 3)).tokens(60)) == 3
    engine.stop()


def test_a_vanished_adapter_is_served_from_memory_or_unknown(base: Any, tmp_path: Path) -> None:
    for name in ("kept", "lost"):
        write_adapter(base, tmp_path / name)
    engine = LocalEngine(base, tmp_path, Limits(cache_bytes=2**20))
    engine.start()
    engine.adapters.load("kept")
    shutil.rmtree(tmp_path / "kept")
    shutil.rmtree(tmp_path / "lost")
    assert len(engine.submit(greedy(1, [5, 6], {"kept": 1.0}, 3)).tokens(60)) == 3
    with pytest.raises(UnknownAdapter, match="'lost' has vanished"):
        engine.submit(greedy(2, [5, 6], {"lost": 1.0}, 3))
    engine.stop()


def test_methods_without_a_form_as_the_operator_chose(base: Any, tmp_path: Path) -> None:
    write_adapter(base, tmp_path / "shira", lk.SHiRA(rank=8), std=2.0)
    oracle = Oracle(base, tmp_path)
    expected = oracle.answer(prompt(4, 9), {"shira": 1.0}, 6)
    assert expected != oracle.answer(prompt(4, 9), {}, 6)
    with pytest.raises(Refused, match=r"shira cannot be written as .* formless dense"):
        pool_of(base, tmp_path).load("shira")
    for options, how in (({"formless": "dense"}, "dense"), ({"formless": "svd", "stand_in": (48, 0.01)}, "svd")):
        for compiled in (True, False):
            engine = LocalEngine(model(), tmp_path, Limits(cache_bytes=2**20), compiled=compiled, **options)
            engine.start()
            assert engine.submit(greedy(1, prompt(4, 9), {"shira": 1.0}, 6)).tokens(60) == expected
            assert engine.adapters.info("shira").how == how
            engine.stop()
    with pytest.raises(Refused, match=r"rank-1 stand-in for shira in .* differs by"):
        pool_of(base, tmp_path, formless="svd", rank=1).load("shira")


def test_what_a_batch_cannot_share_is_refused(base: Any, tmp_path: Path) -> None:
    write_adapter(base, tmp_path / "saved", modules_to_save=["lm_head"])
    write_adapter(base, tmp_path / "table", target_modules=["embed_tokens", "q_proj"])
    pool = pool_of(base, tmp_path)
    with pytest.raises(Refused, match=r"replaces lm_head.weight whole"):
        pool.load("saved")
    with pytest.raises(Refused, match=r"embed_tokens, a \w*Embedding"):
        pool.load("table")


def test_the_output_layer_and_parts_of_fused_layers(tmp_path: Path) -> None:
    base = model("gpt2")
    parts = {"c_attn": {"q": (0, 48), "v": (96, 144)}}
    write_adapter(base, tmp_path / "parts", lk.LoRA(rank=3), target_modules=["c_attn"], parts=parts)
    write_adapter(base, tmp_path / "head", lk.LoRA(rank=3), target_modules=["lm_head"])
    oracle = Oracle(base, tmp_path)
    for compiled in (True, False):
        engine = LocalEngine(model("gpt2"), tmp_path, Limits(cache_bytes=2**20), compiled=compiled)
        engine.start()
        tickets = [engine.submit(greedy(n, prompt(1, 9), {n: 1.0}, 6)) for n in ("parts", "head")]
        for ticket in tickets:
            assert ticket.tokens(60) == oracle.answer(prompt(1, 9), ticket.request.blend, 6)
        engine.stop()


def test_more_pinned_than_fits_is_told_and_does_not_hang(base: Any, tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_adapter(base, tmp_path / name)
    size = (tmp_path / "a" / "adapter_model.safetensors").stat().st_size
    engine = LocalEngine(base, tmp_path, Limits(cache_bytes=2**20, adapter_bytes=int(1.5 * size)))
    engine.start()
    engine.adapters.pin("a")
    with pytest.raises(Refused, match="find no room"):
        engine.submit(greedy(1, [4, 5], {"b": 1.0}, 2)).tokens(60)
    engine.adapters.unpin("a")
    assert len(engine.submit(greedy(2, [4, 5], {"b": 1.0}, 2)).tokens(60)) == 2
    engine.stop()


@pytest.mark.slow
def test_memory_is_flat_over_many_loads(base: Any, tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        write_adapter(base, tmp_path / name)
    pool = pool_of(base, tmp_path)

    def tensors() -> int:
        gc.collect()
        return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())

    levels = []
    for _ in range(4):
        for _ in range(5):
            for name in pool.names():
                pool.reload(name)
                pool.unload(name)
        levels.append((tensors(), pool.bytes))
    assert levels[1] == levels[2] == levels[3]
    assert pool.bytes == 0
    pool.stop()


@pytest.mark.parametrize(
    "method",
    [lk.LoRA(rank=3), lk.DoRA(inner=lk.LoRA(rank=3)), lk.VeRA(rank=4), lk.IA3(feedforward_modules=["down_proj"])],
    ids=lambda one: one.name,
)
def test_many_adapters_of_one_frame_are_each_read_as_alone(base: Any, tmp_path: Path, method: Any) -> None:
    """The first is built, the second filled by name, the third by the places that the second gave; each has its own numbers."""
    for seed, name in enumerate("abcd"):
        write_adapter(base, tmp_path / name, method, seed=seed)
    one = AdapterReader(base, formless="dense")
    for name in "abcdb":
        alone = AdapterReader(base, formless="dense").read(name, tmp_path / name)
        found = one.read(name, tmp_path / name)
        assert torch.equal(found.buffer, alone.buffer)
        assert found.content == alone.content
    if method.name == "lora":
        assert [built.places is not None for built in one._built.values()] == [True]


def test_what_was_changed_afterwards_is_refused_in_every_way_of_reading(base: Any, tmp_path: Path) -> None:
    """lorakit.json of other tensors, and a NaN, also where the places are known already."""
    for seed, name in enumerate(("a", "b", "c", "changed", "nan", "d")):
        write_adapter(base, tmp_path / name, seed=seed)
    tensors = load_file(tmp_path / "changed" / "adapter_model.safetensors")
    save_file({key: 2 * one for key, one in tensors.items()}, tmp_path / "changed" / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, tmp_path / "nan" / "adapter_model.safetensors")
    one = AdapterReader(base)
    for name in "abc":
        one.read(name, tmp_path / name)
    with pytest.raises(Refused, match="was changed after lorakit wrote"):
        one.read("changed", tmp_path / "changed")
    with pytest.raises(Refused, match="a NaN or an infinity"):
        one.read("nan", tmp_path / "nan")
    assert torch.equal(one.read("d", tmp_path / "d").buffer, AdapterReader(base).read("d", tmp_path / "d").buffer)


def test_what_cannot_be_served_is_said_at_the_start(base: Any, tmp_path: Path) -> None:
    """By its configuration alone, before anybody asks; the others are left on disk."""
    write_adapter(base, tmp_path / "good")
    write_adapter(base, tmp_path / "edit", lk.Bottleneck(size=3))
    write_adapter(base, tmp_path / "shadow")
    for name in ("lorakit.json", "adapter_config.json"):
        (tmp_path / "shadow" / name).unlink()
    (tmp_path / "shadow" / "adapter_config.json").write_text('{"peft_type": "SHADOW"}')
    pool = pool_of(base, tmp_path, formless="refuse")
    pool._looking.join(20)
    assert {info.name: info.state for info in pool.all()} == {"good": "on disk", "edit": "refused", "shadow": "refused"}
    assert "is an edit" in pool.info("edit").reason
    assert "SHADOW" in pool.info("shadow").reason
    pool.stop()
