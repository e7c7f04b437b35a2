"""The law of rows: what a row holds makes a difference to what is learned, is refused, or is reported.

Over formats and templates, with bugs planted.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.training.test_data import CHAT, FORGETFUL, MARKED, byte_pairs, learned, options, rows_of, text_of

from lorakit.errors import LorakitError
from lorakit.train.config.options import DataOptions
from lorakit.train.data.examples import prepare
from lorakit.train.data.reading import load_rows
from lorakit.train.data.rows import Row, Rows

TOOLS = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] or '' }}{% for c in m['tool_calls'] or [] %}"
    "<call>{{ c['function']['name'] }} {{ c['function']['arguments'] | tojson }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
REASONS = (  # earlier thoughts are left out
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m['role'] == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' and "
    "loop.index0 > ns.last and m['reasoning_content'] is defined %}<think>{{ m['reasoning_content'] }}</think>{% endif %}"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_SYSTEM = CHAT.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}")
TEMPLATES = {
    "chat": CHAT, "tools": TOOLS, "reasons": REASONS, "marks": MARKED, "forgets": FORGETFUL, "no system": NO_SYSTEM,
    "text": "{system}|{prompt}|{completion}",
}  # fmt: skip

TOOL = {"type": "function", "function": {"name": "rain", "parameters": {"city": {"type": "string"}}}}


def call(arguments: Any) -> dict[str, Any]:
    return {"id": "1", "type": "function", "function": {"name": "rain", "arguments": arguments}}


USER, ANSWER = {"role": "user", "content": "rain?"}, {"role": "assistant", "content": "no."}
ROWS: dict[str, dict[str, Any]] = {
    "plain": {"messages": [USER, ANSWER], "id": 7, "source": "web"},
    "system": {"messages": [{"role": "system", "content": "Be brief."}, USER, ANSWER]},
    "names": {"messages": [{**USER, "name": "Ann"}, ANSWER]},
    "reasoning": {"messages": [USER, {**ANSWER, "reasoning_content": "a"}, USER, {**ANSWER, "reasoning_content": "b"}]},
    "unlearned": {"messages": [USER, {**ANSWER, "weight": 0}, USER, {**ANSWER, "train": True}]},
    "tools": {
        "tools": [TOOL],
        "messages": [
            USER,
            {"role": "assistant", "content": "", "tool_calls": [call({"city": "Rome"})]},
            {"role": "tool", "content": "none", "tool_call_id": "1"},
            ANSWER,
        ],
    },
    "tools that are not called": {"tools": [TOOL], "messages": [USER, ANSWER]},
    "pair": {"prompt": "rain?", "completion": "no."},
    "pair with more": {"prompt": "rain?", "completion": "no.", "system": "Be brief.", "note": "x"},
    "preference": {"prompt": "rain?", "completion": "no.", "rejected": "yes."},
    "rated": {"prompt": "rain?", "completion": "no.", "label": True},
    "alpaca input": {"prompt": "add", "input": "2+2", "completion": "4"},
    "images": {"messages": [USER, ANSWER], "images": ["cat.png"]},
}


def made_of(row: dict[str, Any], template: str) -> tuple[Any, dict[str, int]] | None:
    """What is learned of a row, and what is reported; None where it is refused."""
    try:
        made = prepare(Rows((Row(row, "row 1"),), source="rows"), byte_pairs(), options(template=template))
    except LorakitError:
        return None
    return made.examples, dict(made.report.unused)


def without_each(row: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The row without each column, and without each key of each message (its content emptied)."""
    for column in row:
        yield column, {name: value for name, value in row.items() if name != column}
    for index, message in enumerate(row.get("messages", ())):
        for key in message:
            bare = copy.deepcopy(row)
            if key == "content":
                bare["messages"][index][key] = "else"
            else:
                del bare["messages"][index][key]
            yield key, bare


def unaccounted(row: dict[str, Any], template: str) -> list[str]:
    """The fields of a row that make no difference and of which nothing is said."""
    found = made_of(row, template)
    if found is None:
        return []
    examples, reported = found
    return [
        name
        for name, bare in without_each(row)
        if name not in reported
        and (other := made_of(bare, template)) is not None
        and other[0] == examples
        # an answer is learned unless it says otherwise: to say so once more makes no difference
        and not (name in ("train", "weight") and all(m.get(name) in (1, True, None) for m in row["messages"]))
        and not (name == "train" and "weight" in str(row))
    ]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("form", ROWS)
