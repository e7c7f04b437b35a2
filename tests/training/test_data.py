"""Rows to tokens and labels, with what goes wrong there in silence elsewhere: each trap is refused or counted."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from lorakit.errors import LorakitError
from lorakit.train.config.options import DataOptions
from lorakit.train.data.classification import prepare_labels
from lorakit.train.data.examples import Prepared, choice_ids, prepare, questions
from lorakit.train.data.formats import detect_format
from lorakit.train.data.reading import load_rows, load_splits
from lorakit.train.data.rows import Row, Rows
from lorakit.train.data.store import Example
from lorakit.train.data.templates import choose_template, shared_prefix_length
from lorakit.train.data.tokenise import IGNORED

CHAT = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WITH_BOS = (  # writes its own BOS, trims what it is given, ends turns by </s>
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] | trim }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}{% endgeneration %}<|im_end|>\n"
    "{% else %}{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_END = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
FORGETFUL = (  # shows thoughts only in the last turn, so an earlier turn changes when another follows
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if loop.last and m['role'] == 'assistant' %}(thinking) {% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = [
    "Answer: yes no positive negative the film was good bad ### INPUT RESPONSE user assistant system Be kind."
] * 3


def byte_pairs(template: str | None = None, bos: bool = False, eos: str | None = "</s>") -> PreTrainedTokenizerFast:
    """A byte-level BPE of about 330 tokens, as GPT-2 and SmolLM2 have, in which " yes" is one token."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    specials = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=specials)
    )
    if bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token=eos,
        chat_template=template,
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
    )


def pieces_with_spaces() -> PreTrainedTokenizerFast:
    """A tokenizer that begins every text with a space of its own, as SentencePiece models do."""
    words = ["<s>", "</s>", "<unk>", "▁", "▁Answer:", "▁yes", "yes", "▁no"]
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    core.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def rows_of(*fields: dict[str, Any]) -> Rows:
    return Rows(tuple(Row(one, f"memory, row {number}") for number, one in enumerate(fields, start=1)), source="memory")


def options(**values: Any) -> DataOptions:
    return DataOptions(train="unused", **values)


def learned(tokenizer: Any, example: Example) -> list[str]:
    """The text of each run of tokens with loss."""
    runs: list[list[int]] = []
    for at, label in enumerate(example.labels):
        assert label in (IGNORED, example.input_ids[at])
        if label != IGNORED:
            if at == 0 or example.labels[at - 1] == IGNORED:
                runs.append([])
            runs[-1].append(label)
    return [tokenizer.decode(run) for run in runs]


def text_of(tokenizer: Any, example: Example) -> str:
    return str(tokenizer.decode(example.input_ids))


def write(path: Path, lines: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return path


# Masks ---------------------------------------------------------------------------------------------------


def test_the_answer_and_its_end_of_turn_carry_loss_and_nothing_else() -> None:
    tokenizer = byte_pairs(CHAT)
    made = prepare(rows_of({"prompt": "good film?", "completion": "positive"}), tokenizer, options())
    [example] = made.examples
    whole = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\ngood film?<|im_end|>\n<|im_start|>assistant\n"
    assert text_of(tokenizer, example) == whole + "positive<|im_end|>\n"
    assert learned(tokenizer, example) == ["positive<|im_end|>\n"]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "good film?"}], add_generation_prompt=True, return_dict=False
    )
    assert example.input_ids[: len(prompt)] == prompt
    assert made.report.label_tokens == len(example.input_ids) - len(prompt)
    assert made.report.format == "prompt-completion"
    assert made.report.template == "the model's chat template"


def test_loss_on_all_assistant_turns_of_a_conversation() -> None:
    tokenizer = byte_pairs(CHAT)
    messages = [
        {"role": "system", "content": "Ünï ☃ 🙂"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "first ☃"},
        {"role": "tool", "content": "42"},
        {"role": "assistant", "content": "second\r\n line"},
        {"role": "user", "content": "thanks"},
    ]
    [example] = prepare(rows_of({"messages": messages}), tokenizer, options()).examples
    assert learned(tokenizer, example) == ["first ☃<|im_end|>\n", "second\r\n line<|im_end|>\n"]
    assert text_of(tokenizer, example).endswith("thanks<|im_end|>\n")
    [everything] = prepare(rows_of({"messages": messages}), tokenizer, options(completion_only_loss=False)).examples
    assert everything.input_ids == example.input_ids
    assert everything.labels == [IGNORED, *example.input_ids[1:]]


