"""The official client, unmodified: whole answers, streams, both kinds of completion, threads and event loop."""

from __future__ import annotations

import asyncio

import openai
import pytest

from api.conftest import Served
from api.stub import END, StubEngine, echo_of
from lorakit.serve.request import Request, Sampling


def expected(served: Served, prompt: str, blend: dict[str, float], tokens: int, seed: int | None = None) -> str:
    """What the stub answers."""
    tokenizer = served.front.tokenizer
    ids = tuple(tokenizer(prompt)["input_ids"])
    request = Request("x", ids, blend, sampling=Sampling(max_tokens=tokens, seed=seed))
    return tokenizer.decode(echo_of(request))


def chat_prompt(text: str) -> str:
    return f"<user>{text}<assistant>"


def test_chat_base_and_adapter(shared: Served) -> None:
    client = shared.client()
    for model, blend in (("tiny", {}), ("base", {}), ("sql", {"sql": 1.0})):
        answer = client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": "hello"}], max_tokens=9
        )
        assert answer.choices[0].message.content == expected(shared, chat_prompt("hello"), blend, 9)
        assert answer.choices[0].message.role == "assistant"
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == len(chat_prompt("hello"))
        assert answer.usage.completion_tokens == 9
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + 9
        assert answer.model == model


def test_a_blend(shared: Served) -> None:
    answer = shared.client().chat.completions.create(
        model="base",
        messages=[{"role": "user", "content": "hello"}],
        max_tokens=5,
        extra_body={"adapters": {"sql": 0.7, "law": 0.3}},
    )
    assert answer.choices[0].message.content == expected(shared, chat_prompt("hello"), {"sql": 0.7, "law": 0.3}, 5)


@pytest.mark.parametrize("n", [1, 3])
def test_chat_stream_adds_up_to_the_whole(shared: Served, n: int) -> None:
    client = shared.client()
    texts, reasons, last, roles = [""] * n, [None] * n, None, 0
    with client.chat.completions.create(
        model="law",
        messages=[{"role": "system", "content": "be short"}, {"role": "user", "content": "hello"}],
        max_tokens=12,
        n=n,
        seed=5,
        stream=True,
        stream_options={"include_usage": True},
    ) as stream:
        for chunk in stream:
            last = chunk
            for choice in chunk.choices:
                roles += choice.delta.role == "assistant"
                texts[choice.index] += choice.delta.content or ""
                reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    prompt = "<system>be short<user>hello<assistant>"
    assert texts == [expected(shared, prompt, {"law": 1.0}, 12, 5 + index) for index in range(n)]
    assert reasons == ["length"] * n
    assert roles == n
    assert last is not None
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == 12 * n
    assert last.usage.prompt_tokens == len(prompt)


def test_completions_of_texts_and_of_token_ids(shared: Served) -> None:
    client = shared.client()
    ids = [shared.front.tokenizer(text)["input_ids"] for text in ("one", "three")]
    by_text = client.completions.create(model="sql", prompt=["one", "three"], max_tokens=6, n=2, seed=1)
    by_ids = client.completions.create(model="sql", prompt=ids, max_tokens=6, n=2, seed=1)
    texts = [choice.text for choice in by_text.choices]
    assert texts == [choice.text for choice in by_ids.choices]
    assert texts == [expected(shared, p, {"sql": 1.0}, 6, s) for p in ("one", "three") for s in (1, 2)]
    assert by_text.usage is not None
    assert by_text.usage.prompt_tokens == 8
    assert by_text.usage.completion_tokens == 24


def test_completion_defaults_echo_and_stream(shared: Served) -> None:
    client = shared.client()
    whole = client.completions.create(model="tiny", prompt="once", echo=True)
    assert whole.choices[0].text == "once" + expected(shared, "once", {}, 16)
    pieces = client.completions.create(model="tiny", prompt="once", echo=True, stream=True)
    assert "".join(chunk.choices[0].text for chunk in pieces) == whole.choices[0].text


def test_stop_strings_cut_and_cancel(shared: Served) -> None:
    client = shared.client()
    text = expected(shared, "once", {}, 40)
    stop = text[10:13]
    cut = text[: text.index(stop)]
    whole = client.completions.create(model="tiny", prompt="once", max_tokens=40, stop=stop)
    assert whole.choices[0].text == cut
    assert whole.choices[0].finish_reason == "stop"
    assert whole.usage is not None
    assert whole.usage.completion_tokens == text.index(stop) + 3
    stream = client.completions.create(model="tiny", prompt="once", max_tokens=40, stop=["never", stop], stream=True)
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks) == cut
    assert chunks[-1].choices[0].finish_reason == "stop"
    ticket = shared.engine.tickets[-1]
    assert ticket.cancelled or ticket.ended


def test_logprobs_in_both_shapes(shared: Served) -> None:
    client = shared.client()
    chat = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "x"}], max_tokens=3, logprobs=True, top_logprobs=2
    )
    logprobs = chat.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert "".join(one.token for one in logprobs.content) == chat.choices[0].message.content
    assert [len(one.top_logprobs) for one in logprobs.content] == [2, 2, 2]
    assert logprobs.content[0].logprob == -0.5
    assert bytes(logprobs.content[0].bytes or []).decode() == logprobs.content[0].token
    old = client.completions.create(model="tiny", prompt="x", max_tokens=3, logprobs=1)
    found = old.choices[0].logprobs
    assert found is not None
    assert "".join(found.tokens or []) == old.choices[0].text
    assert found.text_offset == [0, 1, 2]
    streamed = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "x"}], max_tokens=3, logprobs=True, stream=True
    )
    seen = [chunk.choices[0].logprobs for chunk in streamed if chunk.choices and chunk.choices[0].logprobs]
    assert "".join(one.content[0].token for one in seen if one.content) == chat.choices[0].message.content


