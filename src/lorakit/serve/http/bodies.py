"""The bodies of requests and answers: OpenAI's shapes, and `adapters` for a blend.

A parameter that would change the answer and is not supported is refused by name; one that changes nothing about it
(`user`, `metadata`, …) is accepted, since OpenAI's clients send them. So are the values of an unsupported parameter that
mean "nothing" (`tools: []`, `tool_choice: "none"`). Types are strict: "1" is no number.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, model_validator

from lorakit.serve.grammar import Grammar
from lorakit.serve.request import AdapterInfo

INERT = frozenset(
    {"metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
     "prompt_cache_options", "prediction", "parallel_tool_calls"}
)  # fmt: skip
"""Parameters that change nothing about the answer."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
    "moderation": (),
    "suffix": ("",),
    "best_of": (1,),
}
"""Parameters that are known and not supported -> the values, besides null, that ask for nothing."""


def _whole(text: str) -> str:
    """JSON can hold half of a character (a lone surrogate), which no tokenizer and no answer can."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as problem:
            raise ValueError("a text holds half of a character (a lone surrogate)") from problem
    return text


Text = Annotated[str, AfterValidator(_whole)]
Name = Annotated[Text, StringConstraints(min_length=1, max_length=200)]
Stop = Annotated[Text, StringConstraints(min_length=1, max_length=1000)]
Id = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,9}$")]
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, fail_fast=True)]
PROMPTS = 2048
"""Prompts of one body; how many answers one may ask for is the operator's."""
SOME = Field(min_length=1, max_length=PROMPTS, fail_fast=True)
"""What every list of prompts keeps to. The first wrong entry is the last that is looked at: a megabyte of wrong ones would take
seconds to complain of."""


class Wrong(ValueError):  # noqa: N818 - named by what it says
    """A complaint about one parameter, which it names."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param


class Strict(BaseModel):
    """Nothing is converted, nothing unknown passes, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


# -- requests ----------------------------------------------------------------------------------------------------------------


class StreamOptions(Strict):
    """What a stream holds besides the answer."""

    include_usage: bool | None = Field(default=None, description="A last chunk with the usage of the whole request.")
    include_obfuscation: bool | None = Field(default=None, description="Accepted, and never done.")


class Part(Strict):
    """A piece of a message. Only text is served."""

    type: Literal["text"]
    text: Text


class Message(Strict):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[Part], Field(fail_fast=True)] | None = None
    name: Text | None = None
    tool_call_id: Text | None = None

    @model_validator(mode="before")
    @classmethod
    def _of_an_answer(cls, data: Any) -> Any:
        """A message that a client got from this API, sent back as it is: its empty fields say nothing."""
        if isinstance(data, dict):
            return {
                key: value for key, value in data.items() if key in cls.model_fields or value not in (None, [], "", {})
            }
        return data

    @property
    def text(self) -> str:
        """Its content in one piece."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class Scale(Strict):
    """An entry of llama.cpp's `lora`: the id that /lora-adapters gives, and a weight."""

    id: int
    scale: float


class NamedSchema(Strict):
    """The schema of `response_format`."""

    name: Text | None = None
    description: Text | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = Field(default=None, description="Accepted: a schema is always kept to.")


class ResponseFormat(Strict):
    """OpenAI's way to ask for JSON."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None

    @model_validator(mode="after")
    def _whole(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise Wrong(
                "response_format", 'response_format: json_schema goes with type "json_schema", and only with it.'
            )
        return self


class Structured(Strict):
    """vLLM's way to ask for an answer of a form; one of them."""

    json_: dict[str, Any] | Text | None = Field(default=None, alias="json")
    json_object: Literal[True] | None = None
    regex: Text | None = None
    choice: Annotated[list[Text], Field(min_length=1, max_length=1000)] | None = None
    grammar: Text | None = Field(default=None, description="llama.cpp's GBNF, or Lark.")