def test_a_template_with_its_own_bos_and_trimming() -> None:
    tokenizer = byte_pairs(WITH_BOS, bos=True)
    [example] = prepare(rows_of({"prompt": "  hm ", "completion": " yes  "}), tokenizer, options()).examples
    assert text_of(tokenizer, example) == "<s>[user] hm\n[assistant] yes</s>\n"
    assert example.input_ids.count(tokenizer.bos_token_id) == 1
    assert learned(tokenizer, example) == [" yes</s>\n"]


def test_marks_of_the_template_decide_and_the_end_of_turn_is_added_to_them() -> None:
    tokenizer = byte_pairs(MARKED)
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "one"},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "two"},
    ]
    made = prepare(rows_of({"messages": messages}), tokenizer, options())
    assert learned(tokenizer, made.examples[0]) == ["one<|im_end|>", "two<|im_end|>"]
    assert "marks" in made.report.template
    # by prefixes, the same turns are found
    [plain] = prepare(rows_of({"messages": messages}), byte_pairs(CHAT), options(system="s")).examples
    assert [run.strip() for run in learned(tokenizer, plain)] == ["one<|im_end|>", "two<|im_end|>"]


@pytest.mark.parametrize(
    ("ending", "runs"), [("\n", ["one</s>"]), ("", ["one</s>"]), ("\n</s>\n", ["one\n</s>"]), ("</s>", ["one</s>"])]
)
def test_marks_without_an_end_of_turn_get_one(ending: str, runs: list[str]) -> None:
    template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{% endgeneration %}"
    )
    template += ending.replace("\n", "{{ '\\n' }}") + "{% else %}{{ m['content'] }}:{% endif %}{% endfor %}"
    tokenizer = byte_pairs(template)
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "one"}]
    [example] = prepare(rows_of({"messages": messages}), tokenizer, options()).examples
    assert learned(tokenizer, example) == runs
    if "</s>" in ending:
        return
    with pytest.raises(LorakitError, match="marks leave out how the assistant's turn ends"):
        prepare(
            rows_of({"messages": messages}), byte_pairs(template.replace("{% else %}", " END{% else %}")), options()
        )


def test_an_end_is_added_where_the_template_has_none() -> None:
    tokenizer = byte_pairs(NO_END)
    [example] = prepare(rows_of({"prompt": "a", "completion": "yes"}), tokenizer, options()).examples
    assert text_of(tokenizer, example) == "user: a\nassistant: yes\n</s>"
    assert learned(tokenizer, example) == [" yes\n</s>"]
    with pytest.raises(LorakitError, match="never learn to stop"):
        prepare(rows_of({"prompt": "a", "completion": "yes"}), byte_pairs(NO_END, eos=None), options())


def test_a_template_that_rewrites_earlier_turns_gives_an_example_for_each_answer() -> None:
    tokenizer = byte_pairs(FORGETFUL)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "one"}]
    [example] = prepare(rows_of({"messages": turns}), tokenizer, options()).examples
    assert learned(tokenizer, example) == ["(thinking) one<|im_end|>\n"]
    more = [
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "bye"},
    ]
    made = prepare(rows_of({"messages": [*turns, *more]}), tokenizer, options())
    first, second = made.examples
    assert first == example
    assert learned(tokenizer, second) == ["(thinking) two<|im_end|>\n"]
    assert "assistant\none<|im_end|>" in text_of(tokenizer, second)  # as it will stand before the next question
    assert "1 row became an example for each answer" in "\n".join(made.report.lines())
    marked = FORGETFUL.replace(
        "{% if loop.last and m['role'] == 'assistant' %}(thinking) {% endif %}{{ m['content'] }}<|im_end|>\n",
        "{% if loop.last and m['role'] == 'assistant' %}{% generation %}(thinking) {{ m['content'] }}<|im_end|>"
        "{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}\n",
    )
    by_marks = prepare(rows_of({"messages": [*turns, *more]}), byte_pairs(marked), options()).examples
    assert [learned(tokenizer, one) for one in by_marks] == [["(thinking) one<|im_end|>"], ["(thinking) two<|im_end|>"]]