def test_sampling_reaches_the_engine(shared: Served) -> None:
    shared.client().chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "x"}],
        max_completion_tokens=7,
        temperature=0.25,
        top_p=0.5,
        seed=-1,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        logit_bias={"70": -100},
        extra_body={"top_k": 9, "min_p": 0.1, "repetition_penalty": 1.2, "ignore_eos": True, "stop_token_ids": [3]},
    )
    assert shared.engine.tickets[-1].request.sampling == Sampling(
        max_tokens=7,
        temperature=0.25,
        top_p=0.5,
        top_k=9,
        min_p=0.1,
        seed=2**63 - 1,
        stop_token_ids=(3,),
        ignore_eos=True,
        logit_bias={70: -100.0},
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        repetition_penalty=1.2,
    )
    shared.client().chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x"}])
    assert shared.engine.tickets[-1].request.sampling == Sampling(max_tokens=512 - len(chat_prompt("x")))


def test_characters_of_several_tokens_and_the_end_token(serve) -> None:  # type: ignore[no-untyped-def]
    engine = StubEngine()
    served = serve(engine)
    ids = served.front.tokenizer("naïve 😀 ok")["input_ids"]
    engine.answer = lambda request: [*ids, END, 70]
    client = served.client()
    whole = client.completions.create(model="tiny", prompt="x", max_tokens=99)
    assert whole.choices[0].text == "naïve 😀 ok"
    assert whole.choices[0].finish_reason == "stop"
    pieces = [
        c.choices[0].text for c in client.completions.create(model="tiny", prompt="x", max_tokens=99, stream=True)
    ]
    assert "".join(pieces) == "naïve 😀 ok"
    assert "😀" in pieces
    engine.answer = lambda request: ids[: len("naïve ".encode()) + 2]  # ends within a character
    cut = client.completions.create(model="tiny", prompt="x", max_tokens=99, stream=True)
    assert "".join(chunk.choices[0].text for chunk in cut) == "naïve \N{REPLACEMENT CHARACTER}"


def test_the_async_client_many_at_once(shared: Served) -> None:
    async def ask(client: openai.AsyncOpenAI, index: int) -> tuple[str, str]:
        model = ["tiny", "sql", "law"][index % 3]
        blend = {} if model == "tiny" else {model: 1.0}
        want = expected(shared, f"prompt {index}", blend, 20)
        if index % 2:
            answer = await client.completions.create(model=model, prompt=f"prompt {index}", max_tokens=20)
            return answer.choices[0].text, want
        stream = await client.completions.create(model=model, prompt=f"prompt {index}", max_tokens=20, stream=True)
        return "".join([chunk.choices[0].text async for chunk in stream]), want

    async def many() -> list[tuple[str, str]]:
        async with shared.aclient() as client:
            return await asyncio.gather(*(ask(client, index) for index in range(24)))

    for got, want in asyncio.run(many()):
        assert got == want


def test_models(shared: Served) -> None:
    client = shared.client()
    assert [model.id for model in client.models.list()] == ["tiny", "law", "sql"]
    assert client.models.retrieve("sql").id == "sql"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nope")


def test_an_answer_can_be_sent_back(shared: Served) -> None:
    client = shared.client()
    first = client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "a"}], max_tokens=3)
    again = [{"role": "user", "content": "a"}, first.choices[0].message, {"role": "user", "content": "b"}]
    client.chat.completions.create(model="tiny", messages=again, max_tokens=3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "param", "words"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, None, "tools"),
        ({"functions": [{"name": "f"}]}, None, "functions"),
        ({"extra_body": {"tempreature": 1}}, "tempreature", "not a parameter"),
        ({"temperature": 3}, "temperature", "2"),
        ({"n": 100}, "n", "32"),
        ({"stream_options": {"include_usage": "yes"}}, "stream_options.include_usage", "boolean"),
        ({"stop": ["a", ""]}, "stop.1", "at least 1"),
        ({"top_logprobs": 2}, None, "logprobs"),
        ({"max_tokens": 5000}, "max_tokens", "512"),
        ({"logit_bias": {"one": 1}}, None, "logit_bias"),
        ({"logit_bias": {"99999": 1}}, "logit_bias", "99999"),
        ({"extra_body": {"adapters": {"nope": 0.5}}}, "adapters.nope", "nope"),
        ({"model": "sql", "extra_body": {"adapters": {"law": 0.5}}}, "model", "base"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages.0.role", "role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, None, ""),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "messages", "no tools"),
        ({"messages": []}, "messages", "messages"),
    ],
)
def test_what_is_refused_is_named(shared: Served, options: dict, param: str | None, words: str) -> None:  # type: ignore[type-arg]
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], **options}
    with pytest.raises((openai.BadRequestError, openai.NotFoundError)) as caught:
        shared.client().chat.completions.create(**asked)
    assert words in caught.value.message
    if param is not None:
        assert caught.value.param == param
    assert caught.value.type in ("invalid_request_error", "not_found_error")


def test_what_changes_nothing_is_accepted(shared: Served) -> None:
    shared.client().chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "x"}],
        max_tokens=2,
        user="me",
        metadata={"a": "b"},
        store=False,
        tools=[],
        tool_choice="none",
        response_format={"type": "text"},
        service_tier="auto",
        modalities=["text"],
        parallel_tool_calls=True,
    )
