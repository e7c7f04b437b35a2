"""Data that do not fit into memory: rows in a file, tokens in a mapped cache, rows that are streamed; the same as in memory."""

from __future__ import annotations

import io
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tests.training.test_data import CHAT, byte_pairs, write
from tests.training.tiny import InterruptAt, InterruptionError, llama
from transformers import PreTrainedTokenizerFast

import lorakit as lk
from lorakit.errors import LorakitError
from lorakit.train.config.options import DataOptions, TrainConfig, TrainOptions
from lorakit.train.data import examples, reading, store
from lorakit.train.data.examples import Maker, Prepared, prepare
from lorakit.train.data.reading import load_splits
from lorakit.train.data.rows import StoredRows
from lorakit.train.data.streaming import streamed
from lorakit.train.step.support import choose_path
from lorakit.train.trainer import LoraTrainer

PAIRS = [{"prompt": f"good {'really ' * (n % 4)}{n}?", "completion": ["yes", "no"][n % 2]} for n in range(40)]
MORE = [{"text": f"terrible film {'the ' * (n % 5)}{n}"} for n in range(17)]


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two sources, the second compressed, and a cache of their own."""
    import gzip

    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
    pairs = write(tmp_path / "pairs.jsonl", [*PAIRS, {"prompt": 3}])
    text = "".join(json.dumps(one) + "\n" for one in MORE)
    (tmp_path / "more.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    return [str(pairs), str(tmp_path / "more.jsonl.gz")]


def options(train: Any, **values: Any) -> DataOptions:
    return DataOptions(train=train, **{"on_bad_row": "skip", **values})


def both(asked: DataOptions, tokenizer: Any = None) -> list[Prepared]:
    rows, held = load_splits(asked)
    tokenizer = tokenizer or byte_pairs(CHAT)
    return [prepare(one, tokenizer, asked) for one in (rows, held) if one is not None]


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"evaluation_size": 0.3, "limit": 20, "evaluation_limit": 4, "shuffle_seed": 3},
        {"shuffle_seed": None, "overflow": "drop", "max_length": 24},
        {"mix": "all-exhausted", "evaluation_size": 5},
    ],
)
def test_rows_in_a_file_give_what_rows_in_memory_give(
    more: dict[str, Any], files: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = options(files, **more)
    expected = both(asked)
    monkeypatch.setattr(reading, "IN_MEMORY", 0)
    rows, _ = load_splits(asked)
    assert isinstance(rows.rows, StoredRows)
    for cache in ("off", "on", "on"):
        found = both(asked.replace(cache=cache))
        for one, other in zip(found, expected, strict=True):
            assert list(one.examples) == list(other.examples)
            assert (one.report, one.prompt) == (other.report, other.prompt)
            assert one.examples.digest() == found[expected.index(other)].examples.digest()


def test_the_cache_is_used_for_the_same_content_and_nothing_else(
    files: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked = options(files, cache="on")
    whole = both(asked)[0]
    built: list[int] = []
    build = Maker.build
    monkeypatch.setattr(Maker, "build", lambda self, *given: built.append(1) or build(self, *given))

    def builds(asked: DataOptions, tokenizer: Any = None) -> bool:
        built.clear()
        both(asked, tokenizer)
        return bool(built)

    caplog.set_level("INFO")
    assert not builds(asked)
    assert "using the tokens cached in" in caplog.text
    assert "delete the folder to clear it" in caplog.text
    assert not builds(asked.replace(on_bad_row="skip", cache="on"))
    assert list(both(asked)[0].examples) == list(whole.examples)
    with pytest.raises(LorakitError, match=r'1 of 58 rows cannot be used:\n.*line 41: "prompt" is 3, expected text'):
        builds(asked.replace(on_bad_row="raise"))
    assert builds(asked.replace(max_length=20))
    assert builds(asked.replace(limit=30))
    assert builds(asked, byte_pairs(CHAT.replace("assistant", "model")))
    assert builds(asked, byte_pairs(CHAT, bos=True))
    assert builds(asked.replace(cache="off"))
    assert not builds(asked)
    Path(files[0]).write_text(Path(files[0]).read_text().replace("good", "fine"))
    assert builds(asked)
    assert not builds(asked)
    for entry in (store.cache_root() / "tokens").iterdir():
        (entry / "tokens.bin").write_bytes(b"1234")
    assert builds(asked)
    assert "is damaged" in caplog.text
    assert not [one for one in (store.cache_root() / "tokens").iterdir() if one.name.startswith("unfinished")]


def test_tokenisation_shows_how_far_it_is(
    files: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(examples, "TOLD", 30)
    monkeypatch.setattr("lorakit.train.data.rows.Rows.chunks.__defaults__", (10,))
    caplog.set_level("INFO")
    asked = options(files)
    rows, _ = load_splits(asked)
    prepare(rows, byte_pairs(CHAT), asked)
    assert "tokenised 30 of 58 rows" in caplog.text
    assert "tokenised 58 of 58 rows" in caplog.text
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    prepare(rows, byte_pairs(CHAT), asked, console)
    assert "tokenising" in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_full_disk_says_what_would_work(files: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store.np, "save", full)
    with pytest.raises(
        LorakitError, match=r"No space left on device; free some space.*LORAKIT_CACHE.*data\.cache: off"
    ):
        both(options(files, cache="on"))
    assert list((store.cache_root() / "tokens").iterdir()) == []


# -- streaming ---------------------------------------------------------------------------------------------------------------


def stream(asked: DataOptions) -> Prepared:
    rows, _ = load_splits(asked)
    return streamed(rows, byte_pairs(CHAT), asked)


def test_streamed_rows_are_those_of_the_files(files: list[str]) -> None:
    whole = list(both(options(files, shuffle_seed=None))[0].examples)
    asked = options(files, streaming=True, shuffle_seed=None)
    examples = stream(asked).examples
    assert list(itertools.islice(examples, 2 * len(whole))) == whole + whole
    drawn = stream(asked.replace(shuffle_seed=1, shuffle_buffer=8)).examples
    first, second = (list(itertools.islice(drawn, 2 * len(whole)))[at : at + len(whole)] for at in (0, len(whole)))
    assert first != whole
    assert first != second
    for one in (first, second):
        assert sorted(map(repr, one)) == sorted(map(repr, whole))
    assert list(itertools.islice(drawn, 20)) == first[:20]
    report = stream(asked).report
    assert "pairs.jsonl (streamed; the first 41 rows): " in report.lines()[1]
    weighted = [{"path": path, "weight": weight} for path, weight in zip(files, (0.1, 0.9), strict=True)]
    mixed = stream(options(weighted, streaming=True, mix="first-exhausted")).examples
    texts = {repr(one) for one in both(options(files[1]))[0].examples}
    assert sum(repr(one) in texts for one in itertools.islice(mixed, 15)) > 9


def test_what_does_not_work_with_streaming(files: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    run = {"model": "m", "data": {"train": files[0], "streaming": True}}
    with pytest.raises(LorakitError, match=r"train\.max_steps is not given, and rows that are streamed have no end"):
        TrainConfig(**run)
    run["train"] = {"max_steps": 3}
    assert TrainConfig(**run).data.streaming
    with pytest.raises(LorakitError, match=r"data\.streaming is on while task is seq-cls"):
        TrainConfig(**run, task="seq-cls")
    with pytest.raises(LorakitError, match="init is eva, which measures rows drawn from all"):
        TrainConfig(**run, init="eva")
    with pytest.raises(LorakitError, match=r"1 of 41 rows cannot be used"):
        stream(options(files[0], streaming=True, on_bad_row="raise"))
    monkeypatch.setattr(reading, "HEAD", 10)
    found = stream(options(files[0], streaming=True, on_bad_row="raise")).examples
    with pytest.raises(LorakitError, match=r"(?s)a row cannot be used: .*line 41: .*data\.on_bad_row: skip"):
        list(itertools.islice(found, 60))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(LorakitError, match="several processes would all see the same rows"):
        stream(options(files[0], streaming=True))


def test_a_streamed_run_goes_on_where_it_ended(files: list[str], tmp_path: Path) -> None:
    asked = options(files[0], streaming=True, shuffle_buffer=16, max_length=100)
    torch.manual_seed(0)
    tokenizer = byte_pairs(CHAT)

    def make(name: str, *callbacks: Any) -> LoraTrainer:
        how = {
            "batch_size": 4,
            "logging_steps": 1,
            "max_steps": 14,
            "save_steps": 4,
            "precision": "fp32",
            "fast_path": "off",
        }
        config = TrainConfig(
            model="m", data=asked, method=lk.LoRA(rank=2), train=TrainOptions(output=str(tmp_path / name), **how)
        )
        model = llama()
        model.resize_token_embeddings(len(tokenizer))
        torch.manual_seed(1)
        adapter = lk.attach(model, config.method, **config.attach_arguments())
        examples = stream(asked).examples
        return LoraTrainer(model, adapter, config, examples, path=choose_path(model, "off"), callbacks=callbacks)

    def losses(trainer: LoraTrainer) -> list[float]:
        return [event["loss"] for event in trainer.state.log_history if "loss" in event]

    whole = make("whole")
    whole.train_from()  # 14 steps of 4 are more than one pass over the 40 rows
    with pytest.raises(InterruptionError):
        make("cut", InterruptAt(13)).train_from()
    resumed = make("cut")
    resumed.train_from(resume=True)
    assert losses(resumed) == losses(whole)
    assert len(set(losses(whole))) == 14


# -- memory ------------------------------------------------------------------------------------------------------------------

TRAIN = """
import resource, sys
from lorakit.train.config.run import load_config
from lorakit.train.run import train
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
train(load_config(None, sys.argv[1:]))
print("grown", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """68 MB of text are 23 million tokens: in lists of integers, about 5 GB."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
    words = [f"w{number}" for number in range(60)]
    core = Tokenizer(models.WordLevel({word: at for at, word in enumerate(["<unk>", *words])}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="<unk>").save_pretrained(
        tmp_path / "base"
    )
    llama().save_pretrained(tmp_path / "base")
    line = " ".join(words[number * number % 60] for number in range(500))
    with (tmp_path / "rows.jsonl").open("w") as file:
        for number in range(int(68e6) // len(line)):
            file.write(json.dumps({"text": f"w{number % 60} {line}"}) + "\n")
    flags = {"model": tmp_path / "base", "data.train": tmp_path / "rows.jsonl", "train.output": tmp_path / "out"}
    flags |= {"train.max_steps": 2, "train.precision": "fp32", "train.compile": "off", "data.evaluation_size": 4}
    given = [f"{name}={value}" for name, value in flags.items()]
    done = subprocess.run([sys.executable, "-c", TRAIN, *given], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "tokens cached in" in done.stderr or (tmp_path / "cache" / "tokens").exists()
    grown = int(done.stdout.split("grown")[1])  # in KB
    assert grown < 1_200_000, f"{grown / 1e3:.0f} MB"