def test_a_prompt_that_is_not_how_the_conversation_begins_is_refused() -> None:
    thinking = CHAT.replace("assistant\n{% endif %}", "assistant\n<think>{% endif %}")
    with pytest.raises(LorakitError, match="row 1: the chat template writes the prompt before an answer differently"):
        prepare(rows_of({"prompt": "a", "completion": "yes"}), byte_pairs(thinking), options())
    made = prepare(rows_of({"prompt": "a", "completion": "<think> yes"}), byte_pairs(thinking), options())
    assert learned(byte_pairs(thinking), made.examples[0]) == [" yes<|im_end|>\n"]


def test_a_row_that_the_template_refuses_is_named() -> None:
    template = "{% if messages[0]['content'] == 'x' %}{{ raise_exception('no x here') }}{% endif %}" + CHAT
    good, bad = {"prompt": "a", "completion": "b"}, {"prompt": "x", "completion": "b"}
    with pytest.raises(LorakitError, match="memory, row 2: the chat template refuses it: no x here"):
        prepare(rows_of(good, bad), byte_pairs(template), options())
    made = prepare(rows_of(good, bad, good), byte_pairs(template), options(on_bad_row="skip"))
    assert (len(made), len(made.report.bad)) == (2, 1)


def test_system_messages() -> None:
    tokenizer = byte_pairs(CHAT)
    ask = {"prompt": "a", "completion": "b"}
    own = {
        "messages": [
            {"role": "system", "content": "Mine."},
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
        ]
    }
    [example] = prepare(rows_of(ask), tokenizer, options(system="Be brief.")).examples
    assert text_of(tokenizer, example).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\na")
    assert learned(tokenizer, example) == ["b<|im_end|>\n"]
    [example] = prepare(rows_of(own), tokenizer, options(system="Be brief.")).examples
    assert text_of(tokenizer, example).startswith("<|im_start|>system\nMine.<|im_end|>")
    with pytest.raises(LorakitError, match=r"data\.system: .* has no place for a system message"):
        prepare(rows_of(ask), byte_pairs(), options(system="Be brief."))


def test_prompts_and_completions_may_be_messages() -> None:
    tokenizer = byte_pairs(CHAT)
    row = {
        "prompt": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "old"},
            {"role": "user", "content": "b"},
        ],
        "completion": [{"role": "assistant", "content": "new"}],
    }
    [example] = prepare(rows_of(row), tokenizer, options()).examples
    assert learned(tokenizer, example) == ["new<|im_end|>\n"]


# Without a chat template ---------------------------------------------------------------------------------


def test_text_templates() -> None:
    tokenizer = byte_pairs(CHAT, bos=True)
    template = "### INSTRUCTION\n{instruction}\n### INPUT\n{input}\n### RESPONSE\n{output}\n### END"
    row = {"instruction": "is it good? {x}", "input": "", "output": "yes"}
    made = prepare(rows_of(row), tokenizer, options(template=template))
    [example] = made.examples
    assert text_of(tokenizer, example) == (
        "<s>### INSTRUCTION\nis it good? {x}\n### INPUT\n\n### RESPONSE\nyes\n### END</s>"
    )
    assert learned(tokenizer, example) == ["yes\n### END</s>"]
    assert made.report.template == "data.template, text with {instruction}, {input}, {output}"
    own_bos = prepare(rows_of(row), tokenizer, options(template="<s>" + template)).examples[0]
    assert own_bos == example
    [asked] = questions(rows_of(row), tokenizer, options(template=template))
    assert (asked.answer, asked.prompt_ids) == ("yes", example.input_ids[: len(asked.prompt_ids)])
    with pytest.raises(LorakitError, match=r'memory, row 1: there is no column "input"'):
        prepare(rows_of({"instruction": "a", "output": "b"}), tokenizer, options(template=template))
    with_system = "{system}|{prompt}|{completion}"
    [example] = prepare(
        rows_of({"prompt": "a", "completion": "b"}), tokenizer, options(template=with_system, system="S")
    ).examples
    assert text_of(tokenizer, example) == "<s>S|a|b</s>"


