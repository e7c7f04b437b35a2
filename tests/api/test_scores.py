"""Completions as evaluators use them, by the openai client and by lm-evaluation-harness, over the real engine."""

from __future__ import annotations

import json
import math
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from transformers import AutoModelForCausalLM

from api.conftest import Served, running
from api.small import Reference, write_adapters, write_base
from lorakit.core.using import use
from lorakit.serve.engine.engine import LocalEngine
from lorakit.serve.engine.scheduler import Limits
from lorakit.serve.http.front import Front

BOUND = 2e-5
"""float32."""

PROMPTS = [[50 + (7 * row + 3 * place) % 150 for place in range(5 + 9 * row)] for row in range(4)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def store(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapters(base, tmp_path_factory.mktemp("store"), {"a": 4, "b": 8})


@pytest.fixture(scope="module")
def reference(base: Path, store: Path) -> Any:
    return Reference(base, store).model


@pytest.fixture(scope="module")
def real(base: Path, store: Path, tokenizer: Any) -> Iterator[Served]:
    model = AutoModelForCausalLM.from_pretrained(base).float().eval()
    limits = Limits(batch=8, step_tokens=64, queue=64, cache_bytes=4 << 20, adapter_bytes=4 << 20)
    engine = LocalEngine(model, store, limits, compiled=False)
    with running(Front(engine, tokenizer, name="tiny", also=frozenset({"lab/tiny"}))) as served:
        yield served


def expected(reference: Any, tokens: list[int], name: str | None) -> torch.Tensor:
    with torch.no_grad(), use(reference, name):
        return reference(torch.tensor([tokens])).logits[0, :-1].log_softmax(-1)  # type: ignore[no-any-return]


def post(served: Served, path: str, body: Any) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(served.url + path, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())


@pytest.mark.parametrize("name", [None, "a", "b"])
@pytest.mark.parametrize("count", [0, 1])
def test_echo_with_logprobs_is_the_models_own(real: Served, reference: Any, name: str | None, count: int) -> None:
    """The very request of lm-evaluation-harness, and the prompt alone."""
    answer = real.client().completions.create(
        model=name or "lab/tiny", prompt=PROMPTS, echo=True, logprobs=1, max_tokens=count, temperature=0, seed=1234
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens == count * len(PROMPTS)
    for choice, tokens in zip(answer.choices, PROMPTS, strict=True):
        found: Any = choice.logprobs
        assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == len(tokens) + count
        assert len(found.text_offset) == len(tokens) + count
        assert found.token_logprobs[0] is None
        assert found.top_logprobs[0] is None
        want = expected(reference, tokens, name)
        for place, token in enumerate(tokens[1:], 1):
            row = want[place - 1]
            assert found.token_logprobs[place] == pytest.approx(float(row[token]), abs=BOUND)
            greedy = found.token_logprobs[place] == max(found.top_logprobs[place].values())
            assert greedy == (int(row.argmax()) == token)


def test_an_end_token_is_in_the_lists(real: Served) -> None:
    """Who drops the last entry drops the answer, never a token of the prompt."""
    answer = real.client().completions.create(
        model="tiny", prompt=PROMPTS[1], echo=True, logprobs=1, max_tokens=1, temperature=0, logit_bias={"0": 100}
    )
    assert answer.choices[0].finish_reason == "stop"
    assert len(answer.choices[0].logprobs.token_logprobs or []) == len(PROMPTS[1]) + 1  # type: ignore[union-attr]


def test_prompt_logprobs_and_ids_in_vllms_form(real: Served, reference: Any) -> None:
    tokens = PROMPTS[2]
    extra = {"prompt_logprobs": 2, "return_token_ids": True, "return_tokens_as_token_ids": True}
    answer = real.client().completions.create(
        model="a", prompt=tokens, max_tokens=3, temperature=0, logprobs=0, extra_body=extra
    )
    choice: Any = answer.choices[0]
    assert choice.prompt_token_ids == tokens
    assert choice.logprobs.tokens == [f"token_id:{one}" for one in choice.token_ids]
    assert choice.prompt_logprobs[0] is None
    want = expected(reference, tokens, "a")
    for row, token, entry in zip(want, tokens[1:], choice.prompt_logprobs[1:], strict=True):
        assert {*map(str, row.topk(2).indices.tolist()), str(token)} == set(entry)
        for key, one in entry.items():
            assert one["logprob"] == pytest.approx(float(row[int(key)]), abs=BOUND)
            assert one["rank"] == 1 + int((row > row[int(key)]).sum())


def test_a_stream_holds_the_prompts_numbers(real: Served) -> None:
    asked: Any = {"model": "a", "prompt": "once", "echo": True, "logprobs": 1, "max_tokens": 2, "temperature": 0}
    whole = real.client().completions.create(**asked).choices[0]
    chunks = [c.choices[0] for c in real.client().completions.create(**asked, stream=True) if c.choices]
    assert "".join(chunk.text for chunk in chunks) == whole.text
    parts = [number for chunk in chunks if chunk.logprobs for number in chunk.logprobs.token_logprobs or []]
    assert parts == whole.logprobs.token_logprobs  # type: ignore[union-attr]


def test_best_of_gives_the_most_probable(real: Served) -> None:
    asked: Any = {"model": "a", "prompt": "once", "max_tokens": 6, "temperature": 2, "seed": 5, "logprobs": 0}
    made = real.client().completions.create(**asked, n=6)
    best = real.client().completions.create(**asked, n=2, best_of=6)

    def mean(choice: Any) -> float:
        return sum(choice.logprobs.token_logprobs) / len(choice.logprobs.token_logprobs)

    ranked = sorted(made.choices, key=mean, reverse=True)
    assert [one.text for one in best.choices] == [one.text for one in ranked[:2]]
    assert [one.index for one in best.choices] == [0, 1]
    assert best.usage is not None
    assert made.usage is not None
    assert best.usage.completion_tokens == made.usage.completion_tokens


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"best_of": 1, "n": 2}, "best_of"),
        ({"best_of": 3, "stream": True}, "best_of"),
        ({"best_of": 100}, "best_of"),
        ({"suffix": "x"}, "suffix"),
        ({"prompt": [[70] * 200] * 32, "echo": True, "logprobs": 20, "n": 2}, "n"),
        ({"prompt": [[70] * 250] * 32, "prompt_logprobs": 20, "best_of": 1, "max_tokens": 0, "echo": True}, None),
    ],
)
def test_what_does_not_go_together_is_said(real: Served, body: dict[str, Any], param: str | None) -> None:
    if param is None:  # 32 x 250 x 21 numbers are few enough
        assert len(post(real, "/v1/completions", {"model": "tiny", **body})["choices"]) == 32
        return
    with pytest.raises(openai.BadRequestError) as caught:
        real.client().completions.create(model="tiny", **{"prompt": "x", **body.pop("_", {})}, extra_body=body)
    assert caught.value.param == param


