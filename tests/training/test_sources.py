"""Several sources in one run: each as it is alone, one after the other or interleaved; and what is refused."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tests.training.test_data import CHAT, byte_pairs, text_of, write

from lorakit.errors import LorakitError
from lorakit.train.config.document import parse_document
from lorakit.train.config.options import DataOptions
from lorakit.train.config.run import load_config, to_yaml
from lorakit.train.config.sources import Source
from lorakit.train.data.classification import prepare_labels
from lorakit.train.data.examples import Prepared, prepare, questions
from lorakit.train.data.reading import load_splits

CHATS = [
    {"messages": [{"role": "user", "content": f"u{n}"}, {"role": "assistant", "content": "yes"}]} for n in range(6)
]
PAIRS = [{"q": f"p{n}", "a": "no"} for n in range(3)]
TEXTS = [{"text": f"text {n}"} for n in range(4)]


@pytest.fixture
def sources(tmp_path: Path) -> list[dict[str, Any]]:
    """Chats, a file of other columns with a template of its own, and texts."""
    write(tmp_path / "chats.jsonl", CHATS)
    write(tmp_path / "pairs.jsonl", PAIRS)
    write(tmp_path / "texts.jsonl", TEXTS)
    columns = {"prompt": "q", "completion": "a"}
    pairs = {"path": str(tmp_path / "pairs.jsonl"), "columns": columns, "template": "Q: {prompt} A:\n{completion}"}
    return [{"path": str(tmp_path / "chats.jsonl")}, pairs, {"path": str(tmp_path / "texts.jsonl"), "format": "text"}]


def made(options: DataOptions) -> Prepared:
    rows, _ = load_splits(options)
    return prepare(rows, byte_pairs(CHAT), options)


def options(train: Any, **values: Any) -> DataOptions:
    return DataOptions(train=train, **{"shuffle_seed": None, **values})


def test_each_source_gives_what_it_gives_alone(sources: list[dict[str, Any]]) -> None:
    alone = [made(options([source])) for source in sources]
    together = made(options(sources))
    assert list(together.examples) == [example for one in alone for example in one.examples]
    lines = together.report.lines()
    assert lines[0].startswith("3 sources: 13 rows (messages and template and text), 13 examples")
    assert [line.split(":")[0].rpartition("/")[2] for line in lines[1:]] == [
        "chats.jsonl",
        "pairs.jsonl",
        "texts.jsonl",
    ]
    assert "6 rows (messages), 6 examples" in lines[1]
    assert "3 rows (template), 3 examples" in lines[2]
    shuffled = made(options(sources, shuffle_seed=3))
    assert sorted(map(repr, shuffled.examples)) == sorted(map(repr, together.examples))
    assert list(shuffled.examples) != list(together.examples)


def test_one_source_is_the_list_of_one(sources: list[dict[str, Any]]) -> None:
    path = sources[0]["path"]
    whole = [
        list(made(options(train, evaluation_size=2, shuffle_seed=1)).examples)
        for train in (path, [path], [{"path": path}])
    ]
    assert whole[0] == whole[1] == whole[2]


def test_rows_held_out_keep_the_form_of_their_source(sources: list[dict[str, Any]]) -> None:
    asked = options(sources[:2], evaluation_size=4, shuffle_seed=0)
    _, held = load_splits(asked)
    assert held is not None
    found = questions(held, byte_pairs(CHAT), asked)
    assert [one.where for one in found] == [row.where for row in held.rows]
    assert {one.prompt.startswith("Q: ") for one in found} == {True, False}
    apart = options(sources[0]["path"], evaluation=[sources[1]])
    _, held = load_splits(apart)
    assert held is not None
    assert text_of(byte_pairs(CHAT), prepare(held, byte_pairs(CHAT), apart).examples[0]).startswith("Q: p0 A:\nno")


@pytest.mark.parametrize("mix", ["first-exhausted", "all-exhausted"])
def test_interleaved_sources(mix: str, sources: list[dict[str, Any]]) -> None:
    weighted = [{**source, "weight": weight} for source, weight in zip(sources, (0.2, 0.2, 0.6), strict=True)]
    first, again = (made(options(weighted, mix=mix, shuffle_seed=1)) for _ in range(2))
    assert list(first.examples) == list(again.examples)
    counts = Counter(map(repr, first.examples))
    concatenated = {repr(one) for one in made(options(sources)).examples}
    per_source = [one.examples for one in first.report.sources]
    assert sum(per_source) == len(first.examples) == first.report.examples
    if mix == "first-exhausted":
        assert max(counts.values()) == 1
        assert any(count == size for count, size in zip(per_source, (6, 3, 4), strict=True))
    else:
        assert set(counts) == concatenated
        assert max(counts.values()) > 1
    assert len(made(options(weighted, mix=mix, shuffle_seed=1, limit=2)).examples) == 2


def test_weights_are_probabilities(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / f"{name}.jsonl", [{"text": f"{name} {n}"} for n in range(2000)])
    given = [{"path": str(tmp_path / f"{name}.jsonl"), "weight": weight} for name, weight in (("a", 0.75), ("b", 0.25))]
    asked = options(given, mix="first-exhausted", limit=1000)
    rows, _ = load_splits(asked)
    assert rows.order is not None
    drawn = rows.sources[rows.order]
    assert 0.7 < (drawn == 0).mean() < 0.8


def test_classes_of_several_sources(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [{"text": "a", "label": "good"}])
    write(tmp_path / "b.jsonl", [{"review": "b", "stars": "bad"}])
    given = [
        str(tmp_path / "a.jsonl"),
        {"path": str(tmp_path / "b.jsonl"), "columns": {"text": "review", "label": "stars"}},
    ]
    rows, _ = load_splits(options(given))
    found = prepare_labels(rows, byte_pairs(), options(given))
    assert [found.names[one.label] for one in found.examples] == ["good", "bad"]


@pytest.mark.parametrize(
    ("train", "more", "said"),
    [
        ([{"path": "a", "colums": {}}], {}, r'unknown option "data\.train\.colums"; did you mean "data\.train\.columns"'),
        ([{"columns": {}}], {}, "a source needs `path`, and this one has columns"),
        ([{"path": "a", "format": "sharegpt"}], {}, r"data\.train\.format: expected one of auto"),
        ([{"path": "a", "weight": 0}, "b"], {"mix": "all-exhausted"}, r"data\.train\.weight: expected a number above 0"),
        ([{"path": "a", "weight": 0.5}, "b"], {"mix": "all-exhausted"}, "b has no weight while others have"),
        ([{"path": "a", "weight": 0.5}, {"path": "b", "weight": 0.6}], {"mix": "first-exhausted"}, r"0\.5 and 0\.6 sum to 1"),
        ([{"path": "a", "weight": 0.5}, {"path": "b", "weight": 0.5}], {}, r"data\.mix is concatenate; set data\.mix"),
        ("a", {"mix": "first-exhausted"}, "which needs several sources in data.train; found one"),
        ([3], {}, "expected a file, folder or dataset by name, a mapping with `path`, or a list of these"),
        ("a", {"pack_across": True}, "set data.pack_to"),
        ("a", {"turns": "last", "completion_only_loss": False}, "data.turns is last while"),
        ("a", {"streaming": True, "evaluation_size": 2}, "data.evaluation_size is 2, which does not work with data.streaming"),
        ("a", {"streaming": True, "pack_to": 8}, "data.pack_to is 8, which does not work with data.streaming"),
    ],
)  # fmt: skip
def test_what_sources_cannot_be(train: Any, more: dict[str, Any], said: str) -> None:
    with pytest.raises(LorakitError, match=said):
        DataOptions(train=train, **more)


def test_sources_on_the_command_line_and_in_files() -> None:
    flow = "[{path: a.jsonl, columns: {prompt: q}, weight: 0.7}, {path: b, weight: 0.3}]"
    config = load_config(None, ["--model", "m", "--data.train", flow, "--data.mix", "all-exhausted"])
    assert config.data.train_sources == (
        Source(path="a.jsonl", columns={"prompt": "q"}, weight=0.7),
        Source(path="b", weight=0.3),
    )
    plain = load_config(None, ["--model", "m", "--data.train", "a.jsonl,b.jsonl"])
    assert plain.data.train == ("a.jsonl", "b.jsonl")
    assert load_config(None, ["--model", "m", "--data.train", "a.jsonl"]).data.train == "a.jsonl"
    assert "{path: chats.jsonl, format: messages" in " ".join(to_yaml(config).replace("#", "").split())
    tree, _ = parse_document(to_yaml(config), "run.yaml")
    assert tree["data"]["train"] == [
        {"path": "a.jsonl", "columns": {"prompt": "q"}, "weight": 0.7},
        {"path": "b", "weight": 0.3},
    ]
    assert DataOptions(**tree["data"]) == config.data
    with pytest.raises(LorakitError, match=r'unknown option "data\.train\.pth".*\(--data\.train\)'):
        load_config(None, ["--model", "m", "--data.train", "[{path: a, pth: b}]"])