def test_templates_may_be_files_or_jinja_and_wrong_ones_are_refused(tmp_path: Path) -> None:
    tokenizer = byte_pairs()
    path = tmp_path / "chat.jinja"
    path.write_text(CHAT, encoding="utf-8")
    row = {"prompt": "a", "completion": "yes"}
    for template in (CHAT, str(path)):
        made = prepare(rows_of(row), tokenizer, options(template=template))
        assert learned(tokenizer, made.examples[0]) == ["yes<|im_end|>\n"]
        assert "Jinja" in made.report.template
    for wrong, message in [
        ("no placeholders", "found none"),
        ("{completion} {prompt}", "the last of them one of {completion}"),
        ("{output} {completion}", "no other of them"),
        (str(tmp_path / "absent.jinja"), "cannot be read"),
    ]:
        with pytest.raises(LorakitError, match=message):
            choose_template(wrong, tokenizer)
    with pytest.raises(LorakitError, match="need a chat template"):
        prepare(rows_of({"messages": [{"role": "user", "content": "a"}]}), tokenizer, options(format="messages"))
    with pytest.raises(LorakitError, match=r"data\.template is given; drop one"):
        prepare(rows_of({"text": "a"}), tokenizer, options(template=CHAT))


def test_tokens_that_merge_across_the_end_of_the_prompt_are_parted() -> None:
    tokenizer = byte_pairs(bos=True)
    joined = {"prompt": "Answer: ", "completion": "yes"}
    assert tokenizer.tokenize("Answer: yes")[-1] == "Ġyes"  # the trap: alone, the prompt ends in a space
    made = prepare(rows_of(joined), tokenizer, options())
    [example] = made.examples
    assert learned(tokenizer, example) == ["yes</s>"]
    prompt = tokenizer("Answer: ")["input_ids"]
    assert example.input_ids[: len(prompt)] == prompt
    assert made.report.apart == 1
    assert any("tokenised apart" in line for line in made.report.lines())
    parted = prepare(rows_of({"prompt": "Answer:", "completion": " yes"}), tokenizer, options())
    assert parted.report.apart == 0
    assert learned(tokenizer, parted.examples[0]) == [" yes</s>"]


def test_parting_that_would_change_the_text_is_refused() -> None:
    tokenizer = pieces_with_spaces()
    with pytest.raises(LorakitError, match="move the white space"):
        prepare(rows_of({"prompt": "Answer: ", "completion": "yes"}), tokenizer, options())
    [example] = prepare(rows_of({"prompt": "Answer:", "completion": " yes"}), tokenizer, options()).examples
    assert tokenizer.convert_ids_to_tokens(example.input_ids) == ["▁Answer:", "▁yes", "</s>"]


def test_text_is_learned_whole() -> None:
    tokenizer = byte_pairs(bos=True)
    [example] = prepare(rows_of({"text": "the film\r\n☃"}), tokenizer, options()).examples
    assert text_of(tokenizer, example) == "<s>the film\r\n☃</s>"
    assert learned(tokenizer, example) == ["the film\r\n☃</s>"]
    [example] = prepare(rows_of({"text": "film"}), byte_pairs(eos=None), options()).examples
    assert example.labels == [IGNORED, *example.input_ids[1:]]


# Length --------------------------------------------------------------------------------------------------


def long_rows() -> Rows:
    return rows_of(
        {"prompt": "a", "completion": "yes"},
        {"prompt": "a", "completion": "no " * 40},
        {"prompt": "x" * 60, "completion": "yes"},
    )


def test_what_is_cut_and_dropped_is_counted() -> None:
    tokenizer = byte_pairs(bos=True)
    whole = [len(example.input_ids) for example in prepare(long_rows(), tokenizer, options()).examples]
    made = prepare(long_rows(), tokenizer, options(max_length=20))
    assert [len(example.input_ids) for example in made.examples] == [whole[0], 20]
    report = made.report
    assert (report.rows, report.examples, report.truncated, report.without_labels) == (3, 2, 2, 1)
    assert report.tokens_cut == whole[1] + whole[2] - 40
    assert report.tokens == whole[0] + 20
    assert report.longest == 20
    told = "\n".join(report.lines())
    assert f"2 rows truncated to 20 tokens: {report.tokens_cut} tokens lost" in told
    assert "1 row dropped: no labelled token within 20 tokens" in told
    with pytest.raises(LorakitError, match="no example is left"):
        prepare(rows_of(dict(long_rows().rows[2].fields)), tokenizer, options(max_length=20))


