"""Rows as people have them: Alpaca, ShareGPT, compressed files, globs, texts, and files that are almost right."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import re
from pathlib import Path

import pytest
from tests.training.test_data import CHAT, byte_pairs, learned, options, rows_of, text_of, write
from tests.training.test_rows import TOOL, TOOLS

from lorakit.errors import LorakitError
from lorakit.train.config.options import DataOptions
from lorakit.train.data.classification import prepare_labels
from lorakit.train.data.examples import prepare
from lorakit.train.data.reading import load_rows, load_splits

PAIRS = [{"prompt": "a", "completion": "yes"}, {"prompt": "b", "completion": "no"}]


def test_alpaca_with_and_without_input() -> None:
    tokenizer = byte_pairs(CHAT)
    rows = [{"instruction": "add", "input": "2+2", "output": "4"}, {"instruction": "add", "input": "", "output": "4"}]
    made = prepare(rows_of(*rows), tokenizer, options())
    assert "user\nadd\n\n2+2<|im_end|>" in text_of(tokenizer, made.examples[0])
    assert "user\nadd<|im_end|>" in text_of(tokenizer, made.examples[1])
    assert learned(tokenizer, made.examples[1]) == ["4<|im_end|>\n"]
    same = prepare(rows_of(rows[0]), tokenizer, options(template="{instruction}|{input}|{output}")).examples
    assert text_of(tokenizer, same[0]).startswith("add|2+2|4")  # a template names the columns as they are


def test_sharegpt() -> None:
    turns = [{"from": "human", "value": "rain?"}, {"from": "gpt", "value": "no."}]
    tokenizer = byte_pairs(CHAT)
    row = {"conversations": [{"from": "system", "value": "S"}, *turns]}
    [example] = prepare(rows_of(row), tokenizer, options()).examples
    assert text_of(tokenizer, example).startswith("<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nrain?")
    assert learned(tokenizer, example) == ["no.<|im_end|>\n"]
    called = [
        turns[0],
        {"from": "function_call", "value": '{"name": "rain", "arguments": {"city": "Rome"}}'},
        {"from": "observation", "value": "none"},
        turns[1],
    ]
    tokenizer = byte_pairs(TOOLS)
    [example] = prepare(rows_of({"conversations": called, "tools": json.dumps([TOOL])}), tokenizer, options()).examples
    assert learned(tokenizer, example)[0] == '<call>rain {"city": "Rome"}</call><|im_end|>\n'
    with pytest.raises(LorakitError, match='has the role "humna"'):
        prepare(rows_of({"conversations": [{"from": "humna", "value": "a"}, turns[1]]}), tokenizer, options())


def zst(raw: bytes) -> bytes:
    """Two frames one after another, as parallel compressors write them."""
    import pyarrow

    return b"".join(pyarrow.compress(part, codec="zstd", asbytes=True) for part in (raw[:9], raw[9:]))


@pytest.mark.parametrize(
    ("suffix", "pack"),
    [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress), (".zst", zst)],
)
def test_compressed_files(suffix: str, pack: object, tmp_path: Path) -> None:
    plain = write(tmp_path / "rows.jsonl", PAIRS)
    packed = tmp_path / f"rows.jsonl{suffix}"
    packed.write_bytes(pack(plain.read_bytes()))  # type: ignore[operator]
    assert [row.fields for row in load_rows(packed).rows] == PAIRS
    packed.write_bytes(packed.read_bytes()[:20])
    with pytest.raises(LorakitError, match="is not a whole"):
        load_rows(packed)


def test_globs_texts_and_arrow(tmp_path: Path) -> None:
    import pyarrow

    for number, row in enumerate(PAIRS):
        write(tmp_path / f"part-{number}.jsonl", [row])
    assert [row.fields for row in load_rows(str(tmp_path / "part-*.jsonl")).rows] == PAIRS
    deep = tmp_path / "deep" / "er"
    deep.mkdir(parents=True)
    write(deep / "part-2.jsonl", [PAIRS[0]])
    assert len(load_rows(str(tmp_path / "**" / "part-*.jsonl"))) == 3
    assert len(load_rows(str(tmp_path / "*" / "er" / "*.jsonl"))) == 1
    with pytest.raises(LorakitError, match="no file matches"):
        load_rows(str(tmp_path / "absent-*.jsonl"))
    (tmp_path / "README.md").write_text("not a row")
    assert len(load_rows(tmp_path)) == 2
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.md").write_text("# one")
    (texts / "b.txt").write_text("two")
    assert [row.fields for row in load_rows(texts).rows] == [{"text": "# one"}, {"text": "two"}]
    table = pyarrow.Table.from_pylist(PAIRS)
    for opened, name in ((pyarrow.ipc.new_file, "file"), (pyarrow.ipc.new_stream, "stream")):
        with opened(str(tmp_path / f"{name}.arrow"), table.schema) as writer:
            writer.write_table(table)
        assert [row.fields for row in load_rows(tmp_path / f"{name}.arrow").rows] == PAIRS
    (tmp_path / "file.arrow").write_bytes(b"none")
    with pytest.raises(LorakitError, match="not a whole Arrow file"):
        load_rows(tmp_path / "file.arrow")


def test_files_that_are_almost_right(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"data": PAIRS}, indent=2))
    assert [row.fields for row in load_rows(tmp_path / "a.json").rows] == PAIRS
    (tmp_path / "b.json").write_text(json.dumps({"messages": [{"role": "user", "content": "a"}]}))
    assert load_rows(tmp_path / "b.json").columns == ("messages",)
    (tmp_path / "c.csv").write_text("prompt;completion\na;yes\nb;no\n")
    assert [row.fields for row in load_rows(tmp_path / "c.csv").rows] == PAIRS
    (tmp_path / "d.jsonl").write_text(json.dumps(PAIRS[0]), encoding="utf-16")
    with pytest.raises(LorakitError, match="looks like UTF-16"):
        load_rows(tmp_path / "d.jsonl")


def test_a_dataset_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A local folder stands for the hub: `datasets` itself reads it, whole and as a stream, with subset and split."""
    import datasets

    for subset, rows in (("one", PAIRS), ("two", PAIRS[:1])):
        (tmp_path / "hub" / subset).mkdir(parents=True)
        write(tmp_path / "hub" / subset / "test.jsonl", rows)
    load = datasets.load_dataset
    asked = []

    def local(name: str, subset: str | None, **given: object) -> object:
        asked.append((name, subset, given))
        return load("json", data_files={"test": str(tmp_path / "hub" / str(subset) / "test.jsonl")}, **given)

    monkeypatch.setattr(datasets, "load_dataset", local)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    train = [
        {"path": "some/pairs", "subset": "one", "split": "test"},
        {"path": "some/pairs", "subset": "two", "split": "test"},
    ]
    given = DataOptions(train=train, shuffle_seed=None)
    rows, _ = load_splits(given)
    assert [(dict(row.fields), row.source) for row in rows.rows] == [(PAIRS[0], 0), (PAIRS[1], 0), (PAIRS[0], 1)]
    assert asked[0] == ("some/pairs", "one", {"split": "test"})
    rows, _ = load_splits(given.replace(streaming=True))
    assert [row.source for row in rows.rows] == [0, 0, 1]
    assert asked[-1] == ("some/pairs", "two", {"split": "test", "streaming": True})


def test_every_row_of_the_page_can_be_copied() -> None:
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    rows = [json.loads(row) for row in re.findall(r"^```json\n(.*?)^```", page, re.DOTALL | re.MULTILINE)]
    assert len(rows) == 9
    for row in rows:
        if "label" in row:
            made = prepare_labels(rows_of(row), byte_pairs(), options(), ["positive", "negative"])
        else:
            turns = "marked" if "train" in json.dumps(row) else "all"
            made = prepare(rows_of(row), byte_pairs(TOOLS), options(turns=turns))
        assert len(made.examples) == 1, row
        assert {name for name, _ in made.report.unused} <= {"tool_call_id"}, row
