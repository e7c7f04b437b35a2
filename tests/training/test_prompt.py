"""The law of one prompt: the token ids that every verb makes of a conversation are those that training made of it.

Over templates and tokenizers on one side and verbs on the other; with bugs planted in each verb, which the law finds.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.training.test_data import CHAT, MARKED, NO_END, WITH_BOS, byte_pairs
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

import lorakit as lk
from lorakit.cli import app
from lorakit.cli.conversation import Speaker
from lorakit.conversion import convert
from lorakit.conversion.content import read_source
from lorakit.errors import LorakitError
from lorakit.files import prompt as prompts
from lorakit.files.prompt import Prompter, Prompts, as_chat, complete, literal, read_prompt
from lorakit.serve.http.bodies import Message
from lorakit.serve.http.faults import Fault
from lorakit.serve.http.front import Front
from lorakit.serve.http.text import encode_messages
from lorakit.train.config.options import DataOptions
from lorakit.train.data.examples import Prepared, prepare, questions
from lorakit.train.data.formats import with_prompt
from lorakit.train.data.rows import Row, Rows

THINKING = (  # what it writes depends on an argument
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is not defined or enable_thinking %}(hm)"
    "{% endif %}{% endif %}"
)
DATED = "{%- set now = strftime_now('%d %b %Y %f') -%}{{ now }}|" + CHAT  # another text at every call
PAIR = {"prompt": "is it good? {x} 🙂\r\n", "completion": "yes"}
TALK = {
    "messages": [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "first ☃"},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": "second"},
    ]
}


@dataclass(frozen=True)
class Case:
    """A tokenizer and the data section of a run."""

    row: dict[str, Any]
    template: str | None = None  # data.template
    own: str | None = CHAT  # the tokenizer's
    bos: bool = False
    more: tuple[tuple[str, Any], ...] = ()

    def tokenizer(self) -> PreTrainedTokenizerFast:
        return byte_pairs(self.own, bos=self.bos)

    def options(self) -> DataOptions:
        return DataOptions(train="unused", template=self.template, **dict(self.more))


CASES = {
    "the model's own": Case(TALK),
    "its own, a system message": Case(TALK, more=(("system", 'Be "brief" {{ x }} ☃\n'),)),
    "its own BOS": Case(TALK, own=WITH_BOS, bos=True),
    "another Jinja": Case(TALK, template=NO_END),
    "another Jinja with a system message": Case(PAIR, template=NO_END, more=(("system", "S"),)),
    "arguments": Case(PAIR, template=THINKING, more=(("template_arguments", {"enable_thinking": False}),)),
    "marks": Case(TALK, own=MARKED),
    "the time": Case(TALK, own=DATED),
    "text": Case(PAIR, template="Q: {prompt}\nA: {completion}\n###"),
    "text with a BOS": Case(PAIR, template="Q: {prompt}\nA: {completion}", bos=True),
    "text that writes the BOS": Case(PAIR, template="<s>Q: {prompt}\nA: {completion}", bos=True),
    "text with a system message": Case(PAIR, template="{system}|{prompt}|{completion}</s>", more=(("system", "S"),)),
    "prompt and completion joined": Case(PAIR, own=None, bos=True),
}


def trained(case: Case) -> Prepared:
    return prepare(rows_of(case), case.tokenizer(), case.options())


def rows_of(case: Case) -> Rows:
    return Rows((Row(case.row, "row 1"),), source="memory")


def conversation(case: Case) -> list[dict[str, Any]]:
    if "messages" in case.row:
        return case.row["messages"]
    return [{"role": "user", "content": case.row["prompt"]}, {"role": "assistant", "content": case.row["completion"]}]


def asked_in_training(case: Case) -> list[tuple[list[dict[str, Any]], list[int]]]:
    """What stood before every learned answer: as messages, and as the tokens of the examples."""
    turns = conversation(case)
    answers = [turns[:at] for at, turn in enumerate(turns) if turn["role"] == "assistant"]
    ids = [
        example.input_ids[:at]
        for example in trained(case).examples
        for at in range(1, len(example.labels))
        if example.labels[at] != -100 and example.labels[at - 1] == -100
    ]
    assert len(ids) == len(answers)
    return list(zip(answers, ids, strict=True))


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=400, num_key_value_heads=2, max_position_embeddings=256, **sizes))


@pytest.fixture(scope="module", params=list(CASES))
def made(request: pytest.FixtureRequest, model: LlamaForCausalLM, tmp_path_factory: Any) -> tuple[Case, Path, Path]:
    """A case, a base folder, and an adapter's folder as a run leaves it."""
    case, place = CASES[request.param], tmp_path_factory.mktemp("prompt")
    model.save_pretrained(place / "base")
    case.tokenizer().save_pretrained(place / "base")
    adapter = lk.attach(model, lk.LoRA(rank=2), name="a")
    adapter.save(place / "adapter", base=str(place / "base"), prompt=trained(case).prompt)
    lk.detach(model, "a")
    return case, place / "base", place / "adapter"