_FORMS: dict[str, Literal["json", "regex", "choice", "rules"]] = {
    "guided_json": "json", "guided_regex": "regex", "guided_choice": "choice", "guided_grammar": "rules",
    "json_schema": "json", "regex": "regex", "ebnf": "rules", "grammar": "rules",
}  # fmt: skip
"""Other servers' parameters for the form of an answer -> what they are."""


class Generation(Strict):
    """What both kinds of completion take."""

    unsupported: ClassVar[str] = "changes the answer, and this server does not support it"

    model: Name = Field(description="The base model's name, or an adapter's.")
    adapters: dict[Name, float] | None = Field(
        None, description="A blend over the base model: adapter -> weight.", min_length=1, max_length=16
    )
    lora_path: Name | None = Field(None, description="SGLang's: an adapter's name, over the base model.")
    adapter_id: Name | None = Field(None, description="LoRAX's: an adapter's name, over the base model.")
    adapter_source: Literal["local"] | None = Field(None, description="LoRAX's; adapters come from the store alone.")
    lora: Annotated[list[Scale], Field(min_length=1, max_length=16)] | None = Field(
        None, description="llama.cpp's: a blend by the ids of /lora-adapters."
    )
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1, le=1_000_000, description="0 and -1 are all.")
    min_p: float | None = Field(default=None, ge=0, le=1)
    min_tokens: int | None = Field(default=None, ge=0)
    logit_bias: dict[Id, Annotated[float, Field(ge=-100, le=100)]] | None = Field(
        default=None, max_length=1024, description="Token id -> number added to its logit."
    )
    n: int | None = Field(default=None, ge=1, le=128)
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    stop_token_ids: list[Annotated[int, Field(ge=0)]] | None = Field(default=None, max_length=64)
    ignore_eos: bool | None = Field(default=None, description="Continue after the model's end-of-text tokens.")
    seed: int | None = Field(default=None, ge=-(2**63), le=2**63 - 1)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    repetition_penalty: float | None = Field(default=None, ge=0.01, le=100)
    cache_salt: Annotated[Text, StringConstraints(min_length=1, max_length=1024)] | None = Field(
        default=None, description="Prompts share cached beginnings with those of the same salt alone."
    )
    response_format: ResponseFormat | None = None
    structured_outputs: Structured | None = Field(None, description="vLLM's: json, regex, choice or grammar.")
    guided_json: dict[str, Any] | Text | None = Field(None, description="vLLM's older name.")
    guided_regex: Text | None = None
    guided_choice: Annotated[list[Text], Field(min_length=1, max_length=1000)] | None = None
    guided_grammar: Text | None = None
    json_schema: dict[str, Any] | Text | None = Field(None, description="SGLang's and llama.cpp's.")
    regex: Text | None = Field(None, description="SGLang's.")
    ebnf: Text | None = Field(None, description="SGLang's.")
    grammar: Text | None = Field(None, description="llama.cpp's GBNF.")
    user: Text | None = Field(
        default=None, description="Of several adapters behind an alias, a user gets always the same."
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _known(cls, data: Any) -> Any:
        """Leaves out what changes nothing, and says of the rest which parameter is not supported."""
        if not isinstance(data, dict):
            return data
        kept: dict[Any, Any] = {}
        for name, value in data.items():
            if name in cls.model_fields:
                kept[name] = value
            elif name in NEUTRAL:
                if value is not None and not any(value == one and type(value) is type(one) for one in NEUTRAL[name]):
                    raise Wrong(name, f"{name} {cls.unsupported}; leave it out.")
            elif name not in INERT:
                kept[name] = value
        return kept

    @model_validator(mode="after")
    def _agree(self) -> Generation:
        if self.stream_options is not None and not self.stream:
            raise Wrong("stream_options", "stream_options goes with stream: true only.")
        given = [name for name in ("adapters", "lora_path", "adapter_id", "lora") if getattr(self, name) is not None]
        if len(given) > 1:
            raise Wrong(given[1], f"{given[0]} and {given[1]} both name adapters; give one of them.")
        if len(forms := self._forms) > 1:
            raise Wrong(forms[1].param, f"{forms[0].param} and {forms[1].param} both give the answer a form; give one.")
        return self

    @property
    def form(self) -> Grammar | None:
        """What the answer must keep to."""
        return next(iter(self._forms), None)

    @property
    def _forms(self) -> list[Grammar]:
        found: list[Grammar] = []
        if (asked := self.response_format) is not None and asked.type != "text":
            schema = asked.json_schema.schema_ if asked.json_schema is not None else None
            found.append(Grammar("json", json.dumps(schema or {"type": "object"}), "response_format"))
        given: list[tuple[str, Literal["json", "regex", "choice", "rules"], Any]] = [
            (name, kind, getattr(self, name)) for name, kind in _FORMS.items()
        ]
        if (own := self.structured_outputs) is not None:
            given += [
                ("structured_outputs.json", "json", own.json_),
                ("structured_outputs.json_object", "json", {"type": "object"} if own.json_object else None),
                ("structured_outputs.regex", "regex", own.regex),
                ("structured_outputs.choice", "choice", own.choice),
                ("structured_outputs.grammar", "rules", own.grammar),
            ]
        for param, kind, value in given:
            if value is not None:
                found.append(Grammar(kind, value if isinstance(value, str) else json.dumps(value), param))
        return found

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def choices(self) -> int:
        """How many answers to each prompt."""
        return self.n or 1

    @property
    def scored(self) -> int | None:
        """How many probable tokens to report with each token of the prompt; None: no probabilities of the prompt."""
        return None


class ChatRequest(Generation):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)

    @model_validator(mode="after")
    def _logprobs(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise Wrong("top_logprobs", "top_logprobs goes with logprobs: true only.")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise Wrong("max_completion_tokens", "max_tokens and max_completion_tokens differ; give one of them.")
        return self

    prompt_count: ClassVar[int] = 1

    @property
    def limit(self) -> int | None:
        """Generated tokens at most."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def reported(self) -> int | None:
        """How many probable tokens to report with each; None: no probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(Generation):
    """The body of /v1/completions."""

    prompt: Text | Annotated[list[Text], SOME] | TokenIds | Annotated[list[TokenIds], SOME]
    max_tokens: int | None = Field(
        default=None, ge=0, description="0 with echo or prompt_logprobs: the prompt's log probabilities alone."
    )
    echo: bool | None = Field(default=None, description="The prompt before the answer; with logprobs, its own as well.")
    logprobs: int | None = Field(default=None, ge=0, le=20)
    prompt_logprobs: int | None = Field(
        default=None, ge=0, le=20, description="Log probabilities of the prompt by token id, in vLLM's form."
    )
    best_of: int | None = Field(
        default=None, ge=1, le=128, description="Answers to make; the n of the greatest mean log probability are given."
    )
    return_token_ids: bool | None = Field(default=None, description="The ids of prompt and answer beside their texts.")
    return_tokens_as_token_ids: bool | None = Field(
        default=None, description='Tokens of log probabilities as "token_id:123".'
    )

    @model_validator(mode="after")
    def _whole(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo and self.prompt_logprobs is None:
            raise Wrong(
                "max_tokens", "max_tokens: 0 goes with echo or prompt_logprobs only: nothing else is to be answered."
            )
        if self.prompt_logprobs is not None and self.stream:
            raise Wrong("prompt_logprobs", "prompt_logprobs does not go with stream: true; echo with logprobs does.")
        if self.return_token_ids and self.stream:
            raise Wrong("return_token_ids", "return_token_ids does not go with stream: true.")
        if self.best_of is not None and self.best_of < (self.n or 1):
            raise Wrong("best_of", f"best_of was given as {self.best_of}, below n, which is {self.n}.")
        if self.ranked and self.stream:
            raise Wrong(
                "best_of", "best_of above n does not go with stream: true: all answers are compared at the end."
            )
        return self

    @property
    def ranked(self) -> bool:
        """Whether more answers are made than given."""
        return (self.best_of or 1) > (self.n or 1)

    @property
    def choices(self) -> int:
        """How many answers to each prompt are made."""
        return self.best_of or self.n or 1

    @property
    def scored(self) -> int | None:
        """How many probable tokens to report with each token of the prompt; None: no probabilities of the prompt."""
        asked = [self.prompt_logprobs, self.logprobs if self.echo else None, 0 if self.max_tokens == 0 else None]
        return max((one for one in asked if one is not None), default=None)

    @property
    def prompt_count(self) -> int:
        """How many prompts there are."""
        return 1 if isinstance(self.prompt, str) or isinstance(self.prompt[0], int) else len(self.prompt)

    @property
    def prompts(self) -> list[str | list[int]]:
        """Every prompt, as text or as token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [[int(one) for one in self.prompt]]
        return list(self.prompt)

    @property
    def limit(self) -> int | None:
        """Generated tokens at most; OpenAI's own default, which old clients count on."""
        return 16 if self.max_tokens is None else self.max_tokens

    @property
    def reported(self) -> int | None:
        """How many probable tokens to report with each; None: no probabilities."""
        return 0 if self.logprobs is None and self.ranked else self.logprobs


# -- answers -----------------------------------------------------------------------------------------------------------------


class PromptDetails(BaseModel):
    """How much of the prompt was already there."""

    cached_tokens: int


class Usage(BaseModel):
    """Tokens of a whole request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class TopLogprob(BaseModel):
    """A token that could have come."""

    token: str
    bytes: list[int] | None
    logprob: float


class TokenLogprob(TopLogprob):
    """A token that came."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Probabilities of an answer."""

    content: list[TokenLogprob] | None
    refusal: None = None


class CompletionLogprobs(BaseModel):
    """Probabilities in the older shape: parallel lists."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class PromptLogprob(BaseModel):
    """A token of a prompt, or one that could have stood there, in vLLM's form."""

    logprob: float
    rank: int
    decoded_token: str


class AnswerMessage(BaseModel):
    """The answer."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class Choice(BaseModel):
    """One of n answers to one of the prompts."""

    index: int
    finish_reason: Literal["stop", "length"]


class ChatChoice(Choice):
    """An answer as a message."""

    message: AnswerMessage
    logprobs: ChatLogprobs | None


class CompletionChoice(Choice):
    """An answer as a text."""

    text: str
    logprobs: CompletionLogprobs | None
    prompt_logprobs: list[dict[int, PromptLogprob] | None] | None = None
    prompt_token_ids: list[int] | None = None
    token_ids: list[int] | None = None


class Answer(BaseModel):
    """What both kinds of completion answer."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    usage: Usage


class ChatAnswer(Answer):
    """What /v1/chat/completions answers."""

    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]


class CompletionAnswer(Answer):
    """What /v1/completions answers."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice]


class Model(BaseModel):
    """What `model` may name."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["lorakit"] = "lorakit"
    parent: str | None = Field(default=None, description="The base model, for an adapter.")
    root: str = Field(description="The base model.")
    max_model_len: int = Field(description="Tokens of prompt and answer together.")
    lorakit: dict[str, str | int] | None = Field(
        default=None, description="Of an adapter that has been read: its method, its rank, and a digest of its files."
    )
    how: str | None = Field(default=None, description="How its rows are computed, once it has been read.")
    reason: str | None = Field(default=None, description="Why they are computed apart from the batch, where they are.")


class Models(BaseModel):
    """What /v1/models answers."""

    object: Literal["list"] = "list"
    data: list[Model]
    refused: dict[str, str] = Field(default={}, description="Adapters that cannot be served, and why.")


class ErrorBody(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """Every answer with a status of 400 or more."""

    error: ErrorBody


class AdapterList(BaseModel):
    """What /admin/adapters answers."""

    adapters: list[AdapterInfo]


class TenantList(BaseModel):
    """What a reload of the keys answers."""

    tenants: list[str]


class Health(BaseModel):
    """What /health and /ready answer."""

    status: str


def errors(**described: str) -> dict[int | str, dict[str, Any]]:
    """The errors of an endpoint for the API's description: `e404="no such model"`."""
    return {int(name[1:]): {"model": ErrorAnswer, "description": text} for name, text in described.items()}