def test_other_ways_with_long_rows() -> None:
    tokenizer = byte_pairs(bos=True)
    start = prepare(long_rows(), tokenizer, options(max_length=20, overflow="cut-start"))
    assert len(start) == 3
    assert start.examples[2].input_ids[0] == tokenizer.bos_token_id
    assert learned(tokenizer, start.examples[2]) == ["yes</s>"]
    assert len(start.examples[2].input_ids) == 20
    drop = prepare(long_rows(), tokenizer, options(max_length=20, overflow="drop"))
    assert (len(drop), drop.report.too_long) == (1, 2)
    with pytest.raises(LorakitError, match=r"memory, row 2: \d+ tokens, above data\.max_length 20"):
        prepare(long_rows(), tokenizer, options(max_length=20, overflow="refuse"))
    with pytest.raises(LorakitError, match="split is for text alone"):
        prepare(long_rows(), tokenizer, options(overflow="split"))


def test_a_long_text_is_split_without_loss() -> None:
    tokenizer = byte_pairs(bos=True)
    text = "the film was good " * 20
    [whole] = prepare(rows_of({"text": text}), tokenizer, options()).examples
    made = prepare(rows_of({"text": text}), tokenizer, options(max_length=16, overflow="split"))
    assert all(example.input_ids[0] == tokenizer.bos_token_id for example in made.examples)
    assert [token for example in made.examples for token in example.input_ids[1:]] == whole.input_ids[1:]
    assert made.report.label_tokens == sum(label != IGNORED for label in whole.labels)
    assert made.report.split == len(made) - 1


def test_the_models_own_limit_counts() -> None:
    tokenizer = byte_pairs(bos=True)
    tokenizer.model_max_length = 12
    made = prepare(long_rows(), tokenizer, options(on_bad_row="skip"))
    assert made.report.max_length == 12
    assert max(len(example.input_ids) for example in made.examples) == 12


def test_the_shared_prefix() -> None:
    assert shared_prefix_length([]) == 0
    assert shared_prefix_length([[1, 2, 3], [1, 2], [1, 2, 4]]) == 2
    assert shared_prefix_length([[1], [2]]) == 0
    made = prepare(rows_of(*({"prompt": p, "completion": "yes"} for p in "ab")), byte_pairs(CHAT), options())
    assert made.report.shared_prefix > 5


def test_control_tokens_in_the_text_are_told() -> None:
    row = {"prompt": "a<|im_end|>b", "completion": "yes"}
    report = prepare(rows_of(row, {"prompt": "a", "completion": "b"}), byte_pairs(CHAT), options()).report
    assert report.special == 1
    assert any("special tokens as text" in line for line in report.lines())


# Files ---------------------------------------------------------------------------------------------------


def test_json_lines_with_crlf_bom_and_odd_separators(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a\xe2\x80\xa8b"}\r\n\r\n{"text": "\xe2\x98\x83"}\r\n')
    rows = load_rows(path)
    assert [(row.fields["text"], row.where) for row in rows.rows] == [
        ("a\u2028b", f"{path}, line 1"),
        ("☃", f"{path}, line 3"),
    ]


def test_bad_lines_are_named_and_raise_or_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    good = '{"prompt": "a", "completion": "yes"}\n'
    bad = [
        '{"prompt": "a", "completion": \n',
        "[1]\n",
        '{"prompt": "a"}\n',
        '{"prompt": 3, "completion": "yes"}\n',
        '{"prompt": "a", "completion": "  "}\n',
        '{"prompt": "a", "completion": null}\n',
    ]
    path.write_bytes((good + "".join(bad) + good).encode() + b'{"prompt": "\xff", "completion": "b"}\n')
    tokenizer = byte_pairs(CHAT)
    with pytest.raises(LorakitError) as caught:
        prepare(load_rows(path), tokenizer, options())
    message = str(caught.value)
    assert "7 of 9 rows cannot be used" in message
    assert f"{path}, line 2: not JSON: Expecting value at column" in message
    assert f"{path}, line 3: expected an object with columns, found a list" in message
    assert f'{path}, line 4: there is no column "completion"; the row has prompt' in message
    assert f'{path}, line 5: "prompt" is 3, expected text' in message
    assert "and 2 more" in message
    made = prepare(load_rows(path), tokenizer, options(on_bad_row="skip"))
    assert (made.report.rows, made.report.examples, len(made.report.bad)) == (9, 2, 7)
    assert f'{path}, line 6: "completion" is empty' in [str(one) for one in made.report.bad]
    assert any(str(one).startswith(f"{path}, line 9: not UTF-8 text") for one in made.report.bad)
    assert any(line.startswith("7 rows skipped") for line in made.report.lines())


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ([], '"messages" is empty'),
        ("hello", '"messages" is text, expected a list'),
        ([{"content": "a"}], 'message 1 of "messages" has no role'),
        ([{"role": "user", "content": 3}], r'message 1 of "messages" \(user\) has no text'),
        ([{"role": "user", "content": [{"type": "image"}]}], r'message 1 of "messages" \(user\) has no text'),
        ([{"role": "user", "content": "a"}], "no assistant turn"),
        (
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}],
            r"message 2 .*\(assistant\) is empty",
        ),
        ([{"role": "assistant", "content": "a"}], "begins with an assistant turn"),
        (None, '"messages" is not a list of messages'),
    ],
)
def test_unusable_messages_say_why(value: Any, reason: str) -> None:
    with pytest.raises(LorakitError, match="memory, row 1: .*" + reason):
        prepare(rows_of({"messages": value}), byte_pairs(CHAT), options())