# -- the verbs ---------------------------------------------------------------------------------------------------------------

Encode = Callable[[list[dict[str, Any]]], list[int]]


def by_generate(case: Case, base: Path, adapter: Path) -> Encode:
    speaker = Speaker(str(base), [adapter])
    return lambda messages: speaker.encode(messages, "adapter")


def by_serve(case: Case, base: Path, adapter: Path) -> Encode:
    front = Front(Engine(), AutoTokenizer.from_pretrained(base), store=adapter.parent)  # type: ignore[arg-type]
    prompter = front.prompter({"adapter": 1.0}, True)
    return lambda messages: encode_messages(prompter, [Message(**one) for one in messages], 256)


def by_merge(case: Case, base: Path, adapter: Path) -> Encode:
    """What transformers makes of the merged model, without lorakit."""
    done = CliRunner().invoke(app, ["merge", str(base), str(adapter), "-o", str(adapter.parent / "merged")])
    assert done.exit_code == 0 or "not empty" in done.output, done.output
    tokenizer = AutoTokenizer.from_pretrained(adapter.parent / "merged")
    return lambda messages: tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def by_resize(case: Case, base: Path, adapter: Path) -> Encode:
    """The adapter after another verb has written it anew."""
    lk.resize(adapter, rank=1, output=adapter.parent / "smaller")
    prompter = Prompts(AutoTokenizer.from_pretrained(base)).of(adapter.parent / "smaller")
    return prompter.encode


def by_another_save(case: Case, base: Path, adapter: Path) -> Encode:
    """The adapter after loading and saving."""
    loaded = LlamaForCausalLM.from_pretrained(base)
    lk.save(lk.load(loaded, adapter), adapter.parent / "again")
    return Prompter(AutoTokenizer.from_pretrained(base), read_prompt(adapter.parent / "again")).encode


def by_gguf(case: Case, base: Path, adapter: Path) -> Encode:
    """The chat template that a GGUF adapter holds."""
    out = adapter.parent / "adapter.gguf"
    done = convert(adapter, out, "gguf", base=base, tell=lambda note: None)
    assert any("chat-template-file" in note for note in done.notes)
    template = read_source(out)[""].metadata["tokenizer.chat_template"]
    tokenizer = AutoTokenizer.from_pretrained(base)
    return lambda messages: tokenizer.apply_chat_template(
        messages, chat_template=template, add_generation_prompt=True, return_dict=False
    )


def by_eval(case: Case, base: Path, adapter: Path) -> Encode:
    """The question that `eval` asks: of a conversation, the last turn."""
    options = with_prompt(DataOptions(train="unused"), read_prompt(adapter), rows_of(case))
    [asked] = questions(rows_of(case), AutoTokenizer.from_pretrained(base), options)
    last = max(len(messages) for messages, _ in asked_in_training(case))
    earlier = {len(messages): ids for messages, ids in asked_in_training(case)}
    return lambda messages: asked.prompt_ids if len(messages) == last else earlier[len(messages)]


VERBS = {
    "generate": by_generate,
    "serve": by_serve,
    "merge": by_merge,
    "resize": by_resize,
    "save": by_another_save,
    "gguf": by_gguf,
    "eval": by_eval,
}