def test_nothing_of_a_row_is_dropped_in_silence(form: str, template: str) -> None:
    assert unaccounted(ROWS[form], TEMPLATES[template]) == []


def test_the_law_is_not_kept_by_refusing_everything() -> None:
    """Which templates take which rows: those that write all of them."""
    taken = {name: {form for form, row in ROWS.items() if made_of(row, text)} for name, text in TEMPLATES.items()}
    plain = {"plain", "names", "unlearned", "pair"}
    assert taken["chat"] == plain | {"system", "pair with more"}
    assert taken["tools"] == taken["chat"] | {"tools", "tools that are not called"}
    assert taken["reasons"] == taken["chat"] | {"reasoning"}
    assert taken["no system"] == plain
    assert taken["text"] == {"pair with more"}


PLANTS: dict[str, tuple[str, Any, str, str]] = {
    "fields are not tried": (
        "lorakit.train.data.templates.ChatTemplate.idle", lambda *_: [], "tools that are not called", "chat"
    ),
    "a system message is dropped": ("lorakit.train.data.templates.ChatTemplate.idle", lambda *_: [], "system", "no system"),
    "thoughts are dropped": ("lorakit.train.data.templates.ChatTemplate.idle", lambda *_: [], "reasoning", "chat"),
    "columns are not counted": ("lorakit.train.data.formats.RowReader._account", lambda *_: None, "preference", "chat"),
    "columns of a text template are not counted": (
        "lorakit.train.data.formats.RowReader._account", lambda *_: None, "pair with more", "chat"
    ),
    "tools are not read": ("lorakit.train.data.formats.read_tools", lambda _: None, "tools", "tools"),
    "weights are not honoured": (
        "lorakit.train.data.formats.is_learned",
        lambda message, *_: (message.pop("weight", 0), message.pop("train", 0)) and message["role"] == "assistant",
        "unlearned",
        "chat",
    ),
}  # fmt: skip


@pytest.mark.parametrize("plant", PLANTS)
def test_planted_bugs_are_found(plant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    place, bug, form, template = PLANTS[plant]
    monkeypatch.setattr(place, bug)
    assert unaccounted(ROWS[form], TEMPLATES[template])


# -- single fields -----------------------------------------------------------------------------------------------------------


def test_what_is_left_out_on_purpose_and_what_is_counted() -> None:
    row = ROWS["preference"]
    with pytest.raises(LorakitError, match=r'"rejected" makes no difference .* data\.ignore: \[rejected\]'):
        prepare(rows_of(row), byte_pairs(CHAT), options())
    assert prepare(rows_of(row), byte_pairs(CHAT), options(ignore=("rejected",))).examples
    tools = ROWS["tools"]
    with pytest.raises(LorakitError, match='"tools" makes no difference'):
        prepare(rows_of(tools), byte_pairs(CHAT), options())
    made = prepare(rows_of(ROWS["plain"], ROWS["plain"], ROWS["names"]), byte_pairs(CHAT), options())
    assert "not used, since no template writes it: id (2 rows), name (1 row), source (2 rows)" in made.report.lines()


@pytest.mark.parametrize("arguments", [{"city": "Rome"}, '{"city": "Rome"}'])
@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL]), [json.dumps(TOOL)]])
def test_tools_and_arguments_may_be_json_text(arguments: Any, tools: Any) -> None:
    row = copy.deepcopy(ROWS["tools"])
    row["messages"][1]["tool_calls"] = [call(arguments)]
    tokenizer = byte_pairs(TOOLS)
    [example] = prepare(rows_of({**row, "tools": tools}), tokenizer, options()).examples
    assert learned(tokenizer, example)[0] == '<call>rain {"city": "Rome"}</call><|im_end|>\n'
    assert '"name": "rain"' in text_of(tokenizer, example).split("<|im_end|>")[0]
    row["messages"][1]["tool_calls"] = [call("not json")]
    with pytest.raises(
        LorakitError, match=r'arguments of a tool call in message 2 of "messages" is text that is not JSON'
    ):
        prepare(rows_of(row), tokenizer, options())
    with pytest.raises(LorakitError, match='"tools" is text that is not JSON'):
        prepare(rows_of({**ROWS["tools"], "tools": "{"}), tokenizer, options())