def test_the_first_message_may_call_a_tool() -> None:
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or m.tool_calls[0].name }}<|im_end|>\n"
    template += "{% endfor %}"
    template += (
        "{% if tools %}{{ tools[0].name }}{% endif %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": None, "tool_calls": [{"name": "look"}]},
    ]
    tokenizer = byte_pairs(template)
    [example] = prepare(rows_of({"messages": messages}), tokenizer, options()).examples
    assert learned(tokenizer, example) == ["look<|im_end|>\n"]


def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    fields = [{"prompt": 'a, "b"\nc', "completion": "ja ☃"}, {"prompt": "d", "completion": "no"}]
    write(tmp_path / "a.jsonl", fields)
    write(tmp_path / "lines.json", fields)
    (tmp_path / "a.json").write_text(json.dumps(fields, indent=1), encoding="utf-8")
    (tmp_path / "a.csv").write_bytes('\ufeffprompt,completion\r\n"a, ""b""\nc",ja ☃\r\n\r\nd,no\r\n'.encode())
    (tmp_path / "a.tsv").write_text('prompt\tcompletion\n"a, ""b""\nc"\tja ☃\nd\tno\n', encoding="utf-8")
    parquet.write_table(pyarrow.Table.from_pylist(fields), tmp_path / "a.parquet")
    places = {
        "a.jsonl": "line 2",
        "lines.json": "line 2",
        "a.json": "line 6",
        "a.csv": "line 5",
        "a.tsv": "line 4",
        "a.parquet": "row 2",
    }
    for name, place in places.items():
        rows = load_rows(tmp_path / name)
        assert [dict(row.fields) for row in rows.rows] == fields, name
        assert rows.rows[1].where == f"{tmp_path / name}, {place}"
    both = load_rows([tmp_path / "a.csv", tmp_path / "a.parquet"])
    assert len(both) == 4