class Engine:
    """As much of an engine as names need."""

    context = 256
    adapters = SimpleNamespace(names=list)

    def ready(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _no_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorakit.serve.http.metrics.Metrics.watch", lambda *_: None)


def broken(verb: str, made: tuple[Case, Path, Path]) -> list[str]:
    """Where a verb's token ids are not those of training."""
    encode = VERBS[verb](*made)
    tokenizer = made[0].tokenizer()
    return [
        f"{tokenizer.decode(encode(messages))!r} was trained as {tokenizer.decode(ids)!r}"
        for messages, ids in asked_in_training(made[0])
        if encode(messages) != ids
    ]


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_asks_as_training_did(verb: str, made: tuple[Case, Path, Path]) -> None:
    assert broken(verb, made) == []


# -- planted bugs ------------------------------------------------------------------------------------------------------------


def base_only(self: Any, *_: Any) -> Prompter:
    return self.base


PLANTS: dict[str, tuple[str, str, Any, str]] = {
    "generate asks by the base's template": ("generate", "lorakit.cli.conversation.Speaker.prompter", base_only, "text"),
    "the server asks by the base's template": ("serve", "lorakit.files.prompt.Prompts.of", base_only, "another Jinja"),
    "merge keeps the base's template": (
        "merge", "lorakit.files.prompt.Prompter.settle", lambda self, model: self.tokenizer, "text"
    ),
    "a BOS is written twice": (
        "eval", "lorakit.train.data.examples.opened", lambda ids, opening: opening + ids, "text that writes the BOS"
    ),
    "resize forgets the prompt": ("resize", "lorakit.algebra.outcome.common_prompt", lambda _: None, "text"),
    "saving forgets the prompt": ("save", "lorakit.files.bundle.read_prompt", lambda _: None, "arguments"),
    "eval asks by the configuration": (
        "eval", "lorakit.files.prompt.Prompt.given", {}, "text with a system message"
    ),
}  # fmt: skip


@pytest.mark.parametrize("plant", PLANTS)
def test_planted_bugs_are_found(
    plant: str, model: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verb, place, bug, name = PLANTS[plant]
    case = CASES[name]
    model.save_pretrained(tmp_path / "base")
    case.tokenizer().save_pretrained(tmp_path / "base")
    adapter = lk.attach(model, lk.LoRA(rank=2), name="a")
    adapter.save(tmp_path / "adapter", prompt=trained(case).prompt)
    lk.detach(model, "a")
    asked = asked_in_training(case)
    monkeypatch.setitem(globals(), "asked_in_training", lambda _: asked)
    if place.endswith("Prompt.given"):
        bare = read_prompt
        monkeypatch.setitem(
            globals(), "read_prompt", lambda folder: prompts.dataclasses.replace(bare(folder), given={})
        )
        monkeypatch.setattr(prompts, "complete", lambda template, *_: template)
        monkeypatch.setitem(globals(), "with_prompt", lambda options, *_: options)
    else:
        monkeypatch.setattr(place, bug)
    assert broken(verb, (case, tmp_path / "base", tmp_path / "adapter"))


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("its own, a system message", lambda template, system, arguments: template),
        ("arguments", lambda template, system, arguments: complete(template, system, {})),
    ],
)
def test_a_template_that_is_saved_without_its_parts_is_found(
    name: str, wrong: Any, model: LlamaForCausalLM, tmp_path: Path
) -> None:
    """The file alone must be enough: for it is all that others read."""
    case = CASES[name]
    options = case.options()
    right = trained(case).prompt
    assert right is not None
    source = case.template or case.own
    assert right.template == complete(source, options.system, options.template_arguments)
    tokenizer = case.tokenizer()
    messages, ids = asked_in_training(case)[0]
    for template, same in ((right.template, True), (wrong(source, options.system, options.template_arguments), False)):
        text = tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=True
        )
        assert (tokenizer(text, add_special_tokens=False)["input_ids"] == ids) is same