def test_tokenize_and_back(real: Served, tokenizer: Any) -> None:
    text = "Grüße, a"
    found = post(real, "/tokenize", {"prompt": text, "return_token_strs": True, "model": "a"})
    assert found["tokens"] == tokenizer.encode(text)
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
    assert post(real, "/detokenize", {"tokens": found["tokens"]}) == {"prompt": text}
    chat = post(real, "/tokenize", {"messages": [{"role": "user", "content": "x"}]})
    assert tokenizer.decode(chat["tokens"]) == "<user>x<assistant>"
    assert post(real, "/tokenizer_info", None)["eos_token"] == "<end>"
    for path, body, param in [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "x" * 90_000}, "messages"),
        ("/detokenize", {"tokens": [5, 999]}, "tokens"),
        ("/detokenize", {"tokens": [5], "model": "no"}, "model"),
    ]:
        with pytest.raises(urllib.error.HTTPError) as caught:
            post(real, path, body)
        assert json.loads(caught.value.read())["error"]["param"] == param
    assert real.client().models.retrieve("lab/tiny").id == "tiny"


def test_the_guides_example(real: Served, capsys: pytest.CaptureFixture[str]) -> None:
    guide = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    code = guide.split("<!-- not run: needs the server; tests/api/test_scores.py runs it -->\n```python\n")[1].split(
        "```"
    )[0]
    exec(code.replace("http://127.0.0.1:8000", real.url).replace('"sql"', '"a"'), {})
    assert [line.startswith("SELECT") for line in capsys.readouterr().out.splitlines()] == [True, True]


@pytest.mark.slow
@pytest.mark.parametrize("tokenised", [True, False])
def test_lm_evaluation_harness_gives_its_own_models_scores(
    real: Served, base: Path, tokenised: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The unmodified harness: its client of our server, and its own model over transformers, on the same weights."""
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    monkeypatch.setenv("OPENAI_API_KEY", "none")
    pairs = [("The sky is", " blue"), ("One and one is", " two"), ("A", "b"), ("Once upon a", " time there was a king")]
    asked = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
    long = [Instance("loglikelihood_rolling", {}, ("So it was, and so it is, again and again.",), 0)]
    written = [
        Instance("generate_until", {}, (text, {"until": ["\n"], "max_gen_toks": 12, "do_sample": False}), index)
        for index, (text, _) in enumerate(pairs)
    ]
    client = LocalCompletionsAPI(
        base_url=real.url + "/v1/completions",
        model="tiny",
        tokenizer=str(base),
        tokenizer_backend="huggingface",
        tokenized_requests=tokenised,
        max_length=200,
        batch_size=3,
    )
    own = HFLM(pretrained=str(base), device="cpu", dtype="float32", max_length=200, batch_size=1)
    for ours, theirs in zip(client.loglikelihood(asked), own.loglikelihood(asked), strict=True):
        assert ours[0] == pytest.approx(theirs[0], abs=1e-3)
        assert ours[1] == theirs[1]
        assert math.isfinite(ours[0])
    if tokenised:
        assert client.loglikelihood_rolling(long) == pytest.approx(own.loglikelihood_rolling(long), abs=1e-3)
    assert client.generate_until(written) == own.generate_until(written)