def test_broken_files_are_refused_by_name(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.Table.from_pylist([{"text": "a" * 1000}])
    parquet.write_table(table, tmp_path / "whole.parquet")
    whole = (tmp_path / "whole.parquet").read_bytes()
    contents: list[tuple[str, bytes, str]] = [
        ("cut.parquet", whole[: len(whole) // 2], r"cut\.parquet is not a whole Parquet file"),
        ("none.parquet", b"", r"none\.parquet is not a whole Parquet file"),
        ("empty.jsonl", b"", r"empty\.jsonl holds no rows"),
        ("blank.jsonl", b"\n \n", r"blank\.jsonl holds no rows"),
        ("empty.csv", b"", r"empty\.csv holds no rows"),
        ("head.csv", b"a,b\n", r"head\.csv holds no rows"),
        ("empty.json", b"[]", r"empty\.json holds no rows"),
        ("open.json", b'[\n{"text": "a"},\n{"te', r"open\.json, line 3: not JSON"),
        ("latin.csv", b"text\na\n\xe9\n", r"latin\.csv, line 3: not UTF-8"),
        ("quote.csv", b'text\na\n"b\n', r"quote\.csv, line 3: not CSV"),
        ("twice.csv", b"text,text\na,b\n", r'twice\.csv, line 1: the column "text" is named twice'),
        ("rows.xlsx", b"PK", r"rows\.xlsx is not of a known kind; known are \.jsonl"),
    ]
    for name, content, message in contents:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(LorakitError, match=message):
            load_rows(tmp_path / name)
    (tmp_path / "ragged.csv").write_bytes(b"prompt,completion\na,b,c\na\nd,e\n")
    ragged = load_rows(tmp_path / "ragged.csv")
    assert [str(one) for one in ragged.bad] == [
        f"{tmp_path}/ragged.csv, line 2: 3 cells under 2 columns (prompt, completion)",
        f"{tmp_path}/ragged.csv, line 3: 1 cell under 2 columns (prompt, completion)",
    ]


def test_folders_keep_their_splits_apart(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", [{"text": "a"}])
    write(tmp_path / "test.jsonl", [{"text": "b"}])
    assert [row.fields["text"] for row in load_rows(tmp_path).rows] == ["a"]
    assert [row.fields["text"] for row in load_rows(tmp_path, split="test").rows] == ["b"]
    with pytest.raises(LorakitError, match=r'no file of the split "dev"; it holds test\.jsonl, train\.jsonl'):
        load_rows(tmp_path, split="dev")
    plain = tmp_path / "plain"
    plain.mkdir()
    with pytest.raises(LorakitError, match="holds no data files"):
        load_rows(plain)
    write(plain / "one.jsonl", [{"text": "a"}])
    write(plain / "two.jsonl", [{"text": "b"}])
    assert len(load_rows(plain)) == 2
    with pytest.raises(
        LorakitError,
        match=r"no file or folder .*tran\.jsonl\. Did you mean .*train\.jsonl.* has train\.jsonl, test\.jsonl",
    ):
        load_rows(tmp_path / "tran.jsonl")


def test_datasets_on_disk_and_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    labels = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])})
    saved = datasets.Dataset.from_list([{"text": "a", "label": 1}], features=labels)
    datasets.DatasetDict({"train": saved}).save_to_disk(tmp_path / "saved")
    rows = load_rows(tmp_path / "saved")
    assert [dict(row.fields) for row in rows.rows] == [{"text": "a", "label": 1}]
    assert rows.label_names == ("bad", "good")
    with pytest.raises(LorakitError, match=r'has no split "test"; it has train'):
        load_rows(tmp_path / "saved", split="test")

    def offline(*_: Any, **__: Any) -> Any:
        raise ConnectionError("Couldn't reach 'someone/things' on the Hub (LocalEntryNotFoundError)")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(
        LorakitError, match=r'"someone/things" is no file or folder here, and the hub cannot be reached'
    ):
        load_rows("someone/things")

    def wrong(*_: Any, **__: Any) -> Any:
        raise ValueError('Unknown split "dev"')

    monkeypatch.setattr(datasets, "load_dataset", wrong)
    with pytest.raises(LorakitError, match=r'"things" \(split "dev"\) cannot be loaded: Unknown split'):
        load_rows("things", split="dev")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: saved)
    assert load_rows("things").rows[0].where == "things[train], row 1"


# Splits and formats --------------------------------------------------------------------------------------


def test_rows_are_held_out_limited_and_shuffled_the_same_each_time(tmp_path: Path) -> None:
    path = str(write(tmp_path / "rows.jsonl", [{"text": str(number)} for number in range(20)]))
    train, held = load_splits(DataOptions(train=path, evaluation_size=5, limit=10, evaluation_limit=3))
    again, _ = load_splits(DataOptions(train=path, evaluation_size=0.25, limit=10))
    assert held is not None
    assert (len(train), len(held)) == (10, 3)
    assert train.rows == again.rows
    assert not {row.where for row in train.rows} & {row.where for row in held.rows}
    other, _ = load_splits(DataOptions(train=path, evaluation_size=5, limit=10, shuffle_seed=1))
    assert other.rows != train.rows
    plain, none = load_splits(DataOptions(train=path, shuffle_seed=None, limit=2))
    assert [row.fields["text"] for row in plain.rows] == ["0", "1"]
    assert none is None
    with pytest.raises(LorakitError, match="holds out 20 rows, but there are only 20"):
        load_splits(DataOptions(train=path, evaluation_size=20))
    with pytest.raises(LorakitError, match="names the rows that are trained on"):
        load_splits(DataOptions(train=path, evaluation=path))