# -- what is kept ------------------------------------------------------------------------------------------------------------


def test_the_folder_holds_the_prompt_where_others_look(made: tuple[Case, Path, Path]) -> None:
    case, _, adapter = made
    prompt = trained(case).prompt
    assert prompt is not None
    assert (adapter / "chat_template.jinja").read_bytes().decode() == prompt.template
    assert json.loads((adapter / "lorakit.json").read_text())["prompt"]["given"]["system"] == case.options().system
    assert read_prompt(adapter) == prompt
    assert not (adapter / "tokenizer.json").exists()  # the base's own is not copied


def test_what_ends_an_answer_is_kept_and_written_into_a_merged_model(model: LlamaForCausalLM, tmp_path: Path) -> None:
    case = Case(PAIR, template=CHAT, own=None)
    prompt = trained(case).prompt
    assert prompt is not None
    assert prompt.stop == ("<|im_end|>",)
    tokenizer = case.tokenizer()
    prompter = Prompter(tokenizer, prompt)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert prompter.stop_ids == [end]
    prompter.settle(model)
    assert end in model.generation_config.eos_token_id
    assert tokenizer.eos_token_id in model.generation_config.eos_token_id


def test_a_folder_of_another_program_brings_its_own_tokenizer(model: LlamaForCausalLM, tmp_path: Path) -> None:
    """As TRL and Axolotl leave it: PEFT's files, and the tokenizer with its tokens and template beside them."""
    adapter = lk.attach(model, lk.LoRA(rank=2), name="a")
    adapter.save(tmp_path / "theirs")
    lk.detach(model, "a")
    (tmp_path / "theirs" / "lorakit.json").unlink()
    assert read_prompt(tmp_path / "theirs") is None
    own = byte_pairs(NO_END)
    own.add_special_tokens({"additional_special_tokens": ["<answer>"]})
    own.save_pretrained(tmp_path / "theirs")
    base = byte_pairs(CHAT)
    prompter = Prompts(base).of(tmp_path / "theirs")
    turns = [{"role": "user", "content": "a<answer>"}]
    assert prompter.encode(turns) == own.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert own.convert_tokens_to_ids("<answer>") in prompter.encode(turns)
    assert prompter.prompt.stop == ("</s>",)
    loaded = lk.load(model, tmp_path / "theirs", name="b")
    lk.save(loaded, tmp_path / "again")  # and it goes with the adapter
    lk.detach(model, "b")
    assert Prompts(base).of(tmp_path / "again").encode(turns) == prompter.encode(turns)


