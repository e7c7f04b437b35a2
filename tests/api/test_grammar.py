"""Answers that keep to a grammar, by the openai client over the real engine with a model of random numbers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest
import torch
from transformers import AutoModelForCausalLM

from api.conftest import Served, running
from api.small import write_adapters, write_base
from lorakit.serve.engine.engine import LocalEngine
from lorakit.serve.engine.sampling import Chooser, NoChoice, choose
from lorakit.serve.engine.scheduler import Limits
from lorakit.serve.grammar import KEPT, LONGEST, Constraint, Grammar, Grammars
from lorakit.serve.http.front import Front
from lorakit.serve.request import Refused, Sampling

SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["cat", "dog"]}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["kind", "age"],
    "additionalProperties": False,
}
pytest.importorskip("llguidance")


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Iterator[Served]:
    base: Path = write_base(tmp_path_factory.mktemp("base") / "tiny")
    store = write_adapters(base, tmp_path_factory.mktemp("store"), {"a": 4})
    model = AutoModelForCausalLM.from_pretrained(base).float().eval()
    limits = Limits(batch=16, step_tokens=64, queue=64, cache_bytes=4 << 20, adapter_bytes=4 << 20)
    engine = LocalEngine(model, store, limits, compiled=False)
    with running(Front(engine, tokenizer, name="tiny")) as served:
        yield served


def ask(served: Served, model: str = "tiny", **options: Any) -> Any:
    given: dict[str, Any] = {"temperature": 1, "seed": 1, "max_tokens": 120, **options}
    return served.client().chat.completions.create(
        model=model, messages=[{"role": "user", "content": "What is it?"}], **given
    )


FORMAT = {"type": "json_schema", "json_schema": {"name": "pet", "strict": True, "schema": SCHEMA}}


@pytest.mark.parametrize("model", ["tiny", "a"])
@pytest.mark.parametrize("temperature", [0, 1])
def test_json_of_a_schema(real: Served, model: str, temperature: float) -> None:
    """Of numbers drawn at random, which without the grammar never answer with JSON."""
    found = ask(real, model, response_format=FORMAT, n=4, temperature=temperature)
    for choice in found.choices:
        assert choice.finish_reason == "stop"
        jsonschema.validate(json.loads(choice.message.content), SCHEMA)
    free = ask(real, model, n=4)
    assert not any(choice.message.content.startswith("{") for choice in free.choices)


def test_every_way_to_ask(real: Served) -> None:
    texts = ["yes", 'no, "never"', "perhaps\n"]
    for extra, fits in [
        ({"guided_regex": "[0-9]{3}-[a-f]+x"}, lambda text: re.fullmatch("[0-9]{3}-[a-f]+x", text)),
        ({"regex": "(ab){2,4}"}, lambda text: re.fullmatch("(ab){2,4}", text)),
        ({"guided_choice": texts}, texts.__contains__),
        ({"structured_outputs": {"choice": texts}}, texts.__contains__),
        ({"structured_outputs": {"json": SCHEMA}}, lambda text: not jsonschema.validate(json.loads(text), SCHEMA)),
        ({"guided_json": json.dumps(SCHEMA)}, lambda text: not jsonschema.validate(json.loads(text), SCHEMA)),
        ({"grammar": 'root ::= "a" [0-9] "z"'}, lambda text: re.fullmatch("a[0-9]z", text)),
        ({"guided_grammar": 'start: "a" /[0-9]/ "z"'}, lambda text: re.fullmatch("a[0-9]z", text)),
    ]:
        choice = ask(real, extra_body=extra).choices[0]
        assert choice.finish_reason == "stop", extra
        assert fits(choice.message.content), (extra, choice.message.content)
    whole = ask(real, response_format={"type": "json_object"}, max_tokens=200).choices[0]
    if whole.finish_reason == "stop":  # a model of random numbers may go on for long
        assert isinstance(json.loads(whole.message.content), dict)
    assert whole.message.content.startswith("{")


def test_a_stream_and_its_probabilities(real: Served) -> None:
    chunks = list(ask(real, response_format=FORMAT, stream=True, logprobs=True, top_logprobs=2))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == ask(real, response_format=FORMAT).choices[0].message.content
    told = [one for chunk in chunks if chunk.choices[0].logprobs for one in chunk.choices[0].logprobs.content]
    assert "".join(one.token for one in told) == text
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_neighbours_do_not_notice(real: Served) -> None:
    """The same request alone, and among others that keep to grammars."""
    import threading

    alone = ask(real, max_tokens=40).choices[0].message.content
    threads = [threading.Thread(target=ask, args=(real,), kwargs={"response_format": FORMAT}) for _ in range(4)]
    for thread in threads:
        thread.start()
    assert ask(real, max_tokens=40).choices[0].message.content == alone
    for thread in threads:
        thread.join()


@pytest.mark.parametrize(
    ("options", "param", "words"),
    [
        ({"response_format": FORMAT | {"json_schema": {"name": "x", "schema": {"not": {}}}}}, "response_format", "not"),
        ({"extra_body": {"guided_json": {"x-guidance": {"lenient": True}, "not": {}}}}, "guided_json", "not"),
        ({"extra_body": {"guided_json": "{"}}, "guided_json", "cannot be enforced"),
        ({"extra_body": {"guided_regex": "("}}, "guided_regex", "cannot be enforced"),
        ({"extra_body": {"grammar": "start: nothing"}}, "grammar", "nothing"),
        ({"extra_body": {"guided_json": SCHEMA, "regex": "a"}}, "regex", "give one"),
        ({"extra_body": {"regex": "a" * (LONGEST + 1)}}, "regex", "are the most"),
    ],
)
def test_what_cannot_be_enforced_is_refused(real: Served, options: Any, param: str, words: str) -> None:
    with pytest.raises(openai.BadRequestError, match=words) as refused:
        ask(real, **options)
    assert refused.value.param == param


def test_grammars_are_kept_by_what_they_are(tokenizer: Any) -> None:
    grammars = Grammars(tokenizer)
    first = grammars.find(Grammar("regex", "ab", "regex"))
    first.accept(tokenizer("a").input_ids[0])
    again = grammars.find(Grammar("regex", "ab", "regex"))
    width = len(tokenizer)
    assert again.allowed(width, frozenset()).nonzero()[0].tolist() == tokenizer("a").input_ids
    assert first.allowed(width, frozenset()).nonzero()[0].tolist() == tokenizer("b").input_ids
    for number in range(KEPT + 5):
        grammars.find(Grammar("regex", f"a{{{number + 1}}}", "regex"))
    assert len(grammars._kept) == KEPT


def test_tokens_that_the_tokenizer_lacks_and_rows_without_a_token(tokenizer: Any) -> None:
    """Models have more logits than their tokenizer has tokens; a row whose grammar allows nothing ends by itself."""
    constraint = Grammars(tokenizer).find(Grammar("regex", "a*", "regex"))
    width = len(tokenizer) + 30
    allowed = constraint.allowed(width, frozenset({0, width - 1}))
    assert allowed.nonzero()[0].tolist() == sorted({0, *tokenizer("a").input_ids, width - 1})

    class Nothing(Constraint):
        def allowed(self, width: int, ends: frozenset[int]) -> Any:
            return super().allowed(width, ends) & False

    choosers = [
        Chooser(Sampling(temperature=0), (1,), frozenset({0}), [], Nothing(constraint.matcher, constraint.width)),
        Chooser(Sampling(temperature=0), (1,), frozenset({0})),
    ]
    none, other = choose(torch.arange(2.0 * width).view(2, width), choosers)
    assert isinstance(none, NoChoice)
    assert "grammar" in none.reason
    assert other == choose(torch.arange(2.0 * width).view(2, width)[1:], choosers[1:])[0]


def test_without_the_library_it_is_said(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    with pytest.raises(Refused, match="pip install llguidance"):
        Grammars(tokenizer).find(Grammar("regex", "a", "regex"))