def test_formats_are_told_by_columns() -> None:
    assert detect_format(["id", "prompt", "completion"]) == "prompt-completion"
    assert detect_format(["messages", "source", "prompt"]) == "messages"
    assert detect_format(["text"]) == "text"
    with pytest.raises(LorakitError, match=r"x: the columns are question, answer; expected prompt and completion"):
        detect_format(["question", "answer"], "x")
    with pytest.raises(LorakitError, match=r"\(text, label\) fit text and classification; choose by data\.format"):
        detect_format(["text", "label"])
    renamed = options(columns={"prompt": "question", "completion": "answer"})
    row = {"question": "a", "answer": "yes", "text": "other"}
    with pytest.raises(LorakitError, match="fit prompt-completion and text"):
        prepare(rows_of(row), byte_pairs(CHAT), renamed)
    del row["text"]
    tokenizer = byte_pairs(CHAT)
    assert learned(tokenizer, prepare(rows_of(row), tokenizer, renamed).examples[0]) == ["yes<|im_end|>\n"]
    with pytest.raises(LorakitError, match=r'"prompt" is mapped to "qestion", but the columns are question, answer'):
        prepare(rows_of(row), tokenizer, options(columns={"prompt": "qestion"}))


# Questions -----------------------------------------------------------------------------------------------


def test_questions_are_what_training_rows_begin_with() -> None:
    tokenizer = byte_pairs(CHAT)
    rows = rows_of({"prompt": "a", "completion": "yes"}, {"prompt": "b", "completion": " no "})
    made: Prepared = prepare(rows, tokenizer, options())
    asked = questions(rows, tokenizer, options())
    assert [one.answer for one in asked] == ["yes", "no"]
    assert asked[0].where == "memory, row 1"
    assert asked[0].prompt.endswith("<|im_start|>assistant\n")
    for question, example in zip(asked, made.examples, strict=True):
        length = len(question.prompt_ids)
        assert example.input_ids[:length] == question.prompt_ids
        assert set(example.labels[:length]) == {IGNORED}
        assert IGNORED not in example.labels[length:]
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "one"}]
    [asked_last] = questions(rows_of({"messages": [*turns, *turns]}), tokenizer, options())
    assert asked_last.prompt.count("one") == 1
    plain = byte_pairs(bos=True)
    [joined] = questions(rows_of({"prompt": "Answer:", "completion": " yes"}), plain, options())
    assert joined.prompt_ids == plain("Answer:")["input_ids"]
    assert joined.answer == "yes"
    with pytest.raises(LorakitError, match="hold no answers"):
        questions(rows_of({"text": "a"}), tokenizer, options())


@pytest.mark.parametrize("template", [CHAT, MARKED, WITH_BOS])
def test_choices_are_the_tokens_that_training_learns(template: str) -> None:
    tokenizer = byte_pairs(template)
    rows = rows_of({"prompt": "a", "completion": "x"}, {"prompt": "b", "completion": "y"})
    chosen = choice_ids(["positive", "negative"], rows, tokenizer, options())
    assert [tokenizer.decode(ids).strip() for ids in chosen] == ["positive", "negative"]
    as_messages = rows_of({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "x"}]})
    assert choice_ids(["positive", "negative"], as_messages, tokenizer, options()) == chosen
    nested = choice_ids(["yes", "yes and no"], rows, tokenizer, options())
    assert all(ids[-1] in tokenizer.all_special_ids for ids in nested)
    for wrong in ([], ["a", ""], ["a", "a"]):
        with pytest.raises(LorakitError, match="different answers"):
            choice_ids(wrong, rows, tokenizer, options())


# Classification ------------------------------------------------------------------------------------------


def test_texts_with_labels() -> None:
    tokenizer = byte_pairs(bos=True)
    rows = rows_of({"text": "good film", "label": "good"}, {"text": "bad " * 30, "label": "bad"})
    made = prepare_labels(rows, tokenizer, options(max_length=10))
    assert made.names == ("bad", "good")
    assert [example.label for example in made.examples] == [1, 0]
    assert made.examples[0].input_ids == tokenizer("good film")["input_ids"]
    assert len(made.examples[1].input_ids) == 10
    assert (made.report.truncated, made.report.rows) == (1, 2)
    numbers = prepare_labels(rows_of(*({"text": "a", "label": n} for n in (10, 2))), tokenizer, options())
    assert (numbers.names, [example.label for example in numbers.examples]) == (("2", "10"), [1, 0])
    with pytest.raises(LorakitError, match=r'row 1: "label" is "fair", which is not among bad, good'):
        prepare_labels(rows_of({"text": "a", "label": "fair"}), tokenizer, options(), made.names)
    with pytest.raises(LorakitError, match=r'"label" is None, expected a name or an integer'):
        prepare_labels(rows_of({"text": "a", "label": None}), tokenizer, options())
    with pytest.raises(LorakitError, match="for a classifier; use prepare_labels"):
        prepare(rows, tokenizer, options(format="classification"))