def test_a_changed_template_is_read_again_and_a_broken_one_is_refused(tmp_path: Path) -> None:
    known = Prompts(byte_pairs(CHAT))
    assert known.of(tmp_path) is known.base
    (tmp_path / "chat_template.jinja").write_text("A")
    assert known.of(tmp_path).prompt.template == "A"
    (tmp_path / "chat_template.jinja").write_text("other")
    assert known.of(tmp_path).prompt.template == "other"
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(LorakitError, match="cannot be read"):
        known.of(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("x" * (2**20 + 1))
    with pytest.raises(LorakitError, match="characters"):
        known.of(tmp_path)


def test_a_blend_of_adapters_that_are_asked_differently_is_refused(tmp_path: Path) -> None:
    for name, template in (("a", "A"), ("b", "B"), ("c", "A")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "chat_template.jinja").write_text(template)
    front = Front(Engine(), byte_pairs(CHAT), store=tmp_path)  # type: ignore[arg-type]
    assert front.prompter({"a": 1.0, "c": 1.0}, True).prompt.template == "A"
    with pytest.raises(Fault, match="different chat templates"):
        front.prompter({"a": 1.0, "b": 1.0}, True)
    assert front.prompter({"a": 1.0, "b": 1.0}, False) is front.prompts.base
    assert prompts.common_prompt([read_prompt(tmp_path / "a"), None, read_prompt(tmp_path / "c")]) is not None
    assert prompts.common_prompt([read_prompt(tmp_path / "a"), read_prompt(tmp_path / "b")]) is None


def test_text_templates_as_chat_templates() -> None:
    tokenizer = byte_pairs()
    jinja = as_chat(["<", "|", "|", ">"], ["system", "instruction", "output"], "S", "", "</s>")
    turns = [{"role": "user", "content": [{"type": "text", "text": "{{ x }}"}]}, {"role": "assistant", "content": "y"}]
    assert tokenizer.apply_chat_template(turns, chat_template=jinja, tokenize=False) == "<S|{{ x }}|y></s>"
    turns = [{"role": "system", "content": "T"}, {"role": "user", "content": "a"}]
    assert tokenizer.apply_chat_template(turns, chat_template=jinja, tokenize=False) == "<T|a|"
    several = as_chat(["", "+", "=", ""], ["instruction", "input", "output"], None, "", "")
    turns = [{"role": "user", "content": "a", "input": "b"}]
    assert tokenizer.apply_chat_template(turns, chat_template=several, tokenize=False) == "a+b="
    assert tokenizer.apply_chat_template([turns[0] | {"input": None}], chat_template=several, tokenize=False) == "a+="


@pytest.mark.parametrize(
    "value", ["☃🙂", '"\\n', "\n\r\t", "{{ x }}", "{% x %}", "'", True, None, 1.5, [1, {"a": "b"}]]
)
def test_literals_are_read_back(value: Any) -> None:
    template = f"{{{{ ({literal(value)}) | tojson }}}}"
    text = byte_pairs().apply_chat_template([{"role": "user"}], chat_template=template, tokenize=False)
    assert json.loads(text) == value


def test_template_arguments_need_a_chat_template() -> None:
    case = Case(PAIR, own=None, more=(("template_arguments", {"a": 1}),))
    with pytest.raises(LorakitError, match="are for a chat template"):
        trained(case)


def test_a_template_writes_the_date_of_its_training_ever_after() -> None:
    case = Case(TALK, own=DATED, more=(("date", "2024-02-29"),))
    made = trained(case)
    assert made.prompt is not None
    assert made.prompt.template is not None
    assert "29 Feb 2024" in case.tokenizer().decode(made.examples[0].input_ids)
    assert "29 Feb 2024" in made.prompt.template
    assert made.prompt.given["date"] == "2024-02-29"
    assert any("2024-02-29 from now on" in line for line in made.report.lines())
    with pytest.raises(LorakitError, match="no plain text"):
        trained(Case(TALK, own="{{ strftime_now(format_of_mine) }}" + CHAT))
    with pytest.raises(LorakitError, match="YYYY-MM-DD"):
        DataOptions(train="x", date="1 May")


def test_extract_keeps_how_the_tuned_model_is_asked(model: LlamaForCausalLM, tmp_path: Path) -> None:
    """What merging wrote into a model (template, end tokens, added tokens) comes out of it again."""
    case = CASES["text"]
    model.save_pretrained(tmp_path / "base")
    case.tokenizer().save_pretrained(tmp_path / "base")
    with torch.no_grad():
        tuned = copy.deepcopy(model)
        tuned.model.layers[0].mlp.up_proj.weight.add_(torch.ones(24, 2) @ torch.ones(2, 16) * 0.01)
    tokenizer = case.tokenizer()
    assert lk.extract(tmp_path / "base", saved(tuned, tokenizer, tmp_path / "same"), rank=2, output=tmp_path / "a")
    assert read_prompt(tmp_path / "a") is None
    prompt = trained(case).prompt
    tokenizer = Prompter(case.tokenizer(), prompt).settle(tuned)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<new>"]})
    lk.extract(tmp_path / "base", saved(tuned, tokenizer, tmp_path / "tuned"), rank=2, output=tmp_path / "b")
    found = read_prompt(tmp_path / "b")
    assert found is not None
    ours, theirs = Prompter(case.tokenizer(), found), Prompter(tokenizer, prompt)
    messages = [{"role": "user", "content": "a <new> thing"}]
    assert ours.encode(messages) == tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert set(theirs.stop_ids) <= {*ours.stop_ids, *prompts.end_ids(case.tokenizer())}


def saved(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