def test_arrows_nulls_go_at_every_depth(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    one = copy.deepcopy(ROWS["tools"])
    other = copy.deepcopy(ROWS["tools"])
    other["messages"][1]["tool_calls"] = [call({"zone": "CET"})]
    other["tools"][0]["function"]["parameters"] = {"zone": {"type": "string"}}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([one, other]), tmp_path / "rows.parquet")
    given = DataOptions(train="unused")
    read = prepare(load_rows(tmp_path / "rows.parquet"), byte_pairs(TOOLS), given).examples
    assert read == prepare(rows_of(one, other), byte_pairs(TOOLS), given).examples


def test_turns_that_are_not_learned() -> None:
    for off in ({"weight": 0}, {"train": False}, {"weight": 0.0}):
        row = {"messages": [USER, {**ANSWER, **off}, USER, {"role": "assistant", "content": "yes"}]}
        for template, end in ((CHAT, "\n"), (MARKED, "")):
            tokenizer = byte_pairs(template)
            [example] = prepare(rows_of(row), tokenizer, options()).examples
            assert learned(tokenizer, example) == [f"yes<|im_end|>{end}"]
            assert "no." in text_of(tokenizer, example)
    for wrong, said in (({"weight": 0.5}, "weight 0.5"), ({"train": "no"}, "train 'no'")):
        with pytest.raises(LorakitError, match=said):
            prepare(rows_of({"messages": [USER, {**ANSWER, **wrong}]}), byte_pairs(CHAT), options())
    with pytest.raises(LorakitError, match="no assistant turn to learn; its roles are user, assistant"):
        prepare(rows_of({"messages": [USER, {**ANSWER, "weight": 0}]}), byte_pairs(CHAT), options())


def test_unknown_roles_are_refused() -> None:
    wrong = {"messages": [{**USER, "role": "usr"}, ANSWER]}
    with pytest.raises(LorakitError, match=r'has the role "usr"; known are .*did you mean "user"'):
        prepare(rows_of(wrong), byte_pairs(CHAT), options())
    named = CHAT.replace("{% for m", "{# 'critic' #}{% for m", 1)
    row = {"messages": [{**USER, "role": "critic"}, ANSWER]}
    assert prepare(rows_of(row), byte_pairs(named), options()).examples


def test_an_answer_that_comes_out_empty_is_never_learned() -> None:
    mute = CHAT.replace("{{ m['content'] }}", "{% if m['role'] != 'assistant' %}{{ m['content'] }}{% endif %}")
    with pytest.raises(LorakitError, match=r"makes no difference|is empty after the template"):
        prepare(rows_of(ROWS["plain"]), byte_pairs(mute), options())
    row = {"messages": [USER, {"role": "assistant", "content": "<|im_end|>"}]}
    with pytest.raises(LorakitError, match="is empty after the template"):
        prepare(rows_of(row), byte_pairs(CHAT), options())


def test_thoughts_are_learned_where_they_will_be_written() -> None:
    tokenizer = byte_pairs(REASONS)
    made = prepare(rows_of(ROWS["reasoning"]), tokenizer, options())
    assert [learned(tokenizer, one) for one in made.examples] == [
        ["<think>a</think>no.<|im_end|>\n"],
        ["<think>b</think>no.<|im_end|>\n"],
    ]
    assert "<think>a" not in text_of(tokenizer, made.examples[1])


def test_answers_that_merge_with_their_prompts_stand_after_what_will_be_asked() -> None:
    merging = (
        "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'user' %} {% else %}</s>{% endif %}{% endfor %}"
    )
    row = {"messages": [{"role": "user", "content": "Answer:"}, {"role": "assistant", "content": "yes"}] * 2}
    tokenizer = byte_pairs(merging)
    made = prepare(rows_of(row), tokenizer, options()).examples
    assert [learned(tokenizer, one) for one in made] == [["yes</s>"], ["yes</s>"]]
    for at, example in enumerate(made):
        prompt = tokenizer.apply_chat_template(row["messages"][: 2 * at + 1], return_dict=False)
        assert example.input_ids[: len(prompt)] == prompt
