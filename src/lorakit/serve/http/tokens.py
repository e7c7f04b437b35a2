"""Texts as tokens and back, as vLLM's clients ask for it: /tokenize, /detokenize and /tokenizer_info."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends
from pydantic import Field, model_validator
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from lorakit.files.prompt import Prompter
from lorakit.serve.http.bodies import Message, Name, Strict, Text, TokenIds, Wrong, errors
from lorakit.serve.http.faults import Fault
from lorakit.serve.http.front import front_of, tenant_of
from lorakit.serve.http.guard import KEY
from lorakit.serve.http.text import check_length, encode_messages, encode_prompt

router = APIRouter(dependencies=[Depends(KEY)])
_ERRORS = errors(e400="A parameter is wrong; `param` names it.", e401="No key, or a wrong one.", e404="No such model.")


class Named(Strict):
    """A body that names a model, or means the base."""

    model: Name = Field(default="base", description="The base model's name, or an adapter's, whose tokenizer is meant.")


class TokenizeRequest(Named):
    """The body of /tokenize: a prompt or a conversation."""

    prompt: Text | None = None
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)] | None = None
    add_special_tokens: bool = Field(default=True, description="Of a prompt: with the tokenizer's own special tokens.")
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _one(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise Wrong("prompt", "give one of prompt and messages.")
        return self


class DetokenizeRequest(Named):
    """The body of /detokenize."""

    tokens: TokenIds


async def _prompter(request: Request, asked: Named, chat: bool = False) -> Prompter:
    """The tokenizer that is meant, if this key may use the model; one request of its quota."""
    front, tenant = front_of(request), tenant_of(request)
    blend = front.blend(asked, tenant)
    ledger = front.tenants.ledger(tenant)
    ledger.enter(tenant, 0, 0, front.clock())
    return await run_in_threadpool(front.prompter, blend, chat) if blend else front.prompts.base


@router.post("/tokenize", responses=_ERRORS)
async def tokenize(request: Request, asked: TokenizeRequest) -> dict[str, Any]:
    """The token ids of a prompt, or of a conversation in the model's own form."""
    front = front_of(request)
    prompter = await _prompter(request, asked, asked.messages is not None)
    window = front.engine.context

    def read() -> list[int]:
        if asked.messages is not None:
            return encode_messages(prompter, asked.messages, window)
        text = asked.prompt or ""
        check_length(len(text), window)
        if asked.add_special_tokens:
            return prompter.raw(text)
        found: list[int] = prompter.tokenizer.encode(text, add_special_tokens=False)
        return found

    ids = await run_in_threadpool(read)
    answer: dict[str, Any] = {"count": len(ids), "max_model_len": window, "tokens": ids}
    if asked.return_token_strs:
        answer["token_strs"] = prompter.tokenizer.convert_ids_to_tokens(ids)
    return answer


@router.post("/detokenize", responses=_ERRORS)
async def detokenize(request: Request, asked: DetokenizeRequest) -> dict[str, str]:
    """The text of token ids."""
    prompter = await _prompter(request, asked)
    try:
        encode_prompt(prompter, list(asked.tokens), front_of(request).engine.context)
    except Fault as fault:
        raise Fault(400, fault.message.replace("prompt holds", "tokens hold"), fault.code, "tokens") from None
    return {"prompt": await run_in_threadpool(prompter.tokenizer.decode, asked.tokens)}


@router.get("/tokenizer_info", responses=_ERRORS)
async def tokenizer_info(request: Request) -> dict[str, Any]:
    """The special tokens and the chat template of the base model's tokenizer."""
    tokenizer = (await _prompter(request, Named())).tokenizer
    return {
        "tokenizer_class": type(tokenizer).__name__,
        **{name: getattr(tokenizer, name, None) for name in ("bos_token", "eos_token", "pad_token", "unk_token")},
        "chat_template": getattr(tokenizer, "chat_template", None),
    }
